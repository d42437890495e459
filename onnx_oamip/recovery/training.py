"""Distillation: gradient steps on the weights of a pruned model, with the original as the teacher.

The loss is the objective of the run plus errors of features, at which blocks end. Against overfitting, weights are
averaged over steps, and samples are changed at random; a sample that is changed gets its answer from the original.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import onnx
import torch

from onnx_oamip.core.errors import EnvironmentMissing
from onnx_oamip.core.options.recovery import Effort
from onnx_oamip.recovery.judge import FEWEST, Best, written
from onnx_oamip.recovery.selection import trained_part
from onnx_oamip.recovery.steps import Diverged, Run
from onnx_oamip.recovery.task import Task

WORSE = 3.0
"""Loss over the lowest one so far, or over that of the start, from which the rate was too large."""
EVALUATIONS = 20
"""Times that held-out samples are judged."""
LEAST_INTERVAL = 10
"""Fewest steps between two of them."""
PATIENCE = 15
"""Evaluations without a better one after which training stops."""

NOTHING, TOO_FEW, DIVERGED = "nothing to train", "too few samples", "diverged"
"""Ends of a training that gave no model."""


@dataclass(frozen=True)
class Trained:
    """Result of training.

    Attributes:
        proto: The best model, None where none was better than the start.
        best: Losses on held-out samples.
        steps: Steps that were done.
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
    """Train all weights of a pruned model together.

    Args:
        task: Models, samples and loss.
        effort: Steps or seconds.

    Returns:
        The best model by the judge, and how it was found.
    """
    budget = _Budget(effort)
    torch.manual_seed(task.seed)
    best = Best(task.judge.losses(task.pruned.proto), PATIENCE)
    part, left_out = trained_part(task)
    if not part.weights or not part.tensors:
        return _untrained(best, NOTHING, left_out)
    if best.start.size < FEWEST:
        return _untrained(best, TOO_FEW, left_out)
    run = Run(task, part)
    ended = _run_until_end(task, run, best, budget)
    proto = written(task.pruned.proto, best.weights) if best.is_better else None
    return Trained(
        proto=proto,
        best=best,
        steps=budget.done,
        slowed=run.slowed,
        batch=run.batch,
        held_bytes=run.batches.held_bytes,
        seconds=budget.seconds,
        ended=ended,
        weights=part.weights,
        features=tuple(feature.tensor for feature in run.features),
        left_out=left_out,
    )


def _untrained(best: Best, ended: str, left_out: tuple[str, ...]) -> Trained:
    """Result without a step."""
    return Trained(
        proto=None,
        best=best,
        steps=0,
        slowed=0,
        batch=0,
        held_bytes=0,
        seconds=0.0,
        ended=ended,
        weights=(),
        features=(),
        left_out=left_out,
    )


def _run_until_end(task: Task, run: Run, best: Best, budget: _Budget) -> str:
    """Train until the budget or something else ends it; the reason."""
    judged = 0
    while True:
        try:
            run.step(budget.progress)
        except Diverged:
            return DIVERGED
        budget.count()
        if task.progress is not None:
            task.progress(_stage(best), budget.done, budget.expected)
        is_interrupted = task.stop is not None and task.stop()
        is_due = budget.progress * EVALUATIONS >= len(best.curve) + 1
        is_due &= budget.done >= judged + LEAST_INTERVAL
        if budget.is_over or is_due or is_interrupted:
            judged = budget.done
            weights = run.averaged()
            best.offer(judged, task.judge.losses(written(task.pruned.proto, weights)), weights)
            if best.curve[-1][1] > WORSE * min(best.loss, float(best.start.mean())):
                run.slow_down(best)
        if is_interrupted:
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
        self.progress = 0.0

    def count(self) -> None:
        """Count one step."""
        self.done += 1
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
