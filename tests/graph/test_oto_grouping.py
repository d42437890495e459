"""Units against the zero-invariant groups of OTO (Chen et al., arXiv 2107.07467 and 2303.06862), operator by operator.

A zero-invariant group holds what makes one unit: where all of it is zero, the unit's output is zero whatever the input,
so that it can be cut. Every row says by hand which index of which constant makes which unit, and which reads it. Its
acceptance test follows: all variables of random groups of the original are set to zero, nothing is touched where units
are read, and the model then gives what the cut one does.

Different here: queries and keys of one slot may go without the values; gain and shift of a layer normalisation keep
their length, since a mean over fewer channels would be another one; a weight used twice may go where all its uses may.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from graphs import build, distance, feed, load, random_keep
from onnx import ModelProto, numpy_helper

from onnx_oamip.core.records import (
    Axis,
    Bools,
    Coupling,
    Ints,
    Model,
)
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite

r = np.arange
ROWS: dict[str, Row] = {}


@dataclass(frozen=True)
class Row:
    """A graph; unit of every index of the axes that make units (``made``) and of those that read them (``read``).

    ``whole``: constants that are part of a group, as the given axis is, and are not cut.
    """

    text: str
    made: Mapping[Axis, Ints] = field(default_factory=dict)
    read: Mapping[Axis, Ints] = field(default_factory=dict)
    whole: Mapping[str, Axis] = field(default_factory=dict)
    opset: int = 17
    domains: Mapping[str, int] = field(default_factory=dict)


def channels(names: str, units: Ints) -> dict[Axis, Ints]:
    """The first axis of several constants, the same units along all."""
    return {(name, 0): units for name in names.split()}


# ------------------------------------------------------------------------------------------------------------- stems

ROWS["conv"] = Row(
    """(float[N,3,6,6] x) => (float[] y) <float[8,3,3,3] w1, float[8] b1, float[4,8,3,3] w2> {
        a = Conv(x, w1, b1)
        y = Conv(a, w2)
    }""",
    channels("w1 b1", r(8)),
    {("w2", 1): r(8)},
)
for turned in (0, 1):
    ROWS[f"gemm-transB-{turned}"] = Row(
        f"""(float[N,5] x) => (float[] y) <float[{"8,5" if turned else "5,8"}] w1, float[8] b1, float[8,3] w2> {{
            a = Gemm<transB = {turned}>(x, w1, b1)
            y = MatMul(a, w2)
        }}""",
        {("w1", 1 - turned): r(8), ("b1", 0): r(8)},
        {("w2", 0): r(8)},
    )
ROWS["conv-transpose"] = Row(
    """(float[N,3,6,6] x) => (float[] y) <float[3,8,2,2] w1, float[8] b1, float[4,8,3,3] w2> {
        a = ConvTranspose<strides = [2, 2]>(x, w1, b1)
        y = Conv(a, w2)
    }""",
    {("w1", 1): r(8), ("b1", 0): r(8)},
    {("w2", 1): r(8)},
)

# ----------------------------------------------------------------------------------------------------- normalisations

ROWS["batch-norm"] = Row(
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,3,3] w1, float[8] b1, float[8] gain, float[8] beta, float[8] m, float[8] var, float[4,8,3,3] w2> {
        a = Conv(x, w1, b1)
        n = BatchNormalization(a, gain, beta, m, var)
        h = Relu(n)
        y = Conv(h, w2)
    }""",
    channels("w1 b1 gain beta m var", r(8)),
    {("w2", 1): r(8)},
)
ROWS["instance-norm"] = Row(
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,3,3] w1, float[8] b1, float[8] gain, float[8] beta, float[4,8,3,3] w2> {
        a = Conv(x, w1, b1)
        n = InstanceNormalization(a, gain, beta)
        h = Relu(n)
        y = Conv(h, w2)
    }""",
    channels("w1 b1 gain beta", r(8)),
    {("w2", 1): r(8)},
)
ROWS["layer-norm"] = Row(
    """(float[N,4,5] x) => (float[] y)
    <float[5,8] w1, float[8] b1, float[8] gain, float[8] beta, float[8,3] w2> {
        a = MatMul(x, w1)
        c = Add(a, b1)
        n = LayerNormalization(c, gain, beta)
        y = MatMul(n, w2)
    }""",
    {("w1", 1): r(8), ("b1", 0): r(8)},
    {("w2", 0): r(8)},
    {"gain": ("b1", 0), "beta": ("b1", 0)},
)
ROWS["group-norm"] = Row(
    """(float[N,3,6,6] x) => (float[N,4,4,4] y)
    <float[8,3,1,1] w1, float[8] b1, float[8] gain, float[8] beta, float[4,8,3,3] w2> {
        a = Conv(x, w1, b1)
        n = GroupNormalization<num_groups = 4>(a, gain, beta)
        h = Relu(n)
        y = Conv(h, w2)
    }""",
    channels("w1 b1 gain beta", r(8) // 2),
    {("w2", 1): r(8) // 2},
    opset=21,
)

# --------------------------------------------------------------------------------------------------- where paths meet

ROWS["residual-add"] = Row(
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,1,1] w1, float[8] b1, float[5,8,1,1] w2, float[5] b2, float[8,5,1,1] w3, float[8] b3,
     float[4,8,3,3] w4> {
        a = Conv(x, w1, b1)
        b = Conv(a, w2, b2)
        h = Relu(b)
        c = Conv(h, w3, b3)
        s = Add(a, c)
        y = Conv(s, w4)
    }""",
    {**channels("w1 b1 w3 b3", r(8)), **channels("w2 b2", 8 + r(5))},
    {("w2", 1): r(8), ("w3", 1): 8 + r(5), ("w4", 1): r(8)},
)
ROWS["squeeze-excite-mul"] = Row(
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,1,1] w1, float[8] b1, float[5,8,1,1] w2, float[5] b2, float[8,5,1,1] w3, float[8] b3,
     float[4,8,3,3] w4> {
        a = Conv(x, w1, b1)
        g = GlobalAveragePool(a)
        b = Conv(g, w2, b2)
        h = Relu(b)
        c = Conv(h, w3, b3)
        e = Sigmoid(c)
        s = Mul(a, e)
        y = Conv(s, w4)
    }""",
    {**channels("w1 b1 w3 b3", r(8)), **channels("w2 b2", 8 + r(5))},
    {("w2", 1): r(8), ("w3", 1): 8 + r(5), ("w4", 1): r(8)},
)
ROWS["concat-offsets"] = Row(
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,1,1] w1, float[8] b1, float[5,3,1,1] w2, float[5] b2,
     float[13] gain, float[13] beta, float[13] m, float[13] var, float[4,13,3,3] w3> {
        a = Conv(x, w1, b1)
        b = Conv(x, w2, b2)
        c = Concat<axis = 1>(a, b)
        n = BatchNormalization(c, gain, beta, m, var)
        h = Relu(n)
        y = Conv(h, w3)
    }""",
    {
        **channels("w1 b1", r(8)),
        **channels("w2 b2", 8 + r(5)),
        **channels("gain beta m var", r(13)),
    },
    {("w3", 1): r(13)},
)

# ------------------------------------------------------------------------------------------- what passes channels on

for name, call in {
    "relu": "Relu(a)",
    "leaky-relu": "LeakyRelu<alpha = 0.1>(a)",
    "abs": "Abs(a)",
    "sin": "Sin(a)",
    "sign": "Sign(a)",
    "max-pool": "MaxPool<kernel_shape = [2, 2]>(a)",
    "average-pool": "AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(a)",
    "dropout": "Dropout(a)",
    "pad": "Pad(a, pads)",
    "upsample": 'Resize<mode = "nearest">(a, , scales)',
}.items():
    ROWS[f"zero-invariant-{name}"] = Row(
        f"""(float[N,3,6,6] x) => (float[] y)
        <float[8,3,3,3] w1, float[8] b1, int64[8] pads = {{0, 0, 1, 1, 0, 0, 1, 1}},
         float[4] scales = {{1.0, 1.0, 2.0, 2.0}}, float[4,8,1,1] w2> {{
            a = Conv(x, w1, b1)
            h = {call}
            y = Conv(h, w2)
        }}""",
        channels("w1 b1", r(8)),
        {("w2", 1): r(8)},
    )
ROWS["zero-invariant-sqrt"] = Row(
    """(float[N,5] x) => (float[] y) <float[5,8] w1, float[8,3] w2> {
        a = MatMul(x, w1)
        p = Relu(a)
        h = Sqrt(p)
        y = MatMul(h, w2)
    }""",
    {("w1", 1): r(8)},
    {("w2", 0): r(8)},
)
ROWS["depthwise"] = Row(
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,1,1] w1, float[8] b1, float[8,1,3,3] w2, float[8] b2, float[4,8,1,1] w3> {
        a = Conv(x, w1, b1)
        d = Conv<group = 8>(a, w2, b2)
        h = Relu(d)
        y = Conv(h, w3)
    }""",
    channels("w1 b1 w2 b2", r(8)),
    {("w3", 1): r(8)},
)
ROWS["flatten-linear"] = Row(
    """(float[N,3,4,4] x) => (float[] y) <float[8,3,3,3] w1, float[8] b1, float[32,3] w2> {
        a = Conv(x, w1, b1)
        f = Flatten(a)
        y = MatMul(f, w2)
    }""",
    channels("w1 b1", r(8)),
    {("w2", 0): r(32) // 4},
)

# ---------------------------------------------------------------------------------------------------------- attention

ROWS["heads"] = Row(
    """(float[N,5,6] x) => (float[N,5,3] y) <float[6,24] w1, float[24] b1, float[8,3] w2> {
        h = com.microsoft.Attention<num_heads = 4>(x, w1, b1)
        y = MatMul(h, w2)
    }""",
    {("w1", 1): np.tile(r(8) // 2, 3), ("b1", 0): np.tile(r(8) // 2, 3)},
    {("w2", 0): r(8) // 2},
    domains={"com.microsoft": 1},
)
ROWS["slots-of-all-heads"] = Row(
    """(float[N,5,6] x) => (float[] y)
    <float[6,12] wq, float[6,12] wk, float[6,12] wv, int64[4] in = {0, 5, 3, 4}, int64[3] out = {0, 5, 12},
     float[12,4] w2> {
        q = MatMul(x, wq)
        k = MatMul(x, wk)
        v = MatMul(x, wv)
        q4 = Reshape(q, in)
        k4 = Reshape(k, in)
        v4 = Reshape(v, in)
        qt = Transpose<perm = [0, 2, 1, 3]>(q4)
        kt = Transpose<perm = [0, 2, 3, 1]>(k4)
        vt = Transpose<perm = [0, 2, 1, 3]>(v4)
        l = MatMul(qt, kt)
        p = Softmax(l)
        o = MatMul(p, vt)
        ot = Transpose<perm = [0, 2, 1, 3]>(o)
        om = Reshape(ot, out)
        y = MatMul(om, w2)
    }""",
    {("wq", 1): np.tile(r(4), 3), ("wk", 1): np.tile(r(4), 3), ("wv", 1): np.tile(4 + r(4), 3)},
    {("w2", 0): np.tile(4 + r(4), 3)},
)

# ------------------------------------------------------------------------------------------------------ what stays

ROWS["shared-weight"] = Row(
    """(float[N,5] x, float[N,5] z) => (float[] y) <float[5,8] w1, float[8,3] w2, float[8,3] w3> {
        a = MatMul(x, w1)
        b = MatMul(z, w1)
        c = MatMul(a, w2)
        d = MatMul(b, w3)
        y = Add(c, d)
    }""",
    {("w1", 1): r(8)},
    {("w2", 0): r(8), ("w3", 0): r(8)},
)
NOTHING = {
    "shared-weight-with-an-output": """(float[N,5] x, float[N,5] z) => (float[] y, float[] b)
    <float[5,8] w1, float[8,3] w2> {
        a = MatMul(x, w1)
        y = MatMul(a, w2)
        b = MatMul(z, w1)
    }""",
    "unknown-operator": """(float[N,5] x) => (float[N,3] y) <float[5,8] w1, float[8,3] w2> {
        a = MatMul(x, w1)
        h = custom.Mystery(a)
        y = MatMul(h, w2)
    }""",
    "output": """(float[N,5] x) => (float[] y) <float[5,8] w1> { y = MatMul(x, w1) }""",
    "input-added": """(float[N,8] x) => (float[] y) <float[8,8] w1, float[8,3] w2> {
        a = MatMul(x, w1)
        s = Add(a, x)
        y = MatMul(s, w2)
    }""",
    "input-multiplied": """(float[N,8] x) => (float[] y) <float[8,8] w1, float[8,3] w2> {
        a = MatMul(x, w1)
        s = Mul(a, x)
        y = MatMul(s, w2)
    }""",
}


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


def _coupled(row: Row, folder: Path) -> tuple[Model, Coupling]:
    model = load(build(row.text, row.opset, 10 if row.opset > 20 else 8, row.domains), folder)
    return model, couple(model)


def test_units_equal_the_zero_invariant_groups(tmp_path: Path, row: Row) -> None:
    model, coupling = _coupled(row, tmp_path)
    expected = {**row.made, **row.read}
    found = {key: units for key, units in coupling.axes.items() if key[0] in model.constants}
    assert set(found) == set(expected)
    # One unit here is one group there, and the other way round.
    both = np.unique(
        [np.concatenate([side[k] for k in expected]) for side in (found, expected)], axis=1
    )
    assert (both >= 0).all()
    assert len(np.unique(both[0])) == len(np.unique(both[1])) == both.shape[1] == coupling.n_units


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_zeroed_groups_equal_the_pruned_model(tmp_path: Path, row: Row, seed: int) -> None:
    model, coupling = _coupled(row, tmp_path)
    keep = random_keep(coupling, np.random.default_rng(seed), 0.5)
    if keep.all():
        keep[coupling.groups[0].units[0]] = False
    zeroed = _zero(model.proto, row, coupling, keep)
    cut = rewrite.cut(model, coupling, keep)
    values = feed(model, seed, 3)
    truth = Session(zeroed, "cpu").run(values)
    assert max(float(np.abs(t).max()) for t in truth) > 0
    assert distance(truth, Session(cut, "cpu").run(values)) < 1e-5
    assert distance(Session(model.proto, "cpu").run(values), truth) > 1e-3


def _zero(proto: ModelProto, row: Row, coupling: Coupling, keep: Bools) -> ModelProto:
    """The original with all that makes the removed units set to zero; what reads them stays as it is."""
    result = ModelProto()
    result.CopyFrom(proto)
    for tensor in result.graph.initializer:
        value = numpy_helper.to_array(tensor).copy()
        places = [((name, axis), axis) for name, axis in row.made if name == tensor.name]
        places += [(row.whole[tensor.name], 0)] if tensor.name in row.whole else []
        for key, axis in places:
            np.moveaxis(value, axis, 0)[~coupling.keep(key, keep)] = 0
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return result


@pytest.mark.parametrize("name", NOTHING)
def test_pinned_channels_have_no_group(tmp_path: Path, name: str) -> None:
    model = load(build(NOTHING[name], domains={"custom": 1}), tmp_path)
    coupling = couple(model)
    assert coupling.n_units == 0
    assert all(p.reason for p in coupling.pinned if p.tensor == "w1")
    assert {p.tensor for p in coupling.pinned} >= {"w1"}
