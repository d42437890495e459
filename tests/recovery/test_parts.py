"""The part of a graph that is trained where a node cannot be computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from graphs import build, load

from onnx_oamip.core.records import Model, Node
from onnx_oamip.recovery import parts

CHAIN = """(float[N, 6] x) => (float[N, 3] y)
<float[6, {front}] w1, float[{front}, 4] w2, float[4, {behind}] w3, float[{behind}, 3] w4> {{
    a = MatMul(x, w1)
    b = MatMul(a, w2)
    c = Relu(b)
    d = MatMul(c, w3)
    y = MatMul(d, w4)
}}"""


def chain(folder: Path, front: int, behind: int) -> tuple[Model, str]:
    """Two products, a node that cannot be computed, and two more products."""
    model = load(build(CHAIN.format(front=front, behind=behind)), folder)
    return model, next(node.name for node in model.nodes if node.op == "Relu")


def weights(nodes: Sequence[Node]) -> list[str]:
    """Constants of products."""
    return [node.inputs[1] for node in nodes if node.op == "MatMul"]


def test_whole_graph_is_trained_if_all_can_be_computed(tmp_path: Path) -> None:
    model, _ = chain(tmp_path, 5, 5)
    part = parts.choose(model, ["a", "y"], (), weights)
    assert part == parts.Part(("a", "y"), (), ("w1", "w2", "w3", "w4"))


@pytest.mark.parametrize(
    ("front", "behind", "expected"),
    [
        (50, 5, parts.Part(("a",), (), ("w1",))),
        (5, 50, parts.Part(("d", "y"), ("c",), ("w3", "w4"))),
    ],
    ids=["front", "behind"],
)
def test_larger_part_is_trained(
    front: int, behind: int, expected: parts.Part, tmp_path: Path
) -> None:
    model, blocked = chain(tmp_path, front, behind)
    assert parts.choose(model, ["a", "d", "y"], [blocked], weights) == expected


def test_nothing_is_trained_if_every_weight_is_in_front_of_the_node(tmp_path: Path) -> None:
    text = "(float[N, 6] x) => (float[N, 4] y) <float[6, 4] w1> { a = MatMul(x, w1) y = Relu(a) }"
    model = load(build(text), tmp_path)
    part = parts.choose(model, ["y"], [model.nodes[1].name], weights)
    assert not part.weights


def test_weight_that_the_blocked_node_depends_on_stays(tmp_path: Path) -> None:
    """Weights that ONNX Runtime computes with stay as they are, as its results would not fit new ones."""
    text = """(float[N, 4] x) => (float[N, 4] y) <float[4, 4] w1, float[4, 4] w2> {
        a = MatMul(x, w1)
        c = Relu(a)
        s = Add(a, c)
        y = MatMul(s, w2)
    }"""
    model = load(build(text), tmp_path)
    blocked = next(node.name for node in model.nodes if node.op == "Relu")
    part = parts.choose(model, ["y"], [blocked], weights)
    assert part == parts.Part(("y",), ("c",), ("w2",))
