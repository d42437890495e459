"""Bodies that return a constant, an outer tensor or their own input: loading and pruning keep a valid graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import assert_exact, build, distance, keep_one, load, random_keep
from onnx import ModelProto, NodeProto, numpy_helper

from onnx_oamip.core.records import Array, Model
from onnx_oamip.graph import subgraphs
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite

TRUE = "Constant<value = bool {1}>()"
ONES = "Constant<value = float[1,8] {1,2,3,4,5,6,7,8}>()"
HOLES = "Constant<value = float[1,8] {1,0,3,0,5,0,7,8}>()"


def _gate(then: str, other: str, before: str = "", weights: str = "") -> str:
    """A network of 8 + 8 units whose first activation is multiplied by what an If returns."""
    return f"""(float[N,6] x, bool flag, bool other) => (float[N,4] y)
    <float[6,8] w1, float[8,8] w2, float[8,4] w3 {weights}> {{
        h = MatMul(x, w1)
        {before}
        k = If(flag) <
            then_branch = yes () => (float[M,8] p) {{ {then} }},
            else_branch = no () => (float[M,8] q) {{ {other} }}
        >
        s = Mul(h, k)
        t = MatMul(s, w2)
        r = Relu(t)
        y = MatMul(r, w3)
    }}"""


NESTED = f"""p = If(other) <
    then_branch = yes2 () => (float[1,8] p2) {{ p2 = {ONES} }},
    else_branch = no2 () => (float[M,8] q2) {{ q2 = Identity(h) }}
>"""
LOOP = """(float[N,6] x, bool flag, bool other) => (float[N,4] y)
<float[6,8] w1, float[8,8] w2, float[8,4] w3, int64 count = {3}, bool go = {1}> {
    h = MatMul(x, w1)
    g = Tanh(h)
    last = Loop(count, go, h) <body = step (int64 i, bool c, float[N,8] s) => (RETURNED) { NODES }>
    t = MatMul(last, w2)
    r = Relu(t)
    y = MatMul(r, w3)
}"""
ONE_ROW = (
    LOOP.replace("Tanh(h)", "ReduceMax<axes = [0]>(h)")
    .replace("go, h)", "go, g)")
    .replace("N,8] s", "1,8] s")
)
STACKED = """(float[N,6] x, bool flag, bool other) => (float[N,4] y, float[K,N,8] z)
<float[6,8] w1, float[8,8] w2, float[8,4] w3, int64 count = {3}, bool go = {1}> {
    h = MatMul(x, w1)
    g = Tanh(h)
    last, z = Loop(count, go, h) <body = step (int64 i, bool c, float[N,8] s) => (RETURNED) { NODES }>
    t = MatMul(last, w2)
    r = Relu(t)
    y = MatMul(r, w3)
}"""
SCAN = """(float[N,6] x, float[5,N,6] seq, bool flag, bool other) => (float[N,4] y, float[5,N,4] z)
<float[6,8] w1, float[8,8] w2, float[8,4] w3, float[8,4] w4> {
    h = MatMul(x, w1)
    e = MatMul(seq, w1)
    last, all = Scan(h, e) <num_scan_inputs = 1, body = step (float[N,8] s, float[N,8] v) => (RETURNED) { NODES }>
    t = MatMul(last, w2)
    r = Relu(t)
    y = MatMul(r, w3)
    z = MatMul(all, w4)
}"""


def _body(text: str, returned: str, nodes: str) -> str:
    return text.replace("RETURNED", returned).replace("NODES", nodes)


START = ", float[1,8] start"
CASES: dict[str, tuple[str, int]] = {
    "constants": (_gate(f"p = {ONES}", f"q = {HOLES}"), 16),
    "one constant": (_gate(f"p = {ONES}", "q = Sigmoid(h)"), 16),
    "a computed constant": (_gate(f"a = {ONES} p = Neg(a)", "q = Sigmoid(h)"), 16),
    "an outer value": (_gate("p = Identity(h)", "q = Sigmoid(h)"), 16),
    "an outer constant": (_gate("p = Identity(start)", f"q = {HOLES}", f"start = {ONES}"), 16),
    "an outer initialiser": (_gate("p = Identity(start)", "q = Sigmoid(h)", weights=START), 16),
    "one initialiser from both branches": (
        _gate("p = Identity(start)", "q = Identity(start)", weights=START),
        16,
    ),
    "equal constants from both branches": (_gate(f"p = {ONES}", f"q = {ONES}"), 16),
    "identities of an identity": (
        _gate("a = Identity(start) p = Identity(a)", "q = Neg(start)", weights=START),
        16,
    ),
    "nested": (_gate(NESTED, "q = Identity(start)", weights=START), 16),
    "a graph input": (
        """(float[N,6] x, bool flag, bool other) => (float[N,4] y) <float[6,8] w1, float[8,4] w2> {
            k = If(flag) <
                then_branch = yes () => (float[N,6] p) { p = Identity(x) },
                else_branch = no () => (float[N,6] q) { q = Neg(x) }
            >
            h = MatMul(k, w1)
            r = Relu(h)
            y = MatMul(r, w2)
        }""",
        8,
    ),
    "a constant graph output": (
        """(float[N,6] x, bool flag, bool other) => (float[N,4] y, float[2] z)
        <float[6,8] w1, float[8,4] w2, float[2] low> {
            h = MatMul(x, w1)
            y = MatMul(h, w2)
            z = If(flag) <
                then_branch = yes () => (float[2] p) { p = Constant<value_floats = [1.5, -2.0]>() },
                else_branch = no () => (float[2] q) { q = Identity(low) }
            >
        }""",
        8,
    ),
    "loop: an outer value": (
        _body(LOOP, "bool c2, float[N,8] s2", "c2 = Identity(c) s2 = Identity(g)"),
        16,
    ),
    "loop: constants": (_body(ONE_ROW, "bool c2, float[1,8] s2", f"c2 = {TRUE} s2 = {ONES}"), 16),
    "loop: an outer condition": (
        _body(LOOP, "bool c2, float[N,8] s2", "c2 = Identity(go) s2 = Tanh(s)"),
        16,
    ),
    "loop: its own inputs": (_body(LOOP, "bool c, float[N,8] s", "a = Neg(s)"), 16),
    "loop: its own input through an identity": (
        _body(LOOP, "bool c, float[N,8] s2", "s2 = Identity(s)"),
        16,
    ),
    # How many steps are stacked is not known before the loop runs: their 8 channels are not removed.
    "loop: a stacked outer value": (
        _body(
            STACKED,
            "bool c2, float[N,8] s2, float[N,8] v",
            f"c2 = {TRUE} s2 = Tanh(s) v = Identity(g)",
        ),
        8,
    ),
    "loop: a stacked input of its own": (
        _body(STACKED, "bool c, float[N,8] s2, float[N,8] v", "s2 = Tanh(s) v = Identity(s)"),
        8,
    ),
    "scan: an outer value": (
        _body(SCAN, "float[N,8] s2, float[N,8] o", "s2 = Add(s, v) o = Identity(h)"),
        16,
    ),
    # Without an Identity, ONNX Runtime 1.23 to 1.32 returns memory that it never wrote.
    "scan: its own inputs": (
        _body(SCAN, "float[N,8] s2, float[N,8] o", "s2 = Identity(s) o = Identity(v)"),
        16,
    ),
}


def _inner(proto: ModelProto) -> list[onnx.GraphProto]:
    return list(subgraphs.graphs(proto.graph))[1:]


def _assert_own_outputs(proto: ModelProto) -> None:
    onnx.checker.check_model(proto, full_check=True)
    for body in _inner(proto):
        own = {v.name for v in body.input} | {name for node in body.node for name in node.output}
        assert {v.name for v in body.output} <= own
        assert not body.initializer


def _feeds(model: Model) -> list[dict[str, Array]]:
    """Feeds at which every branch is taken."""
    rng = np.random.default_rng(3)
    made = []
    for flag in (False, True):
        for other in (False, True):
            feed: dict[str, Array] = {"flag": np.asarray(flag), "other": np.asarray(other)}
            for port in model.inputs:
                if port.name not in feed:
                    shape = [n if isinstance(n, int) else 3 for n in port.dims]
                    feed[port.name] = rng.standard_normal(shape).astype(np.float32)
            made.append({port.name: feed[port.name] for port in model.inputs})
    return made


def _same(reference: ModelProto, other: ModelProto, model: Model, tolerance: float) -> None:
    before, after = Session(reference, "cpu", exact=True), Session(other, "cpu", exact=True)
    for feed in _feeds(model):
        assert distance(before.run(feed), after.run(feed)) <= tolerance


@pytest.mark.parametrize("name", CASES)
def test_loading_preserves_the_outputs(tmp_path: Path, name: str) -> None:
    source = build(CASES[name][0])
    onnx.checker.check_model(source, full_check=True)
    model = load(source, tmp_path)
    _assert_own_outputs(model.proto)
    _same(source, model.proto, model, 0.0)


@pytest.mark.parametrize("name", CASES)
def test_loading_again_changes_nothing(tmp_path: Path, name: str) -> None:
    once = load(build(CASES[name][0]), tmp_path)
    again = load(once.proto, tmp_path)
    assert onnx.printer.to_text(again.proto) == onnx.printer.to_text(once.proto)


@pytest.mark.parametrize("name", CASES)
def test_pruned_model_equals_masked_model(tmp_path: Path, name: str) -> None:
    text, units = CASES[name]
    model = load(build(text), tmp_path)
    coupling = couple(model)
    assert coupling.n_units == units, coupling.pinned
    rng = np.random.default_rng(0)
    for keep in (keep_one(coupling, rng), random_keep(coupling, rng, 0.5)):
        cut = assert_exact(model, coupling, keep, batches=(1,))
        _assert_own_outputs(cut)
        _same(rewrite.mask(model, coupling, keep), cut, model, 1e-5)


def test_constants_returned_by_a_branch_shrink(tmp_path: Path) -> None:
    """The values that the branches return are those of the kept channels."""
    model = load(build(_gate(f"p = {ONES}", f"q = {HOLES}")), tmp_path)
    coupling = couple(model)
    gated = coupling.axes["h", 1]
    keep = np.ones(coupling.n_units, bool)
    keep[gated[[0, 2, 3]]] = False
    cut = rewrite.cut(model, coupling, keep)
    held = {t.name: numpy_helper.to_array(t) for t in cut.graph.initializer}
    branches = {body.name: body for body in _inner(cut)}
    returned = {}
    for label, body in branches.items():
        (node,) = body.node
        assert (node.op_type, node.output[0]) == ("Identity", body.output[0].name)
        returned[label] = held[node.input[0]].tolist()
    assert returned == {"yes": [[2, 5, 6, 7, 8]], "no": [[0, 5, 0, 7, 8]]}


def test_branch_of_initialisers_only_is_pruned(tmp_path: Path) -> None:
    """A branch may consist of a constant and nothing else, and both may give theirs the same name."""
    source = build(_gate(f"p = {ONES}", f"q = {HOLES}"))
    for body in _inner(source):
        (constant,) = body.node
        body.initializer.append(constant.attribute[0].t)
        body.initializer[0].name = "same"
        body.output[0].name = "same"
        del body.node[:]
    onnx.checker.check_model(source, full_check=True)
    model = load(source, tmp_path)
    _assert_own_outputs(model.proto)
    _same(source, model.proto, model, 0.0)
    coupling = couple(model)
    assert coupling.n_units == 16
    assert_exact(model, coupling, keep_one(coupling, np.random.default_rng(0)))


@pytest.mark.parametrize("flag", [False, True])
def test_resolved_branch_is_replaced_by_its_constant(tmp_path: Path, flag: bool) -> None:
    """An If whose condition is constant is replaced by the value that the branch returns."""
    text = (
        _gate(f"p = {ONES}", "q = Identity(h)")
        .replace("bool flag, ", "")
        .replace("float[8,4] w3", f"float[8,4] w3, bool flag = {{{int(flag)}}}")
    )
    source = build(text)
    model = load(source, tmp_path)
    taken = [] if flag else ["Identity"]
    assert [node.op for node in model.nodes] == [
        "MatMul",
        *taken,
        "Mul",
        "MatMul",
        "Relu",
        "MatMul",
    ]
    _same(source, model.proto, model, 0.0)


def _nodes(proto: ModelProto) -> list[NodeProto]:
    return list(subgraphs.nodes(proto.graph))


@pytest.mark.parametrize("condition", ["flag", "fixed"])
def test_random_operators_in_branches_stay_random(tmp_path: Path, condition: str) -> None:
    text = """(float[N,8] x, bool flag) => (float[N,4] y) <float[8,4] w, bool fixed = {1}> {
        k = If(COND) <
            then_branch = yes () => (float[1,8] p) { p = RandomNormal<shape = [1, 8]>() },
            else_branch = no () => (float[1,8] q) { q = RandomUniform<shape = [1, 8]>() }
        >
        s = Mul(x, k)
        y = MatMul(s, w)
    }""".replace("COND", condition)
    model = load(build(text), tmp_path)
    assert any(node.op_type == "RandomNormal" for node in _nodes(model.proto))
    session = onnxruntime.InferenceSession(model.proto.SerializeToString())
    feed = {"x": np.ones((2, 8), np.float32), "flag": np.asarray(True)}
    feed = {port.name: feed[port.name] for port in session.get_inputs()}
    assert not np.array_equal(session.run(None, feed)[0], session.run(None, feed)[0])
    comparing = Session(model.proto, "cpu")  # which draws the same in every run
    assert np.array_equal(comparing.run(feed)[0], comparing.run(feed)[0])
