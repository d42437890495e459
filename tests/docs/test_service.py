"""The service that the documentation shows."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from command_line import perceptron, samples
from conftest import ROOT
from graphs import build

Sample = np.ndarray


def _integers(path: Path) -> Sample:
    """A model of integers with two outputs."""
    body = "(int64[N,3] input) => (int64[N,3] sum, int64[N,3] same) { sum = Add(input, input) same = Identity(input) }"
    onnx.save(build(body), path)
    return np.arange(3, dtype=np.int64)[None]


def _floats(path: Path) -> Sample:
    perceptron(path)
    return samples(1)


@pytest.mark.parametrize("make", [_floats, _integers])
def test_service_answers_as_the_model(
    make: Callable[[Path], Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "guide" / "pipelines.md").read_text(encoding="utf-8")
    block = re.search(r"```py\n(# service.py\n.*?)```", page, re.DOTALL)
    assert block
    monkeypatch.chdir(tmp_path)
    sample = make(tmp_path / "model.onnx")
    names: dict[str, object] = {"__name__": "service"}
    exec(compile(block[1], "service.py", "exec"), names)
    handler = names["Handler"]
    assert isinstance(handler, type)
    assert issubclass(handler, BaseHTTPRequestHandler)
    monkeypatch.setattr(handler, "log_message", lambda *_: None)
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
    session = onnxruntime.InferenceSession("model.onnx")
    assert list(found) == [output.name for output in session.get_outputs()]
    for answered, expected in zip(
        found.values(), session.run(None, {"input": sample}), strict=True
    ):
        np.testing.assert_allclose(answered, expected[0], rtol=1e-6)
