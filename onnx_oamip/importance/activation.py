"""Energy that consumers receive from each unit: the mean square of its channels times their squared weights.

For a consumer ``y = sum_c W_c x_c`` the share of channel c is ``E[x_c^2] ||W_c||^2`` over the sum of all channels; a
unit sums the shares of its channels in all its consumers. Shares make consumers of different scale comparable. Inside
the bodies of If, Loop and Scan no statistics are collected: all channels count there as equally strong.
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
from onnx_oamip.graph.linear_layers import matrix, site
from onnx_oamip.importance.magnitude import power_sums
from onnx_oamip.statistics.requests import RELEVANCE


def score(
    model: Model,
    coupling: Coupling,
    statistics: Statistics | None,
    settings: Settings,
) -> Scores:
    """Score units by their shares of the energy of all consumers.

    Where the objective has several terms a consumer counts by the loss that its errors bring, 1 on average.

    Args:
        model: The model.
        coupling: Its units and consumers.
        statistics: Moments of the consumed axes, and the relevance of consumers.
        settings: Not read.

    Returns:
        One score per unit.
    """
    assert statistics is not None
    total = np.zeros(coupling.n_units)
    loud = _loss_of_consumers(model, coupling, statistics)
    for consumer in (*coupling.consumers, *coupling.inside):
        total += loud.get(consumer.node, 1.0) * shares(model, coupling, statistics, consumer)
    return Scores("activation", total)


def _loss_of_consumers(
    model: Model,
    coupling: Coupling,
    statistics: Statistics,
) -> dict[str, float]:
    """Loss where a consumer's output is as wrong as it is large, over the mean of all; empty without relevance."""
    relevance = statistics.get(RELEVANCE, {})
    nodes = {node.name: node for node in model.nodes}
    result = {}
    for consumer in coupling.consumers:
        values = relevance.get(consumer.node)
        known = statistics.moments.get((consumer.data, consumer.axis))
        place = site(nodes[consumer.node], model.constants)
        if values is None or known is None or place is None:
            continue
        weight = np.square(matrix(place, model.constants[place.weight])).sum(axis=3)
        square = known.mean_square.reshape(weight.shape[0], 1, -1)
        energy = (weight * square).sum(axis=2).reshape(-1)
        result[consumer.node] = float(values @ energy)
    mean = sum(result.values()) / max(len(result), 1)
    if mean:
        return {name: value / mean for name, value in result.items()}
    return {}


def shares(
    model: Model,
    coupling: Coupling,
    statistics: Statistics,
    consumer: Consumer,
) -> Floats:
    """Compute the share of each unit in the energy of one consumer.

    Args:
        model: The model.
        coupling: Its units.
        statistics: Moments of the consumed axes.
        consumer: The consumer.

    Returns:
        Shares (n_units,), 0 for units that the consumer does not read.
    """
    labels = coupling.axes[consumer.data, consumer.axis]
    moments = statistics.moments.get((consumer.data, consumer.axis))
    energy = weight_energy(model, consumer, statistics)
    # Consumers inside bodies have no moments, and the weights alone count.
    if moments is not None:
        energy = moments.mean_square * energy
    total = energy.sum()
    free = labels >= 0
    share = energy[free] / (total if total > 0 else 1.0)
    return np.bincount(labels[free], share, minlength=coupling.n_units).astype(np.float64)


def weight_energy(
    model: Model,
    consumer: Consumer,
    statistics: Statistics,
) -> Floats:
    """Compute the energy of the weights of each channel of a consumer.

    Args:
        model: The model.
        consumer: The consumer.
        statistics: Moments of the consumed axes.

    Returns:
        Squared norm of the weights of each channel (C,), or the mean square of the activation in their place.
    """
    channels = model.shapes[consumer.data][consumer.axis]
    if consumer.weight is None:
        return np.ones(channels)
    axis = consumer.weight_axis
    if consumer.weight not in model.constants:
        moments = statistics.moments.get((consumer.weight, axis))
        if moments is None:
            return np.ones(channels)
        return moments.mean_square
    weight = model.constants[consumer.weight]
    if consumer.groups > 1 and weight.shape[axis] != channels:
        # (outputs, channels per group, ...): channel j of group i meets the rows of group i only.
        blocks = weight.reshape(consumer.groups, -1, *weight.shape[1:])
        return power_sums(blocks, (1, *range(3, blocks.ndim)), 2).reshape(-1)
    others = tuple(a for a in range(weight.ndim) if a != axis)
    return power_sums(weight, others, 2)
