"""Losses by width: the samples that they are measured on, and what an interrupted run has measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import CNN, build, load, samples
from onnx import save

from onnx_oamip import Settings
from onnx_oamip.api import pipeline
from onnx_oamip.api.prepare import prepare
from onnx_oamip.planning import sensitivity, width_losses
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


def test_interrupted_measurement_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(build(CNN), tmp_path)
    data: Any = samples(model, 40)
    monkeypatch.setattr(width_losses, "SECONDS_BETWEEN_WRITES", 0.0)
    real = sensitivity._measure
    measured: list[int] = []
    last = 10**9

    def measure(whole: sensitivity._Whole, job: Any) -> Any:
        if len(measured) == last:
            raise KeyboardInterrupt
        measured.append(job[0])
        return real(whole, job)

    def plan(cache: str) -> tuple[str, tuple[str, ...]]:
        """The text of the plan, which has all losses, and the notes."""
        settings = Settings.create(macs=0.5, align=1, device="cpu", workers=1, cache=cache)
        path = tmp_path / "plan.json"
        notes = pipeline.plan(tmp_path / "case.onnx", data, path, settings).notes
        return path.read_text(), notes

    monkeypatch.setattr(sensitivity, "_measure", measure)
    whole, _ = plan("off")
    groups = sorted(measured)
    assert len(groups) > 1
    measured.clear()
    last = len(groups) - 1
    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        plan(str(cache))
    assert len(list(cache.glob("some-losses-*.npz"))) == 1
    last = 10**9
    again, notes = plan(str(cache))
    assert sorted(measured) == groups, "every group is measured once in both runs"
    assert any("some losses" in note for note in notes)
    assert again == whole
    assert not list(cache.glob("some-losses-*.npz"))
