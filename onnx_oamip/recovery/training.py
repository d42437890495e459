"""Distillation: gradient steps on the weights of a pruned model, with the original as the teacher.

The loss is the objective of the run plus errors of features, at which blocks end. In the first part of the budget
gradients stop there, so that every block is a problem of its own: its input comes from the pruned blocks in front, its
target is the original's feature. Against overfitting, weights are pulled towards their start, averaged over steps, and
samples are changed at random; a sample that is changed gets its answer from the original.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch

from onnx_oamip.core.errors import EnvironmentMissing
from onnx_oamip.core.options.recovery import Effort
from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import Array, Model
from onnx_oamip.core.records.objective import Objective
from onnx_oamip.data.augmentation import Augment
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph.outputs import with_outputs
from onnx_oamip.graph.runtime import Session
from onnx_oamip.recovery import parts
from onnx_oamip.recovery.batches import Batch, Batches, Given, Teacher, fed
from onnx_oamip.recovery.engine import CannotRun, Engine, is_supported, trainable
from onnx_oamip.recovery.features import Feature
from onnx_oamip.recovery.judge import Best, Judge, written
from onnx_oamip.recovery.losses import differentiable, feature_loss, objective_loss
from onnx_oamip.recovery.operators.calls import Tensor
from onnx_oamip.recovery.parts import Part

RATE = 1e-2
"""Largest change of a weight in one step, over the root mean square of its tensor."""
TENSOR_SHARE = 0.05
"""Share of the loss that one step may take away through one tensor, as its gradient predicts; above it the rate of the
tensor is smaller."""
STEP_SHARE = 0.6
"""The same for all tensors together."""
GRADIENT_BATCHES = 4
"""Batches on which that gradient is found."""
WARM_UP = 0.05
"""Share of the budget in which the rate rises."""
LEAST_RATE = 0.1
"""Share of the full rate at the first step."""
WORSE = 3.0
"""Loss over the lowest one so far, or over that of the start, from which the rate was too large."""
SLOWER = 10.0
"""Divisor of the rate where it was too large."""
BLOCK_SHARE = 0.3
"""Share of the budget in which every block is trained for itself."""
PULL = 2e-3
"""Share of the way back to its start that a weight is pulled in every step at the full rate."""
DECAY = 0.98
"""Share of the former average in the average of weights over steps."""
FEATURE_WEIGHT = 2.0
"""Weight of the features against the objective."""
MAX_BATCH = 32
"""Samples of one step, at most."""
BYTES_PER_ELEMENT = 8
"""An activation in float32 and its gradient."""
EVALUATIONS = 20
"""Times that held-out samples are judged."""
LEAST_INTERVAL = 10
"""Fewest steps between two of them."""
PATIENCE = 15
"""Evaluations without a better one after which training stops."""
VARIANCE_BATCHES = 4
"""Batches on which the variance of features is found."""
TOLERANCE = 0.02
"""Relative error of a tensor against ONNX Runtime above which an operator counts as computed differently."""
SMALLEST = 1e-12


@dataclass(frozen=True)
class Task:
    """Model to train, with its teacher, data and judge.

    Attributes:
        original: The teacher.
        pruned: The model to train.
        objective: Terms with scales.
        features: Tensors besides the objective's that are compared.
        samples: Samples to train on.
        judge: Loss on held-out samples.
        device: ``cpu`` or ``cuda``, of torch.
        runtime_device: Device of ONNX Runtime.
        memory: Bytes of activations.
        seed: Seed of the order of samples and of their changes.
        augment: Changes of feeds, or None.
        progress: Callback ``(stage, done, total)``.
        stop: Asked after every step; True ends training with the best so far.
    """

    original: Model
    pruned: Model
    objective: Objective
    features: tuple[Feature, ...]
    samples: Samples
    judge: Judge
    device: str
    runtime_device: str
    memory: int
    seed: int
    augment: Augment | None = None
    progress: Progress | None = None
    stop: Callable[[], bool] | None = None


@dataclass(frozen=True)
class Trained:
    """Result of training.

    Attributes:
        proto: The best model, None where none was better than the start.
        best: Losses on held-out samples.
        steps: Steps that were done.
        block_steps: Those of them in which every block was trained for itself.
        slowed: Times that the rate was divided because it was too large.
        batch: Samples of one step.
        held_bytes: Bytes of answers of the original that were held to be used again.
        seconds: Time that the steps took, with their evaluations.
        ended: Why training ended.
        weights: Initialisers that were trained.
        features: Tensors that were compared besides the objective's.
        left_out: Nodes that torch cannot compute, with the reason.
    """

    proto: onnx.ModelProto | None
    best: Best
    steps: int
    block_steps: int
    slowed: int
    batch: int
    held_bytes: int
    seconds: float
    ended: str
    weights: tuple[str, ...]
    features: tuple[str, ...]
    left_out: tuple[str, ...]


def resolve_device(device: str) -> str:
    """Choose the device of torch.

    Args:
        device: ``cpu``, ``cuda``, or ``auto`` for CUDA where torch has it.

    Returns:
        ``cpu`` or ``cuda``.

    Raises:
        EnvironmentMissing: CUDA is requested but torch has none.
    """
    if device == "cpu":
        return device
    if torch.cuda.is_available():
        return "cuda"
    if device == "auto":
        return "cpu"
    raise EnvironmentMissing(
        "`device=cuda` was asked for but this torch has no CUDA; install a build of torch with CUDA, or use "
        "`device=cpu`."
    )


def train(task: Task, effort: Effort) -> Trained:
    """Train a pruned model, first every block for itself, then all weights together.

    Args:
        task: Models, samples and loss.
        effort: Steps or seconds.

    Returns:
        The best model by the judge, and how it was found.
    """
    budget = _Budget(effort)
    torch.manual_seed(task.seed)
    best = Best(task.judge.losses(task.pruned.proto), PATIENCE)
    part, left_out = _trained_part(task)
    if not part.weights or not part.tensors:
        return Trained(None, best, 0, 0, 0, 0, 0, 0.0, "nothing to train", (), (), left_out)
    run = _Run(task, part)
    ended = _run_until_end(task, run, best, budget)
    proto = written(task.pruned.proto, best.weights) if best.is_better else None
    return Trained(
        proto=proto,
        best=best,
        steps=budget.done,
        block_steps=budget.block_steps,
        slowed=run.slowed,
        batch=run.batch,
        held_bytes=run.batches.held_bytes,
        seconds=budget.seconds,
        ended=ended,
        weights=part.weights,
        features=tuple(feature.tensor for feature in run.features),
        left_out=left_out,
    )


def _run_until_end(task: Task, run: _Run, best: Best, budget: _Budget) -> str:
    """Train until the budget or something else ends it; the reason."""
    judged = 0
    while True:
        by_blocks = bool(run.features) and budget.progress < BLOCK_SHARE
        try:
            run.step(budget.progress, by_blocks=by_blocks)
        except _Diverged:
            return "diverged"
        budget.count(by_blocks=by_blocks)
        if task.progress is not None:
            task.progress(_stage(best), budget.done, budget.expected)
        is_due = budget.progress * EVALUATIONS >= len(best.curve) + 1
        if budget.is_over or (is_due and budget.done >= judged + LEAST_INTERVAL):
            judged = budget.done
            weights = run.averaged()
            best.offer(judged, task.judge.losses(written(task.pruned.proto, weights)), weights)
            if best.curve[-1][1] > WORSE * min(best.loss, float(best.start.mean())):
                run.slow_down(best)
        if task.stop is not None and task.stop():
            return "interrupted"
        if budget.is_over:
            return "budget"
        if best.has_stalled:
            return "no improvement"


class _Budget:
    """Steps or time of a training, and how much of it is used."""

    def __init__(self, effort: Effort) -> None:
        self._effort = effort
        self._started = time.monotonic()
        self.done = 0
        self.block_steps = 0
        self.progress = 0.0

    def count(self, *, by_blocks: bool) -> None:
        """Count one step."""
        self.done += 1
        self.block_steps += by_blocks
        if self._effort.seconds is not None:
            self.progress = min(self.seconds / self._effort.seconds, 1.0)
        else:
            assert self._effort.steps is not None
            self.progress = self.done / self._effort.steps

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def is_over(self) -> bool:
        """True if nothing is left."""
        return self.progress >= 1

    @property
    def expected(self) -> int:
        """Number of steps at the end, estimated where the budget is a time."""
        return self._effort.steps or max(self.done, round(self.done / self.progress))


def _stage(best: Best) -> str:
    """Name of the stage with the loss before and after, for the display of progress."""
    start = float(best.start.mean())
    if not best.curve:
        return f"recover: held-out loss {start:.4f}"
    return f"recover: held-out loss {start:.4f} -> {best.loss:.4f}"


class _Diverged(Exception):
    """The loss is no finite number."""


# ----------------------------------------------------------------------------------------------- what is trained


def _trained_part(task: Task) -> tuple[Part, tuple[str, ...]]:
    """The part that torch computes as ONNX Runtime does, and the nodes that limit it."""
    model = task.pruned
    wanted = _wanted(task)
    needed = parts.ancestors(model, wanted)
    reasons = {
        node.name: f"{node}: torch has no function for it"
        for node in needed
        if not is_supported(node)
    }
    feed = next(task.samples.batches(1))[1]
    while True:
        part = parts.choose(model, wanted, reasons, lambda nodes: trainable(model, nodes))
        if not part.weights or not part.tensors:
            return part, tuple(reasons.values())
        found = _first_difference(task, part, feed)
        if found is None:
            return part, tuple(reasons.values())
        reasons[found[0]] = found[1]


def _wanted(task: Task) -> list[str]:
    terms = [term.tensor for term in differentiable(task.objective)]
    names = (*terms, *(feature.tensor for feature in task.features))
    return parts.floating(task.pruned, dict.fromkeys(names))


def _first_difference(task: Task, part: Part, feed: Mapping[str, Array]) -> tuple[str, str] | None:
    """Name of the first node that torch cannot compute as ONNX Runtime does, and the reason; None if there is none."""
    model = task.pruned
    engine = Engine(model, part.tensors, given=part.given)
    tensors = [*part.tensors, *part.given]
    values = _runtime_values(task, tensors, feed)
    given = fed({**feed, **{name: values[name] for name in part.given}}, "cpu")
    try:
        with torch.no_grad():
            found = engine.run(given)
    except CannotRun as error:
        home = model.homes[error.node.name]
        return home, f"{error.node}: {error.reason}"
    if all(_is_close(a, values[n]) for n, a in zip(part.tensors, found, strict=True)):
        return None
    return _locate(task, part, given, feed)


def _runtime_values(
    task: Task, tensors: Sequence[str], feed: Mapping[str, Array]
) -> dict[str, Array]:
    names = list(dict.fromkeys(tensors))
    session = Session(with_outputs(task.pruned, names), "cpu", exact=True)
    return dict(zip(names, session.run(feed, names), strict=True))


def _locate(
    task: Task, part: Part, given: Mapping[str, Tensor], feed: Mapping[str, Array]
) -> tuple[str, str]:
    """The node whose output is the first to differ."""
    model = task.pruned
    nodes = parts.ancestors(model, part.tensors, part.given)
    tensors = parts.floating(model, (name for node in nodes for name in node.outputs if name))
    values = _runtime_values(task, tensors, feed)
    with torch.no_grad():
        found = dict(zip(tensors, Engine(model, tensors, given=part.given).run(given), strict=True))
    for node in nodes:
        for name in node.outputs:
            if name in found and not _is_close(found[name], values[name]):
                return node.name, f"{node}: torch computes it differently"
    return nodes[-1].name, f"{nodes[-1]}: torch computes it differently"


def _is_close(found: Tensor, truth: Array) -> bool:
    ours = found.detach().numpy().astype(np.float64)
    theirs = truth.astype(np.float64)
    if ours.shape != theirs.shape:
        return False
    known = np.isfinite(theirs)
    error = np.linalg.norm((ours - theirs)[known])
    return bool(error <= TOLERANCE * np.linalg.norm(theirs[known]) + SMALLEST)


# -------------------------------------------------------------------------------------------------------- the steps


class _Run:
    """State of training: engine, optimiser, and averages of weights."""

    def __init__(self, task: Task, part: Part) -> None:
        self._part = part
        self._engine = Engine(
            task.pruned, part.tensors, given=part.given, device=task.device, weights=part.weights
        )
        compared = set(part.tensors)
        self._terms = [t for t in differentiable(task.objective) if t.tensor in compared]
        self.features = tuple(f for f in task.features if f.tensor in compared)
        self._ends = frozenset(feature.tensor for feature in self.features)
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
        self.slowed = 0
        self._full_rates = self._bounded_rates()
        self._begin()

    def _bounded_rates(self) -> list[float]:
        """Full rate of every weight: proportional to its size, and bounded by the fall of the loss that it predicts.

        Where the gradient predicts that a step takes away all of the loss, the step is much too long: the loss is not
        linear that far.
        """
        loss = torch.zeros(())
        for _ in range(GRADIENT_BATCHES):
            part = self._loss(next(self.batches), frozenset())
            part.backward()
            loss = loss + part.detach()
        slopes = [0.0 if w.grad is None else float(w.grad.abs().sum()) for w in self._weights]
        for weight in self._weights:
            weight.grad = None
        return _bounded(_sizes(self._weights), slopes, float(loss))

    def _begin(self) -> None:
        """Set up the optimiser and the average for the present weights."""
        rates = [rate / SLOWER**self.slowed for rate in self._full_rates]
        groups = _groups(self._weights, rates)
        self._optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-10)
        self._rates = [group["lr"] for group in self._optimiser.param_groups]
        self._average = [weight.detach().clone() for weight in self._weights]
        self._done = 0

    def slow_down(self, best: Best) -> None:
        """Go back to the best weights so far, or to the start if they are not better, and on at a smaller rate.

        Args:
            best: The best weights so far.
        """
        values = self._start
        if best.loss < float(best.start.mean()):
            values = [torch.from_numpy(best.weights[name]) for name in self._engine.weights]
        with torch.no_grad():
            for weight, value in zip(self._weights, values, strict=True):
                weight.copy_(value)
        self.slowed += 1
        self._begin()

    def _feature_variances(self) -> list[float]:
        """Variance of every feature about the means of its channels, on samples as they are."""
        totals: dict[str, list[float]] = defaultdict(list)
        for batch in itertools.islice(self.batches.unchanged(), VARIANCE_BATCHES):
            for feature in self.features:
                value = batch.truth[feature.tensor]
                axes = [axis for axis, _ in feature.kept] or [1 % value.dim()]
                others = [axis for axis in range(value.dim()) if axis not in axes]
                totals[feature.tensor].append(float(value.var(others, correction=0).mean()))
        return [max(float(np.mean(totals[f.tensor])), SMALLEST) for f in self.features]

    def step(self, progress: float, *, by_blocks: bool) -> None:
        """One gradient step.

        Args:
            progress: Share of the budget that is used, on which the rate depends.
            by_blocks: Every block is trained for itself: no gradient passes the end of a block.
        """
        loss = self._loss(next(self.batches), self._ends if by_blocks else frozenset())
        if not math.isfinite(float(loss.detach())):
            raise _Diverged
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        share = _share(progress)
        for group, rate in zip(self._optimiser.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self._optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(self._weights, self._start, PULL * share)
            decay = min(DECAY, (1 + self._done) / (10 + self._done))
            torch._foreach_lerp_(self._average, self._weights, 1 - decay)
        self._done += 1

    def _loss(self, batch: Batch, ends: Collection[str]) -> Tensor:
        outputs = self._engine.run(batch.fed, ends)
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
        """Averaged weights by the name of their initialiser, which later steps do not change."""
        return {
            name: value.cpu().numpy().copy()
            for name, value in zip(self._engine.weights, self._average, strict=True)
        }


def _given(task: Task, part: Part) -> Given | None:
    """Function that computes the tensors in front of the part, by ONNX Runtime."""
    if not part.given:
        return None
    names = list(part.given)
    session = Session(
        with_outputs(task.pruned, names), task.runtime_device, what="the pruned model"
    )
    return lambda feed: dict(zip(names, session.run(feed, names), strict=True))


def _share(progress: float) -> float:
    """Share of the full rate: a linear rise, then half a cosine to zero."""
    if progress < WARM_UP:
        return LEAST_RATE + (1 - LEAST_RATE) * progress / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def _sizes(weights: Sequence[Tensor]) -> list[float]:
    """Root mean square of every weight; that of the usual one where all its values are zero."""
    sizes = [float(weight.detach().square().mean().sqrt()) for weight in weights]
    usual = float(np.median([size for size in sizes if size > 0] or [1.0]))
    return [size if size > 0 else usual for size in sizes]


def _bounded(sizes: Sequence[float], slopes: Sequence[float], loss: float) -> list[float]:
    """Rates from sizes of weights, and the sums of the absolute values of their gradients."""
    rates = [RATE * size for size in sizes]
    if not (loss > 0 and math.isfinite(loss)):
        return rates
    shares = [rate * slope / loss for rate, slope in zip(rates, slopes, strict=True)]
    kept = [min(1.0, TENSOR_SHARE / share) if share > 0 else 1.0 for share in shares]
    total = sum(part * share for part, share in zip(kept, shares, strict=True))
    common = min(1.0, STEP_SHARE / total) if total > 0 else 1.0
    return [rate * part * common for rate, part in zip(rates, kept, strict=True)]


def _groups(weights: Sequence[Tensor], rates: Sequence[float]) -> list[dict[str, object]]:
    """Groups of weights of about the same rate."""
    groups: dict[int, list[Tensor]] = defaultdict(list)
    for weight, rate in zip(weights, rates, strict=True):
        groups[round(math.log2(rate))].append(weight)
    return [{"params": held, "lr": 2.0**power} for power, held in sorted(groups.items())]


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
    return int(np.clip(task.memory // max(each, 1), 1, MAX_BATCH))
