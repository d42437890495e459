"""Linear maps between flattened tensors, as sparse matrices: rows are output elements, columns input elements.

Most come from applying the operator itself to index arrays: what lands where says which entries there are.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """Flat index of every element, in the tensor's own shape."""
    return np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)


def gather(index: Ints, columns: int, weights: npt.ArrayLike = 1.0) -> csr_array:
    """Row i is ``weights[i]`` times element ``index[i]``; -1 reads nothing. ``index`` is taken flat."""
    flat = index.reshape(-1)
    inside = flat >= 0
    values = np.broadcast_to(np.asarray(weights, np.float64), index.shape).reshape(-1)
    pointers = np.concatenate([[0], np.cumsum(inside)])
    return csr_array((values[inside], flat[inside], pointers), shape=(len(flat), columns))


def broadcast(before: Shape, after: Shape, weights: npt.ArrayLike = 1.0) -> csr_array:
    """Multidirectional broadcasting of ``before`` to ``after``, times weights that broadcast alike."""
    return gather(
        np.broadcast_to(places(before), after),
        int(np.prod(before)),
        np.broadcast_to(weights, after),
    )


def product(matrix: Array, lead: int, trailing: int = 1) -> csr_array:
    """``matrix`` applied along an axis with ``lead`` elements before it and ``trailing`` ones behind it."""
    inner = (
        kron(csr_array(matrix.astype(np.float64)), eye_array(trailing), format="csr")
        if trailing > 1
        else matrix
    )
    return csr_array(kron(eye_array(lead), csr_array(inner).astype(np.float64), format="csr"))


def convolution(node: Node, weight: Array, before: Shape, after: Shape) -> csr_array:
    """Conv with any strides, padding, dilations and groups; one row per output element, no dense Toeplitz blocks."""
    batch, outputs, inputs = before[0], after[1], before[1]
    per_in = weight.shape[1]
    groups = inputs // per_in
    pixels, size = int(np.prod(after[2:])), int(np.prod(before[2:]))
    read = taps(node, weight.shape[2:], before[2:], after[2:], np.arange(pixels))  # (pixels, taps)
    values = weight.reshape(outputs, per_in, 1, -1).astype(np.float64)
    first = (np.arange(outputs) // (outputs // groups) * per_in)[:, None] + np.arange(per_in)
    column = first[:, :, None, None] * size + read
    row = (np.arange(outputs)[:, None] * pixels + np.arange(pixels))[:, None, :, None]
    use = np.broadcast_to(read >= 0, column.shape) & (values != 0)
    place = (np.broadcast_to(row, column.shape)[use], column[use])
    one = coo_array(
        (np.broadcast_to(values, column.shape)[use], place), shape=(outputs * pixels, inputs * size)
    )
    return csr_array(kron(eye_array(batch), one, format="csr"))


def windows(node: Node, before: Shape, after: Shape) -> Ints:
    """(output elements, taps): flat input element that every tap of a pooling window reads, -1 outside the image."""
    planes, pixels = before[0] * before[1], int(np.prod(after[2:]))
    kernel = [int(k) for k in node.attrs["kernel_shape"]]
    read = taps(node, kernel, before[2:], after[2:], np.arange(pixels))
    shifted = np.arange(planes)[:, None, None] * int(np.prod(before[2:])) + read
    return np.where(read >= 0, shifted, -1).reshape(planes * pixels, -1)


def average(node: Node, before: Shape, after: Shape) -> csr_array:
    """AveragePool. With ``count_include_pad`` the padding counts, but not what ``ceil_mode`` adds behind it."""
    read = windows(node, before, after)
    inside = read >= 0
    count = inside.sum(axis=1)
    if node.attrs.get("count_include_pad", 0):
        kernel = [int(k) for k in node.attrs["kernel_shape"]]
        first = begins(node, kernel, before[2:], after[2:])
        pads = node.attrs.get("pads")
        last = [int(p) for p in pads[len(first) :]] if pads else first
        if (node.attrs.get("auto_pad", "NOTSET") or "NOTSET").startswith("SAME"):
            last = [
                max(k, f) for k, f in zip(kernel, first, strict=True)
            ]  # windows end inside, so any bound will do
        padded = tuple(n + f + b for n, f, b in zip(before[2:], first, last, strict=True))
        bare = Node(
            node.name,
            node.op,
            node.domain,
            node.version,
            node.inputs,
            node.outputs,
            {k: v for k, v in node.attrs.items() if k not in ("pads", "auto_pad")},
        )
        pixels = taps(bare, kernel, padded, after[2:], np.arange(int(np.prod(after[2:]))))
        count = np.tile((pixels >= 0).sum(axis=1), before[0] * before[1])
    row = np.broadcast_to(np.arange(len(read))[:, None], read.shape)
    weight: Floats = np.broadcast_to(1 / np.maximum(count, 1)[:, None], read.shape)
    shape = (len(read), int(np.prod(before)))
    return csr_array(coo_array((weight[inside], (row[inside], read[inside])), shape=shape))


def reduction(shape: Shape, axes: Sequence[int], mean: bool) -> csr_array:
    """Sum or mean over axes."""
    kept = tuple(1 if a in axes else n for a, n in enumerate(shape))
    row = np.broadcast_to(places(kept), shape).reshape(-1)
    size, total = int(np.prod(shape)), int(np.prod(kept))
    weight = np.full(size, total / size if mean else 1.0)
    return csr_array(coo_array((weight, (row, np.arange(size))), shape=(total, size)))
