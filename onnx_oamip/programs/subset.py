"""Which units of one group to keep: a convex loss over keep variables, by outer approximation.

With the inputs of a group's consumers fixed, what the consumers lose is convex in the keep variables s, and its data
are second moments: the size of the program does not depend on the number of images. Two losses, both the relative
squared error of the consumers' outputs and both for units that go *together*:

- ``Quadratic``, nothing is repaired: ``p'Qp`` with ``p = 1 - s`` and ``Q_ij = tr(W_i C_ij W_j')``;
- ``Repaired``, the consumers are fitted anew on what stays: ``min_V tr((W - V) C (W - V)') + r sum_j |V_j|^2 / s_j``
  with the ridge r, the perspective form of subset selection (Bertsimas and Van Parys, "Sparse high-dimensional
  regression", Annals of Statistics 48, 2020; here with a block of columns a unit and many outputs).

``Subset`` turns a loss into a mixed-integer linear program: minimise an epigraph variable above tangent planes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.linalg import cho_factor, cho_solve, eigvalsh

from onnx_oamip.core.records import Bools, Floats, Ints
from onnx_oamip.programs.program import Builder, Program

QUADRATIC_TURNS = 20
"""Steps of ``Quadratic`` for one turn: each is cheap where a turn of ``Repaired`` is a few factorisations."""
ABSENT = 1e-9
"""Keep variables below this count as 0."""


class Loss(Protocol):
    """A convex loss over keep variables (units,), 0 and up; ``diagonal`` (units,) is a part linear in ``1 - s``.

    On whole keep variables the loss is ``convex part + diagonal' (1 - s)``.
    """

    diagonal: Floats
    work: float
    """Floating-point operations of one evaluation, about."""

    def convex(self, keep: Floats) -> tuple[float, Floats]:
        """The convex part and its gradient at keep variables in [0, 1]."""
        ...

    def narrow(self, keep: Bools, count: int, turns: int) -> Bools:
        """``count`` of the kept units, chosen by removal one after the other and then exchanges, ``turns`` at most."""
        ...

    def costs(self, keep: Bools) -> Floats:
        """What the removal of each kept unit alone would cost now, (units,); 0 for the others."""
        ...

    def relax(self, free: Bools, count: int, turns: int) -> Floats:
        """Keep variables in [0, 1] near the least loss that ``count`` units' worth of the free ones can have: there a
        tangent plane says most."""
        ...


def loss_at(loss: Loss, keep: Bools) -> float:
    """The loss of a set."""
    return loss.convex(keep.astype(np.float64))[0] + float(loss.diagonal[~keep].sum())


class Quadratic:
    """``p'Qp``, Q (units, units) positive semidefinite.

    For whole p, ``p_i^2 = p_i``: as much of the diagonal as leaves Q semidefinite is taken out and is exact in the
    linear program, where tangents of the whole would see little of it.
    """

    def __init__(self, matrix: Floats) -> None:
        self.matrix = (matrix + matrix.T) / 2
        self.diagonal = _separable(self.matrix)
        self.work = 2.0 * self.matrix.size

    def convex(self, keep: Floats) -> tuple[float, Floats]:
        gone = 1.0 - keep
        bent = self.matrix @ gone - self.diagonal * gone
        return float(gone @ bent), -2.0 * bent

    def narrow(self, keep: Bools, count: int, turns: int) -> Bools:
        """By rising joint loss, then steepest exchanges."""
        stays = keep.copy()
        own = np.diagonal(self.matrix)
        pull = self.matrix @ (~stays).astype(np.float64)
        for _ in range(int(stays.sum()) - count):
            on = np.flatnonzero(stays)
            chosen = on[np.argmin(own[on] + 2 * pull[on])]
            stays[chosen] = False
            pull += self.matrix[chosen]
        for _ in range(QUADRATIC_TURNS * turns):
            on, off = np.flatnonzero(stays), np.flatnonzero(keep & ~stays)
            if not len(on) or not len(off):
                break
            # One more gone (on), one come back (off), and what the two mean for each other.
            change = (own[on] + 2 * pull[on])[:, None] + (own[off] - 2 * pull[off])[None]
            change -= 2 * self.matrix[np.ix_(on, off)]
            i, j = np.unravel_index(np.argmin(change), change.shape)
            if change[i, j] >= -1e-12 * max(1.0, float(own.sum())):
                break
            stays[on[i]], stays[off[j]] = False, True
            pull += self.matrix[on[i]] - self.matrix[off[j]]
        return stays

    def costs(self, keep: Bools) -> Floats:
        pull = self.matrix @ (~keep).astype(np.float64)
        return np.where(keep, np.diagonal(self.matrix) + 2 * pull, 0.0)

    def relax(self, free: Bools, count: int, turns: int) -> Floats:
        """Accelerated projected gradients (Beck and Teboulle 2009)."""
        bent = self.matrix - np.diag(self.diagonal)
        size = 2 * max(float(np.abs(bent).sum(axis=1).max()), 1e-30)
        keep: Floats = free * (count / free.sum())
        ahead = keep
        pace = 1.0
        for _ in range(QUADRATIC_TURNS * turns):
            slope = -2.0 * (bent @ (1.0 - ahead)) - self.diagonal
            after = _project(ahead - slope / size, free, count)
            quicker = (1 + np.sqrt(1 + 4 * pace**2)) / 2
            ahead = after + (pace - 1) / quicker * (after - keep)
            keep, pace = after, quicker
        return keep


def _project(point: Floats, free: Bools, count: int) -> Floats:
    """The nearest point with 0 <= s <= free and a sum of ``count``: ``clip(point - shift, 0, 1)`` on the free ones.

    The sum falls with the shift, straight between the places where an entry meets 0 or 1.
    """
    if not free.any():
        return np.zeros(len(point))
    ordered = np.sort(point[free])
    shifts = np.sort(np.concatenate([ordered - 1, ordered]))
    part = np.concatenate([[0.0], np.cumsum(ordered)])
    above, below = (
        np.searchsorted(ordered, shifts + 1, "right"),
        np.searchsorted(ordered, shifts, "right"),
    )
    sums = len(ordered) - above + part[above] - part[below] - (above - below) * shifts
    shift = np.interp(-float(count), -sums, shifts)
    return np.where(free, np.clip(point - shift, 0, 1), 0.0)


def _separable(matrix: Floats) -> Floats:
    """A diagonal D >= 0 with ``matrix - D`` semidefinite: D proportional to the diagonal, as large as can be."""
    own = np.diagonal(matrix)
    live = own > 1e-12 * max(float(own.max(initial=0.0)), 1e-300)
    if not live.any():
        return np.zeros(len(matrix))
    root = np.sqrt(own[live])
    least = float(
        eigvalsh(matrix[np.ix_(live, live)] / np.outer(root, root), subset_by_index=[0, 0])[0]
    )
    return np.where(live, max(least - 1e-9, 0.0) * own, 0.0)


@dataclass(frozen=True, eq=False)
class Fit:
    """One consumer: ``weight`` (outputs, d), covariance of its inputs (d, d), absolute ridge, columns (units, k).

    ``scale``: what its loss is divided by.
    """

    weight: Floats
    covariance: Floats
    ridge: float
    columns: Ints
    scale: float


class Repaired:
    """The loss after every consumer was fitted anew to what stays: sums over consumers.

    ``order`` (units,) is a good order of removal to start from, such as that of optimal brain surgeon.
    """

    def __init__(self, fits: Sequence[Fit], order: Ints) -> None:
        self.fits, self.order = fits, order
        self.diagonal = np.zeros(len(fits[0].columns))
        self.work = float(
            sum(f.weight.shape[1] ** 2 * (f.weight.shape[1] / 3 + 4 * len(f.weight)) for f in fits)
        )
        self._cross = [fit.weight @ fit.covariance for fit in fits]
        self._energy = [
            float(np.einsum("od,od->", c, f.weight)) for c, f in zip(self._cross, fits, strict=True)
        ]

    def convex(self, keep: Floats) -> tuple[float, Floats]:
        value, gradient = 0.0, np.zeros(len(keep))
        for fit, cross, energy in zip(self.fits, self._cross, self._energy, strict=True):
            present, share = self._present(fit, keep)
            fitted = _solve(fit, cross, present, share)
            value += (energy - float(np.einsum("od,od->", cross[:, present], fitted))) / fit.scale
            # Residual covariance with every column, present or not: it says what a column still has to give.
            residual = cross - fitted @ fit.covariance[present]
            gain = np.square(residual).sum(axis=0)[fit.columns].sum(axis=1)
            gradient -= gain / (fit.ridge * fit.scale)
        return value, gradient

    def narrow(self, keep: Bools, count: int, turns: int) -> Bools:
        """The last of the order stay; then exchanges: the one that gives most comes back, the one that costs least goes
        instead, while that helps."""
        ordered = self.order[keep[self.order]]
        stays = np.zeros(len(keep), bool)
        stays[ordered[len(ordered) - count :]] = True
        if not turns or stays.sum() == keep.sum():
            return stays
        states = [
            _Swept(fit, cross, stays) for fit, cross in zip(self.fits, self._cross, strict=True)
        ]
        own = _worth(states)
        small = 1e-9 * float(np.abs(own).sum())
        for _ in range(turns):
            back = int(np.argmax(np.where(keep & ~stays, own, -np.inf)))
            for state in states:
                state.sweep(back)
            stays[back] = True
            after = _worth(states)
            gone = int(np.argmax(np.where(stays, after, -np.inf)))
            for state in states:
                state.sweep(gone)
            stays[gone] = False
            if (
                gone == back or own[back] + after[gone] <= small
            ):  # the worth of one that goes is negative
                stays[gone], stays[back] = True, False
                break
            own = _worth(states)
        return stays

    def relax(self, free: Bools, count: int, turns: int) -> Floats:
        """In turns the best V for the keep variables and, for that V, the best keep variables: they share the count
        out in proportion to ``|V_j|``, none above 1."""
        keep: Floats = free * (count / free.sum())
        for _ in range(turns):
            square = np.zeros(len(keep))
            for fit, cross in zip(self.fits, self._cross, strict=True):
                present, share = self._present(fit, keep)
                energy = np.zeros(fit.weight.shape[1])
                energy[present] = np.square(_solve(fit, cross, present, share)).sum(axis=0)
                square += energy[fit.columns].sum(axis=1) * fit.ridge / fit.scale
            keep = _shared_out(np.sqrt(square), free, count)
        return keep

    def _present(self, fit: Fit, keep: Floats) -> tuple[Ints, Floats]:
        """Columns with a share, and their shares; columns of no unit are always there."""
        share = np.ones(fit.weight.shape[1])
        share[fit.columns] = keep[:, None]
        present = np.flatnonzero(share > ABSENT)
        return present, share[present]

    def costs(self, keep: Bools) -> Floats:
        """The others repaired: ``tr(V_j (H_jj)^-1 V_j')``, H the inverse of what is there."""
        states = [
            _Swept(fit, cross, keep) for fit, cross in zip(self.fits, self._cross, strict=True)
        ]
        return np.where(keep, -_worth(states), 0.0)


class _Swept:
    """One consumer with the columns of the units that stay swept in (Beaton's sweep operator, a block a unit).

    With S what stays, R the rest and G the loaded covariance, ``table`` is ``[-G_SS^-1, G_SS^-1 G_SR; ., Schur
    complement of R]`` and ``outputs`` is ``[V_S, residual covariance of the outputs with R]``. One unit in or out costs
    a product as thin as the unit.
    """

    def __init__(self, fit: Fit, cross: Floats, stays: Bools) -> None:
        self.fit = fit
        inside = np.ones(fit.weight.shape[1], bool)
        inside[fit.columns[~stays]] = False
        self.table = fit.covariance.copy()
        self.table[np.diag_indices_from(self.table)] += fit.ridge
        self.outputs = cross.copy()
        self.stays = stays.copy()
        here, rest = np.flatnonzero(inside), np.flatnonzero(~inside)
        if not len(here):
            return
        factor = cho_factor(self.table[np.ix_(here, here)], lower=True, check_finite=False)
        between = self.table[np.ix_(here, rest)]
        solved = np.asarray(cho_solve(factor, between, check_finite=False))
        fitted = np.asarray(cho_solve(factor, cross[:, here].T, check_finite=False)).T
        self.table[np.ix_(rest, rest)] -= between.T @ solved
        self.table[np.ix_(here, rest)] = solved
        self.table[np.ix_(rest, here)] = solved.T
        self.table[np.ix_(here, here)] = -np.asarray(
            cho_solve(factor, np.eye(len(here)), check_finite=False)
        )
        self.outputs[:, rest] -= fitted @ between
        self.outputs[:, here] = fitted

    def worth(self) -> Floats:
        """Per unit: what it would give if it came (positive), or minus what its going would cost."""
        columns = self.fit.columns
        blocks = np.linalg.inv(self.table[columns[:, :, None], columns[:, None, :]])
        part = self.outputs[:, columns].transpose(1, 0, 2)
        energy = part.transpose(0, 2, 1) @ part
        worth: Floats = np.einsum("ukl,ulk->u", blocks, energy) / self.fit.scale
        return worth

    def sweep(self, unit: int) -> None:
        """Take a unit in, or out if it is in."""
        columns = self.fit.columns[unit]
        sign = -1.0 if self.stays[unit] else 1.0
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
        self.stays[unit] = not self.stays[unit]


def _worth(states: Sequence[_Swept]) -> Floats:
    return np.asarray(np.sum([state.worth() for state in states], axis=0), np.float64)


def _shared_out(weight: Floats, free: Bools, count: int) -> Floats:
    """``min(1, weight / m)`` on the free ones, with m such that the sum is ``count``."""
    weight = np.where(free, np.maximum(weight, 1e-12 * max(float(weight.max()), 1e-200)), 0.0)
    keep = np.zeros(len(weight))
    full = np.zeros(len(weight), bool)
    while True:  # each turn fills at least one more to 1, or ends
        rest = free & ~full
        keep[rest] = weight[rest] * ((count - full.sum()) / max(float(weight[rest].sum()), 1e-300))
        over = rest & (keep > 1)
        if not over.any():
            break
        full |= over
        keep[full] = 1.0
    return np.clip(keep, 0.0, 1.0)


def _solve(fit: Fit, cross: Floats, present: Ints, share: Floats) -> Floats:
    """The best V (outputs, present columns): ``V = W C S (S C S + ridge)^-1 S`` with S the root of the shares."""
    if not len(present):
        return np.zeros((len(cross), 0))
    root = np.sqrt(share)
    loaded = fit.covariance[np.ix_(present, present)] * np.outer(root, root)
    loaded[np.diag_indices_from(loaded)] += fit.ridge
    solved = cho_solve(
        cho_factor(loaded, overwrite_a=True, check_finite=False), (cross[:, present] * root).T
    )
    return np.asarray(solved, np.float64).T * root


class Subset:
    """The program "keep ``count`` of the units in ``free``": binaries s, then the epigraph variable.

    Tangent planes found for one count hold for every other: they are kept from call to call.
    """

    def __init__(self, loss: Loss, units: int) -> None:
        self.loss, self.units = loss, units
        self._slopes: list[Floats] = []
        self._sides: list[float] = []

    @property
    def rows(self) -> int:
        """Rows of the next program."""
        return 1 + len(self._slopes)

    def tangent(self, at: Floats) -> None:
        """Add the row ``t >= value + gradient' (s - at)`` to all later programs."""
        value, gradient = self.loss.convex(at)
        size = max(1.0, float(np.abs(gradient).max()))  # steep planes: keep the coefficients near 1
        self._slopes.append(np.append(-gradient, 1.0) / size)
        self._sides.append((value - float(gradient @ at)) / size)

    def program(self, free: Bools, count: int, start: Bools | None) -> Program:
        """The program with all planes so far; without ``start``, its relaxation.

        The count is exact: with units that cancel each other out, fewer could lose less.
        """
        builder = Builder()
        keep = builder.variables(
            self.units,
            0.0,
            free.astype(np.float64),
            objective=-self.loss.diagonal,
            integer=start is not None,
            start=np.nan if start is None else start.astype(np.float64),
        )
        builder.variables(1, 0.0, objective=1.0)
        builder.offset = float(self.loss.diagonal.sum())
        builder.rows(
            1,
            (np.zeros(self.units, np.int64), keep, np.ones(self.units)),
            float(count),
            float(count),
        )
        if self._slopes:
            slopes = np.asarray(self._slopes)
            rows, columns = np.divmod(np.arange(slopes.size), self.units + 1)
            builder.rows(
                len(slopes), (rows, columns, slopes.ravel()), lower=np.asarray(self._sides)
            )
        return builder.build()
