"""Knee of a frontier: the point behind which less cost loses quality faster."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FEWEST = 3
"""Number of points, the original among them, below which no curve has a knee."""


def knee(costs: Sequence[float], quality: Sequence[float]) -> int | None:
    """Find the point of a curve that lies farthest above the line between its ends.

    Args:
        costs: Cost of every point, the original's among them, in any order.
        quality: Quality of every point; larger is better.

    Returns:
        Index of the point. None with fewer than three points, if all points have one quality, or if none lies above
        the line.
    """
    x = np.asarray(costs, float)
    y = np.asarray(quality, float)
    if len(x) < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    ends = int(np.argmin(x)), int(np.argmax(x))
    scaled = (x - x[ends[0]]) / (x[ends[1]] - x[ends[0]])
    line = y[ends[0]] + scaled * (y[ends[1]] - y[ends[0]])
    above = (y - line) / np.ptp(y)
    best = int(np.argmax(above))
    if above[best] <= 0 or best in ends:
        return None
    return best
