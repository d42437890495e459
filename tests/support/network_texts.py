"""Small networks as ONNX text that several test files use."""

from __future__ import annotations

RESIDUAL_CNN = """(float[batch, 3, 8, 8] image) => (float[batch, 5] scores)
<float[12, 3, 3, 3] w1, float[12] b1, float[16, 12, 3, 3] w2, float[16] b2, float[12, 16, 3, 3] w3,
 float[8, 12, 1, 1] w5, float[5, 8] w4, float[5] b4> {
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
