"""The function ``recover``: trains a pruned model with its original as the teacher."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np
import onnx

from onnx_oamip.api.comparison import check_interface
from onnx_oamip.artifacts import plan_files, provenance
from onnx_oamip.artifacts.output import check_output
from onnx_oamip.artifacts.recovered_models import Recovered
from onnx_oamip.core.clock import Clock
from onnx_oamip.core.errors import DataError, GateFailed, ModelError
from onnx_oamip.core.progress import RECOVER, Progress
from onnx_oamip.core.records import Bools, Coupling, Model, Objective, Recovery
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import batching, dataset
from onnx_oamip.data.dataset import Samples
from onnx_oamip.data.feeds import run_size
from onnx_oamip.data.sources import File, Source, samples_of, source_name
from onnx_oamip.graph import cost, default_inputs, low_rank, op_libraries
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.loading import IN_MEMORY, ModelSource
from onnx_oamip.graph.runtime import Session, resolve_device
from onnx_oamip.objective import at_outputs, find_objective, scale
from onnx_oamip.recovery import recover as recovery
from onnx_oamip.recovery.judge import split
from onnx_oamip.recovery.recover import Pair
from onnx_oamip.verification import equivalence


def recover(
    pruned: ModelSource,
    original: ModelSource,
    data: Source,
    settings: Settings,
    output: File | None = None,
    *,
    plan_file: File | None = None,
    eval_data: Source | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> Recovered:
    """Train a pruned model, without labels, to answer as its original does.

    The pair may come from this package or from another tool. The graph and the shapes of its parameters stay as they
    are. If the objective does not fall on the held-out samples, the model is written as it was.

    Args:
        pruned: Model to train, a file or in memory.
        original: Model that it was pruned from.
        data: Samples, of which a fifth is held out if there are no evaluation data.
        settings: Options; ``recover`` is the effort (default ten minutes), ``augment`` the changes of samples.
        output: File to write, or None to write nothing.
        plan_file: Plan that the model was pruned by; narrower tensors are then compared by the channels that are kept.
        eval_data: Samples to judge on.
        progress: Called as ``progress(stage, done, total)``.
        stop: Asked after every step; True ends training with the best so far.

    Returns:
        The recovery, with the losses before and after.

    Raises:
        OamipError: Bad input or a missing package. No file is written.
        GateFailed: The models have different inputs or outputs, or the result fails a check. No file is written.
    """
    recovery.check()
    clock = Clock(progress, RECOVER)
    target = None
    if output is not None:
        target = check_output(pruned, output, (original, data, eval_data, plan_file))
    dataset.check_extras(data, eval_data)
    op_libraries.use(settings.op_library)
    device = resolve_device(settings.device)
    with clock("load"):
        teacher, student = (models.load(p, stated=settings.shapes) for p in (original, pruned))
        check_interface(teacher, student)
        samples, held = samples_of(teacher, data, eval_data, settings)
        teacher, student = (dataset.at_data(model, samples) for model in (teacher, student))
        check_output_shapes(teacher, student)
        session = Session(teacher.proto, device, what=_named("the original", teacher))
        samples = batching.tried(session, samples, settings.batch_size)
        held = batching.alike(session, samples, held)
        what = _named("the pruned model", student)
        Session(student.proto, device, what=what).run(next(samples.batches(1))[1])
        samples, judged = split(samples, held, settings.seed)
        pair = Pair(teacher, student, *planned_units(plan_file, teacher, student))
    with clock("objective"):
        objective = find_objective(teacher, settings, samples, held)
        objective = at_outputs(teacher, objective, _other_tensors(teacher, student, objective))
        size = run_size(teacher, settings.activation_memory_limit)
        objective = scale(teacher, objective, samples, device, batch_size=size)
    with clock("recover"):
        proto, found = recovery.run(
            pair,
            objective,
            samples,
            judged,
            settings,
            device=device,
            measured=held,
            progress=progress,
            stop=stop,
        )
    with clock("verify"):
        _verify(teacher, student, proto, samples, device)
    proto, opened = default_inputs.reopen(proto, student)
    result = Recovered(
        original=teacher,
        pruned=student,
        model=proto,
        output=None,
        output_sha256=None,
        recovery=found,
        objective=objective,
        timings=clock.seconds,
        settings={
            **settings.model_dump(mode="json"),
            "device": device,
            "data": source_name(data),
            "eval_data": source_name(eval_data),
            "plan": None if plan_file is None else str(plan_file),
        },
        notes=(
            *_larger(teacher, student),
            *samples.notes,
            *objective.notes,
            *recovery.notes(found),
            *_refitted(student, found),
            *opened,
        ),
    )
    if target is None:
        return result
    with clock("write"):
        written = result.save(target)
    return replace(written, timings=clock.seconds)


def check_output_shapes(original: Model, pruned: Model) -> None:
    """Check that the outputs of two models have the same shapes, where both are known.

    Args:
        original: The original, at the sizes of the data.
        pruned: The pruned model, at the same sizes.

    Raises:
        GateFailed: An output has another shape.
    """
    for port in original.outputs:
        ours, theirs = original.shapes.get(port.name), pruned.shapes.get(port.name)
        if ours is not None and theirs is not None and ours != theirs:
            raise GateFailed(
                f"the output '{port.name}' has the shape {list(ours)} in the original and {list(theirs)} in the "
                "pruned model; give the model that it was pruned from."
            )


def _named(role: str, model: Model) -> str:
    """Role of a model in the recovery, with its path if it has one."""
    return role if model.path == IN_MEMORY else f"{role} ({model.path})"


def _larger(original: Model, pruned: Model) -> tuple[str, ...]:
    """Note about a pruned model that is larger than its original."""
    before, after = cost.count(original), cost.count(pruned)
    measured = (("parameters", before.params, after.params), ("MACs", before.macs, after.macs))
    larger = [
        f"{name} ({there:,} against {here:,})" for name, here, there in measured if there > here
    ]
    if not larger:
        return ()
    note = f"the pruned model has more {' and '.join(larger)} than the original; see whether the two are swapped"
    return (note,)


def _other_tensors(original: Model, pruned: Model, objective: Objective) -> list[str]:
    """Tensors of the objective that the pruned model lacks, or that have another shape there."""
    known = {name for node in pruned.nodes for name in node.outputs}
    wide = original.shapes
    narrow = pruned.shapes
    return [
        name
        for name in objective.tensors
        if name not in known or narrow.get(name, wide.get(name)) != wide.get(name, narrow.get(name))
    ]


def planned_units(
    plan_file: File | None, original: Model, pruned: Model
) -> tuple[Coupling | None, Bools | None]:
    """Find the units of the original, and those that a plan keeps.

    Args:
        plan_file: The plan, or None.
        original: The original.
        pruned: The model that was pruned by the plan.

    Returns:
        The units, without axes of rotated groups, and whether each is kept (n_units,); None for both without a plan.

    Raises:
        DataError: The plan is that of another model.
    """
    if plan_file is None:
        return None, None
    found = plan_files.load(plan_file)
    weights = plan_files.factored_weights(found)
    if weights:
        places = [place for place in low_rank.candidates(original) if place.weight in weights]
        original = low_rank.factored(original, places)
    coupling = couple(original)
    matched = plan_files.match_units(found, original, coupling, plan_file)
    keep = matched.keep
    entry = provenance.read(pruned.proto)
    if entry is not None and entry.get("plan_sha256") != plan_files.digest(
        original, coupling, keep
    ):
        raise DataError(
            f"{pruned.path} was not pruned by {plan_file}, which keeps other units; give the plan that it was made by, "
            "or none."
        )
    return _of_channels(coupling, matched.rotated), keep


def _of_channels(coupling: Coupling, rotated: Collection[str]) -> Coupling:
    """The coupling without the axes of rotated groups, whose components are compared by projections of channels."""
    components = [group.units for group in coupling.groups if group.name in rotated]
    if not components:
        return coupling
    units = np.concatenate(components)
    axes = {
        axis: labels for axis, labels in coupling.axes.items() if not np.isin(labels, units).any()
    }
    return replace(coupling, axes=axes)


def _refitted(pruned: Model, found: Recovery) -> tuple[str, ...]:
    """The likely reason why a model of this package was not recovered."""
    if found.accepted or provenance.read(pruned.proto) is None:
        return ()
    reason = (
        "if the pruned model was refitted to these samples, the held-out ones judge it too kindly: give other samples, "
        "or prune with `recover`, which trains behind the refit and holds its samples out of both"
    )
    return (reason,)


def _verify(
    original: Model, pruned: Model, proto: onnx.ModelProto, samples: Samples, device: str
) -> None:
    """Raises GateFailed where the trained model is not valid or does not run."""
    equivalence.structure(proto)
    try:
        session = Session(proto, device, what="the recovered model")
        equivalence.runs_at(
            original, session, samples, lambda: Session(pruned.proto, device, what=pruned.path)
        )
    except ModelError as error:
        raise GateFailed(
            f"{str(error).rstrip('.')}; nothing was written, please report this model."
        ) from error
