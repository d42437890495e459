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
from onnx_oamip.core.errors import SettingsError
from onnx_oamip.planning import sensitivity, width_losses
from onnx_oamip.statistics import workload

TEXT = """(float[N,5] x) => (float[N,3] y) <float[5,8] w1, float[8,3] w2> {
    a = MatMul(x, w1)
    h = Relu(a)
    y = MatMul(h, w2)
}"""
MACS = 5 * 8 + 8 * 3
PASSES = 3.5


@pytest.mark.parametrize(("effort", "count"), [("low", 2), ("normal", 6), ("high", 16)])
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
    assert len(found) == (effort != "high")
    assert all(f"on {count} of 16 samples" in note for note in found)
    assert all(("about 4 times" in note) == (effort == "normal") for note in found)


def test_little_effort_measures_fewer_samples_and_widths(tmp_path: Path) -> None:
    """Of 128 samples for losses, 64 at four widths beside the full one; the budget is met all the same."""
    save(build(TEXT.replace("8]", "40]").replace("[8", "[40")), tmp_path / "model.onnx")
    data = {"x": np.random.default_rng(0).normal(size=(640, 5)).astype(np.float32)}
    found = {}
    for effort in ("low", "normal"):
        settings = Settings.create(macs=0.5, effort=effort, device="cpu", cache="off", align=1)
        ready = prepare(tmp_path / "model.onnx", data, settings)
        found[effort] = ready.curves[0]
        notes = [note for note in ready.objective.notes if "losses of widths" in note]
        assert len(notes) == (effort == "low")
        assert all("on 64 of 128 samples, at 4 widths of a group in place of 6" in n for n in notes)
    assert found["low"].widths.tolist() == [1, 8, 18, 28, 40]
    assert found["normal"].widths.tolist() == [1, 6, 12, 18, 24, 32, 40]
    report = pipeline.prune(
        tmp_path / "model.onnx",
        data,
        tmp_path / "out.onnx",
        Settings.create(macs=0.5, effort="low", device="cpu", cache="off", align=1),
    )
    assert report.after.macs <= 0.5 * report.before.macs


def test_effort_without_a_program_is_refused(tmp_path: Path) -> None:
    save(build(TEXT), tmp_path / "model.onnx")
    data = {"x": np.random.default_rng(0).normal(size=(80, 5)).astype(np.float32)}
    settings = Settings.create(
        macs=0.5, effort="low", allocate="uniform", device="cpu", cache="off"
    )
    with pytest.raises(SettingsError, match="`effort=low` says how losses are measured"):
        prepare(tmp_path / "model.onnx", data, settings)


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
