"""Views: constants that hold the elements of an initialiser, transposed, reshaped, cast to another type or dequantised.

A weight that is stored once and used in several forms is followed, cut and refitted through its views. Weights that are
stored as codes of few bits are dequantised by DequantizeLinear, or by a Cast, a difference from zero points and a
product with scales, all of them constant. Those in half precision may be cast and scaled too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from onnx_oamip.core.records import Array
from onnx_oamip.graph.ops import has
from onnx_oamip.graph.ops.spec import Trait

VIEWS = Trait.COPIES | Trait.TRANSPOSES | Trait.RESHAPES | Trait.CASTS
"""Operators whose output holds the elements of the first input."""
HALF_BYTES = 2
SLACK = 1e-6
"""Relative rounding of a quotient in single precision."""


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


def keeps_places(node: NodeProto) -> bool:
    """Tests for a node whose output holds the elements of its first input at the same places.

    Args:
        node: Any node.

    Returns:
        True for copies and casts.
    """
    return has(node, Trait.COPIES | Trait.CASTS)


def are_codes(kind: np.dtype[Any]) -> bool:
    """Tests for an element type in which weights are stored as codes.

    Args:
        kind: Element type of an initialiser.

    Returns:
        True for integers of eight bits.
    """
    return kind.kind in "iu" and kind.itemsize == 1


def is_half(kind: np.dtype[Any]) -> bool:
    """Tests for an element type of 16 bits in which weights are stored to be cast.

    Args:
        kind: Element type of an initialiser.

    Returns:
        True for a floating type of two bytes.
    """
    return kind.itemsize == HALF_BYTES and kind.kind not in "iu"


def read(node: NodeProto, source: Array, others: Sequence[Array]) -> Array | None:
    """Value of a view, without a copy where only its axes change.

    Args:
        node: The node that makes it.
        source: Value of the first input of the node.
        others: Values of its further inputs.

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
    if has(node, Trait.SCALES):
        return np.asarray(source * others[0])
    if has(node, Trait.SUBTRACTS):
        return np.asarray(source - others[0])
    if has(node, Trait.DEQUANTISES):
        scale, zero = _quantisation(node, others, source.shape)
        return np.asarray((source.astype(np.int32) - zero).astype(scale.dtype) * scale)
    return None


def write(node: NodeProto, value: Array, source: Array, others: Sequence[Array]) -> Array:
    """Value that the first input of a node needs for its output to have a given value: the inverse of :func:`read`.

    Args:
        node: The node that makes the view.
        value: New value of the view; in a narrower type than it has, it is rounded.
        source: Present value of the first input, for its type and its shape.
        others: Values of the further inputs of the node.

    Returns:
        The new value of the first input.
    """
    if has(node, Trait.TRANSPOSES):
        return value.transpose(np.argsort(_order(node, value.ndim)))
    if has(node, Trait.RESHAPES):
        return value.reshape(source.shape)
    if has(node, Trait.SCALES):
        return _divided(value, others[0])
    if has(node, Trait.SUBTRACTS):
        return np.asarray(value + others[0])
    if has(node, Trait.DEQUANTISES):
        scale, zero = _quantisation(node, others, source.shape)
        return _converted(_divided(value, scale) + zero, source.dtype)
    return _converted(value, source.dtype)


def wider_scale(
    scale: Array, value: Array, codes: np.dtype[Any], zero: Array | None = None
) -> Array:
    """Scales by which codes reach new values: the present ones where they do already.

    Args:
        scale: The present scales, which broadcast to the values.
        value: The new values.
        codes: Element type of the codes.
        zero: Zero points that are subtracted from the codes, None for none.

    Returns:
        The new scales, none of which is smaller than before.
    """
    limits = np.iinfo(codes)
    offset = np.zeros(()) if zero is None else zero.astype(np.float64)
    ratio = _divided(value, scale).astype(np.float64)
    above = np.maximum(limits.max - offset, 1)
    below = np.minimum(limits.min - offset, -1)
    beyond = np.where(ratio > 0, ratio / above, ratio / below)
    shared = tuple(
        axis
        for axis in range(value.ndim)
        if axis < value.ndim - scale.ndim or scale.shape[axis - value.ndim + scale.ndim] == 1
    )
    growth = beyond.max(axis=shared, keepdims=True, initial=1.0).reshape(scale.shape)
    # Codes that reach the limit within rounding do not need another scale.
    return np.asarray(scale * np.where(growth > 1 + SLACK, growth, 1.0), scale.dtype)


def _quantisation(
    node: NodeProto, others: Sequence[Array], shape: tuple[int, ...]
) -> tuple[Array, Array]:
    """Scales and zero points of a DequantizeLinear, which broadcast to its codes."""
    zero = others[1].astype(np.int32) if len(others) > 1 else np.zeros((), np.int32)
    return _along(node, others[0], shape), _along(node, zero, shape)


def _along(node: NodeProto, parameter: Array, shape: tuple[int, ...]) -> Array:
    """One number for all codes, one for every index of an axis, or one for a block of neighbours along it."""
    if parameter.size == 1:
        return parameter.reshape(())
    if parameter.ndim == 1:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1) % len(shape)
        return parameter.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    for axis, length in enumerate(shape):
        block = -(-length // parameter.shape[axis])
        parameter = np.repeat(parameter, block, axis=axis).take(np.arange(length), axis=axis)
    return parameter


def _divided(value: Array, scale: Array) -> Array:
    """Quotient, zero where the scale is."""
    broadcast = np.broadcast_to(scale, value.shape)
    result: Array = np.divide(value, broadcast, out=np.zeros_like(value), where=broadcast != 0)
    return result


def _converted(value: Array, kind: np.dtype[Any]) -> Array:
    """Values in another type: rounded to the nearest, integers limited to their range."""
    if kind.kind in "iu":
        limits = np.iinfo(kind)
        return np.clip(np.rint(value), limits.min, limits.max).astype(kind)
    with np.errstate(over="ignore"):
        return value.astype(kind)


def _order(node: NodeProto, rank: int) -> list[int]:
    """Permutation of the axes of a node that permutes them."""
    given = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
    if given is None:
        return list(range(rank))[::-1]
    return given
