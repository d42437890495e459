"""Cases for quantised operators: scales and zero points per tensor, per axis and in blocks; integer arithmetic.

Codes of weights stay in seven bits: some processors add pairs of wider products with saturation, and then even zeros
change a sum.
"""

from __future__ import annotations

import math

import numpy as np
from op_case import case


def codes(kind: str, name: str, *shape: int, low: int = -60, high: int = 60) -> str:
    """A declaration of random integers, seeded by the name."""
    rng = np.random.default_rng([ord(c) for c in name])
    values = rng.integers(low, high, math.prod(shape), endpoint=True)
    return f"{kind}[{','.join(map(str, shape))}] {name} = {{{', '.join(map(str, values))}}}"


def gains(name: str, count: int, scale: float = 0.006) -> str:
    """A declaration of positive scales."""
    values = scale * np.random.default_rng([ord(c) for c in name]).uniform(0.5, 1.5, count)
    return f"float[{count}] {name} = {{{', '.join(f'{v:.7f}' for v in values)}}}"


_DATA = "float sx = {0.03}, uint8 zx = {120}"
_WEIGHT = "float sw = {0.006}, int8 zw = {0}"

for _kind, _scales, _zeros in (
    ("tensor", "float sv = {0.006}, float sb = {0.00018}", "int8 zv = {0}"),
    ("axis", f"{gains('sv', 8)}, {gains('sb', 8, 0.00018)}", codes("int8", "zv", 8, low=0, high=0)),
    ("one", "float[1] sv = {0.006}, float[1] sb = {0.00018}", "int8[1] zv = {0}"),
):
    case(
        f"qdq-conv-per-{_kind}",
        "QuantizeLinear DequantizeLinear Conv",
        f"""(float[N,3,6,6] x) => (float[] y)
        <{_DATA}, {_WEIGHT}, {_scales}, {_zeros}, {codes("int8", "w1", 8, 3, 3, 3)},
        {codes("int8", "w2", 4, 8, 3, 3)}, {codes("int32", "b1", 8, low=-400, high=400)}, float[8] gain> {{
            xq = QuantizeLinear(x, sx, zx)
            xd = DequantizeLinear(xq, sx, zx)
            w1d = DequantizeLinear<axis = 0>(w1, sv, zv)
            b1d = DequantizeLinear<axis = 0>(b1, sb)
            c = Conv<pads = [1, 1, 1, 1]>(xd, w1d, b1d)
            h = Relu(c)
            hq = QuantizeLinear(h, sx, zx)
            hd = DequantizeLinear(hq, sx, zx)
            w2d = DequantizeLinear(w2, sw, zw)
            d = Conv(hd, w2d)
            dq = QuantizeLinear(d, sx, zx)
            y = DequantizeLinear(dq, sx, zx)
        }}""",
        units=8,
    )
case(
    "qdq-depthwise-pool-gemm",
    "QuantizeLinear DequantizeLinear Conv Gemm",
    f"""(float[N,3,6,6] x) => (float[] y)
    <{_DATA}, {_WEIGHT}, {gains("s1", 8)}, {gains("s2", 8, 0.02)}, {gains("s3", 5)},
    {codes("int8", "w1", 8, 3, 3, 3)}, {codes("int8", "w2", 8, 1, 3, 3)}, {codes("int8", "w3", 5, 72)},
    {codes("int8", "z3", 5, low=0, high=0)}> {{
        xq = QuantizeLinear(x, sx, zx)
        xd = DequantizeLinear(xq, sx, zx)
        w1d = DequantizeLinear<axis = 0>(w1, s1)
        c = Conv<pads = [1, 1, 1, 1]>(xd, w1d)
        cq = QuantizeLinear(c, sx, zx)
        cd = DequantizeLinear(cq, sx, zx)
        w2d = DequantizeLinear<axis = -4>(w2, s2)
        d = Conv<group = 8, pads = [1, 1, 1, 1]>(cd, w2d)
        p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(d)
        pq = QuantizeLinear(p, sx, zx)
        pd = DequantizeLinear(pq, sx, zx)
        f = Flatten(pd)
        w3d = DequantizeLinear<axis = 0>(w3, s3, z3)
        y = Gemm<transB = 1>(f, w3d)
    }}""",
    units=8,
    tolerance=2e-5,
)
case(
    "qdq-grouped",
    "DequantizeLinear Conv ConvTranspose",
    f"""(float[N,3,6,6] x) => (float[] y) <{_DATA}, {_WEIGHT}, {gains("s2", 12)}, {codes("int8", "w1", 8, 3, 3, 3)},
    {codes("int8", "w2", 12, 4, 3, 3)}, {codes("int8", "w3", 12, 3, 2, 2)}, {codes("int8", "w4", 3, 6, 1, 1)}> {{
        w1d = DequantizeLinear(w1, sw, zw)
        c = Conv<pads = [1, 1, 1, 1]>(x, w1d)
        h = Relu(c)
        w2d = DequantizeLinear<axis = 0>(w2, s2)
        d = Conv<group = 2>(h, w2d)
        w3d = DequantizeLinear(w3, sw)
        e = ConvTranspose<group = 2>(d, w3d)
        w4d = DequantizeLinear(w4, sw, zw)
        y = Conv(e, w4d)
    }}""",
    units=4 + 6 + 3,
)
case(
    "qdq-matmul-per-column",
    "QuantizeLinear DequantizeLinear MatMul",
    f"""(float[N,5] x) => (float[] y)
    <{_DATA}, {_WEIGHT}, {gains("s1", 8)}, {codes("uint8", "w1", 5, 8, low=0, high=120)},
    {codes("uint8", "z1", 8, low=50, high=70)}, {codes("int8", "w2", 8, 3)}, {gains("s2", 3)}, {gains("sb", 8, 0.01)},
    {codes("int32", "b1", 8)}> {{
        w1d = DequantizeLinear(w1, s1, z1)
        a = MatMul(x, w1d)
        b1d = DequantizeLinear<axis = 0>(b1, sb)
        s = Add(a, b1d)
        h = Relu(s)
        hq = QuantizeLinear(h, sx, zx)
        hd = DequantizeLinear(hq, sx, zx)
        w2d = DequantizeLinear(w2, s2)
        y = MatMul(hd, w2d)
    }}""",
    units=8,
)
case(
    "qdq-float-weights",
    "QuantizeLinear DequantizeLinear Conv",
    f"""(float[N,3,6,6] x) => (float[] y) <{_DATA}, {gains("s1", 8, 0.01)}, {codes("int8", "z1", 8, low=0, high=0)},
    float s2 = {{0.01}}, int8 z2 = {{0}}, float[8,3,3,3] w1, float[4,8,1,1] w2> {{
        xq = QuantizeLinear(x, sx, zx)
        xd = DequantizeLinear(xq, sx, zx)
        w1q = QuantizeLinear<axis = 0>(w1, s1, z1)
        w1d = DequantizeLinear<axis = 0>(w1q, s1, z1)
        c = Conv(xd, w1d)
        h = Relu(c)
        hq = QuantizeLinear(h, sx, zx)
        hd = DequantizeLinear(hq, sx, zx)
        w2q = QuantizeLinear(w2, s2, z2)
        w2d = DequantizeLinear(w2q, s2, z2)
        d = Conv(hd, w2d)
        dq = QuantizeLinear(d, sx, zx)
        y = DequantizeLinear(dq, sx, zx)
    }}""",
    units=8,
)
case(
    "qdq-activations-per-channel",
    "QuantizeLinear DequantizeLinear",
    f"""(float[N,3,6,6] x) => (float[] y) <{gains("s1", 8, 0.03)}, {codes("uint8", "z1", 8, low=100, high=130)},
    float[8,3,3,3] w1, float[4,8,1,1] w2> {{
        c = Conv(x, w1)
        q = QuantizeLinear(c, s1, z1)
        h = DequantizeLinear(q, s1, z1)
        y = Conv(h, w2)
    }}""",
    units=8,
)
case(
    "dequantise-in-blocks",
    "DequantizeLinear MatMul",
    f"""(float[N,5] x) => (float[] y) <float[5,8] w1, {codes("int8", "w2", 8, 6)}, float[2,6] gain,
    {codes("int8", "z2", 2, 6, low=-3, high=3)}, float[6,3] w3> {{
        a = MatMul(x, w1)
        h = Relu(a)
        w2d = DequantizeLinear<axis = 0, block_size = 4>(w2, gain, z2)
        b = MatMul(h, w2d)
        r = Relu(b)
        y = MatMul(r, w3)
    }}""",
    # Four of the rows share a scale: they stay. The columns each have their own.
    units=6,
    pinned="one scale for several",
    opset=21,
    ir=10,
)
case(
    "dynamic-quantisation",
    "DynamicQuantizeLinear MatMulInteger",
    f"""(float[N,5] x) => (float[] y) <{codes("int8", "w1", 5, 8)}, {codes("int8", "w2", 8, 6)}, int8 zero = {{0}},
    {codes("int8", "z2", 6, low=-2, high=2)}, {gains("s1", 8)}, {gains("s2", 6)}, float[6,3] w3> {{
        xq, xs, xz = DynamicQuantizeLinear(x)
        a = MatMulInteger(xq, w1, xz, zero)
        af = Cast<to = 1>(a)
        as = Mul(xs, s1)
        ag = Mul(af, as)
        h = Relu(ag)
        hq, hs, hz = DynamicQuantizeLinear(h)
        b = MatMulInteger(hq, w2, hz, z2)
        bf = Cast<to = 1>(b)
        bs = Mul(hs, s2)
        bg = Mul(bf, bs)
        y = MatMul(bg, w3)
    }}""",
    units=8 + 6,
)
case(
    "conv-integer",
    "DynamicQuantizeLinear ConvInteger",
    f"""(float[N,3,6,6] x) => (float[] y) <{codes("uint8", "w1", 8, 3, 3, 3, low=0, high=120)}, uint8 zero = {{60}},
    {codes("uint8", "w2", 8, 1, 3, 3, low=0, high=120)}, {codes("uint8", "w3", 4, 8, 1, 1, low=0, high=120)},
    float s = {{0.005}}> {{
        xq, xs, xz = DynamicQuantizeLinear(x)
        a = ConvInteger(xq, w1, xz, zero)
        af = Cast<to = 1>(a)
        ag = Mul(af, s)
        hq, hs, hz = DynamicQuantizeLinear(ag)
        b = ConvInteger<group = 8>(hq, w2, hz, zero)
        bf = Cast<to = 1>(b)
        bg = Mul(bf, s)
        rq, rs, rz = DynamicQuantizeLinear(bg)
        c = ConvInteger(rq, w3, rz, zero)
        y = Cast<to = 1>(c)
    }}""",
    units=8,
)
case(
    "qlinear-conv",
    "QLinearConv",
    f"""(float[N,3,6,6] x) => (float[] y) <{_DATA}, {gains("s1", 8)}, {codes("int8", "z1", 8, low=0, high=0)},
    {codes("int8", "w1", 8, 3, 3, 3)}, {codes("int32", "b1", 8, low=-400, high=400)},
    {codes("int8", "w2", 12, 4, 3, 3)}, {_WEIGHT}, {codes("int8", "w3", 4, 12, 1, 1)}> {{
        xq = QuantizeLinear(x, sx, zx)
        a = QLinearConv<pads = [1, 1, 1, 1]>(xq, sx, zx, w1, s1, z1, sx, zx, b1)
        b = QLinearConv<group = 2>(a, sx, zx, w2, sw, zw, sx, zx)
        c = QLinearConv(b, sx, zx, w3, sw, zw, sx, zx)
        y = DequantizeLinear(c, sx, zx)
    }}""",
    units=4 + 6,
)
case(
    "qlinear-matmul",
    "QLinearMatMul",
    f"""(float[N,5] x) => (float[] y) <{_DATA}, {gains("s1", 8)}, {codes("int8", "z1", 8, low=0, high=0)},
    {codes("int8", "w1", 5, 8)}, {codes("int8", "w2", 8, 6)}, {_WEIGHT}, {codes("int8", "w3", 6, 3)}> {{
        xq = QuantizeLinear(x, sx, zx)
        a = QLinearMatMul(xq, sx, zx, w1, s1, z1, sx, zx)
        b = QLinearMatMul(a, sx, zx, w2, sw, zw, sx, zx)
        c = QLinearMatMul(b, sx, zx, w3, sw, zw, sx, zx)
        y = DequantizeLinear(c, sx, zx)
    }}""",
    units=8 + 6,
)
case(
    "qlinear-matmul-of-activations",
    "QLinearMatMul",
    f"""(float[N,4,5] x) => (float[] y)
    <{_DATA}, {_WEIGHT}, {codes("int8", "w1", 5, 8)}, {codes("int8", "w2", 5, 8)}> {{
        xq = QuantizeLinear(x, sx, zx)
        a = QLinearMatMul(xq, sx, zx, w1, sw, zw, sx, zx)
        b = QLinearMatMul(xq, sx, zx, w2, sw, zw, sx, zx)
        t = Transpose<perm = [0, 2, 1]>(b)
        c = QLinearMatMul(a, sx, zx, t, sx, zx, sx, zx)
        y = DequantizeLinear(c, sx, zx)
    }}""",
    units=0,
    pinned="two quantised activations",
)
case(
    "qdq-attention",
    "DequantizeLinear MatMul",
    f"""(float[N,5,6] x) => (float[] y) <{_DATA}, {_WEIGHT}, {codes("int8", "wq", 6, 8)}, {codes("int8", "wk", 6, 8)},
    {codes("int8", "wv", 6, 7)}, float[7,3] wo> {{
        q = DequantizeLinear(wq, sw, zw)
        k = DequantizeLinear(wk, sw, zw)
        v = DequantizeLinear(wv, sw, zw)
        a = MatMul(x, q)
        b = MatMul(x, k)
        c = MatMul(x, v)
        t = Transpose<perm = [0, 2, 1]>(b)
        l = MatMul(a, t)
        p = Softmax(l)
        o = MatMul(p, c)
        y = MatMul(o, wo)
    }}""",
    units=8 + 7,
)
case(
    "qdq-weight-transposed",
    "QuantizeLinear DequantizeLinear MatMul",
    f"""(float[N,5] x) => (float[] y) <{_DATA}, {_WEIGHT}, {gains("s1", 8)}, {codes("int8", "w1", 8, 5)},
    {codes("int8", "w2", 6, 8)}, {gains("s2", 6)}> {{
        xq = QuantizeLinear(x, sx, zx)
        xd = DequantizeLinear(xq, sx, zx)
        w1d = DequantizeLinear<axis = 0>(w1, s1)
        w1t = Transpose<perm = [1, 0]>(w1d)
        a = MatMul(xd, w1t)
        h = Relu(a)
        hq = QuantizeLinear(h, sx, zx)
        hd = DequantizeLinear(hq, sx, zx)
        w2d = DequantizeLinear<axis = 0>(w2, s2)
        w2t = Transpose<perm = [1, 0]>(w2d)
        b = MatMul(hd, w2t)
        bq = QuantizeLinear(b, sx, zx)
        y = DequantizeLinear(bq, sx, zx)
    }}""",
    units=8,
)

_KERNELS = """(float[N,4,32] x) => (float[N,4,3] y) <float[32,32] w1, float[8,3] w2{weights}> {{
    h = MatMul(x, w1)
    {body}
    y = MatMul(r, w2)
}}"""
for _name, _weights, _body in (
    (
        "MatMulNBits",
        "uint8[8,1,16] packed, float[8] scales",
        "r = com.microsoft.MatMulNBits<K = 32, N = 8, bits = 4, block_size = 32>(h, packed, scales)",
    ),
    (
        "DynamicQuantizeMatMul",
        "int8[32,8] codes, float scale = {0.1}",
        "r = com.microsoft.DynamicQuantizeMatMul(h, codes, scale)",
    ),
):
    case(
        f"counted-{_name.lower()}",
        f"com.microsoft.{_name}",
        _KERNELS.format(weights=", " + _weights, body=_body),
        # The layer in front feeds the quantised weight, and the layer behind reads what it makes.
        units=0,
        pinned="has a quantised weight that is not followed",
        domains={"com.microsoft": 1},
    )


def _dynamic_lstm(
    name: str, units: int, *, directions: int = 1, rows: int = 1, state: str = "", pinned: str = ""
) -> None:
    """A quantised LSTM of six units between two products, with ``rows`` scales for every direction."""
    count = directions * rows
    shape = f"[{directions},{rows}]" if rows > 1 else f"[{directions}]"
    parameters = [
        codes("int8", "wx", directions, 9, 24),
        codes("int8", "wh", directions, 6, 24),
        *(gains(scale, count).replace(f"[{count}]", shape, 1) for scale in ("sx", "sh")),
        *(
            codes("int8", zero, count, low=0, high=0).replace(f"[{count}]", shape, 1)
            for zero in ("zx", "zh")
        ),
        f"float[5,9] w1, float[{directions},48] b, float[{6 * directions},3] w2",
        f"int64[3] flat = {{0, 0, {6 * directions}}}",
    ]
    lines = ["h = MatMul(x, w1)", "a = Relu(h)", "t = Transpose<perm = [1, 0, 2]>(a)"]
    if state:
        parameters.append(f"float start = {{{state}}}, int64[3] sizes = {{{directions}, 4, 6}}")
        lines.append("s = Expand(start, sizes)")
    start = "s, s" if state else ", "
    direction = "bidirectional" if directions == 2 else "forward"
    lines += [
        f"""q = com.microsoft.DynamicQuantizeLSTM<hidden_size = 6, direction = "{direction}">
            (t, wx, wh, b, , {start}, , sx, zx, sh, zh)""",
        "m = Transpose<perm = [2, 0, 1, 3]>(q)",
        "f = Reshape(m, flat)",
        "y = MatMul(f, w2)",
    ]
    case(
        f"dynamic-lstm-{name}",
        "com.microsoft.DynamicQuantizeLSTM MatMul",
        f"(float[4,N,5] x) => (float[4,N,3] y) <{', '.join(parameters)}> {{ {'  '.join(lines)} }}",
        units=units,
        pinned=pinned,
        domains={"com.microsoft": 1},
        bindings={"N": 3},
    )


_dynamic_lstm("scale", 9 + 6)
_dynamic_lstm("scales-of-rows", 9 + 6, rows=24)
_dynamic_lstm("bidirectional", 9 + 6, directions=2)
_dynamic_lstm("from-zeros", 9 + 6, state="0.0")
_dynamic_lstm("from-ones", 9, state="1.0", pinned="does not start from zeros")
