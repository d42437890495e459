"""The original with groups at the widths of a plan: the surroundings in which another group is measured.

Losses of single groups do not add up where groups stand in for each other, as residual branches do: each may go alone
and not all together. Measured with the other groups at the widths of a plan, a group loses what it would lose as the
last one to be narrowed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_oamip.core.records import (
    Array,
    Bools,
    Consumer,
    Coupling,
    Floats,
    Gram,
    Ints,
    Model,
    Node,
)
from onnx_oamip.graph.linear_layers import matrix_shape, site, unmatrix
from onnx_oamip.graph.ops import build
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.subgraphs import insert
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.statistics.layer_problems import compensate, problems

Blocks = Sequence[tuple[Floats, Floats]]
"""Weights (outputs, inputs * taps) and shifts of the bias (outputs,) of every block of a consumer."""


@dataclass(frozen=True, eq=False)
class Repaired:
    """A repaired linear consumer.

    Attributes:
        first: Name of the first node that shares its weight.
        weight: Weight in the layout of the node.
        shift: Shift that broadcasts to its output.
    """

    first: str
    weight: Array
    shift: Array


@dataclass(frozen=True, eq=False)
class Background:
    """A plan as values for the original graph.

    Attributes:
        removed: Units that the plan removes (n,).
        repaired: Linear consumers that are repaired, by node.
        masks: Consumers of another kind with their :class:`Mask`, by node.
    """

    removed: Ints
    repaired: Mapping[str, Repaired]
    masks: Mapping[str, Sequence[tuple[Consumer, Mask]]]


def background(
    model: Model, coupling: Coupling, grams: Mapping[str, Gram], *, keep: Bools, repair: str
) -> Background:
    """Compute the repaired weights and the masks of a plan.

    Args:
        model: The original.
        coupling: Its units.
        grams: Covariances by consumer node.
        keep: Keep mask of the plan (n_units,).
        repair: How consumers are repaired, as ``refit`` says.

    Returns:
        The values.
    """
    gone = np.flatnonzero(~keep)
    repaired: dict[str, Repaired] = {}
    for index, group in enumerate(coupling.groups):
        removed = np.flatnonzero(~keep[group.units])
        if not len(removed):
            continue
        blocks: dict[tuple[str, ...], list[tuple[Floats, Floats]]] = {}
        for problem in problems(model, coupling, grams, index):
            # A consumer of several groups is repaired for all of them at once, with the first one.
            if problem.uses[0] not in repaired:
                found = compensate(problem, removed, repair, gone)
                blocks.setdefault(problem.uses, []).append(problem.unfold(*found))
        for uses, several in blocks.items():
            weight = consumer_weight(model, uses[0], several)
            repaired |= {
                name: Repaired(uses[0], weight, consumer_shift(model, name, several))
                for name in uses
            }
    nodes = {node.name: node for node in model.every}
    masks: dict[str, list[tuple[Consumer, Mask]]] = {}
    for consumer, labels in _consumers(coupling):
        kept = np.asarray((labels < 0) | keep[labels])
        if consumer.node not in repaired and not kept.all():
            mask = channel_mask(model, nodes[consumer.node], consumer, kept)
            masks.setdefault(consumer.node, []).append((consumer, mask))
    return Background(gone, repaired, masks)


def surrounding(
    model: Model, coupling: Coupling, around: Background, *, group: int
) -> onnx.ModelProto:
    """Put a plan into the original graph, but for the consumers of one group, whose weights are set at every level.

    Args:
        model: The original.
        coupling: Its units.
        around: The plan.
        group: Index of the group whose consumers stay as they are.

    Returns:
        A graph of the same shapes, in which the channels that the plan removes are without effect.
    """
    units = coupling.groups[group].units
    own = {c.node for c, labels in _consumers(coupling) if np.isin(labels, units).any()}
    nodes = {node.name: node for node in model.nodes}
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    added: dict[str, Array] = {}

    def changed(node: onnx.NodeProto) -> list[onnx.NodeProto]:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        if copy.name in own:
            return [copy]
        if copy.name in around.repaired:
            place = site(nodes[copy.name], model.constants)
            assert place is not None
            own_values = around.repaired[copy.name]
            weight = f"oamip_around_weight_{own_values.first}"
            shift = f"oamip_around_shift_{copy.name}"
            added[weight], added[shift] = own_values.weight, own_values.shift
            inner, output = f"oamip_around_{copy.name}", copy.output[0]
            copy.input[place.weight_slot] = weight
            copy.output[0] = inner
            return [copy, build.add(inner, shift, output)]
        masked = []
        for number, (consumer, mask) in enumerate(around.masks.get(copy.name, ())):
            name = f"oamip_around_mask_{number}_{copy.name}"
            added[name] = mask.value
            masked += apply_mask(copy, consumer.slot, name, mask.replaces)
        return [*masked, copy]

    insert(proto.graph, changed)
    proto.graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in added.items())
    return proto


def consumer_weight(model: Model, name: str, blocks: Blocks) -> Array:
    """Write repaired blocks as the weight of a consumer.

    Args:
        model: The original.
        name: Name of the consumer.
        blocks: Its repaired blocks.

    Returns:
        The weight in the layout of the node.
    """
    place = _site(model, name)
    like = model.constants[place.weight]
    parts = [w for w, _ in blocks]
    # One block is not copied: the weight of a wide layer is the largest array of its group.
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if place.factor != 1.0:
        joined = joined / place.factor
    return unmatrix(place, joined.reshape(matrix_shape(place, like)), like)


def consumer_shift(model: Model, name: str, blocks: Blocks) -> Array:
    """Write the shifts of repaired blocks as one of the output of a consumer.

    Args:
        model: The original.
        name: Name of the consumer.
        blocks: Its repaired blocks.

    Returns:
        The shift with the axes of the output.
    """
    place = _site(model, name)
    shift = np.concatenate([s for _, s in blocks])
    view = [1] * len(model.shapes[place.node.outputs[0]])
    view[place.output_axis] = -1
    return shift.reshape(view).astype(model.constants[place.weight].dtype)


@dataclass(frozen=True, eq=False)
class Mask:
    """Removal of the channels that a consumer reads, as a value for the original graph.

    Attributes:
        value: Factor of the tensor that holds the channels, or what takes its place.
        replaces: Whether it takes the place of the tensor: codes of integers, which no product can mask.
    """

    value: Array
    replaces: bool


def channel_mask(model: Model, node: Node, consumer: Consumer, kept: Bools) -> Mask:
    """Write the removal of channels as a value.

    Args:
        model: The original.
        node: The node that reads the channels.
        consumer: A place where it reads them.
        kept: The channels that are kept (channels,).

    Returns:
        The mask, with the axes and the type of the tensor.
    """
    view = [1] * len(model.shapes[consumer.data])
    view[consumer.axis] = -1
    keep = kept.reshape(view)
    codes = rewrite.masked_codes(model, node, consumer.slot, keep)
    if codes is not None:
        return Mask(codes, replaces=True)
    return Mask(keep.astype(model.dtypes[consumer.data]), replaces=False)


def apply_mask(node: onnx.NodeProto, slot: int, name: str, replaces: bool) -> list[onnx.NodeProto]:
    """Let a node read a masked input, in place.

    Args:
        node: The node.
        slot: Input index.
        name: Tensor with the value of the mask.
        replaces: Whether the mask takes the place of the input.

    Returns:
        The nodes to insert in front of it.
    """
    source = node.input[slot]
    if replaces:
        node.input[slot] = name
        return []
    node.input[slot] = f"{name}_of_input"
    return [build.mul(source, name, node.input[slot])]


def _consumers(coupling: Coupling) -> Iterator[tuple[Consumer, Ints]]:
    """All consumers, in the main graph and in bodies, with the units of the channels that they read."""
    for consumer in (*coupling.consumers, *coupling.inside):
        yield consumer, coupling.axes[consumer.data, consumer.axis]


def _site(model: Model, name: str) -> Site:
    node = next(n for n in model.nodes if n.name == name)
    place = site(node, model.constants)
    assert place is not None
    return place
