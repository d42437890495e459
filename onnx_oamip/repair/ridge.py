"""Ridge regression whose strength is chosen on held-out rows: the numbers behind ``refit``.

Per group of a linear node, with rows x (inputs), r (what the outputs still lack): ``minimise sum |r - D x - b|^2 +
strength |D|^2``. Sums are in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from onnx_oamip.core.records import Floats

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge strengths, relative to the mean diagonal of the Gram matrix, searched downhill from the middle."""

Solve = Callable[[int, float], Floats]
"""(number of leading rows to use, relative ridge) -> change of the weights (groups, inputs * taps, outputs)."""


def best(
    x: Floats, residual: Floats, split: int, solve: Solve | None, ridges: Sequence[float] = RIDGES
) -> tuple[Floats | None, Floats, float | None, tuple[float, float]]:
    """Change, bias shift, ridge and the held-out errors before and after, for the strength that does best held out.

    Rows from ``split`` on are held out. The candidates include no change at all and a change of the bias alone. The
    winner is solved again on all rows. ``ridges`` are searched downhill from the middle.
    """
    rows = x.shape[1]
    means = {n: (x[:, :n].mean(axis=1), residual[:, :n].mean(axis=1)) for n in (split, rows)}

    def error(change: Floats | None, shift: Floats) -> float:
        left = residual[:, split:] - shift[:, None]
        if change is not None:
            left -= x[:, split:] @ change
        return float(np.square(left).mean(axis=1).sum())

    def shift_of(change: Floats | None, count: int) -> Floats:
        inputs, outputs = means[count]
        moved: Floats = outputs if change is None else outputs - (inputs[:, None] @ change)[:, 0]
        return moved

    before = error(None, np.zeros_like(residual[:, 0]))
    best: tuple[float, float | None] = (error(None, shift_of(None, split)), None)
    if solve is not None:
        tried: dict[int, float] = {}

        def attempt(i: int) -> float:
            if i not in tried:
                change = solve(split, ridges[i])
                tried[i] = error(change, shift_of(change, split))
            return tried[i]

        at = len(ridges) // 2
        for step in (-1, 1):
            while 0 <= at + step < len(ridges) and attempt(at + step) < attempt(at):
                at += step
        best = min(best, (attempt(at), ridges[at]), key=lambda found: found[0])
    final = None if best[1] is None or solve is None else solve(rows, best[1])
    return final, shift_of(final, rows), best[1], (before, min(best[0], before))


def ridge_regression(x: Floats, residual: Floats, split: int) -> Solve:
    """Ridge regression of the residual on the centred data, per group.

    The Gram matrix of all rows is that of the leading ``split`` plus that of the rest: every row is multiplied once.
    With fewer rows than unknowns the dual form is solved, ``X' (X X' + ridge I)^-1 R``: the same solution.
    """
    if x.shape[1] < x.shape[2]:
        return _dual(x, residual)
    normal = normal_equations(x, residual, split)
    return lambda count, ridge: solve_ridge(*normal[count], ridge)


def normal_equations(x: Floats, residual: Floats, split: int) -> dict[int, tuple[Floats, Floats]]:
    """Centred Gram matrices (groups, d, d) and right sides (groups, d, outputs) of the leading ``split`` rows and of
    all, by their number."""
    _, rows, unknowns = x.shape
    near = x[:, :split].mean(
        axis=1, keepdims=True
    )  # of about the right place: no digits are lost in the sums
    gram = np.zeros((len(x), unknowns, unknowns))
    right = np.zeros((len(x), unknowns, residual.shape[2]))
    normal: dict[int, tuple[Floats, Floats]] = {}
    for first, last in ((0, split), (split, rows)):
        part = x[:, first:last] - near
        gram += part.transpose(0, 2, 1) @ part
        right += part.transpose(0, 2, 1) @ residual[:, first:last]
        mean = x[:, :last].mean(axis=1, keepdims=True) - near
        normal[last] = (
            gram - last * mean.transpose(0, 2, 1) @ mean,
            right - last * mean.transpose(0, 2, 1) @ residual[:, :last].mean(axis=1, keepdims=True),
        )

    return normal


def _dual(x: Floats, residual: Floats) -> Solve:
    made: dict[int, tuple[Floats, Floats, Floats]] = {}

    def solve(count: int, ridge: float) -> Floats:
        if count not in made:
            centred = x[:, :count] - x[:, :count].mean(axis=1, keepdims=True)
            target = residual[:, :count] - residual[:, :count].mean(axis=1, keepdims=True)
            turned = centred.transpose(0, 2, 1)
            made[count] = (centred @ turned, target, turned)
        gram, target, turned = made[count]
        # The strength is relative to the mean diagonal of X'X, in either form.
        return turned @ solve_ridge(gram, target, ridge * count / x.shape[2])

    return solve


def solve_ridge(gram: Floats, cross: Floats, ridge: float) -> Floats:
    """(G + ridge * mean diag(G) * I)^-1 C for stacks G (g, d, d), C (g, d, o). Dead inputs get a zero row."""
    size = gram.shape[-1]
    diagonal = np.einsum("gii->gi", gram)
    strength = (
        ridge * diagonal.mean(axis=1, keepdims=True) + 1e-12 * diagonal.max(initial=0.0) + 1e-300
    )
    loaded = gram + np.eye(size) * strength[:, :, None]
    if len(gram) == 1:
        return np.asarray(
            cho_solve(cho_factor(loaded[0], overwrite_a=True, check_finite=False), cross[0])
        )[None]
    return np.asarray(np.linalg.solve(loaded, cross))
