"""Weight norms, coupled: a unit is judged by every weight that would go with it, in producers and in consumers."""

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


def l1(
    model: Model, coupling: Coupling, statistics: Statistics | None, settings: Settings
) -> Scores:
    """Sum of absolute weights per unit."""
    return Scores("l1", _sums(model, coupling, 1))


def l2(
    model: Model, coupling: Coupling, statistics: Statistics | None, settings: Settings
) -> Scores:
    """Square root of the sum of squared weights per unit."""
    return Scores("l2", np.sqrt(_sums(model, coupling, 2)))


def _sums(model: Model, coupling: Coupling, power: int) -> Floats:
    total = np.zeros(coupling.n_units)
    for name in linear_weights(model):
        weight = model.constants[name]
        for axis in range(weight.ndim):
            labels = coupling.axes.get((name, axis))
            if labels is None:
                continue
            others = tuple(a for a in range(weight.ndim) if a != axis)
            part = sums(weight, others, power)
            free = labels >= 0
            total += np.bincount(labels[free], part[free], minlength=coupling.n_units)
    return total


def sums(weight: Array, axes: tuple[int, ...], power: int) -> Floats:
    """Sums of ``|weight| ** power`` over ``axes``, in float64 without a float64 copy of the whole weight.

    Powers are taken of weights scaled to at most 1, by a power of two: in their own type they may overflow, and in half
    precision even weights of 1e-4 have squares of 0.
    """
    magnitude = np.abs(weight.astype(np.float32) if weight.dtype.itemsize < 4 else weight)
    exponent = int(np.frexp(float(magnitude.max(initial=0.0)))[1])
    found = np.add.reduce(np.ldexp(magnitude, -exponent) ** power, axis=axes, dtype=np.float64)
    return np.asarray(np.ldexp(found, power * exponent), np.float64)


def linear_weights(model: Model) -> list[str]:
    """Constants of rank 2 and more that linear operators read, once each, in graph order."""
    names: dict[str, None] = {}
    for node in model.every:
        spec = lookup(node.domain, node.op, node.version)
        if spec is not None and spec.linear is not None:
            names.update(
                (n, None)
                for n in node.inputs[:2]
                if n in model.constants and model.constants[n].ndim > 1
            )
    return list(names)
