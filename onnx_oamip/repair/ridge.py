"""Ridge regression whose strength is chosen on held-out rows: the linear algebra of the refit.

Per group of a linear node, with inputs x and residual r (what the outputs still lack), on the same rows:

    minimise  sum_rows |r - D x - b|^2 + ridge |D|^2     over the change D of the weights and the shift b of the bias.

Sums are in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from onnx_oamip.core.cholesky import Cholesky
from onnx_oamip.core.records import Floats
from onnx_oamip.statistics.layer_problems import similar_scale

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge strengths, relative to the mean diagonal of the Gram matrix, searched downhill from the middle."""

ROUNDING = 16 * float(np.finfo(np.float64).eps)
"""Deviation from its mean, relative to it, up to which an input counts as constant."""
BLOCK = 4096
"""Rows that are centred and multiplied at a time, which bounds the memory of the products."""
CACHED_VALUES = 1 << 17
"""Inputs that are centred at a time where they are multiplied twice, few enough to stay in the cache meanwhile."""

Solve = Callable[[int, float], Floats]
"""(number of leading rows to use, relative ridge) -> change of the weights (groups, inputs * taps, outputs)."""
Wanted = Callable[[slice, Floats], Floats]
"""(rows, what a fit adds to their outputs) -> what the outputs are to be added instead, in an array that may change."""
Step = Callable[[Floats | None, Floats, Wanted], tuple[Floats, Floats]]
"""Changes of weights (groups, inputs * taps, outputs) and bias (groups, outputs) of a fit -> those of the next one."""


class RidgeFit(NamedTuple):
    """Result of a ridge regression.

    Attributes:
        change: Change of the weights (groups, inputs * taps, outputs); None if only the bias changes.
        shift: Change of the bias (groups, outputs).
        ridge: The chosen strength; None if only the bias changes.
        errors: Held-out errors before the fit and after it.
    """

    change: Floats | None
    shift: Floats
    ridge: float | None
    errors: tuple[float, float]


def choose_ridge(
    x: Floats,
    residual: Floats,
    split: int,
    solve: Solve | None,
    ridges: Sequence[float] = RIDGES,
) -> RidgeFit:
    """Fits with the ridge strength that has the smallest error on held-out rows.

    The candidates include a change of the bias alone. The winner is solved again on all rows.

    Args:
        x: Inputs (groups, rows, inputs * taps).
        residual: Difference to the wanted outputs (groups, rows, outputs).
        split: Number of leading rows to fit on while the strength is chosen; the others are held out.
        solve: Solver for the change of the weights; None to change only the bias.
        ridges: Candidate strengths in order, searched downhill from the middle.

    Returns:
        The fit. Its error after the fit is never reported as larger than that before it.
    """
    rows = x.shape[1]
    means = {n: (x[:, :n].mean(axis=1), residual[:, :n].mean(axis=1)) for n in (split, rows)}

    def error(change: Floats | None, shift: Floats) -> float:
        return remaining_error(x[:, split:], residual[:, split:], change, shift)

    def shift_of(change: Floats | None, count: int) -> Floats:
        """Best shift of the bias on the leading rows, for a change of the weights."""
        return best_shift(*means[count], change)

    no_shift = np.zeros_like(residual[:, 0])
    before = error(None, no_shift)
    after = error(None, shift_of(None, split))
    chosen: float | None = None
    if solve is not None:

        def held_out_error(ridge: float) -> float:
            change = solve(split, ridge)
            return error(change, shift_of(change, split))

        ridge, ridge_error = _downhill(ridges, held_out_error)
        if ridge_error < after:
            after = ridge_error
            chosen = ridge
    if chosen is None or solve is None:
        change = None
    else:
        change = solve(rows, chosen)
    return RidgeFit(change, shift_of(change, rows), chosen, (before, min(after, before)))


def remaining_error(
    x: Floats,
    residual: Floats,
    change: Floats | None,
    shift: Floats,
) -> float:
    """Measure what a fit leaves on rows that it has not seen.

    Args:
        x: Inputs (groups, rows, inputs * taps).
        residual: Difference to the wanted outputs (groups, rows, outputs).
        change: Change of the weights (groups, inputs * taps, outputs); None for none.
        shift: Change of the bias (groups, outputs).

    Returns:
        Mean square over the rows, summed over groups and outputs.
    """
    remaining = residual - shift[:, None]
    if change is not None:
        remaining -= x @ change
    return float(np.square(remaining).mean(axis=1).sum())


def best_shift(mean_input: Floats, mean_residual: Floats, change: Floats | None) -> Floats:
    """Find the change of the bias that fits best to a change of the weights.

    Args:
        mean_input: Means of the inputs (groups, inputs * taps).
        mean_residual: Means of the differences to the wanted outputs (groups, outputs).
        change: Change of the weights (groups, inputs * taps, outputs); None for none.

    Returns:
        The shift (groups, outputs).
    """
    if change is None:
        return mean_residual
    shift: Floats = mean_residual - (mean_input[:, None] @ change)[:, 0]
    return shift


def _downhill(ridges: Sequence[float], error_of: Callable[[float], float]) -> tuple[float, float]:
    """A local minimum of the error over the strengths, reached from the middle: (strength, error)."""
    errors: dict[int, float] = {}

    def error_at(i: int) -> float:
        if i not in errors:
            errors[i] = error_of(ridges[i])
        return errors[i]

    position = len(ridges) // 2
    for step in (-1, 1):
        while 0 <= position + step < len(ridges) and error_at(position + step) < error_at(position):
            position += step
    return ridges[position], error_at(position)


class Regression(ABC):
    """Ridge regression on centred inputs, per group; it solves for any residual with the same Gram matrix."""

    @abstractmethod
    def __call__(self, count: int, ridge: float) -> Floats:
        """Solves for the residual that the regression was prepared with.

        Args:
            count: Number of leading rows to use.
            ridge: Strength relative to the mean diagonal of the Gram matrix.

        Returns:
            Change of the weights (groups, unknowns, outputs).
        """

    @abstractmethod
    def factored(self, count: int, ridge: float) -> Step:
        """Factors the system, to fit to residuals that depend on the fit before.

        Args:
            count: Number of leading rows to use.
            ridge: Strength relative to the mean diagonal of the Gram matrix.

        Returns:
            Function of a fit, whose result is the next one.
        """


def ridge_regression(x: Floats, residual: Floats, split: int) -> Regression:
    """Prepares the ridge regression of a residual on centred inputs, per group.

    The Gram matrix of all rows is that of the leading rows plus that of the rest, so that every row is multiplied once.
    With fewer rows than unknowns the dual form, ``X' (X X' + ridge I)^-1 R``, gives the same solution from a smaller
    system.

    Args:
        x: Inputs (groups, rows, unknowns).
        residual: Difference to the wanted outputs (groups, rows, outputs).
        split: Number of leading rows for which the solver will be asked, besides all rows.

    Returns:
        The solver.
    """
    if x.shape[1] < x.shape[2]:
        return _Dual(x, residual)
    return _Primal(x, residual, split)


def blocks(count: int, first: int = 0, size: int | None = None) -> Iterator[slice]:
    """Divide rows into blocks.

    Args:
        count: Number behind the last row.
        first: Number of the first row.
        size: Most rows in a block; None for ``BLOCK``.

    Yields:
        Slices.
    """
    size = size or BLOCK
    for start in range(first, count, size):
        yield slice(start, min(start + size, count))


class _Primal(Regression):
    """Ridge regression by the normal equations."""

    def __init__(self, x: Floats, residual: Floats, split: int) -> None:
        self._x = x
        self._normal = normal_equations(x, residual, split)
        self._scale: Floats | None = None
        divisors = similar_scale(np.einsum("gii->gi", self._normal[split][0]))
        if divisors is not None:
            self._scale = column = divisors[:, :, None]
            self._normal = {
                count: (gram / column / divisors[:, None], cross / column)
                for count, (gram, cross) in self._normal.items()
            }

    def __call__(self, count: int, ridge: float) -> Floats:
        change = solve_ridge(*self._normal[count], ridge)
        return change if self._scale is None else change / self._scale

    def factored(self, count: int, ridge: float) -> Step:
        x = self._x
        gram, cross = self._normal[count]
        solve = factored_ridge(gram, ridge)
        mean = x[:, :count].mean(axis=1, keepdims=True)
        is_constant = np.einsum("gii->gi", gram) == 0
        scale = self._scale
        size = int(np.clip(CACHED_VALUES // max(len(x) * x.shape[2], 1), 128, BLOCK))

        def step(change: Floats | None, shift: Floats, wanted: Wanted) -> tuple[Floats, Floats]:
            # Single precision is enough for centred inputs, and halves the time; the sums over blocks are in float64.
            weights = np.zeros_like(cross) if change is None else change
            single = weights.astype(np.float32)
            offset = shift[:, None] + mean @ weights
            right = np.zeros_like(cross)
            total = np.zeros_like(shift)
            near_mean = offset
            for rows in blocks(count, size=size):
                part = np.empty(x[:, rows].shape, np.float32)
                np.subtract(x[:, rows], mean, out=part, casting="same_kind")
                target = wanted(rows, part @ single + offset)
                total += target.sum(axis=1)
                if not rows.start:
                    near_mean = target.mean(axis=1, keepdims=True)
                target -= near_mean
                right += part.transpose(0, 2, 1) @ target.astype(np.float32)
            right[is_constant] = 0
            found = solve(right) if scale is None else solve(right / scale) / scale
            return found, best_shift(mean[:, 0], total / count, found)

        return step


def normal_equations(
    x: Floats,
    residual: Floats,
    split: int,
) -> dict[int, tuple[Floats, Floats]]:
    """Normal equations of the leading rows and of all rows.

    Args:
        x: Inputs (groups, rows, d).
        residual: Difference to the wanted outputs (groups, rows, outputs).
        split: Number of leading rows.

    Returns:
        Centred Gram matrices (groups, d, d) and right sides (groups, d, outputs) by the number of rows.
    """
    _, rows, unknowns = x.shape
    # Subtracting an approximate mean first loses no digits in the sums; the exact mean is subtracted from the sums.
    near_mean = x[:, :split].mean(axis=1, keepdims=True)
    gram = np.zeros((len(x), unknowns, unknowns))
    right = np.zeros((len(x), unknowns, residual.shape[2]))
    normal: dict[int, tuple[Floats, Floats]] = {}
    for first, last in ((0, split), (split, rows)):
        for block in blocks(last, first):
            part = x[:, block] - near_mean
            transposed = part.transpose(0, 2, 1)
            gram += transposed @ part
            right += transposed @ residual[:, block]
        mean = x[:, :last].mean(axis=1, keepdims=True) - near_mean
        mean_residual = residual[:, :last].mean(axis=1, keepdims=True)
        scaled_mean = last * mean.transpose(0, 2, 1)
        centred, target = gram - scaled_mean @ mean, right - scaled_mean @ mean_residual
        _clear_constants(centred, target, last * np.square(ROUNDING * near_mean[:, 0]))
        normal[last] = (centred, target)
    return normal


def _clear_constants(gram: Floats, right: Floats, least: Floats) -> None:
    """Sets the equations of inputs that vary by no more than rounding to zero: their sums may have any sign.

    Args:
        gram: Centred Gram matrices (groups, d, d), changed in place.
        right: Right sides (groups, d, outputs), changed in place.
        least: Sums of squares (groups, d) that rounding alone leaves.
    """
    is_constant = np.einsum("gii->gi", gram) <= least
    gram[is_constant] = 0
    gram.transpose(0, 2, 1)[is_constant] = 0
    right[is_constant] = 0


class _Dual(Regression):
    """Ridge regression by the products of the rows."""

    def __init__(self, x: Floats, residual: Floats) -> None:
        # Subtracting a mean loses no digits in the products; that of the leading rows is subtracted from the products.
        mean = x.mean(axis=1, keepdims=True)
        centred = x - mean
        squares = np.einsum("grd,grd->gd", centred, centred)
        is_constant = squares <= x.shape[1] * np.square(ROUNDING * mean[:, 0])
        centred.transpose(0, 2, 1)[is_constant] = 0
        divisors = similar_scale(np.where(is_constant, 0.0, squares))
        if divisors is not None:
            centred /= divisors[:, None]
        self._x = x
        self._residual = residual
        self._centred = centred
        self._divisors = divisors
        self._products = centred @ centred.transpose(0, 2, 1)

    def __call__(self, count: int, ridge: float) -> Floats:
        return self._solver(count, ridge)(self._residual[:, :count])

    def factored(self, count: int, ridge: float) -> Step:
        solve = self._solver(count, ridge)
        x = self._x[:, :count]
        mean = x.mean(axis=1)

        def step(change: Floats | None, shift: Floats, wanted: Wanted) -> tuple[Floats, Floats]:
            fitted = np.broadcast_to(shift[:, None], self._residual[:, :count].shape)
            target = wanted(slice(0, count), fitted if change is None else x @ change + fitted)
            found = solve(target)
            return found, best_shift(mean, target.mean(axis=1), found)

        return step

    def _solver(self, count: int, ridge: float) -> Callable[[Floats], Floats]:
        """Function of the residual of the leading rows: change of the weights."""
        gram = _centred(_centred(self._products[:, :count, :count]).transpose(0, 2, 1))
        # The strength is relative to the mean diagonal of X'X, in either form.
        solve_gram = factored_ridge(gram, ridge * count / self._centred.shape[2])
        turned = self._centred[:, :count].transpose(0, 2, 1)

        def solve(residual: Floats) -> Floats:
            # Multipliers add up to zero, as targets do, so that the mean of the leading inputs does not count.
            change: Floats = turned @ _centred(solve_gram(_centred(residual)))
            if self._divisors is not None:
                change /= self._divisors[:, :, None]
            return change

        return solve


def _centred(values: Floats) -> Floats:
    """Values (groups, rows, columns) without the mean of the rows."""
    result: Floats = values - values.mean(axis=1, keepdims=True)
    return result


def solve_ridge(gram: Floats, cross: Floats, ridge: float) -> Floats:
    """Solves ``(G + ridge * mean(diag G) * I) X = C`` for a stack of systems.

    Args:
        gram: G (groups, d, d).
        cross: C (groups, d, outputs).
        ridge: Strength relative to the mean diagonal of G.

    Returns:
        X (groups, d, outputs). An input that is always zero gets a zero row.
    """
    return factored_ridge(gram, ridge)(cross)


def factored_ridge(gram: Floats, ridge: float) -> Callable[[Floats], Floats]:
    """Prepares the systems of :func:`solve_ridge`, to solve them for several right sides.

    Args:
        gram: G (groups, d, d).
        ridge: Strength relative to the mean diagonal of G.

    Returns:
        Function of C (groups, d, outputs), whose result is X.
    """
    size = gram.shape[-1]
    diagonal = np.einsum("gii->gi", gram)
    # The last two terms keep a group of dead inputs, and a stack of them, regular.
    strength = (
        ridge * diagonal.mean(axis=1, keepdims=True) + 1e-12 * diagonal.max(initial=0.0) + 1e-300
    )
    loaded = gram.copy()
    loaded[:, range(size), range(size)] += strength
    if len(gram) == 1:
        factor = Cholesky.of(loaded[0], overwrite=True)
        return lambda cross: factor.solve(cross[0])[None]
    return lambda cross: np.asarray(np.linalg.solve(loaded, cross))
