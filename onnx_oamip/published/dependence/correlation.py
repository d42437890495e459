"""Partial correlation of a layer's children with its parents: the baseline that estimators of dependence must beat.

``|corr(child, parent | all other parents)|`` from a ridged correlation matrix. For Gaussian variables it carries all
that conditional mutual information does, ``I = -log(1 - rho^2) / 2``, at the cost of one inverse per layer.
"""

from __future__ import annotations

import numpy as np

from onnx_oamip.core.records import (
    Array,
    Coupling,
    Floats,
    Model,
    Scores,
    Statistics,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.published.dependence.layer_pairs import pairs, standardise
from onnx_oamip.published.dependence.propagation import propagate
from onnx_oamip.published.dependence.requests import POOLED_ACTIVATIONS
from onnx_oamip.statistics.layer_problems import shrinkage

ONE_PARENT_RIDGE = 1e-3
"""Ridge of a layer with one parent, for which there is no shrinkage."""
LEAST_RESIDUAL = 1e-12
"""Least residual variance of a child."""


def score(
    model: Model,
    coupling: Coupling,
    statistics: Statistics | None,
    settings: Settings,
) -> Scores:
    """Score units by partial correlations, propagated as SNACS does.

    Args:
        model: The model.
        coupling: Its units and consumers.
        statistics: Moments and pooled activations.
        settings: Not read.

    Returns:
        One score per unit; the mean of each group is 1.
    """
    assert statistics is not None
    every_pair = pairs(model, coupling, statistics[POOLED_ACTIVATIONS])
    scored = ((pair, partial(pair.parents, pair.children)) for pair in every_pair)
    return Scores("correlation", propagate(model, coupling, statistics, scored))


def partial(parents: Array, children: Array) -> Floats:
    """Compute the absolute partial correlation of every child with every parent, given all other parents.

    With S the parents' correlations, b = S^-1 s and r the child's residual variance, the precision matrix of parents
    and child together gives ``b_p / sqrt(r (S^-1)_pp + b_p^2)``. The ridge keeps it below 1 where a child is an exact
    function of its parents, as a linear layer's output is.

    Args:
        parents: Samples of the parents (samples, p).
        children: Samples of the children (samples, c), in the same order.

    Returns:
        Correlations (c, p) from 0 to 1.
    """
    x = standardise(parents)
    y = standardise(children)
    ridge = _ridge(x)
    spread, slopes = _inverse(x, y, ridge)
    cross = x.T @ y / len(x)
    explained = np.einsum("pc,pc->c", cross, slopes)
    residual = np.maximum(y.var(axis=0) + ridge - explained, LEAST_RESIDUAL)
    scale = np.sqrt(np.outer(spread, residual) + np.square(slopes))
    return np.asarray(np.abs(slopes / scale).T)


def _small_gram(x: Floats) -> Floats:
    """Products of columns or of rows of x, whichever are fewer, over the rows: both have the same trace and norm."""
    rows, columns = x.shape
    return np.asarray((x @ x.T if rows < columns else x.T @ x) / rows)


def _ridge(x: Floats) -> float:
    rows, columns = x.shape
    return shrinkage(_small_gram(x), rows, columns) if columns > 1 else ONE_PARENT_RIDGE


def _inverse(x: Floats, y: Floats, ridge: float) -> tuple[Floats, Floats]:
    """The diagonal of the inverse S^-1 of the ridged correlations (p,), and the slopes S^-1 s (p, c).

    Where x has fewer rows than columns, both follow from the matrix of the rows, by the identity of Woodbury.
    """
    rows, columns = x.shape
    gram = _small_gram(x)
    gram[np.diag_indices_from(gram)] += ridge
    inverse = np.linalg.inv(gram)
    if rows >= columns:
        return np.diag(inverse), np.asarray(inverse @ (x.T @ y / rows))
    by_row = inverse @ x  # (rows, p)
    leverage = np.einsum("rp,rp->p", x, by_row) / rows
    return (1 - leverage) / ridge, np.asarray(by_row.T @ y / rows)
