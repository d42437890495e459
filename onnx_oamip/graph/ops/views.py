"""Views: constants that hold the elements of an initialiser, transposed, reshaped or cast to another type.

A weight that is stored once and used in several forms is followed, cut and refitted through its views.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, helper

from onnx_oamip.core.records import Array
from onnx_oamip.graph.ops import has
from onnx_oamip.graph.ops.spec import Trait

VIEWS = Trait.COPIES | Trait.TRANSPOSES | Trait.RESHAPES | Trait.CASTS
"""Operators whose output holds the elements of the first input."""


def is_identity(node: NodeProto) -> bool:
    """Tests for a node whose output is its input.

    Args:
        node: Any node.

    Returns:
        True if every reader could read the input instead.
    """
    return has(node, Trait.COPIES)


def is_view(node: NodeProto) -> bool:
    """Tests for a node that moves or casts the elements of its first input and does nothing else.

    Args:
        node: A node that reads constants only.

    Returns:
        True if a new value of its output can be written to its first input.
    """
    return has(node, VIEWS)


def read(node: NodeProto, source: Array) -> Array | None:
    """Value of a view, without a copy where only its axes change.

    Args:
        node: The node that makes it.
        source: Value of the first input of the node.

    Returns:
        The value, or None if the node has to be run, because its shape is an input.
    """
    if has(node, Trait.COPIES):
        return source
    if has(node, Trait.TRANSPOSES):
        return source.transpose(_order(node, source.ndim))
    if has(node, Trait.CASTS):
        target = next(a.i for a in node.attribute if a.name == "to")
        return source.astype(helper.tensor_dtype_to_np_dtype(target))
    return None


def write(node: NodeProto, value: Array, source: Array) -> Array:
    """Value that the first input of a node needs for its output to have a given value: the inverse of :func:`read`.

    Args:
        node: The node that makes the view.
        value: New value of the view; in a narrower type than it has, it is rounded.
        source: Present value of the first input, for its type and its shape.

    Returns:
        The new value of the first input.
    """
    if has(node, Trait.TRANSPOSES):
        return value.transpose(np.argsort(_order(node, value.ndim)))
    if has(node, Trait.RESHAPES):
        return value.reshape(source.shape)
    with np.errstate(over="ignore"):
        return value.astype(source.dtype)


def _order(node: NodeProto, rank: int) -> list[int]:
    """Permutation of the axes of a node that permutes them."""
    given = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
    if given is None:
        return list(range(rank))[::-1]
    return given
