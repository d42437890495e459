"""Partial correlation of a layer's children with its parents: the baseline that estimators of dependence must beat.

``|corr(child, parent | all other parents)|`` from a ridged correlation matrix. For Gaussian variables it carries all
that conditional mutual information does, ``I = -log(1 - rho^2) / 2``, at the cost of one inverse a layer.
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
from onnx_oamip.published.dependence.pooled_activations import pairs, standardise
from onnx_oamip.published.dependence.propagation import propagate
from onnx_oamip.published.dependence.requests import POOLED_ACTIVATIONS
from onnx_oamip.statistics.layer_problems import shrinkage


def score(
    model: Model, coupling: Coupling, statistics: Statistics | None, settings: Settings
) -> Scores:
    """Importance of every unit, the mean of its group 1, propagated as SNACS does from partial correlations."""
    assert statistics is not None
    found = (
        (pair, partial(pair.parents, pair.children))
        for pair in pairs(model, coupling, statistics[POOLED_ACTIVATIONS])
    )
    return Scores("correlation", propagate(model, coupling, statistics, found))


def partial(parents: Array, children: Array) -> Floats:
    """|Partial correlation| (c, p) of every child with every parent, given all other parents; rows are samples.

    With S the parents' correlations, b = S^-1 s and r the child's residual variance, the precision matrix of parents
    and child together gives ``b_p / sqrt(r (S^-1)_pp + b_p^2)``. The ridge keeps it below 1 where a child is an exact
    function of its parents, as a linear layer's output is.
    """
    x, y = standardise(parents), standardise(children)
    rows = len(x)
    gram = x.T @ x / rows
    ridge = shrinkage(gram, rows) if len(gram) > 1 else 1e-3
    gram[np.diag_indices_from(gram)] = np.diag(gram) + ridge
    cross = x.T @ y / rows
    inverse = np.linalg.inv(gram)
    slopes = inverse @ cross  # (p, c)
    residual = np.maximum(y.var(axis=0) + ridge - np.einsum("pc,pc->c", cross, slopes), 1e-12)
    return np.asarray(
        np.abs(slopes / np.sqrt(np.outer(np.diag(inverse), residual) + np.square(slopes))).T
    )
