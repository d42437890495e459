"""Linear nodes and the residual sums that their outputs run into."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_oamip.core.records import (
    Axis,
    Coupling,
    Model,
    Node,
)
from onnx_oamip.graph import chains
from onnx_oamip.graph.linear_layers import matrix_shape, site
from onnx_oamip.graph.ops import Trait, has
from onnx_oamip.graph.ops.matrix_view import Site

BETWEEN = Trait.IDENTITY | Trait.BATCH_NORM | Trait.BIAS
"""Operators that may lie between a linear node and the sum that its branch runs into."""


@dataclass(frozen=True)
class Join:
    """A sum of two branches of one shape.

    Attributes:
        node: Name of the node.
        inputs: Tensors at the ends of the branches.
        axis: The axis that its units lie on.
    """

    node: str
    inputs: tuple[str, str]
    axis: int


@dataclass(frozen=True)
class Branch:
    """A linear node and the nodes between it and the end of its branch.

    Attributes:
        layer: The linear node.
        between: Biases and normalisations behind it, the last first. Each is read by this branch only.
    """

    layer: Site
    between: tuple[Node, ...]


def linear_nodes(model: Model) -> list[Site]:
    """List the linear nodes whose input and output have known shapes.

    Args:
        model: The model.

    Returns:
        Their linear forms, in graph order.
    """
    result = []
    for node in model.nodes:
        layer = site(node, model.constants)
        if layer is None:
            continue
        if layer.data in model.shapes and node.outputs[0] in model.shapes:
            result.append(layer)
    return result


def data_axis(model: Model, layer: Site) -> Axis:
    """Find the axis that a linear node sums over.

    Args:
        model: The model.
        layer: The node.

    Returns:
        Tensor and axis.
    """
    return layer.data, layer.data_axis % len(model.shapes[layer.data])


def is_depthwise(model: Model, layer: Site) -> bool:
    """Test whether every filter of a layer reads one channel only, so that it has no connection to spare.

    Args:
        model: The model.
        layer: A linear node.

    Returns:
        True for a depthwise convolution.
    """
    return layer.groups > 1 and matrix_shape(layer, model.constants[layer.weight])[2] == 1


def joins(model: Model, coupling: Coupling) -> list[Join]:
    """List the residual sums: two computed branches of one shape, with units along one axis other than the batch.

    Args:
        model: The model.
        coupling: Its units.

    Returns:
        The sums, in graph order.
    """
    result = []
    for node in model.nodes:
        if not has(node, Trait.SUM) or len(node.inputs) != 2 or node.inputs[0] == node.inputs[1]:
            continue
        first, second = node.inputs
        shape = model.shapes.get(node.outputs[0])
        if shape is None or first in model.constants or second in model.constants:
            continue
        if model.shapes.get(first) != shape or model.shapes.get(second) != shape:
            continue
        axes = [a for a in range(len(shape)) if _has_units(coupling, (node.outputs[0], a))]
        if len(axes) == 1 and axes[0] > 0:
            result.append(Join(node.name, (first, second), axes[0]))
    return result


def branch(model: Model, tensor: str) -> Branch | None:
    """Follow a branch from its end back to the linear node that alone produces it.

    Args:
        model: The model.
        tensor: Tensor at the end of the branch.

    Returns:
        The branch; None if another node produces it, or if something else reads a tensor of it.
    """
    linear = {layer.node.name: layer for layer in linear_nodes(model)}

    def data_input(node: Node) -> str | None:
        computed = [name for name in node.inputs if name and name not in model.constants]
        if not has(node, BETWEEN) or len(computed) != 1:
            return None
        same_shape = model.shapes.get(computed[0]) == model.shapes.get(node.outputs[0])
        return computed[0] if same_shape else None

    between: list[Node] = []
    for node in chains.of_model(model).in_front(tensor, data_input):
        if node.name in linear:
            return Branch(linear[node.name], tuple(between))
        between.append(node)
    return None


def branch_layer(model: Model, tensor: str) -> Site | None:
    """Find the linear node of a branch.

    Args:
        model: The model.
        tensor: Tensor at the end of the branch.

    Returns:
        The node; None if :func:`branch` finds none.
    """
    found = branch(model, tensor)
    return None if found is None else found.layer


def _has_units(coupling: Coupling, axis: Axis) -> bool:
    labels = coupling.axes.get(axis)
    return labels is not None and bool((labels >= 0).any())
