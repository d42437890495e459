"""Cases for shapes that exporters compute, and for the forms in which they write normalisation and attention out."""

from __future__ import annotations

from op_case import case

_VIEW = """(float[N,3,6,6] x) => (float[] y)
<float[8,3,3,3] w1, float[4,8,1,1] w3, int64[1] start = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}},
 int64[1] four = {{4}}, int64 zero = {{0}}{constants}> {{
    c = Conv(x, w1)
    h = Relu(c)
    s = Shape(h)
    {body}
    y = Conv(r, w3)
}}"""


def view(
    name: str,
    ops: str,
    body: str,
    units: int,
    constants: str = "",
    pinned: str | tuple[str, ...] = (),
    opset: int = 17,
) -> None:
    """Eight free channels ``h`` and their shape ``s``, which the operator takes to ``r``."""
    text = _VIEW.format(constants=", " + constants if constants else "", body=body)
    case(name, ops, text, units, pinned, opset)


view(
    "reshape-to-a-joined-shape",
    "Reshape",
    """n = Gather(s, start)  p = Slice(s, one, two)  q = Slice(s, two, four)
    t = Concat<axis = 0>(n, rest)  f = Reshape(h, t)
    u = Concat<axis = 0>(n, p, q)  r = Reshape(f, u)""",
    8,
    "int64[2] rest = {8, -1}",
)
view(
    "reshape-through-a-scalar",
    "Reshape",
    """n = Gather(s, zero)  m = Mul(n, eight)  u = Unsqueeze(m, start)  t = Concat<axis = 0>(u, rest)  f = Reshape(h, t)
    k = Div(m, eight)  v = Unsqueeze(k, start)  b = Concat<axis = 0>(v, back)  r = Reshape(f, b)""",
    8,
    "int64 eight = {8}, int64[1] rest = {-1}, int64[3] back = {8, 4, 4}",
)
view(
    "expand-with-kept-lengths",
    "Expand",
    """n = Gather(s, start)  t = Concat<axis = 0>(n, rest)  e = Equal(t, minus)  u = Where(e, ones, t)
    v = Expand(b, u)  r = Concat<axis = 2>(v, h)""",
    8,
    "float[1,8,1,4] b, int64[3] rest = {8, -1, -1}, int64[4] minus = {-1, -1, -1, -1}, int64[4] ones = {1, 1, 1, 1}",
)
view(
    "expand-that-broadcasts-anyway",
    "ReduceL2",
    "m = ReduceL2<axes = [1], keepdims = 1>(h)  a = Add(m, eps)  e = Expand(a, s)  r = Div(h, e)",
    8,
    "float eps = {0.1}",
)
view(
    "resize-to-the-size-of-another",
    "Resize",
    """o = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(h)  z = Shape(o)  a = Slice(z, start, two)
    b = Slice(s, two, four)  t = Concat<axis = 0>(a, b)  r = Resize<mode = "nearest">(o, , , t)""",
    8,
)
view(
    "resize-to-the-size-of-another-opset-19",
    "Resize",
    """o = MaxPool<kernel_shape = [3, 3]>(h)  z = Shape(o)  a = Slice(z, start, two)
    b = Slice(s, two, four)  t = Concat<axis = 0>(a, b)  r = Resize<mode = "linear">(o, , , t)""",
    8,
    opset=19,
)
case(
    "resize-to-an-open-size",
    "Resize",
    """(float[1,3,H,W] x) => (float[] y)
    <float[8,3,3,3] w1, float[4,8,1,1] w3, int64[1] start = {0}, int64[1] two = {2}, int64[1] four = {4}> {
        c = Conv(x, w1)
        h = Relu(c)
        s = Shape(x)
        z = Shape(h)
        a = Slice(z, start, two)
        b = Slice(s, two, four)
        t = Concat<axis = 0>(a, b)
        r = Resize<mode = "nearest">(h, , , t)
        y = Conv(r, w3)
    }""",
    units=8,
    opset=19,
    bindings={"H": 6, "W": 5},
)
_GROUPS = "int64[3] in = {0, 2, -1}, float[2] ones = {1.0, 1.0}, float[2] zeros = {0.0, 0.0}, float[8,1,1] gain"
view(
    "group-norm-through-instance-norm",
    "InstanceNormalization Reshape",
    "g = Reshape(h, in)  i = InstanceNormalization(g, ones, zeros)  k = Reshape(i, s)  r = Mul(k, gain)",
    # Whole groups of four channels go.
    2,
    _GROUPS,
)
view(
    "layer-norm-written-out",
    "ReduceMean",
    """m = ReduceMean<axes = [1]>(h)  d = Sub(h, m)  q = Mul(d, d)  v = ReduceMean<axes = [1]>(q)
    a = Add(v, eps)  e = Sqrt(a)  n = Div(d, e)  r = Mul(n, gain)""",
    8,
    "float[8,1,1] gain, float eps = {0.1}",
)
case(
    "grouped-query-attention",
    "Expand Reshape",
    """(float[N,4,5] x) => (float[] y)
    <float[5,8] wq, float[5,4] wk, float[5,4] wv, float[8,3] wo, int64[4] queries = {0, 4, 4, 2},
     int64[4] keys = {0, 4, 2, 2}, int64[1] at = {2}, int64[1] start = {0}, int64[4] rest = {2, 2, 4, 2},
     int64[3] heads = {4, 4, 2}, int64[2] out = {4, 8}> {
        q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
        q4 = Reshape(q, queries)  k4 = Reshape(k, keys)  v4 = Reshape(v, keys)
        qt = Transpose<perm = [0, 2, 1, 3]>(q4)
        kt = Transpose<perm = [0, 2, 1, 3]>(k4)
        vt = Transpose<perm = [0, 2, 1, 3]>(v4)
        s = Shape(x)  n = Gather(s, start)
        ku = Unsqueeze(kt, at)  te = Concat<axis = 0>(n, rest)  ke = Expand(ku, te)
        th = Concat<axis = 0>(n, heads)  kr = Reshape(ke, th)
        vu = Unsqueeze(vt, at)  ve = Expand(vu, te)  vr = Reshape(ve, th)
        kx = Transpose<perm = [0, 1, 3, 2]>(kr)
        l = MatMul(qt, kx)
        p = Softmax(l)
        o = MatMul(p, vr)
        ot = Transpose<perm = [0, 2, 1, 3]>(o)
        to = Concat<axis = 0>(n, out)  om = Reshape(ot, to)
        y = MatMul(om, wo)
    }""",
    # Two slots of a head that queries and keys share, two of values.
    units=2 + 2,
)
for _opset in (10, 12):
    # ONNX's inference follows no values through operators this old: what is followed here is put in.
    view(
        f"expand-with-kept-lengths-opset-{_opset}",
        "Expand",
        """n = Gather(s, start)  t = Concat<axis = 0>(n, rest)  v = Expand(b, t)  r = Concat<axis = 2>(v, h)""",
        8,
        "float[1,8,1,4] b, int64[3] rest = {8, 1, 4}",
        opset=_opset,
    )
case(
    "upsample-by-a-computed-scale",
    "Upsample",
    """(float[N,3,6,6] x) => (float[] y) <float[8,3,3,3] w1, float[4,8,1,1] w3, float[2] ones = {1.0, 1.0}> {
        c = Conv<pads = [1, 1, 1, 1]>(x, w1)
        o = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(c)
        s = Shape(x)  a = Slice<axes = [0], starts = [2], ends = [4]>(s)  e = Cast<to = 1>(a)
        z = Shape(o)  b = Slice<axes = [0], starts = [2], ends = [4]>(z)  f = Cast<to = 1>(b)
        d = Div(e, f)  t = Concat<axis = 0>(ones, d)
        r = Upsample<mode = "nearest">(o, t)
        y = Conv(r, w3)
    }""",
    units=8,
    opset=9,
)
case(
    "slice-of-the-shape-of-something-unknown",
    "Slice",
    """(float[N,5] x, int64[4] ones) => (float[] y, int64[1] z)
    <float[5,8] w1, float[8,3] w2, int64[1] start = {0}, int64[1] one = {1}> {
        a = MatMul(x, w1)
        h = Relu(a)
        r = Expand(x, ones)
        s = Shape(r)
        z = Slice(s, start, one)
        y = MatMul(h, w2)
    }""",
    units=8,
)
case(
    "weights-behind-an-unknown-operator",
    "com.microsoft.CDist",
    """(float[N,5] x) => (float[N,3] y) <float[8,5] w1, float[8,3] w2> {
        a = com.microsoft.CDist<metric = "euclidean">(x, w1)
        h = Relu(a)
        y = MatMul(h, w2)
    }""",
    units=0,
    # Of both weights it is said why they stay.
    pinned=(
        "operator com.microsoft::CDist",
        "MatMul 'MatMul_2' has an output of unknown shape",
    ),
    domains={"com.microsoft": 1},
)

_MERGED = """(float[N,5,6] x) => (float[N,5,4] y)
<float[6,12] w, float[12,12] wq, float[12,12] wk, float[12,12] wv, float[12,4] wo, int64[1] zero = {0},
 int64[1] heads = {4}, int64[1] open = {-1}, int64[1] size = {3}, int64[1] width = {12}> {
    h = MatMul(x, w)
    q = MatMul(h, wq)
    k = MatMul(h, wk)
    v = MatMul(h, wv)
    s = Shape(h)
    n = Gather(s, zero)
    divided = Concat<axis = 0>(n, open, heads, size)
    q4 = Reshape(q, divided)
    k4 = Reshape(k, divided)
    v4 = Reshape(v, divided)
    qt = Transpose<perm = [0, 2, 1, 3]>(q4)
    kt = Transpose<perm = [0, 2, 1, 3]>(k4)
    vt = Transpose<perm = [0, 2, 1, 3]>(v4)
    b = Mul(n, heads)
    merged = Concat<axis = 0>(b, open, size)
    qm = Reshape(qt, merged)
    km = Reshape(kt, merged)
    vm = Reshape(vt, merged)
    kl = Transpose<perm = [0, 2, 1]>(km)
    l = MatMul(qm, kl)
    p = Softmax(l)
    o = MatMul(p, vm)
    apart = Concat<axis = 0>(n, heads, open, size)
    o4 = Reshape(o, apart)
    ot = Transpose<perm = [0, 2, 1, 3]>(o4)
    joined = Concat<axis = 0>(n, open, width)
    c = Reshape(ot, joined)
    y = MatMul(c, wo)
}"""
case("attention-with-heads-merged-into-the-batch", "Reshape", _MERGED, units=12 + 3 + 3)
# Two lengths of one target are open, the batch and the one that is left: the others can still be changed.
case(
    "attention-with-heads-merged-into-the-batch-of-any-length",
    "Reshape",
    _MERGED.replace("N,5,", "N,T,"),
    units=12 + 3 + 3,
)
case(
    "group-norm-back-to-an-open-shape",
    "InstanceNormalization Reshape",
    """(float[N,3,H,W] x) => (float[N,4,H,W] y)
    <float[8,3,1,1] w1, float[4,8,1,1] w3, int64[3] in = {0, 2, -1}, float[2] ones = {1.0, 1.0},
     float[2] none = {0.0, 0.0}> {
        h = Conv(x, w1)
        g = Reshape(h, in)
        i = InstanceNormalization(g, ones, none)
        s = Shape(h)
        r = Reshape(i, s)
        y = Conv(r, w3)
    }""",
    units=2,
    bindings={"H": 6, "W": 5},
)
case(
    "resize-to-listed-sizes",
    "Resize",
    """(float[N,3,H,W] x, float[N,1,U,V] as) => (float[N,4,U,V] y)
    <float[8,3,1,1] w1, float[4,8,1,1] w3, int64[1] zero = {0}, int64[2] space = {2, 3}, int64[1] width = {8}> {
        h = Conv(x, w1)
        s = Shape(x)
        n = Gather(s, zero)
        z = Shape(as)
        u = Gather(z, space)
        t = Concat<axis = 0>(n, width, u)
        r = Resize<mode = "nearest">(h, , , t)
        y = Conv(r, w3)
    }""",
    units=8,
    bindings={"H": 6, "W": 5, "U": 7, "V": 9},
)
