"""Cases for the patterns that real models are made of: residual sums, attention, dense blocks."""

from __future__ import annotations

import numpy as np
from case_templates import dense
from onnx import ModelProto, TensorProto, helper, numpy_helper
from op_case import CASES, OpCase, case

case(
    "residual",
    "Add",
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,3,3] w1, float[6,8,3,3] w2, float[8,6,3,3] w3, float[4,8,1,1] w4> {
        a = Conv(x, w1)
        h = Relu(a)
        b = Conv<pads = [1, 1, 1, 1]>(h, w2)
        r = Relu(b)
        c = Conv<pads = [1, 1, 1, 1]>(r, w3)
        s = Add(h, c)
        y = Conv(s, w4)
    }""",
    units=8 + 6,
)
case(
    "batch-norm-depthwise-flatten",
    "BatchNormalization Conv Flatten",
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,3,3] w1, float[8] gain, float[8] b, float[8] m, float[8] var, float[8,1,3,3] w2, float[32,5] w3> {
        c = Conv(x, w1)
        n = BatchNormalization(c, gain, b, m, var)
        h = Relu(n)
        d = Conv<group = 8>(h, w2)
        f = Flatten(d)
        y = MatMul(f, w3)
    }""",
    units=8,
)
case(
    "channel-shuffle",
    "Reshape Transpose",
    """(float[N,3,4,4] x) => (float[] y)
    <float[8,3,1,1] w1, int64[5] in = {0, 2, 4, 4, 4}, int64[4] out = {0, -1, 4, 4}, float[6,8,1,1] w2> {
        c = Conv(x, w1)
        h = Relu(c)
        a = Reshape(h, in)
        t = Transpose<perm = [0, 2, 1, 3, 4]>(a)
        s = Reshape(t, out)
        y = Conv(s, w2)
    }""",
    units=4,
)
case(
    "channel-shuffle-between-groups",
    "Reshape Transpose Conv",
    """(float[N,3,4,4] x) => (float[] y)
    <float[8,3,1,1] w1, float[8,4,1,1] w2, int64[5] in = {0, 2, 4, 4, 4}, int64[4] out = {0, 8, 4, 4},
     float[8,4,1,1] w3, float[4,8,1,1] w4> {
        h = Conv(x, w1)
        g = Conv<group = 2>(h, w2)
        a = Reshape(g, in)
        t = Transpose<perm = [0, 2, 1, 3, 4]>(a)
        s = Reshape(t, out)
        k = Conv<group = 2>(s, w3)
        y = Conv(k, w4)
    }""",
    # Shuffled slots: (0 1)(2 3) of the merged axis are slots 0 and 1 twice, so slots 0 and 2, 1 and 3 go together.
    units=4 + 2 + 4,
)
case(
    "pixel-shuffle",
    "Reshape Transpose",
    """(float[N,3,4,4] x) => (float[] y)
    <float[12,3,1,1] w1, int64[6] in = {0, 3, 2, 2, 4, 4}, int64[4] out = {0, 3, 8, 8}, float[6,3,1,1] w2> {
        c = Conv(x, w1)
        h = Relu(c)
        a = Reshape(h, in)
        t = Transpose<perm = [0, 1, 4, 2, 5, 3]>(a)
        s = Reshape(t, out)
        y = Conv(s, w2)
    }""",
    # Each of the three channels behind takes four in front.
    units=3,
)
case(
    "squeeze-excite",
    "GlobalAveragePool Mul",
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,3,3] w1, float[4,8,1,1] w2, float[8,4,1,1] w3, float[5,8,1,1] w4> {
        c = Conv(x, w1)
        h = Relu(c)
        p = GlobalAveragePool(h)
        d = Conv(p, w2)
        e = Relu(d)
        u = Conv(e, w3)
        g = Sigmoid(u)
        r = Mul(h, g)
        y = Conv(r, w4)
    }""",
    units=8 + 4,
)
_HEADS = """
    q4 = Reshape(q, in)  k4 = Reshape(k, in)  v4 = Reshape(v, in)
    qt = Transpose<perm = [0, 2, 1, 3]>(q4)
    kt = Transpose<perm = [0, 2, 3, 1]>(k4)
    vt = Transpose<perm = [0, 2, 1, 3]>(v4)
    l = MatMul(qt, kt)
    z = Mul(l, scale)
    p = Softmax(z)
    o = MatMul(p, vt)
    ot = Transpose<perm = [0, 2, 1, 3]>(o)
    om = Reshape(ot, out)
"""
case(
    "attention",
    "MatMul Softmax Reshape",
    f"""(float[N,5,6] x) => (float[] y)
    <float[6,12] we, float[1,5,12] place, float[12,12] wq, float[12] bq, float[12,12] wk, float[12,12] wv,
     float[12] bv, int64[4] in = {{0, 5, 3, 4}}, int64[3] out = {{0, 5, 12}}, float scale = {{0.5}}, float[12,12] wo,
     float[12,4] wy> {{
        e = MatMul(x, we)
        h = Add(e, place)
        qm = MatMul(h, wq)
        q = Add(qm, bq)
        k = MatMul(h, wk)
        vm = MatMul(h, wv)
        v = Add(bv, vm)
        {_HEADS}
        m = MatMul(om, wo)
        s = Add(h, m)
        y = MatMul(s, wy)
    }}""",
    # 12 of the residual stream, 4 slots of q and k (together in all three heads), 4 slots of v.
    units=12 + 4 + 4,
)
case(
    "attention-packed",
    "Gather MatMul Reshape",
    """(float[N,5,6] x) => (float[] y)
    <float[6,36] w, int64[5] in = {0, 5, 3, 3, 4}, int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2},
     int64[3] out = {0, 5, 12}, float[12,4] wy> {
        m = MatMul(x, w)
        r = Reshape(m, in)
        t = Transpose<perm = [2, 0, 3, 1, 4]>(r)
        q = Gather(t, i0)
        k = Gather(t, i1)
        v = Gather(t, i2)
        kt = Transpose<perm = [0, 1, 3, 2]>(k)
        l = MatMul(q, kt)
        p = Softmax(l)
        o = MatMul(p, v)
        ot = Transpose<perm = [0, 2, 1, 3]>(o)
        om = Reshape(ot, out)
        y = MatMul(om, wy)
    }""",
    # Slot j of q, k and v in all heads.
    units=4,
)
case(
    "shared-weight",
    "MatMul",
    """(float[N,5] a, float[N,5] b) => (float[] y)
    <float[5,8] w, float[8] c, float[8,3] u, float[8,3] v> {
        ma = MatMul(a, w)
        mb = MatMul(b, w)
        sa = Add(ma, c)
        sb = Add(mb, c)
        ra = Relu(sa)
        rb = Tanh(sb)
        ya = MatMul(ra, u)
        yb = MatMul(rb, v)
        y = Add(ya, yb)
    }""",
    units=8,
)
case(
    "shared-weight-on-both-sides",
    "MatMul",
    """(float[N,5] x) => (float[] y) <float[5,8] w1, float[8,8] w, float[8,3] w2> {
        a = MatMul(x, w1)
        h = Relu(a)
        b = MatMul(h, w)
        r = Relu(b)
        c = MatMul(r, w)
        t = Tanh(c)
        y = MatMul(t, w2)
    }""",
    # A recurrent weight: rows and columns name the same channels.
    units=8,
)
case(
    "shared-constant-ties-layers",
    "Mul",
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,3,3] w1, float[8,8,3,3] w2, float[1,8,1,1] g, float[4,8,1,1] w3> {
        c = Conv(x, w1)
        a = Mul(c, g)
        h = Relu(a)
        d = Conv(h, w2)
        b = Mul(d, g)
        r = Relu(b)
        y = Conv(r, w3)
    }""",
    # One constant scales both layers.
    units=8,
)
case(
    "tied-embedding",
    "Gather Gemm",
    """(int64[N] ids) => (float[] y) <float[5,8] table, float[8,6] w1, float[6,8] w2> {
        e = Gather(table, ids)
        a = MatMul(e, w1)
        r = Relu(a)
        b = MatMul(r, w2)
        s = Add(e, b)
        y = Gemm<transB = 1>(s, table)
    }""",
    units=8 + 6,
)
case(
    "tokens-through-gemm",
    "Reshape Gemm",
    """(float[N,5,6] x) => (float[] y)
    <float[6,8] w1, int64[2] flat = {-1, 8}, float[7,8] w2, float[7] b2, int64[3] back = {-1, 5, 7}, float[7,4] w3> {
        e = MatMul(x, w1)
        h = Relu(e)
        f = Reshape(h, flat)
        g = Gemm<transB = 1>(f, w2, b2)
        r = Relu(g)
        u = Reshape(r, back)
        y = MatMul(u, w3)
    }""",
    units=8 + 7,
)
case(
    "dense-block",
    "Concat BatchNormalization",
    """(float[N,3,6,6] x) => (float[] y)
    <float[4,3,3,3] w1, float[4] gain1, float[4] b1, float[4] m1, float[4] var1, float[3,4,3,3] w2,
     float[7] gain2, float[7] b2, float[7] m2, float[7] var2, float[3,7,3,3] w3, float[4,10,1,1] w4> {
        a = Conv(x, w1)
        n1 = BatchNormalization(a, gain1, b1, m1, var1)
        r1 = Relu(n1)
        b = Conv<pads = [1, 1, 1, 1]>(r1, w2)
        c = Concat<axis = 1>(a, b)
        n2 = BatchNormalization(c, gain2, b2, m2, var2)
        r2 = Relu(n2)
        d = Conv<pads = [1, 1, 1, 1]>(r2, w3)
        e = Concat<axis = -3>(c, d)
        y = Conv(e, w4)
    }""",
    units=4 + 3 + 3,
)
case(
    "grouped-with-residual",
    "Conv Add",
    """(float[N,3,6,6] x) => (float[] y) <float[8,3,1,1] w1, float[8,4,3,3] w2, float[4,8,1,1] w3> {
        h = Conv(x, w1)
        g = Conv<group = 2, pads = [1, 1, 1, 1]>(h, w2)
        s = Add(h, g)
        y = Conv(s, w3)
    }""",
    units=4,
)
case(
    "grouped-bias-from-outside",
    "Conv",
    """(float[N,3,6,6] x, float[8] c) => (float[] y) <float[8,3,1,1] w1, float[8,4,3,3] w2, float[4,8,1,1] w3> {
        h = Conv(x, w1)
        g = Conv<group = 2>(h, w2, c)
        y = Conv(g, w3)
    }""",
    units=0,
    pinned="untracked bias",
)
case(
    "layer-norm-statistics-used",
    "LayerNormalization",
    """(float[N,4,5] x) => (float[] y, float[] z)
    <float[5,6] w1, float[4,7] w2, float[4] gain> {
        a = MatMul(x, w1)
        t = Transpose<perm = [0, 2, 1]>(a)
        n, mean = LayerNormalization(t, gain)
        y = MatMul(n, w2)
        z = Mul(mean, mean)
    }""",
    units=0,
    pinned="extra output",
)
case(
    "weight-read-by-an-unknown-operator",
    "Trilu",
    """(float[N,5] x) => (float[] y) <float[5,8] w1, float[8,6] w2, float[6,3] w3, float[3] g> {
        a = MatMul(x, w1)
        h = Relu(a)
        b = MatMul(h, w2)
        r = Relu(b)
        o = MatMul(r, w3)
        k = NonZero(w3)
        f = Cast<to = 1>(k)
        s = Trilu(h)
        u = ReduceMax<keepdims = 0>(f)
        v = ReduceMax<keepdims = 0>(s)
        p = Add(o, u)
        y = Add(p, v)
    }""",
    units=6,
    pinned="Trilu",
)
case(
    "weight-read-whole-elsewhere",
    "Einsum",
    """(float[N,5] x, float[3,6] z) => (float[] y) <float[5,8] w1, float[8,6] w2, float[6,3] w3> {
        a = MatMul(x, w1)
        h = Relu(a)
        b = MatMul(h, w2)
        r = Relu(b)
        o = MatMul(r, w3)
        q = Einsum<equation = "ij,ki->kj">(w3, z)
        m = ReduceMax<keepdims = 0>(q)
        y = Add(o, m)
    }""",
    units=8,
    pinned="Einsum",
)
case(
    "broadcast-single-channel",
    "Mul",
    """(float[N,3,6,6] x) => (float[] y) <float[8,3,3,3] w1, float[6,3,3,3] w2, float[1,6,1,1] w3, float[4,8,1,1] w4> {
        h = Conv(x, w1)
        c = Conv(x, w2)
        s = Conv(c, w3)
        g = Sigmoid(s)
        r = Mul(h, g)
        y = Conv(r, w4)
    }""",
    # The map of the gate has one channel for all eight.
    units=8 + 6,
    pinned="broadcasts its single channel",
)
dense(
    "unknown-operator",
    "Trilu",
    "a = Relu(h)  b = MatMul(a, w3)  r = Trilu(b)",
    8,
    "float[8,8] w3",
    "operator Trilu (node",
)
dense(
    "unknown-domain",
    "com.microsoft.Trilu",
    "a = Relu(h)  b = MatMul(a, w3)  r = com.microsoft.Trilu(b)",
    8,
    "float[8,8] w3",
    "operator com.microsoft::Trilu",
    domains={"com.microsoft": 1},
    out="N,3",
)
dense(
    "quantised-weight",
    "DequantizeLinear",
    "a = Relu(h)  q = DequantizeLinear<axis = 1>(codes, gain)  r = MatMul(a, q)",
    8 + 8,
    "int8[8,8] codes = {"
    + ", ".join(str((37 * i) % 255 - 127) for i in range(64))
    + "}, float[8] gain",
)
dense(
    "constant-nodes",
    "Add Mul",
    "s = Constant<value = float[8] {1, 2, 3, 4, 5, 6, 7, 8}>()  a = Add(h, s)"
    "  f = Constant<value_float = 0.5>()  r = Mul(a, f)",
)
case(
    "weight-behind-constant-nodes",
    "MatMul",
    """(float[N,5] x) => (float[] y) <float[8,5] w1, float[8,3] w2, float s = {2.0}> {
        t = Transpose<perm = [1, 0]>(w1)
        u = Mul(t, s)
        h = MatMul(x, u)
        i = Identity(w2)
        y = MatMul(h, i)
    }""",
    units=8,
)
case(
    "if-reads-an-outer-tensor",
    "If",
    """(float[N,5] x, bool flag) => (float[] y) <float[5,6] w1, float[6,8] w2, float[8,3] w3> {
        a = MatMul(x, w1)
        r = Relu(a)
        h = MatMul(r, w2)
        o = If(flag) <
            then_branch = yes () => (float[N,8] u) { u = Relu(h) },
            else_branch = no () => (float[N,8] v) { v = Neg(h) }
        >
        y = MatMul(o, w3)
    }""",
    units=14,
    pinned="graph output",
)
case(
    "if-reads-an-outer-weight",
    "If",
    """(float[N,5] x, bool flag) => (float[] y, float[] z) <float[5,6] w1, float[6,8] w2, float[8,3] w3> {
        a = MatMul(x, w1)
        r = Relu(a)
        h = MatMul(r, w2)
        t = Relu(h)
        y = MatMul(t, w3)
        z = If(flag) <
            then_branch = yes () => (float[8,3] u) { u = Relu(w3) },
            else_branch = no () => (float[8,3] v) { v = Neg(w3) }
        >
    }""",
    units=6,
    pinned="graph output",
)
case(
    "initialisers-as-inputs",
    "Conv",
    """(float[N,3,6,6] x) => (float[] y) <float[8,3,3,3] w1, float[8] b1, float[4,8,3,3] w2> {
        c = Conv(x, w1, b1)
        h = Relu(c)
        y = Conv(h, w2)
    }""",
    units=8,
    opset=8,
    ir=3,
    weights_as_inputs=True,
)
case(
    "channels-in-the-output",
    "MatMul",
    """(float[N,5] x) => (float[] y, float[] z) <float[5,8] w1, float[8,6] w2, float[6,3] w3> {
        a = MatMul(x, w1)
        h = Relu(a)
        z = MatMul(h, w2)
        r = Relu(z)
        y = MatMul(r, w3)
    }""",
    units=8,
    pinned="graph output 'z'",
)
case(
    "max-pool-with-indices",
    "MaxPool",
    """(float[N,3,6,6] x) => (float[] y, float[] z) <float[8,3,3,3] w1, float[6,8,1,1] w2, float[4,6,1,1] w3> {
        c = Conv(x, w1)
        h = Relu(c)
        d = Conv(h, w2)
        r, at = MaxPool<kernel_shape = [2, 2]>(d)
        y = Conv(r, w3)
        f = Cast<to = 1>(at)
        z = ReduceMax<axes = [1, 2, 3]>(f)
    }""",
    # An index counts through all channels, so they must all stay.
    units=8,
    pinned="extra output",
)
case(
    "half-precision",
    "Conv BatchNormalization Gemm",
    """(float16[N,3,6,6] x) => (float16[] y)
    <float16[8,3,3,3] w1, float16[8] gain, float16[8] b, float16[8] m, float16[8] var, float16[128,5] w2> {
        c = Conv(x, w1)
        n = BatchNormalization(c, gain, b, m, var)
        h = Relu(n)
        f = Flatten(h)
        y = Gemm(f, w2)
    }""",
    units=8,
    # Sums of 128 products, each rounded to 11 bits.
    tolerance=4e-3,
)
case(
    "double-precision",
    "Gemm",
    """(double[N,5] x) => (double[] y) <double[5,8] w1, double[8] b, double[8,3] w2> {
        g = Gemm(x, w1, b)
        h = Tanh(g)
        y = Gemm(h, w2)
    }""",
    units=8,
    tolerance=1e-13,
)


def _without_names() -> ModelProto:
    """Nodes built by the helper module, unnamed, with a bfloat-free dtype and an integer constant that two read."""
    rng = np.random.default_rng(3)
    shape = numpy_helper.from_array(np.asarray([0, 8, 4, 4], np.int64), "shape")
    weights = {
        "w1": rng.standard_normal((8, 3, 3, 3)).astype(np.float32) / 5,
        "w2": rng.standard_normal((8, 8, 1, 1)).astype(np.float32) / 3,
        "w3": rng.standard_normal((4, 8, 1, 1)).astype(np.float32) / 3,
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"]),
        helper.make_node("Reshape", ["a", "shape"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"]),
        helper.make_node("Reshape", ["c", "shape"], ["d"]),
        helper.make_node("Conv", ["d", "w3"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "unnamed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 4, 4])],
        [numpy_helper.from_array(v, k) for k, v in weights.items()] + [shape],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)


CASES.append(OpCase("shared-reshape-target", ("Reshape",), _without_names, units=16, opset=13))
