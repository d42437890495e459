"""Inputs and outputs of linear nodes as rows: ``y_row = W x_row + b`` at sampled positions.

Convolutions are cut into patches (im2col) only at randomly sampled output positions, the same for every tensor of one
node, so that neither memory nor time grows with the size of the image.
"""

from __future__ import annotations

import numpy as np

from onnx_oamip.core.records import Array, Floats, Ints
from onnx_oamip.graph.ops import taps
from onnx_oamip.graph.ops.matrix_view import Site


def row_count(site: Site, output: tuple[int, ...]) -> int:
    """Count the rows of one feed.

    Args:
        site: The linear node.
        output: Shape of its output.

    Returns:
        Number of (image, pixel) pairs of a convolution, of positions but the channel's of a product.
    """
    channels = output[site.output_axis]
    return int(np.prod(output)) // channels


def row_axes(site: Site, output: tuple[int, ...]) -> tuple[int, ...]:
    """Return the lengths of the axes that the rows of one feed run over.

    Args:
        site: The linear node.
        output: Shape of its output.

    Returns:
        The shape of the output without the axis of its channels.
    """
    axis = site.output_axis % len(output)
    return output[:axis] + output[axis + 1 :]


def pick(total: int, wanted: int, rng: np.random.Generator) -> Ints:
    """Choose rows that are evenly spread: one at random in every stretch.

    Args:
        total: Number of rows.
        wanted: Largest number to choose.
        rng: Source of randomness.

    Returns:
        Indices of rows, ascending; all of them if there are no more than ``wanted``.
    """
    if wanted >= total:
        return np.arange(total, dtype=np.int64)
    # Whole numbers as edges: stretches do not overlap.
    edges = np.arange(wanted + 1) * total // wanted
    lengths = np.diff(edges)
    offsets = (rng.random(wanted) * lengths).astype(np.int64)
    chosen: Ints = np.minimum(edges[:-1] + offsets, edges[1:] - 1)
    return chosen


def pick_weighted(
    weights: Floats,
    wanted: int,
    rng: np.random.Generator,
) -> Ints:
    """Choose rows in proportion to weights, so that plain sums over the chosen rows are weighted sums over all.

    Rows are evenly spread over the sum of the weights; one of a large weight is chosen repeatedly. A feed of large
    weights gets more rows.

    Args:
        weights: Positive weights of the rows, about 1 on average over all feeds.
        wanted: Rows to choose where the mean weight is 1. Fewer are chosen if they include every row anyway.
        rng: Source of randomness.

    Returns:
        Indices of rows, ascending.
    """
    if not weights.size:
        return np.zeros(0, np.int64)
    sums = np.cumsum(weights)
    whole = float(sums[-1])
    enough = whole / float(weights.min())
    count = max(1, round(min(wanted * whole / len(weights), enough)))
    places = (np.arange(count) + rng.random(count)) * (whole / count)
    chosen: Ints = np.minimum(np.searchsorted(sums, places, side="right"), len(weights) - 1)
    return chosen


def data_rows(
    site: Site,
    x: Array,
    rows: Ints,
    output: tuple[int, ...],
) -> Floats:
    """Cut out the inputs that the node combines for some rows of its output.

    Args:
        site: The linear node.
        x: Value of its data input.
        rows: Indices of rows of the output.
        output: Shape of the output.

    Returns:
        (rows, groups, inputs per group * taps) in float64, zeros for padding.
    """
    if not site.spatial:
        flat = np.moveaxis(x, site.data_axis, -1)
        chosen = flat.reshape(-1, flat.shape[-1])[rows]
        return chosen[:, None, :].astype(np.float64)
    pixels = int(np.prod(output[2:]))
    image, pixel = np.divmod(rows, pixels)
    # (rows, taps), -1 outside the image
    index = taps(site.node, site.kernel, before=x.shape[2:], after=output[2:], positions=pixel)
    images, channels = x.shape[:2]
    flat = x.reshape(images, channels, -1)
    inside = index >= 0
    patches = flat[image[:, None], :, np.maximum(index, 0)]  # (rows, taps, channels)
    padded = np.where(inside[..., None], patches, 0).astype(np.float64)
    count, kernel_size = index.shape
    per_group = channels // site.groups
    by_group = padded.reshape(count, kernel_size, site.groups, per_group)
    inputs_first = by_group.transpose(0, 2, 3, 1)
    return inputs_first.reshape(count, site.groups, per_group * kernel_size)


def output_rows(site: Site, y: Array, rows: Ints) -> Floats:
    """Cut out the outputs of the node at some rows.

    Args:
        site: The linear node.
        y: Value of its output.
        rows: Indices of rows.

    Returns:
        (rows, outputs) in float64.
    """
    flat = np.moveaxis(y, site.output_axis, -1)
    chosen = flat.reshape(-1, flat.shape[-1])[rows]
    return chosen.astype(np.float64)
