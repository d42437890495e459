"""Loss of a group after its consumers were fitted again to the remaining units.

``min_V tr((W - V) C (W - V)') + r |V|^2`` with the ridge r, over the V whose columns of removed units are 0. Between
sets it is the perspective relaxation of every consumer (``perspective``), which ``sharpen`` tightens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from onnx_oamip.core.records import Bools, Floats, Ints
from onnx_oamip.programs.perspective import Perspective
from onnx_oamip.programs.subset import STEP_OVERHEAD, Loss, Relaxation

RELATIVE_TOLERANCE = 1e-9
"""Share of the worth of all units that an exchange must gain."""
CANDIDATES = 8
"""Removed units that are tried for an exchange, those of greatest gain."""
SHARPENINGS = 6
"""Rounds of the search for a tighter relaxation."""
TURNS_PER_SHARPENING = 8
"""Turns of the alternating minimisation before every round."""
FLOPS_PER_SPLIT = 40
"""Floating-point operations of the search for one diagonal, relative to the cube of its length."""


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


class RepairedRelaxation(Relaxation):
    """Relaxed loss for the sets that contain some units and no others than some: a sum over consumers.

    Attributes:
        diagonal: Zeros: no part of this loss is linear (units,).
        energy: Loss of the empty set.
        parts: Relaxation of each consumer.
        scales: Divisor of the loss of each consumer.
    """

    def __init__(
        self,
        units: int,
        energy: float,
        parts: Sequence[Perspective],
        scales: Sequence[float],
    ) -> None:
        self.diagonal = np.zeros(units)
        self.energy = energy
        self.parts = parts
        self.scales = scales

    @property
    def flops(self) -> float:
        """Approximate floating-point operations of one evaluation."""
        return STEP_OVERHEAD + sum(part.flops for part in self.parts)

    def convex(self, keep: Floats) -> tuple[float, Floats]:
        """Evaluate the whole loss: all of it is convex."""
        value = self.energy
        gradient = np.zeros(len(keep))
        for part, scale in zip(self.parts, self.scales, strict=True):
            found = part.evaluate(keep)
            value -= found.explained / scale
            np.subtract.at(gradient, part.unit, found.slope / scale)
        return value, gradient

    def between(self, free: Bools, kept: Bools) -> RepairedRelaxation:
        """Restrict the relaxation of every consumer, where kept columns are swept out."""
        parts = [part.between(free, kept) for part in self.parts]
        return RepairedRelaxation(len(free), self.energy, parts, self.scales)

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
        """
        if kept is None:
            kept = np.zeros(len(free), bool)
        undecided, rest = free & ~kept, count - int(kept.sum())
        keep = kept + _shares(np.ones(len(free)) if start is None else start, undecided, rest)
        for _ in range(steps):
            square = np.zeros(len(keep))
            for part, scale in zip(self.parts, self.scales, strict=True):
                np.add.at(square, part.unit, part.evaluate(keep).worth / scale)
            keep = kept + _shares(np.sqrt(square), undecided, rest)
        return keep


class Repaired(RepairedRelaxation, Loss):
    """The loss after every consumer was fitted again.

    Attributes:
        consumers: Consumers of the group.
        order: Order of removal to start from (units,), for example that of the optimal brain surgeon.
    """

    def __init__(self, consumers: Sequence[LinearConsumer], order: Ints) -> None:
        self.consumers = consumers
        self.order = order
        self._cross = [c.weight @ c.covariance for c in consumers]
        self._whole = []
        energy = 0.0
        for consumer, cross in zip(consumers, self._cross, strict=True):
            energy += float(np.vdot(cross, consumer.weight)) / consumer.scale
            self._whole.append(_perspective(consumer, cross))
        super().__init__(
            len(consumers[0].columns),
            energy,
            self._whole,
            [consumer.scale for consumer in consumers],
        )

    def value(self, keep: Bools) -> float:
        """Evaluate the loss of a set from the relaxation of all sets."""
        at = keep.astype(np.float64)
        value = self.energy
        for part, scale in zip(self._whole, self.scales, strict=True):
            value -= part.evaluate(at).explained / scale
        return value

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

    def sharpen(
        self,
        free: Bools,
        count: int,
        flops: float,
    ) -> float:
        """Divide the fits among as many pieces as can be afforded, and enlarge their perspective parts.

        In turns the optimum of the relaxation is approximated, and the perspective part of every piece enlarged there.
        """
        none = np.zeros(len(free), bool)
        parts = [part.between(free, none) for part in self._whole]
        pieces = int(flops / (SHARPENINGS * _sharpening_flops(parts)))
        self.parts = [part.divided(pieces) for part in parts]
        each = _sharpening_flops(self.parts)
        rounds = min(SHARPENINGS, int(flops / each))
        keep = None
        for move in range(rounds):
            keep = self.relax(free, count, TURNS_PER_SHARPENING, start=keep)
            self.parts = [part.enlarged(keep, step=2 / (move + 2)) for part in self.parts]
        return rounds * each

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


def _perspective(consumer: LinearConsumer, cross: Floats) -> Perspective:
    """Relaxation of one consumer with the ridge as its perspective part; columns of no unit are swept out."""
    units = len(consumer.columns)
    unit = np.full(consumer.weight.shape[1], units)
    unit[consumer.columns] = np.arange(units)[:, None]
    matrix = consumer.covariance.copy()
    matrix[np.diag_indices_from(matrix)] += consumer.ridge
    whole = Perspective(
        matrix=matrix,
        rows=cross,
        piece=np.zeros(len(cross), np.int64),
        diagonals=np.full((1, len(matrix)), consumer.ridge),
        unit=unit,
        label=np.zeros(len(matrix), np.int64),
        constant=0.0,
        ridge=consumer.ridge,
    )
    always = np.arange(units + 1) == units
    return whole.between(np.ones(units + 1, bool), always)


def _sharpening_flops(parts: Sequence[Perspective]) -> float:
    """Floating-point operations of one round of ``Repaired.sharpen``."""
    total = STEP_OVERHEAD
    for part in parts:
        pieces, d = part.diagonals.shape
        total += TURNS_PER_SHARPENING * part.flops + FLOPS_PER_SPLIT * pieces * d**3
    return total
