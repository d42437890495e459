"""The loss of a pruned model: how far its outputs are from the original's, term by term and in one number.

Losses are sums over positions until the end, so that batches of any size can be added up (``sums``). A term's loss is 1
where the pruned model is as far off as one that always gives the average answer; the total is the mean of all terms by
their weights. An ambiguous term takes the worse of class divergence and squared error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_oamip.core.records import Array, Floats
from onnx_oamip.core.records.objective import Objective, Scale, Term
from onnx_oamip.objective.divergences import (
    angle,
    binary_divergence,
    class_divergence,
    squared_error,
)
from onnx_oamip.objective.normaliser import cutoff

LOST = 1000.0
"""Largest loss of a term, and that of outputs which are not finite where the original's are."""


@dataclass(frozen=True, eq=False)
class Loss:
    """``terms`` (judged terms,) and their mean by weight."""

    terms: Floats
    total: float


def sums(
    objective: Objective,
    truth: Sequence[Array],
    found: Sequence[Array],
) -> Floats:
    """Sums of one batch (judged terms, 3): decision loss, value loss, positions; batches are added up.

    Args:
        objective: A scaled objective (``Normaliser.finish``).
        truth: The original's arrays in the order of ``objective.tensors``.
        found: The pruned model's.

    Returns:
        The argument of ``loss``, after sums over any number of batches.
    """
    pairs = objective.pairs(truth, found)
    return np.stack(
        [np.zeros(3), *(_sum(t, a, b) for t, (a, b) in zip(objective.judged, pairs, strict=True))]
    )[1:]


def loss(objective: Objective, total: Floats) -> Loss:
    """Return the loss from the sums of all batches.

    Args:
        objective: The terms.
        total: Sums of :func:`sums` (judged terms, 3), added up over batches.

    Returns:
        The loss of every judged term, at most ``LOST``, and their mean by weight.
    """
    terms = np.minimum(total[:, :2].max(axis=1, initial=0.0) / np.maximum(total[:, 2], 1), LOST)
    weight = np.asarray([term.weight for term in objective.judged])
    return Loss(terms, float(weight @ terms / weight.sum()) if weight.sum() else 0.0)


def compare(
    objective: Objective,
    truth: Sequence[Array],
    found: Sequence[Array],
) -> Loss:
    """Return the loss of one batch.

    Args:
        objective: A scaled objective.
        truth: The original's arrays in the order of ``objective.tensors``.
        found: The pruned model's.

    Returns:
        The loss.
    """
    return loss(objective, sums(objective, truth, found))


def _sum(term: Term, truth: Array, found: Array) -> Floats:
    """(decision loss, value loss, positions)."""
    if term.kind == "exact":
        same = truth.shape == found.shape
        if same:
            unequal = float((truth != found).sum())
        else:
            unequal = float(truth.size)
        return np.asarray([unequal, 0.0, truth.size])
    assert term.scale is not None, "the objective has no scales yet"
    old = term.rows(truth)
    new = term.rows(found)
    if old.shape != new.shape:
        return np.asarray([np.inf, np.inf, len(old)])
    decisions = values = 0.0
    if term.kind in ("classes", "ambiguous"):
        decisions = _classes(term.scale, old, new)
    elif term.kind == "binary":
        decisions = _binary(term, term.scale, old, new)
    elif term.kind == "embedding":
        decisions = float(angle(old, new).sum()) / term.scale.spread
    if term.kind in ("values", "ambiguous"):
        error = squared_error(term.values(truth), term.values(found)) / term.scale.variance
        values = float(error.sum()) / max(old.shape[1], 1)
    return np.asarray([decisions, values, len(old)])


def _classes(scale: Scale, old: Floats, new: Floats) -> float:
    divergence = class_divergence(old, new, scale.form)
    if scale.background >= 0:
        positive = (old.argmax(axis=1) != scale.background).astype(np.int64)
        divergence = divergence * scale.balance[0, positive]
    return float(divergence.sum() / scale.spread)


def _binary(
    term: Term,
    scale: Scale,
    old: Floats,
    new: Floats,
) -> float:
    positive = old > cutoff(term.threshold, scale.form)
    weight = np.where(positive, scale.balance[:, 1], scale.balance[:, 0])
    divergence = binary_divergence(old, new, scale.form, term.threshold)
    return float((divergence * weight).sum() / scale.spread / max(old.shape[1], 1))
