"""Affine expressions over a program's variables, one row a tensor element, images stacked.

Whatever does not depend on a variable is a constant here and never becomes one; so inputs, everything before the first
keep variable, and all that bounds decide cost the program nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import coo_array, csr_array

from onnx_oamip.core.records import Bools, Floats, Ints


@dataclass(frozen=True, eq=False)
class Expression:
    """``matrix @ variables + constant``, with an interval [lower, upper] per row.

    Rows are (image, element) in C order. ``matrix`` may have fewer columns than the program has variables by now.
    """

    matrix: csr_array
    constant: Floats
    lower: Floats
    upper: Floats

    @classmethod
    def of(cls, values: Floats, slack: float = 0.0) -> Expression:
        """Constants; their interval reaches ``slack`` to both sides."""
        flat = np.asarray(values, np.float64).reshape(-1)
        return cls(csr_array((len(flat), 0)), flat, flat - slack, flat + slack)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.constant)

    @property
    def fixed(self) -> Bools:
        """Rows without a variable."""
        found: Bools = np.diff(self.matrix.indptr) == 0
        return found

    def at(self, values: Floats) -> Floats:
        """Values of the rows at a point (variables,)."""
        found: Floats = self.matrix @ values[: self.matrix.shape[1]] + self.constant
        return found

    def take(self, rows: Ints) -> Expression:
        """The rows at ``rows``, in that order."""
        return Expression(
            self.matrix[rows], self.constant[rows], self.lower[rows], self.upper[rows]
        )

    def within(self, lower: Floats, upper: Floats) -> Expression:
        """The same rows with a narrower interval. Rounding may let two intervals of one number miss each other."""
        low, high = np.maximum(self.lower, lower), np.minimum(self.upper, upper)
        return replace(self, lower=np.minimum(low, high), upper=np.maximum(low, high))

    def reach(self, lower: Floats, upper: Floats) -> tuple[Floats, Floats]:
        """The interval that the variables' bounds (finite) alone allow."""
        n = self.matrix.shape[1]
        if not self.matrix.nnz:
            return self.constant, self.constant
        low, high = bounds(self.matrix, lower[:n, None], upper[:n, None])
        return self.constant + low[:, 0], self.constant + high[:, 0]


def bounds(matrix: csr_array, lower: Floats, upper: Floats) -> tuple[Floats, Floats]:
    """Interval of ``matrix @ x`` for ``lower <= x <= upper``, column by column (interval arithmetic)."""
    positive, negative = matrix.maximum(0), matrix.minimum(0)
    return positive @ lower + negative @ upper, positive @ upper + negative @ lower


def widen(matrix: csr_array, columns: int) -> csr_array:
    """The same entries in a matrix with more columns."""
    if matrix.shape[1] == columns:
        return matrix
    return csr_array((matrix.data, matrix.indices, matrix.indptr), shape=(matrix.shape[0], columns))


def combine(
    parts: Sequence[tuple[csr_array, Expression]], offset: Floats, images: int
) -> Expression:
    """``sum of map @ expression + offset`` for every image; ``offset`` (elements of one image,)."""
    columns = max((e.matrix.shape[1] for _, e in parts), default=0)
    size = len(offset)
    matrix = csr_array((images * size, columns))
    constant, lower, upper = (np.tile(offset, (images, 1)) for _ in range(3))
    for linear, expression in parts:
        constant += (linear @ expression.constant.reshape(images, -1).T).T
        low, high = bounds(
            linear, expression.lower.reshape(images, -1).T, expression.upper.reshape(images, -1).T
        )
        lower, upper = lower + low.T, upper + high.T
        if expression.matrix.nnz:
            matrix = matrix + _everywhere(linear, expression.matrix, images, columns)
    return Expression(csr_array(matrix), constant.reshape(-1), lower.reshape(-1), upper.reshape(-1))


def _everywhere(linear: csr_array, matrix: csr_array, images: int, columns: int) -> csr_array:
    """``linear`` applied to the block of rows of every image, by laying the blocks side by side."""
    entries = matrix.tocoo()
    image, element = np.divmod(entries.row.astype(np.int64), linear.shape[1])
    wide = coo_array(
        (entries.data, (element, image * columns + entries.col)),
        shape=(linear.shape[1], images * columns),
    )
    result = (linear @ csr_array(wide)).tocoo()
    image, column = np.divmod(result.col.astype(np.int64), columns)
    place = (image * linear.shape[0] + result.row, column)
    return csr_array(coo_array((result.data, place), shape=(images * linear.shape[0], columns)))


def only(expression: Expression, rows: Bools) -> Expression:
    """The rows in ``rows``; zero in place of the others."""
    mask = rows.astype(np.float64)
    matrix = csr_array(expression.matrix.multiply(mask[:, None]))
    matrix.eliminate_zeros()
    parts = (
        np.where(rows, v, 0.0) for v in (expression.constant, expression.lower, expression.upper)
    )
    return Expression(matrix, *parts)


def plus(
    expression: Expression, rows: Ints, variables: Ints, weights: Floats | float, columns: int
) -> Expression:
    """``expression`` with ``weights * variables`` added at ``rows``; its interval is left to the caller."""
    values = np.broadcast_to(np.asarray(weights, np.float64), rows.shape)
    added = coo_array((values, (rows, variables)), shape=(expression.rows, columns))
    return replace(
        expression, matrix=csr_array(widen(expression.matrix, columns) + csr_array(added))
    )
