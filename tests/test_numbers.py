"""Numbers that misbehave: a result that holds, or a sentence that says why there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import build
from onnx import numpy_helper
from test_determinism import TEXT

from onnx_oamip import pipeline, prune
from onnx_oamip.errors import BudgetNotMet, DataError, SolverError
from onnx_oamip.latency import Ratio
from onnx_oamip.records import Report
from onnx_oamip.settings import Settings


@pytest.fixture(autouse=True)
def fast_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))


def go(tmp_path: Path, images: np.ndarray, proto: onnx.ModelProto | None = None, **values: Any) -> Report:
    path = tmp_path / "model.onnx"
    path.write_bytes((proto or build(TEXT)).SerializeToString())
    settings = Settings.create(**{"macs": 0.6, "align": 1, "device": "cpu", "workers": 1, **values})
    arrays = {"image": images.astype(np.float32), "labels": np.arange(len(images)) % 5}
    return prune(path, arrays, tmp_path / "out.onnx", settings)


def scaled(**factors: float) -> onnx.ModelProto:
    proto = build(TEXT)
    for tensor in proto.graph.initializer:
        if tensor.name in factors:
            value = numpy_helper.to_array(tensor) * np.float32(factors[tensor.name])
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return proto


IMAGES = np.random.default_rng(0).normal(size=(60, 3, 8, 8))
SINGULAR = {
    "one image, again and again": np.repeat(IMAGES[:1], 60, axis=0),
    "all zeros": np.zeros_like(IMAGES),
    "one channel three times": np.repeat(IMAGES[:, :1], 3, axis=1),
    "one constant": np.full_like(IMAGES, 0.25),
}


@pytest.mark.parametrize("importance", ["obs", "oamip"])
@pytest.mark.parametrize("name", SINGULAR)
def test_singular_second_moments(name: str, importance: str, tmp_path: Path) -> None:
    report = go(tmp_path, SINGULAR[name], importance=importance, mode="decoupled")
    assert report.after.macs <= 0.6 * report.before.macs
    for tensor in onnx.load(tmp_path / "out.onnx").graph.initializer:
        assert np.isfinite(numpy_helper.to_array(tensor)).all(), tensor.name
    assert report.scores is not None
    assert np.isfinite(report.scores.values).all()


@pytest.mark.parametrize("factor", [1e-12, 1e8])
def test_activations_of_huge_or_tiny_range(factor: float, tmp_path: Path) -> None:
    """The second layer takes back what the first one scales: the network is the same, and so is what goes."""
    plain = go(tmp_path, IMAGES)
    other = go(tmp_path, IMAGES, scaled(w1=factor, b1=factor, w2=1 / factor))
    assert plain.verification.output_relative_error is not None
    assert other.verification.output_relative_error == pytest.approx(
        plain.verification.output_relative_error, rel=0.05
    )
    np.testing.assert_array_equal(plain.plan.keep, other.plan.keep)


def test_activations_that_overflow_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="NaN or infinite"):
        go(tmp_path, IMAGES, scaled(w1=1e30, w2=1e30))
    assert not (tmp_path / "out.onnx").exists()


def test_squares_that_overflow_are_refused(tmp_path: Path) -> None:
    """Every activation is finite, but their squares are not."""
    with pytest.raises(DataError, match="NaN or infinite"):
        go(tmp_path, IMAGES, scaled(w1=1e25, b1=1e25, w2=1e-25))
    assert not (tmp_path / "out.onnx").exists()


def test_bounds_beyond_solvers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SolverError, match=r"beyond what solvers resolve; use --mode decoupled"):
        go(tmp_path, IMAGES, scaled(w1=1e8, b1=1e8), importance="oamip", mode="joint", refit="none", time_limit=5.0)
    assert not (tmp_path / "out.onnx").exists()


def test_a_budget_out_of_reach_names_what_binds(tmp_path: Path) -> None:
    with pytest.raises(BudgetNotMet, match=r"--macs budget cannot be met.*w1.*most MACs then are in"):
        go(tmp_path, IMAGES, macs=0.001)
    with pytest.raises(BudgetNotMet, match="without --floor"):
        go(tmp_path, IMAGES, macs=0.3, floor=0.9)
