"""Cases for fused attention: heads go whole, with their queries, keys and values."""

from __future__ import annotations

from op_case import case

_MS = {"com.microsoft": 1}
_PACKED = """(float[2,4,5] x{inputs}) => (float[2,4,3] y) <float[5,6] w0, float[6,24] w, float[24] b, float[8,3] w2\
{constants}> {{
    e = MatMul(x, w0)
    g = Relu(e)
    {out} = com.microsoft.Attention<num_heads = 4{attrs}>({operands})
    y = MatMul(h, w2)
}}"""


def packed(
    name: str,
    operands: str = "g, w, b",
    attrs: str = "",
    inputs: str = "",
    constants: str = "",
    units: int = 6 + 4,
    pinned: str = "",
    out: str = "h",
) -> None:
    """Six free channels, com.microsoft.Attention with four heads of two, a product that reads them."""
    text = _PACKED.format(
        operands=operands, attrs=attrs, inputs=inputs, constants=constants, out=out
    )
    case(f"ms-attention{name}", "com.microsoft.Attention", text, units, pinned, domains=_MS)


packed("")  # without a bias ONNX Runtime 1.31 ends with a segmentation fault, cut or not
packed("-causal", attrs=", unidirectional = 1, scale = 0.3")
packed("-sizes", attrs=", qkv_hidden_sizes = [8, 8, 8]")
packed("-mask", "g, w, b, lens", inputs=", int32[2,4] lens")
packed("-bias-of-logits", "g, w, b, , , add", constants=", float[1,4,4,4] add")
packed("-shared-bias", "g, w, b, , , add", constants=", float[1,1,4,4] add")
packed(
    "-bias-from-outside",
    "g, w, b, , , add",
    inputs=", float[1,4,4,4] add",
    units=0,
    pinned="own values for every head",
)
packed(
    "-past",
    "g, w, b, , past",
    inputs=", float[2,2,4,3,2] past",
    units=0,
    pinned="a past state",
    out="h, present",
)
case(
    "ms-attention-wide-values",
    "com.microsoft.Attention",
    """(float[N,4,5] x) => (float[N,4,3] y) <float[5,6] w0, float[6,28] w, float[28] b, float[12,3] w2> {
        e = MatMul(x, w0)
        h = com.microsoft.Attention<num_heads = 4, qkv_hidden_sizes = [8, 8, 12]>(e, w, b)
        y = MatMul(h, w2)
    }""",
    units=0,
    pinned="another width",
    domains=_MS,
)

_SEPARATE = """(float[N,4,5] x, float[N,6,5] z{inputs}) => ({out}) <float[5,8] wq, float[5,{k}] wk, float[5,{v}] wv,
float[{o},3] wo{constants}> {{
    q = MatMul(x, wq)
    k = MatMul(z, wk)
    v = MatMul(z, wv)
    {call}
    y = MatMul(h, wo)
}}"""


def separate(
    name: str,
    op: str,
    call: str,
    units: int,
    k: int = 8,
    v: int = 8,
    o: int = 8,
    inputs: str = "",
    constants: str = "",
    pinned: str = "",
    out: str = "float[N,4,3] y",
) -> None:
    """Queries of eight channels from one sequence, keys and values from another."""
    more = ", " + constants if constants else ""
    text = _SEPARATE.format(k=k, v=v, o=o, inputs=inputs, constants=more, call=call, out=out)
    own = op.startswith("com")
    case(name, op, text, units, pinned, 17 if own else 23, 8 if own else 11, _MS if own else None)


_MHA = "com.microsoft.MultiHeadAttention"
separate("multi-head", _MHA, f"h = {_MHA}<num_heads = 4>(q, k, v)", 4)
separate(
    "multi-head-bias",
    _MHA,
    f"h = {_MHA}<num_heads = 2, scale = 0.2>(q, k, v, b)",
    2,
    constants="float[24] b",
)
separate(
    "multi-head-bias-of-logits",
    _MHA,
    f"h = {_MHA}<num_heads = 4>(q, k, v, , , add)",
    4,
    constants="float[1,4,4,6] add",
)
separate(
    "multi-head-wide-values",
    _MHA,
    f"h = {_MHA}<num_heads = 4>(q, k, v)",
    0,
    v=12,
    o=12,
    pinned="another width",
)
case(
    "multi-head-follows-logit-bias",
    _MHA,
    f"""(float[N,4,5] x) => (float[N,4,3] y) <float[5,8] wq, float[5,8] wk, float[5,8] wv, float[8,3] wo,
    float[5,4] wb, int64[1] last = {{3}}, float[1,4] ones> {{
        q = MatMul(x, wq)
        k = MatMul(x, wk)
        v = MatMul(x, wv)
        s = MatMul(x, wb)
        t = Transpose<perm = [0, 2, 1]>(s)
        u = Unsqueeze(t, last)
        add = MatMul(u, ones)
        h = {_MHA}<num_heads = 4>(q, k, v, , , add)
        y = MatMul(h, wo)
    }}""",
    units=4,
    domains=_MS,
)
_GQA = "com.microsoft.GroupQueryAttention"
case(
    "group-query",
    _GQA,
    f"""(float[2,4,5] x) => (float[2,4,3] y) <float[5,32] wq, float[5,16] wk, float[5,16] wv, float[32,3] wo,
    int32[2] lens = {{3, 3}}, int32 total = {{4}}> {{
        q = MatMul(x, wq)
        k = MatMul(x, wk)
        v = MatMul(x, wv)
        h, pk, pv = {_GQA}<num_heads = 4, kv_num_heads = 2>(q, k, v, , , lens, total)
        y = MatMul(h, wo)
    }}""",
    units=2,
    domains=_MS,
)
case(
    "group-query-rotary",
    _GQA,
    f"""(float[2,4,5] x) => (float[2,4,3] y) <float[5,64] wq, float[5,32] wk, float[5,32] wv, float[64,3] wo,
    int32[2] lens = {{3, 3}}, int32 total = {{4}}, float[4,8] c, float[4,8] s> {{
        q = MatMul(x, wq)
        k = MatMul(x, wk)
        v = MatMul(x, wv)
        h, pk, pv = {_GQA}<num_heads = 4, kv_num_heads = 2, do_rotary = 1>(q, k, v, , , lens, total, c, s)
        y = MatMul(h, wo)
    }}""",
    units=2,
    domains=_MS,
)
case(
    "group-query-sink",
    _GQA,
    f"""(float[2,4,5] x) => (float[2,4,3] y) <float[5,64] wq, float[5,32] wk, float[5,32] wv, float[64,3] wo,
    int32[2] lens = {{3, 3}}, int32 total = {{4}}, float[4] sink = {{1, -1, 0.5, 2}}> {{
        q = MatMul(x, wq)
        k = MatMul(x, wk)
        v = MatMul(x, wv)
        h, pk, pv = {_GQA}<num_heads = 4, kv_num_heads = 2>(q, k, v, , , lens, total, , , , , sink)
        y = MatMul(h, wo)
    }}""",
    units=2,
    domains=_MS,
)
_STD = "Attention"
separate("standard-attention", _STD, f"h = {_STD}<q_num_heads = 4, kv_num_heads = 4>(q, k, v)", 4)
separate(
    "standard-attention-groups",
    _STD,
    f"h = {_STD}<q_num_heads = 4, kv_num_heads = 2, scale = 0.4>(q, k, v)",
    2,
    4,
    4,
)
separate(
    "standard-attention-wide-values",
    _STD,
    f"h = {_STD}<q_num_heads = 4, kv_num_heads = 4>(q, k, v)",
    4,
    v=12,
    o=12,
)
separate(
    "standard-attention-mask",
    _STD,
    f"h = {_STD}<q_num_heads = 4, kv_num_heads = 4>(q, k, v, m)",
    4,
    constants="float[4,6] m",
)
separate(
    "standard-attention-mask-by-head",
    _STD,
    f"h = {_STD}<q_num_heads = 4, kv_num_heads = 2>(q, k, v, m)",
    2,
    4,
    4,
    constants="float[1,4,4,6] m",
)
separate(
    "standard-attention-states-given-out",
    _STD,
    f"h, pk = {_STD}<q_num_heads = 4, kv_num_heads = 4>(q, k, v)",
    0,
    pinned="'pk'",
    out="float[N,4,3] y, float[N,4,6,2] pk",
)
_SPLIT = """(float[N,4,5] x) => (float[N,4,3] y) <float[5,8] wq, float[5,8] wk, float[5,12] wv, float[12,3] wo,
int64[4] a = {0, 0, 4, 2}, int64[4] b = {0, 0, 4, 3}, int64[3] c = {0, 0, 12}> {
    q = MatMul(x, wq)
    k = MatMul(x, wk)
    v = MatMul(x, wv)
    q4 = Reshape(q, a)
    k4 = Reshape(k, a)
    v4 = Reshape(v, b)
    qt = Transpose<perm = [0, 2, 1, 3]>(q4)
    kt = Transpose<perm = [0, 2, 1, 3]>(k4)
    vt = Transpose<perm = [0, 2, 1, 3]>(v4)
    h = Attention<is_causal = 1>(qt, kt, vt)
    ht = Transpose<perm = [0, 2, 1, 3]>(h)
    r = Reshape(ht, c)
    y = MatMul(r, wo)
}"""
case("standard-attention-four-axes", "Attention", _SPLIT, units=4, opset=23, ir=11)


# ------------------------------------------------------------------------------------------------- rotated positions

_ANGLES = "float[4,2] c = {1, 1, 0.5, 0.9, -0.4, 0.8, -0.9, 0.7}, float[4,2] s = {0, 0, 0.8, 0.1, 0.9, 0.2, 0.1, 0.3}"


def rotary(
    name: str,
    ops: str,
    body: str,
    *,
    constants: str = "",
    units: int = 4,
    pinned: str = "",
    domains: dict[str, int] | None = None,
) -> None:
    """Queries and keys of four heads of four, rotated by their position in front of a fused attention."""
    text = f"""(float[N,4,5] x) => (float[N,4,3] y) <float[5,16] wq, float[5,16] wk, float[5,16] wv, float[16,3] wo,
    {_ANGLES}, int64[1,4] at = {{0, 1, 2, 3}}{constants}> {{
        batch = Shape<start = 0, end = 1>(x)
        four = Constant<value_ints = [4]>()
        to = Concat<axis = 0>(batch, four)
        p = Expand(at, to)
        q = MatMul(x, wq)
        k = MatMul(x, wk)
        v = MatMul(x, wv)
        {body}
        y = MatMul(h, wo)
    }}"""
    newer = {} if domains else {"opset": 23, "ir": 11}
    case(name, ops, text, units=units, pinned=pinned, domains=domains, **newer)


_ROTARY = "RotaryEmbedding"
_PLAIN = "h = Attention<q_num_heads = 4, kv_num_heads = 4>(qr, kr, v)"
rotary(
    "rotary-standard",
    _ROTARY,
    f"qr = {_ROTARY}<num_heads = 4>(q, c, s, p) kr = {_ROTARY}<num_heads = 4, interleaved = 1>(k, c, s, p) {_PLAIN}",
)
_SPLIT_HEADS = """q4 = Reshape(q, a)
        k4 = Reshape(k, a)
        v4 = Reshape(v, a)
        qt = Transpose<perm = [0, 2, 1, 3]>(q4)
        kt = Transpose<perm = [0, 2, 1, 3]>(k4)
        vt = Transpose<perm = [0, 2, 1, 3]>(v4)"""
rotary(
    "rotary-four-axes",
    _ROTARY,
    f"""{_SPLIT_HEADS}
        qr = {_ROTARY}(qt, c, s, p)
        kr = {_ROTARY}<rotary_embedding_dim = 4, num_heads = 4>(kt, c, s, p)
        ht = Attention(qr, kr, vt)
        hh = Transpose<perm = [0, 2, 1, 3]>(ht)
        h = Reshape(hh, b)""",
    constants=", int64[4] a = {0, 0, 4, 4}, int64[3] b = {0, 0, 16}",
)
_MS_ROTARY = "com.microsoft.RotaryEmbedding"
rotary(
    "ms-rotary",
    _MS_ROTARY,
    f"""qr = {_MS_ROTARY}(q, p, c, s)
        kr = {_MS_ROTARY}<interleaved = 1>(k, p, c, s)
        h = {_MHA}<num_heads = 4>(qr, kr, v)""",
    domains=_MS,
)
rotary(
    "ms-rotary-part",
    _MS_ROTARY,
    f"""qr = {_MS_ROTARY}<num_heads = 2, rotary_embedding_dim = 4>(q, p, c, s)
        kr = {_MS_ROTARY}<num_heads = 2, rotary_embedding_dim = 4>(k, p, c, s)
        h = {_MHA}<num_heads = 2>(qr, kr, v)""",
    units=2,
    domains=_MS,
)
