"""Loss of a group after its consumers were fitted again to the remaining units.

``min_V tr((W - V) C (W - V)') + r |V|^2`` with the ridge r, over the V whose columns of removed units are 0. Between
sets it is the perspective relaxation of every consumer (``perspective``); the bounds come from a semidefinite one
(``semidefinite``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnx_oamip.core.cholesky import Cholesky
from onnx_oamip.core.records import Bools, Floats, Ints
from onnx_oamip.programs.perspective import Perspective, relaxed_energy
from onnx_oamip.programs.semidefinite import Lifted, Removal, evaluation_flops, normalised
from onnx_oamip.programs.subset import STEP_OVERHEAD, Loss

RELATIVE_TOLERANCE = 1e-9
"""Share of the worth of all units that an exchange must gain."""
CANDIDATES = 8
"""Removed units that are tried for an exchange, those of greatest gain."""


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


class Repaired(Loss):
    """The loss after every consumer was fitted again.

    Attributes:
        consumers: Consumers of the group.
        order: Order of removal to start from (units,), for example that of the optimal brain surgeon.
        diagonal: Zeros: no part of this loss is linear (units,).
        energy: Loss of the empty set.
    """

    def __init__(self, consumers: Sequence[LinearConsumer], order: Ints) -> None:
        self.consumers = consumers
        self.order = order
        self.diagonal = np.zeros(len(order))
        self._cross = [c.weight @ c.covariance for c in consumers]
        self._parts = []
        self.energy = 0.0
        for consumer, cross in zip(consumers, self._cross, strict=True):
            self.energy += float(np.vdot(cross, consumer.weight)) / consumer.scale
            self._parts.append(_perspective(consumer, cross))

    @property
    def flops(self) -> float:
        """Approximate floating-point operations of one step of ``relax``."""
        return STEP_OVERHEAD + sum(part.flops for part in self._parts)

    def convex(self, keep: Floats) -> tuple[float, Floats]:
        """Evaluate the perspective relaxation of every consumer: all of the loss is convex."""
        value = self.energy
        gradient = np.zeros(len(keep))
        for part, consumer in zip(self._parts, self.consumers, strict=True):
            found = part.evaluate(keep)
            value -= found.explained / consumer.scale
            np.subtract.at(gradient, part.unit, found.slope / consumer.scale)
        return value, gradient

    def relax(self, free: Bools, count: int, steps: int) -> Floats:
        """Approximate the optimum of the perspective relaxation by alternating minimisation.

        In turns the best V for the keep variables and the best keep variables for that V, which share the count in
        proportion to ``|V_j|``, none above 1.
        """
        keep = _shares(np.ones(len(free)), free, count)
        for _ in range(steps):
            square = np.zeros(len(keep))
            for part, consumer in zip(self._parts, self.consumers, strict=True):
                np.add.at(square, part.unit, part.evaluate(keep).worth / consumer.scale)
            keep = _shares(np.sqrt(square), free, count)
        return keep

    def plane_flops(self, units: int) -> float:
        """Estimate the operations of the semidefinite relaxation."""
        columns = [(c, units * c.columns.shape[1]) for c in self.consumers]
        return evaluation_flops(units, [(min(len(c.weight), d), d) for c, d in columns])

    def between(self, free: Bools, kept: Bools) -> Lifted:
        """Restrict the semidefinite relaxation."""
        return self._lifted.between(free, kept)

    @cached_property
    def _lifted(self) -> Lifted:
        """The semidefinite relaxation for all sets."""
        free = np.ones(len(self.order), bool)
        pairs = zip(self.consumers, self._cross, strict=True)
        removals = [_removal(consumer, cross) for consumer, cross in pairs if consumer.columns.size]
        return Lifted(free, ~free, self.value(free), removals)

    def value(self, keep: Bools) -> float:
        """Evaluate the loss of a set by the relaxation, which is exact there."""
        return self.convex(keep.astype(np.float64))[0]

    def narrow(self, keep: Bools, count: int, steps: int) -> Bools:
        """Choose the last units of the order, then exchange units while that lowers the loss.

        In an exchange a removed unit comes back, and the kept unit of least cost is removed. The removed units of
        greatest gain are tried in turn.
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
            removed = np.flatnonzero(keep & ~kept)
            candidates = removed[np.argsort(-worth[removed], kind="stable")][:CANDIDATES]
            if not any(
                _exchange(states, kept, unit, worth[unit], tolerance) for unit in candidates
            ):
                break
            worth = _total_worth(states)
        return kept

    def removal_costs(self, keep: Bools) -> Floats:
        """Compute the cost of removing each kept unit alone: ``tr(V_j (H_jj)^-1 V_j')``.

        H is the inverse of the covariance of the kept inputs.
        """
        return np.where(keep, -_total_worth(self._states(keep)), 0.0)

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
        factor = Cholesky.of(self.table[np.ix_(here, here)], overwrite=True)
        between = self.table[np.ix_(here, rest)]
        solved = factor.solve(between)
        fitted = factor.solve(cross[:, here].T).T
        inverse = factor.inverse()
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


def _exchange(
    states: Sequence[_SweptConsumer],
    kept: Bools,
    returning: int,
    gain: float,
    tolerance: float,
) -> bool:
    """Take a removed unit back and remove the kept unit of least cost, if that gains more than the tolerance.

    Args:
        states: Consumers with the kept units swept in; they change with ``kept``.
        kept: Kept units (units,).
        returning: Removed unit.
        gain: Gain of taking it back.
        tolerance: Least gain of an exchange.
    """
    for state in states:
        state.sweep(returning)
    kept[returning] = True
    worth = _total_worth(states)
    leaving = int(np.argmax(np.where(kept, worth, -np.inf)))
    # The worth of a kept unit is minus its cost, so the sum is the gain of the exchange.
    is_better = leaving != returning and gain + worth[leaving] > tolerance
    out = leaving if is_better else returning
    for state in states:
        state.sweep(out)
    kept[out] = False
    return bool(is_better)


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


def _loaded(consumer: LinearConsumer) -> Floats:
    """Covariance with the ridge on its diagonal."""
    matrix = consumer.covariance.copy()
    matrix[np.diag_indices_from(matrix)] += consumer.ridge
    return matrix


def _perspective(consumer: LinearConsumer, cross: Floats) -> Perspective:
    """Perspective relaxation of one consumer; columns of no unit are always present."""
    unit = np.zeros(len(consumer.covariance), np.int64)
    unit[consumer.columns] = np.arange(len(consumer.columns))[:, None]
    optional = np.zeros(len(unit), bool)
    optional[consumer.columns] = True
    return relaxed_energy(_loaded(consumer), cross, unit, optional, consumer.ridge)


def _removal(consumer: LinearConsumer, cross: Floats) -> Removal:
    """Cost of removing units; columns of no unit are kept."""
    matrix = _loaded(consumer)
    inverse = Cholesky.of(matrix).inverse(overwrite=True)
    columns = consumer.columns.reshape(-1)
    fit = (cross @ inverse)[:, columns] / np.sqrt(consumer.scale)
    return normalised(inverse[np.ix_(columns, columns)], fit)
