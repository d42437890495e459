"""Recovery of a pruned model: what is trained, on which samples, and whether the result is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx

from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.extras import imports_of
from onnx_oamip.core.options.recovery import DEFAULT_EFFORT, effort_of
from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import Bools, Coupling, Model, Objective, Recovery
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import augmentation
from onnx_oamip.data.dataset import EVALUATION_PARTS, Samples
from onnx_oamip.data.feeds import run_size
from onnx_oamip.data.repeated import repeated
from onnx_oamip.recovery import features, projections
from onnx_oamip.recovery.judge import FEWEST, Judge, is_lower
from onnx_oamip.recovery.task import Task

if TYPE_CHECKING:
    from onnx_oamip.recovery.training import Trained

MOST_REPEATED = 0.1
"""Share of the judging samples that may equal samples of the training without a note."""


@dataclass(frozen=True)
class Pair:
    """A pruned model with its original.

    Attributes:
        original: The original.
        pruned: The pruned model, at the shapes of the same samples.
        coupling: Units of the original, None where no plan is known.
        keep: Units that were kept (n_units,), None where no plan is known.
    """

    original: Model
    pruned: Model
    coupling: Coupling | None = None
    keep: Bools | None = None


def check() -> None:
    """Check that torch is installed, before any work.

    Raises:
        EnvironmentMissing: It is not.
    """
    with imports_of("recover", "recovery"):
        import onnx_oamip.recovery.training  # noqa: F401


def run(
    pair: Pair,
    objective: Objective,
    samples: Samples,
    judged: Samples,
    settings: Settings,
    *,
    device: str,
    measured: Samples | None = None,
    unrecovered: onnx.ModelProto | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[onnx.ModelProto, Recovery]:
    """Train a pruned model, and decide whether the result is taken.

    Args:
        pair: Both models.
        objective: Terms with scales.
        samples: Samples to train on.
        judged: Held-out samples that judge.
        settings: Effort, changes of samples, device, memory and seed.
        device: Device of ONNX Runtime.
        measured: Samples on which the result is measured; those that judge by default.
        unrecovered: Model that is taken where the trained one is refused; the pruned one by default.
        progress: Callback ``(stage, done, total)``.
        stop: Asked after every step; True ends training with the best so far.

    Returns:
        The trained model, and how it was trained. The unrecovered model takes its place where the objective did not
        fall on the samples that judge, or where the unrecovered model loses less on the measured samples.

    Raises:
        EnvironmentMissing: torch is not installed.
        SettingsError: There is nothing to judge by, a graph input takes texts, or the changes of samples cannot be
            imported.
    """
    _check_inputs_and_outputs(pair.original, objective)
    with imports_of("recover", "recovery"):
        from onnx_oamip.recovery import training

    size = run_size(pair.original, settings.activation_memory_limit)
    first = next(samples.batches(size))[1]
    chosen = augmentation.for_training(settings.augment, pair.original, first)
    judge = Judge(pair.original, objective, judged, device=device, batch_size=size)
    final = judge
    if measured is not None and measured is not judged:
        final = Judge(pair.original, objective, measured, device=device, batch_size=size)
    torch_device = training.resolve_device(settings.device)
    compared, features_left_out = _features(
        pair, samples, device, batch_size=size, seed=settings.seed
    )
    task = Task(
        original=pair.original,
        pruned=pair.pruned,
        objective=objective,
        features=compared,
        samples=samples,
        judge=judge,
        device=torch_device,
        runtime_device=device,
        memory=settings.activation_memory_limit,
        seed=settings.seed,
        augment=chosen.function,
        progress=progress,
        stop=stop,
    )
    trained = training.train(task, effort_of(settings.recover or DEFAULT_EFFORT))
    for feature in compared:
        if trained.weights and feature.tensor not in trained.features:
            features_left_out[feature.tensor] = "it is no part of what is trained"
    best = trained.best
    proto = unrecovered or pair.pruned.proto
    if trained.proto is None:
        refusal = _refusal(trained, judged.count)
    elif unrecovered is not None and final is not judge:
        refusal = _refusal_by_measure(final, trained.proto, unrecovered)
    else:
        refusal = ""
    if trained.proto is not None and not refusal:
        proto = trained.proto
    return proto, Recovery(
        accepted=not refusal,
        refusal=refusal,
        before=float(best.start.mean()),
        after=best.loss if best.curve else None,
        steps=trained.steps,
        slowed=trained.slowed,
        best_step=best.step,
        batch=trained.batch,
        held_bytes=trained.held_bytes,
        seconds=trained.seconds,
        ended=trained.ended,
        samples=samples.count,
        held_out=judged.count,
        repeated=repeated(judged, samples),
        augment=chosen.description,
        device=torch_device,
        weights=len(trained.weights),
        features=trained.features,
        features_left_out=features_left_out,
        left_out=trained.left_out,
        curve=tuple(best.curve),
        outputs_before=final.measures(pair.pruned.proto),
        outputs=final.measures(proto),
    )


def _features(
    pair: Pair, samples: Samples, device: str, *, batch_size: int, seed: int
) -> tuple[tuple[features.Feature, ...], dict[str, str]]:
    """Tensors that are compared, by channels where these are known, else by combinations; reasons against others."""
    by_channel = features.features(pair.original, pair.pruned, pair.coupling, pair.keep)
    combined = projections.projected(
        pair.original,
        pair.pruned,
        {feature.tensor for feature in by_channel},
        samples,
        device=device,
        batch_size=batch_size,
        seed=seed,
    )
    return (*by_channel, *combined.features), dict(combined.left_out)


def _check_inputs_and_outputs(original: Model, objective: Objective) -> None:
    """Raises SettingsError where there is nothing to judge by, and for inputs that torch has not."""
    if not objective.judged:
        raise SettingsError(
            "a recovery needs an output to judge by, and all are ignored; leave out `task` or `outputs`."
        )
    texts = [port.name for port in original.inputs if port.dtype == object]
    if texts:
        raise SettingsError(
            f"a recovery runs the whole model in torch, which has no texts, and the graph input '{texts[0]}' takes "
            "texts; leave out `recover`."
        )


def _refusal(trained: Trained, held_out: int) -> str:
    """Clause about a training that gave no model, or none with a lower objective; of the number of held-out samples."""
    from onnx_oamip.recovery import training

    start = trained.best.start
    before = float(start.mean())
    if not np.isfinite(before):
        return "the held-out objective of the pruned model is no finite number"
    if trained.ended == training.NOTHING:
        return "it has no weights that torch can train"
    if trained.ended == training.TOO_FEW:
        return _too_few(start.size, held_out)
    if trained.ended == training.DIVERGED:
        return "its loss rose beyond all numbers"
    return f"the held-out objective ({before:.4g}) did not fall by more than noise"


def _too_few(losses: int, held_out: int) -> str:
    """Clause about too few losses of held-out samples, which may be those of whole feeds."""
    in_feed = max(round(held_out / losses), 1)
    judges = f"{losses} held-out {'sample' if losses == 1 else 'samples'}"
    if in_feed > 1:
        judges = f"{losses} {'feed' if losses == 1 else 'feeds'} of {in_feed} held-out samples"
    return (
        f"it is judged by {judges}, too few to tell a gain from noise; "
        f"{FEWEST * EVALUATION_PARTS * in_feed} samples in all are needed"
    )


def _refusal_by_measure(
    measured: Judge, trained: onnx.ModelProto, unrecovered: onnx.ModelProto
) -> str:
    """Clause about a trained model that loses more than the unrecovered one, which is refitted to more samples.

    The samples that judge the training are among these, so that only samples that neither has seen compare the two.
    """
    with_training, without = measured.losses(trained), measured.losses(unrecovered)
    if not is_lower(without, with_training):
        return ""
    return (
        f"its objective on the evaluation data ({with_training.mean():.4g}) is above that of the unrecovered model "
        f"({without.mean():.4g})"
    )


def notes(recovery: Recovery, *, refitted: int | None = None) -> tuple[str, ...]:
    """State what a reader of the report should know about a recovery.

    Args:
        recovery: The recovery.
        refitted: Samples to which the unrecovered model was refitted, where these are more than those of the training;
            else None.

    Returns:
        Notes for the report.
    """
    found = []
    if not recovery.accepted:
        which = "" if refitted is None else f", refitted to all {refitted:,} samples"
        found.append(
            f"the recovery was not taken, as {recovery.refusal}; the model is the unrecovered one{which}"
        )
    if recovery.left_out:
        listed = "; ".join(recovery.left_out[:3])
        more = "; ..." if len(recovery.left_out) > 3 else ""
        trained = "only a part" if recovery.weights else "nothing"
        found.append(
            f"the recovery trained {trained} of the model, as torch does not compute {listed}{more}"
        )
    if recovery.repeated > MOST_REPEATED * recovery.held_out:
        found.append(
            f"{recovery.repeated:,} of the {recovery.held_out:,} samples that judge the recovery equal samples that it "
            "trains on, so that the gain on new samples may be smaller, or none"
        )
    return tuple(found)
