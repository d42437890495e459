"""Refit of weights that several nodes share: one least-squares problem over all uses, written once as it was stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cases_quantized import codes
from graphs import build, load
from graphs import samples as random_samples
from onnx import ModelProto, numpy_helper

from onnx_oamip.core.records import Array, Bools, Coupling, Floats, Model, Pruned
from onnx_oamip.data import dataset
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.linear_layers import Editor, site
from onnx_oamip.graph.partial_execution import Slicer
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.graph.weight_sharing import Sharing
from onnx_oamip.repair import least_squares, ridge
from onnx_oamip.repair.shared_weights import Family, schedule

TWO_BRANCHES = """(float[N,5] a, float[N,5] b) => (float[N,3] y, float[N,3] z)
<float[5,8] wa, float[5,8] wb, float[8,3] u, float[3] ca, float[3] cb> {
    ma = MatMul(a, wa)
    mb = MatMul(b, wb)
    ra = Relu(ma)
    rb = Tanh(mb)
    y = Gemm<alpha = 0.5>(ra, u, ca)
    z = Gemm(rb, u, cb)
}"""
RECURSIVE = """(float[N,6] x) => (float[N,4] y)
<float[6,16] first, float[16,12] up, float[12] cu, float[12,16] down, float[16] cd, float[16,4] last, float[4] cl> {
    h0 = MatMul(x, first)
    u0 = Gemm(h0, up, cu)
    r0 = Relu(u0)
    h1 = Gemm(r0, down, cd)
    u1 = Gemm(h1, up, cu)
    r1 = Relu(u1)
    h2 = Gemm(r1, down, cd)
    y = Gemm(h2, last, cl)
}"""


def _samples(model: Model, count: int, seed: int = 0) -> Samples:
    found = dataset.load(random_samples(model, count, seed), model)
    assert found is not None
    return found


def _without(coupling: Coupling, tensor: str, axis: int, channels: list[int]) -> Bools:
    keep = np.ones(coupling.n_units, bool)
    keep[coupling.axes[tensor, axis][channels]] = False
    return keep


def _fit(model: Model, keep: Bools, found: Samples) -> Pruned:
    coupling = couple(model)
    raw = rewrite.cut(model, coupling, keep)
    sampling = least_squares.Sampling(samples=found, device="cpu")
    return least_squares.front(model, coupling, keep, raw, sampling, short=())


def _stored(proto: ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def _error(model: Model, other: ModelProto, found: Samples) -> float:
    before, after = Session(model.proto, "cpu"), Session(other, "cpu")
    squared = energy = 0.0
    for _, feed in found.batches(64):
        for a, b in zip(before.run(feed), after.run(feed), strict=True):
            squared += float(np.square(a.astype(np.float64) - b).sum())
            energy += float(np.square(a.astype(np.float64)).sum())
    return float(np.sqrt(squared / energy))


def _dense(parts: list[tuple[Floats, Floats]], weight: Floats, strength: float) -> Floats:
    """``argmin over D of sum |r - D x - b|^2 + ridge |D|^2``, with a bias for every part, by one dense system.

    Args:
        parts: Inputs and residuals (rows, inputs), (rows, outputs) of every use.
        weight: Weights that the change is added to (inputs, outputs).
        strength: Ridge strength relative to the mean diagonal.
    """
    inputs = weight.shape[0]
    rows = []
    wanted = []
    for i, (x, residual) in enumerate(parts):
        ones = np.zeros((len(x), len(parts)))
        ones[:, i] = 1
        rows.append(np.hstack([x, ones]))
        wanted.append(residual)
    design, target = np.vstack(rows), np.vstack(wanted)
    centred = np.vstack([x - x.mean(axis=0) for x, _ in parts])
    loading = np.zeros((design.shape[1], design.shape[1]))
    diagonal = strength * np.square(centred).sum() / inputs
    loading[:inputs, :inputs] = diagonal * np.eye(inputs)
    solution = np.linalg.solve(design.T @ design + loading, design.T @ target)
    return weight + solution[:inputs]


def test_shared_weight_solves_the_summed_normal_equations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ridge.choose_ridge, "__defaults__", ((0.01,),))
    model = load(build(TWO_BRANCHES), tmp_path)
    coupling = couple(model)
    keep = _without(coupling, "u", 0, [1, 4, 6])
    found = _samples(model, 400)
    pruned = _fit(model, keep, found)
    (fit,) = pruned.fits
    assert fit.rows == 800
    assert fit.error_after < fit.error_before
    assert fit.node == "Gemm_4 and 1 more"
    before = _stored(model.proto)
    kept = coupling.keep(("u", 0), keep)
    a, b = (np.asarray(found.arrays[name], np.float64) for name in ("a", "b"))
    hidden = np.maximum(a @ before["wa"], 0), np.tanh(b @ before["wb"])
    weight = before["u"].astype(np.float64)
    parts = [
        (factor * x[:, kept], factor * x[:, ~kept] @ weight[~kept])
        for factor, x in zip((0.5, 1.0), hidden, strict=True)
    ]
    reference = _dense(parts, weight[kept], 0.01)
    after = _stored(pruned.proto)
    np.testing.assert_allclose(after["u"], reference, rtol=2e-4, atol=2e-5)
    # Either use has the bias that fits best to the common weight.
    for (x, residual), bias in zip(parts, ("ca", "cb"), strict=True):
        shift = (residual - x @ (reference - weight[kept])).mean(axis=0)
        np.testing.assert_allclose(after[bias], before[bias] + shift, rtol=1e-3, atol=1e-4)
    assert len(pruned.proto.graph.initializer) == len(model.proto.graph.initializer)


def test_layers_with_common_weights_and_biases_are_refitted_without_copies(tmp_path: Path) -> None:
    model = load(build(RECURSIVE), tmp_path)
    coupling = couple(model)
    keep = _without(coupling, "up", 1, [2, 3, 7])
    found, other = _samples(model, 300), _samples(model, 100, 5)
    pruned = _fit(model, keep, found)
    assert not pruned.notes
    assert _stored(pruned.proto).keys() == _stored(model.proto).keys()
    assert {name: v.shape for name, v in _stored(pruned.proto).items()} == {
        name: v.shape for name, v in _stored(pruned.raw).items()
    }
    assert _error(model, pruned.proto, other) < 0.7 * _error(model, pruned.raw, other)


def test_uses_behind_the_weight_itself_are_late(tmp_path: Path) -> None:
    model = load(build(RECURSIVE), tmp_path)
    families = _all_families(model)
    assert [family.names for family in families] == [
        ("MatMul_0",),
        ("Gemm_1", "Gemm_4"),
        ("Gemm_3", "Gemm_6"),
        ("Gemm_7",),
    ]
    planned = schedule(families, Slicer(model.proto))
    assert [sorted(family.late) for family in planned] == [[], ["Gemm_4"], ["Gemm_6"], []]


def test_uses_in_parallel_branches_are_observed_in_the_cut_model(tmp_path: Path) -> None:
    model = load(build(TWO_BRANCHES), tmp_path)
    planned = schedule(_all_families(model), Slicer(model.proto))
    assert all(not family.late for family in planned)
    assert sum(family.is_shared for family in planned) == 1


def _all_families(model: Model) -> list[Family]:
    sharing = Sharing(model)
    found: dict[tuple[str, ...], Family] = {}
    for node in model.nodes:
        place = site(node, model.constants)
        if place is not None:
            assert not sharing.obstacle(place)
            family = Family(sharing.family(place))
            found.setdefault(family.names, family)
    return list(found.values())


def test_weight_that_is_read_in_two_forms_is_not_refitted(tmp_path: Path) -> None:
    text = """(float[N,6] x) => (float[N,6] y)
    <float[6,20] shared> {
        a = MatMul(x, shared)
        c = Relu(a)
        turned = Transpose<perm = [1, 0]>(shared)
        y = MatMul(c, turned)
    }"""
    model = load(build(text), tmp_path)
    keep = _without(couple(model), "shared", 1, [0, 5, 9])
    pruned = _fit(model, keep, _samples(model, 100))
    assert pruned.proto.SerializeToString() == pruned.raw.SerializeToString()
    (note,) = pruned.notes
    assert "'shared' is shared with MatMul" in note
    assert note.endswith("which reads it in another form, so it is not refitted")


def test_half_precision_weights_are_refitted_as_stored(tmp_path: Path) -> None:
    text = """(float[N,6] x) => (float[N,4] y)
    <float16[6,24] w1, float16[24,4] w2, float[4] b2> {
        v1 = Cast<to = 1>(w1)
        v2 = Cast<to = 1>(w2)
        a = MatMul(x, v1)
        h = Relu(a)
        y = Gemm(h, v2, b2)
    }"""
    model = load(build(text), tmp_path)
    keep = _without(couple(model), "w1", 1, [1, 2, 8, 20])
    found, other = _samples(model, 300), _samples(model, 100, 5)
    pruned = _fit(model, keep, found)
    after = _stored(pruned.proto)
    assert {name: value.dtype for name, value in after.items()} == {
        name: value.dtype for name, value in _stored(pruned.raw).items()
    }
    assert not np.array_equal(after["w2"], _stored(pruned.raw)["w2"])
    (fit,) = pruned.fits
    assert _error(model, pruned.proto, other) < 0.8 * _error(model, pruned.raw, other)
    # The error in the report is that of the rounded weights, here at rows that the fit has not seen.
    rows, held = found.arrays["x"].astype(np.float64), slice(240, 300)
    before = _stored(model.proto)
    wanted = np.maximum(rows @ before["w1"], 0) @ before["w2"] + before["b2"]
    kept = np.maximum(rows @ after["w1"], 0)
    residual = wanted - kept @ after["w2"].astype(np.float64)
    shift = residual[:240].mean(axis=0)
    measured = np.square(residual[held] - shift).mean(axis=0).sum() / wanted.var(axis=0).sum()
    assert fit.error_after == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    "forms",
    [
        ("r1 = Cast<to = 1>(q1)  v1 = Mul(r1, s1)", "r2 = Cast<to = 1>(q2)  v2 = Mul(r2, s2)"),
        ("v1 = DequantizeLinear(q1, s1)", "v2 = DequantizeLinear(q2, s2)"),
    ],
    ids=["product", "dequantised"],
)
def test_codes_are_refitted_and_stay_codes(forms: tuple[str, str], tmp_path: Path) -> None:
    text = f"""(float[N,6] x) => (float[N,4] y)
    <{codes("int8", "q1", 6, 24)}, float s1 = {{0.01}}, {codes("int8", "q2", 24, 4)}, float s2 = {{0.005}},
    float[4] b2> {{
        {forms[0]}
        {forms[1]}
        a = MatMul(x, v1)
        h = Relu(a)
        y = Gemm(h, v2, b2)
    }}"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    assert coupling.n_units == 24
    pruned = _fit(model, _without(coupling, "q1", 1, [1, 2, 8, 20]), _samples(model, 300))
    before, after = _stored(pruned.raw), _stored(pruned.proto)
    assert {n: (v.shape, v.dtype) for n, v in after.items()} == {
        n: (v.shape, v.dtype) for n, v in before.items()
    }
    assert after["q2"].shape == (20, 4)
    assert not np.array_equal(after["q2"], before["q2"])
    other = _samples(model, 100, 5)
    assert _error(model, pruned.proto, other) < 0.8 * _error(model, pruned.raw, other)


def test_refit_that_overflows_half_precision_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """(float[N,6] x) => (float[N,4] y)
    <float[6,24] w1, float16[24,4] w2> {
        v2 = Cast<to = 1>(w2)
        a = MatMul(x, w1)
        h = Relu(a)
        y = MatMul(h, v2)
    }"""
    model = load(build(text), tmp_path)
    keep = _without(couple(model), "w1", 1, [1, 2, 8, 20])
    monkeypatch.setattr(Editor, "rounded", lambda *_: np.full((20, 4), np.inf, np.float32))
    pruned = _fit(model, keep, _samples(model, 100))
    assert not pruned.fits
    (note,) = pruned.notes
    assert note.endswith("fitted weights are out of range for float16, so it is not refitted")
    assert pruned.proto.SerializeToString() == pruned.raw.SerializeToString()
