"""Linear maps between flattened tensors, as sparse matrices: rows are output elements, columns input elements.

Most come from applying the operator itself to arrays of indices: where an index lands, the matrix has an entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array, eye_array, kron

from onnx_oamip.core.records import (
    Array,
    Floats,
    Ints,
    Node,
)
from onnx_oamip.graph.ops.windows import begins, taps

Shape = tuple[int, ...]


def places(shape: Shape) -> Ints:
    """Number the elements of a tensor in C order.

    Args:
        shape: Shape of the tensor.

    Returns:
        Flat index of every element, in the tensor's own shape.
    """
    return np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)


def gather(
    index: Ints,
    columns: int,
    weights: npt.ArrayLike = 1.0,
) -> csr_array:
    """Build the map that picks elements.

    Args:
        index: Flat index of the input element of every output element, -1 for none; taken flat.
        columns: Number of input elements.
        weights: Factors, broadcast to ``index``.

    Returns:
        The matrix (elements of ``index``, columns).
    """
    flat = index.reshape(-1)
    inside = flat >= 0
    values = np.broadcast_to(np.asarray(weights, np.float64), index.shape).reshape(-1)
    row_ends = np.cumsum(inside)
    pointers = np.concatenate([[0], row_ends])
    return csr_array((values[inside], flat[inside], pointers), shape=(len(flat), columns))


def broadcast(
    before: Shape,
    after: Shape,
    weights: npt.ArrayLike = 1.0,
) -> csr_array:
    """Build the map of multidirectional broadcasting.

    Args:
        before: Shape of the input.
        after: Shape of the output.
        weights: Factors that broadcast to ``after`` as well.

    Returns:
        The matrix (elements of ``after``, elements of ``before``).
    """
    repeated = np.broadcast_to(places(before), after)
    factors = np.broadcast_to(weights, after)
    return gather(repeated, int(np.prod(before)), factors)


def product(matrix: Array, lead: int, trailing: int = 1) -> csr_array:
    """Build the map that applies a matrix along one axis.

    Args:
        matrix: The matrix (outputs, inputs).
        lead: Number of elements of the axes in front.
        trailing: Number of elements of the axes behind.

    Returns:
        The matrix of the whole map.
    """
    inner = csr_array(matrix.astype(np.float64))
    if trailing > 1:
        inner = kron(inner, eye_array(trailing), format="csr")
    whole = kron(eye_array(lead), csr_array(inner), format="csr")
    return csr_array(whole)


def convolution(
    node: Node,
    weight: Array,
    before: Shape,
    after: Shape,
) -> csr_array:
    """Build the map of a Conv with any strides, padding, dilations and groups, without dense Toeplitz blocks.

    Args:
        node: The convolution.
        weight: Its kernel (outputs, inputs per group, *kernel).
        before: Shape of the input.
        after: Shape of the output.

    Returns:
        The matrix (elements of ``after``, elements of ``before``).
    """
    batch, inputs = before[:2]
    outputs = after[1]
    per_group = weight.shape[1]
    groups = inputs // per_group
    pixels = int(np.prod(after[2:]))
    size = int(np.prod(before[2:]))
    kernel = weight.shape[2:]
    positions = np.arange(pixels)
    read = taps(node, kernel, before=before[2:], after=after[2:], positions=positions)
    values = weight.reshape(outputs, per_group, 1, -1).astype(np.float64)
    channel = np.arange(outputs)[:, None]
    group = channel // (outputs // groups)
    source = group * per_group + np.arange(per_group)
    # Axes from here on: (output channel, input of its group, output pixel, tap).
    column = source[:, :, None, None] * size + read
    row = (channel * pixels + positions)[:, None, :, None]
    values = np.broadcast_to(values, column.shape)
    row = np.broadcast_to(row, column.shape)
    used = (read >= 0) & (values != 0)
    shape = (outputs * pixels, inputs * size)
    one_sample = coo_array((values[used], (row[used], column[used])), shape=shape)
    return csr_array(kron(eye_array(batch), one_sample, format="csr"))


def windows(node: Node, before: Shape, after: Shape) -> Ints:
    """Find the input element that every tap of a pooling window reads.

    Args:
        node: The pooling node.
        before: Shape of the input.
        after: Shape of the output.

    Returns:
        (output elements, taps): flat input elements, -1 outside the image.
    """
    planes = before[0] * before[1]
    size = int(np.prod(before[2:]))
    read = _pooled(node, before[2:], after[2:])
    first = np.arange(planes)[:, None, None] * size
    elements = np.where(read >= 0, first + read, -1)
    return elements.reshape(planes * len(read), -1)


def _kernel(node: Node) -> list[int]:
    return [int(k) for k in node.attrs["kernel_shape"]]


def _pooled(node: Node, before: Shape, after: Shape) -> Ints:
    """(output pixels, taps): the input pixel that every tap of a pooling window reads."""
    positions = np.arange(int(np.prod(after)))
    return taps(node, _kernel(node), before=before, after=after, positions=positions)


def average(node: Node, before: Shape, after: Shape) -> csr_array:
    """Build the map of an AveragePool.

    With ``count_include_pad`` the padding counts, but not the pixels that ``ceil_mode`` adds behind it.

    Args:
        node: The pooling node.
        before: Shape of the input.
        after: Shape of the output.

    Returns:
        The matrix (elements of ``after``, elements of ``before``).
    """
    read = windows(node, before, after)
    inside = read >= 0
    if node.attrs.get("count_include_pad", 0):
        counted = _taps_in_padded_image(node, before[2:], after[2:])
        count = np.tile(counted, before[0] * before[1])
    else:
        count = inside.sum(axis=1)
    row = np.broadcast_to(np.arange(len(read))[:, None], read.shape)
    share = 1 / np.maximum(count, 1)
    weight: Floats = np.broadcast_to(share[:, None], read.shape)
    shape = (len(read), int(np.prod(before)))
    return csr_array(coo_array((weight[inside], (row[inside], read[inside])), shape=shape))


def _taps_in_padded_image(node: Node, before: Shape, after: Shape) -> Ints:
    """(output pixels,): number of taps that lie in the image or its padding."""
    kernel = _kernel(node)
    first = begins(node, kernel, before, after)
    pads = node.attrs.get("pads")
    if pads:
        last = [int(p) for p in pads[len(first) :]]
    else:
        last = first
    if (node.attrs.get("auto_pad", "NOTSET") or "NOTSET").startswith("SAME"):
        # Windows end inside the image: any bound that is large enough will do.
        last = [max(k, f) for k, f in zip(kernel, first, strict=True)]
    sides = zip(before, first, last, strict=True)
    padded = tuple(size + front + back for size, front, back in sides)
    unpadded = {k: v for k, v in node.attrs.items() if k not in ("pads", "auto_pad")}
    read = _pooled(replace(node, attrs=unpadded), padded, after)
    return np.asarray((read >= 0).sum(axis=1))


def reduction(shape: Shape, axes: Sequence[int], mean: bool) -> csr_array:
    """Build the map of a sum or a mean over axes.

    Args:
        shape: Shape of the input.
        axes: Axes that are reduced.
        mean: Divide by the number of elements.

    Returns:
        The matrix (elements of the result, elements of the input).
    """
    kept = tuple(1 if a in axes else n for a, n in enumerate(shape))
    row = np.broadcast_to(places(kept), shape).reshape(-1)
    size = int(np.prod(shape))
    total = int(np.prod(kept))
    weight = np.full(size, total / size if mean else 1.0)
    return csr_array(coo_array((weight, (row, np.arange(size))), shape=(total, size)))
