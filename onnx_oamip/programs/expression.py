"""Affine expressions over the variables of a program, one row per tensor element, samples stacked.

Whatever does not depend on a variable stays a constant and never becomes a variable. So inputs, everything before the
first keep variable, and everything that bounds decide add nothing to the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array, csr_array, vstack

from onnx_oamip.core.records import Bools, Floats, Ints


class Interval(NamedTuple):
    """Lower and upper bounds of the same shape."""

    lower: Floats
    upper: Floats


@dataclass(frozen=True, eq=False)
class Expression:
    """``matrix @ variables + constant``, with an interval [lower, upper] for each row.

    Attributes:
        matrix: Coefficients (rows, variables). It may have fewer columns than the program has variables by now.
        constant: Constant of each row (rows,). Rows are (sample, element) in C order.
        lower: Lower bound of each row (rows,).
        upper: Upper bound of each row (rows,).
    """

    matrix: csr_array
    constant: Floats
    lower: Floats
    upper: Floats

    @classmethod
    def of(cls, values: Floats, slack: float = 0.0) -> Expression:
        """Make an expression of constants.

        Args:
            values: Constants of any shape.
            slack: Half width of the interval around each constant.

        Returns:
            Expression with one row per constant.
        """
        flat = np.asarray(values, np.float64).reshape(-1)
        return cls(csr_array((len(flat), 0)), flat, flat - slack, flat + slack)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.constant)

    @property
    def fixed(self) -> Bools:
        """Boolean per row (rows,), true for rows without a variable."""
        result: Bools = np.diff(self.matrix.indptr) == 0
        return result

    def at(self, values: Floats) -> Floats:
        """Evaluate the rows at a point.

        Args:
            values: Variables of the program (variables,).

        Returns:
            Value of each row (rows,).
        """
        columns = self.matrix.shape[1]
        result: Floats = self.matrix @ values[:columns] + self.constant
        return result

    def take(self, rows: Ints) -> Expression:
        """Select rows.

        Args:
            rows: Indices, in the order of the result.

        Returns:
            Expression of the selected rows.
        """
        return Expression(
            matrix=self.matrix[rows],
            constant=self.constant[rows],
            lower=self.lower[rows],
            upper=self.upper[rows],
        )

    def within(self, lower: Floats, upper: Floats) -> Expression:
        """Intersect the interval with another one.

        Args:
            lower: Lower bound of each row (rows,).
            upper: Upper bound of each row (rows,).

        Returns:
            The same rows with the narrower interval.
        """
        low = np.maximum(self.lower, lower)
        high = np.minimum(self.upper, upper)
        # Rounding may leave two intervals of the same number without a common point: keep them ordered.
        return replace(self, lower=np.minimum(low, high), upper=np.maximum(low, high))

    def reach(self, lower: Floats, upper: Floats) -> Interval:
        """Compute the interval that follows from the bounds of the variables alone.

        Args:
            lower: Finite lower bounds of the variables (variables,).
            upper: Finite upper bounds of the variables (variables,).

        Returns:
            Interval of each row (rows,).
        """
        if not self.matrix.nnz:
            return Interval(self.constant, self.constant)
        columns = self.matrix.shape[1]
        low, high = bounds(self.matrix, lower[:columns, None], upper[:columns, None])
        return Interval(self.constant + low[:, 0], self.constant + high[:, 0])


def bounds(matrix: csr_array, lower: Floats, upper: Floats) -> Interval:
    """Compute the interval of ``matrix @ x`` for ``lower <= x <= upper`` by interval arithmetic.

    Args:
        matrix: Coefficients (rows, n).
        lower: Lower bounds (n, columns).
        upper: Upper bounds (n, columns).

    Returns:
        Interval (rows, columns), column by column.
    """
    positive = matrix.maximum(0)
    negative = matrix.minimum(0)
    return Interval(positive @ lower + negative @ upper, positive @ upper + negative @ lower)


def widen(matrix: csr_array, columns: int) -> csr_array:
    """Append empty columns to a matrix.

    Args:
        matrix: Matrix with at most ``columns`` columns.
        columns: Number of columns of the result.

    Returns:
        Matrix with the same entries; it shares their memory.
    """
    if matrix.shape[1] == columns:
        return matrix
    entries = (matrix.data, matrix.indices, matrix.indptr)
    return csr_array(entries, shape=(matrix.shape[0], columns))


def combine(
    parts: Sequence[tuple[csr_array, Expression]],
    offset: Floats,
    images: int,
) -> Expression:
    """Compute ``sum of map @ expression + offset`` for every sample.

    Args:
        parts: Pairs of a map of one sample (elements, inputs) and an expression of all samples.
        offset: Constant of one sample (elements,).
        images: Number of samples.

    Returns:
        Expression with ``images * elements`` rows.
    """
    columns = max((e.matrix.shape[1] for _, e in parts), default=0)
    size = len(offset)
    matrix = csr_array((images * size, columns))
    constant = np.tile(offset, (images, 1))
    lower = constant.copy()
    upper = constant.copy()
    for linear, expression in parts:
        constant += (linear @ _by_sample(expression.constant, images)).T
        low, high = bounds(
            linear, _by_sample(expression.lower, images), _by_sample(expression.upper, images)
        )
        lower = lower + low.T
        upper = upper + high.T
        if expression.matrix.nnz:
            matrix = matrix + _map_samples(linear, expression.matrix, images, columns)
    return Expression(
        matrix=csr_array(matrix),
        constant=constant.reshape(-1),
        lower=lower.reshape(-1),
        upper=upper.reshape(-1),
    )


def _by_sample(values: Floats, images: int) -> Floats:
    """Values of stacked samples as one column per sample (elements, samples)."""
    return values.reshape(images, -1).T


def _map_samples(
    linear: csr_array,
    matrix: csr_array,
    images: int,
    columns: int,
) -> csr_array:
    """Apply a map to the block of rows of every sample, by one product with the blocks laid side by side."""
    outputs, inputs = linear.shape
    entries = matrix.tocoo()
    image, element = np.divmod(entries.row.astype(np.int64), inputs)
    side_by_side = coo_array(
        (entries.data, (element, image * columns + entries.col)),
        shape=(inputs, images * columns),
    )
    result = (linear @ csr_array(side_by_side)).tocoo()
    image, column = np.divmod(result.col.astype(np.int64), columns)
    position = (image * outputs + result.row, column)
    return csr_array(coo_array((result.data, position), shape=(images * outputs, columns)))


def concatenate(parts: Sequence[Expression]) -> Expression:
    """Stack the rows of expressions.

    Args:
        parts: At least one expression over the same variables.

    Returns:
        All rows, in order.
    """
    if len(parts) == 1:
        return parts[0]
    columns = max(part.matrix.shape[1] for part in parts)
    matrix = vstack([widen(part.matrix, columns) for part in parts], format="csr")
    return Expression(
        matrix=csr_array(matrix),
        constant=np.concatenate([part.constant for part in parts]),
        lower=np.concatenate([part.lower for part in parts]),
        upper=np.concatenate([part.upper for part in parts]),
    )


def only(expression: Expression, rows: Bools) -> Expression:
    """Replace all other rows by zero.

    Args:
        expression: Expression to mask.
        rows: Boolean per row (rows,), true for rows to keep.

    Returns:
        Expression with the same number of rows.
    """
    mask = rows.astype(np.float64)
    matrix = csr_array(expression.matrix.multiply(mask[:, None]))
    matrix.eliminate_zeros()
    return Expression(
        matrix=matrix,
        constant=np.where(rows, expression.constant, 0.0),
        lower=np.where(rows, expression.lower, 0.0),
        upper=np.where(rows, expression.upper, 0.0),
    )


def plus(
    expression: Expression,
    rows: Ints,
    variables: Ints,
    weights: Floats | float,
    *,
    columns: int,
) -> Expression:
    """Add ``weights * variables`` to some rows. The interval is left to the caller.

    Args:
        expression: Expression to add to.
        rows: Rows to add to (n,).
        variables: Index of the variable to add to each row (n,).
        weights: Coefficient of each variable (n,), or one for all.
        columns: Number of variables of the program.

    Returns:
        Expression with the interval of the given one.
    """
    values = np.broadcast_to(np.asarray(weights, np.float64), rows.shape)
    added = coo_array((values, (rows, variables)), shape=(expression.rows, columns))
    matrix = csr_array(widen(expression.matrix, columns) + csr_array(added))
    return replace(expression, matrix=matrix)
