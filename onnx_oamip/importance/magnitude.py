"""Weight norms over coupled channels: a unit scores by every weight that its removal removes, in any layer."""

from __future__ import annotations

import numpy as np

from onnx_oamip.core.records import (
    Array,
    Coupling,
    Floats,
    Model,
    Scores,
    Statistics,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph.ops import lookup
from onnx_oamip.graph.outputs import is_float


def l1(
    model: Model,
    coupling: Coupling,
    statistics: Statistics | None,
    settings: Settings,
) -> Scores:
    """Score units by the sum of their absolute weights.

    Args:
        model: The model.
        coupling: Its units.
        statistics: Not read.
        settings: Not read.

    Returns:
        One score per unit.
    """
    return Scores("l1", _powers_by_unit(model, coupling, 1))


def l2(
    model: Model,
    coupling: Coupling,
    statistics: Statistics | None,
    settings: Settings,
) -> Scores:
    """Score units by the square root of the sum of their squared weights.

    Args:
        model: The model.
        coupling: Its units.
        statistics: Not read.
        settings: Not read.

    Returns:
        One score per unit.
    """
    return Scores("l2", np.sqrt(_powers_by_unit(model, coupling, 2)))


def power_sums(weight: Array, axes: tuple[int, ...], power: int) -> Floats:
    """Sum powers of absolute weights, in float64 without a float64 copy of the whole weight.

    Powers are taken of weights scaled to at most 1, by a power of two: in their own type they may overflow, and in half
    precision even weights of 1e-4 have squares of 0.

    Args:
        weight: The weight.
        axes: Axes to sum over.
        power: The power.

    Returns:
        Sums of ``|weight| ** power`` over the axes.
    """
    if weight.dtype.itemsize < 4:
        weight = weight.astype(np.float32)
    magnitude = np.abs(weight)
    exponent = int(np.frexp(float(magnitude.max(initial=0.0)))[1])
    scaled = np.ldexp(magnitude, -exponent) ** power
    total = np.add.reduce(scaled, axis=axes, dtype=np.float64)
    return np.asarray(np.ldexp(total, power * exponent), np.float64)


def linear_weights(model: Model) -> list[str]:
    """List the constants of rank 2 and more that linear operators read, a stored one also through its views.

    Codes are listed as the weights that they stand for.

    Args:
        model: The model.

    Returns:
        Names of the constants, once each, in graph order.
    """
    names: list[str] = []
    for node in model.every:
        spec = lookup(node.domain, node.op, node.version)
        if spec is None or spec.linear is None:
            continue
        for name in node.inputs[:2]:
            if name not in model.constants or model.constants[name].ndim < 2:
                continue
            source = model.source(name)
            names.append(source if is_float(model.dtypes[source]) else name)
    return list(dict.fromkeys(names))


def _powers_by_unit(model: Model, coupling: Coupling, power: int) -> Floats:
    total = np.zeros(coupling.n_units)
    for name in linear_weights(model):
        weight = model.constants[name]
        for axis in range(weight.ndim):
            labels = coupling.axes.get((name, axis))
            if labels is None:
                continue
            others = tuple(a for a in range(weight.ndim) if a != axis)
            by_channel = power_sums(weight, others, power)
            free = labels >= 0
            total += np.bincount(labels[free], by_channel[free], minlength=coupling.n_units)
    return total
