"""The judge: the objective of a run on held-out samples, by ONNX Runtime, and the rule that nothing gets worse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx

from onnx_oamip.core.records import Array, Measure, Model
from onnx_oamip.core.records.objective import Objective
from onnx_oamip.data.dataset import Samples, hold_out
from onnx_oamip.graph.external_data import references, tensor
from onnx_oamip.graph.outputs import with_outputs
from onnx_oamip.graph.runtime import Session
from onnx_oamip.objective import Measures, loss, sums

LEAST_GAIN = 1e-3
"""Share of the loss by which it has to fall for a result to count as better: below that it is noise."""


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
            batch_size: Samples of one run.
        """
        self._model = original
        self._objective = objective
        self._samples = samples
        self._device = device
        self._size = batch_size
        self._truth = list(self._outputs(original.proto))

    def _outputs(self, proto: onnx.ModelProto) -> list[list[Array]]:
        tensors = self._objective.tensors
        session = Session(with_outputs(self._model, tensors, proto), self._device)
        batches = self._samples.batches(self._size)
        return [session.run(feed, tensors) for _, feed in batches]

    def loss(self, proto: onnx.ModelProto) -> float:
        """Compute the loss of the objective.

        Args:
            proto: A pruned model.

        Returns:
            The mean loss of all terms by weight; 1 is that of the average answer.
        """
        total = np.zeros((len(self._objective.judged), 3))
        for truth, found in zip(self._truth, self._outputs(proto), strict=True):
            total = total + sums(self._objective, truth, found)
        return loss(self._objective, total).total

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


@dataclass
class Best:
    """The best weights so far, by their loss on held-out samples.

    Attributes:
        start: Loss of the model before recovery.
        patience: Evaluations without a new best after which training stops.
        curve: Pairs of a step and the loss after it.
    """

    start: float
    patience: int
    curve: list[tuple[int, float]] = field(default_factory=list)
    loss: float = np.inf
    step: int = 0
    weights: Mapping[str, Array] = field(default_factory=dict)

    def offer(self, step: int, found: float, weights: Mapping[str, Array]) -> None:
        """Note the loss of a step, and its weights if it is the lowest so far.

        Args:
            step: Steps done.
            found: Loss on held-out samples.
            weights: Weights by name.
        """
        self.curve.append((step, found))
        if found < self.loss:
            self.loss, self.step, self.weights = found, step, weights

    @property
    def is_better(self) -> bool:
        """True if the best is better than the start by more than noise."""
        return self.loss < self.start * (1 - LEAST_GAIN)

    @property
    def has_stalled(self) -> bool:
        """True if the last evaluations found nothing better."""
        steps = [step for step, _ in self.curve]
        return self.step in steps and len(steps) - 1 - steps.index(self.step) >= self.patience


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
