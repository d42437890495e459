"""Operators that read or write rows at places computed at run time, and those that sample images there.

The axes that are indexed are pinned; every other axis passes channels on, because a row moves as a whole. An index of
the shape of the data (GatherElements, ScatterElements) is repeated over the channels and loses the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnx_oamip.core.records import Axis, Node
from onnx_oamip.graph.ops.handles import LabelAxis, Labels
from onnx_oamip.graph.ops.notation import opaque
from onnx_oamip.graph.ops.spec import OpSpec

Shape = tuple[int, ...]


def _shapes(labels: Labels, names: Sequence[str]) -> list[Shape] | None:
    """Shapes of several tensors, None where one of them is not known."""
    found = [shape for name in names if (shape := labels.shape(name)) is not None]
    if len(found) == len(names):
        return found
    return None


def _unknown(node: Node, labels: Labels) -> None:
    opaque(node, labels, f"{node} reads a tensor of unknown shape")


def _pin_indexed(
    node: Node,
    labels: Labels,
    name: str,
    axes: Sequence[int],
) -> None:
    if labels.is_constant(name):
        return
    for axis in axes:
        labels.pin(labels.label(name, axis), f"{node} indexes this axis at run time")


def _tied(node: Node, labels: Labels, here: list[Axis]) -> LabelAxis:
    """Tie axes that go together, unless none of them is tracked: constants alone need no labels."""
    tracked = any(
        not labels.is_constant(name) and labels.label(name, axis) is not None for name, axis in here
    )
    if tracked:
        return labels.unify(here, node)
    return None


# ------------------------------------------------------------------------------------------------- lists of places


def _gather_nd(node: Node, labels: Labels) -> None:
    """Indices (..., k) pick from the k axes behind the batch axes; the axes behind those pass."""
    data, index = node.inputs[:2]
    shapes = _shapes(labels, (data, index))
    if shapes is None:
        _unknown(node, labels)
        return
    batch = int(node.attrs.get("batch_dims", 0))
    first_free = batch + shapes[1][-1]
    axes = labels.axes(data)
    for found in axes[:first_free]:
        labels.pin(found, f"{node} picks from it at run time")
    labels.pin_all(index, f"{node} uses it as an index")
    picked: list[LabelAxis] = [None] * (len(shapes[1]) - 1)
    labels.set(node.outputs[0], [*picked, *axes[first_free:]])


def _scatter_nd(node: Node, labels: Labels) -> None:
    """Updates (..., rows) replace or join rows of the data, along the axes behind the indexed ones."""
    data, index, updates = node.inputs[:3]
    shapes = _shapes(labels, (data, index, updates))
    if shapes is None:
        _unknown(node, labels)
        return
    depth = shapes[1][-1]
    places = len(shapes[1]) - 1
    _pin_indexed(node, labels, data, range(depth))
    _pin_indexed(node, labels, updates, range(places))
    labels.pin_all(index, f"{node} uses it as an index")
    result: list[LabelAxis] = [None] * depth
    for axis in range(depth, len(shapes[0])):
        result.append(_tied(node, labels, [(data, axis), (updates, axis - depth + places)]))
    labels.set(node.outputs[0], result)


# ------------------------------------------------------------------------------------------ an index for every element


def _gather_elements(node: Node, labels: Labels) -> None:
    _by_element(node, labels, node.inputs[:2], moves=1)


def _scatter_elements(node: Node, labels: Labels) -> None:
    _by_element(node, labels, node.inputs[:3], moves=0)


def _by_element(
    node: Node,
    labels: Labels,
    names: Sequence[str],
    moves: int,
) -> None:
    """Along the listed axis elements move; along the others data, index and updates go together.

    Args:
        node: The node.
        labels: Labels of the graph.
        names: Data, index and, of a scatter, updates.
        moves: The input that the output has the shape of.
    """
    shapes = _shapes(labels, names)
    if shapes is None:
        _unknown(node, labels)
        return
    rank = len(shapes[0])
    moved = int(node.attrs.get("axis", 0)) % max(rank, 1)
    result: list[LabelAxis] = [None] * rank
    for axis in range(rank):
        lengths = {shape[axis] for shape in shapes}
        if axis != moved and len(lengths) == 1:
            result[axis] = _tied(node, labels, [(name, axis) for name in names])
            continue
        for name in names:
            _pin_indexed(node, labels, name, (axis,))
    assert len(shapes[moves]) == rank
    labels.set(node.outputs[0], result)


# ------------------------------------------------------------------------------------------------- samples of images


def _sampled(node: Node, labels: Labels) -> None:
    """Every channel of an image (n, channels, ...) is read at the same places."""
    image, *places = node.inputs
    shape = labels.shape(image)
    out = labels.shape(node.outputs[0])
    if shape is None or out is None:
        _unknown(node, labels)
        return
    _pin_indexed(node, labels, image, [0, *range(2, len(shape))])
    for name in places:
        if name:
            labels.pin_all(name, f"{node} uses it as places in an image")
    rest: list[LabelAxis] = [None] * (len(out) - 2)
    labels.set(node.outputs[0], [None, labels.label(image, 1), *rest])


_RULES: dict[str, Callable[[Node, Labels], None]] = {
    "GatherND": _gather_nd,
    "GatherElements": _gather_elements,
    "ScatterND": _scatter_nd,
    "ScatterElements": _scatter_elements,
    "GridSample": _sampled,
    "RoiAlign": _sampled,
    "MaxRoiPool": _sampled,
}
SPECS = tuple(OpSpec(name, rule) for name, rule in _RULES.items())
