"""Encoder base: statements about tensors (affine, ReLU, maximum, gate) as expressions, variables and rows.

Bounds decide what they can: a ReLU of known sign, or a maximum with a known winner, stays an expression and adds
neither a variable nor a binary. Everything else is stated by big-M rows with the bounds of each row. A variable counts
in units of its own bound, and a row is divided by its largest coefficient, both rounded to powers of two: the
tolerances of solvers are absolute, and so mean the same share of a range whatever the scale of the weights.

Two encoders define the effect of a keep variable s in {0, 1}: ``exact_encoder.Exact`` and ``paper_encoder.Paper``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array, vstack

from onnx_oamip.core.records import Bools, Floats, Ints
from onnx_oamip.programs.expression import (
    Expression,
    Interval,
    combine,
    only,
    plus,
    widen,
)
from onnx_oamip.programs.program import Builder, Program, Rows

Step = Callable[[Floats], None]
"""Fills in the values of some variables from those of earlier ones, in an array of all variables."""
Tighten = Callable[[Program, Expression], Interval]
"""Bounds of rows over the program so far; its integer variables may be relaxed."""


class Label(NamedTuple):
    """Meaning of a block of variables.

    Attributes:
        kind: What the variables stand for: ``keep``, ``value``, ``active``, ``winner``, ``loss``, ``sparsity``.
        tensor: Name of the tensor that they belong to; empty for none.
        rows: Row of the tensor, over all samples, of each variable.
        per_sample: Rows of one sample.
    """

    kind: str
    tensor: str
    rows: Ints
    per_sample: int

    def names(self) -> list[str]:
        """Name the variables by kind, tensor, sample and element.

        Returns:
            Name of each variable of the block.
        """
        if not self.tensor:
            return [f"{self.kind}_{row}" for row in self.rows.tolist()]
        sample, element = np.divmod(self.rows, self.per_sample)
        return [
            f"{self.kind}_{self.tensor}_sample{s}_{e}"
            for s, e in zip(sample.tolist(), element.tolist(), strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Lazy:
    """Rows that hold at every solution but are only added where a point violates them.

    Attributes:
        rows: Expressions of the rows; their constants are already on the sides.
        lower: Lower side of each row (rows,).
        upper: Upper side of each row (rows,).
    """

    rows: Expression
    lower: Floats
    upper: Floats


def power_of_two(size: Floats) -> Floats:
    """Round sizes up to powers of two.

    Args:
        size: Non-negative numbers.

    Returns:
        The least power of two above each number; 1 for 0.
    """
    _, exponent = np.frexp(size)
    return np.where(size > 0, np.ldexp(1.0, exponent), 1.0)


@dataclass(frozen=True, eq=False)
class _Windows:
    """Windows of a maximum over all samples.

    Attributes:
        index: Row of the input at each place (windows, places), -1 for places outside.
        candidate: Boolean (windows, places), true for places that may hold the maximum.
        leader: The only candidate of a decided window, or the place of the greatest value at the variables' upper
            bounds (windows,).
        lower: Lower bound of each maximum (windows,).
        upper: Upper bound of each maximum (windows,).
    """

    index: Ints
    candidate: Bools
    leader: Ints
    lower: Floats
    upper: Floats


class Encoder:
    """Builds one program.

    Attributes:
        keep: Indices of the keep variables.
        largest: Greatest magnitude of a bound that entered the program as a coefficient so far.
        lower: Lower bound of each variable so far.
        upper: Upper bound of each variable so far.
        steps: Evaluation of the network, in the order of its statements.
        labels: Meaning of every block of variables.
        tensor: Name of the tensor that is stated now, for the labels.
    """

    def __init__(
        self,
        *,
        images: int,
        keep: int,
        relax_keep: bool,
        relax: bool,
        tighten: Tighten | None = None,
    ) -> None:
        """Start a program of keep variables alone.

        Args:
            images: Number of samples.
            keep: Number of keep variables.
            relax_keep: True for continuous keep variables.
            relax: True for continuous variables in place of ReLU binaries.
            tighten: Function that tightens the bounds of rows.
        """
        self.images = images
        self.builder = Builder()
        self.relax = relax
        self.tighten = tighten
        self.lower = np.zeros(0)
        self.upper = np.zeros(0)
        self.steps: list[Step] = []
        self.lazy: list[Lazy] = []
        self.largest = 0.0
        self.labels: list[Label] = []
        self.tensor = ""
        self.keep = self.variables(keep, 0.0, 1.0, integer=not relax_keep, kind="keep")

    # --- statements -------------------------------------------------------------------------------------------

    def affine(self, parts: Sequence[tuple[csr_array, Expression]], offset: Floats) -> Expression:
        """State ``sum of map @ expression + offset``.

        Args:
            parts: Pairs of a map of one sample and an expression of all samples.
            offset: Constant of one sample.

        Returns:
            Expression of the sum for all samples.
        """
        return combine(parts, offset, self.images)

    def relu(self, a: Expression, unit: Ints | None) -> Expression:
        """State ``max(a, 0)`` with its gates.

        Args:
            a: Pre-activation.
            unit: Keep variable that gates each row (rows,), -1 for none; None if no row has a gate.

        Returns:
            Expression of the gated ReLU.
        """
        raise NotImplementedError

    def gate(self, x: Expression, unit: Ints) -> Expression:
        """State a tensor as it is read behind gates.

        Args:
            x: Tensor in front of the gates.
            unit: Keep variable that gates each row (rows,), -1 for none.

        Returns:
            Expression of the gated tensor.
        """
        raise NotImplementedError

    def maximum(self, x: Expression, windows: Ints) -> Expression:
        """State the greatest element of each window.

        Over the candidates that bounds leave, y >= x_j and y <= x_j + (1 - z_j) (U - L_j) with one z_j of a window 1; U
        is the greatest upper bound among them.

        Args:
            x: Input of the maxima.
            windows: Elements of each window for one sample (windows, places), -1 for places outside.

        Returns:
            Expression with one row per sample and window.
        """
        found = self._windows(x, windows)
        undecided = found.candidate.sum(axis=1) > 1
        window = np.arange(len(found.index))
        leader = x.take(found.index[window, found.leader])
        result = replace(only(leader, ~undecided), lower=found.lower, upper=found.upper)
        if not undecided.any():
            return result
        return self._undecided_maxima(x, found, np.flatnonzero(undecided), result)

    def _windows(self, x: Expression, windows: Ints) -> _Windows:
        """The windows of all samples, with the elements that can be the maximum according to their bounds."""
        size = x.rows // self.images
        of_all_samples = np.arange(self.images)[:, None, None] * size + windows
        places = windows.shape[1]
        index = np.where(windows >= 0, of_all_samples, -1).reshape(-1, places)
        low = np.where(index >= 0, x.lower[index], -np.inf)
        high = np.where(index >= 0, x.upper[index], -np.inf)
        safest = low.argmax(axis=1)
        window = np.arange(len(index))
        floor = low[window, safest]
        candidate = (index >= 0) & (high > floor[:, None])
        candidate[window, safest] = True
        leader = self._remove_dominated(x, index, candidate, safest)
        return _Windows(index, candidate, leader, lower=floor, upper=high.max(axis=1))

    def _remove_dominated(
        self,
        x: Expression,
        index: Ints,
        candidate: Bools,
        safest: Ints,
    ) -> Ints:
        """Clear the candidates that are never above the leader of their window; returns the leaders (windows,).

        The leader is the candidate of greatest value with all variables at their upper bounds. Differences of
        expressions separate places that share a gate (background pixels, above all), which intervals cannot.
        """
        all_windows = np.arange(len(index))
        finite_upper = np.where(np.isfinite(self.upper), self.upper, 0.0)
        value = np.where(candidate, x.at(finite_upper)[index], -np.inf)
        undecided = candidate.sum(axis=1) > 1
        leader = np.where(undecided, value.argmax(axis=1), safest)
        rival = candidate.copy()
        rival[all_windows, leader] = False
        window, place = np.nonzero(rival)
        if not len(window):
            return leader
        better = x.take(index[window, leader[window]])
        other = x.take(index[window, place])
        difference = Expression(
            matrix=csr_array(better.matrix - other.matrix),
            constant=better.constant - other.constant,
            lower=better.lower,
            upper=better.upper,
        )
        beaten = difference.reach(self.lower, self.upper).lower >= 0
        candidate[window[beaten], place[beaten]] = False
        return leader

    def _undecided_maxima(
        self,
        x: Expression,
        windows: _Windows,
        undecided: Ints,
        result: Expression,
    ) -> Expression:
        """Add the variables and rows of undecided windows, and the variables to the result."""
        count = len(undecided)
        # One entry per candidate: the number of its window among the undecided ones, and its row of x.
        window, place = np.nonzero(windows.candidate[undecided])
        source = windows.index[undecided[window], place]
        least, most = self._pooled_interval(windows.lower[undecided], windows.upper[undecided])
        y, unit = self.measured(least, most, where=undecided, of=len(windows.index))
        z = self.variables(
            len(source), 0.0, 1.0, integer=True, kind="winner", where=source, of=x.rows
        )
        candidate_low, _ = self._pooled_interval(x.lower[source], x.upper[source])
        margin = most[window] - candidate_low
        self.note_bound(margin)
        rows = x.take(source)
        maximum = (y[window], unit[window])
        unless_chosen = (z, margin)
        self.rows(rows, -1.0, [maximum], lower=rows.constant)
        self.rows(rows, -1.0, [maximum, unless_chosen], upper=rows.constant + margin)
        one_per_window = (window, z, 1.0)
        self.builder.rows(count, one_per_window, lower=1.0, upper=1.0)

        def step(values: Floats) -> None:
            candidates = rows.at(values)
            top = np.full(count, -np.inf)
            np.maximum.at(top, window, candidates)
            values[y] = top / unit
            hit = np.flatnonzero(candidates >= top[window])
            _, first = np.unique(window[hit], return_index=True)
            values[z] = 0.0
            values[z[hit[first]]] = 1.0

        self.steps.append(step)
        return plus(result, undecided, y, unit, columns=self.builder.n_variables)

    def _pooled_interval(self, lower: Floats, upper: Floats) -> Interval:
        """Interval that a pooled element can take once units are removed."""
        return Interval(lower, upper)

    # --- building ---------------------------------------------------------------------------------------------

    def variables(
        self,
        count: int,
        lower: Floats | float,
        upper: Floats | float,
        integer: bool = False,
        *,
        kind: str,
        where: Ints | None = None,
        of: int = 0,
    ) -> Ints:
        """Add variables, and remember their bounds for intervals.

        Args:
            count: Number of variables.
            lower: Lower bounds.
            upper: Upper bounds.
            integer: True for integer variables.
            kind: What the variables stand for (see ``Label``).
            where: Row of the stated tensor that each belongs to; None for variables of no tensor.
            of: Rows of the stated tensor over all samples.

        Returns:
            Indices of the variables (count,).
        """
        if where is None:
            label = Label(kind, "", np.arange(count), 1)
        else:
            label = Label(kind, self.tensor, where, max(of // self.images, 1))
        self.labels.append(label)
        self.lower = np.append(self.lower, np.broadcast_to(lower, count))
        self.upper = np.append(self.upper, np.broadcast_to(upper, count))
        return self.builder.variables(count, lower, upper, integer=integer)

    def note_bound(self, magnitude: Floats) -> None:
        """Record the bounds that enter the program as coefficients.

        Args:
            magnitude: Magnitudes of the bounds, at least one.
        """
        self.largest = max(self.largest, float(magnitude.max()))

    def measured(
        self,
        lower: Floats,
        upper: Floats,
        *,
        where: Ints,
        of: int,
    ) -> tuple[Ints, Floats]:
        """Add variables that are scaled to a range of about one.

        Args:
            lower: Least number that each variable stands for.
            upper: Greatest number that each variable stands for.
            where: Row of the stated tensor that each belongs to.
            of: Rows of the stated tensor over all samples.

        Returns:
            Indices of the variables, and the unit by which each is multiplied to give its number.
        """
        magnitude = np.maximum(np.abs(lower), np.abs(upper))
        unit = power_of_two(magnitude)
        variables = self.variables(
            len(unit), lower / unit, upper / unit, kind="value", where=where, of=of
        )
        return variables, unit

    def rows(
        self,
        expression: Expression,
        sign: float,
        others: Sequence[tuple[Ints, Floats | float]],
        *,
        lower: Floats | float = -np.inf,
        upper: Floats | float = np.inf,
    ) -> None:
        """Add ``lower <= sign * (expression without its constant) + sum of weights * variables <= upper``.

        Args:
            expression: Rows of the constraints.
            sign: Factor of the expression.
            others: Pairs of one variable per row (rows,) and their weights.
            lower: Lower sides.
            upper: Upper sides.
        """
        entries = expression.matrix.tocoo()
        count = expression.rows
        every_row = np.arange(count)
        row_parts: list[Ints] = [entries.row.astype(np.int64)]
        column_parts: list[Ints] = [entries.col.astype(np.int64)]
        value_parts = [sign * entries.data]
        for variables, weights in others:
            row_parts.append(every_row)
            column_parts.append(variables)
            value_parts.append(np.broadcast_to(weights, count))
        row = np.concatenate(row_parts)
        column = np.concatenate(column_parts)
        value = np.concatenate(value_parts)
        largest = np.zeros(count)
        np.maximum.at(largest, row, np.abs(value))
        unit = power_of_two(largest)
        entries_in_units = (row, column, value / unit[row])
        self.builder.rows(count, entries_in_units, lower / unit, upper / unit)

    def require(
        self,
        expression: Expression,
        lower: Floats | float,
        upper: Floats | float,
    ) -> None:
        """State a range of rows. A row of one variable becomes its bound; the others are added lazily.

        Args:
            expression: Rows of the constraints.
            lower: Least value of each row.
            upper: Greatest value of each row.
        """
        low = np.broadcast_to(lower, expression.rows) - expression.constant
        high = np.broadcast_to(upper, expression.rows) - expression.constant
        entries = np.diff(expression.matrix.indptr)
        single = np.flatnonzero(entries == 1)
        if len(single):
            first = expression.matrix.indptr[single]
            column = expression.matrix.indices[first].astype(np.int64)
            weight = expression.matrix.data[first]
            self._narrow(column, low[single] / weight, high[single] / weight)
        several = np.flatnonzero(entries > 1)
        if len(several):
            self.lazy.append(Lazy(expression.take(several), low[several], high[several]))

    def _narrow(self, column: Ints, one: Floats, other: Floats) -> None:
        """Narrow the bounds of variables to the range between two values, given in any order."""
        # Rounding must not leave a bound above 1 or a pair of bounds crossed.
        lower = np.minimum(np.minimum(one, other), self.upper[column])
        np.maximum.at(self.lower, column, lower)
        upper = np.maximum(np.maximum(one, other), self.lower[column])
        np.minimum.at(self.upper, column, upper)

    def program(self) -> Program:
        """Build the program so far.

        Returns:
            Program with the bounds as they were narrowed since its variables were added.
        """
        built = self.builder.build()
        return replace(
            built,
            lower=np.maximum(built.lower, self.lower),
            upper=np.minimum(built.upper, self.upper),
        )

    def pending(self, columns: int) -> Rows:
        """Collect all lazy rows.

        Args:
            columns: Number of variables of the program.

        Returns:
            The rows, each divided by its largest coefficient.
        """
        if not self.lazy:
            return Rows(csr_array((0, columns)), np.zeros(0), np.zeros(0))
        blocks = [widen(part.rows.matrix, columns) for part in self.lazy]
        matrix = csr_array(vstack(blocks, format="csr"))
        largest = abs(matrix).max(axis=1).toarray()
        unit = power_of_two(largest.reshape(-1))
        lower = np.concatenate([part.lower for part in self.lazy])
        upper = np.concatenate([part.upper for part in self.lazy])
        return Rows(csr_array(matrix / unit[:, None]), lower / unit, upper / unit)

    def complete(self, keep: Floats, count: int) -> Floats:
        """Evaluate the network at given keep variables.

        Args:
            keep: Value of each keep variable (keep variables,).
            count: Number of variables of the program.

        Returns:
            Values of all variables (count,).
        """
        values = np.zeros(count)
        values[self.keep] = keep
        for step in self.steps:
            step(values)
        return values


def signs(a: Expression) -> tuple[Bools, Bools]:
    """Classify rows by sign.

    Args:
        a: Expression with bounds.

    Returns:
        Rows that are at least 0 by their bounds, and rows of unknown sign. All others are at most 0.
    """
    on = a.lower >= 0
    return on, ~on & (a.upper > 0)
