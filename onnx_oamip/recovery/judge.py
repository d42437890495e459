"""The judge of a recovery: the objective on held-out samples, by ONNX Runtime, and the test whether it fell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from onnx_oamip.core.records import Array, Floats, Ints, Measure, Model
from onnx_oamip.core.records.objective import Objective
from onnx_oamip.data.dataset import Samples, hold_out
from onnx_oamip.graph.external_data import references, tensor
from onnx_oamip.graph.outputs import with_outputs
from onnx_oamip.graph.runtime import Session
from onnx_oamip.objective import Measures, loss, sums

LEAST_GAIN = 1e-3
"""Share of the loss by which it has to fall for a result to count as better."""
ERRORS = 1.0
"""Standard errors by which the differences of the samples have to exceed zero, so that noise is not taken: their mean,
or their sum of signed ranks, which single samples with a large loss do not hide."""

FEWEST = 6
"""Judging samples below which nothing is trained. With three or four of them, trainings were taken that had made the
model worse by up to a half on new samples; with six, none."""


class Judge:
    """Loss of pruned models on held-out samples."""

    def __init__(
        self,
        original: Model,
        objective: Objective,
        samples: Samples,
        *,
        device: str,
        batch_size: int,
    ) -> None:
        """Run the original on the held-out samples.

        Args:
            original: The original.
            objective: Terms with scales.
            samples: Held-out samples.
            device: Where models run.
            batch_size: Samples of one run; 1 is taken where no output is split by samples, so that every sample has a
                loss of its own.
        """
        self._model = original
        self._objective = objective
        self._samples = samples
        self._device = device
        self._size = batch_size
        self._truth = self._outputs(original.proto, "the original")
        indices = samples.feed_indices(batch_size)
        if not all(map(_has_split, indices, self._truth)):
            self._size = 1
            self._truth = self._outputs(original.proto, "the original")

    def _outputs(self, proto: onnx.ModelProto, what: str = "the pruned model") -> list[list[Array]]:
        tensors = self._objective.tensors
        session = Session(with_outputs(self._model, tensors, proto), self._device, what=what)
        batches = self._samples.batches(self._size)
        return [session.run(feed, tensors) for _, feed in batches]

    def losses(self, proto: onnx.ModelProto) -> Floats:
        """Compute the loss of the objective sample by sample.

        Args:
            proto: A pruned model.

        Returns:
            The mean loss of all terms by weight, for every sample (or feed, where no output is split by samples);
            1 is that of the average answer.
        """
        found: list[float] = []
        indices = self._samples.feed_indices(self._size)
        for index, truth, output in zip(indices, self._truth, self._outputs(proto), strict=True):
            places: list[int | None] = [None]
            if _has_split(index, (*truth, *output)):
                places = list(range(len(index)))
            for place in places:
                old, new = (_of_sample(index, side, place) for side in (truth, output))
                found.append(loss(self._objective, sums(self._objective, old, new)).total)
        return np.asarray(found)

    def measures(self, proto: onnx.ModelProto) -> tuple[Measure, ...]:
        """Measure every term.

        Args:
            proto: A pruned model.

        Returns:
            Measures, the worst first.
        """
        measures = Measures(self._objective)
        indices = self._samples.feed_indices(self._size)
        labels = self._samples.labels
        for index, truth, found in zip(indices, self._truth, self._outputs(proto), strict=True):
            measures.update(truth, found, None if labels is None else labels[index])
        return measures.results()


def _is_split(index: Ints, value: Array) -> bool:
    """True if an output of a feed has its samples along axis 0."""
    return bool(value.ndim) and len(value) == len(index)


def _has_split(index: Ints, arrays: Sequence[Array]) -> bool:
    """True if at least one output of a feed has its samples along axis 0."""
    return any(_is_split(index, value) for value in arrays)


def _of_sample(index: Ints, arrays: Sequence[Array], place: int | None) -> list[Array]:
    """Outputs of one sample of a feed. Those that are not split, such as one number for all, count for every sample."""
    if place is None:
        return list(arrays)
    part = slice(place, place + 1)
    return [value[part] if _is_split(index, value) else value for value in arrays]


@dataclass
class Best:
    """The best weights so far, by their losses on held-out samples.

    These are the last ones whose losses do not exceed the lowest by more than noise. Held-out samples are few: of
    losses that rise and fall with single samples, the lowest is often one of the first, by chance, while the rate falls
    and the average of the weights gains from every step.

    Attributes:
        start: Losses of the model before recovery, by sample.
        patience: Evaluations without new best weights after which training stops.
        curve: Pairs of a step and the mean loss after it.
        lowest: Losses of lowest mean, by sample; empty before the first evaluation.
        losses: Losses of the best weights, by sample; empty before the first evaluation.
        step: Steps behind the best weights.
        weights: The best weights by name.
    """

    start: Floats
    patience: int
    curve: list[tuple[int, float]] = field(default_factory=list)
    lowest: Floats = field(default_factory=lambda: np.zeros(0))
    losses: Floats = field(default_factory=lambda: np.zeros(0))
    step: int = 0
    weights: Mapping[str, Array] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Mean loss of the best weights; infinite before the first evaluation."""
        return float(self.losses.mean()) if self.losses.size else np.inf

    def offer(self, step: int, found: Floats, weights: Mapping[str, Array]) -> None:
        """Note the losses of a step, and its weights unless they are worse than others before.

        Args:
            step: Steps done.
            found: Losses on held-out samples, by sample.
            weights: Weights by name.
        """
        self.curve.append((step, float(found.mean())))
        if not np.isfinite(found).all():
            return
        if not self.lowest.size or found.mean() < self.lowest.mean():
            self.lowest = found
        if not is_lower(self.lowest, found):
            self.losses, self.step, self.weights = found, step, weights

    @property
    def is_better(self) -> bool:
        """True if the best is better than the start, by more than the differences between samples explain."""
        return bool(self.losses.size) and is_lower(self.losses, self.start)

    @property
    def has_stalled(self) -> bool:
        """True if none of the last evaluations gave the best weights."""
        steps = [step for step, _ in self.curve]
        return self.step in steps and len(steps) - 1 - steps.index(self.step) >= self.patience


def is_lower(losses: Floats, others: Floats) -> bool:
    """Check whether losses are lower than others by more than noise.

    Args:
        losses: Losses by sample.
        others: Other losses of the same samples.

    Returns:
        True if their mean, or most of them by rank, is lower by more than differences between samples explain.
    """
    gains = others - losses
    if gains.mean() <= LEAST_GAIN * float(others.mean()):
        return False
    noise = ERRORS * float(gains.std()) / np.sqrt(gains.size)
    return bool(gains.mean() > noise) or _rank_errors(gains) > ERRORS


def _rank_errors(gains: Floats) -> float:
    """Sum of the signed ranks of some differences over its standard error, as in Wilcoxon's test."""
    from scipy.stats import rankdata  # half a second to import, and only a recovery needs it

    ranks = rankdata(np.abs(gains))
    return float((np.sign(gains) * ranks).sum() / np.sqrt((ranks**2).sum()))


def written(proto: onnx.ModelProto, weights: Mapping[str, Array]) -> onnx.ModelProto:
    """Copy a model with other values of initialisers.

    Args:
        proto: The model.
        weights: Values by name. Each is stored in the type of its initialiser.

    Returns:
        The copy; its graph and its shapes are those of the model.
    """
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    is_external = bool(references(proto))
    for held in result.graph.initializer:
        if held.name in weights:
            kind = onnx.helper.tensor_dtype_to_np_dtype(held.data_type)
            value = np.ascontiguousarray(weights[held.name].astype(kind))
            held.CopyFrom(tensor(value, held.name, is_external))
    return result


def split(samples: Samples, held_out: Samples | None, seed: int) -> tuple[Samples, Samples]:
    """Split samples into those that are trained on and those that judge.

    A fifth of the data judges: that which was held out already, or another one where the held-out samples are
    evaluation data of the user, which stay unseen.

    Args:
        samples: Samples in random order.
        held_out: Held-out samples, or None.
        seed: Seed of the choice.

    Returns:
        Samples to train on, and samples to judge on.
    """
    is_part_of_data = held_out is not None and held_out.origin is not None
    if held_out is not None and is_part_of_data:
        return samples, held_out
    return hold_out(samples, seed)
