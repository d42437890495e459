"""Cases for Einsum: weights of any rank, two activations, diagonals, what is summed away, and what stays."""

from __future__ import annotations

from op_case import case

for _name, _first, _second, _w1, _w2 in (
    ("plain", "bnd,dk->bnk", "bnk,ko->bno", "5,8", "8,3"),
    ("transposed-weight", "bnd,kd->bnk", "bnk,ok->bno", "8,5", "3,8"),
    ("ellipsis", "...d,dk->...k", "...k,ko->...o", "5,8", "8,3"),
    ("implicit", "bnd,dz", "bnk,ko", "5,8", "8,3"),
    ("weight-first", "dk,bnd->bnk", "bnk,ko->bno", "5,8", "8,3"),
    ("moved", "bnd,dk->kbn", "kbn,ko->bno", "5,8", "8,3"),
):
    _left = "w1, x" if _name == "weight-first" else "x, w1"
    case(
        f"einsum-{_name}",
        "Einsum",
        f"""(float[N,4,5] x) => (float[N,4,3] y) <float[{_w1}] w1, float[{_w2}] w2> {{
            e = Einsum<equation = "{_first}">({_left})
            h = Relu(e)
            y = Einsum<equation = "{_second}">(h, w2)
        }}""",
        units=8,
    )
case(
    "einsum-attention",
    "Einsum",
    """(float[N,4,5] x) => (float[N,4,3] y)
    <float[5,3,8] wq, float[5,3,8] wk, float[5,3,7] wv, float[3,8] bq, float[3,7,3] wo> {
        q = Einsum<equation = "bnd,dhk->bnhk">(x, wq)
        p = Add(q, bq)
        k = Einsum<equation = "bnd,dhk->bnhk">(x, wk)
        v = Einsum<equation = "bnd,dhv->bnhv">(x, wv)
        l = Einsum<equation = "bqhd,bkhd->bhqk">(p, k)
        s = Softmax(l)
        a = Einsum<equation = "bhqk,bkhv->bqhv">(s, v)
        y = Einsum<equation = "bqhv,hvo->bqo">(a, wo)
    }""",
    # Heads, slots of queries and keys, slots of values.
    units=3 + 8 + 7,
)
case(
    "einsum-three-operands",
    "Einsum",
    """(float[N,4,5] x) => (float[N,3] y) <float[5,8] w1, float[5,8] w2, float[8,3] w3> {
        e = MatMul(x, w1)
        f = MatMul(x, w2)
        y = Einsum<equation = "bnk,bnk,ko->bo">(e, f, w3)
    }""",
    units=8,
)
case(
    "einsum-sum-and-diagonal",
    "Einsum",
    """(float[N,4,5] x) => (float[N] y, float[8,8] z) <float[5,8] w1, float[5,8] w2> {
        e = MatMul(x, w1)
        y = Einsum<equation = "bnk->b">(e)
        f = MatMul(x, w2)
        z = Einsum<equation = "bnk,bnl->kl">(f, f)
    }""",
    units=8,
    pinned="graph output 'z'",
)
case(
    "einsum-broadcast",
    "Einsum",
    """(float[N,4,5] x) => (float[N,4,3] y) <float[5,8] w1, float[1,3] w2> {
        e = MatMul(x, w1)
        y = Einsum<equation = "bnk,ko->bno">(e, w2)
    }""",
    units=0,
    pinned="broadcasts a single channel",
)
