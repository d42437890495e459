"""Lists of lengths, as a constant or joined from pieces of which some are constants: those a cut can change."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnx_oamip.core.records import Array, Node
from onnx_oamip.graph.ops.handles import Cuts, Labels


def elements(tensor: str, graph: Labels | Cuts) -> list[int | None] | None:
    """Read the numbers of a list that are known before the model runs.

    Args:
        tensor: Name of the list.
        graph: Constants and producers.

    Returns:
        The numbers, None for those read at run time; None for a list that is computed as a whole.
    """
    value = graph.constant(tensor)
    if value is not None:
        return [int(number) for number in value.reshape(-1)]
    maker = graph.producer(tensor)
    if maker is None or maker.op != "Concat" or maker.domain:
        return None
    result: list[int | None] = []
    for name in maker.inputs:
        piece = graph.constant(name)
        shape = graph.shape(name)
        if shape is None or len(shape) != 1:
            return None
        result += [None] * shape[0] if piece is None else [int(number) for number in piece]
    return result


LONGEST = 64
"""Lists with more elements are not followed."""


def followed(tensor: str, graph: Labels | Cuts) -> list[int | None] | None:
    """Read the numbers of a list that are known before the model runs, also where operators move its elements.

    Args:
        tensor: Name of the list.
        graph: Constants, shapes and producers.

    Returns:
        The numbers, None for those computed at run time; None for a list of unknown length.
    """
    found = _cells(tensor, graph)
    return None if found is None else found.reshape(-1).tolist()


def _cells(tensor: str, graph: Labels | Cuts) -> Array | None:
    """The elements of a small tensor in its shape, None for those that are computed."""
    value = graph.constant(tensor)
    if value is not None:
        return value.astype(object) if value.size <= LONGEST else None
    shape = graph.shape(tensor)
    if shape is None or np.prod(shape) > LONGEST:
        return None
    unknown = np.full(shape, None, object)
    maker = graph.producer(tensor)
    move = None if maker is None or maker.domain else _MOVES.get(maker.op)
    if maker is None or move is None:
        return unknown
    parts = [
        _cells(name, graph) for name in (maker.inputs if maker.op == "Concat" else maker.inputs[:1])
    ]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return unknown
    try:
        moved = move(maker, tensor, known, graph)
    except (KeyError, ValueError, IndexError):
        return unknown
    return moved if moved.shape == shape else unknown


_Move = Callable[[Node, str, list[Array], "Labels | Cuts"], Array]


def _same(node: Node, tensor: str, parts: list[Array], graph: Labels | Cuts) -> Array:
    del node
    return parts[0].reshape(graph.shape(tensor) or ())


def _concat(node: Node, tensor: str, parts: list[Array], graph: Labels | Cuts) -> Array:
    del tensor, graph
    return np.concatenate(parts, axis=int(node.attrs["axis"]))


def _split(node: Node, tensor: str, parts: list[Array], graph: Labels | Cuts) -> Array:
    axis = int(node.attrs.get("axis", 0))
    lengths = [(graph.shape(name) or ())[axis] for name in node.outputs]
    pieces = np.split(parts[0], np.cumsum(lengths)[:-1].tolist(), axis)
    return pieces[node.outputs.index(tensor)]


def _transpose(node: Node, tensor: str, parts: list[Array], graph: Labels | Cuts) -> Array:
    del tensor, graph
    return np.transpose(parts[0], node.attrs.get("perm"))


def _gather(node: Node, tensor: str, parts: list[Array], graph: Labels | Cuts) -> Array:
    del tensor
    picks = graph.constant(node.inputs[1])
    if picks is None:
        raise KeyError(node.inputs[1])
    return np.asarray(np.take(parts[0], picks, int(node.attrs.get("axis", 0))))


_MOVES: dict[str, _Move] = {
    **dict.fromkeys(("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten"), _same),
    "Concat": _concat,
    "Split": _split,
    "Transpose": _transpose,
    "Gather": _gather,
}
