"""Solver-neutral mixed-integer linear program, and a builder that assembles one from blocks of arrays.

::

    minimise    objective @ v + offset
    subject to  row_lower <= matrix @ v <= row_upper,  lower <= v <= upper,  v[integer] integer

Formulations stay purely linear (big-M, tangent cuts, products of binaries linearised), so that every backend takes
them as they are. This module does not depend on a solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array, vstack

from onnx_oamip.core.records import Bools, Floats, Ints

INFINITY = float("inf")


@dataclass(frozen=True, eq=False)
class Rows:
    """A block of constraints ``lower <= matrix @ v <= upper``; an infinite side is absent.

    Attributes:
        matrix: Coefficients (rows, variables).
        lower: Lower side of each row (rows,).
        upper: Upper side of each row (rows,).

    Raises:
        ValueError: The arrays do not fit together.
    """

    matrix: csr_array
    lower: Floats
    upper: Floats

    def __post_init__(self) -> None:
        count = self.matrix.shape[0]
        for name, side in (("row_lower", self.lower), ("row_upper", self.upper)):
            _expect(
                side.shape == (count,),
                f"{name} has shape {side.shape}, expected ({count},)",
            )
        _expect(
            bool(np.isfinite(self.matrix.data).all()),
            "the matrix holds a coefficient that is not finite",
        )
        _check_sides("row", self.lower, self.upper)

    @property
    def count(self) -> int:
        """Number of rows."""
        return int(self.matrix.shape[0])


@dataclass(frozen=True, eq=False)
class Program:
    """Minimise ``objective @ v + offset`` over n variables v and m rows.

    Attributes:
        objective: Cost of each variable (n,).
        lower: Lower bound of each variable (n,), may be infinite.
        upper: Upper bound of each variable (n,), may be infinite.
        integer: Boolean per variable (n,), true for integer variables.
        matrix: Coefficients of the rows (m, n).
        row_lower: Lower side of each row (m,), may be infinite.
        row_upper: Upper side of each row (m,), may be infinite.
        offset: Constant of the objective.
        start: First point for a backend (n,), NaN for variables without a proposal.

    Raises:
        ValueError: The arrays do not fit together; the message names the first offender.
    """

    objective: Floats
    lower: Floats
    upper: Floats
    integer: Bools
    matrix: csr_array
    row_lower: Floats
    row_upper: Floats
    offset: float = 0.0
    start: Floats | None = None

    def __post_init__(self) -> None:
        n = len(self.objective)
        for name in ("objective", "lower", "upper", "integer", "start"):
            value = getattr(self, name)
            _expect(
                value is None or value.shape == (n,),
                f"{name} has shape {np.shape(value)}, expected ({n},)",
            )
        _expect(
            self.integer.dtype == np.bool_, f"integer has dtype {self.integer.dtype}, expected bool"
        )
        _expect(
            self.matrix.shape[1] == n,
            f"the matrix has {self.matrix.shape[1]} columns for {n} variables",
        )
        not_finite = ~np.isfinite(self.objective)
        if not_finite.any():
            raise ValueError(f"objective[{_first(not_finite)}] is not finite.")
        _expect(bool(np.isfinite(self.offset)), f"the offset is {self.offset}")
        _check_sides("variable", self.lower, self.upper)
        Rows(self.matrix, self.row_lower, self.row_upper)

    @property
    def n_variables(self) -> int:
        """Number of variables."""
        return len(self.objective)

    @property
    def n_rows(self) -> int:
        """Number of constraints."""
        return int(self.matrix.shape[0])

    def with_rows(self, rows: Rows) -> Program:
        """Append constraints.

        Args:
            rows: Constraints over the same variables.

        Returns:
            A program with the given rows behind the present ones.
        """
        return replace(
            self,
            matrix=csr_array(vstack([self.matrix, rows.matrix], format="csr")),
            row_lower=np.concatenate([self.row_lower, rows.lower]),
            row_upper=np.concatenate([self.row_upper, rows.upper]),
        )

    def value(self, values: Floats) -> float:
        """Evaluate the objective.

        Args:
            values: A point (n,).

        Returns:
            Objective at the point.
        """
        return float(self.objective @ values) + self.offset

    def violation(self, values: Floats) -> float:
        """Measure the infeasibility of a point.

        Args:
            values: A point (n,).

        Returns:
            The largest amount by which the point violates a bound, a row or integrality; 0 for a feasible point.
        """
        activity = self.matrix @ values
        integers = values[self.integer]
        amounts = (
            self.lower - values,
            values - self.upper,
            self.row_lower - activity,
            activity - self.row_upper,
            np.abs(integers - np.round(integers)),
        )
        return max(0.0, *(float(amount.max(initial=0.0)) for amount in amounts))


class _VariableBlock(NamedTuple):
    """Bounds, cost, kind and first point of variables that were added together, flat."""

    lower: Floats
    upper: Floats
    objective: Floats
    integer: Bools
    start: Floats


class _RowBlock(NamedTuple):
    """Entries and sides of rows that were added together."""

    row: Ints
    column: Ints
    value: Floats
    lower: Floats
    upper: Floats


class Builder:
    """Assembles a Program block by block. Every argument broadcasts, so that a block is a few array operations."""

    def __init__(self) -> None:
        self.offset = 0.0
        self._variables: list[_VariableBlock] = []
        self._rows: list[_RowBlock] = []
        self._n = 0
        self._m = 0

    def variables(
        self,
        shape: int | tuple[int, ...],
        lower: npt.ArrayLike = 0.0,
        upper: npt.ArrayLike = INFINITY,
        *,
        objective: npt.ArrayLike = 0.0,
        integer: npt.ArrayLike = False,
        start: npt.ArrayLike = np.nan,
    ) -> Ints:
        """Add an array of variables.

        Args:
            shape: Shape of the array.
            lower: Lower bounds.
            upper: Upper bounds.
            objective: Costs.
            integer: True for integer variables.
            start: Values of the first point, NaN for none.

        Returns:
            Indices of the variables, in the given shape.

        Raises:
            ValueError: An argument does not broadcast to the shape.
        """
        size = (shape,) if isinstance(shape, int) else shape
        index = self._n + np.arange(int(np.prod(size)), dtype=np.int64).reshape(size)
        block = _VariableBlock(
            lower=_spread(lower, size, "lower"),
            upper=_spread(upper, size, "upper"),
            objective=_spread(objective, size, "objective"),
            integer=np.broadcast_to(np.asarray(integer, bool), size).ravel(),
            start=_spread(start, size, "start"),
        )
        self._variables.append(block)
        self._n += index.size
        return index

    def rows(
        self,
        count: int,
        entries: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike],
        lower: npt.ArrayLike = -INFINITY,
        upper: npt.ArrayLike = INFINITY,
    ) -> Ints:
        """Add constraints.

        Args:
            count: Number of constraints.
            entries: Row (from 0 within the block), column and coefficient of each entry. The arrays broadcast against
                each other; entries at the same position are summed.
            lower: Lower sides.
            upper: Upper sides.

        Returns:
            Indices of the rows (count,).

        Raises:
            ValueError: An entry is outside the block, or a side does not broadcast to it.
        """
        row, column, value = np.broadcast_arrays(*(np.asarray(e) for e in entries))
        inside = row.size == 0 or (row.min() >= 0 and row.max() < count)
        _expect(bool(inside), f"a block of {count} rows has an entry outside rows 0 to {count - 1}")
        block = _RowBlock(
            row=self._m + row.ravel().astype(np.int64),
            column=column.ravel().astype(np.int64),
            value=value.ravel().astype(np.float64),
            lower=_spread(lower, (count,), "row_lower"),
            upper=_spread(upper, (count,), "row_upper"),
        )
        self._rows.append(block)
        index = self._m + np.arange(count, dtype=np.int64)
        self._m += count
        return index

    @property
    def n_variables(self) -> int:
        """Number of variables added so far."""
        return self._n

    def build(self) -> Program:
        """Build the program.

        Returns:
            Program of all blocks, in the order in which they were added.

        Raises:
            ValueError: A row has an entry of a variable that was never added.
        """
        row = _joined([block.row for block in self._rows], np.int64)
        column = _joined([block.column for block in self._rows], np.int64)
        value = _joined([block.value for block in self._rows], np.float64)
        outside = (column < 0) | (column >= self._n)
        if outside.any():
            raise ValueError(
                f"row {row[_first(outside)]} names a variable that is not one of the {self._n}."
            )
        start = _joined([block.start for block in self._variables], np.float64)
        matrix = coo_array((value, (row, column)), shape=(self._m, self._n))
        return Program(
            objective=_joined([block.objective for block in self._variables], np.float64),
            lower=_joined([block.lower for block in self._variables], np.float64),
            upper=_joined([block.upper for block in self._variables], np.float64),
            integer=_joined([block.integer for block in self._variables], np.bool_),
            matrix=csr_array(matrix),
            row_lower=_joined([block.lower for block in self._rows], np.float64),
            row_upper=_joined([block.upper for block in self._rows], np.float64),
            offset=self.offset,
            start=None if np.isnan(start).all() else start,
        )


def _spread(value: npt.ArrayLike, shape: tuple[int, ...], name: str) -> Floats:
    """The value broadcast to a shape, flat."""
    try:
        return np.broadcast_to(np.asarray(value, np.float64), shape).ravel()
    except ValueError as error:
        raise ValueError(
            f"{name} has shape {np.shape(value)}, which does not spread over {shape}."
        ) from error


def _joined(blocks: Sequence[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Blocks behind each other, as an empty array of the type if there are none."""
    if blocks:
        return np.concatenate(blocks)
    return np.zeros(0, dtype)


def _check_sides(kind: str, lower: Floats, upper: Floats) -> None:
    # Written so that NaN counts as wrong.
    wrong = ~(lower <= upper) | (lower == INFINITY) | (upper == -INFINITY)
    if wrong.any():
        i = _first(wrong)
        raise ValueError(
            f"{kind} {i} has lower {lower[i]} and upper {upper[i]}, expected lower <= upper, neither NaN."
        )


def _first(mask: Bools) -> int:
    """Index of the first true entry."""
    return int(np.argmax(mask))


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"{message}.")
