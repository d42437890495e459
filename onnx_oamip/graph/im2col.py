"""What a linear operator sees and gives, as rows: ``y_row = W x_row + b`` at sampled positions.

Convolutions are cut into patches (im2col) only at randomly sampled output positions, the same for every tensor of one
node, so that neither memory nor time grows with the size of the image.
"""

from __future__ import annotations

import numpy as np

from onnx_oamip.core.records import Array, Floats, Ints
from onnx_oamip.graph.ops import taps
from onnx_oamip.graph.ops.matrix_view import Site


def row_count(site: Site, output: tuple[int, ...]) -> int:
    """Rows in one feed: (image, pixel) pairs of the output, or all positions but the channel's."""
    return int(np.prod(output)) // output[site.output_axis]


def pick(total: int, wanted: int, rng: np.random.Generator) -> Ints:
    """At most ``wanted`` of ``total`` rows, evenly spread (one at random in every stretch), ascending."""
    if wanted >= total:
        return np.arange(total, dtype=np.int64)
    edges = np.arange(wanted + 1) * total // wanted  # whole numbers: stretches do not overlap
    return np.minimum(
        edges[:-1] + (rng.random(wanted) * np.diff(edges)).astype(np.int64), edges[1:] - 1
    )


def data_rows(site: Site, x: Array, rows: Ints, output: tuple[int, ...]) -> Floats:
    """(rows, groups, inputs per group * taps) float64: what the node reads for each of the given output rows."""
    if not site.spatial:
        flat = np.moveaxis(x, site.data_axis, -1)
        return flat.reshape(-1, flat.shape[-1])[rows][:, None, :].astype(np.float64)
    image, pixel = np.divmod(rows, int(np.prod(output[2:])))
    index = taps(
        site.node, site.kernel, x.shape[2:], output[2:], pixel
    )  # (rows, taps), -1 outside the image
    channels = x.shape[1]
    flat = x.reshape(len(x), channels, -1)
    found = flat[image[:, None], :, np.maximum(index, 0)]  # (rows, taps, channels)
    found = np.where(index[..., None] >= 0, found, 0).astype(np.float64)
    per_group = channels // site.groups
    shaped = found.reshape(len(rows), index.shape[1], site.groups, per_group)
    return shaped.transpose(0, 2, 3, 1).reshape(len(rows), site.groups, per_group * index.shape[1])


def output_rows(site: Site, y: Array, rows: Ints) -> Floats:
    """(rows, outputs) float64: what the node gives at the same rows."""
    flat = np.moveaxis(y, site.output_axis, -1)
    return flat.reshape(-1, flat.shape[-1])[rows].astype(np.float64)
