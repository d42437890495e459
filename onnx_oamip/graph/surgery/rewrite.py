"""Surgery: removes units from a graph, and masks them in the original as the reference for verification.

The cut is generic: every constant is compressed along every axis on which units are removed. Only operators that carry
sizes in attributes, or must still see removed channels as zeros, need a ``repair`` rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import cached_property

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper

from onnx_oamip.core.errors import ModelError
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
from onnx_oamip.graph.emptying import Effect, effect_of, emptied_groups
from onnx_oamip.graph.loading import restore
from onnx_oamip.graph.ops import (
    Edit,
    Trait,
    build,
    consumers_by_tensor,
    lookup,
    rule_errors,
)
from onnx_oamip.graph.ops.inserted_nodes import (
    Added,
    Names,
    Present,
    computes_whole,
    edits_of_further_cut,
    restore_zeros,
    scale,
    take_kept,
)
from onnx_oamip.graph.outputs import is_float


def _masks(coupling: Coupling, units: Bools) -> dict[Axis, Bools]:
    """Kept indices of every axis that loses some under a choice of units."""
    masks = {key: coupling.keep(key, units) for key in coupling.axes}
    return {key: mask for key, mask in masks.items() if not mask.all()}


class _Cuts:
    """Removed channels of one model; implements ``ops.Cuts``.

    Attributes:
        masks: Kept indices of every axis that loses some.
    """

    def __init__(self, model: Model, masks: Mapping[Axis, Bools]) -> None:
        self._model = model
        self.masks = masks

    def shape(self, tensor: str) -> tuple[int, ...]:
        return self._model.shapes[tensor]

    def constant(self, tensor: str) -> Array | None:
        return self._model.constants.get(tensor)

    def readers(self, tensor: str) -> Sequence[Node]:
        return self._readers[tensor]

    def producer(self, tensor: str) -> Node | None:
        return self._producers.get(tensor)

    @cached_property
    def _readers(self) -> Mapping[str, Sequence[Node]]:
        return consumers_by_tensor(self._model)

    @cached_property
    def _producers(self) -> Mapping[str, Node]:
        return {name: node for node in self._model.every for name in node.outputs if name}

    def keep(self, tensor: str, axis: int) -> Bools | None:
        return self.masks.get((tensor, axis))

    def kept(self, tensor: str, axis: int) -> int:
        mask = self.masks.get((tensor, axis))
        return self._model.shapes[tensor][axis] if mask is None else int(mask.sum())


# ------------------------------------------------------------------------------------------------------------- cut


def cut(model: Model, coupling: Coupling, units: Bools) -> onnx.ModelProto:
    """Removes units from a model, without a refit.

    Args:
        model: The whole model.
        coupling: Its coupling.
        units: Keep mask of the units (n_units,).

    Returns:
        The narrower graph. In place of a linear node whose group is empty it has a constant, which has the name of the
        output of the node.

    Raises:
        ModelError: A group is empty that the graph cannot do without.
    """
    cuts = _Cuts(model, _masks(coupling, units))
    touched = {tensor for tensor, _ in cuts.masks}
    emptied = _emptied(model, coupling, units)
    leave = {*emptied.idle, *emptied.biases}
    edits = _repairs(model, cuts, touched, leave)
    if any(edit.spread is not None or edit.scale != 1.0 for edit in edits.values()):
        _reuse_insertions(edits, cuts, model)
    graph = gs.import_onnx(model.proto)
    nodes = {node.name: node for node in model.every}
    names = Names(model)
    for part in (graph, *graph.subgraphs(recursive=True)):
        tensors = part.tensors()
        for node in [n for n in part.nodes if n.name in edits]:
            edit = edits[node.name]
            original = nodes[node.name]
            _apply(part, node, edit, model)
            if edit.spread is not None:
                source = node.inputs[0].name
                keep = cuts.masks[source, edit.spread]
                rank = len(model.shapes[source])
                last = edit.until or node.name
                added = restore_zeros(
                    original,
                    rank,
                    edit.spread,
                    ordered=edit.ordered,
                    keep=keep,
                    names=names,
                    last=nodes[last],
                )
                (end,) = (other for other in part.nodes if other.name == last)
                _insert(part, node, added, tensors, end)
            if edit.scale != 1.0:
                dtype = model.dtypes[node.outputs[0].name]
                added = scale(original, edit.scale, dtype, names)
                _insert(part, node, added, tensors)
    tensors = graph.tensors()
    for node in [n for n in graph.nodes if n.name in nodes and n.name not in leave]:
        remaining = _kept_of_computed_constant(nodes[node.name], model, cuts)
        if remaining:
            _insert(graph, node, take_kept(nodes[node.name], remaining, names), tensors)
    _leave_out(graph, emptied, cuts)
    # A repaired node has its own copy of the constant it read before: drop constants that no node reads any more.
    graph.cleanup(remove_unused_graph_inputs=False)
    graph.toposort()
    result: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
    restore(result, model.proto)
    _update_declared_shapes(result.graph, cuts)
    away = bool(external_data.references(model.proto))
    # One after the other, so that memory never holds a large model twice.
    for tensor in result.graph.initializer:
        if tensor.name in touched and model.is_stored(tensor.name):
            kept = compress(model.constants[tensor.name], tensor.name, cuts.masks)
            tensor.CopyFrom(external_data.tensor(kept, tensor.name, away))
    return result


def _emptied(model: Model, coupling: Coupling, units: Bools) -> Effect:
    """Effect of the groups without units. Raises ModelError where the graph cannot do without one."""
    effect = effect_of(model, coupling, units)
    if effect.obstacle:
        groups = sorted(emptied_groups(coupling, units))
        names = ", ".join(coupling.groups[group].name for group in groups)
        raise ModelError(
            f"all units of {names} are removed, but {effect.obstacle}; keep at least one of them."
        )
    return effect


def _leave_out(graph: gs.Graph, emptied: Effect, cuts: _Cuts) -> None:
    """Puts constants in place of linear nodes without inputs, and joins only what has channels."""
    nodes = {node.name: node for node in graph.nodes}
    for name, slots in emptied.joined.items():
        inputs = nodes[name].inputs
        nodes[name].inputs = [value for slot, value in enumerate(inputs) if slot not in slots]
    for name, bias in emptied.biases.items():
        if name not in emptied.idle:
            output = nodes[name].outputs[0]
            broadcast = {(output.name, axis) for axis, n in enumerate(bias.shape) if n == 1}
            masks = {axis: keep for axis, keep in cuts.masks.items() if axis not in broadcast}
            output.inputs.clear()
            output.to_constant(compress(bias, output.name, masks))


def _repairs(model: Model, cuts: _Cuts, touched: Set[str], leave: Set[str]) -> dict[str, Edit]:
    """Changes of the nodes that need any, by node name; those to ``leave`` are not in the graph any more."""
    edits: dict[str, Edit] = {}
    for node in model.every:
        # Only nodes that the cut touches: the shapes of others may not be known.
        if node.name in leave or touched.isdisjoint((*node.inputs, *node.outputs)):
            continue
        if _kept_of_computed_constant(node, model, cuts):
            continue  # it computes the whole constant, from which the kept channels are taken
        spec = lookup(node.domain, node.op, node.version)
        if spec is None or spec.edit.repair is None or node.captures:
            continue
        with rule_errors(node):
            edit = spec.edit.repair(node, cuts)
        if edit != Edit():
            edits[node.name] = edit
    return edits


def _kept_of_computed_constant(node: Node, model: Model, cuts: _Cuts) -> dict[int, Bools]:
    """Kept indices by axis of a constant that a node computes as a whole."""
    if not computes_whole(node, model):
        return {}
    name = node.outputs[0]
    ranks = range(len(model.shapes[name]))
    return {axis: keep for axis in ranks if (keep := cuts.keep(name, axis)) is not None}


def _update_declared_shapes(graph: onnx.GraphProto, cuts: _Cuts) -> None:
    """Narrows the shapes that subgraphs declare for their inputs and outputs."""
    for body in list(subgraphs.graphs(graph))[1:]:
        for value in (*body.input, *body.output):
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if dim.HasField("dim_value") and (value.name, axis) in cuts.masks:
                    dim.dim_value = cuts.kept(value.name, axis)


def compress(value: Array, name: str, masks: Mapping[Axis, Bools]) -> Array:
    """Removes indices of an array along all its axes that have a mask.

    Args:
        value: The array.
        name: Name of its tensor.
        masks: Kept indices by (tensor, axis).

    Returns:
        The narrower array, contiguous.
    """
    for axis in range(value.ndim):
        mask = masks.get((name, axis))
        if mask is not None:
            value = np.compress(mask, value, axis=axis)
    return np.ascontiguousarray(value)


def _reuse_insertions(edits: dict[str, Edit], cuts: _Cuts, model: Model) -> None:
    """Edits the nodes that an earlier pruning inserted around a node, so that no second ones are inserted.

    Args:
        edits: Changes by node name, updated in place.
        cuts: The removed channels.
        model: The model, which may have been pruned before.
    """
    present = Present(model)
    nodes = {node.name: node for node in model.every}
    for node in [n for n in model.every if n.name in edits]:
        edit = edits[node.name]
        if edit.spread is not None:
            last = nodes[edit.until or node.name]
            around = present.restored_zeros(node, edit.spread, edit.ordered, last)
            if around is not None:
                axis = edit.spread
                before = _keep_or_all(cuts, around.source, axis)
                inside = _keep_or_all(cuts, node.inputs[0], axis)
                edits.update(
                    edits_of_further_cut(around, axis, source=before, inside=inside, model=model)
                )
                # Where gathers place the zeros, the parameters of the node keep their places too.
                inputs = {} if around.ordered else edit.inputs
                edits[node.name] = replace(edit, spread=None, inputs=inputs)
        if edit.scale != 1.0 and (product := present.scale(node)) is not None:
            mul, slot = product
            previous = model.constants[mul.inputs[slot]]
            factor = np.asarray(previous * np.float64(edit.scale), previous.dtype)
            edits[mul.name] = Edit(inputs={slot: factor})
            edits[node.name] = replace(edit, scale=1.0)


def _keep_or_all(cuts: _Cuts, tensor: str, axis: int) -> Bools:
    keep = cuts.keep(tensor, axis)
    return np.ones(cuts.shape(tensor)[axis], bool) if keep is None else keep


def _insert(
    graph: gs.Graph,
    node: gs.Node,
    added: Added,
    tensors: dict[str, gs.Tensor],
    last: gs.Node | None = None,
) -> None:
    """Inserts new nodes in front of a node and behind it.

    Args:
        graph: Graph that holds the node.
        node: The node, connected to the new ones.
        added: The new nodes.
        tensors: Tensors of the graph by name, extended by the new ones.
        last: The node that the new ones are behind; default: the same node.
    """

    def tensor(name: str) -> gs.Tensor:
        if name not in tensors:
            value = added.constants.get(name)
            tensors[name] = gs.Variable(name) if value is None else gs.Constant(name, value)
        return tensors[name]

    node.inputs[0] = tensor(added.reads)
    (last or node).outputs[0] = tensor(added.writes)
    for step in added.steps:
        inputs = [tensor(name) for name in step.inputs]
        outputs = [tensor(step.output)]
        graph.nodes.append(gs.Node(step.op, step.name, dict(step.attrs), inputs, outputs))


def _apply(graph: gs.Graph, node: gs.Node, edit: Edit, model: Model) -> None:
    """Changes the attributes, constant inputs and listed lengths of a node."""
    for slot, lengths in edit.lengths.items():
        node.inputs[slot] = _with_lengths(graph, node, slot, lengths, model)
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
            old.data_location = None  # the old value may have been in a file
        else:
            node.inputs[slot] = gs.Constant(f"{node.name}_input{slot}_pruned", np.asarray(value))


def _with_lengths(
    graph: gs.Graph, node: gs.Node, slot: int, lengths: Mapping[int, int], model: Model
) -> gs.Variable:
    """Output of a copy of the node that joins an input, with other numbers at some places of the list."""
    (old,) = node.inputs[slot].inputs
    name = f"{node.name}_input{slot}_pruned"
    pieces = []
    place = 0
    for i, piece in enumerate(old.inputs):
        value = piece.values.copy() if isinstance(piece, gs.Constant) else None
        (count,) = model.shapes[piece.name]
        changed = {at: n for at, n in lengths.items() if place <= at < place + count}
        if value is not None and changed:
            for at, length in changed.items():
                value[at - place] = length
            piece = gs.Constant(f"{name}_{i}", value)
        pieces.append(piece)
        place += count
    result = gs.Variable(name, dtype=node.inputs[slot].dtype)
    graph.nodes.append(gs.Node(old.op, f"{name}_node", dict(old.attrs), pieces, [result]))
    return result


# ------------------------------------------------------------------------------------------------------------ mask


def masked_codes(model: Model, node: Node, slot: int, keep: Bools) -> Array | None:
    """Masks removed channels in a constant operand of integer arithmetic, in which no product can mask them.

    Args:
        model: The whole model.
        node: A node.
        slot: Input index of the operand.
        keep: Kept indices, in a shape that broadcasts against the operand.

    Returns:
        The operand with the code of zero for the removed channels; None for other operands.
    """
    codes = model.constants.get(node.inputs[slot])
    if codes is None or is_float(codes.dtype):
        return None
    zero = _zero_point(node, slot, _Cuts(model, {}))
    return None if zero is None else _masked(codes, keep, zero)


def _zero_point(node: Node, slot: int, cuts: _Cuts) -> Array | None:
    """Value that stands for zero in a quantised input of a node; None for other inputs."""
    spec = lookup(node.domain, node.op, node.version)
    if spec is None or spec.edit.zero is None:
        return None
    return spec.edit.zero(node, cuts).get(slot)


def _masked(codes: Array, keep: Bools, zero: Array) -> Array:
    zeros = np.broadcast_to(zero, codes.shape).astype(codes.dtype)
    return np.ascontiguousarray(np.where(keep, codes, zeros))


def mask(model: Model, coupling: Coupling, units: Bools) -> onnx.ModelProto:
    """Masks removed channels in the original graph: the reference that a cut is verified against.

    Channels are multiplied by zero where consumers read them. If a consumer reads a quantised constant along the same
    channels, the constant is set to its zero point there instead: a product between quantised tensors would break up
    the integer arithmetic of the runtime, and with it the rounding that is compared.

    Args:
        model: The whole model.
        coupling: Its coupling.
        units: Keep mask of the units (n_units,).

    Returns:
        A graph of the original widths.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    nodes = {node.name: node for node in subgraphs.nodes(proto.graph)}
    masks = _Masks(model, coupling, units, proto)
    for i, consumer in enumerate((*coupling.consumers, *coupling.inside)):
        if not coupling.keep((consumer.data, consumer.axis), units).all():
            masks.apply(consumer, nodes[consumer.node], i)
    subgraphs.insert(proto.graph, lambda node: [*masks.inserted.get(node.name, ()), node])
    return proto


class _Masks:
    """Masks of the removed channels, added to a graph one consumer at a time.

    Attributes:
        inserted: Nodes to insert in front of each consumer, by its name.
    """

    def __init__(
        self, model: Model, coupling: Coupling, units: Bools, proto: onnx.ModelProto
    ) -> None:
        self._model = model
        self._coupling = coupling
        self._units = units
        self._proto = proto
        self._producers = {name: node for node in model.every for name in node.outputs}
        self._nodes = {node.name: node for node in model.every}
        # A masked tensor can be shared by the nodes of the main graph; one made in a subgraph is not visible outside.
        self._main_nodes = {node.name for node in model.nodes}
        self._protos = {node.name: node for node in subgraphs.nodes(proto.graph)}
        self._cuts = _Cuts(model, _masks(coupling, units))
        self._masked: dict[Axis, str] = {}
        self.inserted: dict[str, list[onnx.NodeProto]] = {}

    def apply(self, consumer: Consumer, node: onnx.NodeProto, i: int) -> None:
        """Masks the channels that one consumer reads.

        Args:
            consumer: The consumer.
            node: Its node in the new graph, changed in place.
            i: Number of the consumer, for names.
        """
        original = self._nodes[consumer.node]
        sides = [(consumer.weight, consumer.weight_axis), (consumer.data, consumer.axis)]
        for tensor, axis in sides:
            if tensor is None or tensor not in original.inputs:
                continue
            slot = original.inputs.index(tensor)
            if node.input[slot] != tensor:
                continue
            zero = self._zero_point(original, slot)
            if zero is None and not self._is_quantised(consumer.data):
                continue  # floating arithmetic: a product with the mask is exact
            name = f"oamip_{i}_{slot}"
            masked = self._masked_source(tensor, axis, zero, name, consumer.node)
            if masked is not None:
                node.input[slot] = masked
                return
        node.input[consumer.slot] = self._product(consumer, node.input[consumer.slot], i)

    def _product(self, consumer: Consumer, source: str, i: int) -> str:
        """Inserts a product with the mask; name of the masked tensor."""
        key = (consumer.data, consumer.axis)
        is_shared = source == consumer.data and consumer.node in self._main_nodes
        if is_shared and key in self._masked:
            return self._masked[key]
        keep = self._broadcast_mask(key, len(self._model.shapes[consumer.data]))
        values = keep.astype(self._model.dtypes[consumer.data])
        self._proto.graph.initializer.append(numpy_helper.from_array(values, f"oamip_mask_{i}"))
        masked = f"oamip_masked_{i}"
        product = build.mul(source, f"oamip_mask_{i}", masked, f"oamip_apply_mask_{i}")
        self.inserted.setdefault(consumer.node, []).append(product)
        if is_shared:
            self._masked[key] = masked
        return masked

    def _broadcast_mask(self, key: Axis, rank: int) -> Bools:
        """Kept indices of an axis, in a shape that broadcasts against its tensor."""
        shape = [1] * rank
        shape[key[1]] = -1
        return self._coupling.keep(key, self._units).reshape(shape)

    def _zero_point(self, node: Node, slot: int) -> Array | None:
        return _zero_point(node, slot, self._cuts)

    def _is_quantised(self, tensor: str) -> bool:
        """Tests whether a tensor is a dequantised one, possibly behind operators that only move elements."""
        node = self._producers.get(tensor)
        if node is None:
            return False
        spec = lookup(node.domain, node.op, node.version)
        if spec is None:
            return False
        if self._zero_point(node, 0) is not None:
            return True
        return Trait.MOVES in spec.traits and self._is_quantised(node.inputs[0])

    def _source_axis(self, node: Node, tensor: str, axis: int) -> int | None:
        """Axis of the first input that an operator moves to an axis of its output; None if it is not certain."""
        spec = lookup(node.domain, node.op, node.version)
        axes = self._coupling.axes
        units = axes.get((tensor, axis))
        if spec is None or Trait.MOVES not in spec.traits or units is None:
            return None
        source = node.inputs[0]
        rank = len(self._model.shapes.get(source, ()))
        same = [a for a in range(rank) if np.array_equal(axes.get((source, a), []), units)]
        return same[0] if len(same) == 1 else None

    def _masked_source(
        self, tensor: str, axis: int, zero: Array | None, name: str, consumer: str
    ) -> str | None:
        """Masks a quantised constant, or copies the element-wise operators behind one so that they read a masked copy.

        Args:
            tensor: The constant, or the output of the operators.
            axis: Its axis with the removed channels.
            zero: Value that stands for zero; None if the tensor is not quantised itself.
            name: Name for the masked tensor.
            consumer: Node in front of which copies are inserted.

        Returns:
            ``name``, or None if there is no such constant.
        """
        if self._model.is_stored(tensor) or (tensor in self._model.constants and zero is not None):
            if zero is None or (tensor, axis) not in self._coupling.axes:
                return None
            value = self._model.constants[tensor]
            keep = self._broadcast_mask((tensor, axis), value.ndim)
            masked = _masked(value, keep, zero)
            self._proto.graph.initializer.append(numpy_helper.from_array(masked, name))
            return name
        node = self._producers.get(tensor)
        if node is None:
            return None
        source_zero = self._zero_point(node, 0)
        source_axis = axis if source_zero is not None else self._source_axis(node, tensor, axis)
        if source_axis is None:
            return None
        source = self._masked_source(
            node.inputs[0], source_axis, source_zero, f"{name}_in", consumer
        )
        if source is None:
            return None
        copy = onnx.NodeProto()
        copy.CopyFrom(self._protos[node.name])
        copy.name = f"{name}_{node.name}"
        copy.input[0] = source
        copy.output[0] = name
        self.inserted.setdefault(consumer, []).append(copy)
        return name
