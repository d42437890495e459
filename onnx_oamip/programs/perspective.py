"""Perspective relaxation of the energy that the refit of one linear consumer explains.

With A the covariance of the inputs plus the ridge and B the covariance of the outputs with the inputs, a refit explains
``max_V 2 <B, V> - tr(V A V')`` of the outputs' energy, where V has columns of kept units only. Between sets, a diagonal
D with ``A - D`` semidefinite takes the perspective form of subset selection: ``sum_j D_j |V_j|^2 / s_j`` in place of
``sum_j D_j |V_j|^2``. Every such D gives the same energy of sets; the larger it is, the tighter is the relaxation.

Source: Bertsimas and Van Parys, "Sparse high-dimensional regression", Annals of Statistics 48, 2020.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_oamip.core.cholesky import Cholesky
from onnx_oamip.core.records import Bools, Floats, Ints
from onnx_oamip.programs.diagonal_split import separable

ABSENT = 1e-9
"""Keep variables below this count as 0."""
RIDGE_SHARE = 0.9
"""Share of the ridge that the diagonal contains. The rest keeps what is split definite."""
SPLIT_ACCURACY = 1e-2
"""Share of the largest diagonal that the search may miss."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Relaxed energy at some keep variables.

    Attributes:
        explained: Energy that the refit explains.
        slope: Derivative of the energy by the share of each column (d,).
        worth: ``D_j |V_j|^2`` of each column (d,).
    """

    explained: float
    slope: Floats
    worth: Floats


@dataclass(frozen=True, eq=False)
class Perspective:
    """Relaxation of one consumer.

    Attributes:
        matrix: A of the columns of units, after all other columns were swept out (d, d).
        rows: B of these columns (rows, d).
        diagonal: D (d,).
        unit: Unit of each column (d,).
        constant: Energy that the other columns explain.
    """

    matrix: Floats
    rows: Floats
    diagonal: Floats
    unit: Ints
    constant: float

    @property
    def flops(self) -> float:
        """Approximate floating-point operations of one evaluation."""
        d = len(self.unit)
        return float(d**3 / 3 + 4 * len(self.rows) * d**2)

    def evaluate(self, keep: Floats) -> Evaluation:
        """Evaluate the relaxed energy: V is ``B S (S (A - D) S + D)^-1 S`` with S the root of the shares.

        Args:
            keep: Keep variables in [0, 1] (units,).

        Returns:
            Energy and what its derivatives need.
        """
        share = keep[self.unit]
        present = np.flatnonzero(share > ABSENT)
        fitted = np.zeros_like(self.rows)
        explained = self.constant
        if len(present):
            root = np.sqrt(share[present])
            system = self.matrix[np.ix_(present, present)] * np.outer(root, root)
            system[np.diag_indices_from(system)] += self.diagonal[present] * (1 - share[present])
            sides = (self.rows[:, present] * root).T
            solved = Cholesky.of(system, overwrite=True).solve(sides)
            fitted[:, present] = solved.T * root
            explained += float(np.vdot(self.rows, fitted))
        # The slopes count further energy that each column, present or not, can explain.
        residual = self.rows - fitted @ self.matrix + fitted * self.diagonal
        slope = np.square(residual).sum(axis=0) / self.diagonal
        return Evaluation(explained, slope, self.diagonal * np.square(fitted).sum(axis=0))


def relaxed_energy(
    matrix: Floats,
    rows: Floats,
    unit: Ints,
    optional: Bools,
    ridge: float,
) -> Perspective:
    """Relax the energy of one consumer.

    Args:
        matrix: A of all columns (d, d).
        rows: B of all columns (outputs, d).
        unit: Unit of each column; without meaning for columns of no unit (d,).
        optional: Columns that belong to a unit (d,).
        ridge: Ridge of the refit.

    Returns:
        The relaxation, with a large diagonal.
    """
    always, rest = np.flatnonzero(~optional), np.flatnonzero(optional)
    left, sides, constant = matrix[np.ix_(rest, rest)], rows[:, rest], 0.0
    if len(always):
        factor = Cholesky.of(matrix[np.ix_(always, always)], overwrite=True)
        between = matrix[np.ix_(always, rest)]
        solved = factor.solve(between)
        explained = factor.solve(rows[:, always].T)
        left = left - between.T @ solved
        sides = sides - rows[:, always] @ solved
        constant = float(np.vdot(rows[:, always].T, explained))
    if len(sides) > len(rest) > 0:
        sides = np.asarray(np.linalg.qr(sides, mode="r"))  # as few rows as columns say the same
    fixed = RIDGE_SHARE * ridge
    split = separable(left - fixed * np.eye(len(rest)), accuracy=SPLIT_ACCURACY)
    return Perspective(left, sides, fixed + split, unit[rest], constant)
