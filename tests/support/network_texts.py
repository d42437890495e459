"""Small networks as ONNX text that several test files use."""

from __future__ import annotations

from graphs import ATTENTION, GROUPED, MLP, RESIDUAL
from graphs import CNN as SMALL_CNN

RESIDUAL_CNN = """(float[batch, 3, 8, 8] image) => (float[batch, 5] scores)
<float[6, 3, 3, 3] w1, float[6] b1, float[8, 6, 3, 3] w2, float[8] b2, float[6, 8, 3, 3] w3,
 float[4, 6, 1, 1] w5, float[5, 4] w4, float[5] b4> {
    a = Conv<pads = [1, 1, 1, 1]>(image, w1, b1)
    h = Relu(a)
    b = Conv<pads = [1, 1, 1, 1]>(h, w2, b2)
    r = Relu(b)
    c = Conv<pads = [1, 1, 1, 1]>(r, w3)
    s = Add(h, c)
    d = Conv(s, w5)
    t = Relu(d)
    g = GlobalAveragePool(t)
    f = Flatten(g)
    scores = Gemm<transB = 1>(f, w4, b4)
}"""

CNN = """(float[batch, 3, 8, 8] image) => (float[batch, 5] scores)
<float[12, 3, 3, 3] w1, float[12] b1, float[16, 12, 3, 3] w2, float[16] b2, float[5, 16] w4, float[5] b4> {
    a = Conv<pads = [1, 1, 1, 1]>(image, w1, b1)
    h = Relu(a)
    b = Conv<pads = [1, 1, 1, 1]>(h, w2, b2)
    r = Relu(b)
    g = GlobalAveragePool(r)
    f = Flatten(g)
    scores = Gemm<transB = 1>(f, w4, b4)
}"""

MEASURED = {
    "shared weights": """(float[N,5] x, float[N,3,5] z) => (float[N,4] y)
    <float[5,8] w1, float[8,6] w2, float[6,4] w3> {
        a = MatMul(x, w1)
        b = MatMul(z, w1)
        h = Relu(a)
        g = Tanh(b)
        u = Identity(w2)
        m = MatMul(h, w2)
        n = MatMul(g, u)
        p = ReduceMean<axes = [1], keepdims = 0>(n)
        s = Add(m, p)
        r = Relu(s)
        y = MatMul(r, w3)
    }""",
    "dense": MLP,
    "conv, pool, norm, flatten": SMALL_CNN,
    "residual trunk": RESIDUAL,
    "grouped and depthwise, image output": GROUPED,
    "attention, token output": ATTENTION,
    "attention, classes": ATTENTION.replace("(float[N,5,4] y)", "(float[N,4] y)").replace(
        "y = MatMul(s, wy)", "t = MatMul(s, wy)  y = ReduceMean<axes = [1], keepdims = 0>(t)"
    ),
    "softmax at the end": MLP.replace("y = Gemm(r, w3, b3)", "l = Gemm(r, w3, b3)  y = Softmax(l)"),
    "scaled products": """(float[N,6] x) => (float[N,4] y)
    <float[6,12] w1, float[12] b1, float[10,12] w2, float[10] b2, float[10,4] w3> {
        a = Gemm<alpha = 0.5, beta = 2.0>(x, w1, b1)
        h = Relu(a)
        b = Gemm<alpha = 3.0, beta = 0.5, transB = 1>(h, w2, b2)
        r = Tanh(b)
        y = Gemm<alpha = 0.25>(r, w3)
    }""",
    "weights on the left": """(float[N,5,6] x) => (float[N,4,6] y) <float[8,5] w1, float[7,8] w2, float[4,7] w3> {
        a = MatMul(w1, x)
        h = Relu(a)
        b = MatMul(w2, h)
        r = Relu(b)
        y = MatMul(w3, r)
    }""",
    "concatenation": """(float[N,3,6,6] x) => (float[N,4] y)
    <float[5,3,3,3] w1, float[6,5,3,3] w2, float[7,11,3,3] w3, float[18,4] w4> {
        a = Conv<pads = [1, 1, 1, 1]>(x, w1)
        h = Relu(a)
        b = Conv<pads = [1, 1, 1, 1]>(h, w2)
        c = Concat<axis = 1>(h, b)
        d = Conv<pads = [1, 1, 1, 1]>(c, w3)
        e = Relu(d)
        k = Concat<axis = 1>(c, e)
        g = GlobalAveragePool(k)
        f = Flatten(g)
        y = MatMul(f, w4)
    }""",
    "neighbours and a convolution": """(float[N,3,6,6] x) => (float[N,4] y)
    <float[8,3,3,3] w1, float[6,8,3,3] w2, float[96,4] w4> {
        a = Conv(x, w1)
        h = Relu(a)
        n = LRN<size = 3, alpha = 0.9, beta = 0.75>(h)
        b = Conv<pads = [1, 1, 1, 1]>(n, w2)
        m = LRN<size = 5, alpha = 0.9, beta = 0.75>(b)
        f = Flatten(m)
        y = MatMul(f, w4)
    }""",
    "transposed convolutions": """(float[N,3,4,4] x) => (float[N,3,11,10] y)
    <float[3,8,3,3] w1, float[8,3,2,2] w2, float[6,3,3,2] w3> {
        a = ConvTranspose(x, w1)
        h = Relu(a)
        b = ConvTranspose<group = 2, strides = [2, 2], pads = [2, 2, 1, 1]>(h, w2)
        r = Relu(b)
        y = ConvTranspose(r, w3)
    }""",
    "squeeze and excite": """(float[N,3,6,6] x) => (float[N,5] y)
    <float[8,3,3,3] w1, float[4,8,1,1] w2, float[8,4,1,1] w3, float[8,5] w4> {
        c = Conv(x, w1)
        h = Relu(c)
        p = GlobalAveragePool(h)
        d = Conv(p, w2)
        e = Relu(d)
        u = Conv(e, w3)
        g = Sigmoid(u)
        r = Mul(h, g)
        q = GlobalAveragePool(r)
        f = Flatten(q)
        y = MatMul(f, w4)
    }""",
    "two outputs, none with classes": """(float[N,3,6,6] x) => (float[N,4,6,6] y, float[N,2,6,6] z)
    <float[6,3,3,3] w1, float[4,6,1,1] w2, float[2,6,1,1] w3> {
        a = Conv<pads = [1, 1, 1, 1]>(x, w1)
        h = Relu(a)
        y = Conv(h, w2)
        z = Conv(h, w3)
    }""",
    "classes in front of the group": """(float[N,6] x) => (float[N,4] y, float[N,3,2] z)
    <float[6,9] w1, float[9,4] w2, float[9,8] w3, float[8,6] w4, int64[3] to = {0, 3, 2}> {
        a = MatMul(x, w1)
        h = Relu(a)
        y = MatMul(h, w2)
        b = MatMul(h, w3)
        r = Relu(b)
        c = MatMul(r, w4)
        z = Reshape(c, to)
    }""",
    "more inputs, some read late": """(float[N,6] late, float[N,6] x) => (float[N,4] y)
    <float[6,9] w1, float[9,8] w2, float[8,4] w3, float[6,8] w4> {
        a = MatMul(x, w1)
        h = Relu(a)
        b = MatMul(h, w2)
        m = MatMul(late, w4)
        s = Add(b, m)
        r = Relu(s)
        y = MatMul(r, w3)
    }""",
    "double precision": """(double[N,6] x) => (double[N,4] y) <double[6,9] w1, double[9,4] w2> {
        a = MatMul(x, w1)
        h = Relu(a)
        y = MatMul(h, w2)
    }""",
}
"""Networks to measure losses on: several kinds of outputs and of consumers, at one depth and at several."""
