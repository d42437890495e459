"""Order of nodes: unsorted graphs are sorted at load, cycles are refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import assert_exact, build, distance, feed, keep_one, load
from onnx import ModelProto

from onnx_oamip.core.errors import ModelError
from onnx_oamip.graph import node_order, subgraphs
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session

CHAIN = """(float[N,6] x, bool c) => (float[N,4] y) <float[6,12] w1, float[12,12] w2, float[12,4] w3> {
    a = MatMul(x, w1)
    r = Relu(a)
    o = If(c) <
        then_branch = then () => (float[N,12] t) { m = MatMul(r, w2)  s = Relu(m)  t = Add(s, r) },
        else_branch = other () => (float[N,12] e) { e = Neg(r) }>
    y = MatMul(o, w3)
}"""


def _reversed(proto: ModelProto, bodies: bool) -> ModelProto:
    result = ModelProto.FromString(proto.SerializeToString())
    graphs = list(subgraphs.graphs(result.graph))
    for graph in graphs if bodies else graphs[:1]:
        subgraphs.set_nodes(graph, list(graph.node)[::-1])
    return result


@pytest.mark.parametrize("bodies", [False, True])
def test_unsorted_graph_is_sorted_and_cut_exactly(tmp_path: Path, bodies: bool) -> None:
    proto = build(CHAIN)
    model = load(_reversed(proto, bodies), tmp_path)
    values = feed(model, 1, 2)
    assert distance(Session(proto, "cpu").run(values), Session(model.proto, "cpu").run(values)) == 0
    coupling = couple(model)
    assert coupling.n_units == 12
    assert_exact(model, coupling, keep_one(coupling, np.random.default_rng(0)))


def test_sorted_graph_keeps_its_order() -> None:
    proto = build(CHAIN)
    before = proto.SerializeToString(deterministic=True)
    node_order.sort(proto.graph)
    assert proto.SerializeToString(deterministic=True) == before


def test_nodes_move_no_further_than_they_must() -> None:
    # As converters to half precision leave a graph: the casts stand at the end.
    proto = build(
        "(float[N,2] x) => (float[N,2] y) { a = Neg(c)  b = Abs(x)  y = Add(a, b)  c = Cast<to = 1>(x) }"
    )
    node_order.sort(proto.graph)
    assert [node.output[0] for node in proto.graph.node] == ["b", "c", "a", "y"]


def test_cycle_is_refused_by_its_nodes(tmp_path: Path) -> None:
    text = "(float[N,2] x) => (float[N,2] y) { a = Add(x, c)  b = Relu(a)  c = Neg(b)  y = Abs(c) }"
    proto = build(text)
    with pytest.raises(
        ModelError, match=r"cycle of 3 nodes.*Add 'a' <- Neg 'c' <- Relu 'b' <- Add 'a'"
    ):
        load(proto, tmp_path)


def test_long_cycle_is_named_in_part(tmp_path: Path) -> None:
    long = "n" * 500
    chain = "  ".join(f"t{i} = Relu(t{i + 1})" for i in range(20))
    proto = build(f"(float[N,2] x) => (float[N,2] y) {{ {chain}  t20 = Add(x, t0)  y = Abs(t0) }}")
    proto.graph.node[0].name = long
    with pytest.raises(ModelError, match=r"cycle of 21 nodes.*15 more") as caught:
        load(proto, tmp_path)
    assert long not in str(caught.value)
