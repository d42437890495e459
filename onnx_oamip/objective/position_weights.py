"""Weights of the positions of a batch: positions of rare decisions count more in sums over positions.

The loss of a term weighs the positions that the original decides positively as much in total as all others. A
least-squares problem of a layer in front of it, which sums over the rows of that layer, must weigh them alike: else it
reconstructs the background, which is nearly all of its rows, and loses what the model is there to find. The weights of
the output's positions are carried over to the rows of a layer by their places: axis by axis where both have the same
number of axes, and else by sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_oamip.core.records import Array, Floats, Model, Objective
from onnx_oamip.core.records.objective import Term, document
from onnx_oamip.graph.outputs import with_outputs
from onnx_oamip.graph.runtime import Session
from onnx_oamip.objective.normaliser import cutoff

MAX_NUMBERS = 1 << 20
"""Positions of one batch and term that are held at most; larger maps are averaged."""
MAX_WEIGHT = 64.0
"""Largest weight of a position: a larger one would leave a sum over the rows of a layer to very few of them."""


@dataclass(frozen=True, eq=False)
class PositionWeights:
    """Weights of the positions of one batch.

    Attributes:
        uniform: Share of the terms without rare decisions, all of whose positions weigh 1.
        maps: For every term with rare decisions its share, and the weights of its positions (samples, *positions).
    """

    uniform: float
    maps: tuple[tuple[float, Array], ...]

    def rows(self, shape: Sequence[int]) -> Floats:
        """Compute the weights of the rows of a layer.

        Args:
            shape: Lengths of the axes that the rows of the layer run over, samples first.

        Returns:
            One weight per row, in the order of the axes.
        """
        total = np.full(tuple(shape), self.uniform)
        for share, values in self.maps:
            total += share * _carried_over(values, tuple(shape))
        return total.reshape(-1)

    def by_sample(self, count: int) -> Floats:
        """Compute the mean weight of the positions of every sample.

        Args:
            count: Number of samples in the batch.

        Returns:
            Means (count,); one for all samples where the positions are not sorted by sample.
        """
        total = np.full(count, self.uniform)
        for share, values in self.maps:
            is_by_sample = len(values) == count
            rows = values.reshape(count if is_by_sample else 1, -1)
            total += share * rows.mean(axis=1)
        return total


def has_rare_decisions(objective: Objective) -> bool:
    """Test for an objective with a term whose positions do not all weigh the same.

    Args:
        objective: The terms, with their scales if there is data.

    Returns:
        True if a term is balanced.
    """
    return any(_is_balanced(term) for term in objective.judged)


def weighting(objective: Objective) -> dict[str, Any]:
    """Return what weighted sums over positions depend on besides the samples, as plain values.

    Args:
        objective: The terms with their scales.

    Returns:
        The objective; nothing if all positions weigh the same.
    """
    return {"objective": document(objective)} if has_rare_decisions(objective) else {}


def position_weights(
    model: Model,
    objective: Objective,
    feeds: Iterable[Mapping[str, Array]],
    device: str,
    *,
    power: float = 1.0,
) -> list[PositionWeights] | None:
    """Find the weights of all positions from the original's decisions.

    Args:
        model: The original.
        objective: The terms with their scales.
        feeds: Batches of samples.
        device: Where the model runs.
        power: Exponent of the weights of the decisions, 0 for equal ones.

    Returns:
        Weights per feed; None if all positions weigh the same.
    """
    if not has_rare_decisions(objective):
        return None
    tensors = objective.tensors
    session = Session(with_outputs(model, tensors), device, what="the model")
    return [weights_of(objective, session.run(feed, tensors), power=power) for feed in feeds]


def weights_of(
    objective: Objective,
    outputs: Sequence[Array],
    *,
    power: float = 1.0,
) -> PositionWeights:
    """Find the weights of the positions of one batch.

    Args:
        objective: The terms with their scales.
        outputs: Arrays of the original in the order of ``objective.tensors``.
        power: Exponent of the weights of the decisions.

    Returns:
        The weights. Every term counts as much as it does in the loss.
    """
    whole = sum(term.weight for term in objective.judged)
    uniform = 0.0
    maps = []
    for term, (array,) in zip(objective.judged, objective.pairs(outputs), strict=True):
        if _is_balanced(term):
            maps.append((term.weight / whole, _pooled(_balance(term, array) ** power)))
        else:
            uniform += term.weight / whole
    return PositionWeights(uniform, tuple(maps))


def _is_balanced(term: Term) -> bool:
    return term.scale is not None and term.axis != 0 and bool((term.scale.balance != 1).any())


def _balance(term: Term, array: Array) -> Floats:
    """Weights of a term's positions, in the shape of its tensor without the axis of classes or columns."""
    scale = term.scale
    assert scale is not None
    rows = term.rows(array)
    if term.kind == "binary":
        positive = rows > cutoff(term.threshold, scale.form)
        weights = np.where(positive, scale.balance[:, 1], scale.balance[:, 0]).mean(axis=1)
    else:
        decision = rows.argmax(axis=1)
        weights = scale.balance[0, (decision != scale.background).astype(np.int64)]
    bounded: Floats = np.minimum(weights, MAX_WEIGHT)
    return bounded.reshape(term.positions(array) or (1,))


def _pooled(values: Floats) -> Array:
    """Weights of at most ``MAX_NUMBERS`` positions: the longest axes behind the samples are halved."""
    while values.size > MAX_NUMBERS and max(values.shape[1:], default=1) > 1:
        axis = 1 + int(np.argmax(values.shape[1:]))
        values = _resampled(values, axis, -(-values.shape[axis] // 2))
    return values.astype(np.float32)


def _carried_over(values: Array, shape: tuple[int, ...]) -> Array:
    """Weights of the rows of a layer (*shape), from those of the positions of an output."""
    samples = _sample_axis(values, shape)
    if values.ndim != len(shape) or samples != 0:
        by_sample = values.reshape(len(values), -1).mean(axis=1)
        along = _resampled(by_sample, 0, shape[samples])
        return along.reshape([-1 if axis == samples else 1 for axis in range(len(shape))])
    for axis, length in enumerate(shape):
        values = _resampled(values, axis, length)
    return values


def _sample_axis(values: Array, shape: tuple[int, ...]) -> int:
    """Axis of the samples: the first as long as that of the output, as recurrent layers may have the time in front."""
    alike = [axis for axis, length in enumerate(shape) if length == len(values)]
    return alike[0] if alike else 0


def _resampled(values: Array, axis: int, length: int) -> Array:
    """Values at another number of places along an axis: the mean of all those that a place overlaps."""
    old = values.shape[axis]
    if old == length:
        return values
    places = np.arange(length)
    first = places * old // length
    stop = -(-(places + 1) * old // length)
    in_front = np.moveaxis(values, axis, 0)
    sums = np.zeros((old + 1, *in_front.shape[1:]))
    np.cumsum(in_front, axis=0, out=sums[1:])
    means = (sums[stop] - sums[first]) / (stop - first).reshape(-1, *[1] * (values.ndim - 1))
    return np.moveaxis(means, 0, axis)
