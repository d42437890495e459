"""Choice of the units of one group to keep: a convex loss over keep variables, by outer approximation.

With the inputs of a group's consumers fixed, the error of the consumers is convex in the keep variables s, and its data
are second moments: the size of the program does not depend on the number of samples. There are two losses, both the
relative squared error of the consumers' outputs and both for units that are removed *together*:

- ``Quadratic``, without repair: ``p'Qp`` with ``p = 1 - s`` and ``Q_ij = tr(W_i C_ij W_j')``;
- ``repaired_loss.Repaired``, with every consumer fitted again to the remaining units.

``Subset`` turns a loss into a mixed-integer linear program: minimise an epigraph variable above tangent planes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
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
FIRST_STEPS = 8
"""Steps to the first plane of ``QuadraticRelaxation``."""
STEP_OVERHEAD = 2e6
"""Floating-point operations that take as long as the interpreter's part of one step of ``relax``."""
MAX_SHIFTS = 100
"""Steps of the search for the shift that gives keep variables their sum."""
SUM_ACCURACY = 1e-12
"""Relative error of that sum."""
MIN_LIPSCHITZ = 1e-30
"""Replaces a bound of 0 as divisor."""


@dataclass(frozen=True, eq=False)
class Plane:
    """Lower bound of the losses of sets that is linear in the keep variables.

    Attributes:
        constant: Constant part.
        slope: Coefficients of the keep variables (units,).
        keep: Keep variables in [0, 1] at which the relaxation is close to its optimum (units,).
        doubt: How much a bound may gain from a decision on each unit (units,).
        flops: Approximate number of floating-point operations spent.
        state: Where the search for a plane of fewer sets can start, if the relaxation knows more than ``keep``.
    """

    constant: float
    slope: Floats
    keep: Floats
    doubt: Floats
    flops: float
    state: object = None

    def least(self, free: Bools, kept: Bools, count: int) -> float:
        """Compute the least value over sets.

        Args:
            free: Units that may be kept (units,).
            kept: Units that are kept, a subset of the free ones (units,).
            count: Number of units to keep.

        Returns:
            Least value, a lower bound of the losses of these sets.
        """
        cheapest = np.sort(self.slope[free & ~kept])[: count - int(kept.sum())]
        return self.constant + float(self.slope[kept].sum()) + float(cheapest.sum())


class Relaxation(Protocol):
    """A relaxation of the loss for the sets that contain some units and no others than some."""

    def plane(self, count: int, flops: float, start: Plane | None) -> Plane:
        """Find a plane below the losses of the sets that is high where it is lowest.

        Args:
            count: Number of units to keep.
            flops: Floating-point operations that may be spent; one step is made in any case.
            start: Plane for more sets, None for the first one.

        Returns:
            The plane. It holds for the sets of this relaxation.
        """
        ...


class Loss(Protocol):
    """A loss of sets of units, never negative, with relaxations and a search for good sets.

    A convex function is equal to the loss for binary keep variables: ``convex part + diagonal' (1 - s)``.

    Attributes:
        diagonal: Part of the function that is linear in ``1 - s`` (units,).
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

    def relax(self, free: Bools, count: int, steps: int) -> Floats:
        """Approximate the optimum of the convex function, where a tangent plane is most useful.

        Args:
            free: Units that may be kept (units,).
            count: Sum of the keep variables.
            steps: Largest number of steps.

        Returns:
            Keep variables in [0, 1] (units,).
        """
        ...

    def plane_flops(self, units: int) -> float:
        """Estimate the operations of one step of the search for a plane.

        Args:
            units: Number of undecided units.

        Returns:
            Approximate number of floating-point operations.
        """
        ...

    def between(self, free: Bools, kept: Bools) -> Relaxation:
        """Relax the loss for some sets.

        Args:
            free: Units that may be kept (units,).
            kept: Units that are kept, a subset of the free ones (units,).

        Returns:
            The relaxation.
        """
        ...

    def value(self, keep: Bools) -> float:
        """Evaluate the loss of a set.

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

    @cached_property
    def _convex(self) -> Floats:
        """Q without the part that the split takes out (units, units)."""
        rest: Floats = self.matrix - np.diag(self.diagonal)
        return rest

    @cached_property
    def _lipschitz(self) -> float:
        """Bound of the change of the gradient."""
        row_sums = np.abs(self._convex).sum(axis=1)
        return 2 * max(float(row_sums.max()), MIN_LIPSCHITZ)

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

    def plane_flops(self, units: int) -> float:  # noqa: ARG002
        """Estimate the operations by those of all units."""
        return self.flops

    def between(self, free: Bools, kept: Bools) -> QuadraticRelaxation:
        """Keep the split of the diagonal, which holds for all sets."""
        return QuadraticRelaxation(self, free, kept)

    def relax(self, free: Bools, count: int, steps: int) -> Floats:
        """Approximate the optimum by accelerated projected gradients, ``QUADRATIC_STEPS`` for each step."""
        start = np.zeros(len(free))
        return self.descend(free, np.zeros(len(free), bool), count, steps, start)

    def descend(
        self,
        free: Bools,
        kept: Bools,
        count: int,
        steps: int,
        start: Floats,
    ) -> Floats:
        """Approach the optimum of the convex function for some sets.

        Source: Beck and Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems", SIAM
        Journal on Imaging Sciences 2, 2009.

        Args:
            free: Units that may be kept (units,).
            kept: Units that are kept (units,).
            count: Sum of the keep variables.
            steps: Gradient steps, in multiples of ``QUADRATIC_STEPS``.
            start: Keep variables to start from (units,).

        Returns:
            Keep variables in [0, 1] (units,).
        """
        undecided = np.flatnonzero(free & ~kept)
        keep = kept.astype(np.float64)
        if not len(undecided):
            return keep
        # Only the undecided units move: the matrix is restricted to them, and removed units add a linear part.
        convex = 2.0 * self._convex[np.ix_(undecided, undecided)]
        linear = 2.0 * self._convex[undecided][:, ~free].sum(axis=1) + self.diagonal[undecided]
        rest = count - int(kept.sum())
        inner, shift = _project(start[undecided], rest, 0.0)
        ahead = inner
        momentum = 1.0
        for _ in range(QUADRATIC_STEPS * steps):
            slope = convex @ (1.0 - ahead) + linear
            after, shift = _project(ahead + slope / self._lipschitz, rest, shift)
            next_momentum = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
            ahead = after + (momentum - 1) / next_momentum * (after - inner)
            inner = after
            momentum = next_momentum
        keep[undecided] = inner
        return keep


@dataclass(frozen=True, eq=False)
class QuadraticRelaxation(Relaxation):
    """The convex function of ``Quadratic`` for the sets that contain the kept units and no others than the free ones.

    Attributes:
        loss: The loss.
        free: Units that may be kept (units,).
        kept: Units that are kept (units,).
    """

    loss: Quadratic
    free: Bools
    kept: Bools

    def plane(self, count: int, flops: float, start: Plane | None) -> Plane:
        """Compute the tangent plane at a point near the optimum; more nodes prove more than more steps."""
        steps = 1
        origin = np.zeros(len(self.free))
        if start is None:
            steps = int(min(FIRST_STEPS, max(1, flops / self.loss.flops)))
        else:
            origin = start.keep
        keep = self.loss.descend(self.free, self.kept, count, steps, origin)
        found = tangent_plane(self.loss, keep)
        return replace(found, flops=(steps + 1) * self.loss.flops)


def tangent_plane(loss: Loss, at: Floats) -> Plane:
    """Compute the tangent plane of the convex function that equals a loss on sets.

    Args:
        loss: Loss of a group.
        at: Keep variables in [0, 1] (units,).

    Returns:
        The plane, which holds for all sets.
    """
    value, gradient = loss.convex(at)
    constant = value - float(gradient @ at) + float(loss.diagonal.sum())
    doubt = 1 - np.abs(2 * at - 1)
    return Plane(constant, gradient - loss.diagonal, at, doubt, loss.flops)


def _project(point: Floats, count: int, shift: float) -> tuple[Floats, float]:
    """Find the nearest point in [0, 1] with a sum of ``count``: ``clip(point - shift, 0, 1)``.

    The sum falls with the shift, linearly between the shifts at which an entry reaches 0 or 1: Newton's method within a
    bracket ends after a few steps, where sorting these shifts would take longer than all else.

    Args:
        point: Any point, not empty (n,).
        count: The sum, in [0, n].
        shift: Shift from which the search starts, for example that of a point close by.

    Returns:
        The nearest point, and its shift.
    """
    low, high = float(point.min()) - 1.0, float(point.max())
    tolerance = SUM_ACCURACY * max(1, count)
    shift = min(max(shift, low), high)
    for _ in range(MAX_SHIFTS):
        moved = point - shift
        found = np.minimum(np.maximum(moved, 0.0), 1.0)
        excess = float(found.sum()) - count
        if abs(excess) <= tolerance:
            break
        if excess > 0:
            low = shift
        else:
            high = shift
        between = np.count_nonzero(found == moved)
        shift = shift + excess / between if between else low
        if not low < shift < high:
            shift = (low + high) / 2
    return found, shift


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
        """Add the tangent plane at a point as a row of all later programs.

        Args:
            at: Keep variables in [0, 1] at which the plane touches the loss (units,).
        """
        self.bound(tangent_plane(self.loss, at))

    def bound(self, plane: Plane) -> None:
        """Add the row ``t >= plane - diagonal' (1 - s)`` to all later programs.

        Args:
            plane: Lower bound of the losses of all subsets of the units that are free from now on.
        """
        gradient = plane.slope + self.loss.diagonal
        constant = plane.constant - float(self.loss.diagonal.sum())
        # Planes may be steep: scaling keeps the largest coefficient near 1.
        size = max(1.0, float(np.abs(gradient).max()))
        self._slopes.append(np.append(-gradient, 1.0) / size)
        self._sides.append(constant / size)

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
