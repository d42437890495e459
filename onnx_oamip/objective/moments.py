"""Streaming mean and variance of columns, and what squared errors are divided by."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from onnx_oamip.core.records import Floats

COLUMNS = 64
"""Columns that are scaled one by one; more of them share their mean variance."""
CONSTANT = 1e-10
"""Variance of a column over its squared mean below which it only varies by rounding."""
DEAD = 1e-12
"""Variance of a column over the largest one below which it counts as constant."""


def _nothing() -> Floats:
    return np.zeros(0)


@dataclass
class Moments:
    """Count, mean and squared deviation of every column (Chan, Golub and LeVeque 1979); infinities are left out."""

    count: Floats = field(default_factory=_nothing)
    mean: Floats = field(default_factory=_nothing)
    deviation: Floats = field(default_factory=_nothing)

    def update(self, rows: Floats) -> None:
        """Add rows (positions, columns)."""
        known = np.isfinite(rows)
        count = known.sum(axis=0).astype(np.float64)
        mean = np.where(known, rows, 0.0).sum(axis=0) / np.maximum(count, 1)
        with np.errstate(invalid="ignore"):
            deviation = np.square(np.where(known, rows - mean, 0.0)).sum(axis=0)
        self.merge(Moments(count, mean, deviation))

    def merge(self, other: Moments) -> None:
        """Add the rows of another one."""
        if not other.count.size:
            return
        if not self.count.size:
            self.count, self.mean, self.deviation = other.count, other.mean, other.deviation
            return
        both = np.maximum(self.count + other.count, 1)
        gap = other.mean - self.mean
        self.deviation = (
            self.deviation + other.deviation + np.square(gap) * self.count * other.count / both
        )
        self.mean = self.mean + gap * other.count / both
        self.count = self.count + other.count

    def divisors(self, usual: Floats | None = None) -> Floats:
        """Divisors of the squared errors of each column: its variance.

        A column that does not vary is measured against the mean variance of the others. Where none varies: against
        ``usual``, or without it the mean square of all columns, or 1 where that is 0.
        """
        own = self.deviation / np.maximum(self.count, 1)
        live = (own > CONSTANT * np.square(self.mean)) & (own > DEAD * own.max(initial=0.0))
        if not live.any():
            square = float((own + np.square(self.mean)).mean()) if own.size else 0.0
            return np.full(max(own.size, 1), square or 1.0) if usual is None else usual
        if own.size > COLUMNS:
            return np.full(own.size, float(own.mean()))
        return np.where(live, own, float(own[live].mean()))
