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


def _running_sum(node: Node, labels: Labels) -> None:
    """Step 1. CumSum: axes pass through, and the summed one must keep its order and its length."""
    axes = labels.axes(node.inputs[0])
    axis = labels.constant(node.inputs[1])
    if axis is None:
        ops.opaque(node, labels, f"{node} takes its axis from a computation")
        return
    labels.pin(axes[int(axis)], f"{node} sums along it")
    labels.set(node.outputs[0], axes)


ENTRY = OpSpec("CumSum", _running_sum, since=11, traits=Trait.PIECEWISE)
"""Step 2."""


def _network(axis: int) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(CHANNELS, 3, 3, 3)).astype(np.float32),
        "v": rng.normal(size=(2, CHANNELS, 1, 1)).astype(np.float32),
        "axis": np.asarray(axis, np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], "first"),
        helper.make_node("CumSum", ["h", "axis"], ["s"], "sums"),
        helper.make_node("Conv", ["s", "v"], ["y"], "last"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 6, 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2, 4, 4])
    held = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "toy", [x], [y], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_unknown_operator_pins_the_channels_it_reads(tmp_path: Path) -> None:
    assert ops.lookup("", ENTRY.name, 17) is None
    assert couple(load(_network(3), tmp_path)).n_units == 0


@pytest.mark.parametrize(("axis", "units"), [(3, CHANNELS), (2, CHANNELS), (1, 0)])
def test_operator_needs_one_table_entry_only(
    axis: int, units: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 4 and 6: the units counted by hand, and the pruned model equals the masked one."""
    monkeypatch.setattr(ops, "_TABLE", ops._index((*ops.REGISTRY, ENTRY)))
    model = load(_network(axis), tmp_path)
    coupling = couple(model)
    assert coupling.n_units == units
    if not units:
        assert any("sums along it" in pinned.reason for pinned in coupling.pinned)
        return
    keep = random_keep(coupling, np.random.default_rng(1), 0.5)
    assert 0 < keep.sum() < units
    cut = assert_exact(model, coupling, keep, 1e-5, (1, 3))
    (weight,) = (t for t in cut.graph.initializer if list(t.dims)[1:] == [3, 3, 3])
    assert weight.dims[0] == keep.sum()
    assert ops.has(model.nodes[1], Trait.PIECEWISE)
    assert not ops.has(model.nodes[0], Trait.PIECEWISE)


def test_entries_with_overlapping_versions_are_refused() -> None:
    with pytest.raises(ValueError, match="two entries for operator CumSum cover the same versions"):
        ops._index((ENTRY, ENTRY))


def test_contributing_steps_name_every_facet() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    _, _, section = text.partition("## Add an operator\n")
    steps, _, _ = section.partition("\n## ")
    assert steps.count("\n1. ") == 1
    missing = [f.name for f in fields(OpSpec) if f"`{f.name}`" not in steps]
    assert missing == ["name", "channels"]  # the positional ones: OpSpec(name, rule)
    assert Path(__file__).name in steps
