"""Splits of a semidefinite matrix into a diagonal, which keep variables represent exactly, and a convex rest.

For a binary p, ``d p^2 = d p``: the more of a matrix is in the diagonal, the tighter is the relaxation of a program
over subsets.

Source: Frangioni and Gentile, "SDP diagonalizations and perspective cuts for a class of nonseparable MIQP", Operations
Research Letters 35, 2007.
"""

from __future__ import annotations

import numpy as np

from onnx_oamip.core.cholesky import Cholesky
from onnx_oamip.core.records import Floats

RELATIVE_TOLERANCE = 1e-12
"""Share of a matrix's largest diagonal entry that counts as 0."""
MAX_SIZE = 320
"""Rows above which the diagonal is proportional to the matrix's own: a step of the search takes cubic time."""
STEPS = 24
"""Newton steps of the search, each with a smaller barrier."""
SHRINK = 0.4
"""Factor of the barrier from step to step."""
MIN_EIGENVALUE = 1e-9
"""Least eigenvalue of the correlations, and of what a split leaves of them."""
HALVINGS = 30
"""Most halvings of a step that leaves the semidefinite matrices."""


def separable(
    matrix: Floats,
    worth: Floats | None = None,
    *,
    accuracy: float = 0.0,
) -> Floats:
    """Find a large diagonal that can be split off.

    The sum of the diagonal, or another weighted sum, is maximised under ``matrix - D`` semidefinite and ``D >= 0`` by a
    barrier method; of large matrices, the diagonal is the largest multiple of their own.

    Args:
        matrix: Semidefinite matrix (n, n).
        worth: Positive weights of the sum (n,), None for ones.
        accuracy: Share of the largest sum that may be missed, for an earlier end of the search.

    Returns:
        The diagonal D (n,), zeros where nothing can be split off.
    """
    own = np.diagonal(matrix)
    live = own > RELATIVE_TOLERANCE * max(float(own.max(initial=0.0)), 1e-300)
    result = np.zeros(len(matrix))
    if not live.any():
        return result
    root = np.sqrt(own[live])
    correlation = matrix[np.ix_(live, live)] / np.outer(root, root)
    least = float(np.linalg.eigvalsh(correlation)[0])
    share = np.full(len(root), max(least - MIN_EIGENVALUE, 0.0))
    if least > MIN_EIGENVALUE and len(root) <= MAX_SIZE:
        weights = own[live] / own.max()
        if worth is not None:
            weights = weights * (worth[live] / worth.max())
        weights = weights / weights.mean()
        found = _largest(correlation, weights, share / 2, accuracy)
        share = max(share, found, key=lambda candidate: float(weights @ candidate))
    result[live] = share * own[live]
    return result


def _largest(
    correlation: Floats,
    worth: Floats,
    share: Floats,
    accuracy: float,
) -> Floats:
    """Newton's method on ``worth' e + mu (log det (R - diag e) + sum log e)`` from a strictly feasible e."""
    barrier = 1.0
    for _ in range(STEPS):
        factor = _factor(correlation, share)
        assert factor is not None  # every accepted point is strictly feasible
        inverse = factor.inverse()
        slope = worth - barrier * (np.diagonal(inverse) - 1 / share)
        curvature = barrier * (np.square(inverse) + np.diag(1 / np.square(share)))
        step = Cholesky.of(curvature, overwrite=True).solve(slope)
        share = _moved(correlation, share, step)
        # On the central path, the sum misses the largest one by the barrier times the number of its terms.
        if 2 * len(share) * barrier <= accuracy * float(worth @ share):
            break
        barrier *= SHRINK
    return share


def _moved(correlation: Floats, share: Floats, step: Floats) -> Floats:
    """The point after a step that is halved until it is strictly feasible."""
    for halving in range(HALVINGS):
        trial: Floats = share + 0.5**halving * step
        if (trial > 0).all() and _factor(correlation, trial + MIN_EIGENVALUE) is not None:
            return trial
    return share


def _factor(correlation: Floats, share: Floats) -> Cholesky | None:
    """Cholesky factor of the rest, or None if it is not positive definite."""
    rest = correlation - np.diag(share)
    try:
        return Cholesky.of(rest, overwrite=True)
    except np.linalg.LinAlgError:
        return None
