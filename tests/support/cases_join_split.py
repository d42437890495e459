"""Cases for operators that join, divide, select and pad: Concat, Split, Slice, Gather, Pad."""

from __future__ import annotations

from case_templates import dense, image
from op_case import case

dense(
    "concat-with-itself",
    "Concat",
    "c = Concat<axis = 1>(h, h)  r = MatMul(c, w3)",
    8 + 8,
    "float[16,8] w3",
)
dense(
    "concat-with-the-input",
    "Concat",
    "c = Concat<axis = -1>(h, x)  r = MatMul(c, w3)",
    8 + 8,
    "float[13,8] w3",
    "joins it untracked",
)
case(
    "concat-split-cascade",
    "Concat Split",
    """(float[N,5] x) => (float[] y)
    <float[5,4] w1, float[5,6] w2, int64[2] sizes = {3, 7}, float[10,3] w3> {
        a = MatMul(x, w1)
        b = MatMul(x, w2)
        c = Concat<axis = 1>(a, b)
        s, t = Split<axis = 1>(c, sizes)
        p = Relu(s)
        q = Tanh(t)
        d = Concat<axis = 1>(q, p)
        y = MatMul(d, w3)
    }""",
    units=10,
)
case(
    "concat-along-space",
    "Concat",
    """(float[N,3,6,6] x) => (float[] y) <float[8,3,3,3] w1, float[8,3,3,3] w2, float[4,8,1,1] w3> {
        a = Conv(x, w1)
        b = Conv(x, w2)
        c = Concat<axis = 2>(a, b)
        y = Conv(c, w3)
    }""",
    units=8,
)
case(
    "concat-class-token",
    "Concat",
    """(float[1,4,5] x) => (float[] y) <float[5,8] w1, float[1,1,8] token, float[1,5,8] place, float[8,3] w2> {
        e = MatMul(x, w1)
        c = Concat<axis = 1>(token, e)
        p = Add(c, place)
        y = MatMul(p, w2)
    }""",
    units=8,
)
_HALVES = "p = Sigmoid(s)  q = Mul(p, t)  r = MatMul(q, w3)"
dense("split", "Split", f"s, t = Split<axis = 1>(h)  {_HALVES}", 4 + 8, "float[4,8] w3", opset=13)
dense(
    "split-opset-11",
    "Split",
    "s, t = Split<axis = -1, split = [3, 5]>(h)  p = MatMul(s, w3)  q = MatMul(t, w4)  r = Add(p, q)",
    3 + 5 + 8,
    "float[3,8] w3, float[5,8] w4",
    opset=11,
)
dense(
    "split-equal-opset-11",
    "Split",
    f"s, t = Split<axis = 1>(h)  {_HALVES}",
    4 + 8,
    "float[4,8] w3",
    opset=11,
)
dense(
    "split-opset-18",
    "Split",
    "s, t, u = Split<axis = 1, num_outputs = 3>(h)"
    "  a = MatMul(s, w3)  b = MatMul(t, w4)  c = MatMul(u, w5)  r = Sum(a, b, c)",
    # Three parts of 3, 3 and 2.
    8 + 8,
    "float[3,8] w3, float[3,8] w4, float[2,8] w5",
    opset=18,
)
dense(
    "split-with-an-unused-part",
    "Split",
    "s, t = Split<axis = 1>(h, sizes)  r = MatMul(s, w3)",
    8 + 8,
    "int64[2] sizes = {6, 2}, float[6,8] w3",
)
dense(
    "slice-opset-9",
    "Slice",
    "s = Slice<axes = [1], starts = [1], ends = [6]>(h)  r = MatMul(s, w3)",
    8 + 8,
    "float[5,8] w3",
    opset=9,
)
_SLICES = {
    "slice": ("{2}", "{7}", "{1}", 5),
    "slice-negative": ("{-6}", "{-1}", "{-1}", 5),
    "slice-open-end": ("{3}", "{9223372036854775807}", "{1}", 5),
}
for _name, (_from, _to, _axis, _size) in _SLICES.items():
    dense(
        _name,
        "Slice",
        "s = Slice(h, from, to, axes)  r = MatMul(s, w3)",
        8 + 8,
        f"int64[1] from = {_from}, int64[1] to = {_to}, int64[1] axes = {_axis}, float[{_size},8] w3",
        opset=10,
    )
for _name, _from, _to, _step, _size in (
    ("slice-every-second", "{0}", "{8}", "{2}", 4),
    ("slice-reversed", "{-1}", "{-9}", "{-1}", 8),
):
    dense(
        _name,
        "Slice",
        "a = Relu(h)  b = MatMul(a, w3)  s = Slice(b, from, to, axes, step)  r = MatMul(s, w4)",
        8 + 8,
        f"int64[1] from = {_from}, int64[1] to = {_to}, int64[1] axes = {{1}}, int64[1] step = {_step}, "
        f"float[8,8] w3, float[{_size},8] w4",
        "takes every",
    )
image(
    "slice-space-and-channels",
    "Slice",
    "a = Slice(h, from, to)  r = Conv(a, w3)",
    8 + 8,
    "int64[3] from = {0, 2, 1}, int64[3] to = {9, 7, -1}, float[8,5,1,1] w3",
)
dense(
    "gather",
    "Gather",
    "r = Gather<axis = 1>(h, order)",
    constants="int64[8] order = {7, 5, 3, 1, 0, 2, 4, -2}",
)
dense(
    "gather-subset",
    "Gather",
    "g = Gather<axis = -1>(h, order)  r = MatMul(g, w3)",
    8 + 8,
    "int64[6] order = {2, 2, -1, 4, 5, 0}, float[6,8] w3",
)
dense(
    "gather-one-channel",
    "Gather",
    "g = Gather<axis = 1>(h, one)  u = Unsqueeze(g, at)  r = Mul(h, u)",
    7,
    "int64 one = {3}, int64[1] at = {1}",
    "picks it by position",
)
case(
    "gather-embedding",
    "Gather",
    """(int64[N,6] ids) => (float[] y) <float[5,8] table, float[8,3] w> {
        e = Gather(table, ids)
        h = Relu(e)
        y = MatMul(h, w)
    }""",
    units=8,
)
case(
    "gather-at-run-time",
    "Gather",
    """(float[N,5] x, int64[7] ids) => (float[] y) <float[5,6] w1, float[6,8] w2, float[7,3] w3> {
        a = MatMul(x, w1)
        h = MatMul(a, w2)
        g = Gather<axis = 1>(h, ids)
        y = MatMul(g, w3)
    }""",
    units=6,
    pinned="picks from it at run time",
)
case(
    "pad-channels",
    "Pad",
    """(float[N,3,6,6] x) => (float[] y)
    <float[4,3,3,3] w1, float[8,4,3,3] w2, int64[8] pads = {0, 2, 0, 0, 0, 2, 0, 0}, float[4,8,1,1] w3> {
        a = Conv<pads = [1, 1, 1, 1]>(x, w1)
        h = Relu(a)
        c = Conv<pads = [1, 1, 1, 1]>(h, w2)
        p = Pad(h, pads)
        s = Add(c, p)
        r = Relu(s)
        y = Conv(r, w3)
    }""",
    # The narrow branch joins channels 2 to 5 of the wide one; what is added to padding stays.
    units=4,
    pinned="adds it as padding",
)
image(
    "pad-space",
    "Pad",
    'r = Pad<mode = "reflect">(h, pads)',
    constants="int64[8] pads = {0, 0, 1, 2, 0, 0, 2, 1}",
)
image("pad-opset-10", "Pad", "r = Pad<pads = [0, 0, 1, 1, 0, 0, 1, 1]>(h)", opset=10)
image(
    "pad-axes",
    "Pad",
    "r = Pad(h, pads, , axes)",
    constants="int64[4] pads = {1, 2, 0, 1}, int64[2] axes = {-1, 2}",
    opset=18,
)
image(
    "pad-crops-channels",
    "Pad",
    "a = Relu(h)  b = Conv(a, w3)  r = Pad(b, pads)",
    8,
    "float[9,8,1,1] w3, int64[8] pads = {0, -1, 0, 0, 0, 0, 0, 0}",
    "crops or repeats along it",
)
_DOUBLE = "float[4] by = {1.0, 1.0, 2.0, 2.0}"
image("resize-scales", "Resize", 'r = Resize<mode = "nearest">(h, , by)', constants=_DOUBLE)
image(
    "resize-opset-11",
    "Resize",
    'r = Resize<mode = "linear">(h, roi, by)',
    constants="float[0] roi = {}, float[4] by = {1.0, 1.0, 2.0, 2.0}",
    opset=11,
)
image(
    "resize-opset-10", "Resize", 'r = Resize<mode = "nearest">(h, by)', constants=_DOUBLE, opset=10
)
image(
    "resize-axes",
    "Resize",
    'r = Resize<mode = "nearest", axes = [2, 3]>(h, , , to)',
    constants="int64[2] to = {9, 7}",
    opset=18,
)
case(
    "resize-sizes",
    "Resize",
    """(float[1,3,6,6] x) => (float[] y) <float[8,3,3,3] w1, int64[4] to = {1, 8, 9, 7}, float[4,8,1,1] w2> {
        h = Conv(x, w1)
        r = Resize<mode = "linear">(h, , , to)
        y = Conv(r, w2)
    }""",
    # The sizes name the channel count, which must follow.
    units=8,
)
image(
    "upsample",
    "Upsample",
    'r = Upsample<mode = "nearest">(h, by)',
    constants="float[4] by = {1.0, 1.0, 2.0, 2.0}",
    opset=9,
)
image(
    "upsample-opset-7",
    "Upsample",
    'r = Upsample<mode = "nearest", scales = [1.0, 1.0, 2.0, 2.0]>(h)',
    opset=7,
)
dense(
    "expand",
    "Expand",
    "u = Unsqueeze(h, at)  r = Expand(u, to)",
    constants="int64[1] at = {1}, int64[3] to = {1, 4, 8}",
)
dense("expand-by-ones", "Expand", "r = Expand(h, to)", constants="int64[2] to = {1, 1}")
dense(
    "expand-a-single-channel",
    "Expand",
    "a = Relu(h)  s = MatMul(a, w3)  r = Expand(s, to)",
    16,  # of the eight copies any may go
    "float[8,1] w3, int64[2] to = {1, 8}",
    "changes the length of this axis",
)
dense(
    "tile",
    "Tile",
    "u = Unsqueeze(h, at)  r = Tile(u, by)",
    constants="int64[1] at = {1}, int64[3] by = {1, 3, 1}",
)
dense(
    "tile-channels",
    "Tile",
    "a = Relu(h)  s = MatMul(a, w3)  r = Tile(s, by)",
    8,
    "float[8,4] w3, int64[2] by = {1, 2}",
    "changes the length of this axis",
)
dense(
    "shape-of-the-batch",
    "Shape",
    "s = Shape(h)  n = Gather(s, zero)  f = Cast<to = 1>(n)  r = Div(h, f)",
    constants="int64 zero = {0}",
)
dense("shape-range", "Shape", "s = Shape<end = 1>(h)  f = Cast<to = 1>(s)  r = Div(h, f)", opset=15)
dense(
    "shape-of-the-channels",
    "Div",
    # The width that is read is a constant, and stays what it was.
    "a = Relu(h)  b = MatMul(a, w3)  s = Shape(b)  n = Gather(s, last)  f = Cast<to = 1>(n)  r = Div(b, f)",
    8 + 8,
    "float[8,8] w3, int64 last = {-1}",
)
