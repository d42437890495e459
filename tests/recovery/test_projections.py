"""Projections: combinations of the original's channels that a pruned model has in place of channels."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import build, load
from onnx import numpy_helper

from onnx_oamip.artifacts import plan_files
from onnx_oamip.core.records import Array, Model
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.data.dataset import Samples
from onnx_oamip.recovery import projections
from onnx_oamip.recovery.projections import Projected, projected

STREAM = """(float[N, 8] x) => (float[N, 4] y)
<float[8, {width}] w1, float[{width}] b1, float[{width}, 16] w2, float[16, 4] w3> {{
    a = MatMul(x, w1)
    c = Add(a, b1)
    h = MatMul(c, w2)
    r = Relu(h)
    y = MatMul(r, w3)
}}"""
"""Channels between two linear layers: they may be exchanged for combinations of them."""


def _with(folder: Path, width: int, **constants: Array) -> Model:
    """The network at a width of its stream, with other values of the constants."""
    proto = build(STREAM.format(width=width))
    for held in proto.graph.initializer:
        if held.name in constants:
            value = constants[held.name].astype(np.float32)
            held.CopyFrom(numpy_helper.from_array(value, held.name))
    return load(proto, folder)


@pytest.fixture
def constants() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shapes = {"w1": (8, 6), "b1": (6,), "w2": (6, 16)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def _samples(model: Model) -> Samples:
    values = np.random.default_rng(1).normal(size=(200, 8)).astype(np.float32)
    found = dataset.load({"x": values}, model)
    assert found is not None
    return found


def _projected(
    original: Model, pruned: Model, samples: Samples, known: tuple[str, ...] = ("r",)
) -> Projected:
    """Projections without those of tensors that are of the same shape in both models."""
    return projected(original, pruned, known, samples, device="cpu", batch_size=32, seed=0)


def test_projection_equals_the_change_of_basis(constants: dict[str, Array], tmp_path: Path) -> None:
    """With z = x P + p in the weights of the pruned model, P and p are found."""
    rng = np.random.default_rng(2)
    basis, shift = rng.normal(size=(6, 3)), rng.normal(size=3)
    original = _with(tmp_path, 6, **constants)
    pruned = _with(
        tmp_path,
        3,
        w1=constants["w1"] @ basis,
        b1=constants["b1"] @ basis + shift,
        w2=np.linalg.pinv(basis) @ constants["w2"],
    )
    samples = _samples(original)
    (found,) = _projected(original, pruned, samples).features
    assert found.tensor == "c"
    assert found.narrowed == (1,)
    assert found.projection is not None
    np.testing.assert_allclose(found.projection.matrix, basis, atol=1e-3)
    np.testing.assert_allclose(found.projection.shift, shift, atol=1e-3)


def test_reasons_why_ends_of_blocks_are_not_compared(
    constants: dict[str, Array], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = _with(tmp_path, 6, **constants)
    pruned, wider = _with(tmp_path, 3), _with(tmp_path, 9)
    samples = _samples(original)
    known = _projected(original, pruned, samples, known=("c", "r"))
    assert not known.features
    assert not known.left_out
    equal = _projected(original, wider, samples)
    assert not equal.features
    assert equal.left_out == {"c": "the pruned model is not narrower along one axis alone"}
    unknown = replace(pruned, shapes={n: s for n, s in pruned.shapes.items() if n != "c"})
    reason = "the pruned model has no such tensor, or its shape is not known"
    assert _projected(original, unknown, samples).left_out == {"c": reason}
    fewer_axes = replace(pruned, shapes={**pruned.shapes, "c": (3,)})
    reason = "the two models have different numbers of axes there"
    assert _projected(original, fewer_axes, samples).left_out == {"c": reason}
    monkeypatch.setattr(projections, "MOST_CHANNELS", 5)
    reason = "more than 5 channels to combine"
    assert _projected(original, pruned, samples).left_out == {"c": reason}


def test_projection_is_found_on_some_positions_of_large_tensors(
    constants: dict[str, Array], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows of 32 in every run, the same ones of both models."""
    monkeypatch.setattr(projections, "POSITIONS", 2)
    original = _with(tmp_path, 6, **constants)
    halves = {"w1": constants["w1"][:, ::2], "b1": constants["b1"][::2]}
    pruned = _with(tmp_path, 3, **halves, w2=constants["w2"][::2])
    samples = _samples(original)
    (found,) = _projected(original, pruned, samples).features
    assert found.projection is not None
    np.testing.assert_allclose(found.projection.matrix, np.eye(6)[:, ::2], atol=1e-3)


def test_what_pruning_took_away_does_not_shrink_the_projection(tmp_path: Path) -> None:
    """Every channel is a sum of two inputs, of which the pruned model has lost one: a fifth of its variance."""
    whole = np.concatenate([np.eye(4), np.eye(4) / 2])
    halves = np.concatenate([np.eye(4), np.zeros((4, 4))])
    original = _with(tmp_path, 4, w1=whole, b1=np.zeros(4))
    pruned = _with(tmp_path, 2, w1=halves[:, 1:3], b1=np.zeros(2))
    drawn = np.random.default_rng(4).normal(size=(200, 8))
    uncorrelated = np.linalg.qr(drawn - drawn.mean(axis=0))[0] * np.sqrt(200)
    samples = dataset.load({"x": uncorrelated.astype(np.float32)}, original)
    (found,) = _projected(original, pruned, samples).features
    assert found.projection is not None
    np.testing.assert_allclose(found.projection.matrix, np.eye(4)[:, 1:3], atol=1e-3)


def test_channels_that_are_no_combinations_are_left_out(
    constants: dict[str, Array], tmp_path: Path
) -> None:
    """The original reads the first half of the input alone, and the channels of the other model the second half."""
    first, second = np.ones((8, 1)), np.ones((8, 1))
    first[4:] = second[:4] = 0
    rng = np.random.default_rng(3)
    original = _with(tmp_path, 6, w1=first * constants["w1"])
    other = _with(tmp_path, 3, w1=second * rng.normal(size=(8, 3)))
    found = _projected(original, other, _samples(original))
    assert not found.features
    (reason,) = found.left_out.values()
    assert re.fullmatch(r"combinations .* explain \d% of the variance, less than half", reason)


def test_channels_without_variance_are_left_out(tmp_path: Path) -> None:
    original, pruned = (_with(tmp_path, width, w1=np.zeros((8, width))) for width in (6, 3))
    found = _projected(original, pruned, _samples(original))
    assert not found.features
    assert found.left_out == {"c": "the channels of one model are constant"}


def test_recovery_with_a_plan_compares_principal_components(tmp_path: Path) -> None:
    """The stream is kept as components, which no index of a channel names."""
    pytest.importorskip("torch")
    from onnx_oamip.api.pipeline import apply, plan
    from onnx_oamip.api.recovery import recover

    model, data = tmp_path / "model.onnx", tmp_path / "data.npz"
    onnx.save_model(build(STREAM.format(width=12)), model)
    np.savez(data, x=np.random.default_rng(0).normal(size=(240, 8)).astype(np.float32))
    chosen = Settings.create(macs=0.4, align=1, task="values", device="cpu", force=True)
    plan(model, data, tmp_path / "plan.json", chosen)
    entries = plan_files.content(tmp_path / "plan.json").groups
    assert any(entry.rotated for entry in entries)
    apply(model, tmp_path / "plan.json", data, tmp_path / "out.onnx", {"force": True})
    options = Settings.create(recover=3, task="values", device="cpu")
    arguments = (tmp_path / "out.onnx", model, data, options)
    found = recover(*arguments, plan_file=tmp_path / "plan.json")
    assert "c" in found.recovery.features
