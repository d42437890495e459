"""Parts of a graph: they compute what the whole graph computes, run nothing twice and hold nothing for longer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cases import CASES
from graphs import ATTENTION, GROUPED, RESIDUAL, activations, build, feed, load
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from onnx_oamip.core.records import Array, Model
from onnx_oamip.data import dataset
from onnx_oamip.data import feeds as feed_batches
from onnx_oamip.data.feeds import feeds_within_memory
from onnx_oamip.graph import partial_execution
from onnx_oamip.graph.partial_execution import Frontier, Slicer, element_types
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.subgraphs import reads

BRANCHES = """(float[N,3,6,6] x, float[N,8,6,6] z) => (float[] y, float[] e)
<float[8,3,3,3] w1, float[6,8,1,1] w2, float[8,6,3,3] w3, float[4,14,1,1] w4, float[4] b4> {
    a = Conv<pads = [1, 1, 1, 1]>(x, w1)
    h = Relu(a)
    b = Conv(h, w2)
    r = Relu(b)
    c = Conv<pads = [1, 1, 1, 1]>(r, w3)
    s = Add(h, c)
    t = Add(s, z)
    k = Concat<axis = 1>(t, r)
    p, q = Split<axis = 1>(k, parts)
    e = ReduceMax(q)
    y = Conv(k, w4, b4)
}""".replace("float[4] b4>", "float[4] b4, int64[2] parts = {8, 6}>")
CAPTURES = """(float[N,5] x, bool flag) => (float[] y, float[] z)
<float[5,6] w1, float[6,8] w2, float[8,3] w3, float[8] c> {
    a = MatMul(x, w1)
    r = Relu(a)
    h = MatMul(r, w2)
    m = Add(h, c)
    k = MatMul(m, w3)
    o = If(flag) <
        then_branch = yes () => (float[N,8] u) { i = Add(h, c) u = Relu(i) },
        else_branch = no () => (float[N,8] v) { v = Neg(h) }
    >
    z = Relu(k)
    y = MatMul(o, w3)
}"""
NETS = {
    "branches": BRANCHES,
    "residual": RESIDUAL,
    "grouped": GROUPED,
    "attention": ATTENTION,
    "captures": CAPTURES,
}


@pytest.fixture(params=NETS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    return load(build(NETS[request.param]), tmp_path)


def _feeds(model: Model) -> list[dict[str, Array]]:
    return [feed(model, seed, batch) for seed, batch in enumerate((3, 2, 4))]


def _frontier(model: Model, feeds: list[dict[str, Array]]) -> Frontier:
    return Frontier(model.proto, feeds, element_types(model.proto, model.dtypes), "cpu")


def _made(model: Model) -> list[str]:
    return [name for node in model.nodes for name in node.outputs if name]


def _assert_values(
    model: Model, feeds: list[dict[str, Array]], found: dict[str, list[Array]]
) -> None:
    for i, values in enumerate(feeds):
        truth = activations(model, values, list(found))
        for name, columns in found.items():
            assert len(columns) == len(feeds)
            # A part may be fused in another way than the whole.
            np.testing.assert_allclose(
                columns[i], truth[name], rtol=1e-5, atol=1e-5 * np.abs(truth[name]).max()
            )
            assert columns[i].dtype == truth[name].dtype


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Names of the nodes of every part that was run."""
    seen: list[list[str]] = []

    class Recorder(Session):
        def __init__(self, proto: ModelProto, device: str, *args: object, **named: object) -> None:
            seen.append([node.name for node in proto.graph.node])
            super().__init__(proto, device, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(partial_execution, "Session", Recorder)
    return seen


# ------------------------------------------------------------------------------------------------------- frontier


def test_frontier_computes_every_tensor_in_order(model: Model, runs: list[list[str]]) -> None:
    feeds = _feeds(model)
    frontier = _frontier(model, feeds)
    for name in _made(model):
        _assert_values(model, feeds, frontier.reach([name]))
    ran = [name for part in runs for name in part]
    assert sorted(ran) == sorted(node.name for node in model.nodes)


@pytest.mark.parametrize("seed", range(3))
def test_frontier_computes_requested_tensors_only(
    model: Model, runs: list[list[str]], seed: int
) -> None:
    """Any tensors, several at once, in the order of the graph: nodes between them run once, others never."""
    rng = np.random.default_rng(seed)
    feeds = _feeds(model)
    frontier = _frontier(model, feeds)
    names = _made(model)
    asked = [names[i] for i in np.sort(rng.choice(len(names), 4, replace=False))]
    for part in (asked[:1], asked[1:3], asked[3:]):
        _assert_values(model, feeds, frontier.reach(part))
    ran = [name for part in runs for name in part]
    slicer = Slicer(model.proto)
    assert sorted(ran) == sorted(slicer.nodes[i].name for i in slicer.needed(asked, ()))


def test_held_tensors_are_not_recomputed(tmp_path: Path, runs: list[list[str]]) -> None:
    model = load(build(BRANCHES), tmp_path)
    frontier = _frontier(model, _feeds(model))
    first = frontier.reach(["r"])["r"]
    again = frontier.reach(["r"])["r"]
    assert all(a is b for a, b in zip(again, first, strict=True))
    assert len(runs) == 1
    frontier.reach(["c"])
    again = frontier.reach(["r"])["r"]
    assert all(a is b for a, b in zip(again, first, strict=True))
    assert runs[1:] == [[model.nodes[4].name]]


def test_tensors_are_released_after_their_last_consumer(tmp_path: Path) -> None:
    """By hand, along the residual and the concatenation."""
    model = load(build(BRANCHES), tmp_path)
    frontier = _frontier(model, _feeds(model))
    held = [
        ("a", {"a"}),
        ("h", {"h"}),
        ("b", {"h", "b"}),
        ("r", {"h", "r"}),
        ("c", {"h", "r", "c"}),
        ("s", {"r", "s"}),
        ("t", {"r", "t"}),
        ("k", {"k"}),
        ("q", {"k", "q"}),
        ("e", {"k", "e"}),
        ("y", {"y"}),
    ]
    for name, expected in held:
        frontier.reach([name])
        assert set(frontier.tensors) == expected, name


def test_feeds_are_read_only_for_graph_inputs(tmp_path: Path) -> None:
    """A feed may be augmented on access, which takes longer than the nodes."""
    model = load(build(RESIDUAL), tmp_path)
    read: list[int] = []

    class Feeds(list[dict[str, Array]]):
        def __getitem__(self, place: Any) -> Any:
            read.append(place)
            return super().__getitem__(place)

    frontier = _frontier(model, Feeds(_feeds(model)))
    for name in _made(model):
        frontier.reach([name])
    assert read == [0, 1, 2]


def _within(model: Model, feeds: list[dict[str, Array]], limit: int) -> Frontier:
    types = element_types(model.proto, model.dtypes)
    return Frontier(model.proto, feeds, types, "cpu", memory_limit=limit)


def test_nodes_run_again_where_their_results_exceed_the_memory(
    tmp_path: Path, runs: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one of the narrowest tensors fits for all feeds."""
    monkeypatch.setattr(partial_execution, "REPEATS", 99)
    model = load(build(BRANCHES), tmp_path)
    feeds = [feed(model, seed, 3) for seed in range(3)]
    narrow = 4 * 9 * min(int(np.prod(model.shapes[n][1:])) for n in ("a", "h", "b", "r"))
    frontier = _within(model, feeds, narrow)
    for name in ("a", "h", "b", "r", "c", "s", "t", "k", "q", "e", "y"):
        _assert_values(model, feeds, frontier.reach([name]))
        held = sum(v.nbytes for column in frontier.tensors.values() for v in column)
        assert held <= narrow
    assert frontier.batches == len(feeds)
    ran = [name for part in runs for name in part]
    assert len(ran) > len(model.nodes)


def test_feeds_are_left_out_where_nodes_would_repeat_too_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(build(BRANCHES), tmp_path)
    feeds = [feed(model, seed, 3) for seed in range(3)]
    monkeypatch.setattr(partial_execution, "REPEATS", 0)
    size = 4 * 3 * int(np.prod(model.shapes["a"][1:]))
    frontier = _within(model, feeds, 2 * size)
    _assert_values(model, feeds[:2], frontier.reach(["a"]))
    assert frontier.batches == 2
    _assert_values(model, feeds[:2], frontier.reach(["a"]))


def test_captured_tensors_are_held_for_the_branch(tmp_path: Path) -> None:
    model = load(build(CAPTURES), tmp_path)
    feeds = _feeds(model)
    frontier = _frontier(model, feeds)
    frontier.reach(["z"])
    assert set(frontier.tensors) == {"z", "h"}
    _assert_values(model, feeds, frontier.reach(["y"]))
    assert set(frontier.tensors) == {"y"}


def test_changes_behind_the_frontier_take_effect(tmp_path: Path) -> None:
    """Weights and nodes that are not reached yet may change, as they do in a refit."""
    model = load(build(RESIDUAL), tmp_path)
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    feeds = _feeds(model)
    frontier = Frontier(proto, feeds, element_types(model.proto, model.dtypes), "cpu")
    (before,) = frontier.reach(["f"]).values()
    weight = next(t for t in proto.graph.initializer if t.name == "w4")
    weight.CopyFrom(onnx.numpy_helper.from_array(2 * model.constants["w4"], "w4"))
    node = next(n for n in proto.graph.node if n.op_type == "MatMul")
    node.output[0] = "half"
    proto.graph.node.append(helper.make_node("Add", ["half", "half"], ["y"], "twice"))
    (after,) = frontier.reach(["y"]).values()
    for x, y in zip(before, after, strict=True):
        np.testing.assert_allclose(y, 4 * x @ model.constants["w4"], rtol=1e-5, atol=1e-5)


def test_types_unknown_to_shape_inference_are_measured(tmp_path: Path) -> None:
    """Behind an operator of another domain a tensor's type is only known once it is there."""
    text = """(float[N,5] x) => (float[N,3] y) <float[5,8] w1, float[8,3] w2> {
        a = MatMul(x, w1)
        g = com.microsoft.Trilu(a)
        r = Relu(g)
        y = MatMul(r, w2)
    }"""
    model = load(build(text, domains={"com.microsoft": 1}), tmp_path)
    assert "g" not in model.dtypes
    feeds = _feeds(model)
    frontier = _frontier(model, feeds)
    for name in ("a", "g", "r", "y"):
        found = frontier.reach([name])[name]
        for values, part in zip(feeds, found, strict=True):
            a = values["x"] @ model.constants["w1"]
            g = np.triu(a)
            expected = {
                "a": a,
                "g": g,
                "r": np.maximum(g, 0),
                "y": np.maximum(g, 0) @ model.constants["w2"],
            }[name]
            np.testing.assert_allclose(part, expected, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- slicer


def _random_graph(edges: list[list[int]], two: list[bool]) -> ModelProto:
    """Node i sums what the listed earlier tensors hold; tensor 0 is the input; some nodes have two outputs."""
    nodes = []
    tensors = ["x"]
    for i, (sources, double) in enumerate(zip(edges, two, strict=True)):
        read = [tensors[s % len(tensors)] for s in sources]
        if double:
            outs = [f"t{i}", f"u{i}"]
            nodes.append(helper.make_node("Split", [read[0]], outs, f"n{i}", axis=0))
        else:
            outs = [f"t{i}"]
            nodes.append(helper.make_node("Sum", read, outs, f"n{i}"))
        tensors += outs
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    graph = helper.make_graph(
        nodes, "random", [x], [helper.make_tensor_value_info(tensors[-1], 1, None)]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7)


one_node = st.tuples(st.lists(st.integers(0, 30), min_size=1, max_size=3), st.booleans())


@hypothesis_settings(max_examples=150)
@given(st.lists(one_node, min_size=1, max_size=14), st.data())
def test_needed_and_descendants_are_reachability(
    nodes: list[tuple[list[int], bool]], draw: st.DataObject
) -> None:
    proto = _random_graph([e for e, _ in nodes], [t for _, t in nodes])
    slicer = Slicer(proto)
    listed = list(proto.graph.node)
    tensors = ["x", *(o for n in listed for o in n.output)]
    given_ = draw.draw(st.sets(st.sampled_from(tensors), max_size=3))
    targets = draw.draw(st.sets(st.sampled_from(tensors), min_size=1, max_size=3))

    # Backwards, one step at a time, until nothing is added; a given tensor asks for nothing.
    wanted, found = targets - given_, set()
    while True:
        new = {i for i, n in enumerate(listed) if set(n.output) & wanted} - found
        if not new:
            break
        found |= new
        wanted |= {name for i in new for name in listed[i].input} - given_
    assert slicer.needed(targets, given_) == sorted(found)

    # Forwards by paths: a node depends on a tensor where it reads it, or reads what such a node makes.
    def depends(i: int) -> bool:
        return any(
            name in targets or any(depends(j) for j in range(i) if name in listed[j].output)
            for name in listed[i].input
        )

    assert slicer.descendants(targets) == {i for i in range(len(listed)) if depends(i)}


def test_captures_of_branches_count_as_reads(tmp_path: Path) -> None:
    model = load(build(CAPTURES), tmp_path)
    slicer = Slicer(model.proto)
    branch = next(i for i, n in enumerate(slicer.nodes) if n.op_type == "If")
    assert {"flag", "h", "c"} <= set(slicer.reads[branch])
    assert slicer.needed(["o"], ()) == [0, 1, 2, branch]
    assert slicer.needed(["o"], ["h"]) == [branch]
    assert {branch, slicer.producer["y"]} <= slicer.descendants(["h"])
    assert slicer.descendants(["c"]) == {branch, *(slicer.producer[n] for n in "mkyz")}


@pytest.mark.parametrize(
    "name",
    [
        "residual",
        "squeeze-excite",
        "attention",
        "dense-block",
        "if-reads-an-outer-tensor",
        "lrn-twice",
        "concat-split-cascade",
        "shape-driven-reshape",
    ],
)
def test_extracted_part_is_valid_and_gives_the_same_outputs(name: str, tmp_path: Path) -> None:
    """Cut every graph at every tensor: front and back together are the whole."""
    model = load(next(c for c in CASES if c.name == name).make(), tmp_path)
    slicer = Slicer(model.proto)
    types = element_types(model.proto, model.dtypes)
    values = feed(model, 0, 2)
    outputs = [p.name for p in model.outputs]
    truth = Session(model.proto, "cpu").run(values)
    everything = activations(model, values, [n for n in _made(model) if n in model.dtypes])
    assert truth
    assert everything
    for cut in everything:
        back = slicer.needed(outputs, [cut])
        part = slicer.model(back, outputs, types)
        made = {o for i in back for o in slicer.nodes[i].output}
        read = {n for i in back for n in slicer.reads[i]} | (set(outputs) - made)
        assert {v.name for v in part.graph.input} == read - made - set(model.constants)
        assert {t.name for t in part.graph.initializer} == read & set(model.constants)
        session = Session(part, "cpu")
        found = session.run({n: {**values, **everything}[n] for n in session.inputs}, outputs)
        for a, b in zip(truth, found, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * max(np.abs(a).max(), 1e-3))


def test_reads_lists_inputs_once(tmp_path: Path) -> None:
    model = load(build(CAPTURES), tmp_path)
    for node in model.proto.graph.node:
        found = reads(node)
        assert len(found) == len(set(found))


# ---------------------------------------------------------------------------------------------- what memory allows


def test_feeds_are_limited_by_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three largest activations of BRANCHES hold 14, 8 and 8 images of 6 x 6 floats for one sample."""
    model = load(build(BRANCHES), tmp_path)
    count = 50
    found = dataset.load(feed(model, 0, count), model)
    assert found is not None
    sample = 4 * (14 + 8 + 8) * 36
    cases = (
        (10**9, 16, [16, 16, 16, 2]),
        (20 * sample, 16, [16]),
        (32 * sample, 16, [16, 16]),
        (33 * sample, 11, [11, 11, 11]),
        (7 * sample, 16, [7]),
        (sample // 2, 16, [1]),
    )
    for room, size, expected in cases:
        monkeypatch.setattr(feed_batches, "DEFAULT_MEMORY_LIMIT", room)
        feeds, used = feeds_within_memory(model, found, size)
        assert [len(f["x"]) for f in feeds] == expected
        assert used == sum(expected)
        np.testing.assert_array_equal(
            np.concatenate([f["x"] for f in feeds]), found.arrays["x"][:used]
        )
