"""From statements about tensors (affine, ReLU, maximum, gate) to expressions, variables and rows.

Bounds decide what they can: a ReLU whose sign is known, or a maximum whose winner is, stays an expression and costs
neither a variable nor a binary. What is left is stated by big-M rows with the bounds of each row. A variable counts in
units of its own bound, and a row is divided by its largest coefficient, both as powers of two: solvers' tolerances are
absolute, and so mean the same share of a range whatever the scale of the weights.

Two encoders say what a keep variable s in {0, 1} does:

- ``Exact``: where a consumer reads channel c it reads ``s x_c``, as in the pruned model. Intervals hold for every
  choice of keep variables: each gated interval is widened to contain 0.
- ``Paper`` (ElAraby, Wolf, Carvalho, "OAMIP: Optimizing ANN Architectures Using Mixed-Integer Programming", CPAIOR
  2023, and its code): a scored layer's pre-activation a loses (1 - s) U, with the bounds of the *unpruned* network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_array, vstack

from onnx_oamip.core.records import Bools, Floats, Ints
from onnx_oamip.programs.expression import (
    Expression,
    combine,
    only,
    plus,
    widen,
)
from onnx_oamip.programs.program import Builder, Program, Rows

Step = Callable[[Floats], None]
Tighten = Callable[[Program, Expression], tuple[Floats, Floats]]
"""(relaxed program so far, rows) -> bounds of the rows over it."""


@dataclass(frozen=True, eq=False)
class Lazy:
    """Rows that hold at every solution but are only added where a point violates them."""

    rows: Expression
    lower: Floats
    upper: Floats


def power_of_two(size: Floats) -> Floats:
    """The least power of two above each size; 1 for a size of 0."""
    return np.where(size > 0, np.ldexp(1.0, np.frexp(size)[1]), 1.0)


class Encoder:
    """Makes one program. ``keep`` are the indices of the keep variables; ``largest`` the greatest bound so far."""

    def __init__(
        self, images: int, keep: int, relax_keep: bool, relax: bool, tighten: Tighten | None = None
    ) -> None:
        self.images = images
        self.builder = Builder()
        self.relax = relax
        self.tighten = tighten
        self.lower = np.zeros(0)
        self.upper = np.zeros(0)
        self.steps: list[Step] = []
        self.lazy: list[Lazy] = []
        self.largest = 0.0
        self.keep = self.variables(keep, 0.0, 1.0, integer=not relax_keep)

    # --- statements -------------------------------------------------------------------------------------------

    def affine(self, parts: Sequence[tuple[csr_array, Expression]], offset: Floats) -> Expression:
        """``sum of map @ expression + offset``; maps and offset are those of one image."""
        return combine(parts, offset, self.images)

    def relu(self, a: Expression, unit: Ints | None) -> Expression:
        """``max(a, 0)``, gated by the units ``unit`` (rows,), -1 for none; None: no gate here."""
        raise NotImplementedError

    def gate(self, x: Expression, unit: Ints) -> Expression:
        """``x`` as it is read behind the gates ``unit`` (rows,), -1 for none."""
        raise NotImplementedError

    def maximum(self, x: Expression, windows: Ints) -> Expression:
        """Greatest of each window: ``windows`` (elements, places) of one image, -1 outside.

        y >= x_j and y <= x_j + (1 - z_j) (U - L_j) with one z_j of a window 1, over the places that bounds leave; U is
        the greatest upper bound among them.
        """
        size = x.rows // self.images
        everywhere = np.arange(self.images)[:, None, None] * size + windows
        index = np.where(windows >= 0, everywhere, -1).reshape(-1, windows.shape[1])
        low = np.where(index >= 0, x.lower[index], -np.inf)
        high = np.where(index >= 0, x.upper[index], -np.inf)
        best = low.argmax(axis=1)
        row = np.arange(len(index))
        floor, ceiling = low[row, best], high.max(axis=1)
        candidate = (index >= 0) & (high > floor[:, None])
        candidate[row, best] = True
        top = self._dominate(x, index, candidate, best)
        picked = x.take(index[row, top])
        open_ = candidate.sum(axis=1) > 1
        result = replace(only(picked, ~open_), lower=floor, upper=ceiling)
        if not open_.any():
            return result
        where = np.flatnonzero(open_)
        window, place = np.nonzero(candidate[where])
        source = index[where[window], place]
        least, most = self._span(floor[where], ceiling[where])
        y, unit = self.measured(least, most)
        z = self.variables(len(source), 0.0, 1.0, integer=True)
        x_low, _ = self._span(x.lower[source], x.upper[source])
        margin = most[window] - x_low
        self.largest = max(self.largest, float(margin.max()))
        rows = x.take(source)
        self.rows(rows, -1.0, [(y[window], unit[window])], lower=rows.constant)
        self.rows(
            rows, -1.0, [(y[window], unit[window]), (z, margin)], upper=rows.constant + margin
        )
        self.builder.rows(len(where), (window, z, 1.0), lower=1.0, upper=1.0)

        def step(values: Floats) -> None:
            found = rows.at(values)
            top = np.full(len(where), -np.inf)
            np.maximum.at(top, window, found)
            values[y] = top / unit
            hit = np.flatnonzero(found >= top[window])
            _, first = np.unique(window[hit], return_index=True)
            values[z] = 0.0
            values[z[hit[first]]] = 1.0

        self.steps.append(step)
        return plus(result, where, y, unit, self.builder.n_variables)

    def _dominate(self, x: Expression, index: Ints, candidate: Bools, best: Ints) -> Ints:
        """Take from the open windows' candidates those that one of them is never below; (windows,) that one.

        It is the candidate of greatest value with all variables at their upper bounds. Pixels that share a gate
        (background, above all) are told apart by this and not by their intervals.
        """
        row = np.arange(len(index))
        high = np.where(np.isfinite(self.upper), self.upper, 0.0)
        value = np.where(candidate, x.at(high)[index], -np.inf)
        top = np.where(candidate.sum(axis=1) > 1, value.argmax(axis=1), best)
        rival = candidate.copy()
        rival[row, top] = False
        window, place = np.nonzero(rival)
        if len(window):
            better, other = x.take(index[window, top[window]]), x.take(index[window, place])
            apart = Expression(
                csr_array(better.matrix - other.matrix),
                better.constant - other.constant,
                better.lower,
                better.upper,
            )
            beaten = apart.reach(self.lower, self.upper)[0] >= 0
            candidate[window[beaten], place[beaten]] = False
        return top

    # --- building ---------------------------------------------------------------------------------------------

    def variables(
        self, count: int, lower: Floats | float, upper: Floats | float, integer: bool = False
    ) -> Ints:
        """New variables; their bounds are remembered for intervals."""
        self.lower = np.append(self.lower, np.broadcast_to(lower, count))
        self.upper = np.append(self.upper, np.broadcast_to(upper, count))
        return self.builder.variables(count, lower, upper, integer=integer)

    def measured(self, lower: Floats, upper: Floats) -> tuple[Ints, Floats]:
        """New variables, and the unit in which each one counts: together they stand for numbers in [lower, upper]."""
        unit = power_of_two(np.maximum(np.abs(lower), np.abs(upper)))
        return self.variables(len(unit), lower / unit, upper / unit), unit

    def rows(
        self,
        expression: Expression,
        sign: float,
        others: Sequence[tuple[Ints, Floats | float]],
        lower: Floats | float = -np.inf,
        upper: Floats | float = np.inf,
    ) -> None:
        """``lower <= sign * (expression without its constant) + sum of weights * variables <= upper``, row by row."""
        entries = expression.matrix.tocoo()
        count = expression.rows
        each = np.arange(count)
        row = np.concatenate([entries.row, *(each for _ in others)])
        column = np.concatenate([entries.col, *(v for v, _ in others)])
        value = np.concatenate(
            [sign * entries.data, *(np.broadcast_to(w, count) for _, w in others)]
        )
        top = np.zeros(count)
        np.maximum.at(top, row, np.abs(value))
        unit = power_of_two(top)
        self.builder.rows(count, (row, column, value / unit[row]), lower / unit, upper / unit)

    def require(self, expression: Expression, lower: Floats | float, upper: Floats | float) -> None:
        """Rows to add lazily. One that holds a single variable is a bound of it, at once."""
        low = np.broadcast_to(lower, expression.rows) - expression.constant
        high = np.broadcast_to(upper, expression.rows) - expression.constant
        entries = np.diff(expression.matrix.indptr)
        single = np.flatnonzero(entries == 1)
        if len(single):
            first = expression.matrix.indptr[single]
            column, weight = expression.matrix.indices[first], expression.matrix.data[first]
            a, b = low[single] / weight, high[single] / weight
            # Rounding must not leave a bound above 1 or a pair of bounds crossed.
            np.maximum.at(self.lower, column, np.minimum(np.minimum(a, b), self.upper[column]))
            np.minimum.at(self.upper, column, np.maximum(np.maximum(a, b), self.lower[column]))
        more = np.flatnonzero(entries > 1)
        if len(more):
            self.lazy.append(Lazy(expression.take(more), low[more], high[more]))

    def program(self) -> Program:
        """The program as it stands, with the bounds that were found since its variables were made."""
        built = self.builder.build()
        return replace(
            built,
            lower=np.maximum(built.lower, self.lower),
            upper=np.minimum(built.upper, self.upper),
        )

    def pending(self, columns: int) -> Rows:
        """All lazy rows over ``columns`` variables."""
        if not self.lazy:
            return Rows(csr_array((0, columns)), np.zeros(0), np.zeros(0))
        matrix = csr_array(
            vstack([widen(part.rows.matrix, columns) for part in self.lazy], format="csr")
        )
        unit = power_of_two(abs(matrix).max(axis=1).toarray().reshape(-1))
        lower, upper = (
            np.concatenate([getattr(part, side) for part in self.lazy])
            for side in ("lower", "upper")
        )
        return Rows(csr_array(matrix / unit[:, None]), lower / unit, upper / unit)

    def complete(self, keep: Floats, count: int) -> Floats:
        """All variables' values for given keep variables: the network evaluated, in the order of its statements."""
        values = np.zeros(count)
        values[self.keep] = keep
        for step in self.steps:
            step(values)
        return values

    def _span(self, lower: Floats, upper: Floats) -> tuple[Floats, Floats]:
        """The interval that a pooled element can take once units are gone."""
        return lower, upper

    def _mixed(self, a: Expression) -> tuple[Bools, Bools]:
        """(rows known to be at least 0, rows of unknown sign)."""
        on = a.lower >= 0
        return on, ~on & (a.upper > 0)


class Exact(Encoder):
    """Gates where consumers read; every interval holds for every choice of keep variables."""

    def affine(self, parts: Sequence[tuple[csr_array, Expression]], offset: Floats) -> Expression:
        """As the base; the interval is also held against the variables' own bounds, which know what cancels out."""
        found = super().affine(parts, offset)
        found = found.within(*found.reach(self.lower, self.upper))
        low, high = (np.where(found.fixed, found.constant, v) for v in (found.lower, found.upper))
        return replace(found, lower=low, upper=high)

    def gate(self, x: Expression, unit: Ints) -> Expression:
        """``s x``: a constant times s is an expression; otherwise h with McCormick's four rows, exact for binary s.

        L s <= h <= U s,  x - (1 - s) U <= h <= x - (1 - s) L.
        """
        gated = unit >= 0
        zero = (x.lower == 0) & (x.upper == 0)
        simple = np.flatnonzero(gated & x.fixed & ~zero)
        rest = np.flatnonzero(gated & ~x.fixed & ~zero)
        lower = np.where(gated, np.minimum(x.lower, 0), x.lower)
        upper = np.where(gated, np.maximum(x.upper, 0), x.upper)
        result = only(x, ~gated)
        result = plus(
            result, simple, self.keep[unit[simple]], x.constant[simple], self.builder.n_variables
        )
        if len(rest):
            rows, s = x.take(rest), self.keep[unit[rest]]
            low, high = rows.lower, rows.upper
            h, size = self.measured(np.minimum(low, 0), np.maximum(high, 0))
            self.largest = max(self.largest, float(np.maximum(np.abs(low), np.abs(high)).max()))
            nothing = Expression.of(np.zeros(len(rest)))
            self.rows(nothing, 1.0, [(h, size), (s, -high)], upper=0.0)
            if (low != 0).any():
                self.rows(nothing, 1.0, [(h, size), (s, -low)], lower=0.0)
            self.rows(rows, -1.0, [(h, size), (s, -high)], lower=rows.constant - high)
            self.rows(rows, -1.0, [(h, size), (s, -low)], upper=rows.constant - low)

            def step(values: Floats) -> None:
                values[h] = values[s] * rows.at(values) / size

            self.steps.append(step)
            result = plus(result, rest, h, size, self.builder.n_variables)
        return replace(result, lower=lower, upper=upper)

    def relu(self, a: Expression, unit: Ints | None) -> Expression:
        """``s max(a, 0)``. Where the sign is unknown, gate and ReLU share one variable h and one binary v <= s:

        h >= 0,  h >= a - (1 - s) U,  h <= a - (1 - v) L,  h <= v U: with s = 0 also v = h = 0; with s = 1 the usual
        big-M ReLU (Tjeng, Xiao, Tedrake 2019).
        """
        on, mixed = self._mixed(a)
        if mixed.any() and self.tighten is not None:
            where = np.flatnonzero(mixed)
            low, high = self.tighten(self.program(), a.take(where))
            lower, upper = a.lower.copy(), a.upper.copy()
            lower[where], upper[where] = low, high
            a = a.within(lower, upper)
            on, mixed = self._mixed(a)
        lower, upper = np.maximum(a.lower, 0), np.maximum(a.upper, 0)
        result = replace(only(a, on), lower=np.where(on, lower, 0), upper=np.where(on, upper, 0))
        if unit is not None:
            result = self.gate(result, unit)
        if mixed.any():
            where = np.flatnonzero(mixed)
            rows, low, high = a.take(where), a.lower[where], a.upper[where]
            self.largest = max(self.largest, float(np.maximum(-low, high).max()))
            h, size = self.measured(np.zeros(len(where)), high)
            v = self.variables(len(where), 0.0, 1.0, integer=not self.relax)
            nothing = Expression.of(np.zeros(len(where)))
            kept = np.full(len(where), -1) if unit is None else unit[where]
            gated = np.flatnonzero(kept >= 0)
            s = self.keep[kept[gated]]
            free = np.flatnonzero(kept < 0)
            self.rows(rows.take(free), -1.0, [(h[free], size[free])], lower=rows.constant[free])
            self.rows(
                rows.take(gated),
                -1.0,
                [(h[gated], size[gated]), (s, -high[gated])],
                lower=(rows.constant - high)[gated],
            )
            self.rows(nothing.take(gated), 1.0, [(v[gated], 1.0), (s, -1.0)], upper=0.0)
            self.rows(rows, -1.0, [(h, size), (v, -low)], upper=rows.constant - low)
            self.rows(nothing, 1.0, [(h, size), (v, -high)], upper=0.0)

            def step(values: Floats) -> None:
                found = rows.at(values)
                share = np.ones(len(where))
                share[gated] = values[s]
                values[h] = share * np.maximum(found, 0) / size
                values[v] = share * (found > 0)

            self.steps.append(step)
            result = plus(result, where, h, size, self.builder.n_variables)
        # A gated row may be 0 whatever its own interval.
        floor = np.where((unit >= 0) if unit is not None else False, 0.0, lower)
        return replace(result, lower=floor, upper=upper)


class Paper(Encoder):
    """Gates on pre-activations, with bounds of the unpruned network, in the reduced form that they allow.

    With R1 to R4 of the published program, a row with L >= 0 must have v = 1 and so ``h = a - (1 - s) U`` with
    ``0 <= h <= U``; one with U <= 0 has ``h = 0`` and ``L <= a <= 0``. Those ranges are added lazily.
    """

    def gate(self, x: Expression, unit: Ints) -> Expression:
        """A scored layer without a ReLU right behind: ``x - (1 - s) U``, U as it is. Bounds stay those of x."""
        return self._scored(x, unit, x.upper)

    def relu(self, a: Expression, unit: Ints | None) -> Expression:
        """R1 to R4; v is one of {0, 1}, or relaxed as in the published runs."""
        on, mixed = self._mixed(a)
        high = np.maximum(a.upper, 0)
        scored = a if unit is None else self._scored(a, unit, high)
        result = only(scored, on)
        alive, dead = np.flatnonzero(on), np.flatnonzero(~on & ~mixed)
        self.require(scored.take(alive), 0.0, high[alive])
        self.require(a.take(dead), a.lower[dead], 0.0)
        if mixed.any():
            where = np.flatnonzero(mixed)
            rows, low, top = scored.take(where), a.lower[where], high[where]
            self.largest = max(self.largest, float(np.maximum(-low, top).max()))
            h, size = self.measured(np.zeros(len(where)), top)
            v = self.variables(len(where), 0.0, 1.0, integer=not self.relax)
            self.rows(rows, -1.0, [(h, size)], lower=rows.constant)
            self.rows(rows, -1.0, [(h, size), (v, -low)], upper=rows.constant - low)
            self.rows(Expression.of(np.zeros(len(where))), 1.0, [(h, size), (v, -top)], upper=0.0)

            def step(values: Floats) -> None:
                found = rows.at(values)
                values[h] = np.maximum(found, 0) / size
                values[v] = found > 0

            self.steps.append(step)
            result = plus(result, where, h, size, self.builder.n_variables)
        return replace(result, lower=np.maximum(a.lower, 0), upper=high)

    def _scored(self, x: Expression, unit: Ints, high: Floats) -> Expression:
        where = np.flatnonzero(unit >= 0)
        constant = x.constant.copy()
        constant[where] -= high[where]
        found = plus(x, where, self.keep[unit[where]], high[where], self.builder.n_variables)
        return replace(found, constant=constant)

    def _span(self, lower: Floats, upper: Floats) -> tuple[Floats, Floats]:
        """Bounds of the unpruned network do not hold for pruned channels: 0 must be possible, in a pool too."""
        return np.minimum(lower, 0), np.maximum(upper, 0)
