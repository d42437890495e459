"""The objective of the run as a differentiable function, and the errors of features at the ends of blocks.

The terms are those of ``objective.losses``, with the same scales: 1 is the loss of the average answer. Where an output
may hold class scores or values, the mean of both losses is trained. Positions at which the original has no finite
number count nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from onnx_oamip.core.records.objective import MASKED, Objective, Scale, Term
from onnx_oamip.objective.divergences import SMALLEST
from onnx_oamip.objective.normaliser import cutoff
from onnx_oamip.recovery.features import Feature
from onnx_oamip.recovery.operators.calls import Tensor


def differentiable(objective: Objective) -> list[Term]:
    """List the terms that have a gradient.

    Args:
        objective: A scaled objective.

    Returns:
        The judged terms whose tensors are compared by more than equality.
    """
    return [term for term in objective.judged if term.kind != "exact"]


def objective_loss(terms: Sequence[Term], truth: Sequence[Tensor], found: Sequence[Tensor]) -> Any:
    """Compute the mean loss of the terms by their weights.

    Args:
        terms: Terms with scales.
        truth: The original's tensor of every term.
        found: The pruned model's.

    Returns:
        A tensor with one number.
    """
    total = sum(term.weight for term in terms)
    parts = [
        term.weight / total * _term(term, old, new)
        for term, old, new in zip(terms, truth, found, strict=True)
    ]
    return torch.stack(parts).sum()


def kept_channels(feature: Feature, tensor: Tensor) -> Tensor:
    """Select the channels of a feature that the pruned model has, or combine them.

    Args:
        feature: The feature.
        tensor: The original's tensor.

    Returns:
        The tensor without the removed channels, or with combinations of channels in place of them.
    """
    if feature.projection is not None:
        matrix, shift = (
            torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device)
            for value in (feature.projection.matrix, feature.projection.shift)
        )
        axis = feature.projection.axis
        return (tensor.movedim(axis, -1) @ matrix + shift).movedim(-1, axis)
    for axis, kept in feature.kept:
        tensor = tensor.index_select(axis, torch.as_tensor(kept, device=tensor.device))
    return tensor


def feature_loss(
    variances: Sequence[float], truth: Sequence[Tensor], found: Sequence[Tensor]
) -> Any:
    """Compute the mean squared error of features over their variance.

    Args:
        variances: Variance of every feature in the original.
        truth: The original's tensors, with the channels that were kept.
        found: The pruned model's.

    Returns:
        A tensor with one number.
    """
    errors = [
        F.mse_loss(new, old) / variance
        for variance, old, new in zip(variances, truth, found, strict=True)
    ]
    return torch.stack(errors).mean()


def rows(term: Term, tensor: Tensor) -> Tensor:
    """Return a term's part of a tensor as a matrix, as ``Term.rows`` does.

    Args:
        term: A term.
        tensor: The tensor that it compares.

    Returns:
        (positions, columns).
    """
    if term.part is not None:
        length = term.part.stop - term.part.start
        tensor = tensor.narrow(term.part.axis, term.part.start, length)
    if term.least:
        tensor = -tensor
    if term.axis is None or tensor.dim() == 0:
        return tensor.reshape(-1, 1)
    axes = (*term.stacked, term.axis)
    last = tuple(range(-len(axes), 0))
    moved = tensor.movedim(axes, last)
    columns = math.prod(moved.shape[-len(axes) :])
    return moved.reshape(-1, columns)


def _term(term: Term, truth: Tensor, found: Tensor) -> Tensor:
    scale = term.scale
    assert scale is not None, "the objective has no scales yet"
    old = rows(term, truth)
    new = rows(term, found)
    losses = []
    if term.kind in ("classes", "ambiguous"):
        losses.append(_classes(scale, old, new))
    elif term.kind == "binary":
        losses.append(_binary(term, scale, old, new))
    elif term.kind == "embedding":
        losses.append((1 - F.cosine_similarity(old, new, dim=1)).mean() / scale.spread)
    if term.kind in ("values", "ambiguous"):
        variance = torch.as_tensor(scale.variance, dtype=old.dtype, device=old.device)
        known = torch.isfinite(old)
        if term.fill is not None:  # masked entries, as ``Term.values`` finds them
            known &= old / term.fill <= MASKED
        error = torch.where(known, new - torch.where(known, old, 0.0), 0.0)
        losses.append((error * error / variance).mean())
    # Of an ambiguous output the objective takes the worse of two losses. Steps against that one alone raise the other.
    return torch.stack(losses).mean()


def _log_classes(scale: Scale, values: Tensor) -> Tensor:
    if scale.form == "probabilities":
        return torch.log(values.clamp_min(SMALLEST))
    return torch.log_softmax(values, 1)


def _classes(scale: Scale, old: Tensor, new: Tensor) -> Tensor:
    p = _log_classes(scale, old)
    q = _log_classes(scale, new)
    # A class that the original excludes adds nothing.
    divergence = torch.where(torch.isfinite(p), p.exp() * (p - q), 0.0).sum(1)
    if scale.background >= 0:
        weights = torch.as_tensor(scale.balance[0], dtype=old.dtype, device=old.device)
        divergence = divergence * weights[(p.argmax(1) != scale.background).long()]
    return divergence.mean() / scale.spread


def _binary(term: Term, scale: Scale, old: Tensor, new: Tensor) -> Tensor:
    balance = torch.as_tensor(scale.balance, dtype=old.dtype, device=old.device)
    positive = old > cutoff(term.threshold, scale.form)
    weight = torch.where(positive, balance[:, 1], balance[:, 0])
    yes, no = _log_binary(term, scale, old)
    new_yes, new_no = _log_binary(term, scale, new)
    divergence = yes.exp() * (yes - new_yes) + no.exp() * (no - new_no)
    return (torch.where(torch.isfinite(divergence), divergence, 0.0) * weight).mean() / scale.spread


def _log_binary(term: Term, scale: Scale, values: Tensor) -> tuple[Tensor, Tensor]:
    if scale.form == "probabilities":
        inside = values.clamp(1e-7, 1 - 1e-7)  # float32 has no number nearer to 1
        return torch.log(inside), torch.log1p(-inside)
    odds = values - (term.threshold or 0.0) if scale.form == "scores" else values
    return F.logsigmoid(odds), F.logsigmoid(-odds)
