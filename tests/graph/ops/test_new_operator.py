"""The steps of "Add an operator" in CONTRIBUTING.md, for one that has no entry yet."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import ROOT
from graphs import assert_exact, load, random_keep
from onnx import TensorProto, helper, numpy_helper

from onnx_oamip.core.records import Node
from onnx_oamip.graph import ops
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.ops.handles import Labels
from onnx_oamip.graph.ops.spec import OpSpec, Trait

CHANNELS = 6


def _triangle(node: Node, labels: Labels) -> None:
    """Step 1. Trilu: axes pass through, and the two of the triangle must keep their order and their length."""
    axes = labels.axes(node.inputs[0])
    if len(axes) < 2:
        ops.opaque(node, labels, f"{node} reads a tensor of unknown shape")
        return
    for axis in axes[-2:]:
        labels.pin(axis, f"{node} takes a triangle of it")
    labels.set(node.outputs[0], axes)


ENTRY = OpSpec("Trilu", _triangle, since=14, traits=Trait.PIECEWISE)
"""Step 2."""


def _network(axis: int) -> onnx.ModelProto:
    """Two convolutions, with the triangle between them in a layout that has the channels at this axis."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(CHANNELS, 3, 3, 3)).astype(np.float32),
        "v": rng.normal(size=(2, CHANNELS, 1, 1)).astype(np.float32),
    }
    order = [0, 2, 3]
    order.insert(axis, 1)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], "first"),
        helper.make_node("Transpose", ["h"], ["t"], "there", perm=order),
        helper.make_node("Trilu", ["t"], ["s"], "triangle"),
        helper.make_node("Transpose", ["s"], ["b"], "back", perm=np.argsort(order).tolist()),
        helper.make_node("Conv", ["b", "v"], ["y"], "last"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 6, 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2, 4, 4])
    held = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "toy", [x], [y], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_unknown_operator_pins_the_channels_it_reads(tmp_path: Path) -> None:
    assert ops.lookup("", ENTRY.name, 17) is None
    assert couple(load(_network(1), tmp_path)).n_units == 0


@pytest.mark.parametrize(("axis", "units"), [(1, CHANNELS), (2, 0), (3, 0)])
def test_operator_needs_one_table_entry_only(
    axis: int, units: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 4 and 6: the units counted by hand, and the pruned model equals the masked one."""
    monkeypatch.setattr(ops, "_TABLE", ops._index((*ops.REGISTRY, ENTRY)))
    model = load(_network(axis), tmp_path)
    coupling = couple(model)
    assert coupling.n_units == units
    if not units:
        assert any("takes a triangle" in pinned.reason for pinned in coupling.pinned)
        return
    keep = random_keep(coupling, np.random.default_rng(1), 0.5)
    assert 0 < keep.sum() < units
    cut = assert_exact(model, coupling, keep, 1e-5, (1, 3))
    (weight,) = (t for t in cut.graph.initializer if list(t.dims)[1:] == [3, 3, 3])
    assert weight.dims[0] == keep.sum()
    assert ops.has(model.nodes[2], Trait.PIECEWISE)
    assert not ops.has(model.nodes[0], Trait.PIECEWISE)


def test_entries_with_overlapping_versions_are_refused() -> None:
    with pytest.raises(ValueError, match="two entries for operator Trilu cover the same versions"):
        ops._index((ENTRY, ENTRY))


def test_contributing_steps_name_every_facet() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    _, _, section = text.partition("## Add an operator\n")
    steps, _, _ = section.partition("\n## ")
    assert steps.count("\n1. ") == 1
    missing = [f.name for f in fields(OpSpec) if f"`{f.name}`" not in steps]
    assert missing == ["name", "channels"]  # the positional ones: OpSpec(name, rule)
    assert Path(__file__).name in steps
