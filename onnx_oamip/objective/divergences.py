"""Errors of single positions: divergences of decisions, squared errors, angles.

Infinities follow one rule: equal ones cost nothing, and a position at which only one side is a number costs infinity.
"""

from __future__ import annotations

import numpy as np

from onnx_oamip.core.records import Floats
from onnx_oamip.core.records.objective import Form

SMALLEST = 1e-12
"""Probabilities are clipped here before their logarithm is taken."""
BLOCK = 1 << 14
"""Values that a divergence takes at a time: its intermediate arrays then stay in the cache of the processor."""


def log_classes(values: Floats, form: Form) -> Floats:
    """Return log-probabilities of classes.

    Args:
        values: Class scores (positions, classes).
        form: ``probabilities``; anything else is read as logits.

    Returns:
        Log-probabilities (positions, classes). Probabilities are clipped at ``SMALLEST``.
    """
    if form == "probabilities":
        return np.asarray(np.log(np.maximum(values, SMALLEST)))
    with np.errstate(invalid="ignore"):
        shifted = values - values.max(axis=1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def log_binary(
    values: Floats,
    form: Form,
    threshold: float | None,
) -> tuple[Floats, Floats]:
    """Return log-probabilities of binary decisions.

    Args:
        values: Scores (positions, columns).
        form: ``probabilities``, ``logits``, or ``scores`` that are compared with a threshold.
        threshold: Threshold of ``scores``, at which both answers are equally probable; None for 0.

    Returns:
        Log-probabilities of the positive and of the negative answer, each (positions, columns).
    """
    if form == "probabilities":
        inside = np.clip(values, SMALLEST, 1 - SMALLEST)
        return np.log(inside), np.log1p(-inside)
    if form == "scores":
        odds = values - (threshold or 0.0)
    else:
        odds = values
    with np.errstate(invalid="ignore"):
        return -np.logaddexp(0.0, -odds), -np.logaddexp(0.0, odds)


def weighted(log: Floats) -> Floats:
    """Return ``p log p`` by element.

    Args:
        log: Log-probabilities, of any shape.

    Returns:
        The products, of the same shape; 0 where p is 0.
    """
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(log), 0.0, np.exp(log) * log)


def class_divergence(truth: Floats, found: Floats, form: Form) -> Floats:
    """Return the Kullback-Leibler divergence of class probabilities.

    Args:
        truth: Class scores of the original (positions, classes).
        found: Class scores of the pruned model, of the same shape.
        form: Form of both, see :func:`log_classes`.

    Returns:
        Divergences (positions,) in nats; infinite where only one side is finite.
    """
    rows = max(1, BLOCK // max(truth.shape[1], 1))
    blocks = [slice(i, i + rows) for i in range(0, len(truth), rows)]
    parts = [_divergence_of_rows(truth[block], found[block], form) for block in blocks]
    return np.concatenate([np.zeros(0), *parts])


def _divergence_of_rows(truth: Floats, found: Floats, form: Form) -> Floats:
    """Divergences of a block of positions, see :func:`class_divergence`."""
    with np.errstate(invalid="ignore"):
        if form == "probabilities":
            p = np.maximum(truth, SMALLEST)
            loss = _summed(p, np.log(p) - np.log(np.maximum(found, SMALLEST)))
        else:
            # Sum of p (a - b) + log(sum exp b) - log(sum exp a), with a and b shifted: two exponentials an element.
            old = truth - truth.max(axis=1, keepdims=True)
            new = found - found.max(axis=1, keepdims=True)
            difference = np.where(old == new, 0.0, old - new)
            share = np.exp(old)
            total = share.sum(axis=1)
            loss = _summed(share, difference) / total + np.log(np.exp(new).sum(axis=1) / total)
    return lost(np.where((truth == found).all(axis=1), 0.0, np.maximum(loss, 0.0)))


def _summed(one: Floats, other: Floats) -> Floats:
    """Sums of products over the columns (positions,)."""
    return np.asarray(np.einsum("ij,ij->i", one, other))


def binary_divergence(
    truth: Floats,
    found: Floats,
    form: Form,
    threshold: float | None,
) -> Floats:
    """Return the Kullback-Leibler divergence of independent binary decisions.

    Args:
        truth: Scores of the original (positions, columns).
        found: Scores of the pruned model, of the same shape.
        form: Form of both, see :func:`log_binary`.
        threshold: Threshold of the form ``scores``.

    Returns:
        Divergences (positions, columns) in nats; infinite where only one side is finite.
    """
    (yes, no), (new_yes, new_no) = (
        log_binary(truth, form, threshold),
        log_binary(found, form, threshold),
    )
    with np.errstate(invalid="ignore"):
        loss = np.exp(yes) * (yes - new_yes) + np.exp(no) * (no - new_no)
        return lost(np.where(truth == found, 0.0, np.maximum(loss, 0.0)))


def squared_error(truth: Floats, found: Floats) -> Floats:
    """Return squared differences.

    Args:
        truth: Values of the original (positions, columns).
        found: Values of the pruned model, of the same shape.

    Returns:
        Squared differences, of the same shape. Equal infinities differ by 0.
    """
    with np.errstate(invalid="ignore"):
        return lost(np.square(np.where(truth == found, 0.0, truth - found)))


def angle(truth: Floats, found: Floats) -> Floats:
    """Return one minus the cosine of pairs of vectors.

    Args:
        truth: Vectors of the original (positions, components).
        found: Vectors of the pruned model, of the same shape.

    Returns:
        Values from 0 to 2 (positions,); 1 if exactly one of the vectors is zero.
    """
    with np.errstate(invalid="ignore"):
        a = directions(truth)
        b = directions(found)
        loss = np.square(a - b).sum(axis=1) / 2  # exact where both are equal, unlike 1 - a.b
    alone = a.any(axis=1) != b.any(axis=1)
    return lost(np.where(alone, 1.0, loss))


def directions(values: Floats) -> Floats:
    """Scale vectors to length 1.

    Args:
        values: Vectors (positions, components).

    Returns:
        Unit vectors, of the same shape. Zero vectors remain zero.
    """
    with np.errstate(invalid="ignore"):
        largest = np.abs(values).max(axis=1, keepdims=True, initial=0.0)
        near = np.divide(values, largest, out=np.zeros_like(values), where=largest != 0)
        length = np.linalg.norm(near, axis=1, keepdims=True)
        return np.asarray(np.divide(near, length, out=np.zeros_like(near), where=length != 0))


def padded_sum(one: Floats, other: Floats) -> Floats:
    """Add up sums by class, of which one may have more classes: feeds of unequal length choose among their positions.

    Args:
        one: Sums (classes, ...), or one number.
        other: Sums (more or fewer classes, ...), or one number.

    Returns:
        The total, with as many classes as the longer of the two.
    """
    if not one.ndim or not other.ndim or len(one) == len(other):
        return np.asarray(one + other)
    short, long = sorted((one, other), key=len)
    total: Floats = long.copy()
    total[: len(short)] += short
    return total


def lost(loss: Floats) -> Floats:
    """Replace NaN in losses by infinity.

    Args:
        loss: Losses, of any shape.

    Returns:
        The losses without NaN, of the same shape.
    """
    return np.where(np.isnan(loss), np.inf, loss)
