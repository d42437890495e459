"""Models with control flow and with functions of their own: what is resolved, what goes, what stays, end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import RUNTIME, assert_exact, build, distance, feed, keep_one, load, random_keep
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper, parser

from onnx_oamip.api import pipeline
from onnx_oamip.core.records import Model
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph import cost, subgraphs
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.loading import from_proto
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite

BRANCHES = """(float[N,6] x, bool flag) => (float[N,4] y)
<float[6,12] w0, float[12,16] w1, float[16] b1, float[16,10] w2, float[12,14] v1, float[14,10] v2, float[10,4] w3> {
    a = MatMul(x, w0)
    h = Relu(a)
    o = If(flag) <
        then_branch = yes () => (float[N,10] u) { p = MatMul(h, w1)  q = Add(p, b1)  r = Relu(q)  u = MatMul(r, w2) },
        else_branch = no () => (float[N,10] v) { p2 = MatMul(h, v1)  r2 = Relu(p2)  v = MatMul(r2, v2) }
    >
    s = Relu(o)
    y = MatMul(s, w3)
}"""
LOOP = """(float[N,6] x) => (float[N,4] y)
<float[6,12] w0, float[12,20] w1, float[20,12] w2, float[12,4] w3, int64 count = {3}, bool go = {1}> {
    a = MatMul(x, w0)
    h = Relu(a)
    last = Loop(count, go, h) <
        body = step (int64 i, bool c, float[N,12] s) => (bool c2, float[N,12] t) {
            c2 = Identity(c)  p = MatMul(s, w1)  r = Relu(p)  q = MatMul(r, w2)  t = Add(s, q)
        }
    >
    y = MatMul(last, w3)
}"""
TEXTS = {"branches": BRANCHES, "loop": LOOP}


def _same(proto: ModelProto, model: Model, tolerance: float = 1e-6) -> None:
    for seed in range(4):  # flags take both values
        values = feed(model, seed, 2)
        assert (
            distance(Session(proto, "cpu").run(values), Session(model.proto, "cpu").run(values))
            <= tolerance
        )


SCAN = """(float[N,6] x, float[7,N,5] steps) => (float[N,4] y)
<float[6,12] w0, float[5,12] v, float[12,12] w1, float[12,4] w3> {
    h = MatMul(x, w0)
    last, all = Scan(h, steps) <
        num_scan_inputs = 1, body = step (float[N,12] s, float[N,5] u) => (float[N,12] t, float[N,12] o) {
            a = MatMul(u, v)  p = MatMul(s, w1)  b = Add(a, p)  t = Tanh(b)  o = Identity(t)
        }
    >
    y = MatMul(last, w3)
}"""
OUTSIDE = 6 * 12 + 12 * 4
"""MACs of the loops' networks in front of and behind the loop."""


@pytest.mark.parametrize(
    ("text", "macs"),
    [
        (LOOP, OUTSIDE + 3 * 2 * 12 * 20),
        (LOOP.replace("{3}", "{0}"), OUTSIDE),
        (SCAN, OUTSIDE + 7 * (5 * 12 + 12 * 12)),
    ],
)
def test_body_counts_as_often_as_it_runs(text: str, macs: int, tmp_path: Path) -> None:
    model = load(build(text), tmp_path)
    assert cost.count(model).macs == macs
    assert not cost.uncounted(model)


@pytest.mark.parametrize("count", ["int64 count", f"int64 count = {{{2**63 - 1}}}"])
def test_body_of_unknown_runs_counts_once_and_is_named(count: str, tmp_path: Path) -> None:
    """Only a run shows it where the count is an input, or the largest integer because a condition ends the loop."""
    text = LOOP.replace("int64 count = {3}", count)
    if "=" not in count:
        text = LOOP.replace(", int64 count = {3}", "").replace(
            "float[N,6] x", "float[N,6] x, int64 count"
        )
    model = load(build(text), tmp_path)
    assert cost.count(model).macs == OUTSIDE + 2 * 12 * 20
    (loop,) = cost.uncounted(model)
    assert loop.operator == "Loop"
    assert "counted once" in cost.uncounted_note(model)


def _inwards(proto: ModelProto, as_nodes: bool = False) -> ModelProto:
    """Constants that only one body reads as that body's own, as exporters write them."""
    result = ModelProto.FromString(proto.SerializeToString())
    inside = list(subgraphs.graphs(result.graph))[1:]
    for tensor in list(result.graph.initializer):
        users = [g for g in inside if any(tensor.name in n.input for n in g.node)]
        if len(users) == 1 and all(tensor.name not in n.input for n in result.graph.node):
            result.graph.initializer.remove(tensor)
            if as_nodes:
                users[0].node.insert(
                    0, helper.make_node("Constant", [], [tensor.name], value=tensor)
                )
            else:
                users[0].initializer.append(tensor)
    return result


def _rename(graph: GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for listed in (node.input, node.output):
            for i, name in enumerate(listed):
                listed[i] = new if name == old else name
    for item in (*graph.initializer, *graph.output, *graph.input):
        item.name = new if item.name == old else item.name


# ------------------------------------------------------------------------------------------------ where constants are


@pytest.mark.parametrize("as_nodes", [False, True])
@pytest.mark.parametrize("name", TEXTS)
def test_bodies_have_their_own_constants(tmp_path: Path, name: str, as_nodes: bool) -> None:
    proto = _inwards(build(TEXTS[name]), as_nodes)
    assert len(proto.graph.initializer) < len(build(TEXTS[name]).graph.initializer)
    model, plain = load(proto, tmp_path), load(build(TEXTS[name]), tmp_path)
    _same(proto, model)
    assert couple(model).n_units == couple(plain).n_units
    assert cost.count(model).macs == cost.count(plain).macs > 0
    assert cost.count(model).params == cost.count(plain).params
    coupling = couple(model)
    assert_exact(model, coupling, random_keep(coupling, np.random.default_rng(1), 0.4))


def test_branches_may_use_the_same_names(tmp_path: Path) -> None:
    proto = _inwards(build(BRANCHES))
    for graph in list(subgraphs.graphs(proto.graph))[1:]:
        for old, new in (
            ("w1", "w"),
            ("v1", "w"),
            ("w2", "out"),
            ("v2", "out"),
            ("p2", "p"),
            ("r2", "r"),
            ("v", "u"),
        ):
            _rename(graph, old, new)
        for i, node in enumerate(graph.node):
            node.name = f"node{i}"
    onnx.checker.check_model(proto)
    model = load(proto, tmp_path)
    _same(proto, model)
    names = [n.name for n in model.every]
    made = [name for n in model.every for name in n.outputs]
    assert len(names) == len(set(names))
    assert len(made) == len(set(made))
    coupling = couple(model)
    assert coupling.n_units == couple(load(build(BRANCHES), tmp_path)).n_units
    assert_exact(model, coupling, keep_one(coupling, np.random.default_rng(0)))


def test_pruned_model_can_be_pruned_again(tmp_path: Path) -> None:
    for text in TEXTS.values():
        model = load(build(text), tmp_path)
        coupling = couple(model)
        cut = rewrite.cut(model, coupling, random_keep(coupling, np.random.default_rng(2), 0.6))
        again = load(cut, tmp_path)
        second = couple(again)
        assert 0 < second.n_units < coupling.n_units
        assert_exact(again, second, random_keep(second, np.random.default_rng(3), 0.5))


def test_costs_of_bodies_are_predicted(tmp_path: Path) -> None:
    for text in TEXTS.values():
        model = load(build(text), tmp_path)
        coupling = couple(model)
        keep = random_keep(coupling, np.random.default_rng(4), 0.5)
        widths = np.asarray([int(keep[g.units].sum()) for g in coupling.groups], np.int64)
        predicted = cost.ledger(model, coupling).cost(widths)
        counted = cost.count(from_proto(rewrite.cut(model, coupling, keep), model.bindings))
        assert (predicted.macs, predicted.params) == (counted.macs, counted.params)


# --------------------------------------------------------------------------------------------------- random bodies


@st.composite
def _programs(draw: st.DrawFn) -> str:
    """A random block in each branch, or in the body of a loop, between two products."""
    fresh = iter(range(100))
    weights: list[str] = []

    def block(source: str, width: int, last: str, steps: int) -> str:
        lines, here, size = [], source, width
        for step in range(steps):
            k, wide = next(fresh), draw(st.integers(2, 9))
            final = step == steps - 1
            wide = width if final else wide
            weights.append(f"float[{size},{wide}] m{k}")
            out = last if final else f"p{k}"
            kind = draw(st.sampled_from(("Relu", "Tanh", "residual", "shared", "split")))
            lines.append(f"t{k} = MatMul({here}, m{k})")
            if kind == "residual" and wide == width:
                lines.append(f"{out} = Add(t{k}, {source})")
            elif kind == "shared" and wide == width:
                lines.append(f"{out} = Mul(t{k}, h)")
            elif kind == "split" and wide % 2 == 0:
                lines.append(f"l{k}, r{k} = Split<axis = -1>(t{k})  e{k} = Relu(r{k})")
                lines.append(f"{out} = Concat<axis = -1>(e{k}, l{k})")
            else:
                lines.append(f"{out} = {kind if kind in ('Relu', 'Tanh') else 'Sigmoid'}(t{k})")
            here, size = out, wide
        return "  ".join(lines)

    width = draw(st.integers(2, 8))
    if draw(st.booleans()):
        then = block("h", width, "u", draw(st.integers(1, 3)))
        blocks = block("h", width, "v", draw(st.integers(1, 3)))
        other = draw(st.sampled_from(("v = Neg(h)", "v = Identity(h)", blocks)))
        middle = f"""o = If(flag) < then_branch = yes () => (float[N,{width}] u) {{ {then} }},
            else_branch = no () => (float[N,{width}] v) {{ {other} }} >"""
    else:
        inner = block("s", width, "t", draw(st.integers(1, 3)))
        middle = f"""o = Loop(count, flag, h) < body = step (int64 i, bool c, float[N,{width}] s) =>
            (bool c2, float[N,{width}] t) {{ c2 = Identity(c)  {inner} }} >"""
    listed = ", ".join(dict.fromkeys(weights))
    return f"""(float[N,5] x, bool flag) => (float[N,3] y)
        <float[5,{width}] w0, float[{width},3] w9, int64 count = {{2}}{", " + listed if listed else ""}> {{
        h = MatMul(x, w0)
        {middle}
        y = MatMul(o, w9)
    }}"""


@given(
    text=_programs(),
    seed=st.integers(0, 99),
    density=st.sampled_from((0.2, 0.5, 0.8)),
    inwards=st.booleans(),
)
@settings(max_examples=60)
def test_random_bodies_are_cut_exactly(
    tmp_path_factory: pytest.TempPathFactory, text: str, seed: int, density: float, inwards: bool
) -> None:
    proto = build(text, opset=13)
    proto = _inwards(proto) if inwards else proto
    model = load(proto, tmp_path_factory.getbasetemp())
    coupling = couple(model)
    assert coupling.n_units > 0 or coupling.pinned
    assert_exact(model, coupling, random_keep(coupling, np.random.default_rng(seed), density))


# ---------------------------------------------------------------------------------------------- constant conditions


def _constant(name: str, value: object) -> onnx.NodeProto:
    return helper.make_node(
        "Constant", [], [name], value=numpy_helper.from_array(np.asarray(value))
    )


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("how", ["initialiser", "constant", "computed"])
def test_constant_condition_is_resolved(tmp_path: Path, flag: bool, how: str) -> None:
    proto = _inwards(build(BRANCHES))
    del proto.graph.input[1]
    if how == "initialiser":
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(flag), "flag"))
    elif how == "constant":
        proto.graph.node.insert(0, _constant("flag", flag))
    else:
        proto.graph.node.insert(0, helper.make_node("Not", ["training"], ["flag"]))
        proto.graph.node.insert(0, _constant("training", not flag))
    model = load(proto, tmp_path)
    assert "If" not in {n.op for n in model.nodes}
    assert "Identity" not in {n.op for n in model.nodes}
    _same(proto, model)
    coupling = couple(model)
    assert coupling.n_units == 12 + (16 if flag else 14) + 10
    # What only the other branch read is gone.
    assert ("v1" in model.constants) != flag
    assert_exact(model, coupling, keep_one(coupling, np.random.default_rng(0)))


def test_branch_that_forwards_a_tensor_is_resolved(tmp_path: Path) -> None:
    """Outputs from outside and constants; a resolved If within a branch and within a resolved one."""
    proto = build(
        """(float[N,5] x, bool flag) => (float[N,6] a, float[N,6] b, float[N,6] c, float[6] d, float[N,6] e)
        <float[5,6] w1, float[6] k, bool on = {1}> {
            h = MatMul(x, w1)
            a, b, c, d = If(on) <
                then_branch = yes () => (float[N,6] p, float[N,6] p2, float[N,6] q, float[6] r) {
                    q = Identity(h)  p = Tanh(h)  p2 = Identity(p)
                    r = If(on) < then_branch = y2 () => (float[6] r1) { r1 = Identity(k) },
                                 else_branch = n2 () => (float[6] r2) { r2 = Neg(k) } >
                },
                else_branch = no () => (float[N,6] s, float[N,6] s2, float[N,6] t, float[6] v) {
                    s = Neg(h)  s2 = Neg(h)  t = Abs(h)  v = Neg(k)
                }
            >
            e = If(flag) <
                then_branch = y3 () => (float[N,6] e1) {
                    e1 = If(on) < then_branch = y4 () => (float[N,6] f1) { f1 = Relu(h) },
                                  else_branch = n4 () => (float[N,6] f2) { f2 = Neg(h) } >
                },
                else_branch = n3 () => (float[N,6] e2) { e2 = Abs(h) }
            >
        }"""
    )
    model = load(proto, tmp_path)
    assert [n.op for n in model.every].count("If") == 1
    onnx.checker.check_model(model.proto, full_check=True)
    _same(proto, model)


def test_condition_computed_from_a_shape_is_resolved(tmp_path: Path) -> None:
    """Condition on the rank of a tensor, in the form that exporters write for ``if x.dim() == 3``."""
    proto = build(
        """(float[N,6] x) => (float[] y) <float[6,8] w1, float[8,3] w2, int64 six = {6}, int64 at = {1}> {
            s = Shape(x)
            d = Gather(s, at)
            right = Equal(d, six)
            h = MatMul(x, w1)
            o = If(right) < then_branch = yes () => (float[N,8] u) { u = Relu(h) },
                            else_branch = no () => (float[N,8] v) { v = Softmax(h) } >
            y = MatMul(o, w2)
        }"""
    )
    model = load(proto, tmp_path)
    assert [n.op for n in model.nodes] == ["MatMul", "Relu", "MatMul"]
    assert couple(model).n_units == 8
    _same(proto, model)


# ------------------------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("importance", ["l2", "activation", "obs", "oamip", "random"])
@pytest.mark.parametrize("name", TEXTS)
def test_models_with_subgraphs_go_through_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, importance: str
) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "model.onnx"
    path.write_bytes(build(TEXTS[name]).SerializeToString())
    samples = {"x": rng.standard_normal((96, 6)).astype(np.float32)}
    if name == "branches":
        proto = build(TEXTS[name])
        # A flag for all samples is no sample of its own: it is made from the data.
        del proto.graph.input[1]
        proto.graph.node.insert(0, helper.make_node("Greater", ["total", "zero"], ["flag"]))
        proto.graph.node.insert(0, helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0))
        proto.graph.initializer.append(numpy_helper.from_array(np.float32(0), "zero"))
        path.write_bytes(proto.SerializeToString())
    np.savez(tmp_path / "data.npz", **samples)
    out = tmp_path / "out.onnx"
    report = pipeline.prune(
        path,
        tmp_path / "data.npz",
        out,
        Settings(macs=0.6, importance=importance, force=True, align=1, batch_size=8),
    )
    assert report.after.macs <= 0.6 * report.before.macs
    assert report.verification.masked_equivalence is not None
    assert report.verification.masked_equivalence <= 1e-5
    inside = {c.data for c in report.coupling.inside}
    assert inside
    gone = {
        d
        for c in report.coupling.inside
        for d in [c.data]
        if not report.coupling.keep((c.data, c.axis), report.plan.keep).all()
    }
    if gone:
        assert any("body lost channels" in note for note in report.notes), report.notes


# -------------------------------------------------------------------------------------------------- local functions


def _function_model(text: str, weights: dict[str, tuple[int, ...]]) -> ModelProto:
    proto = parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        values = rng.standard_normal(shape) / np.sqrt(shape[0])
        proto.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    del proto.graph.value_info[:]
    return proto


FUNCTIONS: dict[str, tuple[Callable[[], ModelProto], int]] = {
    "nested": (
        lambda: _function_model(
            """<ir_version: 9, opset_import: ["": 17, "mine": 1, "yours": 1]>
            net (float[N,5] x) => (float[N,3] y) <float[5,8] w, float[8,6] v, float[6,3] o> {
                h = mine.layer(x, w)  g = mine.layer(h, v)  y = MatMul(g, o)
            }
            <domain: "mine", opset_import: ["": 17, "yours": 1]>
            layer (a, b) => (c) { m = MatMul(a, b)  c = yours.act(m) }
            <domain: "yours", opset_import: ["": 17]> act (a) => (c) { m = Relu(a)  c = Tanh(m) }""",
            {"w": (5, 8), "v": (8, 6), "o": (6, 3)},
        ),
        14,
    ),
    "attributes": (
        lambda: _function_model(
            """<ir_version: 9, opset_import: ["": 17, "mine": 1]>
            net (float[N,5] x) => (float[N,3] y) <float[5,8] w, float[8,6] v, float[6,3] o> {
                h = mine.layer<slope = 0.3>(x, w)  g = mine.layer(h, v)  y = MatMul(g, o)
            }
            <domain: "mine", opset_import: ["": 17]> layer <slope: float = 0.1> (a, b) => (c) {
                m = MatMul(a, b)  c = LeakyRelu<alpha: float = @slope>(m)
            }""",
            {"w": (5, 8), "v": (8, 6), "o": (6, 3)},
        ),
        14,
    ),
    "subgraph": (
        lambda: _function_model(
            """<ir_version: 9, opset_import: ["": 17, "mine": 1]>
            net (float[N,5] x, bool flag) => (float[N,3] y) <float[5,8] w, float[8,6] v, float[6,3] o> {
                h = mine.layer(x, w, flag)  g = mine.layer(h, v, flag)  y = MatMul(g, o)
            }
            <domain: "mine", opset_import: ["": 17]> layer (a, b, f) => (c) {
                m = MatMul(a, b)
                c = If(f) < then_branch = yes () => (u) { u = Relu(m) }, else_branch = no () => (v) { v = Tanh(m) } >
            }""",
            {"w": (5, 8), "v": (8, 6), "o": (6, 3)},
        ),
        14,
    ),
    "clashing names": (
        lambda: _function_model(
            """<ir_version: 9, opset_import: ["": 17, "mine": 1]>
            net (float[N,5] x) => (float[N,3] y) <float[5,8] w, float[8,6] v, float[6,3] o> {
                m = MatMul(x, w)  c = mine.act(m)  m__1 = MatMul(c, v)  h = mine.act(m__1)  y = MatMul(h, o)
            }
            <domain: "mine", opset_import: ["": 17]> act (x) => (y) { m = Relu(x)  c = Neg(m)  y = Tanh(c) }""",
            {"w": (5, 8), "v": (8, 6), "o": (6, 3)},
        ),
        14,
    ),
    "called in a branch": (
        lambda: _function_model(
            """<ir_version: 9, opset_import: ["": 17, "mine": 1]>
            net (float[N,5] x, bool flag) => (float[N,3] y) <float[5,8] w, float[8,6] v, float[6,3] o> {
                h = MatMul(x, w)
                g = If(flag) < then_branch = yes () => (float[N,6] u) { u = mine.layer(h, v) },
                               else_branch = no () => (float[N,6] t) { t = MatMul(h, v) } >
                y = MatMul(g, o)
            }
            <domain: "mine", opset_import: ["": 17]> layer (a, b) => (c) { m = MatMul(a, b)  c = Relu(m) }""",
            {"w": (5, 8), "v": (8, 6), "o": (6, 3)},
        ),
        14,
    ),
}


def _overloaded() -> ModelProto:
    """IR 10: two functions of one name, told apart by their overload."""
    proto = _function_model(
        """<ir_version: 10, opset_import: ["": 21, "mine": 1]>
        net (float[N,5] x) => (float[N,3] y) <float[5,8] w, float[8,6] v, float[6,3] o> {
            h = mine.layer(x, w)  g = mine.layer(h, v)  y = MatMul(g, o)
        }
        <domain: "mine", opset_import: ["": 21]> layer (a, b) => (c) { m = MatMul(a, b)  c = Relu(m) }
        <domain: "mine", opset_import: ["": 21]> layer (a, b) => (c) { m = MatMul(a, b)  c = Tanh(m) }""",
        {"w": (5, 8), "v": (8, 6), "o": (6, 3)},
    )
    for overload, function, node in zip(
        ("relu", "tanh"), proto.functions, proto.graph.node, strict=False
    ):
        function.overload = node.overload = overload
    return proto


FUNCTIONS["overloads"] = (_overloaded, 14)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_local_functions_are_inlined_and_pruned(tmp_path: Path, name: str) -> None:
    make, units = FUNCTIONS[name]
    proto = make()
    onnx.checker.check_model(proto)
    model = load(proto, tmp_path)
    assert not model.proto.functions
    onnx.checker.check_model(model.proto, full_check=True)
    # Before 1.27 the runtime takes one of two overloads for both.
    if name != "overloads" or RUNTIME >= (1, 27):
        _same(proto, model)
    coupling = couple(model)
    assert coupling.n_units == units, coupling.pinned
    assert_exact(model, coupling, keep_one(coupling, np.random.default_rng(0)))


def test_value_infos_in_bodies_follow_the_cut(tmp_path: Path) -> None:
    model = load(build(LOOP), tmp_path)
    coupling = couple(model)
    cut = rewrite.cut(model, coupling, keep_one(coupling, np.random.default_rng(0)))
    body = next(g for g in list(subgraphs.graphs(cut.graph))[1:])
    sizes = [
        d.dim_value
        for v in (*body.input, *body.output)
        for d in v.type.tensor_type.shape.dim
        if d.dim_value
    ]
    assert sizes == [1, 1]  # the carried tensor, of twelve channels before
    assert body.input[2].type.tensor_type.elem_type == TensorProto.FLOAT


def test_constants_of_nested_bodies_are_stored_once(tmp_path: Path) -> None:
    """A copy that stays in an inner body makes an invalid file, if the graph around it has the constant too."""
    body = "r9 = Neg(h)"
    for level in range(8, 0, -1):
        body = f"""c{level} = Constant<value_float = {level}.0>()  a{level} = Add(h, c{level})
            i{level} = If(flag) <
                then_branch = yes () => (float[N,4] r{level + 1}) {{ {body} }},
                else_branch = no () => (float[N,4] v{level}) {{ v{level} = Neg(a{level}) }}
            >
            r{level} = Add(i{level}, a{level})"""
    head = "(float[N,6] x, bool flag) => (float[N,4] y) <float[6,4] w>"
    proto = build(f"{head} {{ h = MatMul(x, w)  {body}  y = Identity(r1) }}")
    model = load(proto, tmp_path)
    made = [node.op_type for node in subgraphs.nodes(model.proto.graph)]
    assert "Constant" not in made
    _same(proto, model)
