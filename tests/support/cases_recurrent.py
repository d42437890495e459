"""Cases for the recurrent operators: gates, directions, states to start from, and what exporters put around them."""

from __future__ import annotations

from op_case import case

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_SEQUENCE = """(float[6,{batch},5] x{inputs}) => (float[] y) <float[5,7] w0, float[7] b0, float[{d},{rows},7] w, \
float[{d},{rows},8] r, float[{d},{both}] b, {to}float[{wide},3] w2{constants}> {{
    e = MatMul(x, w0)
    f = Add(e, b0)
    g = Relu(f)
    {before}
    {call}
    {after}
    y = MatMul(m, w2)
}}"""


def recurrent(
    name: str,
    op: str,
    attrs: str = "",
    operands: str = "g, w, r, b",
    outputs: str = "h",
    directions: int = 1,
    after: str = "",
    wide: int = 0,
    inputs: str = "",
    constants: str = "",
    before: str = "",
    units: int = 7 + 8,
    pinned: str = "",
    opset: int = 17,
    tolerance: float = 1e-5,
    batch: str = "N",
) -> None:
    """Seven free channels ``g``, a recurrent node of eight hidden units over them, a product that reads them all."""
    rows = 8 * _GATES[op]
    fields = f'hidden_size = 8, direction = "{"bidirectional" if directions == 2 else "forward"}"'
    if "direction" in attrs:
        fields = "hidden_size = 8"
    to = f"int64[3] to = {{0, 0, {8 * directions}}}, " if not after else ""
    merge = "t = Transpose<perm = [0, 2, 1, 3]>(h)  m = Reshape(t, to)"
    text = _SEQUENCE.format(
        batch=batch,
        d=directions,
        rows=rows,
        both=2 * rows,
        to=to,
        wide=wide or 8 * directions,
        inputs=inputs,
        constants=", " + constants if constants else "",
        before=before,
        after=after or merge,
        call=f"{outputs} = {op}<{', '.join(p for p in (fields, attrs) if p)}>({operands})",
    )
    case(name, op, text, units, pinned, opset, tolerance=tolerance)


for _op in _GATES:
    recurrent(f"{_op.lower()}-forward", _op)
    recurrent(f"{_op.lower()}-reverse", _op, 'direction = "reverse"')
    # Slot j of both directions goes together.
    recurrent(f"{_op.lower()}-bidirectional", _op, directions=2)
    recurrent(f"{_op.lower()}-old", _op, opset=9)
    recurrent(
        f"{_op.lower()}-last-state",
        _op,
        outputs=", last" if _op != "LSTM" else ", last, cell",
        directions=2,
        after="t = Transpose<perm = [1, 0, 2]>(last)  m = Reshape(t, flat)",
        constants="int64[2] flat = {0, 16}",
    )
    recurrent(f"{_op.lower()}-bare", _op, operands="g, w, r")
    recurrent(f"{_op.lower()}-clip", _op, "clip = 0.5", directions=2)
    recurrent(
        f"{_op.lower()}-lengths",
        _op,
        operands="g, w, r, b, some",
        inputs=", int32[2] lens",
        batch="2",
        constants="int32[1] one = {1}",
        before="some = Add(lens, one)",
        directions=2,
        tolerance=2e-5,
    )
recurrent("gru-linear-before-reset", "GRU", "linear_before_reset = 1", directions=2)
recurrent(
    "lstm-activations",
    "LSTM",
    # Of a masked unit something is left that is not zero: it must not matter.
    'activations = ["HardSigmoid", "Softplus", "Softsign"]',
)
recurrent("rnn-sigmoid", "RNN", 'activations = ["Sigmoid"]')
recurrent("rnn-relu", "RNN", 'activations = ["Relu", "Relu"]', directions=2)
recurrent("lstm-coupled-gates", "LSTM", "input_forget = 1")
recurrent(
    "lstm-peepholes",
    "LSTM",
    operands="g, w, r, b, , , , p",
    constants="float[2,24] p",
    directions=2,
    tolerance=2e-5,
)
_SIZE = (
    "n = Shape(x)  one = Gather(n, at)  two = Unsqueeze(one, z)  size = Concat<axis = 0>(d, two, k)"
)
for _kind, _how in {
    "constant-of-shape": "h0 = ConstantOfShape(size)  c0 = Identity(h0)",
    "expanded": "h0 = Expand(nil, size)  c0 = Slice(h0, z, d, z)",
}.items():
    recurrent(
        f"lstm-zeros-{_kind}",
        "LSTM",
        operands="g, w, r, b, , h0, c0",
        before=f"{_SIZE}  {_how}",
        constants="int64 at = {1}, int64[1] z = {0}, int64[1] d = {1}, int64[1] k = {8}, float[1,1,8] nil = "
        "{0, 0, 0, 0, 0, 0, 0, 0}",
    )
recurrent(
    "lstm-state-of-ones",
    "LSTM",
    operands="g, w, r, b, , h0, c0",
    before=f"{_SIZE}  h0 = ConstantOfShape<value = float[1] {{1}}>(size)  c0 = Identity(h0)",
    constants="int64 at = {1}, int64[1] z = {0}, int64[1] d = {1}, int64[1] k = {8}",
    units=7 + 8,
)
recurrent(
    "gru-state-from-outside",
    "GRU",
    operands="g, w, r, b, , start",
    inputs=", float[1,N,8] start",
    units=7,
    pinned="a graph input (start)",
)
case(
    "lstm-constant-state",
    "LSTM",
    """(float[6,2,5] x) => (float[] y) <float[1,32,5] w, float[1,32,8] r, float[1,64] b, float[1,2,8] h0,
    float[1,2,8] c0, float[8,3] w2, int64[1] axes = {1}> {
        h, last, cell = LSTM<hidden_size = 8>(x, w, r, b, , h0, c0)
        a = Squeeze(h, axes)
        y = MatMul(a, w2)
    }""",
    units=8,
)
case(
    "lstm-stacked",
    "LSTM",
    """(float[6,N,5] x) => (float[] y) <float[2,32,5] w, float[2,32,8] r, float[2,64] b, int64[3] to = {0, 0, -1},
    float[2,24,16] wb, float[2,24,6] rb, float[2,48] bb, int64[3] to2 = {0, 0, 12}, float[12,3] w2> {
        h, hn, cn = LSTM<hidden_size = 8, direction = "bidirectional">(x, w, r, b)
        t = Transpose<perm = [0, 2, 1, 3]>(h)
        m = Reshape(t, to)
        g, gn, dn = LSTM<hidden_size = 6, direction = "bidirectional">(m, wb, rb, bb)
        u = Transpose<perm = [0, 2, 1, 3]>(g)
        v = Reshape(u, to2)
        y = MatMul(v, w2)
    }""",
    units=8 + 6,
)
case(
    "gru-decoder-starts-from-encoder",
    "GRU",
    """(float[6,N,5] x, float[4,N,5] z) => (float[] y) <float[1,24,5] w, float[1,24,8] r, float[1,48] b,
    float[1,24,5] wd, float[1,24,8] rd, float[1,48] bd, int64[1] one = {1}, float[8,3] w2> {
        h, hn = GRU<hidden_size = 8>(x, w, r, b)
        g = GRU<hidden_size = 8>(z, wd, rd, bd, , hn)
        s = Squeeze(g, one)
        y = MatMul(s, w2)
    }""",
    units=8,
)
case(
    "lstm-residual",
    "LSTM",
    """(float[6,N,5] x) => (float[] y) <float[5,8] w0, float[1,32,8] w, float[1,32,8] r, float[1,64] b,
    int64[1] one = {1}, float[8,3] w2> {
        e = MatMul(x, w0)
        h = LSTM<hidden_size = 8>(e, w, r, b)
        q = Squeeze(h, one)
        s = Add(q, e)
        y = MatMul(s, w2)
    }""",
    # The node's input, its output and its state name the same channels.
    units=8,
)
case(
    "rnn-hidden-in-the-output",
    "RNN",
    """(float[6,N,5] x) => (float[] y, float[] last) <float[5,6] w0, float[1,8,6] w, float[1,8,8] r, int64[1] one = {1},
    float[8,3] w2> {
        e = MatMul(x, w0)
        h, last = RNN<hidden_size = 8>(e, w, r)
        q = Squeeze(h, one)
        y = MatMul(q, w2)
    }""",
    units=6,
    pinned="graph output 'last'",
)
case(
    "lstm-weights-computed",
    "LSTM",
    """(float[6,N,5] x, float[1,32,8] r) => (float[] y) <float[5,6] w0, float[1,32,6] w, int64[1] one = {1},
    float[8,3] w2> {
        e = MatMul(x, w0)
        h = LSTM<hidden_size = 8>(e, w, r)
        q = Squeeze(h, one)
        y = MatMul(q, w2)
    }""",
    units=0,
    pinned="takes its weights from a computation",
)
