"""Comparison of a pruned model with its original on samples."""

from __future__ import annotations

from dataclasses import replace

from onnx_oamip.core.errors import GateFailed
from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import (
    Model,
    Verification,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import batching, dataset
from onnx_oamip.data.dataset import Samples
from onnx_oamip.data.feeds import comparison_size
from onnx_oamip.data.sources import Source
from onnx_oamip.graph import loading as models
from onnx_oamip.graph import op_libraries
from onnx_oamip.graph.loading import ModelSource
from onnx_oamip.graph.runtime import Session, resolve_device
from onnx_oamip.objective import at_outputs, find_objective, scale
from onnx_oamip.objective import metric as metrics
from onnx_oamip.verification import equivalence


def compare(
    original: ModelSource,
    pruned: ModelSource,
    source: Source,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare a pruned model with its original: validity, two batch sizes, output error, agreement, accuracy.

    Args:
        original: Model before pruning, a file or in memory.
        pruned: Model after pruning.
        source: Samples to compare on; the evaluation part if there is one.
        settings: Device, batch size and options for images and tables.
        progress: Called as ``progress(stage, done, total)``.

    Returns:
        The checks and measurements.

    Raises:
        OamipError: Bad input or a missing package.
        GateFailed: The models have different inputs or outputs, or the pruned model is not valid.
    """
    settings = settings or Settings.create()
    dataset.check_extras(source)
    op_libraries.use(settings.op_library)
    device = resolve_device(settings.device)
    model, other = (models.load(path, stated=settings.shapes) for path in (original, pruned))
    check_interface(model, other)
    held = dataset.load(source, model, dataset.EVALUATION, settings.reading)
    samples = held or dataset.load(source, model, reading=settings.reading)
    assert samples is not None
    return compare_on(model, other, samples, settings, device=device, progress=progress)


def check_interface(original: Model, pruned: Model) -> None:
    """Check that two models have the same inputs and outputs.

    Args:
        original: The original.
        pruned: The pruned model.

    Raises:
        GateFailed: Names or types differ.
    """
    for ours, theirs, what in (
        (original.inputs, pruned.inputs, "input"),
        (original.outputs, pruned.outputs, "output"),
    ):
        names, others = ([port.name for port in ports] for ports in (ours, theirs))
        if names != others:
            raise GateFailed(
                f"the two models have different {what}s: {', '.join(names)} against {', '.join(others)}."
            )
        for one, other in zip(ours, theirs, strict=True):
            if one.dtype != other.dtype:
                kinds = ["text" if port.dtype == object else port.dtype for port in (one, other)]
                raise GateFailed(
                    f"the {what} '{one.name}' is {kinds[0]} in the original and {kinds[1]} in the pruned model; give "
                    "two models of the same types."
                )


def compare_on(
    model: Model,
    other: Model,
    samples: Samples,
    settings: Settings,
    *,
    device: str,
    progress: Progress | None = None,
) -> Verification:
    """Compare two loaded models with the same interface on samples.

    Args:
        model: Model before pruning.
        other: Model after pruning.
        samples: Samples to compare on.
        settings: Objective, batch size and metric.
        device: Device to run on.
        progress: Called as ``progress(stage, done, total)``.

    Returns:
        The checks and measurements.

    Raises:
        GateFailed: The second model is not valid.
        DataError: The samples do not fit the model.
    """
    model = dataset.at_data(model, samples)
    size = comparison_size(model, settings.batch_size, settings.activation_memory_limit)
    trial = Session(model.proto, device, what=model.path)
    samples = batching.tried(trial, samples, size)
    named = {name for node in other.nodes for name in node.outputs}
    objective = find_objective(model, settings, samples)
    lacking = [t for t in objective.tensors if t not in named | {p.name for p in other.outputs}]
    objective = at_outputs(model, objective, lacking)
    objective = scale(model, objective, samples, device, batch_size=size)
    equivalence.structure(other.proto)
    after = equivalence.watch(model, objective, device, other.proto, other.path)
    before = equivalence.watch(model, objective, device, what=model.path)
    batches = equivalence.runs_at(model, after, samples, lambda: before)
    found = equivalence.compare(
        model,
        objective,
        before,
        after,
        samples=samples,
        batch_size=size,
        progress=progress,
    )
    equivalence.numbers(model, found)
    if settings.metric is not None:
        metric = metrics.load(settings.metric)
        values = equivalence.user_metric(
            metric,
            model,
            other.proto,
            samples=samples,
            device=device,
            batch_size=size,
        )
        found = replace(found, metric=values)
    notes = (*objective.notes, *equivalence.few_samples(found.samples))
    return replace(found, batches=batches, objective=replace(objective, notes=notes))
