"""The service that the documentation shows."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from command_line import perceptron, samples
from conftest import ROOT


def test_service_answers_as_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "guide" / "pipelines.md").read_text(encoding="utf-8")
    block = re.search(r"```py\n(# service.py\n.*?)```", page, re.DOTALL)
    assert block
    monkeypatch.chdir(tmp_path)
    perceptron(tmp_path / "model.onnx")
    names: dict[str, object] = {"__name__": "service"}
    exec(compile(block[1], "service.py", "exec"), names)
    handler = names["Handler"]
    assert isinstance(handler, type)
    assert issubclass(handler, BaseHTTPRequestHandler)
    monkeypatch.setattr(handler, "log_message", lambda *_: None)
    sample = samples(1)
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(address, sample.tobytes(), timeout=10) as answer:
            found = json.loads(answer.read())
    finally:
        thread.join(timeout=10)
        server.server_close()
    (expected,) = onnxruntime.InferenceSession("model.onnx").run(None, {"input": sample})
    np.testing.assert_allclose(found, expected[0], rtol=1e-6)
