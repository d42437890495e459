"""Cases for operators that read or write rows at places computed at run time, and that sample images there."""

from __future__ import annotations

from case_templates import image
from op_case import case

_ROWS = """(float[4,5] x, int64[{index}] places) => (float[] y)
<float[5,8] w1, float[8,8] w2, float[8,3] w3{constants}> {{
    e = MatMul(x, w1)
    h = Relu(e)
    {body}
    y = MatMul(r, w3)
}}"""


def rows(
    name: str,
    ops: str,
    body: str,
    units: int,
    *,
    constants: str = "",
    index: str = "6",
    pinned: str = "",
    opset: int = 18,
) -> None:
    """Four rows of 8 features ``h``, the operator with the indices ``places`` (0 to 3) giving ``r``."""
    text = _ROWS.format(index=index, body=body, constants=", " + constants if constants else "")
    case(name, ops, f"{text}", units, (pinned,) if pinned else (), opset)


_INDEX = "k = Mod(places, four)  i = Unsqueeze(k, last)"
_INDEX_CONSTANTS = "int64[1] last = {-1}, int64 four = {4}"
rows(
    "gather-nd-rows",
    "GatherND",
    f"{_INDEX}  r = GatherND(h, i)",
    8,
    constants=_INDEX_CONSTANTS,
)
rows(
    "gather-nd-batch",
    "GatherND",
    "i = Mod(places, two)  g = Reshape(h, blocks)  p = GatherND<batch_dims = 1>(g, i)  r = MatMul(p, w2)",
    8 + 8,
    constants="int64 two = {2}, int64[3] blocks = {2, 2, 8}",
    index="2,3,1",
)
rows(
    "gather-nd-elements",
    "GatherND",
    "i = Mod(places, four)  p = GatherND(h, i)  q = Unsqueeze(p, last)  r = Mul(q, ones)",
    8,
    constants=f"{_INDEX_CONSTANTS}, float[1,8] ones",
    index="6,2",
    pinned="picks from it at run time",
)
rows(
    "gather-elements-rows",
    "GatherElements",
    f"{_INDEX}  t = Expand(i, wide)  r = GatherElements<axis = 0>(h, t)",
    8,
    constants=f"{_INDEX_CONSTANTS}, int64[2] wide = {{1, 8}}",
)
rows(
    "gather-elements-channels",
    "GatherElements",
    f"{_INDEX}  t = Expand(i, wide)  g = GatherElements<axis = 1>(h, t)  r = MatMul(g, w2)",
    # The channels behind the second layer; the indexed ones stay.
    8,
    constants=f"{_INDEX_CONSTANTS}, int64[2] wide = {{4, 8}}",
    index="4",
    pinned="indexes this axis at run time",
)
_MESSAGES = "m = Gather(h, k)  u = MatMul(m, w2)"
for _reduction in ("none", "add", "mul", "max", "min"):
    rows(
        f"scatter-elements-{_reduction}",
        "ScatterElements",
        f"{_INDEX}  {_MESSAGES}  t = Expand(i, wide)  "
        f'r = ScatterElements<axis = 0, reduction = "{_reduction}">(h, t, u)',
        8,
        constants=f"{_INDEX_CONSTANTS}, int64[2] wide = {{1, 8}}",
        # Without a reduction the order of writes to one place is not defined: every place is written once.
        index="6" if _reduction != "none" else "1",
    )
    rows(
        f"scatter-nd-{_reduction}",
        "ScatterND",
        f'{_INDEX}  {_MESSAGES}  r = ScatterND<reduction = "{_reduction}">(h, i, u)',
        8,
        constants=_INDEX_CONSTANTS,
        index="6" if _reduction != "none" else "1",
    )
case(
    "scatter-into-filled-rows",
    "ScatterElements ConstantOfShape",
    """(float[N,5] x, int64[6] places) => (float[] y)
    <float[5,8] w1, float[8,8] w2, float[8,3] w3, int64[1] last = {-1}, int64 zero = {0}> {
        h = MatMul(x, w1)
        k = Mul(places, zero)
        i = Unsqueeze(k, last)
        m = Gather(h, k)
        u = MatMul(m, w2)
        us = Shape(u)
        t = Expand(i, us)
        hs = Shape(h)
        z = ConstantOfShape(hs)
        a = ScatterElements<axis = 0, reduction = "add">(z, t, u)
        r = Add(a, h)
        y = MatMul(r, w3)
    }""",
    units=8,
    opset=18,
)
case(
    "scatter-into-filled-rows-of-a-listed-length",
    "ScatterND ConstantOfShape",
    """(float[N,5] x, int64[6] places) => (float[] y)
    <float[5,8] w1, float[8,7] w2, float[7,3] w3, int64[1] last = {-1}, int64 zero = {0},
     int64[1] first = {0}, int64[1] width = {7}> {
        h = MatMul(x, w1)
        k = Mul(places, zero)
        i = Unsqueeze(k, last)
        m = Gather(h, k)
        u = MatMul(m, w2)
        hs = Shape(h)
        n = Gather(hs, first)
        l = Concat<axis = 0>(n, width)
        z = ConstantOfShape<value = float[1] {0.5}>(l)
        r = ScatterND<reduction = "max">(z, i, u)
        y = MatMul(r, w3)
    }""",
    units=8 + 7,
    opset=18,
)
image(
    "grid-sample",
    "GridSample",
    "b = Slice(h, start, one)  r = GridSample(b, g)",
    constants="float[1,4,5,2] g, int64[1] start = {0}, int64[1] one = {1}",
    opset=16,
    out="1,4,4,5",
)
case(
    "grid-sample-learned",
    "GridSample",
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,3,3] w1, float[2,8,1,1] wg, float[4,8,1,1] w2> {
        h = Conv<pads = [1, 1, 1, 1]>(x, w1)
        o = Conv(h, wg)
        t = Tanh(o)
        g = Transpose<perm = [0, 2, 3, 1]>(t)
        r = GridSample<padding_mode = "border">(h, g)
        y = Conv(r, w2)
    }""",
    units=8,
    pinned="places in an image",
    opset=20,
)
_BOXES = """(float[N,3,6,6] x) => (float[] y)
<float[8,3,3,3] w1, float[32,7] w2, float[7,3] w3, {boxes}> {{
    h = Conv<pads = [1, 1, 1, 1]>(x, w1)
    b = {pool}
    f = Flatten(b)
    m = MatMul(f, w2)
    r = Relu(m)
    y = MatMul(r, w3)
}}"""
case(
    "pooled-boxes-aligned",
    "RoiAlign",
    _BOXES.format(
        boxes="float[2,4] boxes = {0.0, 0.0, 3.0, 3.0, 1.0, 1.0, 5.0, 4.0}, int64[2] which = {0, 0}",
        pool="RoiAlign<output_height = 2, output_width = 2, sampling_ratio = 2>(h, boxes, which)",
    ),
    units=8 + 7,
    opset=16,
)
case(
    "pooled-boxes",
    "MaxRoiPool",
    _BOXES.format(
        boxes="float[2,5] boxes = {0.0, 0.0, 0.0, 3.0, 3.0, 0.0, 1.0, 1.0, 5.0, 4.0}",
        pool="MaxRoiPool<pooled_shape = [2, 2]>(h, boxes)",
    ),
    units=8 + 7,
)
_OFFSETS = "o = Conv<pads = [1, 1, 1, 1]>(x, wo)"
image(
    "deformable-convolution",
    "DeformConv",
    f"{_OFFSETS}  r = DeformConv<pads = [1, 1, 1, 1]>(h, wd, o, b)",
    units=8 + 8,
    constants="float[18,3,3,3] wo, float[8,8,3,3] wd, float[8] b",
    pinned="takes it as offsets",
    opset=19,
)
image(
    "deformable-convolution-depthwise",
    "DeformConv",
    f"k = Relu(h)  {_OFFSETS}  r = DeformConv<pads = [1, 1, 1, 1], group = 8>(k, wd, o)",
    constants="float[18,3,3,3] wo, float[8,1,3,3] wd",
    opset=22,
)
image(
    "deformable-convolution-blocks",
    "DeformConv",
    f"{_OFFSETS}  s = Sigmoid(o)  m = Slice(s, start, end, axes)  "
    "r = DeformConv<pads = [1, 1, 1, 1], offset_group = 2>(h, wd, o, , m)",
    # Channel j of either block goes together.
    units=4 + 8,
    constants="float[36,3,3,3] wo, float[8,8,3,3] wd, int64[1] start = {0}, int64[1] end = {18},"
    " int64[1] axes = {1}",
    opset=19,
)
