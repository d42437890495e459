"""A solver-neutral mixed-integer linear program, and a builder that assembles one from whole blocks of arrays.

::

    minimise    objective @ v + offset
    subject to  row_lower <= matrix @ v <= row_upper,  lower <= v <= upper,  v[integer] whole

Formulations stay purely linear (big-M, tangent cuts, products of binaries linearised), so that every backend takes
them as they are. Nothing here knows a solver.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array, vstack

from onnx_oamip.core.records import Bools, Floats, Ints

INFINITY = float("inf")


@dataclass(frozen=True, eq=False)
class Rows:
    """A block of constraints ``lower <= matrix @ v <= upper``; an infinite side is absent."""

    matrix: csr_array
    lower: Floats
    upper: Floats

    def __post_init__(self) -> None:
        count = self.matrix.shape[0]
        _expect(
            self.lower.shape == (count,),
            f"row_lower has shape {self.lower.shape}, expected ({count},)",
        )
        _expect(
            self.upper.shape == (count,),
            f"row_upper has shape {self.upper.shape}, expected ({count},)",
        )
        _expect(
            bool(np.isfinite(self.matrix.data).all()),
            "the matrix holds a coefficient that is not finite",
        )
        _sides("row", self.lower, self.upper)

    @property
    def count(self) -> int:
        """Number of rows."""
        return int(self.matrix.shape[0])


@dataclass(frozen=True, eq=False)
class Program:
    """Minimise ``objective @ v + offset`` over n variables v and m rows.

    ``lower``/``upper`` may be infinite; ``start`` is a first guess a backend may use, NaN where nothing is proposed.
    Raises ValueError, naming the first offender, for arrays that do not fit together.
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
        wild = ~np.isfinite(self.objective)
        if wild.any():
            raise ValueError(f"objective[{_first(wild)}] is not finite.")
        _expect(bool(np.isfinite(self.offset)), f"the offset is {self.offset}")
        _sides("variable", self.lower, self.upper)
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
        """This program with more constraints."""
        return replace(
            self,
            matrix=csr_array(vstack([self.matrix, rows.matrix], format="csr")),
            row_lower=np.concatenate([self.row_lower, rows.lower]),
            row_upper=np.concatenate([self.row_upper, rows.upper]),
        )

    def value(self, values: Floats) -> float:
        """The objective at a point."""
        return float(self.objective @ values) + self.offset

    def violation(self, values: Floats) -> float:
        """The largest amount by which a point leaves a bound, a row or integrality; 0 for a feasible one."""
        held = self.matrix @ values
        whole = values[self.integer]
        parts = (
            self.lower - values,
            values - self.upper,
            self.row_lower - held,
            held - self.row_upper,
            np.abs(whole - np.round(whole)),
        )
        return max(0.0, *(float(p.max(initial=0.0)) for p in parts))


class Builder:
    """Assembles a Program block by block; every argument broadcasts, so a block is a few array operations."""

    def __init__(self) -> None:
        self.offset = 0.0
        self._variables: list[tuple[Floats, Floats, Floats, Bools, Floats]] = []
        self._n = 0
        self._entries: list[tuple[Ints, Ints, Floats]] = []
        self._sides: list[tuple[Floats, Floats]] = []
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
        """Add an array of variables; returns their indices in that shape. ``start`` NaN proposes nothing."""
        size = (shape,) if isinstance(shape, int) else shape
        index = self._n + np.arange(int(np.prod(size)), dtype=np.int64).reshape(size)
        self._variables.append(
            (
                _spread(lower, size, "lower"),
                _spread(upper, size, "upper"),
                _spread(objective, size, "objective"),
                np.broadcast_to(np.asarray(integer, bool), size).ravel(),
                _spread(start, size, "start"),
            )
        )
        self._n += index.size
        return index

    def rows(
        self,
        count: int,
        entries: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike],
        lower: npt.ArrayLike = -INFINITY,
        upper: npt.ArrayLike = INFINITY,
    ) -> Ints:
        """Add ``count`` constraints with the given (row, variable, coefficient) entries; returns the rows' indices.

        Rows count from 0 within the block. The three arrays broadcast against each other; entries that meet in one
        place are summed.
        """
        row, column, value = np.broadcast_arrays(*(np.asarray(e) for e in entries))
        inside = row.size == 0 or (row.min() >= 0 and row.max() < count)
        _expect(bool(inside), f"a block of {count} rows has an entry outside rows 0 to {count - 1}")
        self._entries.append(
            (
                self._m + row.ravel().astype(np.int64),
                column.ravel().astype(np.int64),
                value.ravel().astype(np.float64),
            )
        )
        self._sides.append(
            (_spread(lower, (count,), "row_lower"), _spread(upper, (count,), "row_upper"))
        )
        index = self._m + np.arange(count, dtype=np.int64)
        self._m += count
        return index

    @property
    def n_variables(self) -> int:
        """Variables added so far."""
        return self._n

    def build(self) -> Program:
        """The program; raises ValueError for a row that names a variable that was never added."""
        row, column, value = (_joined([e[i] for e in self._entries]) for i in range(3))
        low, high, objective, integer, start = (
            _joined([v[i] for v in self._variables]) for i in range(5)
        )
        outside = (column < 0) | (column >= self._n)
        if outside.any():
            raise ValueError(
                f"row {row[_first(outside)]:.0f} names a variable that is not one of the {self._n}."
            )
        place = (row.astype(np.int64), column.astype(np.int64))
        return Program(
            objective=objective,
            lower=low,
            upper=high,
            integer=integer.astype(bool),
            matrix=csr_array(coo_array((value, place), shape=(self._m, self._n))),
            row_lower=_joined([s[0] for s in self._sides]),
            row_upper=_joined([s[1] for s in self._sides]),
            offset=self.offset,
            start=None if np.isnan(start).all() else start,
        )


def _spread(value: npt.ArrayLike, shape: tuple[int, ...], name: str) -> Floats:
    try:
        return np.broadcast_to(np.asarray(value, np.float64), shape).ravel()
    except ValueError as error:
        raise ValueError(
            f"{name} has shape {np.shape(value)}, which does not spread over {shape}."
        ) from error


def _joined(parts: list[Any]) -> Any:
    return np.concatenate(parts) if parts else np.zeros(0)


def _sides(what: str, lower: Floats, upper: Floats) -> None:
    wrong = ~(lower <= upper) | (lower == INFINITY) | (upper == -INFINITY)
    if wrong.any():
        i = _first(wrong)
        raise ValueError(
            f"{what} {i} has lower {lower[i]} and upper {upper[i]}, expected lower <= upper, neither NaN."
        )


def _first(mask: Bools) -> int:
    return int(np.argmax(mask))


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(f"{message}.")
