"""Learning rates: one per weight, proportional to its size, bounded by the loss, and their course over the budget."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from onnx_oamip.recovery.operators.calls import Tensor

RATE = 1e-2
"""Largest change of a weight in one step, over the root mean square of its tensor."""
TENSOR_SHARE = 0.05
"""Share of the loss that one step may take away through one tensor, as its gradient predicts; above it the rate of the
tensor is smaller."""
STEP_SHARE = 0.6
"""The same for all tensors together."""
USUAL_BATCH = 32
"""Samples of a step to which the rates above belong. Steps of fewer samples are shorter: their gradient is noisier."""
WARM_UP = 0.1
"""Share of the budget in which the rate rises."""
LEAST_RATE = 0.02
"""Share of the full rate at the first step."""


def share(progress: float) -> float:
    """Compute the share of the full rate: a linear rise, then half a cosine to zero.

    Args:
        progress: Share of the budget that is used.

    Returns:
        The share.
    """
    if progress < WARM_UP:
        return LEAST_RATE + (1 - LEAST_RATE) * progress / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def share_of_batch(samples: int) -> float:
    """Compute the share of the rates at which a step of few samples does no more harm by its noise.

    Args:
        samples: Samples of one step.

    Returns:
        The square root of their number over ``USUAL_BATCH``, at most 1.

    Source:
        Malladi, Lyu, Panigrahi and Arora, "On the SDEs and scaling rules for adaptive gradient algorithms", NeurIPS
        2022: the square-root rule for Adam.
    """
    return math.sqrt(min(samples / USUAL_BATCH, 1.0))


def sizes(weights: Sequence[Tensor]) -> list[float]:
    """Compute the root mean square of every weight.

    Args:
        weights: Weights.

    Returns:
        One number per weight; the median of the others where all values are zero.
    """
    found = [float(weight.detach().square().mean().sqrt()) for weight in weights]
    usual = float(np.median([size for size in found if size > 0] or [1.0]))
    return [size if size > 0 else usual for size in found]


def bounded(sizes: Sequence[float], slopes: Sequence[float], loss: float) -> list[float]:
    """Compute full rates: proportional to the sizes of weights, and bounded by the fall of the loss that they predict.

    Where the gradient predicts that a step takes away all of the loss, the step is much too long: the loss is not
    linear that far.

    Args:
        sizes: Root mean square of every weight.
        slopes: Sum of the absolute values of the gradient of every weight.
        loss: The loss at which the gradient was found.

    Returns:
        One rate per weight.
    """
    rates = [RATE * size for size in sizes]
    if not (loss > 0 and math.isfinite(loss)):
        return rates
    shares = [rate * slope / loss for rate, slope in zip(rates, slopes, strict=True)]
    kept = [min(1.0, TENSOR_SHARE / share) if share > 0 else 1.0 for share in shares]
    total = sum(part * share for part, share in zip(kept, shares, strict=True))
    common = min(1.0, STEP_SHARE / total) if total > 0 else 1.0
    return [rate * part * common for rate, part in zip(rates, kept, strict=True)]


def groups(weights: Sequence[Tensor], rates: Sequence[float]) -> list[dict[str, object]]:
    """Group weights of about the same rate, so that an optimiser has few groups.

    Args:
        weights: Weights.
        rates: Rate of each.

    Returns:
        Groups as torch's optimisers take them; their rates are powers of two.
    """
    found: dict[int, list[Tensor]] = defaultdict(list)
    for weight, rate in zip(weights, rates, strict=True):
        found[round(math.log2(rate))].append(weight)
    return [{"params": held, "lr": 2.0**power} for power, held in sorted(found.items())]
