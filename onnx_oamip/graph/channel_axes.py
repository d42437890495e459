"""Axes of channels: those that layers write or read, as against axes of positions."""

from __future__ import annotations

from collections.abc import Iterator

from onnx_oamip.core.records import Axis, Model, Node
from onnx_oamip.graph.coupling import followed_axes
from onnx_oamip.graph.linear_layers import site
from onnx_oamip.graph.ops import Trait, has

KEEPS_PLACES = Trait.ELEMENTWISE | Trait.QUANTISES | Trait.DEQUANTISES
"""Operators that compute every element of the output from elements at the same place."""


def channel_axes(model: Model) -> frozenset[Axis]:
    """Find the axes of computed tensors along which channels lie.

    Args:
        model: A loaded model.

    Returns:
        Axes along which channels are followed from the layer that writes them, and axes that elementwise operators and
        transposes alone tie to the output or the input of a layer. Graph inputs are among the tensors.
    """
    nodes = model.every
    layers = [layer for node in nodes if (layer := site(node, model.constants)) is not None]
    written, read = (set(axes) for axes in followed_axes(model))
    # A rule that finds no labels on its data, as that of a grouped convolution of a graph input, follows nothing.
    written.update(_axis(model, layer.node.outputs[0], layer.output_axis) for layer in layers)
    read.update(_axis(model, layer.data, layer.data_axis) for layer in layers)
    for node in nodes:
        written.update(output for data, output in _same_places(model, node) if data in written)
    for node in reversed(nodes):
        read.update(data for data, output in _same_places(model, node) if output in read)
    return frozenset(written | read)


def aligned(model: Model, tensor: str, axis: int, other: str) -> Axis | None:
    """Find the axis of a tensor that an axis of another one meets in an elementwise operator.

    Args:
        model: The model.
        tensor: An operand.
        axis: One of its axes.
        other: Another operand, or the output.

    Returns:
        The axis of the other tensor; None where it has none of that length there, or no known shape.
    """
    if tensor not in model.shapes or other not in model.shapes:
        return None
    shape, lengths = model.shapes[tensor], model.shapes[other]
    place = len(lengths) - len(shape) + axis  # axes are aligned from the right
    if place < 0 or lengths[place] != shape[axis]:
        return None
    return other, place


def _axis(model: Model, tensor: str, axis: int) -> Axis:
    """An axis that may be counted from the right."""
    rank = len(model.shapes.get(tensor, ()))
    return tensor, axis % rank if rank else axis


def _same_places(model: Model, node: Node) -> Iterator[tuple[Axis, Axis]]:
    """Axes of computed operands of an elementwise node or a transpose, with the axes of the output that they become."""
    if has(node, Trait.TRANSPOSES):
        rank = len(model.shapes.get(node.inputs[0], ()))
        order = node.attrs.get("perm", range(rank)[::-1])
        yield from (((node.inputs[0], a), (node.outputs[0], b)) for b, a in enumerate(order))
    elif has(node, KEEPS_PLACES):
        for name in node.inputs:
            if name in model.constants:
                continue
            for axis in range(len(model.shapes.get(name, ()))):
                output = aligned(model, name, axis, node.outputs[0])
                if output is not None:
                    yield (name, axis), output
