"""Second moments of the channels of linear streams, in one pass over calibration samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_oamip.core.records import Array, Axis, Floats, Model
from onnx_oamip.graph.im2col import pick
from onnx_oamip.graph.partial_execution import element_types, stream

ROWS_PER_CHANNEL = 16
LEAST_ROWS = 65536


@dataclass(frozen=True)
class StreamMoments:
    """Moments of the channels of one tensor.

    Attributes:
        mean: Means (channels,).
        second: Mean products (channels, channels).
    """

    mean: Floats
    second: Floats

    @property
    def covariance(self) -> Floats:
        """Covariance (channels, channels)."""
        centred: Floats = self.second - np.outer(self.mean, self.mean)
        return centred


def collect(
    model: Model,
    axes: Sequence[Axis],
    feeds: Sequence[Mapping[str, Array]],
    device: str,
    *,
    seed: int = 0,
) -> dict[Axis, StreamMoments]:
    """Collect means and mean products of the channels along some axes, over sampled positions of all feeds.

    Args:
        model: The model.
        axes: Tensors, each with the axis of its channels.
        feeds: Calibration samples.
        device: Device that the model runs on.
        seed: Seed of the choice of positions.

    Returns:
        Moments by axis; not finite where the channels are not.
    """
    order = {name: i for i, node in enumerate(model.nodes) for name in node.outputs}
    targets = sorted(dict.fromkeys(axes), key=lambda axis: order[axis[0]])
    sums: dict[Axis, tuple[int, Floats, Floats]] = {}
    names = [tensor for tensor, _ in targets]
    types = element_types(model.proto, model.dtypes)
    rng = np.random.default_rng(seed)
    for _, place, value in stream(model.proto, feeds, names, types, device):
        axis = targets[place]
        width = value.shape[axis[1]]
        channels = np.moveaxis(value, axis[1], 0).reshape(width, -1)
        wanted = max(LEAST_ROWS, ROWS_PER_CHANNEL * width) // len(feeds) + 1
        channels = channels[:, pick(channels.shape[1], wanted, rng)].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            total, products = channels.sum(axis=1), channels @ channels.T
        rows, before, products_before = sums.get(axis, (0, np.zeros(()), np.zeros(())))
        sums[axis] = rows + channels.shape[1], before + total, products_before + products
    return {
        axis: StreamMoments(total / rows, products / rows)
        for axis, (rows, total, products) in sums.items()
    }
