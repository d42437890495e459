"""Perspective relaxation of the energy that the refit of one linear consumer explains.

With A the covariance of the inputs plus the ridge and B the covariance of the outputs with the inputs, a refit explains
``max_V 2 <B, V> - tr(V A V')`` of the outputs' energy, where V has columns of kept units only. Between sets, a diagonal
D with ``A - D`` semidefinite takes the perspective form of subset selection: ``sum_j D_j |V_j|^2 / s_j`` in place of
``sum_j D_j |V_j|^2``. Every such D gives the same energy of sets; the larger it is, the tighter is the relaxation.

B enters by ``B'B`` alone, so rows T with ``T'T = B'B`` explain as much. The rows are divided among pieces, each with a
diagonal of its own: that is tighter than one diagonal for all, most of all if T is the symmetric root of ``B'B`` in the
metric of A, whose rows lie near one unit each.

Sources: Bertsimas and Van Parys, "Sparse high-dimensional regression", Annals of Statistics 48, 2020; Dong, Chen and
Linderoth, "Regularization vs. relaxation: a conic optimization perspective of statistical variable selection", 2015.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.distance import squareform

from onnx_oamip.core.records import Bools, Floats, Ints
from onnx_oamip.programs.diagonal_split import MAX_SIZE, separable

ABSENT = 1e-9
"""Keep variables below this count as 0."""
RIDGE_SHARE = 0.9
"""Share of the ridge that every diagonal contains. The rest keeps what is split definite."""
SPLIT_ACCURACY = 1e-2
"""Share of the largest diagonal that a search may miss."""
MIN_WORTH = 1e-4
"""Least worth of a column in a search, relative to the largest one."""
TINY = 1e-300
"""Replaces divisors that are 0."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Relaxed energy at some keep variables.

    Attributes:
        explained: Energy that the refit explains.
        slope: Derivative of the energy by the share of each column (d,).
        worth: ``sum_p D_pj |V_pj|^2`` of each column (d,).
        energy: ``|V_pj|^2`` of each piece and column (pieces, d).
    """

    explained: float
    slope: Floats
    worth: Floats
    energy: Floats


@dataclass(frozen=True, eq=False)
class Perspective:
    """Relaxation for the sets that contain some units (the kept ones) and no others than some (the free ones).

    Attributes:
        matrix: A of the columns of the undecided units, after all columns that are always present were swept out
            (d, d).
        rows: T (rows, d).
        piece: Piece of each row (rows,).
        diagonals: D of each piece (pieces, d).
        unit: Unit of each column (d,).
        label: Piece of the row that lies near each column (d,); all 0 with one piece.
        constant: Energy that the columns that are always present explain.
        ridge: Ridge of the refit.
    """

    matrix: Floats
    rows: Floats
    piece: Ints
    diagonals: Floats
    unit: Ints
    label: Ints
    constant: float
    ridge: float

    @property
    def flops(self) -> float:
        """Approximate floating-point operations of one evaluation."""
        pieces, d = self.diagonals.shape
        factor = d**3 / 3 if pieces == 1 else pieces * d**3 * 2 / 3
        return float(factor + 4 * len(self.rows) * d**2)

    def evaluate(self, keep: Floats) -> Evaluation:
        """Evaluate the relaxed energy: V_p is ``T_p S (S (A - D_p) S + D_p)^-1 S`` with S the root of the shares.

        Args:
            keep: Keep variables in [0, 1] (units,).

        Returns:
            Energy and what its derivatives need.
        """
        share = keep[self.unit]
        present = np.flatnonzero(share > ABSENT)
        stacked = self.stacked
        fitted = np.zeros_like(stacked)
        explained = self.constant
        if len(present):
            root = np.sqrt(share[present])
            common = self.matrix[np.ix_(present, present)] * np.outer(root, root)
            extra = self.diagonals[:, present] * (1 - share[present])
            solved = _solve(common, extra, stacked[:, :, present] * root)
            fitted[:, :, present] = solved * root
            explained += float(np.vdot(stacked, fitted))
        # The slopes count further energy that each column, present or not, can explain.
        flat = fitted.reshape(math.prod(fitted.shape[:2]), len(share))
        predicted = (flat @ self.matrix).reshape(fitted.shape)
        residual = stacked - predicted + fitted * self.diagonals[:, None]
        energy = np.square(fitted).sum(axis=1)
        slope = (np.square(residual).sum(axis=1) / self.diagonals).sum(axis=0)
        return Evaluation(explained, slope, (self.diagonals * energy).sum(axis=0), energy)

    def between(self, free: Bools, kept: Bools) -> Perspective:
        """Restrict the relaxation to fewer sets.

        Args:
            free: Units that may be kept (units,).
            kept: Units that are kept, a subset of the free ones (units,).

        Returns:
            The same relaxation, with the columns of kept units swept out and those of removed ones left out.
        """
        inside = np.flatnonzero(kept[self.unit])
        rest = np.flatnonzero((free & ~kept)[self.unit])
        if len(rest) == len(self.unit):
            return self
        matrix = self.matrix[np.ix_(rest, rest)]
        rows = self.rows[:, rest]
        constant = self.constant
        if len(inside):
            factor = cho_factor(self.matrix[np.ix_(inside, inside)], check_finite=False)
            between = self.matrix[np.ix_(inside, rest)]
            solved = np.asarray(cho_solve(factor, between, check_finite=False))
            explained = np.asarray(cho_solve(factor, self.rows[:, inside].T, check_finite=False))
            matrix = matrix - between.T @ solved
            rows = rows - self.rows[:, inside] @ solved
            constant += float(np.vdot(self.rows[:, inside].T, explained))
        if len(rows) > len(rest) > 0:
            rows = np.asarray(np.linalg.qr(rows, mode="r"))  # as few rows as columns say the same
        restricted = replace(
            self,
            matrix=matrix,
            rows=rows,
            piece=np.zeros(len(rows), np.int64),
            diagonals=self.diagonals[:, rest],
            unit=self.unit[rest],
            label=self.label[rest],
            constant=constant,
        )
        return restricted if len(self.diagonals) == 1 or not len(rest) else restricted.localised()

    def localised(self) -> Perspective:
        """Replace the rows by those that lie near one column each.

        Returns:
            The same relaxation, with every row in the piece of its column.
        """
        used, label = np.unique(self.label, return_inverse=True)
        rows = _symmetric_root(self.matrix, self.rows)
        diagonals = self.diagonals[used]
        return replace(self, rows=rows, piece=label, label=label, diagonals=diagonals)

    def divided(self, pieces: int) -> Perspective:
        """Divide the rows among pieces, rows that lie near the same units together.

        Args:
            pieces: Largest number of pieces.

        Returns:
            The relaxation with localised rows, and for every piece the diagonal of the only piece so far.
        """
        columns, index = np.unique(self.unit, return_inverse=True)
        if min(pieces, len(columns)) < 2 or len(self.unit) > MAX_SIZE:
            return self  # the diagonals of large matrices are all proportional to the matrix's own
        rows = _symmetric_root(self.matrix, self.rows)
        label = _clusters(rows, index, len(columns), pieces)[index]
        diagonals = np.repeat(self.diagonals, int(label.max()) + 1, axis=0)
        return replace(self, rows=rows, piece=label, label=label, diagonals=diagonals)

    def enlarged(self, keep: Floats, step: float) -> Perspective:
        """Move every diagonal by a share of the way to the one that is best at some keep variables.

        The optimum over the keep variables is concave in D, with the derivative ``|V_j|^2 (1 / s_j - 1)``: these are
        steps of the method of Frank and Wolfe.

        Args:
            keep: Keep variables in [0, 1] (units,).
            step: Share of the way.

        Returns:
            The relaxation with larger diagonals.
        """
        share = np.maximum(keep[self.unit], ABSENT)
        worth = self.evaluate(keep).energy * (1 / share - 1)
        fixed = RIDGE_SHARE * self.ridge
        rest = self.matrix - fixed * np.eye(len(self.matrix))
        diagonals = self.diagonals.copy()
        for diagonal, gain in zip(diagonals, worth, strict=True):
            least = MIN_WORTH * max(float(gain.max(initial=0.0)), TINY)
            best = fixed + separable(rest, np.maximum(gain, least), accuracy=SPLIT_ACCURACY)
            diagonal += step * (best - diagonal)
        return replace(self, diagonals=diagonals)

    @cached_property
    def stacked(self) -> Floats:
        """Rows by piece (pieces, most rows of a piece, d), filled up with zeros."""
        pieces, d = self.diagonals.shape
        counts = np.bincount(self.piece, minlength=pieces)
        order = np.argsort(self.piece, kind="stable")
        starts = np.cumsum(counts) - counts
        place = np.arange(len(order)) - starts[self.piece[order]]
        stacked = np.zeros((pieces, int(counts.max(initial=0)), d))
        stacked[self.piece[order], place] = self.rows[order]
        return stacked


def _solve(common: Floats, extra: Floats, rows: Floats) -> Floats:
    """Rows of each piece (pieces, r, n) times the inverse of ``common + diag(extra_p)``."""
    n = len(common)
    if len(extra) == 1 or not extra.any():  # one matrix serves all pieces
        matrix = common.copy()
        matrix[np.diag_indices(n)] += extra[0]
        factor = cho_factor(matrix, overwrite_a=True, check_finite=False)
        solved = cho_solve(factor, rows.reshape(-1, n).T, check_finite=False)
        return np.asarray(solved, np.float64).T.reshape(rows.shape)
    matrices = np.repeat(common[None], len(extra), axis=0)
    matrices[:, np.arange(n), np.arange(n)] += extra
    solved = np.asarray(np.linalg.solve(matrices, rows.transpose(0, 2, 1)), np.float64)
    return solved.transpose(0, 2, 1)


def _symmetric_root(matrix: Floats, rows: Floats) -> Floats:
    """Rows T (d, d) with ``T'T = rows' rows``, symmetric in the metric of the matrix, in units of its diagonal."""
    size = np.sqrt(np.diagonal(matrix))
    metric = _root(matrix / np.outer(size, size))
    whitened = np.linalg.solve(metric, (rows / size).T)
    return (_root(whitened @ whitened.T) @ metric) * size


def _root(matrix: Floats) -> Floats:
    """Symmetric root of a semidefinite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    root: Floats = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return root


def _clusters(
    rows: Floats,
    unit: Ints,
    units: int,
    count: int,
) -> Ints:
    """Cluster (units,) of every unit: at most ``count`` clusters of units whose rows lie near the same columns."""
    if count >= units:
        return np.arange(units)
    by_unit = np.zeros((units, rows.shape[1]))
    np.add.at(by_unit, unit, np.abs(rows))
    similarity = by_unit @ by_unit.T
    size = np.sqrt(np.maximum(np.diagonal(similarity), TINY))
    distance = np.clip(1 - similarity / np.outer(size, size), 0.0, 1.0)
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(distance, checks=False), "average")
    _, cluster = np.unique(fcluster(tree, count, "maxclust"), return_inverse=True)
    return np.asarray(cluster, np.int64)
