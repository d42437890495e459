"""Mean square of what consumers receive, weighted by their weights.

For a consumer ``y = sum_c W_c x_c`` the share of channel c is ``E[x_c^2] ||W_c||^2`` over the sum of all channels; a
unit collects the shares of its channels in all its consumers. Shares make consumers of different scale comparable.
Inside the bodies of If, Loop and Scan nothing is measured: all channels count there as equally strong.
"""

from __future__ import annotations

import numpy as np

from onnx_oamip.core.records import (
    Consumer,
    Coupling,
    Floats,
    Model,
    Scores,
    Statistics,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.importance.magnitude import sums


def score(
    model: Model, coupling: Coupling, statistics: Statistics | None, settings: Settings
) -> Scores:
    """Shares of output energy per unit, summed over consumers."""
    assert statistics is not None
    total = np.zeros(coupling.n_units)
    for consumer in (*coupling.consumers, *coupling.inside):
        total += shares(model, coupling, statistics, consumer)
    return Scores("activation", total)


def shares(model: Model, coupling: Coupling, statistics: Statistics, consumer: Consumer) -> Floats:
    """Share of one consumer's energy that each unit brings (n_units,)."""
    labels = coupling.axes[consumer.data, consumer.axis]
    known = statistics.moments.get((consumer.data, consumer.axis))
    energy = meeting(model, consumer, statistics)
    if known is not None:  # inside a body nothing is measured, and the weights have to do
        energy = known.mean_square * energy
    whole = energy.sum()
    free = labels >= 0
    share = energy[free] / (whole if whole > 0 else 1.0)
    return np.bincount(labels[free], share, minlength=coupling.n_units).astype(np.float64)


def meeting(model: Model, consumer: Consumer, statistics: Statistics) -> Floats:
    """Energy of what meets each channel (C,): squared norm of its weights, or mean square of the other activation."""
    channels = model.shapes[consumer.data][consumer.axis]
    if consumer.weight is None:
        return np.ones(channels)
    if consumer.weight not in model.constants:
        known = statistics.moments.get((consumer.weight, consumer.weight_axis))
        return np.ones(channels) if known is None else known.mean_square
    weight, axis, groups = model.constants[consumer.weight], consumer.weight_axis, consumer.groups
    if groups > 1 and weight.shape[axis] != channels:
        # (outputs, channels per group, ...): channel j of group i meets the rows of group i only.
        blocks = weight.reshape(groups, -1, *weight.shape[1:])
        return sums(blocks, (1, *range(3, blocks.ndim)), 2).reshape(-1)
    others = tuple(a for a in range(weight.ndim) if a != axis)
    return sums(weight, others, 2)
