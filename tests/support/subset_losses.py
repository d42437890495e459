"""Losses of small groups after the refit, and all sets of their units."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from onnx_oamip.core.records import Bools
from onnx_oamip.programs.repaired_loss import LinearConsumer, Repaired
from onnx_oamip.programs.subset import Loss

PLENTY = 1e12
"""Floating-point operations that no small program needs."""


def fit(
    rng: np.random.Generator, outs: int, units: int, held: int, others: int = 0, ridge: float = 1e-2
) -> LinearConsumer:
    """Correlated inputs of uneven size, columns of units in random places."""
    d = units * held + others
    factor = rng.standard_normal((d, d + 2)) * np.exp(0.5 * rng.standard_normal((d, 1)))
    mix = np.eye(d) + rng.standard_normal((d, d)) / np.sqrt(d)
    covariance = mix @ factor @ factor.T @ mix.T / d
    weight = rng.standard_normal((outs, d))
    columns = rng.permutation(d)[: units * held].reshape(units, held)
    scale = float(np.einsum("od,de,oe->", weight, covariance, weight))
    return LinearConsumer(
        weight, covariance, ridge * float(np.trace(covariance)) / d, columns, scale
    )


KINDS = {
    "one consumer": [(5, 1, 0)],
    "columns of no unit": [(4, 1, 3)],
    "blocks of three": [(5, 3, 0)],
    "several": [(5, 1, 2), (3, 3, 0), (7, 1, 0)],
    "a blind consumer": [(4, 1, 0), (3, 0, 4)],
}
"""(outputs, columns a unit, columns of no unit) by consumer."""


def repaired(kind: str, seed: int, units: int, ridge: float = 1e-2) -> Repaired:
    rng = np.random.default_rng([seed, len(kind)])
    fits = [fit(rng, outs, units, held, others, ridge) for outs, held, others in KINDS[kind]]
    return Repaired(fits, rng.permutation(units))


def sets(free: Bools, count: int) -> Iterator[Bools]:
    """All sets of ``count`` free units."""
    for chosen in combinations(np.flatnonzero(free).tolist(), count):
        keep = np.zeros(len(free), bool)
        keep[list(chosen)] = True
        yield keep


def least(loss: Loss, free: Bools, count: int) -> float:
    return min(loss.value(keep) for keep in sets(free, count))


def everything(units: int) -> Bools:
    return np.ones(units, bool)
