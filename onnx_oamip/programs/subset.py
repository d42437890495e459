"""Choice of the units of one group to keep: a convex loss over keep variables, by outer approximation.

With the inputs of a group's consumers fixed, the error of the consumers is convex in the keep variables s, and its data
are second moments: the size of the program does not depend on the number of samples. There are two losses, both the
relative squared error of the consumers' outputs and both for units that are removed *together*:

- ``Quadratic``, without repair: ``p'Qp`` with ``p = 1 - s`` and ``Q_ij = tr(W_i C_ij W_j')``;
- ``repaired_loss.Repaired``, with every consumer fitted again to the remaining units.

``Subset`` turns a loss into a mixed-integer linear program: minimise an epigraph variable above tangent planes.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from onnx_oamip.core.records import Bools, Floats, Ints
from onnx_oamip.programs.diagonal_split import separable
from onnx_oamip.programs.program import Builder, Program

QUADRATIC_STEPS = 20
"""Steps of ``Quadratic`` for each step that is allowed: they are cheap, where one of ``Repaired`` takes a few
factorisations."""
RELATIVE_TOLERANCE = 1e-12
"""Share of a matrix's diagonal that counts as 0."""
STEP_OVERHEAD = 2e6
"""Floating-point operations that take as long as the interpreter's part of one step of ``relax``."""


class Relaxation(Protocol):
    """A convex function over keep variables (units,) that is never above the loss, and equal to it for binary ones.

    For binary keep variables the loss is ``convex part + diagonal' (1 - s)``.

    Attributes:
        diagonal: Part of the loss that is linear in ``1 - s`` (units,).
    """

    diagonal: Floats

    @property
    def flops(self) -> float:
        """Approximate floating-point operations of one step of ``relax``."""
        ...

    def convex(self, keep: Floats) -> tuple[float, Floats]:
        """Evaluate the convex part.

        Args:
            keep: Keep variables in [0, 1] (units,).

        Returns:
            Value and gradient (units,).
        """
        ...

    def between(self, free: Bools, kept: Bools) -> Relaxation:
        """Restrict the relaxation to fewer sets.

        Args:
            free: Units that may be kept (units,).
            kept: Units that are kept, a subset of the free ones (units,).

        Returns:
            A relaxation for these sets, which may be tighter and cheaper.
        """
        ...

    def relax(
        self,
        free: Bools,
        count: int,
        steps: int,
        *,
        kept: Bools | None = None,
        start: Floats | None = None,
    ) -> Floats:
        """Approximate the optimum of the relaxation, where a tangent plane is most useful.

        Args:
            free: Units that may be kept (units,).
            count: Sum of the keep variables.
            steps: Largest number of steps.
            kept: Units that are kept in any case, a subset of the free ones (units,).
            start: Keep variables to start from (units,), None for equal ones.

        Returns:
            Keep variables in [0, 1] (units,).
        """
        ...


class Loss(Relaxation, Protocol):
    """A loss of sets of units, never negative, with a convex relaxation and a search for good sets."""

    def value(self, keep: Bools) -> float:
        """Evaluate the loss of a set, whatever sets the relaxation is for.

        Args:
            keep: Kept units (units,).

        Returns:
            Loss.
        """
        ...

    def narrow(self, keep: Bools, count: int, steps: int) -> Bools:
        """Choose a subset by greedy removal and then exchanges.

        Args:
            keep: Units to choose from (units,).
            count: Number of units to keep.
            steps: Largest number of exchanges.

        Returns:
            The chosen units (units,).
        """
        ...

    def removal_costs(self, keep: Bools) -> Floats:
        """Compute the cost of removing each kept unit alone.

        Args:
            keep: Kept units (units,).

        Returns:
            Increase of the loss (units,), 0 for units that are not kept.
        """
        ...

    def sharpen(
        self,
        free: Bools,
        count: int,
        flops: float,
    ) -> float:
        """Tighten the relaxation for the subsets of the free units. Later tangents hold for these only.

        Args:
            free: Units that may be kept (units,).
            count: Sum of the keep variables.
            flops: Floating-point operations that may be spent.

        Returns:
            Approximate number of floating-point operations spent.
        """
        ...


class Quadratic(Loss):
    """The loss ``p'Qp``, Q (units, units) positive semidefinite.

    For binary p, ``p_i^2 = p_i``: as much of the diagonal as leaves Q semidefinite is split off. It is exact in the
    linear program, where tangents of the full loss would represent little of it.

    Attributes:
        matrix: Q, made symmetric (units, units).
        diagonal: Diagonal that is split off (units,).
    """

    def __init__(self, matrix: Floats) -> None:
        self.matrix = (matrix + matrix.T) / 2
        self.diagonal = separable(self.matrix)

    @property
    def flops(self) -> float:
        """Approximate floating-point operations of one step of ``relax``."""
        return STEP_OVERHEAD + QUADRATIC_STEPS * 2.0 * self.matrix.size

    def convex(self, keep: Floats) -> tuple[float, Floats]:
        """Evaluate the convex part."""
        removed = 1.0 - keep
        product = self.matrix @ removed - self.diagonal * removed
        return float(removed @ product), -2.0 * product

    def value(self, keep: Bools) -> float:
        """Evaluate the loss of a set."""
        removed = np.flatnonzero(~keep)
        return float(self.matrix[np.ix_(removed, removed)].sum())

    def narrow(self, keep: Bools, count: int, steps: int) -> Bools:
        """Choose a subset by least joint loss, then by steepest exchanges."""
        kept = keep.copy()
        own = np.diagonal(self.matrix)
        # Interaction of every unit with all removed ones.
        joint = self.matrix @ (~kept).astype(np.float64)
        for _ in range(int(kept.sum()) - count):
            on = np.flatnonzero(kept)
            cheapest = on[np.argmin(own[on] + 2 * joint[on])]
            kept[cheapest] = False
            joint += self.matrix[cheapest]
        for _ in range(QUADRATIC_STEPS * steps):
            on = np.flatnonzero(kept)
            off = np.flatnonzero(keep & ~kept)
            if not len(on) or not len(off):
                break
            # Loss of removing one unit (on) and taking one back (off), and their interaction.
            removal = own[on] + 2 * joint[on]
            return_ = own[off] - 2 * joint[off]
            change = removal[:, None] + return_[None]
            change -= 2 * self.matrix[np.ix_(on, off)]
            i, j = np.unravel_index(np.argmin(change), change.shape)
            if change[i, j] >= -RELATIVE_TOLERANCE * max(1.0, float(own.sum())):
                break
            kept[on[i]], kept[off[j]] = False, True
            joint += self.matrix[on[i]] - self.matrix[off[j]]
        return kept

    def removal_costs(self, keep: Bools) -> Floats:
        """Compute the cost of removing each kept unit alone."""
        joint = self.matrix @ (~keep).astype(np.float64)
        return np.where(keep, np.diagonal(self.matrix) + 2 * joint, 0.0)

    def sharpen(
        self,
        free: Bools,  # noqa: ARG002
        count: int,  # noqa: ARG002
        flops: float,  # noqa: ARG002
    ) -> float:
        """Leave the relaxation as it is: the diagonal was split off at the start, for all sets."""
        return 0.0

    def between(self, free: Bools, kept: Bools) -> Relaxation:  # noqa: ARG002
        """Leave the relaxation as it is: it holds for all sets."""
        return self

    def relax(
        self,
        free: Bools,
        count: int,
        steps: int,
        *,
        kept: Bools | None = None,
        start: Floats | None = None,
    ) -> Floats:
        """Approximate the optimum of the relaxation by accelerated projected gradients.

        Source: Beck and Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems", SIAM
        Journal on Imaging Sciences 2, 2009.
        """
        convex = self.matrix - np.diag(self.diagonal)
        row_sums = np.abs(convex).sum(axis=1)
        lipschitz = 2 * max(float(row_sums.max()), 1e-30)
        if kept is None:
            kept = np.zeros(len(free), bool)
        undecided = free & ~kept
        rest = count - int(kept.sum())
        keep = kept + _project(np.zeros(len(free)) if start is None else start, undecided, rest)
        ahead = keep
        momentum = 1.0
        for _ in range(QUADRATIC_STEPS * steps):
            gradient = -2.0 * (convex @ (1.0 - ahead)) - self.diagonal
            after = kept + _project(ahead - gradient / lipschitz, undecided, rest)
            next_momentum = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
            ahead = after + (momentum - 1) / next_momentum * (after - keep)
            keep = after
            momentum = next_momentum
        return keep


def _project(point: Floats, free: Bools, count: int) -> Floats:
    """The nearest point with 0 <= s <= free and a sum of ``count``: ``clip(point - shift, 0, 1)`` on the free units.

    The sum falls with the shift, linearly between the shifts at which an entry reaches 0 or 1.
    """
    if not free.any():
        return np.zeros(len(point))
    ordered = np.sort(point[free])
    shifts = np.sort(np.concatenate([ordered - 1, ordered]))
    partial_sum = np.concatenate([[0.0], np.cumsum(ordered)])
    # Entries from `above` on are clipped to 1, entries before `below` to 0.
    above = np.searchsorted(ordered, shifts + 1, "right")
    below = np.searchsorted(ordered, shifts, "right")
    at_one = len(ordered) - above
    sums = at_one + partial_sum[above] - partial_sum[below] - (above - below) * shifts
    shift = np.interp(-float(count), -sums, shifts)
    return np.where(free, np.clip(point - shift, 0, 1), 0.0)


class Subset:
    """The program "keep ``count`` of the free units": binaries s, then the epigraph variable.

    Tangent planes that were found for one count hold for every other, and for all subsets of the units that were free:
    they are kept from call to call, which must leave ever fewer units free.

    Attributes:
        loss: Loss of the group.
        units: Number of units.
    """

    def __init__(self, loss: Loss, units: int) -> None:
        self.loss = loss
        self.units = units
        self._slopes: list[Floats] = []
        self._sides: list[float] = []

    @property
    def rows(self) -> int:
        """Number of rows of the next program."""
        return 1 + len(self._slopes)

    def tangent(self, at: Floats) -> None:
        """Add the row ``t >= value + gradient' (s - at)`` to all later programs.

        Args:
            at: Keep variables in [0, 1] at which the plane touches the loss (units,).
        """
        value, gradient = self.loss.convex(at)
        # Planes may be steep: scaling keeps the largest coefficient near 1.
        size = max(1.0, float(np.abs(gradient).max()))
        self._slopes.append(np.append(-gradient, 1.0) / size)
        self._sides.append((value - float(gradient @ at)) / size)

    def program(self, free: Bools, count: int, start: Bools | None) -> Program:
        """Build the program with all planes so far.

        Args:
            free: Units that may be kept (units,).
            count: Number of units to keep. It is exact: with units that cancel each other, fewer could lose less.
            start: First point (units,), or None for the relaxation.

        Returns:
            Program of ``units + 1`` variables.
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
        first_row: Ints = np.zeros(self.units, np.int64)
        total = (first_row, keep, np.ones(self.units))
        builder.rows(1, total, float(count), float(count))
        if self._slopes:
            slopes = np.asarray(self._slopes)
            rows, columns = np.divmod(np.arange(slopes.size), self.units + 1)
            entries = (rows, columns, slopes.ravel())
            builder.rows(len(slopes), entries, lower=np.asarray(self._sides))
        return builder.build()
