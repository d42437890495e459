"""Streaming mean and variance of columns, and the divisors of squared errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from onnx_oamip.core.records import Floats

COLUMNS = 64
"""Columns that are scaled one by one; more of them share their mean variance where they are similar."""
SIMILAR = 100.0
"""Largest variance over a small one up to which many columns are similar."""
MANY = 16
"""Columns up to which the smallest variance is that of all of them."""
TAIL = 0.1
"""Share of many columns whose small variances say nothing, as those of words that never occur."""
CONSTANT = 1e-10
"""Variance of a column over its squared mean below which it only varies by rounding."""
DEAD = 1e-12
"""Variance of a column over the largest one below which it counts as constant, as the rounding of large numbers that
cancel out has that size; unless its mean shows that its numbers are small by themselves."""


def _nothing() -> Floats:
    return np.zeros(0)


def variance_range(variances: Floats) -> tuple[float, float]:
    """Find a small and a large variance of several columns.

    Args:
        variances: Variances (columns,), at least one.

    Returns:
        The smallest one, of more than ``MANY`` columns that which the share ``TAIL`` is below, and the largest one.
    """
    tail = TAIL if variances.size > MANY else 0.0
    return float(np.quantile(variances, tail, method="nearest")), float(variances.max())


@dataclass
class Moments:
    """Count, mean and squared deviation of every column (Chan, Golub and LeVeque 1979); infinities are left out."""

    count: Floats = field(default_factory=_nothing)
    mean: Floats = field(default_factory=_nothing)
    deviation: Floats = field(default_factory=_nothing)

    def update(self, rows: Floats) -> None:
        """Add rows.

        Args:
            rows: Values (positions, columns). Values that are not finite are left out.
        """
        known = np.isfinite(rows)
        count = known.sum(axis=0).astype(np.float64)
        mean = np.where(known, rows, 0.0).sum(axis=0) / np.maximum(count, 1)
        with np.errstate(invalid="ignore"):
            deviation = np.square(np.where(known, rows - mean, 0.0)).sum(axis=0)
        self.merge(Moments(count, mean, deviation))

    def merge(self, other: Moments) -> None:
        """Add the rows of other moments.

        Args:
            other: Moments of the same columns.

        Source:
            Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances,
            1979.
        """
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

    def divisors(self, usual: Floats | None = None, unused: Sequence[int] = ()) -> Floats:
        """Return the divisors of squared errors: the variance of each column.

        A constant column gets the mean variance of the others. If all columns are constant, they get ``usual``;
        without it, the mean square of all columns, or 1 where that is 0.

        Args:
            usual: Divisors (columns,) found on other samples, for columns that are all constant here.
            unused: Columns that count as constant, see ``Scale.unused``.

        Returns:
            Positive divisors (columns,); the mean variance in all of them if there are more than ``COLUMNS`` similar
            ones.
        """
        own = self.deviation / np.maximum(self.count, 1)
        squared_mean = np.square(self.mean)
        is_small_by_itself = squared_mean > own
        live = (own > CONSTANT * squared_mean) & (
            (own > DEAD * own.max(initial=0.0)) | is_small_by_itself
        )
        live[list(unused)] = False
        if not live.any():
            if own.size:
                square = float((own + np.square(self.mean)).mean())
            else:
                square = 0.0
            if usual is None:
                return np.full(max(own.size, 1), square or 1.0)
            return usual
        low, high = variance_range(own[live])
        if own.size > COLUMNS and high <= SIMILAR * low:
            return np.full(own.size, float(own.mean()))
        return np.where(live, own, float(own[live].mean()))
