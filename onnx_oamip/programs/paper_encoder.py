"""Published encoding: the pre-activation a of a scored layer is lowered by (1 - s) U.

The bounds L and U are those of the *unpruned* network.

Source: ElAraby, Wolf, Carvalho, "OAMIP: Optimizing ANN Architectures Using Mixed-Integer Programming", CPAIOR 2023, and
its code.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnx_oamip.core.records import Floats, Ints
from onnx_oamip.programs.encoder import Encoder, signs
from onnx_oamip.programs.expression import Expression, Interval, only, plus


class Paper(Encoder):
    """Gates on pre-activations, with bounds of the unpruned network, in the reduced form that they allow.

    With the rows R1 to R4 of the published program, a row with L >= 0 must have v = 1 and so ``h = a - (1 - s) U`` with
    ``0 <= h <= U``; one with U <= 0 has ``h = 0`` and ``L <= a <= 0``. Those ranges are added lazily.
    """

    def gate(self, x: Expression, unit: Ints) -> Expression:
        """State ``x - (1 - s) U`` for a scored layer without a ReLU behind it.

        Args:
            x: Output of the layer.
            unit: Keep variable that gates each row (rows,), -1 for none.

        Returns:
            Expression of the gated output, with the bounds of x.
        """
        return self._scored(x, unit, x.upper)

    def relu(self, a: Expression, unit: Ints | None) -> Expression:
        """State a ReLU by R1 to R4; v is in {0, 1}, or relaxed as in the published runs.

        Args:
            a: Pre-activation.
            unit: Keep variable that gates each row (rows,), -1 for none; None if no row has a gate.

        Returns:
            Expression of the ReLU.
        """
        on, mixed = signs(a)
        high = np.maximum(a.upper, 0)
        if unit is None:
            scored = a
        else:
            scored = self._scored(a, unit, high)
        result = only(scored, on)
        positive = np.flatnonzero(on)
        negative = np.flatnonzero(~on & ~mixed)
        self.require(scored.take(positive), 0.0, high[positive])
        self.require(a.take(negative), a.lower[negative], 0.0)
        if mixed.any():
            where = np.flatnonzero(mixed)
            limits = Interval(a.lower[where], high[where])
            result = self._relu_of_unknown_sign(scored.take(where), limits, where, result)
        return replace(result, lower=np.maximum(a.lower, 0), upper=high)

    def _relu_of_unknown_sign(
        self,
        rows: Expression,
        limits: Interval,
        where: Ints,
        result: Expression,
    ) -> Expression:
        """Add the ReLUs of the rows ``where`` to the result."""
        low, high = limits
        count = len(where)
        self.note_bound(np.maximum(-low, high))
        h, size = self.measured(np.zeros(count), high, where=where, of=result.rows)
        v = self.variables(
            count, 0.0, 1.0, integer=not self.relax, kind="active", where=where, of=result.rows
        )
        zero = Expression.of(np.zeros(count))
        # h >= a, h <= a - (1 - v) L and h <= v U.
        activation = (h, size)
        minus_low_v = (v, -low)
        minus_high_v = (v, -high)
        self.rows(rows, -1.0, [activation], lower=rows.constant)
        self.rows(rows, -1.0, [activation, minus_low_v], upper=rows.constant - low)
        self.rows(zero, 1.0, [activation, minus_high_v], upper=0.0)

        def step(values: Floats) -> None:
            pre_activation = rows.at(values)
            values[h] = np.maximum(pre_activation, 0) / size
            values[v] = pre_activation > 0

        self.steps.append(step)
        return plus(result, where, h, size, columns=self.builder.n_variables)

    def _scored(self, x: Expression, unit: Ints, high: Floats) -> Expression:
        """``x - (1 - s) high`` in the gated rows."""
        where = np.flatnonzero(unit >= 0)
        constant = x.constant.copy()
        constant[where] -= high[where]
        keep = self.keep[unit[where]]
        result = plus(x, where, keep, high[where], columns=self.builder.n_variables)
        return replace(result, constant=constant)

    def _pooled_interval(self, lower: Floats, upper: Floats) -> Interval:
        """Interval that contains 0: the bounds of the unpruned network do not hold for pruned channels in a pool."""
        return Interval(np.minimum(lower, 0), np.maximum(upper, 0))
