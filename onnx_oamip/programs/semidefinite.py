"""Semidefinite relaxation of the loss of a group after its consumers were fitted again.

With V the fit of a consumer to all units and H the inverse of the loaded covariance of its inputs, removing the units R
adds ``tr(V_R (H_RR)^-1 V_R')`` to the loss. Let p be 1 for removed units and 0 for kept ones, ``V_p = V diag(p)`` and
``P = pp'``: the addition is ``tr(V_p (P o H)^-1 V_p')`` with the elementwise product. That is convex in (p, P), and the
relaxation takes every P with the diagonal p for which ``P - pp'`` is semidefinite.

The bound is proved by the dual. For every Y and every diagonal d with ``diag(d) - Q`` semidefinite, ``Q = H o Y'Y``,
the addition of a set is at least ``(2 c - d)'p + p'(diag(d) - Q) p`` with ``c_j = <v_j, y_j>``. This is convex in p, so
each of its tangent planes is a bound. Y and d come from an approximate optimum of the relaxation, and d is scaled until
the condition holds: the bound does not depend on how well the optimum was found.

The entries of P are products of two binary variables. So ``0 <= P_ij``, ``p_i + p_j - 1 <= P_ij`` and ``P_ij <= p_i``
hold for sets, but not for every P of the relaxation. A quadratic penalty on their violations tightens it; its
derivatives are multipliers of these inequalities, and the dual bound holds with any multipliers that are not negative.

The optimum is approached by a quasi-Newton method on ``P - pp' = W R W``, W the root of ``p (1 - p)`` and R a matrix of
correlations, with a barrier: its gradient makes ``diag(d) - Q`` definite. Several consumers add up, and a unit may have
several columns.

Sources: Burer and Monteiro, "A nonlinear programming algorithm for solving semidefinite programs via low-rank
factorization", Mathematical Programming 95, 2003; McCormick, "Computability of global solutions to factorable nonconvex
programs: Part I", Mathematical Programming 10, 1976; Poljak, Rendl and Wolkowicz, "A recipe for semidefinite relaxation
for (0,1)-quadratic programming", Journal of Global Optimization 7, 1995.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit

from onnx_oamip.core.cholesky import Cholesky
from onnx_oamip.core.records import Bools, Floats, Ints
from onnx_oamip.programs.subset import Plane, Relaxation

FIRST_BARRIERS = (0.1, 0.01, 0.002)
"""Barriers of the search from an arbitrary point, one after the other, as shares of the loss."""
NEXT_BARRIER = 0.003
"""Barrier of the search from the optimum for more sets."""
FIRST_STEPS = 25
"""Steps of the first search, for each barrier."""
NEXT_STEPS = 25
"""Steps of the other search."""
PAIR_PENALTY = 3.0
"""Weight of squared violations of the inequalities of pairs, as a share of the loss per unit. Larger ones hold P closer
to the inequalities, but the same steps then end further from the optimum."""
MIN_LOSS = 1e-30
"""Replaces a loss of 0 in the barrier."""
STEP_OVERHEAD = 2e6
"""Floating-point operations that take as long as the interpreter's part of one evaluation."""
MEMORY = 10
"""Steps that the quasi-Newton method remembers."""
TOLERANCE = 1e-10
"""Relative improvement, and gradient, at which the method stops."""
MAX_SHIFTS = 60
"""Steps of the search for the shift that makes removal variables add up to their number."""
SHIFT_ACCURACY = 1e-13
"""Relative error of that sum."""
LARGEST_LOGIT = 60.0
"""Bound of that shift."""
MIN_VARIABLE = 1e-9
"""Distance of removal variables to 0 and 1."""
MIN_START = 1e-4
"""The same for those that a search starts from."""
NEW_CORRELATION = 1e-3
"""Share of the identity in the correlations that a search starts from."""
SLACK = 1e-9
"""Share by which diagonals exceed the least ones, against rounding."""
INFEASIBLE = 1e6
"""Value of points without a Cholesky factor, where the values around the start are 1."""


@dataclass(frozen=True, eq=False)
class Removal:
    """Cost of removing units, for one consumer.

    Attributes:
        inverse: H of the columns of the undecided units, unit after unit, scaled to a diagonal of ones (d, d).
        fit: Rows with the products ``V'V``, scaled alike (rows, d).
    """

    inverse: Floats
    fit: Floats

    def between(self, removed: Bools, undecided: Bools) -> tuple[Removal, float]:
        """Restrict the cost to fewer undecided units.

        Args:
            removed: Units that are removed (units,).
            undecided: Units that are left (units,); all others are kept.

        Returns:
            Cost of removing further units, and the cost of those that are removed.
        """
        width = len(self.inverse) // len(removed)
        out = np.flatnonzero(np.repeat(removed, width))
        rest = np.flatnonzero(np.repeat(undecided, width))
        inverse = self.inverse[np.ix_(rest, rest)]
        fit = self.fit[:, rest]
        cost = 0.0
        if len(out):
            factor = Cholesky.of(self.inverse[np.ix_(out, out)], overwrite=True)
            between = self.inverse[np.ix_(out, rest)]
            solved = factor.solve(between)
            worth = factor.solve(self.fit[:, out].T)
            inverse = inverse - between.T @ solved
            fit = fit - self.fit[:, out] @ solved
            cost = float(np.vdot(self.fit[:, out].T, worth))
        return normalised(inverse, fit), cost


def normalised(inverse: Floats, fit: Floats) -> Removal:
    """Scale the columns of a consumer, and leave as few rows as have the same products.

    Args:
        inverse: H (d, d).
        fit: V (rows, d).

    Returns:
        The cost of removal.
    """
    size = np.sqrt(np.diagonal(inverse))
    fit = fit / size
    if len(fit) > fit.shape[1] > 0:
        fit = np.asarray(np.linalg.qr(fit, mode="r"))
    return Removal(inverse / np.outer(size, size), fit)


def evaluation_flops(units: int, shapes: Sequence[tuple[int, ...]]) -> float:
    """Estimate the operations of one evaluation.

    Args:
        units: Number of undecided units.
        shapes: Rows and columns of V of every consumer.

    Returns:
        Approximate number of floating-point operations.
    """
    consumers = sum(d**3 + 4.0 * rows * d**2 for rows, d in shapes)
    return STEP_OVERHEAD + 5.0 * units**3 + consumers


@dataclass(frozen=True, eq=False)
class _State:
    """Point of the relaxation.

    Attributes:
        units: Undecided units (n,).
        removed: p of these units (n,).
        correlation: R (n, n).
    """

    units: Ints
    removed: Floats
    correlation: Floats


@dataclass(frozen=True, eq=False)
class Lifted(Relaxation):
    """Relaxation for the sets that contain the kept units and no others than the free ones.

    Attributes:
        free: Units that may be kept (units,).
        kept: Units that are kept (units,).
        loss: Loss of the free units.
        removals: Cost of removing undecided units, by consumer.
    """

    free: Bools
    kept: Bools
    loss: float
    removals: Sequence[Removal]

    @property
    def flops(self) -> float:
        """Approximate floating-point operations of one evaluation."""
        undecided = int((self.free & ~self.kept).sum())
        return evaluation_flops(undecided, [removal.fit.shape for removal in self.removals])

    def between(self, free: Bools, kept: Bools) -> Lifted:
        """Restrict the relaxation: the columns of removed units are swept out, those of kept ones left out.

        Args:
            free: Units that may be kept (units,).
            kept: Units that are kept, a subset of the free ones (units,).

        Returns:
            The relaxation for these sets.
        """
        undecided = self.free & ~self.kept
        removed = ~free[undecided]
        left = (free & ~kept)[undecided]
        parts = [removal.between(removed, left) for removal in self.removals]
        loss = self.loss + sum(cost for _, cost in parts)
        return Lifted(free, kept, loss, [part for part, _ in parts])

    def plane(self, count: int, flops: float, start: Plane | None) -> Plane:
        """Compute a tangent plane of the dual bound at an approximate optimum of the relaxation."""
        units = np.flatnonzero(self.free & ~self.kept)
        removals = int(self.free.sum()) - count
        barriers: Sequence[float] = FIRST_BARRIERS
        most = FIRST_STEPS
        state = None if start is None else start.state
        if isinstance(state, _State):
            barriers, most = (NEXT_BARRIER,), NEXT_STEPS
            place = np.searchsorted(state.units, units)
            removed = np.clip(state.removed[place], MIN_START, 1 - MIN_START)
            correlation = state.correlation[np.ix_(place, place)]
        else:
            removed = np.full(len(units), removals / len(units))
            correlation = np.eye(len(units))
        point = _Point.at(removed, correlation, removals)
        evaluations = 0
        barrier = weight = 0.0
        steps = int(min(most, max(1, flops / (self.flops * len(barriers)))))
        for share in barriers:
            loss = max(self.loss + self._cost(point).value, MIN_LOSS)
            barrier = share * loss / len(units)
            weight = PAIR_PENALTY * loss / len(units)
            point, used = self._descend(point, barrier, weight, steps)
            evaluations += used + 1
        return self._dual(units, point, barrier, weight, evaluations)

    def _cost(self, point: _Point) -> _Cost:
        """Evaluate ``tr(V_p (P o H)^-1 V_p')``; infinite without a Cholesky factor."""
        root = np.sqrt(point.removed)
        value = 0.0
        dual = np.zeros_like(point.lifted)
        worth = np.zeros_like(root)
        for removal in self.removals:
            n, width = len(root), len(removal.inverse) // len(root)
            lifted = point.lifted
            if width > 1:
                lifted = lifted.repeat(width, axis=0).repeat(width, axis=1)
            found = _inverse(lifted * removal.inverse)
            if found is None:
                return _Cost(np.inf, dual, worth)
            scaled = removal.fit * np.repeat(root, width)
            solution = scaled @ found[0]
            energy = np.einsum("ij,ij->j", scaled, solution)
            product = removal.inverse * (solution.T @ solution)
            value += float(energy.sum())
            dual += product.reshape(n, width, n, width).sum(axis=(1, 3))
            worth += energy.reshape(n, width).sum(axis=1) / point.removed
        return _Cost(value, dual, worth)

    def _descend(
        self,
        start: _Point,
        barrier: float,
        weight: float,
        steps: int,
    ) -> tuple[_Point, int]:
        """Minimise the cost with a barrier and the penalty; returns the point and the number of evaluations."""
        n, removals = len(start.removed), start.removals

        def evaluate(values: Floats) -> tuple[float, Floats]:
            point = _Point.of(values, n, removals)
            found = _inverse(point.correlation)
            cost = self._cost(point)
            if found is None or not np.isfinite(cost.value):
                return INFEASIBLE * scale, np.zeros_like(values)
            inverse, logdet = found
            p = point.removed
            value = cost.value - barrier * (logdet + float(np.log(p * (1 - p)).sum()))
            kept_root, root = np.sqrt(1 - p), np.sqrt(p)
            by_removed = cost.worth - (cost.dual @ root) / root
            by_removed += ((cost.dual * point.correlation) @ kept_root) / kept_root
            by_removed -= barrier * (1 / p - 1 / (1 - p))
            by_correlation = -cost.dual * np.outer(kept_root, kept_root) - barrier * inverse
            pairs = _Pairs.at(point, weight)
            rest = root * kept_root
            value += pairs.penalty
            by_removed += pairs.by_removed + 2 * (pairs.by_product @ p)
            by_removed += ((pairs.by_product * point.correlation) @ rest) * (1 - 2 * p) / rest
            by_correlation += pairs.by_product * np.outer(rest, rest)
            return value, point.gradient(by_removed, by_correlation)

        scale = 1.0
        values = start.values
        scale = max(abs(evaluate(values)[0]), 1e-300)

        def scaled(values: Floats) -> tuple[float, Floats]:
            value, gradient = evaluate(values)
            return value / scale, gradient / scale

        found = minimize(
            scaled,
            values,
            jac=True,
            method="L-BFGS-B",
            options={
                "maxiter": steps,
                "maxfun": steps,
                "maxcor": MEMORY,
                "ftol": TOLERANCE,
                "gtol": TOLERANCE,
            },
        )
        return _Point.of(np.asarray(found.x, np.float64), n, removals), int(found.nfev) + 1

    def _dual(
        self,
        units: Ints,
        point: _Point,
        barrier: float,
        weight: float,
        evaluations: int,
    ) -> Plane:
        """Make the tangent plane of the dual bound at a point."""
        cost = self._cost(point)
        p = point.removed
        root = np.sqrt(p)
        spread = p * (1 - p)
        pairs = _Pairs.at(point, weight)
        matrix = cost.dual / np.outer(root, root) - pairs.by_product
        rest = np.sqrt(spread)
        shares = matrix * point.correlation * np.outer(rest, rest)
        diagonal = (shares.sum(axis=1) + barrier) / spread
        size = np.sqrt(diagonal)
        largest = float(np.linalg.eigvalsh(matrix / np.outer(size, size))[-1])
        diagonal = diagonal * (max(largest, 0.0) + SLACK)
        rise = diagonal * p - matrix @ p
        linear = 2 * cost.worth - diagonal + pairs.by_removed
        value = pairs.constant + float(linear @ p + p @ rise)
        slope = linear + 2 * rise
        constant = value - float(slope @ p)
        # In keep variables s = 1 - p, of all units.
        total = len(self.free)
        full = np.zeros(total)
        full[units] = -slope
        keep = self.kept.astype(np.float64)
        keep[units] = 1 - p
        doubt = np.zeros(total)
        doubt[units] = diagonal * spread
        return Plane(
            constant=self.loss + constant + float(slope.sum()),
            slope=full,
            keep=keep,
            doubt=doubt,
            flops=evaluations * self.flops,
            state=_State(units, p, point.correlation),
        )


@dataclass(frozen=True, eq=False)
class _Cost:
    """Cost of removal at a point of the relaxation.

    Attributes:
        value: The cost.
        dual: ``diag(p)^(1/2) Q diag(p)^(1/2)`` (n, n).
        worth: c (n,).
    """

    value: float
    dual: Floats
    worth: Floats


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Penalty on violations of ``0 <= P_ij``, ``p_i + p_j - 1 <= P_ij`` and ``P_ij <= p_i``, over all ordered pairs.

    With the multipliers that it implies, ``constant + by_removed'p + p' by_product p`` is at most 0 for every set.

    Attributes:
        penalty: Half the weighted sum of squared violations.
        by_product: Derivative by P, symmetric (n, n).
        by_removed: Derivative by p with P held fixed (n,).
        constant: Constant part of the inequalities, weighted by their multipliers.
    """

    penalty: float
    by_product: Floats
    by_removed: Floats
    constant: float

    @classmethod
    def at(cls, point: _Point, weight: float) -> _Pairs:
        """Evaluate the penalty at a point of the relaxation."""
        p = point.removed
        rest = np.sqrt(p * (1 - p))
        product = np.outer(p, p) + point.correlation * np.outer(rest, rest)
        negative = np.maximum(-product, 0.0)
        below = np.maximum(p[:, None] + p - 1 - product, 0.0)
        above = np.maximum(product - p[:, None], 0.0)
        for violation in (negative, below, above):
            np.fill_diagonal(violation, 0.0)
        squares = sum(float(np.vdot(part, part)) for part in (negative, below, above))
        return cls(
            penalty=weight / 2 * squares,
            by_product=weight * ((above + above.T) / 2 - negative - below),
            by_removed=weight * (2 * below.sum(axis=1) - above.sum(axis=1)),
            constant=-weight * float(below.sum()),
        )


@dataclass(frozen=True, eq=False)
class _Point:
    """Variables of the quasi-Newton method: a root of R with columns of any length, then logits of p up to a shift.

    Attributes:
        values: The variables (n * n + n,).
        lengths: Lengths of the columns of the root (n,).
        directions: The columns with length 1 (n, n).
        removed: p (n,).
        removals: Sum of p.
    """

    values: Floats
    lengths: Floats
    directions: Floats
    removed: Floats
    removals: int

    @classmethod
    def at(cls, removed: Floats, correlation: Floats, removals: int) -> _Point:
        """The point of given removal variables and correlations; these move a little towards the identity."""
        n = len(removed)
        definite = (1 - NEW_CORRELATION) * correlation + NEW_CORRELATION * np.eye(n)
        root = np.linalg.cholesky(definite).T
        return cls.of(np.concatenate([root.ravel(), logit(removed)]), n, removals)

    @classmethod
    def of(cls, values: Floats, n: int, removals: int) -> _Point:
        """The point of given variables."""
        root = values[: n * n].reshape(n, n)
        lengths = np.sqrt(np.einsum("ij,ij->j", root, root))
        removed = _sigmoids(values[n * n :], removals)
        return cls(values, lengths, root / lengths, removed, removals)

    @cached_property
    def correlation(self) -> Floats:
        """R (n, n)."""
        found: Floats = self.directions.T @ self.directions
        found[np.diag_indices_from(found)] = 1.0
        return found

    @cached_property
    def lifted(self) -> Floats:
        """P, scaled to a diagonal of ones (n, n)."""
        root, rest = np.sqrt(self.removed), np.sqrt(1 - self.removed)
        found: Floats = np.outer(root, root) + self.correlation * np.outer(rest, rest)
        return found

    def gradient(self, by_removed: Floats, by_correlation: Floats) -> Floats:
        """Gradient by the variables, from those by p and R."""
        g = self.directions
        by_direction = 2 * g @ by_correlation
        by_direction -= g * np.einsum("ij,ij->j", g, by_direction)
        spread = self.removed * (1 - self.removed)
        # The shift of the logits keeps the sum of p.
        mean = float(spread @ by_removed) / float(spread.sum())
        by_logit = spread * (by_removed - mean)
        return np.concatenate([(by_direction / self.lengths).ravel(), by_logit])


def _sigmoids(logits: Floats, total: int) -> Floats:
    """Logistic functions of logits, shifted so that they add up to ``total``: by Newton's method within a bracket."""
    low, high = -LARGEST_LOGIT - logits.max(), LARGEST_LOGIT - logits.min()
    shift = 0.0
    for _ in range(MAX_SHIFTS):
        found = expit(logits + shift)
        excess = float(found.sum()) - total
        if abs(excess) <= SHIFT_ACCURACY * total:
            break
        if excess > 0:
            high = shift
        else:
            low = shift
        slope = float((found * (1 - found)).sum())
        shift = shift - excess / slope if slope > 0 else low
        if not low < shift < high:
            shift = (low + high) / 2
    result: Floats = np.clip(found, MIN_VARIABLE, 1 - MIN_VARIABLE)
    return result


def _inverse(matrix: Floats) -> tuple[Floats, float] | None:
    """Inverse and logarithm of the determinant; None if the matrix is not positive definite."""
    try:
        factor = Cholesky.of(matrix)
    except np.linalg.LinAlgError:
        return None
    return factor.inverse(), factor.log_determinant()
