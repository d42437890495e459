"""Cases for If, Loop and Scan: units that live inside a body, cross into it, leave it,
are carried along."""

from __future__ import annotations

from op_case import case

case(
    "if-blocks-in-branches",
    "If",
    """(float[N,5] x, bool flag) => (float[N,3] y)
    <float[5,6] a1, float[6] ab, float[6,3] a2, float[5,8] b1, float[8,7] b2, float[7,3] b3> {
        y = If(flag) <
            then_branch = yes () => (float[N,3] u) {
                p = MatMul(x, a1)  q = Add(p, ab)  r = Relu(q)  u = MatMul(r, a2)
            },
            else_branch = no () => (float[N,3] v) {
                p2 = MatMul(x, b1)  r2 = Relu(p2)  q2 = MatMul(r2, b2)  s2 = Tanh(q2)  v = MatMul(s2, b3)
            }
        >
    }""",
    units=6 + 8 + 7,
    pinned="graph output",
)
case(
    "if-convolutions",
    "If",
    """(float[N,3,6,6] x, bool flag) => (float[N,2,2,2] y)
    <float[8,3,3,3] w0, float[6,8,3,3] w1, float[6] b1, float[4,6,1,1] w2, float[4,8,3,3] w3, float[2,4,1,1] w4> {
        c = Conv(x, w0)
        h = Relu(c)
        o = If(flag) <
            then_branch = yes () => (float[N,4,2,2] u) { p = Conv(h, w1, b1)  q = Relu(p)  u = Conv(q, w2) },
            else_branch = no () => (float[N,4,2,2] v) { v = Conv(h, w3) }
        >
        r = Relu(o)
        y = Conv(r, w4)
    }""",
    units=8 + 6 + 4,
)
case(
    "if-identity-branch",
    "If",
    """(float[N,5] x, bool flag) => (float[N,3] y) <float[5,6] w1, float[6,8] w2, float[8,6] w3, float[6,3] w4> {
        h = MatMul(x, w1)
        o = If(flag) <
            then_branch = yes () => (float[N,6] u) { p = MatMul(h, w2)  r = Relu(p)  q = MatMul(r, w3)  u = Add(q, h) },
            else_branch = no () => (float[N,6] v) { v = Identity(h) }
        >
        y = MatMul(o, w4)
    }""",
    units=6 + 8,
)
case(
    "if-branch-reads-whole",
    "If",
    """(float[N,5] x, bool flag) => (float[N,6] z, float[N,3] y) <float[5,6] w1, float[6,3] w2> {
        h = MatMul(x, w1)
        z = If(flag) <
            then_branch = yes () => (float[N,6] u) { u = Softmax(h) },
            else_branch = no () => (float[N,6] v) { v = Neg(h) }
        >
        y = MatMul(h, w2)
    }""",
    units=0,
    pinned="Softmax",
)
case(
    "if-constant-branch",
    "If",
    """(float[N,5] x, bool flag) => (float[1,3] y) <float[5,6] w1, float[1,6] start, float[6,3] w2> {
        o = If(flag) <
            then_branch = yes () => (float[1,6] u) { s = MatMul(x, w1)  u = ReduceMean<axes = [0], keepdims = 1>(s) },
            else_branch = no () => (float[1,6] v) { v = Identity(start) }
        >
        y = MatMul(o, w2)
    }""",
    units=6,
)
case(
    "if-nested",
    "If",
    """(float[N,5] x, bool flag, bool other) => (float[N,3] y)
    <float[5,6] w1, float[6,8] w2, float[6,8] w3, float[8,3] w4, float[6,3] w5> {
        h = MatMul(x, w1)
        y = If(flag) <
            then_branch = yes () => (float[N,3] u) {
                i = If(other) <
                    then_branch = yes2 () => (float[N,8] p) { p = MatMul(h, w2) },
                    else_branch = no2 () => (float[N,8] q) { q0 = MatMul(h, w3)  q = Relu(q0) }
                >
                u = MatMul(i, w4)
            },
            else_branch = no () => (float[N,3] v) { v = MatMul(h, w5) }
        >
    }""",
    units=6 + 8,
)
_LOOP = """(float[N,5] x) => (float[N,3] y)
<float[5,6] w0, float[6,8] w1, float[8,6] w2, float[6,3] w4, int64 count = {3}, bool go = {1}> {
    h = MatMul(x, w0)
    last = Loop(count, go, h) <
        body = step (int64 i, bool c, float[N,6] s) => (bool c2, float[N,6] t) {
            c2 = Identity(c)  p = MatMul(s, w1)  r = Relu(p)  q = MatMul(r, w2)  t = BODY
        }
    >
    y = MatMul(last, w4)
}"""
case("loop-carries-channels", "Loop", _LOOP.replace("BODY", "Add(s, q)"), units=6 + 8)
case("loop-normalises", "Loop", _LOOP.replace("BODY", "Softmax(q)"), units=8, pinned="Softmax")
case(
    "loop-stacks-steps",
    "Loop",
    """(float[N,5] x) => (float[4,N,3] y, float[N,6] t)
    <float[5,6] w1, float[6,8] w2, float[8,6] w3, float[8,3] w4, int64 count = {4}, bool go = {1}> {
        h = MatMul(x, w1)
        t, all = Loop(count, go, h) <
            body = step (int64 i, bool c, float[N,6] s) => (bool c2, float[N,6] n, float[N,8] r) {
                c2 = Identity(c)  p = MatMul(s, w2)  r = Relu(p)  n = MatMul(r, w3)
            }
        >
        y = MatMul(all, w4)
    }""",
    units=0,  # how many steps there are is not known before the loop runs
    pinned=("stacks it to a shape that is not known", "graph output 't'"),
)
case(
    "loop-state-grows",
    "Loop",
    """(float[N,5] x, float[N,6] other) => (float y)
    <float[5,6] w1, float[6,8] w2, float[8,6] w3, int64 count = {2}, bool go = {1}> {
        h = MatMul(x, w1)
        last = Loop(count, go, h) <
            body = step (int64 i, bool c, float[M,6] s) => (bool c2, float[M,6] t) {
                c2 = Identity(c)  p = MatMul(other, w2)  r = Relu(p)  q = MatMul(r, w3)  t = Concat<axis = 0>(s, q)
            }
        >
        y = ReduceSum<keepdims = 0>(last)
    }""",
    units=8,
    pinned="carries it on in a shape that is not known",
)
case(
    "scan-recurrent-cell",
    "Scan",
    """(float[7,5] x, float[2,6] start) => (float[7,3] y)
    <float[5,9] w0, float[9,6] wx, float[6,6] wh, float[1,6] zero, float[6,3] wy, int64[1] at = {1}> {
        h = MatMul(x, w0)
        last, all = Scan<num_scan_inputs = 1, body = step (float[1,6] s, float[9] e) => (float[1,6] t, float[1,6] o) {
            i = MatMul(e, wx)  j = MatMul(s, wh)  k = Add(i, j)  t = Tanh(k)  o = Identity(t)
        }>(zero, h)
        f = Squeeze(all, at)
        y = MatMul(f, wy)
    }""",
    units=9 + 6,
)
case(
    "scan-other-axes",
    "Scan",
    """(float[N,7,5] x) => (float[N,3,7] y) <float[5,9] w0, float[9,6] w1, float[6,8] w2, float[3,8] w3> {
        h = MatMul(x, w0)
        all = Scan<num_scan_inputs = 1, scan_input_axes = [1], scan_output_axes = [-1],
            body = step (float[N,9] e) => (float[N,8] o) { i = MatMul(e, w1)  r = Relu(i)  o = MatMul(r, w2) }>(h)
        y = MatMul(w3, all)
    }""",
    units=9 + 6 + 8,
)
case(
    "scan-along-channels",
    "Scan",
    """(float[N,5] x) => (float[] y) <float[5,9] w0> {
        h = MatMul(x, w0)
        all = Scan<num_scan_inputs = 1, scan_input_axes = [1],
            body = step (float[N] e) => (float[N] o) { o = Relu(e) }>(h)
        y = ReduceSum<keepdims = 0>(all)
    }""",
    units=0,
    pinned="steps along it",
)
case(
    "weights-read-in-and-out-of-a-body",
    "If",
    """(float[N,5] x, bool flag) => (float[N,3] y, float[N,3] z) <float[5,6] w1, float[6,3] w2> {
        h = MatMul(x, w1)
        r = Relu(h)
        z = MatMul(r, w2)
        y = If(flag) <
            then_branch = yes () => (float[N,3] u) { a = MatMul(x, w1)  b = Tanh(a)  u = MatMul(b, w2) },
            else_branch = no () => (float[N,3] v) { v = MatMul(h, w2) }
        >
    }""",
    units=6,
)
