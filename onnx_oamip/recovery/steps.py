"""Steps of a training: loss, gradients in the coordinates of weights, and averages of weights."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from onnx_oamip.core.records import Array
from onnx_oamip.graph.outputs import with_outputs
from onnx_oamip.graph.runtime import Session
from onnx_oamip.recovery import coordinates, rates
from onnx_oamip.recovery.batches import Batch, Batches, Given, Teacher
from onnx_oamip.recovery.engine import Engine
from onnx_oamip.recovery.judge import Best
from onnx_oamip.recovery.losses import differentiable, feature_loss, objective_loss
from onnx_oamip.recovery.operators.calls import Tensor
from onnx_oamip.recovery.parts import Part
from onnx_oamip.recovery.task import Task

GRADIENT_BATCHES = 4
"""Batches on which the gradient that bounds the rates is found."""
SLOWER = 10.0
"""Divisor of the rate where it was too large."""
DECAY = 0.98
"""Share of the former average in the average of weights over steps."""
FEATURE_WEIGHT = 2.0
"""Weight of the features against the objective."""
MAX_BATCH = rates.USUAL_BATCH
"""Samples of one step, at most."""
BYTES_PER_ELEMENT = 8
"""An activation in float32 and its gradient."""
VARIANCE_BATCHES = 4
"""Batches on which the variance of features is found."""
SMALLEST = 1e-12


class Diverged(Exception):
    """The loss is no finite number."""


class Run:
    """State of a training: engine, optimiser, and averages of weights.

    Attributes:
        features: Tensors that are compared besides the objective's.
        batch: Samples of one step.
        batches: Samples with the original's answers.
        slowed: Times that the rate was divided because it was too large.
    """

    def __init__(self, task: Task, part: Part) -> None:
        """Prepare the first step.

        Args:
            task: Models, samples and loss.
            part: What is computed and trained.
        """
        self._part = part
        # A sample that is a feed of its own may hold any number of rows, as a recording holds frames.
        self._is_whole = task.samples.whole
        self._engine = Engine(
            task.pruned, part.tensors, given=part.given, device=task.device, weights=part.weights
        )
        compared = set(part.tensors)
        self._terms = [t for t in differentiable(task.objective) if t.tensor in compared]
        self.features = tuple(f for f in task.features if f.tensor in compared)
        self.batch = _batch_size(task)
        teacher = Teacher(
            task.original,
            part.tensors,
            self.features,
            device=task.device,
            runtime_device=task.runtime_device,
        )
        self.batches = Batches(
            task.samples,
            teacher,
            _given(task, part),
            size=self.batch,
            augment=task.augment,
            device=task.device,
            memory=task.memory,
            seed=task.seed,
        )
        self._variances = self._feature_variances()
        self._weights = list(self._engine.weights.values())
        self._start = [weight.detach().clone() for weight in self._weights]
        found = coordinates.find(
            task.pruned,
            part.weights,
            task.samples,
            batch=self.batch,
            device=task.device,
            runtime_device=task.runtime_device,
            seed=task.seed,
        )
        self._coordinates = [found.get(name) for name in self._engine.weights]
        self.slowed = 0
        self._full_rates = self._bounded_rates()
        self._begin(self._in_coordinates([torch.zeros_like(start) for start in self._start]))

    def _bounded_rates(self) -> list[float]:
        """Full rate of every weight in its coordinates, from gradients over the first batches."""
        loss = torch.zeros(())
        for _ in range(GRADIENT_BATCHES):
            part = self._loss(next(self.batches))
            _differentiate(part)
            loss = loss + part.detach()
        gradients = self._take_gradients()
        slopes = [0.0 if slope is None else float(slope.abs().sum()) for slope in gradients]
        sizes = rates.sizes(self._in_coordinates(self._start))
        share = 1.0 if self._is_whole else rates.share_of_batch(self.batch)
        return [share * rate for rate in rates.bounded(sizes, slopes, float(loss))]

    def _take_gradients(self) -> list[Tensor | None]:
        """Gradients of all weights in their coordinates; those of the weights are cleared."""
        found: list[Tensor | None] = []
        for weight, place in zip(self._weights, self._coordinates, strict=True):
            gradient, weight.grad = weight.grad, None
            if gradient is not None and place is not None:
                gradient = place.gradient(gradient)
            found.append(gradient)
        return found

    def _in_coordinates(self, values: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(values, self._coordinates, strict=True)
        return [value if place is None else place.coordinates(value) for value, place in pairs]

    def _moved(self, changes: Sequence[Tensor]) -> list[Tensor]:
        """Weights at some changes in coordinates."""
        parts = zip(self._start, changes, self._coordinates, strict=True)
        return [
            start + (change if place is None else place.change(change, start))
            for start, change, place in parts
        ]

    def _begin(self, changes: Sequence[Tensor]) -> None:
        """Set up the optimiser and the average at some changes in coordinates."""
        self._changes = [change.detach().clone() for change in changes]
        self._average = [change.clone() for change in self._changes]
        slower = [rate / SLOWER**self.slowed for rate in self._full_rates]
        groups = rates.groups(self._changes, slower)
        self._optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-10)
        self._rates = [group["lr"] for group in self._optimiser.param_groups]
        self._done = 0
        self._write()

    def _write(self) -> None:
        """Write the weights at the present changes into the engine."""
        with torch.no_grad():
            for weight, value in zip(self._weights, self._moved(self._changes), strict=True):
                weight.copy_(value)

    def slow_down(self, best: Best) -> None:
        """Go back to the best weights so far, or to the start if they are not better, and on at a smaller rate.

        Args:
            best: The best weights so far.
        """
        self.slowed += 1
        values = self._start
        if best.loss < float(best.start.mean()):
            values = [
                torch.from_numpy(best.weights[name]).to(w)
                for name, w in self._engine.weights.items()
            ]
        changes = [value - start for value, start in zip(values, self._start, strict=True)]
        self._begin(self._in_coordinates(changes))

    def _feature_variances(self) -> list[float]:
        """Variance of every feature about the means of its channels, on samples as they are."""
        totals: dict[str, list[float]] = defaultdict(list)
        for batch in itertools.islice(self.batches.unchanged(), VARIANCE_BATCHES):
            for feature in self.features:
                value = batch.truth[feature.tensor]
                axes = feature.narrowed or (1 % value.dim(),)
                others = [axis for axis in range(value.dim()) if axis not in axes]
                totals[feature.tensor].append(float(value.var(others, correction=0).mean()))
        return [max(float(np.mean(totals[f.tensor])), SMALLEST) for f in self.features]

    def step(self, progress: float) -> None:
        """One gradient step.

        Args:
            progress: Share of the budget that is used, on which the rate depends.
        """
        loss = self._loss(next(self.batches))
        if not math.isfinite(float(loss.detach())):
            raise Diverged
        _differentiate(loss)
        for change, gradient in zip(self._changes, self._take_gradients(), strict=True):
            change.grad = gradient
        share = rates.share(progress)
        for group, rate in zip(self._optimiser.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self._optimiser.step()
        with torch.no_grad():
            decay = min(DECAY, (1 + self._done) / (10 + self._done))
            torch._foreach_lerp_(self._average, self._changes, 1 - decay)
        self._write()
        self._done += 1

    def _loss(self, batch: Batch) -> Tensor:
        outputs = self._engine.run(batch.fed)
        found = dict(zip(self._part.tensors, outputs, strict=True))
        truth = batch.truth
        losses = []
        if self._terms:
            names = [term.tensor for term in self._terms]
            losses.append(
                objective_loss(self._terms, [truth[n] for n in names], [found[n] for n in names])
            )
        if self.features:
            names = [feature.tensor for feature in self.features]
            old, new = [truth[n] for n in names], [found[n] for n in names]
            losses.append(FEATURE_WEIGHT * feature_loss(self._variances, old, new))
        return torch.stack(losses).sum()

    def averaged(self) -> dict[str, Array]:
        """Copy the averages of the weights.

        Returns:
            Averages by the name of their initialiser, which later steps do not change.
        """
        return {
            name: value.cpu().numpy()
            for name, value in zip(self._engine.weights, self._moved(self._average), strict=True)
        }


def _differentiate(loss: Tensor) -> None:
    """Add the gradients of a loss to its weights; a branch of an If may depend on none."""
    if loss.requires_grad:
        loss.backward()


def _given(task: Task, part: Part) -> Given | None:
    """Function that computes the tensors in front of the part, by ONNX Runtime."""
    if not part.given:
        return None
    names = list(part.given)
    session = Session(
        with_outputs(task.pruned, names), task.runtime_device, what="the pruned model"
    )
    return lambda feed: dict(zip(names, session.run(feed, names), strict=True))


def _batch_size(task: Task) -> int:
    """Samples of one step: as many as keep the activations of all layers within the memory."""
    model, samples = task.pruned, task.samples
    if samples.whole:
        return 1
    if samples.fixed_batch:
        return samples.fixed_batch
    needed = {name for node in model.nodes for name in node.outputs if name in model.shapes}
    elements = sum(int(np.prod(model.shapes[name])) for name in needed - set(model.constants))
    each = BYTES_PER_ELEMENT * elements // max(model.batch, 1)
    return int(np.clip(task.memory // max(each, 1), 1, min(MAX_BATCH, samples.count)))
