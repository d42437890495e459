"""Networks with branches that can do without all their channels."""

from __future__ import annotations

MOBILE = """(float[N,3,6,6] x) => (float[N,4] y)
<float[8,3,3,3] w0, float[8] b0, float[16,8,1,1] we, float[16] be, float[16,1,3,3] wd,
 float[16] bd, float[4,16,1,1] s1, float[4] sb1,
 float[16,4,1,1] s2, float[16] sb2, float[8,16,1,1] wp, float[8] bp, float[8] gain,
 float[8] beta, float[8] mean, float[8] var,
 float[16,8,1,1] we2, float[16] be2, float[8,16,1,1] wp2, float[8,4] w4, float[4] b4> {
    h = Conv<pads = [1, 1, 1, 1]>(x, w0, b0)
    e = Conv(h, we, be)
    er = Relu(e)
    d = Conv<group = 16, pads = [1, 1, 1, 1]>(er, wd, bd)
    dr = HardSwish(d)
    g = GlobalAveragePool(dr)
    q = Conv(g, s1, sb1)
    qr = Relu(q)
    u = Conv(qr, s2, sb2)
    us = Sigmoid(u)
    m = Mul(dr, us)
    p = Conv(m, wp, bp)
    n = BatchNormalization(p, gain, beta, mean, var)
    s = Add(h, n)
    e2 = Conv(s, we2, be2)
    er2 = Relu(e2)
    p2 = Conv(er2, wp2)
    z = Add(p2, s)
    a = GlobalAveragePool(z)
    f = Flatten(a)
    y = Gemm(f, w4, b4)
}"""
"""An inverted bottleneck with squeeze-and-excitation and normalisation, and one without."""

INCEPTION = """(float[N,3,6,6] x) => (float[N,4] y)
<float[6,3,1,1] w0, float[4,6,1,1] a1, float[4,6,1,1] b1, float[5,4,3,3] b2, float[5] bb,
 float[3,6,1,1] c1, float[6,12,1,1] wj, float[6] bj, float[6,4] w4> {
    h0 = Conv(x, w0)
    h = Relu(h0)
    a = Conv(h, a1)
    ar = Relu(a)
    b = Conv(h, b1)
    br = Relu(b)
    bc = Conv<pads = [1, 1, 1, 1]>(br, b2, bb)
    bcr = Relu(bc)
    mp = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(h)
    c = Conv(mp, c1)
    j = Concat<axis = 1>(ar, bcr, c)
    k = Conv(j, wj, bj)
    s = Add(k, h)
    g = GlobalAveragePool(s)
    f = Flatten(g)
    y = MatMul(f, w4)
}"""
"""Three parallel branches that are joined, in a residual block."""

TRANSFORMER = """(float[N,5,6] x) => (float[N,5,4] y)
<float[6,12] we, float[1,5,12] pos, float[12] gain1, float[12] beta1, float[12,12] wq,
 float[12] bq, float[12,12] wk, float[12,12] wv, float[12] bv, int64[4] in = {0, 5, 3, 4},
 int64[3] out = {0, 5, 12}, float s = {2.0}, float[12,12] wo, float[12] bo, float[12] gain2,
 float[12] beta2, float[12,24] w1, float[24] b1, float[24,12] w2, float[12] b2,
 float[12,4] wy> {
    h0 = MatMul(x, we)
    h = Add(h0, pos)
    n = LayerNormalization(h, gain1, beta1)
    q0 = MatMul(n, wq)
    q = Add(q0, bq)
    k = MatMul(n, wk)
    v0 = MatMul(n, wv)
    v = Add(v0, bv)
    q4 = Reshape(q, in)
    k4 = Reshape(k, in)
    v4 = Reshape(v, in)
    qt = Transpose<perm = [0, 2, 1, 3]>(q4)
    kt = Transpose<perm = [0, 2, 3, 1]>(k4)
    vt = Transpose<perm = [0, 2, 1, 3]>(v4)
    l0 = MatMul(qt, kt)
    l = Div(l0, s)
    p = Softmax(l)
    o = MatMul(p, vt)
    ot = Transpose<perm = [0, 2, 1, 3]>(o)
    om = Reshape(ot, out)
    m0 = MatMul(om, wo)
    m = Add(m0, bo)
    t = Add(h, m)
    n2 = LayerNormalization(t, gain2, beta2)
    u0 = MatMul(n2, w1)
    u1 = Add(u0, b1)
    u = Gelu(u1)
    d0 = MatMul(u, w2)
    d = Add(d0, b2)
    z = Add(t, d)
    y = MatMul(z, wy)
}"""
"""A transformer block."""

NETS = {"mobile": MOBILE, "inception": INCEPTION, "transformer": TRANSFORMER}
MAY_BE_EMPTIED = {
    "mobile": {"we": {"we", "s1"}, "s1": {"s1"}, "we2": {"we2"}},
    "inception": {"a1": {"a1"}, "c1": {"c1"}, "b2": {"b1", "b2"}},
    "transformer": {"wv": {"wq", "wv"}, "w1": {"w1"}},
}
"""Names of the groups to empty together, by the group that may be emptied."""
