"""Cases for Reshape, Transpose and their relatives, with constant and computed sizes."""

from __future__ import annotations

from case_templates import dense
from op_case import case

_FLAT = """(float[N,3,6,6] x) => (float[] y) <float[8,3,3,3] w1, float[128,4] w2{constants}> {{
    h = Conv(x, w1)
    {body}
    y = MatMul(r, w2)
}}"""
for _name, _body, _constants, _opset in (
    ("flatten", "r = Flatten(h)", "", 17),
    ("reshape", "r = Reshape(h, to)", ", int64[2] to = {0, -1}", 17),
    ("reshape-literal", "r = Reshape(h, to)", ", int64[2] to = {-1, 128}", 17),
    (
        "reshape-in-steps",
        "a = Reshape(h, first)  r = Reshape(a, second)",
        ", int64[3] first = {0, 8, 16}, int64[2] second = {0, 128}",
        17,
    ),
    (
        "flatten-channels-last",
        "t = Transpose<perm = [0, 2, 3, 1]>(h)  r = Flatten<axis = 1>(t)",
        "",
        17,
    ),
):
    _op = "Flatten" if _name.startswith("flatten") else "Reshape"
    case(_name, _op, _FLAT.format(body=_body, constants=_constants), 8, opset=_opset)
case(
    "shape-driven-reshape",
    "Reshape",
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,3,3] w1, float[128,4] w2, int64 zero = {0}, int64[1] at = {0}, int64[1] rest = {-1}> {
        h = Conv(x, w1)
        s = Shape(h)
        n = Gather(s, zero)
        u = Unsqueeze(n, at)
        to = Concat<axis = 0>(u, rest)
        r = Reshape(h, to)
        y = MatMul(r, w2)
    }""",
    units=8,
)
case(
    "reshape-to-a-computed-shape",
    "Reshape Shape",
    """(float[N,3,6,6] x, float[A,B] like) => (float[A,4] y) <float[8,3,3,3] w1, float[128,4] w2> {
        h = Conv(x, w1)
        to = Shape(like)
        r = Reshape(h, to)
        y = MatMul(r, w2)
    }""",
    units=0,
    pinned="takes its target shape from a computation",
    # The second input has the shape of the flattened features.
    bindings={"N": 1, "A": 1, "B": 128},
)
for _op, _call, _inputs in (
    ("Slice", "Slice(d, from, to)", "int64[4] from, int64[4] to"),
    ("Pad", "Pad(d, pads)", "int64[8] pads"),
    ("Resize", 'Resize<mode = "nearest">(d, , , size)', "int64[4] size"),
    ("Expand", "Expand(d, ones)", "int64[4] ones"),
    ("Tile", "Tile(d, ones)", "int64[4] ones"),
    ("Split", "s, t = Split<axis = 2>(d, parts)", "int64[2] parts"),
):
    case(
        f"{_op.lower()}-at-run-time",
        _op,
        f"""(float[N,3,10,6] x, {_inputs}) => (float[N,4,A,B] y)
        <float[8,3,3,3] w1, float[8,8,1,1] w2, float[4,8,1,1] w3> {{
            c = Conv(x, w1)
            h = Relu(c)
            d = Conv(h, w2)
            {_call if _op == "Split" else f"s = {_call}"}
            y = Conv(s, w3)
        }}""",
        units=8,
        pinned="output of unknown shape",
        bindings={"N": 1},
    )
# Sizes computed from shapes are provably constant, and then o has no consumer.
_SIZED = """(float[N,3,6,6] x) => (float[] y) <float[8,3,3,3] w1, float[8,8,1,1] w2, float[8,3,3,3] w4{constants},
float[4,8,1,1] w3> {{
    c = Conv(x, w1)
    h = Relu(c)
    d = Conv(h, w2)
    o = Conv(x, w4)
    {body}
    y = Conv(r, w3)
}}"""
for _name, _op, _body, _constants, _units, _why in (
    (
        "resize-to-a-computed-size",
        "Resize",
        's = Shape(o)  t = Mul(s, twice)  r = Resize<mode = "nearest">(d, , , t)',
        ", int64[4] twice = {1, 1, 2, 2}",
        8 + 8,
        "graph output",
    ),
    (
        "expand-to-a-computed-shape",
        "Expand",
        "g = GlobalMaxPool(d)  s = Shape(o)  r = Expand(g, s)",
        "",
        8 + 8,
        "graph output",
    ),
    (
        "slice-to-a-computed-end",
        "Slice",
        "s = Shape(o)  l = Gather(s, last)  r = Slice(d, from, l, last)",
        ", int64[1] last = {3}, int64[1] from = {1}",
        8 + 8,
        "graph output",
    ),
    (
        "reshape-to-a-computed-size",
        "Reshape",
        "s = Shape(o)  r = Reshape(d, s)",
        "",
        8 + 8,
        "graph output",
    ),
):
    case(
        _name, _op, _SIZED.format(body=_body, constants=_constants), _units, _why, bindings={"N": 1}
    )
for _opset in (12, 17):
    case(
        f"squeeze-of-all-ones-opset-{_opset}",
        "Squeeze",
        """(float[2,3,6,6] x) => (float[2,4] y) <float[8,3,3,3] w1, float[8,4] w2> {
        h = Conv(x, w1)
        p = GlobalAveragePool(h)
        r = Squeeze(p)
        y = MatMul(r, w2)
    }""",
        # With one channel left its axis is of length one as well.
        units=8,
        opset=_opset,
    )
case(
    "squeeze",
    "Squeeze",
    """(float[N,3,6,6] x) => (float[] y) <float[8,3,3,3] w1, float[8,4] w2, int64[2] at = {2, 3}> {
        h = Conv(x, w1)
        p = GlobalAveragePool(h)
        r = Squeeze(p, at)
        y = MatMul(r, w2)
    }""",
    units=8,
)
case(
    "squeeze-unsqueeze-opset-11",
    "Squeeze Unsqueeze",
    """(float[N,3,6,6] x) => (float[] y) <float[8,3,3,3] w1, float[8,5] w2, float[4,5,1,1] w3> {
        h = Conv(x, w1)
        p = GlobalAveragePool(h)
        s = Squeeze<axes = [2, 3]>(p)
        m = MatMul(s, w2)
        r = Relu(m)
        u = Unsqueeze<axes = [2, 3]>(r)
        y = Conv(u, w3)
    }""",
    units=8 + 5,
    opset=11,
)
dense("unsqueeze", "Unsqueeze", "r = Unsqueeze(h, at)", constants="int64[1] at = {1}")
case(
    "transpose",
    "Transpose",
    """(float[N,3,4,4] x) => (float[] y)
    <float[8,3,3,3] w1, float[8,6] w2, float[6] b2, float[4,6,1,1] w3> {
        h = Conv(x, w1)
        t = Transpose<perm = [0, 2, 3, 1]>(h)
        m = MatMul(t, w2)
        a = Add(m, b2)
        u = Transpose<perm = [0, 3, 1, 2]>(a)
        r = Relu(u)
        y = Conv(r, w3)
    }""",
    units=8 + 6,
)
case(
    "transpose-default",
    "Transpose",
    """(float[4,5] x) => (float[] y) <float[5,8] w1, float[3,8] w2> {
        h = MatMul(x, w1)
        t = Transpose(h)
        y = MatMul(w2, t)
    }""",
    units=8,
)
for _mode in ("DCR", "CRD"):
    case(
        f"depth-to-space-{_mode.lower()}",
        "DepthToSpace",
        f"""(float[N,3,4,4] x) => (float[] y) <float[12,3,3,3] w1, float[4,3,1,1] w2> {{
            h = Conv(x, w1)
            r = Relu(h)
            d = DepthToSpace<blocksize = 2, mode = "{_mode}">(r)
            y = Conv(d, w2)
        }}""",
        units=3,
    )
case(
    "space-to-depth",
    "SpaceToDepth",
    """(float[N,3,6,6] x) => (float[] y) <float[5,3,3,3] w1, float[4,20,1,1] w2> {
        h = Conv(x, w1)
        r = Relu(h)
        d = SpaceToDepth<blocksize = 2>(r)
        y = Conv(d, w2)
    }""",
    units=5,
)
