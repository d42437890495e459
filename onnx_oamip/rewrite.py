"""Cut the model: shrink constants along labelled axes, then repair the operators that carry sizes.

The cut itself is generic: every constant is compressed along every axis on which units were removed. Only operators
with a ``repair`` rule need more.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper

from .model import restore
from .ops import Edit, lookup
from .records import Array, Axis, Bools, Coupling, Ints, Model


class _Cuts:
    """Implements ``ops.Cuts`` for one model and one choice of units."""

    def __init__(self, model: Model, coupling: Coupling, units: Bools) -> None:
        self._model = model
        self.masks: dict[Axis, Bools] = {}
        for key in coupling.axes:
            mask = coupling.keep(key, units)
            if not mask.all():
                self.masks[key] = mask

    def shape(self, tensor: str) -> tuple[int, ...]:
        return self._model.shapes[tensor]

    def constant(self, tensor: str) -> Array | None:
        return self._model.constants.get(tensor)

    def keep(self, tensor: str, axis: int) -> Bools | None:
        return self.masks.get((tensor, axis))

    def kept(self, tensor: str, axis: int) -> int:
        mask = self.masks.get((tensor, axis))
        return self._model.shapes[tensor][axis] if mask is None else int(mask.sum())


def cut(model: Model, coupling: Coupling, units: Bools) -> onnx.ModelProto:
    """The model without the units that ``units`` (n_units,) leaves out. No refit."""
    cuts = _Cuts(model, coupling, units)
    edits: dict[str, Edit] = {}
    for node in model.nodes:
        spec = lookup(node.domain, node.op, node.version)
        if spec is not None and spec.repair is not None and not node.captures:
            edit = spec.repair(node, cuts)
            if edit != Edit():
                edits[node.name] = edit
    graph = gs.import_onnx(model.proto)
    tensors = graph.tensors()
    shrunk = {tensor for tensor, _ in cuts.masks if tensor in model.constants}
    for name in shrunk:
        tensors[name].values = compress(model.constants[name], name, cuts.masks)
    for node in graph.nodes:
        if node.name in edits:
            _apply(node, edits[node.name])
            spread = edits[node.name].spread
            if spread is not None:
                _spread(graph, node, spread, cuts, model)
    # A repaired node has its own copy of the constant it read before; drop those nobody reads any more.
    graph.cleanup(recurse_subgraphs=False, remove_unused_graph_inputs=False)
    graph.toposort(recurse_subgraphs=False)
    result: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
    restore(result, model.proto)
    return result


def compress(value: Array, name: str, masks: Mapping[Axis, Bools]) -> Array:
    """An array cut along all its axes that have a mask."""
    for axis in range(value.ndim):
        mask = masks.get((name, axis))
        if mask is not None:
            value = np.compress(mask, value, axis=axis)
    return np.ascontiguousarray(value)


def _spread(graph: gs.Graph, node: gs.Node, axis: int, cuts: _Cuts, model: Model) -> None:
    """Zeros at removed channels before the node (one is padded on, then gathered), only kept ones after it."""
    source, out = node.inputs[0], node.outputs[0]
    keep = cuts.masks[source.name, axis]
    rank = len(model.shapes[source.name])
    taken = {n.name for n in graph.nodes} | set(graph.tensors())

    def step(op: str, inputs: list[gs.Tensor], name: str, to: gs.Tensor | None = None, **attrs: object) -> gs.Tensor:
        # A model that was pruned before has such nodes already.
        unique = _unused(f"{node.name}_{name}", taken)
        taken.add(unique)
        found = to if to is not None else gs.Variable(f"{unique}_out")
        graph.nodes.append(gs.Node(op, unique, attrs, inputs, [found]))
        return found

    def constant(name: str, value: Ints) -> gs.Constant:
        unique = _unused(f"{node.name}_{name}", taken)
        taken.add(unique)
        return gs.Constant(unique, value)

    pads = np.zeros(2 * rank, np.int64)
    pads[rank + axis] = 1
    if graph.opset < 11:
        padded = step("Pad", [source], "zero", pads=pads.tolist())
    else:
        padded = step("Pad", [source, constant("zero_pads", pads)], "zero")
    index = np.where(keep, np.cumsum(keep) - 1, keep.sum()).astype(np.int64)
    node.inputs[0] = step("Gather", [padded, constant("spread_index", index)], "spread", axis=axis)
    unique = _unused(f"{node.name}_full_out", taken)
    node.outputs[0] = gs.Variable(unique)
    kept = constant("kept_index", np.flatnonzero(keep).astype(np.int64))
    step("Gather", [node.outputs[0], kept], "kept", out, axis=axis)


def _unused(name: str, taken: set[str]) -> str:
    result, i = name, 1
    while result in taken or f"{result}_out" in taken:
        result, i = f"{name}_{i}", i + 1
    return result


def _apply(node: gs.Node, edit: Edit) -> None:
    for key, value in edit.attrs.items():
        if value is None:
            node.attrs.pop(key, None)
        else:
            node.attrs[key] = value
    for slot, value in edit.inputs.items():
        while len(node.inputs) <= slot:
            node.inputs.append(gs.Variable.empty())
        node.inputs[slot] = gs.Constant(f"{node.name}_input{slot}_pruned", np.asarray(value))


def mask(model: Model, coupling: Coupling, units: Bools) -> onnx.ModelProto:
    """The original graph with removed channels multiplied by zero where consumers read them: the reference."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    nodes = {node.name: node for node in proto.graph.node}
    made: dict[Axis, str] = {}
    before: dict[str, list[onnx.NodeProto]] = {}
    for i, consumer in enumerate(coupling.consumers):
        key = (consumer.data, consumer.axis)
        keep = coupling.keep(key, units)
        if keep.all():
            continue
        node = nodes[consumer.node]
        if key not in made:
            view = [1] * len(model.shapes[consumer.data])
            view[consumer.axis] = -1
            values = keep.reshape(view).astype(model.dtypes[consumer.data])
            made[key] = f"oamip_masked_{i}"
            proto.graph.initializer.append(numpy_helper.from_array(values, f"oamip_mask_{i}"))
            mul = helper.make_node("Mul", [consumer.data, f"oamip_mask_{i}"], [made[key]], f"oamip_apply_mask_{i}")
            before.setdefault(consumer.node, []).append(mul)
        node.input[consumer.slot] = made[key]
    ordered = [part for node in proto.graph.node for part in (*before.get(node.name, ()), node)]
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in ordered]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
    return proto
