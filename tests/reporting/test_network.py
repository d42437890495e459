"""Graph of a network on a page: boxes, edges, blocks and places."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import CNN, build

from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.loading import load
from onnx_oamip.reporting.html.network import MOST, Box, Network, _blocks, network

RESIDUAL = onnx.parser.parse_model("""
<ir_version: 8, opset_import: ["": 17]>
g (float[1, 4] x) => (float[1, 4] y)
<float[4, 4] a = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1},
 float[4, 4] b = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}> {
  [first] h = MatMul(x, a)
  r = Relu(h)
  [second] s = MatMul(r, b)
  [sum] y = Add(s, r)
}
""")


def test_joins_and_layers_are_boxes_and_other_nodes_are_edges() -> None:
    model = load(RESIDUAL)
    coupling = couple(model)
    found = network(model, coupling, np.ones(coupling.n_units, bool))
    assert [(box.name, box.kind) for box in found.boxes] == [
        ("x", "input"),
        ("first", "MatMul"),
        ("second", "MatMul"),
        ("sum", "Add"),
        ("y", "output"),
    ]
    assert found.edges == {(0, 1), (1, 2), (1, 3), (2, 3), (3, 4)}
    assert [row for _, row in found.places()] == [0, 1, 2, 3, 4]


def test_widths_are_those_of_the_plan() -> None:
    model = load(build(CNN))
    coupling = couple(model)
    keep = np.ones(coupling.n_units, bool)
    group = coupling.groups[0]
    keep[group.units[:2]] = False
    changed = [b for b in network(model, coupling, keep).boxes if b.before != b.after]
    assert changed
    for box in changed:
        assert box.before is not None
        assert box.after is not None
        assert 0 < box.after < box.before


def test_branches_stand_side_by_side_around_the_middle() -> None:
    boxes = [Box(name, "Conv") for name in "abcd"]
    places = Network(boxes, frozenset({(0, 1), (0, 2), (1, 3), (2, 3)})).places()
    assert places == [(0.0, 0), (-0.5, 1), (0.5, 1), (0.0, 2)]


def test_order_in_a_row_avoids_crossings() -> None:
    """Two chains from one start: their boxes keep their sides, in whatever order the graph has them."""
    boxes = [Box(name, "Conv") for name in ("start", "l1", "r1", "r2", "l2")]
    places = Network(boxes, frozenset({(0, 1), (0, 2), (1, 4), (2, 3)})).places()
    assert np.sign(places[1][0]) == np.sign(places[4][0])
    assert np.sign(places[2][0]) == np.sign(places[3][0])
    assert places[1][0] != places[2][0]


@pytest.mark.parametrize("named", [True, False])
def test_large_networks_are_drawn_in_blocks(named: bool) -> None:
    count = 6 * MOST
    names = [f"/stage{i // 12}/layer{i}/Conv" if named else f"Conv_{i}" for i in range(count)]
    chain = Network(
        [Box(name, "Conv", 10, 4) for name in names],
        frozenset((i, i + 1) for i in range(count - 1)),
    )
    found = _blocks(chain)
    assert len(found.boxes) <= MOST
    assert sum(box.before or 0 for box in found.boxes) == 10 * count
    assert sum(box.after or 0 for box in found.boxes) == 4 * count
    assert found.edges == {(i, i + 1) for i in range(len(found.boxes) - 1)}
    if named:
        assert found.boxes[0] == Box("/stage0", "12 layers", 120, 48)
    else:
        assert found.boxes[0] == Box("Conv_0 … Conv_5", "6 layers", 60, 24)
