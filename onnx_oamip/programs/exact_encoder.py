"""Exact encoding: a consumer of channel c reads ``s x_c``, as in the pruned model.

Intervals hold for every choice of keep variables: each gated interval is widened to contain 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.sparse import csr_array

from onnx_oamip.core.records import Floats, Ints
from onnx_oamip.programs.encoder import Encoder, signs
from onnx_oamip.programs.expression import Expression, only, plus


class Exact(Encoder):
    """Gates at consumers; every interval holds for every choice of keep variables."""

    def affine(self, parts: Sequence[tuple[csr_array, Expression]], offset: Floats) -> Expression:
        """State a sum of maps, with an interval that also uses the bounds of the variables.

        Args:
            parts: Pairs of a map of one sample and an expression of all samples.
            offset: Constant of one sample.

        Returns:
            Expression of the sum for all samples.
        """
        result = super().affine(parts, offset)
        # The bounds of the variables know which terms cancel out; the intervals of the parts do not.
        result = result.within(*result.reach(self.lower, self.upper))
        lower = np.where(result.fixed, result.constant, result.lower)
        upper = np.where(result.fixed, result.constant, result.upper)
        return replace(result, lower=lower, upper=upper)

    def gate(self, x: Expression, unit: Ints) -> Expression:
        """State ``s x``.

        A constant times s is an expression. Otherwise a variable h takes the product by McCormick's four rows, which
        are exact for binary s: ``L s <= h <= U s`` and ``x - (1 - s) U <= h <= x - (1 - s) L``.

        Args:
            x: Tensor in front of the gates.
            unit: Keep variable that gates each row (rows,), -1 for none.

        Returns:
            Expression of the gated tensor.
        """
        gated = unit >= 0
        zero = (x.lower == 0) & (x.upper == 0)
        constant = np.flatnonzero(gated & x.fixed & ~zero)
        variable = np.flatnonzero(gated & ~x.fixed & ~zero)
        keep = self.keep[unit[constant]]
        result = plus(
            only(x, ~gated),
            constant,
            keep,
            x.constant[constant],
            columns=self.builder.n_variables,
        )
        if len(variable):
            result = self._gate_variable(x, unit, variable, result)
        lower = np.where(gated, np.minimum(x.lower, 0), x.lower)
        upper = np.where(gated, np.maximum(x.upper, 0), x.upper)
        return replace(result, lower=lower, upper=upper)

    def _gate_variable(
        self,
        x: Expression,
        unit: Ints,
        where: Ints,
        result: Expression,
    ) -> Expression:
        """Add the products of the rows ``where`` to the result."""
        rows = x.take(where)
        s = self.keep[unit[where]]
        low = rows.lower
        high = rows.upper
        least, most = np.minimum(low, 0), np.maximum(high, 0)
        h, size = self.measured(least, most, where=where, of=result.rows)
        self.note_bound(np.maximum(np.abs(low), np.abs(high)))
        zero = Expression.of(np.zeros(len(where)))
        product = (h, size)
        minus_high_s = (s, -high)
        minus_low_s = (s, -low)
        self.rows(zero, 1.0, [product, minus_high_s], upper=0.0)
        # Without a negative bound, ``h >= 0`` is the variable's own bound.
        if (low != 0).any():
            self.rows(zero, 1.0, [product, minus_low_s], lower=0.0)
        self.rows(rows, -1.0, [product, minus_high_s], lower=rows.constant - high)
        self.rows(rows, -1.0, [product, minus_low_s], upper=rows.constant - low)

        def step(values: Floats) -> None:
            values[h] = values[s] * rows.at(values) / size

        self.steps.append(step)
        return plus(result, where, h, size, columns=self.builder.n_variables)

    def relu(self, a: Expression, unit: Ints | None) -> Expression:
        """State ``s max(a, 0)``.

        Where the sign is unknown, gate and ReLU share one variable h and one binary v <= s: ``h >= 0``,
        ``h >= a - (1 - s) U``, ``h <= a - (1 - v) L``, ``h <= v U``. With s = 0 also v = h = 0; with s = 1 these are
        the usual big-M rows of a ReLU.

        Source: Tjeng, Xiao, Tedrake, "Evaluating Robustness of Neural Networks with Mixed Integer Programming",
        ICLR 2019.

        Args:
            a: Pre-activation.
            unit: Keep variable that gates each row (rows,), -1 for none; None if no row has a gate.

        Returns:
            Expression of the gated ReLU.
        """
        on, mixed = signs(a)
        if mixed.any() and self.tighten is not None:
            a = self._tightened(a, np.flatnonzero(mixed))
            on, mixed = signs(a)
        lower = np.maximum(a.lower, 0)
        upper = np.maximum(a.upper, 0)
        known_lower = np.where(on, lower, 0)
        known_upper = np.where(on, upper, 0)
        result = replace(only(a, on), lower=known_lower, upper=known_upper)
        if unit is not None:
            result = self.gate(result, unit)
            # A gated row may be 0 whatever its own interval.
            lower = np.where(unit >= 0, 0.0, lower)
        if mixed.any():
            result = self._relu_of_unknown_sign(a, unit, np.flatnonzero(mixed), result)
        return replace(result, lower=lower, upper=upper)

    def _tightened(self, a: Expression, where: Ints) -> Expression:
        """The expression with tightened intervals in the rows ``where``."""
        assert self.tighten is not None
        lower = a.lower.copy()
        upper = a.upper.copy()
        lower[where], upper[where] = self.tighten(self.program(), a.take(where))
        return a.within(lower, upper)

    def _relu_of_unknown_sign(
        self,
        a: Expression,
        unit: Ints | None,
        where: Ints,
        result: Expression,
    ) -> Expression:
        """Add the gated ReLUs of the rows ``where`` to the result."""
        count = len(where)
        rows = a.take(where)
        low = rows.lower
        high = rows.upper
        self.note_bound(np.maximum(-low, high))
        h, size = self.measured(np.zeros(count), high, where=where, of=result.rows)
        v = self.variables(
            count, 0.0, 1.0, integer=not self.relax, kind="active", where=where, of=result.rows
        )
        zero = Expression.of(np.zeros(count))
        if unit is None:
            gate = np.full(count, -1)
        else:
            gate = unit[where]
        gated = np.flatnonzero(gate >= 0)
        free = np.flatnonzero(gate < 0)
        s = self.keep[gate[gated]]
        # h >= a where there is no gate, and h >= a - (1 - s) U where there is one.
        h_free = (h[free], size[free])
        self.rows(rows.take(free), -1.0, [h_free], lower=rows.constant[free])
        h_gated = (h[gated], size[gated])
        minus_high_s = (s, -high[gated])
        above = (rows.constant - high)[gated]
        self.rows(rows.take(gated), -1.0, [h_gated, minus_high_s], lower=above)
        # v <= s, h <= a - (1 - v) L and h <= v U.
        v_gated = (v[gated], 1.0)
        minus_s = (s, -1.0)
        self.rows(zero.take(gated), 1.0, [v_gated, minus_s], upper=0.0)
        activation = (h, size)
        minus_low_v = (v, -low)
        minus_high_v = (v, -high)
        self.rows(rows, -1.0, [activation, minus_low_v], upper=rows.constant - low)
        self.rows(zero, 1.0, [activation, minus_high_v], upper=0.0)

        def step(values: Floats) -> None:
            pre_activation = rows.at(values)
            share = np.ones(count)
            share[gated] = values[s]
            values[h] = share * np.maximum(pre_activation, 0) / size
            values[v] = share * (pre_activation > 0)

        self.steps.append(step)
        return plus(result, where, h, size, columns=self.builder.n_variables)
