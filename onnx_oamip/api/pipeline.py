"""Stages of a run and their order: ``prune`` is ``plan`` and ``apply``; ``plan`` is preparation and search."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnx_oamip.api import prepare as preparing
from onnx_oamip.api import proof
from onnx_oamip.api.prepare import BUDGETS, prepare
from onnx_oamip.api.results import Result, finished, write
from onnx_oamip.artifacts import keep_maps, plan_files, score_files
from onnx_oamip.artifacts.output import (
    FileTargets,
    Page,
    check_output,
)
from onnx_oamip.artifacts.plan_files import Planned, PlanSource
from onnx_oamip.artifacts.score_files import Scored
from onnx_oamip.core.atomic_files import Batch
from onnx_oamip.core.budgets import KINDS
from onnx_oamip.core.clock import Clock
from onnx_oamip.core.errors import DataError, GateFailed, ModelError, SettingsError
from onnx_oamip.core.progress import APPLY, PLAN, PREPARATION, PRUNE, Progress
from onnx_oamip.core.records import (
    Budget,
    ContactSheet,
    Plan,
    Recovery,
    Report,
    Verification,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.data.contact_sheet import contact_sheet
from onnx_oamip.data.sources import File, Source, source_name
from onnx_oamip.graph import cost
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.loading import ModelSource
from onnx_oamip.importance import find
from onnx_oamip.planning import (
    attempts,
    execution,
    factoring,
    iterative,
    recorded_answers,
    rotation,
    score_draws,
    search,
)
from onnx_oamip.planning.attempts import Prepared
from onnx_oamip.planning.execution import Attempt
from onnx_oamip.programs.program_files import check_solutions_read
from onnx_oamip.published.nnrelief import connections
from onnx_oamip.recovery import recover as recovery
from onnx_oamip.statistics.context import Context
from onnx_oamip.verification import equivalence

LOG = logging.getLogger("onnx_oamip")
NEARLY_ALL = 90.0
"""Points lost by an output from which a warning is given if another one keeps much."""
MUCH = 50.0
"""Points lost up to which an output keeps much."""
MORE_WEIGHT = 4.0
"""Weight that is proposed for an output, over its present one."""
MAX_SILENT_DROP = 1.0
"""Points above which a loss is warned of if no budget bounds a cost or the drop."""


def prune(
    path: ModelSource,
    source: Source | None,
    output: File | None,
    settings: Settings,
    eval_data: Source | None = None,
    *,
    progress: Progress | None = None,
    scores: File | None = None,
    keep_map: File | None = None,
    page: Page | None = None,
) -> Report:
    """Prune a model to the budgets in ``settings``, verify the result and write it.

    Args:
        path: Model file, or a model in memory.
        source: Calibration samples: a path, ``module:function``, a dict of arrays by input name, or an iterable of
            feeds (such dicts, whose lengths may differ). None for methods that need no data.
        output: File to write, or None to write nothing.
        settings: Budgets and options.
        eval_data: Samples to measure the result on. Default: the held-out part of ``source``.
        progress: Called as ``progress(stage, done, total)``.
        scores: File of scores written by ``score``, used in place of ``settings.importance``.
        keep_map: File to write the kept indices of every weight to.
        page: HTML page about the run, written with the model.

    Returns:
        The report, with the plan and the verification.

    Raises:
        OamipError: Bad input or a missing package (``exit_code`` 2). No file is written.
        BudgetNotMet: No plan meets the budgets (``exit_code`` 1). No file is written.
        GateFailed: The result failed a check (``exit_code`` 1). No file is written.
    """
    clock = Clock(progress, PRUNE)
    preparing.check(settings, source, scores is not None)
    targets = _targets(path, output, keep_map, page, (source, eval_data, scores))
    if settings.granularity == "connection" and keep_map is not None:
        raise SettingsError(
            "a keep-map is about units, and `granularity=connection` removes none; leave it out."
        )
    lacks_rotation = keep_map is not None and rotation.applies(settings)
    if lacks_rotation:
        settings = settings.model_copy(update={"rotate": "none"})
    result = pruned(
        path, source, settings, eval_data=eval_data, progress=progress, scores=scores, clock=clock
    )
    if lacks_rotation:
        report = result.report
        note = rotation.note_on_channels(report.model, report.coupling, "a keep-map lists channels")
        result = replace(result, report=replace(report, notes=(*report.notes, *note)))
    return write(result, targets, clock)


def pruned(
    path: ModelSource,
    source: Source | None,
    settings: Settings,
    *,
    eval_data: Source | None = None,
    progress: Progress | None = None,
    scores: File | None = None,
    clock: Clock | None = None,
) -> Result:
    """Prune a model to the budgets in ``settings`` and verify the result, in memory.

    Args:
        path: Model file, or a model in memory.
        source: Calibration samples, as for ``prune``.
        settings: Budgets and options.
        eval_data: Samples to measure the result on. Default: the held-out part of ``source``.
        progress: Called as ``progress(stage, done, total)``.
        scores: File of scores written by ``score``, used in place of ``settings.importance``.
        clock: Seconds by stage are added to it.

    Returns:
        The pruned model and its report.

    Raises:
        OamipError: As for ``prune``.
    """
    clock = clock or Clock(progress, PRUNE)
    preparing.check(settings, source, scores is not None)
    if settings.granularity == "connection":
        context = preparing.open_context(
            path, source, settings, eval_data=eval_data, progress=progress, clock=clock
        )
        return _thin(context)
    ready = prepare(
        path, source, settings, eval_data=eval_data, progress=progress, clock=clock, scores=scores
    )
    with clock("verify"):  # before the plan: a run that is killed in between has it already
        answers = recorded_answers.answers(ready, ready.comparison_batch)
    with clock("plan and refit"):
        ready, result = iterative.approach(ready)
    check_solutions_read(settings, [*ready.scores.programs, *result.plan.programs])
    search.meets(settings.budget, ready.before, result.after)
    asked = {
        **_asked(ready, scores),
        "data": source_name(source),
        "eval_data": source_name(eval_data),
    }
    return _finish(ready, result, budget=settings.budget, asked=asked, answers=answers)


def _thin(context: Context) -> Result:
    """Prune connections: same shapes, with zeros (see ``published.nnrelief.connections``)."""
    model = context.model
    settings = context.settings
    with context.clock("connections"):
        found = connections.prune(context)
    before = cost.count(model)
    after = cost.count(models.remade(model, found.dense))
    report = Report(
        model=model,
        output=None,
        output_sha256=None,
        before=replace(before, bytes=model.file_bytes),
        after=replace(after, bytes=found.proto.ByteSize()),
        budget=settings.budget,
        coupling=context.coupling,
        scores=found.scores,
        plan=found.plan,
        verification=found.verification,
        timings=context.clock.seconds,
        settings={
            **settings.model_dump(mode="json"),
            "device": context.device,
            "scores": None,
            "steps": [],
        },
        notes=(*context.objective.notes, *found.notes),
        fits=found.fits,
        connections=found.connections,
        objective=context.objective,
        reading=context.samples.reading,
        contact_sheet=_contact_sheet(context),
    )
    return finished(report, found.proto)


def score(
    path: ModelSource,
    source: Source | None,
    output: File | None,
    settings: Settings,
    progress: Progress | None = None,
    *,
    save_mask: File | None = None,
    mask_threshold: float = keep_maps.PUBLISHED_THRESHOLD,
) -> Scored:
    """Score every unit of a model by ``settings.importance`` and write the scores if a file is given.

    The scores are those that ``prune`` uses: if ``source`` has no evaluation part, a fifth of it is held out.

    Args:
        path: Model file, or a model in memory.
        source: Calibration samples, or None for methods that need no data.
        output: File of scores to write (``.npz``), or None to write none.
        settings: Importance method and its options.
        progress: Called as ``progress(stage, done, total)``.
        save_mask: File for the keep-map of the units that the programs keep, which the command ``checkpoint`` reads.
        mask_threshold: Least keep variable of a unit in that map.

    Returns:
        The scores, with the file that was written if there is one.

    Raises:
        OamipError: Bad input, a missing package, or a mask of scores that are no keep variables. No file is written.
    """
    clock = Clock(progress, PREPARATION[:-1])
    method = find(settings.importance)
    target = None if output is None else check_output(path, output, (source,))
    mask_file = None
    if save_mask is not None:
        keep_maps.check_mask(settings.importance, settings.mode, mask_threshold)
        mask_file = check_output(path, save_mask, (source,), "`save_mask`", others=(output,))
    context, found = preparing.score(path, source, settings, progress=progress, clock=clock)
    check_solutions_read(settings, found.programs)
    model = context.model
    coupling = context.coupling
    samples = context.samples
    held = context.held_out
    used = samples.usable() if method.requests(settings) else 0
    asked = {**settings.model_dump(mode="json"), "device": context.device, "samples": used}
    content = score_files.score_file(model, coupling, found, asked)
    mask = None
    with clock("write"), Batch() as batch:
        if target is not None:
            batch.add(target, content)
        if mask_file is not None:
            keep = keep_maps.published_mask(coupling, found, mask_threshold)
            mapped = keep_maps.keep_map(model, coupling, keep)
            batch.add(mask_file, mapped)
            mask = keep_maps.Mask(
                path=str(mask_file),
                sha256=hashlib.sha256(mapped).hexdigest(),
                threshold=mask_threshold,
                kept=int(keep.sum()),
            )
        batch.commit()
    notes: tuple[str, ...] = ()
    if used and held is not None and held.source == samples.source:
        notes = (
            f"scored on {used} samples; as in prune, {held.usable()} others are left for evaluation",
        )
    digest = hashlib.sha256(content).hexdigest()
    return Scored(
        model,
        coupling,
        found,
        None if target is None else str(target),
        digest,
        clock.seconds,
        asked,
        notes=(*found.notes, *notes),
        objective=context.objective,
        mask=mask,
    )


def plan(
    path: ModelSource,
    source: Source | None,
    output: File | None,
    settings: Settings,
    eval_data: Source | None = None,
    *,
    progress: Progress | None = None,
    scores: File | None = None,
) -> Planned:
    """Choose the units to keep under the budgets in ``settings``, and write the plan.

    Args:
        path: Model file, or a model in memory.
        source: Calibration samples, or None for methods that need no data.
        output: Plan file to write (JSON), or None to write nothing.
        settings: Budgets and options.
        eval_data: Samples to measure on. Default: the held-out part of ``source``.
        progress: Called as ``progress(stage, done, total)``.
        scores: File of scores written by ``score``, used in place of ``settings.importance``.

    Returns:
        The plan with its predicted cost.

    Raises:
        OamipError: Bad input or a missing package. No file is written.
        BudgetNotMet: No plan meets the budgets. No file is written.
    """
    clock = Clock(progress, PLAN)
    if settings.granularity == "connection" or settings.iterations > 1:
        raise SettingsError(
            "a plan is made in one go and of units; connections and iterations need prune."
        )
    preparing.check(settings, source, scores is not None)
    if output is None:
        target = None
    else:
        target = check_output(path, output, (source, eval_data, scores))
    ready = prepare(
        path, source, settings, eval_data=eval_data, progress=progress, clock=clock, scores=scores
    )
    with clock("plan"):
        chosen = search.plan(ready)
    check_solutions_read(settings, [*ready.scores.programs, *chosen.programs])
    asked = _asked(ready, scores)
    model, coupling = ready.in_file
    planned = Planned(
        model=model,
        coupling=coupling,
        scores=ready.scores,
        plan=chosen,
        before=ready.before,
        budget=settings.budget,
        output=None,
        sha256=None,
        seconds=clock.seconds,
        settings=asked,
        notes=(
            *ready.objective.notes,
            *score_draws.notes(ready.scores, ready.coupling, chosen.keep),
            *ready.store.notes(),
        ),
        objective=ready.objective,
        losses=tuple(attempts.losses(ready, chosen)),
    )
    if target is None:
        return planned
    with clock("write"):
        return planned.save(target)


def apply(
    path: ModelSource,
    plan_file: PlanSource,
    source: Source | None,
    output: File | None,
    changes: Mapping[str, Any] | None = None,
    *,
    eval_data: Source | None = None,
    progress: Progress | None = None,
    keep_map: File | None = None,
    page: Page | None = None,
) -> Report:
    """Carry out a plan file, edited or not: rewrite, refit, verify and write the model.

    The plan is followed as it is, whatever budget it was made for.

    Args:
        path: Model file, or a model in memory.
        plan_file: Plan written by ``plan``, or its result.
        source: Calibration samples, or None if the settings of the plan need no data.
        output: File to write, or None to write nothing.
        changes: Settings that replace those recorded in the plan, by name.
        eval_data: Samples to measure on. Default: the held-out part of ``source``.
        progress: Called as ``progress(stage, done, total)``.
        keep_map: File to write the kept indices of every weight to.
        page: HTML page about the run, written with the model.

    Returns:
        The report, without scores.

    Raises:
        OamipError: Bad input, or a plan that does not fit the model. No file is written.
        GateFailed: The result failed a check. No file is written.
    """
    clock = Clock(progress, APPLY)
    targets = _targets(path, output, keep_map, page, (source, eval_data, plan_file))
    if keep_map is not None:
        _refuse_components(plan_file)
    result = applied(
        path, plan_file, source, changes, eval_data=eval_data, progress=progress, clock=clock
    )
    return write(result, targets, clock)


def _refuse_components(plan_file: PlanSource) -> None:
    """Raises SettingsError for a keep-map of a plan that keeps principal components, which no list of channels has."""
    rotated = [entry.name for entry in plan_files.content(plan_file).groups if entry.rotated]
    if rotated:
        raise SettingsError(
            f"a keep-map lists channels, and {plan_files.name(plan_file)} keeps principal components of the group "
            f"'{rotated[0]}'; make the plan with `rotate=none`, or leave the keep-map out."
        )


def applied(
    path: ModelSource,
    plan_file: PlanSource,
    source: Source | None,
    changes: Mapping[str, Any] | None = None,
    *,
    eval_data: Source | None = None,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> Result:
    """Carry out a plan in memory: rewrite, refit and verify.

    Args:
        path: Model file, or a model in memory.
        plan_file: Plan file, its content, or the result of ``plan``.
        source: Calibration samples, or None if the settings of the plan need no data.
        changes: Settings that replace those recorded in the plan, by name.
        eval_data: Samples to measure on. Default: the held-out part of ``source``.
        progress: Called as ``progress(stage, done, total)``.
        clock: Seconds by stage are added to it.

    Returns:
        The pruned model and its report, which has no scores.

    Raises:
        OamipError: As for ``apply``.
    """
    clock = clock or Clock(progress, APPLY)
    found = plan_files.content(plan_file)
    name = plan_files.name(plan_file)
    made_with = {
        n: v for n, v in found.settings.items() if n in Settings.model_fields and n not in BUDGETS
    }
    settings = Settings.create(
        **{**made_with, "device": "auto", "cache": "auto", **(changes or {})}
    )
    ready = preparing.open_for_plan(
        path, source, settings, eval_data=eval_data, progress=progress, clock=clock
    )
    if weights := plan_files.factored_weights(found):
        with clock("factor"):
            ready = factoring.of_weights(ready, weights, name)
    matched = plan_files.match_units(found, *ready.in_file, name)
    chosen = plan_files.to_plan(found, matched, ready.coupling, ready.ledger)
    if chosen.rotated:
        if source is None:
            raise DataError(
                f"{name} keeps principal components, which are found by running the model; give `data`."
            )
        with clock("rotate"):
            ready = rotation.rotate(ready)
    with clock("refit"):
        result = execution.carry_out(ready, chosen)
    budget = Budget(**{n: found.budget.get(n) for n in BUDGETS})
    asked = {**settings.model_dump(mode="json"), "device": ready.device, "plan": name}
    asked |= {"data": source_name(source), "eval_data": source_name(eval_data)}
    return _finish(ready, result, budget=budget, asked=asked, notes=_unmet(budget, ready, result))


def _targets(
    path: ModelSource,
    output: File | None,
    keep_map: File | None,
    page: Page | None,
    sources: tuple[object, ...],
) -> FileTargets:
    """Paths of the model and of the files beside it. Raises OutputError before any work where they cannot."""
    if output is None:
        model = None
    else:
        model = check_output(path, output, sources)
    if keep_map is not None:
        keep_map = check_output(path, keep_map, sources, "`keep_map`", others=(output,))
    return FileTargets(model, keep_map, page)


def _recovered(ready: Context, result: Attempt) -> tuple[Attempt, Recovery | None]:
    """The result of a plan, trained if the settings ask for it, and how it was trained.

    The training starts from a refit without the samples that judge it. Where the trained model is refused, as on
    evaluation data on which the refit to all samples loses less, the result stays that refit.
    """
    if ready.judged is None or ready.trained is None or result.plan.keep.all():
        return result, None
    model = ready.model
    start, refitted = result, None
    with ready.clock("recover"):
        if ready.without_judged is not ready:
            start = execution.carry_out(ready.without_judged, result.plan)
            refitted = ready.samples.count
        student = models.from_proto(
            start.pruned.proto, model.bindings, path="the pruned model", batch=model.batch
        )
        proto, found = recovery.run(
            recovery.Pair(model, student, ready.coupling, result.plan.keep),
            ready.objective,
            ready.trained,
            ready.judged,
            ready.settings,
            device=ready.device,
            measured=ready.held_out,
            unrecovered=result.pruned.proto,
            progress=ready.progress,
        )
    pruned = replace(start.pruned, proto=proto) if found.accepted else result.pruned
    notes = (*pruned.notes, *recovery.notes(found, refitted=refitted))
    return replace(result, pruned=replace(pruned, notes=notes)), found


def _finish(
    ready: Context,
    result: Attempt,
    *,
    budget: Budget,
    asked: Mapping[str, Any],
    notes: tuple[str, ...] = (),
    answers: equivalence.Answers | None = None,
) -> Result:
    """Verify and report the result of a plan."""
    if isinstance(ready, Prepared):
        scores = ready.scores
    else:
        scores = None
    clock = ready.clock
    ready = rotation.for_plan(ready, result.plan)
    result, found = _recovered(ready, result)
    with clock("verify"):
        try:
            verification = proof.prove(ready, result, answers)
            proto = proof.in_file(ready, result)
            if ready.whole is not None:  # the other branches were cut as well
                written = cost.count(models.remade(ready.whole.model, proto))
                result = replace(result, after=replace(result.after, params=written.params))
        except ModelError as error:  # the original ran before: what does not load or run here is what was made of it
            raise GateFailed(
                f"{str(error).rstrip('.')}; nothing was written, please report this model."
            ) from error
    model, coupling = ready.in_file
    report = Report(
        model=model,
        output=None,
        output_sha256=None,
        before=ready.before,
        after=result.after,
        budget=budget,
        coupling=coupling,
        scores=scores,
        plan=result.plan,
        verification=verification,
        timings=clock.seconds,
        settings=asked,
        notes=(
            *ready.objective.notes,
            *(scores.notes if scores else ()),
            *(score_draws.notes(scores, ready.coupling, result.plan.keep) if scores else ()),
            *result.plan.notes,
            *result.pruned.notes,
            *notes,
            *_unbounded_loss(budget, verification),
            *_one_sided_loss(ready, result.plan, verification),
            *(text for measure in verification.outputs for text in measure.warnings),
            *equivalence.few_samples(verification.samples),
            *verification.notes,
            *proof.slowdown(verification.latency),
            *proof.elsewhere(ready, result),
            *ready.store.notes(),
        ),
        fits=result.pruned.fits,
        curves=ready.curves if isinstance(ready, Prepared) else (),
        tried=result.tried,
        objective=ready.objective,
        reading=ready.samples.reading,
        contact_sheet=_contact_sheet(ready),
        compared=result.pruned.losses,
        recovery=found,
    )
    return finished(report, proto)


def _unbounded_loss(budget: Budget, verification: Verification) -> tuple[str, ...]:
    """Note and warning if a threshold or a bound on summed losses took more than ``MAX_SILENT_DROP`` points.

    Scores and losses are no points: such a budget does not say how much accuracy may be lost.
    """
    scored = {kind.name for kind in KINDS} - {"threshold", "max_loss"}
    if any(getattr(budget, name) is not None for name in scored):
        return ()
    lost = [measure for measure in verification.outputs if measure.lost > MAX_SILENT_DROP]
    if not lost:
        return ()
    worst = max(lost, key=lambda measure: measure.lost)
    note = (
        f"the pruned model loses {worst.lost:.1f} points ({worst.measure} of '{worst.term}'); give `max_drop` to bound "
        "the loss, or a lower `threshold` or `max_loss`"
    )
    LOG.warning("%s", note)
    return (note,)


def _one_sided_loss(ready: Context, chosen: Plan, verification: Verification) -> tuple[str, ...]:
    """Notes and warnings for outputs that lose nearly everything while another one keeps much."""
    best = min(verification.outputs, key=lambda measure: measure.lost, default=None)
    if best is None or best.lost > MUCH:
        return ()
    notes = tuple(
        f"output '{measure.term}' loses nearly everything ({measure.lost:.1f} points: {measure.measure}), while "
        f"'{best.term}' loses {best.lost:.1f} points; try {_other_plans(ready, chosen, measure.term)}"
        for measure in verification.outputs
        if measure.lost >= NEARLY_ALL
    )
    for note in notes:
        LOG.warning("%s", note)
    return notes


def _other_plans(ready: Context, chosen: Plan, name: str) -> str:
    """Settings by which a plan may keep more of one term."""
    others = [way for way in ("global", "uniform") if way != chosen.allocation]
    ways = [*(f"`allocate={way}`" for way in others), "a larger budget"]
    term = next(term for term in ready.objective.judged if term.name == name)
    if term.kind != "exact":
        kind = "classes" if term.kind == "ambiguous" else term.kind
        weight = MORE_WEIGHT * term.weight
        is_open = " (or values)" if term.kind == "ambiguous" else ""
        ways.append(f"more weight for it, as by `outputs={name}={kind}:{weight:g}`{is_open}")
    return f"{', '.join(ways[:-1])} or {ways[-1]}"


def _contact_sheet(context: Context) -> ContactSheet | None:
    """Samples as the model saw them; None without data, where feeds are random."""
    if context.held_out is None:
        return None
    return contact_sheet(context.samples, context.model)


def _asked(ready: Prepared, scores: File | None) -> dict[str, Any]:
    return {
        **ready.settings.model_dump(mode="json"),
        "device": ready.device,
        "scores": None if scores is None else str(scores),
        "steps": sorted(set(ready.steps.tolist())),
    }


def _unmet(budget: Budget, ready: Context, result: Attempt) -> tuple[str, ...]:
    """A plan that was edited may keep more than its budget says: worth a note, and no more."""
    try:
        search.meets(budget, ready.before, result.after)
    except GateFailed:
        return ("the plan keeps more than the budget that it was made for",)
    return ()
