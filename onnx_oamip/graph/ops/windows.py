"""Which input pixels a kernel or pooling window reads at every output position, with padding as ONNX defines it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_oamip.core.records import Ints, Node

Shape = tuple[int, ...]


def taps(node: Node, kernel: Sequence[int], before: Shape, after: Shape, positions: Ints) -> Ints:
    """(positions, taps): flat input pixel that every kernel tap reads at every output position, -1 for padding.

    ``before`` and ``after`` are the spatial shapes of input and output, ``positions`` flat indices into ``after``.
    """
    attrs, rank = node.attrs, len(before)
    strides = [int(s) for s in attrs.get("strides", [1] * rank)]
    dilations = [int(d) for d in attrs.get("dilations", [1] * rank)]
    first = begins(node, kernel, before, after)
    place = np.stack(np.unravel_index(positions, after), axis=-1)  # (rows, rank)
    flat = np.zeros((*positions.shape, 1), np.int64)
    inside = np.ones((*positions.shape, 1), bool)
    for d in range(rank):
        tap = np.arange(kernel[d]) * dilations[d]
        if node.op != "ConvTranspose":
            at = place[..., d, None] * strides[d] + tap - first[d]
            valid = (at >= 0) & (at < before[d])
        else:
            shifted = place[..., d, None] + first[d] - tap
            at = shifted // strides[d]
            valid = (shifted % strides[d] == 0) & (at >= 0) & (at < before[d])
        shape = (*positions.shape, -1)
        flat = (flat[..., :, None] * before[d] + at[..., None, :]).reshape(shape)
        inside = (inside[..., :, None] & valid[..., None, :]).reshape(shape)
    return np.where(inside, flat, -1)


def begins(node: Node, kernel: Sequence[int], before: Shape, after: Shape) -> list[int]:
    """Padding before the first pixel per axis, given or derived as the operator specification does."""
    attrs, transposed = node.attrs, node.op == "ConvTranspose"
    rank = len(before)
    mode = attrs.get("auto_pad", "NOTSET") or "NOTSET"
    if mode == "VALID":
        return [0] * rank
    if mode == "NOTSET" and not (transposed and "output_shape" in attrs):
        return [int(p) for p in attrs.get("pads", [0] * (2 * rank))[:rank]]
    extra = attrs.get("output_padding", [0] * rank)
    strides = [int(s) for s in attrs.get("strides", [1] * rank)]
    dilations = [int(d) for d in attrs.get("dilations", [1] * rank)]
    result = []
    for i, (n, m, k, s, d) in enumerate(
        zip(before, after, kernel, strides, dilations, strict=True)
    ):
        span = (k - 1) * d + 1
        total = (n - 1) * s + extra[i] + span - m if transposed else max((m - 1) * s + span - n, 0)
        result.append(total // 2 if mode == "SAME_UPPER" else total - total // 2)
    return result
