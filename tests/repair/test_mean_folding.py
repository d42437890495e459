"""The bias refit: the mean of what was removed stays in what consumers put out, whatever their operator and layout.

Sums over a consumer's rows are linear, so the mean output over the calibration data must come out as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from cases import CASES
from graphs import activations, build, constants, load, samples

from onnx_oamip.core.records import (
    Array,
    Bools,
    Coupling,
    Model,
    Pruned,
    Statistics,
)
from onnx_oamip.data import dataset
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.repair import mean_folding, refit_scope
from onnx_oamip.statistics import calibration


@dataclass(frozen=True)
class Fold:
    """A graph, the group (by its name) that loses half of its units, and outputs (tensor, channel axis) to look at.

    ``flat``: the images are constant in space, because a tap of a larger kernel sees another part of the image than
    its neighbour, and only then do all of them have the mean of the whole image.
    """

    text: str
    group: str
    outputs: tuple[tuple[str, int], ...]
    flat: bool = False


CNN = """(float[N,3,7,7] x) => (float[] y) <float[8,3,3,3] w1, float[8] b1{declared}> {{
    c = Conv(x, w1, b1)
    h = Relu(c)
    {body}
}}"""


def _cnn(declared: str, body: str) -> str:
    return CNN.format(declared=", " + declared, body=body)


FOLDS = {
    "matmul": Fold(
        "(float[N,5] x) => (float[] y) <float[5,8] w1, float[8,3] w2>"
        " { a = MatMul(x, w1) h = Relu(a) y = MatMul(h, w2) }",
        "w1",
        (("y", 1),),
    ),
    "the second of two": Fold(
        "(float[N,5] x) => (float[] y) <float[5,8] w1, float[8,6] w2, float[6,3] w3>"
        " { a = MatMul(x, w1) h = Relu(a) b = MatMul(h, w2) r = Relu(b) y = MatMul(r, w3) }",
        "w2",
        (("y", 1),),
    ),
    "matmul with add": Fold(
        "(float[N,5] x) => (float[] y) <float[5,8] w1, float[8,3] w2, float[3] b> {"
        " a = MatMul(x, w1) h = Relu(a) o = MatMul(h, w2) y = Add(b, o) }",
        "w1",
        (("y", 1),),
    ),
    "matmul with add of a full table": Fold(
        "(float[N,4,5] x) => (float[] y) <float[5,8] w1, float[8,3] w2, float[4,3] b> {"
        " a = MatMul(x, w1) h = Relu(a) o = MatMul(h, w2) y = Add(o, b) }",
        "w1",
        (("y", 2),),
    ),
    "matmul with add and another reader": Fold(
        "(float[N,5] x) => (float[] y, float[] z) <float[5,8] w1, float[8,3] w2, float[3] b> {"
        " a = MatMul(x, w1) h = Relu(a) o = MatMul(h, w2) y = Add(o, b) z = Tanh(o) }",
        "w1",
        (("y", 1), ("o", 1)),
    ),
    "matmul of tokens": Fold(
        "(float[N,4,5] x) => (float[] y) <float[5,8] w1, float[8,3] w2>"
        " { a = MatMul(x, w1) h = Relu(a) y = MatMul(h, w2) }",
        "w1",
        (("y", 2),),
    ),
    "matmul, constant left": Fold(
        "(float[N,5,4] x) => (float[] y) <float[8,5] w1, float[3,8] w2>"
        " { a = MatMul(w1, x) h = Relu(a) y = MatMul(w2, h) }",
        "w1",
        (("y", 1),),
    ),
    "matmul, constant left, with add": Fold(
        "(float[N,5,4] x) => (float[] y) <float[8,5] w1, float[3,8] w2, float[3,1] b> {"
        " a = MatMul(w1, x) h = Relu(a) o = MatMul(w2, h) y = Add(o, b) }",
        "w1",
        (("y", 1),),
    ),
    "gemm, constant left": Fold(
        "(float[N,5] x) => (float[] y) <float[8,5] w1, float[8,1] c, float[3,8] w2, float[3,1] d> {"
        " a = Gemm<transB = 1>(w1, x, c) h = Relu(a) y = Gemm<alpha = 2.0, beta = 0.5>(w2, h, d) }",
        "w1",
        (("y", 0),),
    ),
    "gemm, beta zero": Fold(
        "(float[N,5] x) => (float[] y) <float[5,8] w1, float[8,3] w2, float[3] b> {"
        " a = Gemm(x, w1) h = Relu(a) y = Gemm<beta = 0.0>(h, w2, b) }",
        "w1",
        (("y", 1),),
    ),
    "convolution": Fold(
        _cnn("float[4,8,3,3] w2, float[4] b2", "y = Conv(h, w2, b2)"), "w1", (("y", 1),), flat=True
    ),
    "convolution without bias": Fold(
        _cnn("float[4,8,3,3] w2", "y = Conv(h, w2)"), "w1", (("y", 1),), flat=True
    ),
    "pointwise": Fold(_cnn("float[4,8,1,1] w2", "y = Conv(h, w2)"), "w1", (("y", 1),)),
    "grouped convolution": Fold(
        _cnn(
            "float[6,4,3,3] w2, float[6] b2, float[4,6,1,1] w3",
            "g = Conv<group = 2>(h, w2, b2) r = Relu(g) y = Conv(r, w3)",
        ),
        "w1",
        (("g", 1),),
        flat=True,
    ),
    "transposed convolution": Fold(
        _cnn("float[8,4,2,2] w2, float[4] b2", "y = ConvTranspose<strides = [2, 2]>(h, w2, b2)"),
        "w1",
        (("y", 1),),
    ),
    "transposed grouped convolution": Fold(
        _cnn(
            "float[8,3,2,2] w2, float[4,6,1,1] w3",
            "g = ConvTranspose<group = 2, strides = [2, 2]>(h, w2) y = Conv(g, w3)",
        ),
        "w1",
        (("g", 1),),
    ),
    "flatten": Fold(_cnn("float[200,4] w2", "f = Flatten(h) y = MatMul(f, w2)"), "w1", (("y", 1),)),
    "two consumers": Fold(
        _cnn(
            "float[4,8,3,3] w2, float[5,8,3,3] w3, float[9,2] w4",
            "a = Conv(h, w2) b = Conv(h, w3) k = Concat<axis = 1>(a, b) g = GlobalAveragePool(k) f = Flatten(g)"
            " y = MatMul(f, w4)",
        ),
        "w1",
        (("a", 1), ("b", 1)),
        flat=True,
    ),
    "shared weight and bias": Fold(
        "(float[N,5] x, float[N,5] z) => (float[] y, float[] t)"
        " <float[5,8] w1, float[5,8] v1, float[8,3] w2, float[3] b> {"
        " a = MatMul(x, w1) h = Relu(a) c = MatMul(z, v1) k = Sigmoid(c) y = Gemm(h, w2, b) t = Gemm(k, w2, b) }",
        "w1",
        (("y", 1), ("t", 1)),
    ),
    "bias shared with another node": Fold(
        "(float[N,5] x) => (float[] y, float[] t) <float[5,8] w1, float[8,3] w2, float[5,3] w3, float[3] b> {"
        " a = MatMul(x, w1) h = Relu(a) y = Gemm(h, w2, b) t = Gemm(x, w3, b) }",
        "w1",
        (("y", 1), ("t", 1)),
    ),
}
# Every layout of a Gemm: transposed or not, any shape of bias, factors other than one.
FOLDS |= {c.name: Fold("", "w1", (("y", 1),)) for c in CASES if c.name.startswith("gemm-trans")}
BY_NAME = {c.name: c for c in CASES}


def _half(coupling: Coupling, name: str) -> Bools:
    group = next(g for g in coupling.groups if g.name == name)
    keep = np.ones(coupling.n_units, bool)
    keep[group.units[1::2]] = False
    return keep


def _statistics(model: Model, coupling: Coupling, arrays: dict[str, Array]) -> Statistics:
    found = dataset.load(arrays, model)
    assert found is not None
    return calibration.collect(model, coupling, found, "cpu")


def _folded(model: Model, coupling: Coupling, keep: Bools, arrays: dict[str, Array]) -> Pruned:
    raw = rewrite.cut(model, coupling, keep)
    return mean_folding.fold_means(model, coupling, keep, _statistics(model, coupling, arrays), raw)


def _samples(fold: Fold, model: Model, count: int) -> dict[str, Array]:
    arrays = samples(model, count)
    if fold.flat:
        arrays["x"] = np.broadcast_to(arrays["x"][:, :, :1, :1], arrays["x"].shape).copy()
    return arrays


def _means(values: Array, axis: int) -> Array:
    return values.astype(np.float64).mean(
        axis=tuple(a for a in range(values.ndim) if a != axis % values.ndim)
    )


@pytest.fixture(params=FOLDS)
def fold(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Fold, Model, Coupling]:
    found = FOLDS[request.param]
    proto = build(found.text) if found.text else BY_NAME[request.param].make()
    model = load(proto, tmp_path)
    coupling = couple(model)
    assert coupling.n_units
    return found, model, coupling


def test_mean_outputs_are_preserved(fold: tuple[Fold, Model, Coupling]) -> None:
    found, model, coupling = fold
    keep = _half(coupling, found.group)
    arrays = _samples(found, model, 48)
    pruned = _folded(model, coupling, keep, arrays)
    assert pruned.notes == ()
    onnx.checker.check_model(pruned.proto, full_check=True)
    names = [t for t, _ in found.outputs]
    original = activations(model, arrays, names)
    refitted, cut = (activations(model, arrays, names, p) for p in (pruned.proto, pruned.raw))
    moved = 0.0
    for tensor, axis in found.outputs:
        before = _means(original[tensor], axis)
        scale = float(np.abs(original[tensor]).max())
        np.testing.assert_allclose(
            _means(refitted[tensor], axis), before, atol=1e-5 * scale, err_msg=tensor
        )
        moved = max(moved, float(np.abs(_means(cut[tensor], axis) - before).max()) / scale)
    # Without the refit it would not hold: the data must be able to tell.
    assert moved > 1e-3


@pytest.mark.parametrize("padded", [False, True])
def test_mean_outputs_of_images_are_nearly_preserved(tmp_path: Path, padded: bool) -> None:
    """Taps of a kernel see different parts of the image: most of the mean is kept, but at a border of zeros."""
    pads = "<pads = [1, 1, 1, 1]>" if padded else ""
    model = load(build(_cnn("float[4,8,3,3] w2", f"y = Conv{pads}(h, w2)")), tmp_path)
    coupling = couple(model)
    arrays = samples(model, 64)
    pruned = _folded(model, coupling, _half(coupling, "w1"), arrays)
    inner = slice(1, -1) if padded else slice(None)
    before, refitted, cut = (
        _means(activations(model, arrays, ["y"], p)["y"][:, :, inner, inner], 1)
        for p in (model.proto, pruned.proto, pruned.raw)
    )
    assert np.abs(refitted - before).max() <= 0.25 * np.abs(cut - before).max()


def test_bias_refit_changes_biases_only(fold: tuple[Fold, Model, Coupling]) -> None:
    found, model, coupling = fold
    keep = _half(coupling, found.group)
    pruned = _folded(model, coupling, keep, samples(model, 16))
    raw, refitted = constants(pruned.raw), constants(pruned.proto)
    weights = [name for name in raw if name.startswith("w")]
    assert weights
    for name in weights:
        np.testing.assert_array_equal(raw[name], refitted[name], err_msg=name)
    for name in raw.keys() & refitted.keys():
        assert refitted[name].dtype == raw[name].dtype, name


def test_masked_and_folded_outputs_differ_by_a_constant(fold: tuple[Fold, Model, Coupling]) -> None:
    """Per output channel the refit adds the same number to every sample, and nothing else."""
    found, model, coupling = fold
    keep = _half(coupling, found.group)
    arrays = samples(model, 16)
    pruned = _folded(model, coupling, keep, arrays)
    names = [t for t, _ in found.outputs]
    assert names
    cut, refitted = (activations(model, arrays, names, p) for p in (pruned.raw, pruned.proto))
    for tensor, axis in found.outputs:
        shift = np.moveaxis(refitted[tensor].astype(np.float64) - cut[tensor], axis, 0)
        shift = shift.reshape(len(shift), -1)
        spread = np.ptp(shift, axis=1).max()
        assert spread <= 1e-5 * max(1.0, float(np.abs(cut[tensor]).max()))


def test_nothing_removed_changes_nothing(fold: tuple[Fold, Model, Coupling]) -> None:
    _, model, coupling = fold
    keep = np.ones(coupling.n_units, bool)
    pruned = _folded(model, coupling, keep, samples(model, 8))
    assert pruned.proto == pruned.raw


def _node(proto: onnx.ModelProto, output: str) -> onnx.NodeProto:
    return next(n for n in proto.graph.node if output in n.output)


def _pruned(name: str, tmp_path: Path) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """(original, refitted) of a fold."""
    found = FOLDS[name]
    model = load(build(found.text), tmp_path)
    coupling = couple(model)
    keep = _half(coupling, found.group)
    return model.proto, _folded(model, coupling, keep, samples(model, 16)).proto


def test_missing_bias_is_created(tmp_path: Path) -> None:
    before, after = _pruned("convolution without bias", tmp_path)
    assert len(_node(before, "y").input) == 2
    bias = constants(after)[_node(after, "y").input[2]]
    assert bias.shape == (4,)
    assert np.abs(bias).max() > 0
    before, after = _pruned("matmul", tmp_path)
    # A product has no bias of its own: an addition follows, and gives the output its name.
    assert [n.op_type for n in before.graph.node] == ["MatMul", "Relu", "MatMul"]
    assert [n.op_type for n in after.graph.node] == ["MatMul", "Relu", "MatMul", "Add"]
    assert _node(after, "y").op_type == "Add"
    assert len({n.name for n in after.graph.node}) == 4


def test_addition_behind_a_product_is_its_bias(tmp_path: Path) -> None:
    before, after = _pruned("matmul with add", tmp_path)
    assert [n.op_type for n in after.graph.node] == [n.op_type for n in before.graph.node]
    assert set(constants(after)) == set(constants(before))
    assert not np.array_equal(constants(after)["b"], constants(before)["b"])


@pytest.mark.parametrize(
    "name",
    [
        "matmul with add of a full table",
        "matmul with add and another reader",
        "matmul, constant left, with add",
    ],
)
def test_additions_that_are_not_a_bias_stay_unchanged(tmp_path: Path, name: str) -> None:
    before, after = _pruned(name, tmp_path)
    np.testing.assert_array_equal(constants(after)["b"], constants(before)["b"])


def test_shared_bias_is_copied_before_it_changes(tmp_path: Path) -> None:
    before, after = _pruned("bias shared with another node", tmp_path)
    np.testing.assert_array_equal(
        constants(after)[_node(after, "t").input[2]], constants(before)["b"]
    )
    assert not np.array_equal(constants(after)[_node(after, "y").input[2]], constants(before)["b"])


@pytest.mark.parametrize("name", ["matmul-vectors", "matmul-batched-weight"])
def test_node_that_cannot_be_folded_is_noted(tmp_path: Path, name: str) -> None:
    model = load(BY_NAME[name].make(), tmp_path)
    coupling = couple(model)
    keep = _half(coupling, "w1")
    pruned = _folded(model, coupling, keep, samples(model, 8))
    assert any("the mean of what was removed is not added" in note for note in pruned.notes)
    assert all("\n" not in note for note in pruned.notes)
    assert Session(pruned.proto, "cpu").outputs == ["y"]


def test_computed_bias_stays_unchanged(tmp_path: Path) -> None:
    text = """(float[N,5] x, float[3] c) => (float[] y) <float[5,8] w1, float[8,3] w2> {
        a = MatMul(x, w1)
        h = Relu(a)
        y = Gemm(h, w2, c)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    keep = _half(coupling, "w1")
    rng = np.random.default_rng(0)
    shapes = {"x": (6, 1, 5), "c": (6, 3)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    pruned = _folded(model, coupling, keep, arrays)
    assert any("its bias is computed" in note for note in pruned.notes)
    assert pruned.proto == pruned.raw


def test_half_precision_stays_half_precision(tmp_path: Path) -> None:
    text = FOLDS["convolution without bias"].text.replace("float", "float16")
    model = load(build(text), tmp_path)
    coupling = couple(model)
    keep = _half(coupling, "w1")
    pruned = _folded(model, coupling, keep, samples(model, 8))
    onnx.checker.check_model(pruned.proto, full_check=True)
    assert constants(pruned.proto)[_node(pruned.proto, "y").input[2]].dtype == np.float16


def test_budget_reserves_every_bias_that_a_refit_may_add(tmp_path: Path) -> None:
    text = """(float[N,3,7,7] x) => (float[] y)
    <float[8,3,3,3] w1, float[8] b1, float[6,8,3,3] w2, float[54,5] w3, float[5,4] w4, float[4] b4> {
        a = Conv(x, w1, b1)
        b = Conv(a, w2)
        f = Flatten(b)
        c = MatMul(f, w3)
        d = MatMul(c, w4)
        y = Add(d, b4)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    reserved = refit_scope.new_biases(model)
    # The second convolution and the first product have no bias yet.
    assert reserved == 6 + 5
    keep = np.ones(coupling.n_units, bool)
    for group in coupling.groups:
        keep[group.units[0]] = False
    pruned = _folded(model, coupling, keep, samples(model, 8))
    added = sum(v.size for v in constants(pruned.proto).values()) - sum(
        v.size for v in constants(pruned.raw).values()
    )
    assert 0 < added <= reserved


def test_folding_continues_after_an_unsupported_weight(tmp_path: Path) -> None:
    """A weight of three axes stands in front of a plain one, which gets its mean all the same."""
    text = """(float[N,4,5] x) => (float[] y, float[] z) <float[5,8] w1, float[1,8,3] w2, float[8,3] w3> {
        a = MatMul(x, w1)
        h = Relu(a)
        y = MatMul(h, w2)
        z = MatMul(h, w3)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    arrays = samples(model, 48)
    pruned = _folded(model, coupling, _half(coupling, "w1"), arrays)
    assert [n.split(": ")[1].split(",")[0] for n in pruned.notes] == [
        "its weight has no plain matrix form"
    ]
    before, after = (activations(model, arrays, ["z"], p)["z"] for p in (model.proto, pruned.proto))
    np.testing.assert_allclose(
        _means(after, 2), _means(before, 2), atol=1e-5 * float(np.abs(before).max())
    )
