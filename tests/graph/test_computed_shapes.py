"""Shapes and choices that a graph computes from lengths: the channels around them are followed, and cut as masked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import assert_exact, build, keep_one, load, random_keep

from onnx_oamip.graph import cost, shape_folding
from onnx_oamip.graph.coupling import couple

SCATTER = """(float[N,6] x, int64[E] source, int64[E] target) => (float[N,4] y)
<float[6,24] w1, float[24,4] w2, int64[2] zeros = {0, 0}, int64[1] two = {2}, int64[1] last = {-1},
 int64[1] three = {3}, float null = {0.0}> {
    h = MatMul(x, w1)
    lengths = Shape(h)
    width = Gather(lengths, last)
    more = Add(width, two)
    third = Div(more, three)
    double = Mul(third, two)
    part = Slice(h, third, double, last)
    whole = Concat<axis = 1>(part, part, part)
    picked = Gather(whole, source)
    index = Unsqueeze(target, last)
    size = Shape(picked)
    wide = Expand(index, size)
    ends = Shape(wide)
    rows = Slice(picked, zeros, ends)
    start = Mul(h, null)
    sums = ScatterElements<axis = 0, reduction = "add">(start, wide, rows)
    r = Relu(sums)
    y = MatMul(r, w2)
}"""
HEADS = """(float[N,6,5] x) => (float[N,4,5] y)
<float[24,6,1] wq, float[4,8,1] wo, int64[1] rest = {-1}, int64[1] four = {4},
 int64[1] first = {0}, int64[1] five = {5}> {
    qkv = Conv(x, wq)
    q, k, v = Split<axis = 1, num_outputs = 3>(qkv)
    lengths = Shape(x)
    batch = Gather(lengths, first)
    pairs = Mul(batch, four)
    split = Concat<axis = 0>(pairs, rest, five)
    qh = Reshape<allowzero = 1>(q, split)
    kh = Reshape<allowzero = 1>(k, split)
    vh = Reshape<allowzero = 1>(v, split)
    scores = Einsum<equation = "bct,bcs->bts">(qh, kh)
    p = Softmax(scores)
    mixed = Einsum<equation = "bts,bcs->bct">(p, vh)
    back = Concat<axis = 0>(batch, rest, five)
    o = Reshape<allowzero = 1>(mixed, back)
    y = Conv(o, wo)
}"""
MOMENTS = """(float[N,3,4,4] x) => (float[N,2,4,4] y)
<float[8,3,1,1] w1, float[1,8,1,1] gain, float[1,8,1,1] shift, float[2,8,1,1] w2, float eps = {0.001}> {
    h = Conv(x, w1)
    mean = ReduceMean<axes = [1], keepdims = 1>(h)
    minus = Neg(mean)
    centred = Sub(h, mean)
    squares = Mul(centred, centred)
    variance = ReduceMean<axes = [1], keepdims = 1>(squares)
    safe = Add(variance, eps)
    root = Sqrt(safe)
    inverse = Reciprocal(root)
    factor = Mul(inverse, gain)
    scaled = Mul(h, factor)
    offset = Mul(minus, factor)
    moved = Add(offset, shift)
    n = Add(scaled, moved)
    y = Conv(n, w2)
}"""
SPATIAL = """(float[N,3,H,W] x) => (float[N,2,H2,W2] y)
<float[8,3,1,1] w1, float[2,8,1,1] w2, int64[4] order = {0, 2, 3, 1}, int64[1] one = {1}, int64[1] two = {2},
 int64[1] end = {9223372036854775807}, int64[1] zero = {0}, int64[1] third = {2}> {
    h = Conv(x, w1)
    lengths = Shape(h)
    last = Gather(lengths, order)
    rows = Slice(last, one, two)
    columns = Slice(last, third, end)
    kept = Slice(last, third, end, zero)
    both = Concat<axis = 0>(rows, kept)
    column = Slice(both, one, two)
    odd = Mod(column, two)
    pads = Concat<axis = 0>(zero, zero, zero, zero, zero, zero, zero, odd)
    parts, others = Split<axis = 0, num_outputs = 2>(pads)
    amounts = Concat<axis = 0>(parts, others)
    p = Pad(h, amounts)
    r = Relu(p)
    y = Conv(r, w2)
}"""
SQUEEZE = """(float[N,3,T] x) => (float[N,2,1] y)
<float[8,3,4] w1, float[8,6] w2, float[6,2] w3, int64[1] last = {-1}, int64[1] one = {1}> {
    h = Conv(x, w1)
    lengths = Shape(h)
    steps = Gather(lengths, last)
    single = Equal(steps, one)
    s = If(single) <
        then_branch = yes () => (float[N,8] u) { axis = Identity(last)  u = Squeeze(h, axis) },
        else_branch = no () => (float[N,8,U] v) { v = Identity(h) }
    >
    size = Shape(s)
    rank = Size(size)
    a = MatMul(s, w2)
    r = Relu(a)
    b = MatMul(r, w3)
    y = Unsqueeze(b, last)
}"""
BRANCH = """(float[N,3,8] x, bool flag) => (float[N,2,10] y)
<float[7,3,1] w1, float[5,7,1] w2, float[2,5,1] w3, int64[2] pairs = {-1, 2}, int64[1] two = {2}, int64[1] flat = {-1},
 int64[1] zero = {0}, int64[1] back = {-9223372036854775807}> {
    h = Conv(x, w1)
    o = If(flag) <
        then_branch = yes () => (float[N,5,10] u) {
            given = Constant<value_ints = [1, 1]>()
            more = Constant<value_ints = [0, 0, 0, 0]>()
            joined = Concat<axis = 0>(given, more)
            table = Reshape(joined, pairs)
            turned = Slice(table, flat, back, zero, flat)
            moved = Transpose<perm = [1, 0]>(turned)
            amounts = Reshape(moved, flat)
            p = Pad(h, amounts)
            u = Conv(p, w2)
        },
        else_branch = no () => (float[N,5,10] v) {
            list = Constant<value_ints = [0, 0, 2, 0, 0, 0]>()
            q = Pad(h, list)
            v = Conv(q, w2)
        }
    >
    r = Relu(o)
    y = Conv(r, w3)
}"""
RESIZE = """(float[N,3,H,W] x) => (float[N,2,H,W] y)
<float[8,3,1,1] w1, float[5,8,2,2] w2, float[2,5,1,1] w3, int64[1] zero = {0}, int64[1] two = {2},
 int64[1] four = {4}> {
    a = Conv(x, w1)
    b = Conv<strides = [2, 2]>(a, w2)
    fine = Shape(a)
    rows = Slice(fine, two, four, zero)
    coarse = Shape(b)
    kept = Slice(coarse, zero, two, zero)
    sizes = Concat<axis = 0>(kept, rows)
    c = Resize<mode = "nearest">(b, , , sizes)
    y = Conv(c, w3)
}"""
CELL = """(float[N,6] x) => (float[N,3] y)
<float[6,5] w1, float[5,5] w2, float[5,3] w3, float null = {0.0}, int64[1] first = {0}, int64[1] width = {5}> {
    lengths = Shape(x)
    batch = Gather(lengths, first)
    size = Concat<axis = 0>(batch, width)
    start = Expand(null, size)
    a = MatMul(x, w1)
    b = MatMul(start, w2)
    c = Add(a, b)
    d = Mul(c, start)
    e = Add(d, c)
    h = Tanh(e)
    y = MatMul(h, w3)
}"""
ONES = """(float[N,6] x) => (float[N,3] y)
<float[6,8] w1, float[8,8] w2, float[8,3] w3, float[8] ones = {1, 1, 1, 1, 1, 1, 1, 1}> {
    a = MatMul(x, w1)  b = Mul(a, ones)  c = Relu(b)
    d = MatMul(c, w2)  e = Mul(d, ones)  f = Relu(e)
    y = MatMul(f, w3)
}"""


@pytest.mark.parametrize(
    ("text", "widths", "bindings"),
    [
        pytest.param(SCATTER, {"w1": 8}, {"N": 5, "E": 7}, id="scatter"),
        pytest.param(HEADS, {"wq": 2, "wq#2": 2}, {}, id="heads"),
        pytest.param(MOMENTS, {"w1": 8}, {}, id="moments"),
        pytest.param(SPATIAL, {"w1": 8}, {"H": 3, "W": 3}, id="spatial"),
        pytest.param(SQUEEZE, {"w1": 8, "w2": 6}, {"T": 4}, id="squeeze"),
        pytest.param(BRANCH, {"w1": 7, "w2": 5}, {}, id="branch"),
        pytest.param(RESIZE, {"w1": 8, "w2": 5}, {"H": 4, "W": 4}, id="resize"),
        pytest.param(CELL, {"w1": 5}, {}, id="cell"),
        pytest.param(ONES, {"w1": 8, "w2": 8}, {}, id="ones"),
    ],
)
def test_channels_are_followed(
    text: str, widths: dict[str, int], bindings: dict[str, int], tmp_path: Path
) -> None:
    model = load(build(text, opset=18 if "num_outputs" in text else 17), tmp_path, bindings)
    assert cost.uncounted(model) == ()
    coupling = couple(model)
    assert {group.name: len(group.units) for group in coupling.groups} == widths
    rng = np.random.default_rng(0)
    for keep in (random_keep(coupling, rng, 0.5), keep_one(coupling, rng)):
        assert_exact(model, coupling, keep, batches=(1,) if bindings else (1, 3))


def test_known_outputs_beside_an_unknown_one_are_replaced_once() -> None:
    """The Split stays, because the batch is unknown; a second round has nothing left to replace."""
    text = """(float[N,4,6] x) => (float[] y) <int64[3] ones = {1, 1, 1}> {
        s = Shape(x)
        n, c, d = Split<axis = 0>(s, ones)
        r = Mul(d, c)
        to = Concat<axis = 0>(n, r)
        y = Reshape(x, to)
    }"""
    proto = build(text)
    assert shape_folding.fold(proto)
    (split,) = (node for node in proto.graph.node if node.op_type == "Split")
    assert split.output[0] == "n"
    assert {"c", "d"} <= {tensor.name for tensor in proto.graph.initializer}
    assert not shape_folding.fold(proto)


@pytest.mark.parametrize("scalar", ["starts", "ends", "axes", "steps"])
def test_numbers_in_place_of_lists_are_left_to_the_runtime(scalar: str) -> None:
    """ONNX asks for lists; the sentence of the runtime names what is wrong, where it minds."""
    lists = {"starts": 0, "ends": 5, "axes": 1, "steps": 1}
    weights = ", ".join(
        f"int64{'' if name == scalar else '[1]'} {name} = {{{value}}}"
        for name, value in lists.items()
    )
    proto = build(
        f"""(float[N,5] x) => (float[] y) <float[5,4] w, {weights}>
            {{ s = Slice(x, starts, ends, axes, steps) y = MatMul(s, w) }}"""
    )
    before = [node.op_type for node in proto.graph.node]
    shape_folding.fold(proto)
    assert [node.op_type for node in proto.graph.node] == before
