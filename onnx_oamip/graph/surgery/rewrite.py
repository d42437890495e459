"""Cut the model: shrink constants along labelled axes, then repair the operators that carry sizes.

The cut itself is generic: every constant is compressed along every axis on which units were removed. Only operators
with a ``repair`` rule need more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper

from onnx_oamip.core.records import (
    Array,
    Axis,
    Bools,
    Consumer,
    Coupling,
    Model,
    Node,
)
from onnx_oamip.graph import external_data, subgraphs
from onnx_oamip.graph.loading import restore
from onnx_oamip.graph.ops import Edit, Trait, build, lookup, rule_errors
from onnx_oamip.graph.ops.inserted_nodes import (
    Added,
    Names,
    Present,
    again,
    scale,
    spread,
)


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
    touched = {tensor for tensor, _ in cuts.masks}
    for node in model.every:
        spec = lookup(node.domain, node.op, node.version)
        if touched.isdisjoint((*node.inputs, *node.outputs)):
            continue  # its shapes may not even be known
        if spec is not None and spec.edit.repair is not None and not node.captures:
            with rule_errors(node):
                edit = spec.edit.repair(node, cuts)
            if edit != Edit():
                edits[node.name] = edit
    if any(edit.spread is not None or edit.scale != 1.0 for edit in edits.values()):
        _reuse(edits, cuts, model)
    graph = gs.import_onnx(model.proto)
    known = {node.name: node for node in model.every}
    names = Names(model)
    for part in (graph, *graph.subgraphs(recursive=True)):
        tensors = part.tensors()
        for node in [n for n in part.nodes if n.name in edits]:
            edit = edits[node.name]
            _apply(node, edit)
            if edit.spread is not None:
                source = node.inputs[0].name
                keep = cuts.masks[source, edit.spread]
                rank = len(model.shapes[source])
                added = spread(known[node.name], rank, edit.spread, edit.ordered, keep, names)
                _add(part, node, added, tensors)
            if edit.scale != 1.0:
                added = scale(
                    known[node.name], edit.scale, model.dtypes[node.outputs[0].name], names
                )
                _add(part, node, added, tensors)
    # A repaired node has its own copy of the constant it read before; drop those nobody reads any more.
    graph.cleanup(remove_unused_graph_inputs=False)
    graph.toposort()
    result: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
    restore(result, model.proto)
    _declare(result.graph, cuts)
    aside = bool(external_data.references(model.proto))
    for tensor in result.graph.initializer:  # one after the other: a large model is not held twice
        if tensor.name in touched and tensor.name in model.constants:
            kept = compress(model.constants[tensor.name], tensor.name, cuts.masks)
            tensor.CopyFrom(external_data.tensor(kept, tensor.name, aside))
    return result


def _declare(graph: onnx.GraphProto, cuts: _Cuts) -> None:
    """What bodies say about the shapes of their inputs and outputs follows the cut."""
    for body in list(subgraphs.graphs(graph))[1:]:
        for value in (*body.input, *body.output):
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if dim.HasField("dim_value") and (value.name, axis) in cuts.masks:
                    dim.dim_value = cuts.kept(value.name, axis)


def compress(value: Array, name: str, masks: Mapping[Axis, Bools]) -> Array:
    """An array cut along all its axes that have a mask."""
    for axis in range(value.ndim):
        mask = masks.get((name, axis))
        if mask is not None:
            value = np.compress(mask, value, axis=axis)
    return np.ascontiguousarray(value)


def _reuse(edits: dict[str, Edit], cuts: _Cuts, model: Model) -> None:
    """Where a node has been restored before, edit the nodes that do it in place of adding more."""
    present = Present(model)
    for node in [n for n in model.every if n.name in edits]:
        edit = edits[node.name]
        if (
            edit.spread is not None
            and (around := present.spread(node, edit.spread, edit.ordered)) is not None
        ):
            axis = edit.spread
            before, inside = (
                np.ones(cuts.shape(t)[axis], bool) if (keep := cuts.keep(t, axis)) is None else keep
                for t in (around.source, node.inputs[0])
            )
            edits.update(again(around, axis, before, inside, model))
            # Where gathers place the zeros, the node's parameters stay in their places too.
            edits[node.name] = replace(
                edit, spread=None, inputs={} if around.ordered else edit.inputs
            )
        if edit.scale != 1.0 and (product := present.scale(node)) is not None:
            mul, slot = product
            number = model.constants[mul.inputs[slot]]
            edits[mul.name] = Edit(
                inputs={slot: np.asarray(number * np.float64(edit.scale), number.dtype)}
            )
            edits[node.name] = replace(edit, scale=1.0)


def _add(graph: gs.Graph, node: gs.Node, added: Added, tensors: dict[str, gs.Tensor]) -> None:
    """Put new nodes around a node."""

    def tensor(name: str) -> gs.Tensor:
        if name not in tensors:
            value = added.constants.get(name)
            tensors[name] = gs.Variable(name) if value is None else gs.Constant(name, value)
        return tensors[name]

    node.inputs[0], node.outputs[0] = tensor(added.reads), tensor(added.writes)
    for step in added.steps:
        inputs = [tensor(name) for name in step.inputs]
        graph.nodes.append(
            gs.Node(step.op, step.name, dict(step.attrs), inputs, [tensor(step.output)])
        )


def _apply(node: gs.Node, edit: Edit) -> None:
    for key, value in edit.attrs.items():
        if value is None:
            node.attrs.pop(key, None)
        else:
            node.attrs[key] = value
    for slot, value in edit.inputs.items():
        while len(node.inputs) <= slot:
            node.inputs.append(gs.Variable.empty())
        old = node.inputs[slot]
        if value is None:
            node.inputs[slot] = gs.Variable.empty()
        elif isinstance(old, gs.Constant) and len(old.outputs) == 1:
            old.values = np.asarray(value)
            old.data_location = None  # it may have been in a file of its own
        else:
            node.inputs[slot] = gs.Constant(f"{node.name}_input{slot}_pruned", np.asarray(value))


def mask(model: Model, coupling: Coupling, units: Bools) -> onnx.ModelProto:
    """The original graph with removed channels multiplied by zero where consumers read them: the reference.

    Where a channel meets a quantised constant, that constant is set to what stands for zero instead: a product between
    quantised tensors would take the runtime's integer arithmetic apart, and with it the rounding that is compared.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    nodes = {node.name: node for node in subgraphs.nodes(proto.graph)}
    masks = _Masks(model, coupling, units, proto)
    for i, consumer in enumerate((*coupling.consumers, *coupling.inside)):
        if not coupling.keep((consumer.data, consumer.axis), units).all():
            masks.apply(consumer, nodes[consumer.node], i)
    subgraphs.insert(proto.graph, lambda node: [*masks.before.get(node.name, ()), node])
    return proto


class _Masks:
    """What is added to a graph to mask channels; ``before`` are nodes to insert, by the name of the node behind."""

    def __init__(
        self, model: Model, coupling: Coupling, units: Bools, proto: onnx.ModelProto
    ) -> None:
        self._model, self._coupling, self._units, self._proto = model, coupling, units, proto
        self._makers = {name: node for node in model.every for name in node.outputs}
        self._known = {node.name: node for node in model.every}
        self._shared = {
            node.name for node in model.nodes
        }  # what is made in a body is not seen elsewhere
        self._protos = {node.name: node for node in subgraphs.nodes(proto.graph)}
        self._cuts = _Cuts(model, coupling, units)
        self._made: dict[Axis, str] = {}
        self.before: dict[str, list[onnx.NodeProto]] = {}

    def apply(self, consumer: Consumer, node: onnx.NodeProto, i: int) -> None:
        """Mask what one consumer reads."""
        mine = self._known[consumer.node]
        sides = [(consumer.weight, consumer.weight_axis), (consumer.data, consumer.axis)]
        for tensor, axis in sides:
            slot = mine.inputs.index(tensor) if tensor in mine.inputs else -1
            if tensor is None or slot < 0 or node.input[slot] != tensor:
                continue
            zero = self._zero(mine, slot)
            if zero is None and not self._quantised(consumer.data):
                continue  # what meets the constant is not quantised: floating arithmetic
            stored = self._stored(tensor, axis, zero, f"oamip_{i}_{slot}", consumer.node)
            if stored is not None:
                node.input[slot] = stored
                return
        node.input[consumer.slot] = self._product(consumer, node.input[consumer.slot], i)

    def _product(self, consumer: Consumer, source: str, i: int) -> str:
        key = (consumer.data, consumer.axis)
        shared = source == consumer.data and consumer.node in self._shared
        if shared and key in self._made:
            return self._made[key]
        view = [1] * len(self._model.shapes[consumer.data])
        view[consumer.axis] = -1
        keep = self._coupling.keep(key, self._units)
        values = keep.reshape(view).astype(self._model.dtypes[consumer.data])
        self._proto.graph.initializer.append(numpy_helper.from_array(values, f"oamip_mask_{i}"))
        made = f"oamip_masked_{i}"
        mul = build.mul(source, f"oamip_mask_{i}", made, f"oamip_apply_mask_{i}")
        self.before.setdefault(consumer.node, []).append(mul)
        if shared:
            self._made[key] = made
        return made

    def _zero(self, node: Node, slot: int) -> Array | None:
        spec = lookup(node.domain, node.op, node.version)
        return (
            spec.edit.zero(node, self._cuts).get(slot)
            if spec is not None and spec.edit.zero is not None
            else None
        )

    def _quantised(self, tensor: str) -> bool:
        """Whether a tensor comes from a quantised one, element by element."""
        node = self._makers.get(tensor)
        spec = None if node is None else lookup(node.domain, node.op, node.version)
        if node is None or spec is None:
            return False
        return self._zero(node, 0) is not None or (
            Trait.MOVES in spec.traits and self._quantised(node.inputs[0])
        )

    def _before(self, node: Node, tensor: str, axis: int) -> int | None:
        """The axis that an operator which only moves elements took from its first input, where there is no doubt."""
        spec = lookup(node.domain, node.op, node.version)
        wanted, axes = self._coupling.axes.get((tensor, axis)), self._coupling.axes
        if spec is None or Trait.MOVES not in spec.traits or wanted is None:
            return None
        rank = len(self._model.shapes.get(node.inputs[0], ()))
        same = [a for a in range(rank) if np.array_equal(axes.get((node.inputs[0], a), []), wanted)]
        return same[0] if len(same) == 1 else None

    def _stored(
        self, tensor: str, axis: int, zero: Array | None, name: str, behind: str
    ) -> str | None:
        """A masked copy of a quantised constant, or of the operators that read it element by element; else None."""
        if tensor in self._model.constants:
            value = self._model.constants[tensor]
            if zero is None or (tensor, axis) not in self._coupling.axes:
                return None
            view = [1] * value.ndim
            view[axis] = -1
            keep = self._coupling.keep((tensor, axis), self._units).reshape(view)
            masked = np.where(keep, value, np.broadcast_to(zero, value.shape).astype(value.dtype))
            self._proto.graph.initializer.append(
                numpy_helper.from_array(np.ascontiguousarray(masked), name)
            )
            return name
        node = self._makers.get(tensor)
        if node is None:
            return None
        inner = self._zero(node, 0)
        before = axis if inner is not None else self._before(node, tensor, axis)
        if before is None:
            return None
        source = self._stored(node.inputs[0], before, inner, f"{name}_in", behind)
        if source is None:
            return None
        copy = onnx.NodeProto()
        copy.CopyFrom(self._protos[node.name])
        copy.name, copy.input[0], copy.output[0] = f"{name}_{node.name}", source, name
        self.before.setdefault(behind, []).append(copy)
        return name
