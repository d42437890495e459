"""Loss of a group after its consumers were fitted again to the remaining units.

``min_V tr((W - V) C (W - V)') + r |V|^2`` with the ridge r, over the V whose columns of removed units are 0. Between
sets, a diagonal D with ``C + r - D`` semidefinite has the perspective form of subset selection, here with a block of
columns per unit and many outputs: ``sum_j D_j |V_j|^2 / s_j`` in place of ``sum_j D_j |V_j|^2``. Every such D gives the
same losses of sets; the larger it is, the tighter is the relaxation. D is r at first, and ``sharpen`` enlarges it.

Sources: Bertsimas and Van Parys, "Sparse high-dimensional regression", Annals of Statistics 48, 2020; Dong, Chen and
Linderoth, "Regularization vs. relaxation: a conic optimization perspective of statistical variable selection", 2015.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from onnx_oamip.core.records import Bools, Floats, Ints
from onnx_oamip.programs.diagonal_split import separable

ABSENT = 1e-9
"""Keep variables below this count as 0."""
RELATIVE_TOLERANCE = 1e-9
"""Share of the worth of all units that an exchange must gain."""
RIDGE_SHARE = 0.9
"""Share of the ridge that the perspective part always contains. The rest keeps what is split definite."""
TURNS_PER_ROUND = 16
"""Turns of the alternating minimisation before every move of the perspective part."""
SPLIT_ACCURACY = 1e-3
"""Share of the largest perspective part that a search may miss."""
MIN_WORTH = 1e-4
"""Least worth of a column in a search, relative to the largest one."""


@dataclass(frozen=True, eq=False)
class LinearConsumer:
    """One linear consumer of a group.

    Attributes:
        weight: Weight (outputs, d).
        covariance: Covariance of its inputs (d, d).
        ridge: Absolute ridge of the fit.
        columns: Inputs that belong to each unit (units, k).
        scale: Divisor of its loss.
    """

    weight: Floats
    covariance: Floats
    ridge: float
    columns: Ints
    scale: float


class Repaired:
    """The loss after every consumer was fitted again: a sum over consumers.

    Attributes:
        consumers: Consumers of the group.
        order: Order of removal to start from (units,), for example that of the optimal brain surgeon.
        diagonal: Zeros: no part of this loss is linear (units,).
        flops: Approximate floating-point operations of one evaluation.
    """

    def __init__(self, consumers: Sequence[LinearConsumer], order: Ints) -> None:
        self.consumers = consumers
        self.order = order
        self.diagonal = np.zeros(len(consumers[0].columns))
        flops: float = 0
        for consumer in consumers:
            outputs, d = consumer.weight.shape
            flops += d**2 * (d / 3 + 4 * outputs)
        self.flops = float(flops)
        self._perspective = [np.full(c.weight.shape[1], c.ridge) for c in consumers]
        self._cross = [c.weight @ c.covariance for c in consumers]
        self._energy = []
        for consumer, cross in zip(consumers, self._cross, strict=True):
            self._energy.append(float(np.einsum("od,od->", cross, consumer.weight)))

    def convex(self, keep: Floats) -> tuple[float, Floats]:
        """Evaluate the loss, which is convex as a whole.

        Args:
            keep: Keep variables in [0, 1] (units,).

        Returns:
            Value and gradient (units,).
        """
        value = 0.0
        gradient = np.zeros(len(keep))
        for fit, energy in zip(self._fits(keep), self._energy, strict=True):
            consumer = fit.consumer
            value += (energy - fit.explained) / consumer.scale
            per_column = np.square(fit.residual()).sum(axis=0) / fit.perspective
            gradient -= per_column[consumer.columns].sum(axis=1) / consumer.scale
        return value, gradient

    def narrow(self, keep: Bools, count: int, steps: int) -> Bools:
        """Choose the last units of the order, then exchange units while that lowers the loss.

        In an exchange the removed unit of greatest gain comes back, and the kept unit of least cost is removed.

        Args:
            keep: Units to choose from (units,).
            count: Number of units to keep.
            steps: Largest number of exchanges.

        Returns:
            The chosen units (units,).
        """
        ordered = self.order[keep[self.order]]
        kept = np.zeros(len(keep), bool)
        kept[ordered[len(ordered) - count :]] = True
        if not steps or kept.sum() == keep.sum():
            return kept
        states = self._states(kept)
        worth = _total_worth(states)
        tolerance = RELATIVE_TOLERANCE * float(np.abs(worth).sum())
        for _ in range(steps):
            returning = int(np.argmax(np.where(keep & ~kept, worth, -np.inf)))
            for state in states:
                state.sweep(returning)
            kept[returning] = True
            after = _total_worth(states)
            leaving = int(np.argmax(np.where(kept, after, -np.inf)))
            for state in states:
                state.sweep(leaving)
            kept[leaving] = False
            # The worth of a kept unit is minus its cost, so the sum is the gain of the exchange.
            gain = worth[returning] + after[leaving]
            if leaving == returning or gain <= tolerance:
                kept[leaving], kept[returning] = True, False
                break
            worth = _total_worth(states)
        return kept

    def removal_costs(self, keep: Bools) -> Floats:
        """Compute the cost of removing each kept unit alone: ``tr(V_j (H_jj)^-1 V_j')``.

        H is the inverse of the covariance of the kept inputs.

        Args:
            keep: Kept units (units,).

        Returns:
            Increase of the loss (units,), 0 for units that are not kept.
        """
        return np.where(keep, -_total_worth(self._states(keep)), 0.0)

    def sharpen(self, free: Bools, count: int, rounds: int) -> None:
        """Enlarge the perspective part for the subsets of the free units; tangents then hold only for these.

        In turns the optimum of the relaxation is approximated, and the perspective part moved towards the one that
        raises it most there. The optimum is concave in D, with the derivative ``|V_j|^2 (1 / s_j - 1)``: these are
        steps of the method of Frank and Wolfe.

        Args:
            free: Units that may be kept (units,).
            count: Sum of the keep variables.
            rounds: Number of moves.
        """
        keep = None
        for move in range(rounds):
            keep = self.relax(free, count, TURNS_PER_ROUND, start=keep)
            self._enlarge(free, keep, step=2 / (move + 2))

    def relax(
        self,
        free: Bools,
        count: int,
        steps: int,
        *,
        kept: Bools | None = None,
        start: Floats | None = None,
    ) -> Floats:
        """Approximate the optimum of the relaxation by alternating minimisation.

        In turns the best V for the keep variables and the best keep variables for that V, which share the count in
        proportion to ``|V_j|``, none above 1.

        Args:
            free: Units that may be kept (units,).
            count: Sum of the keep variables.
            steps: Number of turns.
            kept: Units that are kept in any case, a subset of the free ones (units,).
            start: Keep variables to start from (units,), None for equal ones.

        Returns:
            Keep variables in [0, 1] (units,).
        """
        if kept is None:
            kept = np.zeros(len(free), bool)
        weight = np.ones(len(free)) if start is None else start
        keep = kept + _shares(weight, free & ~kept, count - int(kept.sum()))
        return self._alternate(keep, free, kept, count, steps=steps)

    def _alternate(
        self,
        keep: Floats,
        free: Bools,
        kept: Bools,
        count: int,
        *,
        steps: int,
    ) -> Floats:
        for _ in range(steps):
            square = np.zeros(len(keep))
            for fit in self._fits(keep):
                per_column = fit.perspective * fit.column_energy()
                square += per_column[fit.consumer.columns].sum(axis=1) / fit.consumer.scale
            keep = kept + _shares(np.sqrt(square), free & ~kept, count - int(kept.sum()))
        return keep

    def _enlarge(self, free: Bools, keep: Floats, step: float) -> None:
        """Move every perspective part by a share of the way to the one that is best at these keep variables."""
        for index, fit in enumerate(self._fits(keep)):
            consumer = fit.consumer
            columns = consumer.columns[free].reshape(-1)
            share = np.maximum(fit.share[columns], ABSENT)
            worth = fit.column_energy()[columns] * (1 / share - 1)
            best = _largest_part(consumer, columns, worth)
            current = self._perspective[index].copy()
            current[columns] += step * (best - current[columns])
            self._perspective[index] = current

    def _fits(self, keep: Floats) -> Iterator[_Fit]:
        for consumer, cross, part in zip(
            self.consumers, self._cross, self._perspective, strict=True
        ):
            yield _fit(consumer, cross, part, keep)

    def _states(self, kept: Bools) -> list[_SweptConsumer]:
        pairs = zip(self.consumers, self._cross, strict=True)
        return [_SweptConsumer(consumer, cross, kept) for consumer, cross in pairs]


class _SweptConsumer:
    """One consumer with the columns of the kept units swept in (Beaton's sweep operator, one block per unit).

    With S the kept columns, R the rest and G the loaded covariance, ``table`` is ``[-G_SS^-1, G_SS^-1 G_SR; ., Schur
    complement of R]`` and ``outputs`` is ``[V_S, residual covariance of the outputs with R]``. Adding or removing one
    unit costs a product as thin as the unit.
    """

    def __init__(
        self,
        consumer: LinearConsumer,
        cross: Floats,
        kept: Bools,
    ) -> None:
        self.consumer = consumer
        inside = np.ones(consumer.weight.shape[1], bool)
        inside[consumer.columns[~kept]] = False
        self.table = consumer.covariance.copy()
        self.table[np.diag_indices_from(self.table)] += consumer.ridge
        self.outputs = cross.copy()
        self.kept = kept.copy()
        here = np.flatnonzero(inside)
        rest = np.flatnonzero(~inside)
        if not len(here):
            return
        factor = cho_factor(self.table[np.ix_(here, here)], lower=True, check_finite=False)
        between = self.table[np.ix_(here, rest)]
        solved = np.asarray(cho_solve(factor, between, check_finite=False))
        fitted = np.asarray(cho_solve(factor, cross[:, here].T, check_finite=False)).T
        inverse = np.asarray(cho_solve(factor, np.eye(len(here)), check_finite=False))
        self.table[np.ix_(rest, rest)] -= between.T @ solved
        self.table[np.ix_(here, rest)] = solved
        self.table[np.ix_(rest, here)] = solved.T
        self.table[np.ix_(here, here)] = -inverse
        self.outputs[:, rest] -= fitted @ between
        self.outputs[:, here] = fitted

    def worth(self) -> Floats:
        """Per unit (units,): the gain of adding it (positive), or minus the cost of removing it."""
        columns = self.consumer.columns
        blocks = np.linalg.inv(self.table[columns[:, :, None], columns[:, None, :]])
        part = self.outputs[:, columns].transpose(1, 0, 2)
        energy = part.transpose(0, 2, 1) @ part
        worth: Floats = np.einsum("ukl,ulk->u", blocks, energy) / self.consumer.scale
        return worth

    def sweep(self, unit: int) -> None:
        """Add a unit, or remove it if it is kept."""
        columns = self.consumer.columns[unit]
        sign = -1.0 if self.kept[unit] else 1.0
        strip = self.table[columns]
        inverse = np.linalg.inv(strip[:, columns])
        scaled = inverse @ strip
        outputs = self.outputs[:, columns]
        self.table -= strip.T @ scaled
        self.table[columns] = sign * scaled
        self.table[:, columns] = sign * scaled.T
        self.table[np.ix_(columns, columns)] = -inverse
        self.outputs -= outputs @ scaled
        self.outputs[:, columns] = sign * (outputs @ inverse)
        self.kept[unit] = not self.kept[unit]


def _total_worth(states: Sequence[_SweptConsumer]) -> Floats:
    return np.asarray(np.sum([state.worth() for state in states], axis=0), np.float64)


def _shares(weight: Floats, free: Bools, count: int) -> Floats:
    """``min(1, weight / m)`` on the free units, with m such that the sum is ``count``."""
    # Free units without weight get a little, so that the count can be reached.
    floor = 1e-12 * max(float(weight.max()), 1e-200)
    weight = np.where(free, np.maximum(weight, floor), 0.0)
    keep = np.zeros(len(weight))
    full = np.zeros(len(weight), bool)
    # Every pass fills at least one more unit to 1, or ends.
    while True:
        rest = free & ~full
        total = max(float(weight[rest].sum()), 1e-300)
        keep[rest] = weight[rest] * ((count - full.sum()) / total)
        over = rest & (keep > 1)
        if not over.any():
            break
        full |= over
        keep[full] = 1.0
    return np.clip(keep, 0.0, 1.0)


@dataclass(frozen=True, eq=False)
class _Fit:
    """The best V of one consumer for some keep variables.

    Attributes:
        consumer: The consumer.
        cross: ``W C`` (outputs, d).
        perspective: Diagonal D (d,).
        share: Keep variable of each column (d,), 1 for columns of no unit.
        present: Columns with a positive share.
        fitted: V (outputs, present columns).
    """

    consumer: LinearConsumer
    cross: Floats
    perspective: Floats
    share: Floats
    present: Ints
    fitted: Floats

    @property
    def explained(self) -> float:
        """Amount by which V lowers the loss."""
        return float(np.einsum("od,od->", self.cross[:, self.present], self.fitted))

    def column_energy(self) -> Floats:
        """``|V_j|^2`` of every column (d,)."""
        energy = np.zeros(len(self.share))
        energy[self.present] = np.square(self.fitted).sum(axis=0)
        return energy

    def residual(self) -> Floats:
        """``W C - V (C + r - D)`` (outputs, d): the gain that every column, present or not, can still contribute."""
        residual = self.cross - self.fitted @ self.consumer.covariance[self.present]
        rest = self.consumer.ridge - self.perspective[self.present]
        residual[:, self.present] -= self.fitted * rest
        return residual


def _fit(
    consumer: LinearConsumer,
    cross: Floats,
    perspective: Floats,
    keep: Floats,
) -> _Fit:
    """``V = W C S (S (C + r - D) S + D)^-1 S`` with S the root of the shares."""
    share = np.ones(consumer.weight.shape[1])
    share[consumer.columns] = keep[:, None]
    present = np.flatnonzero(share > ABSENT)
    if not len(present):
        nothing = np.zeros((len(cross), 0))
        return _Fit(consumer, cross, perspective, share, present, nothing)
    root = np.sqrt(share[present])
    part = perspective[present]
    loaded = consumer.covariance[np.ix_(present, present)] * np.outer(root, root)
    loaded[np.diag_indices_from(loaded)] += share[present] * (consumer.ridge - part) + part
    factor = cho_factor(loaded, overwrite_a=True, check_finite=False)
    solved = cho_solve(factor, (cross[:, present] * root).T)
    fitted = np.asarray(solved, np.float64).T * root
    return _Fit(consumer, cross, perspective, share, present, fitted)


def _largest_part(
    consumer: LinearConsumer,
    columns: Ints,
    worth: Floats,
) -> Floats:
    """The diagonal D (columns,) of greatest worth that leaves ``C + r - D`` semidefinite.

    Columns of no unit are always present, so what they explain of the others does not count; other columns are absent.
    """
    always = np.ones(consumer.weight.shape[1], bool)
    always[consumer.columns.reshape(-1)] = False
    kept_ridge = RIDGE_SHARE * consumer.ridge
    rest = consumer.covariance[np.ix_(columns, columns)].copy()
    if always.any():
        inner = consumer.covariance[np.ix_(always, always)].copy()
        inner[np.diag_indices_from(inner)] += consumer.ridge
        between = consumer.covariance[np.ix_(always, columns)]
        factor = cho_factor(inner, overwrite_a=True, check_finite=False)
        rest -= between.T @ cho_solve(factor, between, check_finite=False)
    rest[np.diag_indices_from(rest)] += consumer.ridge - kept_ridge
    least = MIN_WORTH * max(float(worth.max(initial=0.0)), 1e-300)
    worth = np.maximum(worth, least)
    return kept_ridge + separable(rest, worth, accuracy=SPLIT_ACCURACY)
