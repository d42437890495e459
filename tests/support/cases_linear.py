"""Cases for the linear operators: Gemm, MatMul and convolutions with every form of weight and bias."""

from __future__ import annotations

from op_case import case

_GEMM_BIAS = {
    "none": ("", ""),
    "vector": (", float[8] c", ", c"),
    "row": (", float[1,8] c", ", c"),
    "one": (", float[1] c", ", c"),
    "scalar": (", float c = {0.7}", ", c"),
}
for _ta in (0, 1):
    for _tb in (0, 1):
        for _kind, (_declared, _operand) in _GEMM_BIAS.items():
            _x = "xt = Transpose<perm = [1, 0]>(x)" if _ta else "xt = Identity(x)"
            _h = "ht = Transpose<perm = [1, 0]>(h)" if _ta else "ht = Identity(h)"
            _w1, _w2 = (
                ("float[8,5] w1", "float[3,8] w2") if _tb else ("float[5,8] w1", "float[8,3] w2")
            )
            _first = f"<transA = {_ta}, transB = {_tb}, alpha = 0.5, beta = 2.0>"
            _second = f"<transA = {_ta}, transB = {_tb}, alpha = 1.5, beta = 0.25>"
            case(
                f"gemm-transA{_ta}-transB{_tb}-bias-{_kind}",
                "Gemm",
                f"""(float[N,5] x) => (float[] y) <{_w1}, {_w2}, float[3] d{_declared}> {{
                    {_x}
                    g = Gemm{_first}(xt, w1{_operand})
                    h = Relu(g)
                    {_h}
                    y = Gemm{_second}(ht, w2, d)
                }}""",
                units=8,
            )
case(
    "gemm-constant-left",
    "Gemm",
    """(float[4,5] x) => (float[] y) <float[8,5] w1, float[8,1] c, float[3,8] w2> {
        g = Gemm<transB = 1>(w1, x, c)
        h = Tanh(g)
        y = Gemm(w2, h)
    }""",
    units=8,
)
case(
    "gemm-full-bias",
    "Gemm",
    """(float[4,5] x) => (float[] y) <float[5,8] w1, float[4,8] c, float[8,3] w2> {
        g = Gemm(x, w1, c)
        h = Relu(g)
        y = Gemm(h, w2)
    }""",
    units=8,
)
case(
    "gemm-old-explicit-broadcast",
    "Gemm",
    """(float[4,5] x) => (float[] y) <float[5,8] w1, float[1,8] c, float[8,3] w2, float[4,1] d> {
        g = Gemm(x, w1, c)
        h = Relu(g)
        y = Gemm(h, w2, d)
    }""",
    units=8,
    opset=9,
    ir=4,
)
case(
    "matmul-then-add",
    "MatMul",
    """(float[N,5] x) => (float[] y) <float[5,8] w1, float[8] b1, float[8,3] w2, float[3] b2> {
        m = MatMul(x, w1)
        a = Add(m, b1)
        h = Relu(a)
        o = MatMul(h, w2)
        y = Add(b2, o)
    }""",
    units=8,
)
case(
    "matmul-constant-left",
    "MatMul",
    """(float[N,5,4] x) => (float[] y) <float[8,5] w1, float[8,1] b1, float[3,8] w2> {
        m = MatMul(w1, x)
        a = Add(m, b1)
        h = Relu(a)
        y = MatMul(w2, h)
    }""",
    units=8,
)
case(
    "matmul-batched-weight",
    "MatMul",
    """(float[2,4,5] x) => (float[] y) <float[2,5,8] w1, float[2,8,3] w2> {
        m = MatMul(x, w1)
        h = Relu(m)
        y = MatMul(h, w2)
    }""",
    units=8,
)
case(
    "matmul-vectors",
    "MatMul",
    """(float[N,5] x) => (float[N] y) <float[5,8] w1, float[8] v> {
        m = MatMul(x, w1)
        h = Relu(m)
        y = MatMul(h, v)
    }""",
    units=8,
)
case(
    "matmul-broadcast-stack",
    "MatMul",
    """(float[N,4,5] x) => (float[] y) <float[6,5,7] w1, float[6,7,3] w2, int64[1] one = {1}> {
        u = Unsqueeze(x, one)
        m = MatMul(u, w1)
        h = Relu(m)
        o = MatMul(h, w2)
        y = ReduceSum<keepdims = 0>(o, one)
    }""",
    # The stack of six matrices comes from a broadcast axis, which is not tracked.
    units=7,
)
case(
    "conv-1d",
    "Conv",
    """(float[N,3,12] x) => (float[] y) <float[8,3,3] w1, float[8] b1, float[4,8,3] w2, float[4] b2> {
        c = Conv<pads = [1, 1]>(x, w1, b1)
        h = Relu(c)
        y = Conv<strides = [2], dilations = [2]>(h, w2, b2)
    }""",
    units=8,
)
case(
    "conv-2d",
    "Conv",
    """(float[N,3,8,8] x) => (float[] y) <float[8,3,3,3] w1, float[8] b1, float[4,8,3,3] w2> {
        c = Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>(x, w1, b1)
        h = Relu(c)
        y = Conv<pads = [1, 0, 1, 0]>(h, w2)
    }""",
    units=8,
)
case(
    "conv-3d",
    "Conv",
    """(float[N,2,5,5,5] x) => (float[] y) <float[6,2,3,3,3] w1, float[4,6,1,2,3] w2> {
        c = Conv(x, w1)
        h = Relu(c)
        y = Conv(h, w2)
    }""",
    units=6,
)
case(
    "conv-grouped-slots",
    "Conv",
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,1,1] w1, float[12,4,3,3] w2, float[12] b2, float[4,12,1,1] w3> {
        c = Conv(x, w1)
        h = Relu(c)
        g = Conv<group = 2, pads = [1, 1, 1, 1]>(h, w2, b2)
        r = Relu(g)
        y = Conv(r, w3)
    }""",
    # Slot j of both groups goes together: 4 before the grouped convolution, 6 behind it.
    units=4 + 6,
)
case(
    "conv-grouped-whole",
    "Conv",
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,1,1] w1, float[12,2,3,3] w2, float[12] b2, float[4,12,1,1] w3> {
        c = Conv(x, w1)
        h = Relu(c)
        g = Conv<group = 4>(h, w2, b2)
        r = Relu(g)
        y = Conv(r, w3)
    }""",
    units=4,
)
case(
    "conv-depthwise",
    "Conv",
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,1,1] w1, float[8,1,3,3] w2, float[8] b2, float[4,8,1,1] w3> {
        c = Conv(x, w1)
        h = Relu(c)
        d = Conv<group = 8, pads = [1, 1, 1, 1]>(h, w2, b2)
        r = Relu(d)
        y = Conv(r, w3)
    }""",
    units=8,
)
case(
    "conv-depthwise-multiplier",
    "Conv",
    """(float[N,3,6,6] x) => (float[] y) <float[6,3,1,1] w1, float[12,1,3,3] w2, float[4,12,1,1] w3> {
        c = Conv(x, w1)
        h = Relu(c)
        d = Conv<group = 6>(h, w2)
        r = Relu(d)
        y = Conv(r, w3)
    }""",
    units=6,
)
case(
    "conv-grouped-on-the-input",
    "Conv",
    """(float[N,4,6,6] x) => (float[] y) <float[8,2,3,3] w1, float[4,8,1,1] w2> {
        c = Conv<group = 2>(x, w1)
        h = Relu(c)
        y = Conv(h, w2)
    }""",
    units=0,
    pinned="reads an untracked input",
)
case(
    "conv-transpose",
    "ConvTranspose",
    """(float[N,3,5,5] x) => (float[] y) <float[3,8,2,2] w1, float[8] b1, float[8,4,3,3] w2, float[4] b2> {
        c = ConvTranspose<strides = [2, 2]>(x, w1, b1)
        h = Relu(c)
        y = ConvTranspose(h, w2, b2)
    }""",
    units=8,
)
case(
    "conv-transpose-grouped-slots",
    "ConvTranspose",
    """(float[N,3,5,5] x) => (float[] y)
    <float[8,3,1,1] w1, float[8,6,2,2] w2, float[12] b2, float[4,12,1,1] w3> {
        c = Conv(x, w1)
        h = Relu(c)
        t = ConvTranspose<group = 2, strides = [2, 2]>(h, w2, b2)
        r = Relu(t)
        y = Conv(r, w3)
    }""",
    units=4 + 6,
)
case(
    "conv-transpose-grouped-whole",
    "ConvTranspose",
    """(float[N,3,5,5] x) => (float[] y)
    <float[8,3,1,1] w1, float[8,3,2,2] w2, float[12] b2, float[4,12,1,1] w3> {
        c = Conv(x, w1)
        h = Relu(c)
        t = ConvTranspose<group = 4>(h, w2, b2)
        r = Relu(t)
        y = Conv(r, w3)
    }""",
    units=4,
)
case(
    "conv-transpose-depthwise",
    "ConvTranspose",
    """(float[N,3,5,5] x) => (float[] y) <float[8,3,1,1] w1, float[8,1,2,2] w2, float[4,8,1,1] w3> {
        c = Conv(x, w1)
        h = Relu(c)
        t = ConvTranspose<group = 8, strides = [2, 2]>(h, w2)
        r = Relu(t)
        y = Conv(r, w3)
    }""",
    units=8,
)
