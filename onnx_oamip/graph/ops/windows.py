"""Windows of kernels and pooling: the input pixels that are read at every output position, with ONNX's padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnx_oamip.core.records import Bools, Ints, Node

Shape = tuple[int, ...]


def taps(
    node: Node,
    kernel: Sequence[int],
    *,
    before: Shape,
    after: Shape,
    positions: Ints,
) -> Ints:
    """Find the input pixel that every tap of a kernel reads.

    Args:
        node: A convolution or a pooling node.
        kernel: Spatial shape of the kernel.
        before: Spatial shape of the input.
        after: Spatial shape of the output.
        positions: Flat indices into ``after``.

    Returns:
        (positions, taps): flat indices into ``before``, -1 for padding.
    """
    rank = len(before)
    strides = _per_axis(node, "strides", rank)
    dilations = _per_axis(node, "dilations", rank)
    first = begins(node, kernel, before, after)
    place = np.stack(np.unravel_index(positions, after), axis=-1)  # (positions, rank)
    flat = np.zeros((*positions.shape, 1), np.int64)
    inside = np.ones((*positions.shape, 1), bool)
    shape = (*positions.shape, -1)
    for axis in range(rank):
        reach = np.arange(kernel[axis]) * dilations[axis] - first[axis]
        along = place[..., axis, None]
        if node.op == "ConvTranspose":
            pixel, read = _scattered(along - reach, strides[axis])
        else:
            pixel = along * strides[axis] + reach
            read = np.ones(pixel.shape, bool)
        read &= (pixel >= 0) & (pixel < before[axis])
        # Taps of this axis, for each of those of the axes before.
        flat = (flat[..., :, None] * before[axis] + pixel[..., None, :]).reshape(shape)
        inside = (inside[..., :, None] & read[..., None, :]).reshape(shape)
    return np.where(inside, flat, -1)


def _scattered(distance: Ints, stride: int) -> tuple[Ints, Bools]:
    """(input pixel, whether there is one) at a distance in a transposed convolution: every ``stride``-th is."""
    return distance // stride, distance % stride == 0


def missing(node: Node, kernel: Sequence[int], before: Shape) -> int:
    """Count the pixels that an axis lacks for one window of a convolution or a pooling node.

    Shape inference divides by the stride and rounds towards zero, so that such an axis may come out with one position.

    Args:
        node: A node that is no transposed convolution.
        kernel: Spatial shape of the kernel.
        before: Spatial shape of the input.

    Returns:
        The most pixels that an axis lacks, 0 where a window fits.
    """
    if (node.attrs.get("auto_pad") or "NOTSET").startswith("SAME"):
        return 0
    rank = len(before)
    padding = node.attrs.get("pads", [0] * (2 * rank))
    dilations = _per_axis(node, "dilations", rank)
    lacks = [0]
    for axis in range(rank):
        span = (kernel[axis] - 1) * dilations[axis] + 1
        lacks.append(span - before[axis] - int(padding[axis]) - int(padding[axis + rank]))
    return max(lacks)


def begins(
    node: Node,
    kernel: Sequence[int],
    before: Shape,
    after: Shape,
) -> list[int]:
    """Find the padding in front of the first pixel, given or derived as the operator specification does.

    Args:
        node: A convolution or a pooling node.
        kernel: Spatial shape of the kernel.
        before: Spatial shape of the input.
        after: Spatial shape of the output.

    Returns:
        Pixels of padding per axis.
    """
    attrs = node.attrs
    transposed = node.op == "ConvTranspose"
    rank = len(before)
    mode = attrs.get("auto_pad", "NOTSET") or "NOTSET"
    if mode == "VALID":
        return [0] * rank
    if mode == "NOTSET" and not (transposed and "output_shape" in attrs):
        return [int(p) for p in attrs.get("pads", [0] * (2 * rank))[:rank]]
    extra = attrs.get("output_padding", [0] * rank)
    strides = _per_axis(node, "strides", rank)
    dilations = _per_axis(node, "dilations", rank)
    result = []
    for axis in range(rank):
        stride = strides[axis]
        span = (kernel[axis] - 1) * dilations[axis] + 1
        if transposed:
            full = (before[axis] - 1) * stride + extra[axis] + span
            total = full - after[axis]
        else:
            needed = (after[axis] - 1) * stride + span
            total = max(needed - before[axis], 0)
        smaller = total // 2
        result.append(smaller if mode == "SAME_UPPER" else total - smaller)
    return result


def _per_axis(node: Node, name: str, rank: int) -> list[int]:
    values: Sequence[Any] = node.attrs.get(name, [1] * rank)
    return [int(value) for value in values]
