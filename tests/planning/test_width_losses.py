"""Losses by width: the samples that they are measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import build
from onnx import save

from onnx_oamip import Settings
from onnx_oamip.api.prepare import prepare
from onnx_oamip.planning import sensitivity
from onnx_oamip.statistics import workload

TEXT = """(float[N,5] x) => (float[N,3] y) <float[5,8] w1, float[8,3] w2> {
    a = MatMul(x, w1)
    h = Relu(a)
    y = MatMul(h, w2)
}"""
MACS = 5 * 8 + 8 * 3
PASSES = 3.5


@pytest.mark.parametrize(("effort", "count"), [("normal", 6), ("high", 16)])
def test_large_network_is_measured_on_fewer_samples(
    effort: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload, "LOSS_MACS", 6.5 * PASSES * MACS)
    counts: list[int] = []
    real = sensitivity.measure

    def measure(*arguments: Any, **named: Any) -> Any:
        counts.append(sum(len(feed["x"]) for feed in arguments[4]))
        return real(*arguments, **named)

    monkeypatch.setattr(sensitivity, "measure", measure)
    save(build(TEXT), tmp_path / "model.onnx")
    data = {"x": np.random.default_rng(0).normal(size=(80, 5)).astype(np.float32)}
    settings = Settings.create(macs=0.5, effort=effort, device="cpu", cache="off", align=1)
    ready = prepare(tmp_path / "model.onnx", data, settings)
    assert counts == [count]
    found = [note for note in ready.objective.notes if "losses of widths" in note]
    assert len(found) == (effort == "normal")
    assert all("on 6 of 16 samples" in note and "about 4 times" in note for note in found)
