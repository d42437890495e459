"""Prepares a plan: loads the model and its data, scores all units, and measures losses, for any number of budgets."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import fields, replace
from typing import Any

import numpy as np

from onnx_oamip import executors
from onnx_oamip.artifacts import cache, cache_entries, score_files
from onnx_oamip.core import freed_memory
from onnx_oamip.core.budgets import KINDS
from onnx_oamip.core.clock import Clock
from onnx_oamip.core.errors import (
    BudgetNotMet,
    DataError,
    GateFailed,
    SettingsError,
)
from onnx_oamip.core.foreign_code import is_own
from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import (
    Budget,
    Coupling,
    Model,
    Request,
    Scores,
    Whole,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import batching, dataset
from onnx_oamip.data.dataset import Samples
from onnx_oamip.data.feeds import comparison_size, run_size
from onnx_oamip.data.sources import File, Source, samples_of
from onnx_oamip.graph import cost, op_libraries, taken_branches
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.loading import ModelSource
from onnx_oamip.graph.ops import lookup
from onnx_oamip.graph.runtime import UNFUSED, Session, resolve_device
from onnx_oamip.importance import find
from onnx_oamip.objective import find_objective, scale, spread_rare
from onnx_oamip.objective import metric as metrics
from onnx_oamip.planning import (
    allocation,
    critical_units,
    drop_search,
    emptied_branches,
    execution,
    factoring,
    idle_branches,
    iterative,
    latency_tables,
    limits,
    plan_constraints,
    rotation,
    scoring,
    width_losses,
)
from onnx_oamip.planning.attempts import Prepared
from onnx_oamip.published.nnrelief import connections
from onnx_oamip.recovery import recover as recovery
from onnx_oamip.recovery.judge import split
from onnx_oamip.statistics import collector
from onnx_oamip.statistics.context import Context
from onnx_oamip.statistics.requests import COVARIANCE, MOMENTS
from onnx_oamip.verification.latency import find_step

LOG = logging.getLogger("onnx_oamip")
BUDGETS = {budget.name for budget in fields(Budget)}


def prepare(
    path: ModelSource,
    source: Source | None,
    settings: Settings,
    *,
    eval_data: Source | None = None,
    progress: Progress | None = None,
    clock: Clock | None = None,
    scores: File | None = None,
) -> Prepared:
    """Load a model, score its units, find the constraints on plans, and measure losses.

    Args:
        path: The model, a file or in memory.
        source: Calibration data (see ``data``); None if no setting needs any.
        settings: Settings of the run.
        eval_data: Held-out data; a part of the calibration data where it is None.
        progress: Callback ``(stage, done, total)``.
        clock: Seconds by stage are added to it.
        scores: A file of scores that take the place of those by ``settings.importance``.

    Returns:
        Scores, constraints and losses, from which a plan for any budget can be made.

    Raises:
        OamipError: Bad input.
    """
    check(settings, source, scores is not None)
    op_libraries.use(settings.op_library)
    executors.check(settings.scheduler, resolve_device(settings.device))
    context = open_context(
        path, source, settings, eval_data=eval_data, progress=progress, clock=clock
    )
    if rotation.applies(settings):
        if scores is None:
            with context.clock("rotate"):
                context = factoring.in_components(context)
        else:
            context = rotation.without_rotation(context, "the file of scores names channels")
    if scores is None:
        settings_of_losses = critical_units.without_repair(settings)
        found = scoring.score(replace(context, settings=settings_of_losses))
    else:
        found = score_files.load_scores(scores, context.model, context.coupling)
        context = replace(context, settings=_scored_by(found, settings, source))
        _check_amount(context.settings)
    constraints = plan_constraints.constraints(context, found)
    found = constraints.apply(context.coupling, found)
    context = _noted(context, width_losses.note(context))
    if width_losses.programmed(context.settings) or context.settings.refit != "none":
        context = _noted(context, collector.undivided_groups(context.samples))
    with context.clock("sensitivity"):
        steps = _steps(context)
        unrepaired = replace(context, settings=critical_units.without_repair(context.settings))
        emptiable = emptied_branches.emptiable(context, constraints.floor)
        ladder, curves = width_losses.measure(
            unrepaired, found, step=steps, floor=constraints.floor, emptiable=emptiable
        )
    context.collected.forget(but=_needed_later(context.settings))
    inherited = {field.name: getattr(context, field.name) for field in fields(Context)}
    return Prepared(
        **inherited,
        scores=found,
        constraints=constraints,
        steps=steps,
        ladder=ladder,
        curves=curves,
        emptiable=emptiable,
    )


def open_for_plan(
    path: ModelSource,
    source: Source | None,
    settings: Settings,
    *,
    eval_data: Source | None = None,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> Context:
    """Load a model and its data for a plan that exists already.

    Args:
        path: The model, a file or in memory.
        source: Calibration data; None only where neither refit nor folding needs any.
        settings: Settings of the plan.
        eval_data: Held-out data; a part of the calibration data where it is None.
        progress: Callback ``(stage, done, total)``.
        clock: Seconds by stage are added to it.

    Returns:
        The context of the run, without scores.

    Raises:
        OamipError: Bad input, or calibration data is missing.
    """
    check_recovery(settings, source)
    if source is None and settings.refit != "none":
        raise DataError(
            f"`refit={settings.refit}` needs calibration data; give `data`, or `refit=none`."
        )
    if source is None and execution.folds_constants(settings):
        raise DataError(
            f"what units removed by {settings.importance} leave behind is found by running; give `data`."
        )
    context = open_context(
        path, source, settings, eval_data=eval_data, progress=progress, clock=clock
    )
    if settings.refit == "none":
        return context
    return _noted(context, collector.undivided_groups(context.samples))


def _noted(context: Context, note: str) -> Context:
    """Log a note and add it to those of the objective; the same context for an empty note."""
    if not note:
        return context
    LOG.warning("%s", note)
    objective = context.objective
    return replace(context, objective=replace(objective, notes=(*objective.notes, note)))


def score(
    path: ModelSource,
    source: Source | None,
    settings: Settings,
    *,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> tuple[Context, Scores]:
    """Load a model and score its units.

    Args:
        path: The model, a file or in memory.
        source: Calibration data; None where the method needs none.
        settings: Settings of the run.
        progress: Callback ``(stage, done, total)``.
        clock: Seconds by stage are added to it.

    Returns:
        The context, and one score per unit. Constraints of a plan (floors, limits) are not applied to the scores.

    Raises:
        DataError: The method needs calibration data.
        SettingsError: Files of programs are named, and the method solves none.
        OamipError: Other bad input.
    """
    asked = _program_files(settings)
    if asked and not _scores_by_program(settings):
        raise SettingsError(
            f"`{asked[0]}` is about programs that are solved, and `importance={settings.importance}` solves none; "
            "leave it out."
        )
    if source is None and find(settings.importance).requests(settings):
        raise DataError(f"`importance={settings.importance}` needs calibration data; give `data`.")
    op_libraries.use(settings.op_library)
    executors.check(settings.scheduler, resolve_device(settings.device))
    context = open_context(path, source, settings, progress=progress, clock=clock)
    return context, scoring.score(context)


def _needed_later(settings: Settings) -> set[Request[Any]]:
    """Statistics of the original model that are read after its scores and losses are known."""
    refitting = {MOMENTS} if settings.refit == "bias" else set()
    again = (
        settings.iterations > 1
        or settings.effort == "high"
        or critical_units.is_possible(settings)
        or emptied_branches.applies(settings)
    )
    measuring_again = {COVARIANCE} if again and width_losses.programmed(settings) else set()
    return refitting | measuring_again


def _steps(context: Context) -> Any:
    """Units per alignment step of every group (groups,)."""
    model, coupling, settings, device = (
        context.model,
        context.coupling,
        context.settings,
        context.device,
    )
    wide = cost.full_widths(coupling)
    table = settings.latency_table
    if table is not None and settings.align == "auto":
        known = latency_tables.step(table)
        return allocation.steps(model, coupling, "auto", device, known=known)
    return context.store.recall(
        cache_entries.STEPS,
        {
            "model": model.sha256,
            "align": settings.align,
            "device": device,
            "exclude": settings.exclude,
            "factored": context.cache_identity.get("factored"),
        },
        lambda: allocation.steps(model, coupling, settings.align, device),
        lambda found: (
            found.dtype == np.int64 and found.shape == wide.shape and bool((found > 0).all())
        ),
        # Another run must not start from a step that was measured while the machine was busy.
        lambda _: settings.align != "auto" or find_step(device).is_settled,
    )


def _cache_identity(
    model: Model, samples: Samples, settings: Settings, device: str
) -> dict[str, Any]:
    """Identity of cached statistics: the values that all of them depend on."""
    return {
        **cache.identity(model, samples),
        "exclude": settings.exclude,
        "device": device,
        "seed": settings.seed,
        "max_memory": settings.max_memory,
    }


def check(settings: Settings, source: Source | None, scored: bool = False) -> None:
    """Refuse settings that contradict each other or the data, before any work.

    Args:
        settings: Settings of the run.
        source: Calibration data, or None.
        scored: True if scores are read from a file, so that the importance method does not run.

    Raises:
        SettingsError: Two settings exclude each other, or no budget is given.
        DataError: A setting needs calibration data.
    """
    check_recovery(settings, source)
    method = find(settings.importance)
    if settings.granularity == "connection":
        connections.check(settings, scored)
    elif not scored:
        _check_amount(settings)
    critical_units.check(settings)
    factoring.check(settings, scored)
    if settings.draws > 1 and (scored or not method.requests(settings)):
        raise SettingsError(
            "`draws` scores on several draws of the samples, and here no sample is read for scores; leave it out."
        )
    _check_program_files(settings, scored)
    iterative.check(settings, scored)
    limit_method = limits.find(settings.limits)
    if limit_method is not None:
        limit_method.check()
    if settings.latency_table is not None:
        # A file that cannot be read is refused before any work.
        latency_tables.step(settings.latency_table)
    if settings.latency is not None and settings.allocate != "mip":
        raise SettingsError(
            f"`latency` needs `allocate=mip`, not {settings.allocate}: only the program knows times."
        )
    if settings.max_loss is not None and settings.allocate != "mip":
        raise SettingsError(
            f"`max_loss` needs `allocate=mip`, not {settings.allocate}: only the program knows losses."
        )
    if settings.effort != "normal":
        _check_effort(settings)
    if source is None:
        asks = {
            f"`importance={settings.importance}`": bool(method.requests(settings)) and not scored,
            f"`allocate={settings.allocate}`": width_losses.programmed(settings),
            "`max_drop`": settings.max_drop is not None,
            "`latency`": settings.latency is not None,
            f"`limits={settings.limits}`": limit_method is not None,
            f"`refit={settings.refit}`": settings.refit != "none",
        }
        for what, needed in asks.items():
            if needed:
                raise DataError(
                    f"{what} needs calibration data; give `data`, or use `importance=l2`, `allocate=uniform` "
                    "and `refit=none`."
                )


def _check_program_files(settings: Settings, scored: bool) -> None:
    """Refuse files of programs where none is solved."""
    asked = _program_files(settings)
    scores_by_program = not scored and _scores_by_program(settings)
    if not asked or scores_by_program or width_losses.programmed(settings):
        return
    method = "" if scored else f"`importance={settings.importance}` with "
    raise SettingsError(
        f"`{asked[0]}` is about programs that are solved, and {method}`allocate={settings.allocate}` and these budgets "
        "solve none; leave it out."
    )


def _program_files(settings: Settings) -> list[str]:
    """Names of the settings that name files of programs."""
    files = {"write_program": settings.write_program, "read_solutions": settings.read_solutions}
    return [name for name, value in files.items() if value is not None]


def _scores_by_program(settings: Settings) -> bool:
    """True if scores come from programs. A method from elsewhere may solve some of its own."""
    return settings.importance == "oamip" or not is_own(find(settings.importance).score)


def _check_amount(settings: Settings) -> None:
    """Refuse settings by which nothing says how much to keep."""
    if settings.budget != Budget() or settings.alpha is not None:
        return
    if critical_units.is_possible(settings):
        return
    names = [f"`{kind.name}`" for kind in KINDS]
    raise SettingsError(
        f"nothing says how much to keep; give {', '.join(names[:-1])} or {names[-1]}, or `importance=oamip` with "
        "`allocate=mip`, which finds the critical units."
    )


def check_recovery(settings: Settings, source: Source | None) -> None:
    """Refuse a recovery that has no data, or would fill the zeros of removed connections.

    Args:
        settings: Settings of the run.
        source: Calibration data, or None.

    Raises:
        SettingsError: Connections are pruned.
        DataError: There is no data.
        EnvironmentMissing: torch is not installed.
    """
    if settings.recover is None:
        return
    if settings.granularity == "connection":
        raise SettingsError(
            "`recover` changes all weights, and `granularity=connection` sets some to zero; leave out one of the two."
        )
    if source is None:
        raise DataError("`recover` needs samples to train on; give `data`.")
    recovery.check()


def _check_effort(settings: Settings) -> None:
    """Refuse an effort where no losses choose the widths, and to look again where the budget itself is searched for."""
    if not width_losses.programmed(settings) or settings.granularity == "connection":
        raise SettingsError(
            f"`effort={settings.effort}` says how losses are measured for the budget program; give a budget and "
            "`allocate=mip`, or leave `effort` out."
        )
    if settings.effort == "high" and settings.max_drop is not None:
        raise SettingsError(
            "`effort=high` chooses widths under a fixed budget; give `macs`, `params`, `size` or `latency` in place of "
            "`max_drop`."
        )


def open_context(
    path: ModelSource,
    source: Source | None,
    settings: Settings,
    *,
    eval_data: Source | None = None,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> Context:
    """Load a model at the shapes of its data and find its units; every command starts here.

    Args:
        path: The model, a file or in memory.
        source: Calibration data; None for random samples, which only run the model.
        settings: Settings of the run.
        eval_data: Held-out data; a part of the calibration data where it is None.
        progress: Callback ``(stage, done, total)``.
        clock: Seconds by stage are added to it.

    Returns:
        The context: model, coupling, samples, objective with its scales, device and cache.

    Raises:
        OamipError: The model, the data or the device cannot be used, or no channel can be removed.
    """
    dataset.check_extras(source, eval_data)
    clock = clock or Clock()
    if settings.max_memory is not None:
        freed_memory.return_large_blocks()
    libraries = op_libraries.use(settings.op_library)
    device = resolve_device(settings.device)
    store = cache.open_store(settings.cache)
    with clock("load"):
        model = models.load(path, stated=settings.shapes)
        samples, held = samples_of(model, source, eval_data, settings)
        # Random feeds have as many samples as the model fixes; a feed of data is one.
        fixed_batch = model.batch
        model = dataset.at_data(model, samples)
        if source is None:
            model = replace(model, batch=fixed_batch)
        in_file, returns = model, frozenset[str]()
        if source is not None:
            in_file = idle_branches.marked(model, samples)
            model = in_file
            if settings.granularity == "unit":
                model, returns = idle_branches.with_taken_branches(in_file, samples, held)
        bound = cost.uncounted_note(model)
        if bound:
            LOG.warning("%s", bound)
            model = replace(model, notes=(*model.notes, bound))
        objective = find_objective(model, settings, samples, held)
        metric = None if settings.metric is None else metrics.load(settings.metric)
        batch = comparison_size(model, settings.batch_size, settings.activation_memory_limit)
        is_random = source is None
        samples, held, unfused = _tried(model, samples, held, batch, is_random=is_random)
        model = replace(model, notes=(*model.notes, *samples.notes, *unfused))
    identity = {
        **_cache_identity(model, samples, settings, device),
        "op_libraries": [library.sha256 for library in libraries],
    }
    trained = judged = None
    if source is not None or eval_data is not None:
        with clock("objective"):
            size = run_size(model, settings.activation_memory_limit)
            objective = scale(
                model, objective, samples, device, batch_size=size, store=store, identity=identity
            )
            spread = spread_rare(model, objective, samples, device, batch_size=size)
            if spread is not samples:
                samples = spread
                identity = _cache_identity(model, samples, settings, device)
            if settings.recover is not None:
                trained, judged = split(samples, held, settings.seed)
                if trained is not samples:
                    trained = spread_rare(model, objective, trained, device, batch_size=size)
    for note in objective.notes:
        LOG.warning("%s", note)
    if settings.max_drop is not None and source is not None:
        bound = drop_search.bounded(objective, metric)
        objective = replace(objective, notes=(*objective.notes, bound))
        LOG.warning("%s", bound)
    with clock("couple"):
        coupling = idle_branches.removable(in_file, settings.exclude, objective)
        whole = None
        if returns:
            whole = Whole(replace(in_file, notes=model.notes), coupling, returns)
            coupling = taken_branches.coupling_of(coupling, model)
        _check_units(model, coupling, settings)
    return Context(
        model=model,
        coupling=coupling,
        samples=samples,
        held_out=held,
        judged=judged,
        trained=trained,
        device=device,
        settings=settings,
        objective=objective,
        metric=metric,
        store=store,
        cache_identity=identity,
        progress=progress,
        clock=clock,
        whole=whole,
    )


def _tried(
    model: Model, samples: Samples, held: Samples | None, batch: int, *, is_random: bool
) -> tuple[Samples, Samples | None, tuple[str, ...]]:
    """Both sets of samples in batches in which the model runs, and notes about the kernels that it needs.

    What does not run cannot be verified, which is reported before the work.
    """
    session = Session(model.proto, "cpu", what=model.path)
    if is_random:
        for _, feed in samples.batches(batch):
            session.run(feed)
    else:
        samples = batching.tried(session, samples, batch)
        held = batching.alike(session, samples, held)
    return samples, held, (UNFUSED,) if session.unfused else ()


def _check_units(model: Model, coupling: Coupling, settings: Settings) -> None:
    """Raises BudgetNotMet where nothing can be removed, GateFailed under ``strict`` where some channels cannot."""
    if settings.granularity == "unit":
        _something_free(model, coupling)
        if settings.strict:
            _nothing_skipped(model, coupling)


def _scored_by(given: Scores, settings: Settings, source: Source | None) -> Settings:
    """The settings as if the method that made given scores had been asked for. Raises OamipError where it cannot be."""
    settings = settings.model_copy(update={"importance": given.method})
    find(given.method)
    if source is None and execution.folds_constants(settings):
        raise DataError(
            f"what units removed by {given.method} leave behind is found by running the model; give `data`."
        )
    return settings


def _nothing_skipped(model: Model, coupling: Coupling) -> None:
    """Raises GateFailed where channels of a layer stay for another reason than the model's inputs and outputs."""
    layers: set[str] = set()
    for node in model.every:
        spec = lookup(node.domain, node.op, node.version)
        # Any input of an unknown operator may belong to a layer.
        if spec is None or spec.cost is not None:
            layers.update(node.inputs)
    found = {p.tensor: p.reason for p in coupling.pinned if not p.given and p.tensor in layers}
    if found:
        listed = [f"'{name}', because {reason}" for name, reason in found.items()]
        raise GateFailed(
            f"`strict`: channels of {len(found)} layers cannot be removed: {'; '.join(listed[:3])}"
            f"{'; ...' if len(listed) > 3 else ''}. Leave out `strict`, or name them with `exclude`."
        )


def _something_free(model: Model, coupling: Coupling) -> None:
    if coupling.n_units:
        return
    if not coupling.pinned:
        raise BudgetNotMet(f"no channel of {model.path} can be removed: it has no weights.")
    channels: Counter[str] = Counter()
    given = {pin.reason for pin in coupling.pinned if pin.given}
    for pin in coupling.pinned:
        channels[pin.reason] += pin.count
    # Exclusions by the user first; inputs and outputs, which every model keeps, last; most channels first. A layer
    # keeps a single channel anyway.
    reasons = sorted(
        channels,
        key=lambda r: (
            not r.startswith("`exclude="),
            r in given or channels[r] == 1,
            -channels[r],
        ),
    )
    raise BudgetNotMet(
        f"no channel of {model.path} can be removed, for example because {reasons[0]}; see 'onnx-oamip inspect' for "
        "all reasons, or remove single connections with `granularity=connection`."
    )
