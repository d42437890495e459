"""Search for a pruned model that meets its budget, from scores and measured losses.

Statistics, scores and sensitivities are made once (``Prepared``). Counted budgets need one attempt; a measured latency
is reached by correcting the additive model with measurements; ``max_drop`` by a bisection over the share of MACs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from onnx_oamip.artifacts import cache, cache_entries, plan_files, provenance
from onnx_oamip.core.budgets import counted_shares
from onnx_oamip.core.errors import BudgetNotMet, DataError, GateFailed
from onnx_oamip.core.records import (
    Array,
    Bools,
    Budget,
    Cost,
    Ints,
    Objective,
    Plan,
    Pruned,
    Scores,
    Sensitivity,
    Trial,
    Verification,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import augmentation
from onnx_oamip.data.augmentation import Augment
from onnx_oamip.graph import cost
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.surgery import attention_scale, rewrite
from onnx_oamip.importance import find
from onnx_oamip.objective.measures import promise
from onnx_oamip.objective.metric import Metric
from onnx_oamip.objective.position_weights import has_rare_decisions, weighting
from onnx_oamip.planning import (
    allocation,
    calibration_loss,
    critical_units,
    latency_tables,
    width_losses,
)
from onnx_oamip.planning.budget_program import Ladder, LinearisedLimit
from onnx_oamip.planning.latency_model import profile
from onnx_oamip.planning.plan_constraints import Constraints
from onnx_oamip.repair import least_squares, removed_constants
from onnx_oamip.statistics.collector import collect, parts
from onnx_oamip.statistics.context import Context
from onnx_oamip.statistics.requests import MOMENTS
from onnx_oamip.verification import equivalence
from onnx_oamip.verification.latency import compare_latency

SIZE_TRIES = 3
LATENCY_TRIES = 6
LATENCY_SLACK = 0.05
NEAR_LIMIT = 0.95
"""Share of a limit that a plan with the measured step of widths uses at least; below it the step gives way."""
LOOKS = 2
"""Times that losses are measured again around a plan, with ``effort=high``."""
REFIT, EQUAL_ROWS, AUGMENTED, WITHOUT = "refit", "refit_of_equal_rows", "refit_with_copies", "none"
"""Names of what is compared by loss: the refit, one that does not count rare decisions more, one with augmented copies
of the samples, and no refit."""
DROP_TRIES = 7
DROP_RESOLUTION = 0.02
ANSWERS = 1 << 26
"""Bytes of the original's outputs on the evaluation data that are held, and kept for the next run."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Prepared(Context):
    """A context with its scores, constraints and measured losses: everything that does not depend on the budget.

    Attributes:
        scores: Scores with the constraints applied.
        constraints: Floors and limits that every plan meets.
        steps: Units per alignment step of every group (groups,).
        ladder: Losses at every width that a plan may choose; None where no program needs them.
        curves: The measured losses that the ladder was made from.
    """

    scores: Scores
    constraints: Constraints
    steps: Ints
    ladder: Ladder | None
    curves: tuple[Sensitivity, ...] = ()


@dataclass(frozen=True)
class Attempt:
    """A plan with the model pruned by it; ``tried``: the trials of the search that chose the plan."""

    plan: Plan
    pruned: Pruned
    after: Cost
    tried: tuple[Trial, ...] = ()


def attempt(
    ready: Prepared,
    limit: allocation.Limits,
    extra: tuple[LinearisedLimit, ...],
) -> Attempt:
    """Allocate, cut and refit, and with ``effort=high`` choose the widths again around the plan.

    Args:
        ready: Scores and losses.
        limit: Limits of the counted budgets.
        extra: Further linear limits of the budget program.

    Returns:
        The attempt that loses least.

    Raises:
        BudgetNotMet: No plan meets the limits.
    """
    first = _attempt(ready, limit, extra)
    if ready.settings.effort == "normal" or ready.ladder is None:
        return first
    return _look_again(ready, limit, extra, first)


def _look_again(
    ready: Prepared,
    limit: allocation.Limits,
    extra: tuple[LinearisedLimit, ...],
    first: Attempt,
) -> Attempt:
    """Measure the losses of groups around the plan, and choose widths by their mean with those in the original.

    The attempt that loses least on samples that no refit used is kept.
    """
    (best_loss,) = calibration_loss.losses(ready, [first.pruned.proto])
    before, best, keep = best_loss, first, first.plan.keep
    for _ in range(LOOKS):
        curves, ladder = _losses_around(ready, keep)
        again = _attempt(replace(ready, curves=curves, ladder=ladder), limit, extra)
        if np.array_equal(again.plan.keep, keep):
            break
        keep = again.plan.keep
        (lost,) = calibration_loss.losses(ready, [again.pruned.proto])
        if lost < best_loss:
            best_loss, best = lost, again
    if best is first:
        return first
    note = (
        f"widths were chosen again around the first plan: on calibration samples that no refit used the model loses "
        f"{best_loss:.3g} in place of {before:.3g}"
    )
    return replace(best, plan=replace(best.plan, notes=(*best.plan.notes, note)))


def _losses_around(ready: Prepared, keep: Bools) -> tuple[tuple[Sensitivity, ...], Ladder]:
    """Losses of groups by the mean of those in the original and those around a plan.

    A group that others stand in for loses least as the first one to be narrowed, and most as the last one: the mean of
    both is the trapezoid rule for its share of the whole loss on the way from the original to the plan. It never counts
    for less than alone: a layer near the output can seem to gain where it only damps the errors in front of it.
    """
    around = width_losses.losses_of_groups(ready, ready.scores, keep)
    curves = tuple(
        Sensitivity(alone.widths, (alone.loss + np.maximum(alone.loss, last.loss)) / 2)
        for alone, last in zip(ready.curves, around, strict=True)
    )
    floor = ready.constraints.floor
    return curves, width_losses.rungs(ready.coupling, curves, ready.steps, floor)


def _attempt(
    ready: Prepared, limit: allocation.Limits, extra: tuple[LinearisedLimit, ...]
) -> Attempt:
    """Allocate, cut and refit; repeat with a tighter limit while the file is larger than predicted.

    Args:
        ready: Scores and losses.
        limit: Limits of the counted budgets.
        extra: Further linear limits of the budget program.

    Returns:
        The attempt. If the file is too large after ``SIZE_TRIES`` repeats, it is returned as it is.

    Raises:
        BudgetNotMet: No plan meets the limits.
    """
    found = carry_out(ready, allocate(ready, limit, extra))
    size = ready.settings.budget.size
    for _ in range(SIZE_TRIES):
        # A file holds more than its tensors (names, repaired constants): the first size is a prediction.
        over = 0.0 if size is None else found.after.bytes - size * ready.before.bytes
        if over <= 0 or "size" not in limit.values:
            break
        tighter = limit.values["size"] - over
        if found.plan.predicted.bytes <= tighter:  # the same plan would be chosen again
            tighter = found.plan.predicted.bytes - over
        limit = limit.with_limit("size", tighter)
        found = carry_out(ready, allocate(ready, limit, extra))
    return found


def allocate(
    ready: Prepared,
    limit: allocation.Limits,
    extra: tuple[LinearisedLimit, ...] = (),
) -> Plan:
    """Choose a plan under absolute limits.

    A step of widths that ``align=auto`` chose gives way, half by half, if no plan meets the limits with it, or if the
    plan keeps much less than they allow.

    Args:
        ready: Scores, losses and constraints.
        limit: Counted limits.
        extra: Limits that are measured.

    Returns:
        The plan.

    Raises:
        BudgetNotMet: No plan meets the limits.
    """
    steps = ready.steps
    ladder = ready.ladder
    best: Plan | None = None
    while True:
        missed: BudgetNotMet | None = None
        try:
            plan = _allocate(ready, steps, ladder, limit, extra)
            if best is None or plan.predicted.macs > best.predicted.macs:
                note = () if steps is ready.steps else (_gave_way(ready.steps, steps),)
                best = replace(plan, notes=(*plan.notes, *note))
        except BudgetNotMet as error:
            missed = error
        near = best is not None and _used(best, limit, extra) >= NEAR_LIMIT
        if near or ready.settings.align != "auto" or steps.max(initial=1) == 1:
            if best is None and missed is not None:
                raise missed
            assert best is not None
            return best
        steps = np.maximum(steps // 2, 1)
        if ladder is not None:
            floor = ready.constraints.floor
            ladder = width_losses.rungs(ready.coupling, ready.curves, steps, floor)


def _allocate(
    ready: Prepared,
    steps: Ints,
    ladder: Ladder | None,
    limit: allocation.Limits,
    extra: tuple[LinearisedLimit, ...],
) -> Plan:
    return allocation.allocate(
        ready.coupling,
        ready.ledger,
        ready.scores,
        limit,
        ready.settings,
        step=steps,
        ladder=ladder,
        extra=extra,
        floor=ready.constraints.floor,
    )


def _used(
    plan: Plan,
    limit: allocation.Limits,
    extra: tuple[LinearisedLimit, ...],
) -> float:
    """The largest share of a limit that a plan uses; 1 without limits."""
    used = limit.shares(plan.predicted)
    if extra:  # the program that chose the plan reports what it uses of them
        used |= {row.name: plan.programs[-1]["used"][row.name] for row in extra}
    return max(used.values(), default=1.0)


def _gave_way(before: Ints, after: Ints) -> str:
    return (
        f"channels are in steps of {int(after.max())} units in place of {int(before.max())}, as the larger step misses "
        "the budget"
    )


def losses(ready: Prepared, chosen: Plan) -> list[float | None]:
    """Return the measured loss of every group at its planned width.

    Args:
        ready: Scores and losses.
        chosen: The plan.

    Returns:
        Per group the loss of the model with only that group pruned; None where no losses were measured.
    """
    if ready.ladder is None:
        return [None] * len(ready.coupling.groups)
    rows = zip(ready.ladder.widths, ready.ladder.cost, chosen.widths.tolist(), strict=True)
    return [float(np.interp(width, widths, cost)) for widths, cost, width in rows]


def adding(ready: Context, chosen: Plan) -> list[str]:
    """Name the groups whose cut inserts nodes, because a normalisation needs zeros in place of removed channels.

    Args:
        ready: The model and its costs.
        chosen: The plan.

    Returns:
        Names of the groups.
    """
    brought = ready.ledger.one_off.inserting_groups(chosen.widths)
    return [ready.coupling.groups[g].name for g in np.flatnonzero(brought)]


def carry_out(ready: Context, chosen: Plan) -> Attempt:
    """Cut a model as planned, and refit its consumers.

    Args:
        ready: The model, its samples and the settings, which choose the refit.
        chosen: The plan.

    Returns:
        The cut and refitted model with its costs.
    """
    raw = rewrite.cut(ready.model, ready.coupling, chosen.keep)
    pruned = Pruned(raw, raw)
    refits = {} if chosen.keep.all() else _refits(ready, chosen, raw)
    if refits:
        pruned = _least_loss(ready, chosen, refits)
    elif not chosen.keep.all() and folds_constants(ready.settings):
        pruned = removed_constants.fold_constants(
            ready.model,
            ready.coupling,
            chosen.keep,
            raw,
            samples=ready.samples,
            device=ready.device,
        )
    # Last: a refit fits the queries to what they gave before.
    pruned = replace(pruned, proto=_rescaled(ready, chosen, pruned.proto))
    if not ready.settings.no_provenance:
        what = plan_files.digest(ready.model, ready.coupling, chosen.keep)
        provenance.sign(pruned.proto, ready.model.sha256, what)
    after = cost.count(models.remade(ready.model, pruned.proto))
    return Attempt(chosen, pruned, after)


def _rescaled(ready: Context, chosen: Plan, proto: onnx.ModelProto) -> onnx.ModelProto:
    return attention_scale.rescale(ready.model, ready.coupling, chosen.keep, proto)


def _refits(ready: Context, chosen: Plan, raw: onnx.ModelProto) -> dict[str, Pruned]:
    """Refits of a cut model by their names in the report, that of the settings first."""
    if ready.settings.refit == "bias":
        moments = collect(ready, {MOMENTS})
        folded = least_squares.fold_means(ready.model, ready.coupling, chosen.keep, moments, raw)
        return {REFIT: folded}
    if ready.settings.refit != "least-squares":
        return {}
    refits = _least_squares(ready, chosen, raw, ready.objective, _change(ready, chosen))
    if has_rare_decisions(ready.objective):
        equal = _least_squares(ready, chosen, raw, None, None)
        refits[EQUAL_ROWS] = equal[REFIT]
    return refits


def _change(ready: Context, chosen: Plan) -> Augment | None:
    """Changes behind the augmented copies of the samples; None where no refit takes copies into account."""
    samples = parts(ready.samples)[0]
    feed = next(iter(samples.batches(1)))[1]
    change = augmentation.for_refit(ready.settings.augment, ready.model, feed)
    if change is None:
        return None
    model, coupling, units = ready.model, ready.coupling, chosen.keep
    is_short = least_squares.is_short_of_samples(model, coupling, units, samples)
    return change if is_short else None


def _least_squares(
    ready: Context,
    chosen: Plan,
    raw: onnx.ModelProto,
    objective: Objective | None,
    change: Augment | None,
) -> dict[str, Pruned]:
    """Least-squares refits of a cut model by name, from the cache where an earlier run kept them.

    The refit on copies that a user's own function makes is not kept: the function may change between runs.
    """
    s = ready.settings
    sampling = least_squares.Sampling(
        samples=parts(ready.samples)[0],
        device=ready.device,
        batch_size=ready.batch,
        seed=s.seed,
        memory_limit=s.activation_memory_limit,
        objective=objective,
        progress=ready.progress,
    )
    cut = ready.model, ready.coupling, chosen.keep, raw, sampling
    kept = {
        **ready.cache_identity,
        **(weighting(objective) if objective else {}),
        "units": plan_files.digest(ready.model, ready.coupling, chosen.keep),
    }

    def recall(identity: Mapping[str, Any], fit: Callable[[], Pruned]) -> Pruned:
        def is_valid(found: Pruned) -> bool:
            return least_squares.is_valid_cache_entry(found, raw)

        return replace(ready.store.recall(cache_entries.REFITS, identity, fit, is_valid), raw=raw)

    if change is None:
        return {REFIT: recall(kept, lambda: least_squares.least_squares(*cut)[0])}
    both = functools.cache(lambda: least_squares.least_squares(*cut, change=change))
    if s.augment != "auto":
        return {REFIT: both()[0], AUGMENTED: both()[1]}
    copied = recall({**kept, "augment": s.augment}, lambda: both()[1])
    return {REFIT: recall(kept, lambda: both()[0]), AUGMENTED: copied}


def _least_loss(ready: Context, chosen: Plan, refits: Mapping[str, Pruned]) -> Pruned:
    """The refit, or the cut model without one, that loses least on the calibration samples kept for this.

    A refit brings every layer near to what it gave, which need not bring the outputs near. The first of equal ones is
    taken, and the first one without a comparison where it changed nothing.
    """
    first = refits[REFIT]
    if ready.settings.refit == "least-squares" and not first.fits:
        return first
    candidates = {**refits, WITHOUT: Pruned(first.raw, first.raw, first.notes)}
    protos = [_rescaled(ready, chosen, candidate.proto) for candidate in candidates.values()]
    losses = dict(zip(candidates, calibration_loss.losses(ready, protos), strict=True))
    best = min(losses, key=lambda name: losses[name])
    notes = candidates[best].notes
    if best == WITHOUT:
        unused = "" if ready.settings.refit == "bias" else "that it did not use "
        note = (
            f"the refit is left out: on calibration samples {unused}the model loses {losses[REFIT]:.3g} with it and "
            f"{losses[WITHOUT]:.3g} without"
        )
        notes = (*notes, note)
    return replace(candidates[best], notes=notes, losses=losses)


def answers(ready: Context, batch: int) -> equivalence.Recorded | None:
    """Record the outputs of the original on the held-out samples; they are the same for every plan.

    Args:
        ready: The model and its samples.
        batch: Samples of one run.

    Returns:
        The outputs, from the cache where an earlier run kept them. None without held-out samples, and where the
        outputs would take more than ``ANSWERS`` bytes.
    """
    model = ready.model
    held = ready.held_out
    objective = ready.objective
    names = equivalence.watched(model, objective)
    if held is None or any(name not in model.shapes for name in names):
        return None
    types = {**{port.name: port.dtype for port in model.outputs}, **model.dtypes}
    each = sum(int(np.prod(model.shapes[name])) * types[name].itemsize for name in names)
    if each * held.count > ANSWERS * (1 if held.whole else model.batch):
        return None

    def run() -> list[list[Array]]:
        session = equivalence.watch(model, objective, ready.device, what=model.path)
        return list(session.stream(feed for _, feed in held.batches(batch)))

    known = {
        **cache.identity(model, held),
        "device": ready.device,
        "batch": batch,
        "tensors": names,
    }
    taken = [1 if held.whole else len(index) for index, _ in held.batches(batch)]
    wanted = [(model.shapes[name], types[name]) for name in names]
    return equivalence.Recorded(
        ready.store.recall(
            cache_entries.OUTPUTS,
            known,
            run,
            lambda found: held.unequal or _given(found, wanted, taken),
        )
    )


def _given(
    found: Sequence[Sequence[Array]],
    wanted: Sequence[tuple[tuple[int, ...], np.dtype[Any]]],
    taken: Sequence[int],
) -> bool:
    """Check that these may be tensors of these shapes and types for batches of so many samples."""
    return [[(v.shape, v.dtype) for v in values] for values in found] == [
        [((*(length * n for length in shape[:1]), *shape[1:]), dtype) for shape, dtype in wanted]
        for n in taken
    ]


def folds_constants(settings: Settings) -> bool:
    """Check whether constant outputs of removed units are folded into the biases of their consumers.

    Args:
        settings: Settings of the run.

    Returns:
        True without a refit, for a method whose removed units keep their biases.
    """
    # In the exact formulation and the decoupled programs a removed unit is gone, its constant with it.
    published = settings.formulation == "paper" and settings.mode != "decoupled"
    return settings.refit == "none" and find(settings.importance).keeps_bias and published


def plan(ready: Prepared) -> Plan:
    """Make the plan that :func:`search` would carry out.

    Args:
        ready: Scores and losses.

    Returns:
        The plan. A model is cut only for budgets that are measured on one (`size`, `max_drop`), and for critical units.

    Raises:
        BudgetNotMet: No plan meets the budget.
    """
    settings = ready.settings
    measured = settings.size is not None or settings.max_drop is not None
    critical = critical_units.is_asked_for(settings, ready.scores)
    if measured or critical or settings.effort == "high":
        found = search(ready)
        meets(ready.settings.budget, ready.before, found.after)
        return found.plan
    return allocate(ready, *_limits(ready))


def meets(budget: Budget, before: Cost, after: Cost) -> None:
    """Check the counted budgets of a pruned model.

    Args:
        budget: The budgets, as shares of the original.
        before: Costs of the original.
        after: Costs of the pruned model.

    Raises:
        GateFailed: A budget is exceeded.
    """
    for kind, share in counted_shares(budget):
        old = kind.of(before)
        new = kind.of(after)
        if new > share * old:
            raise GateFailed(
                f"the pruned model keeps {new / max(old, 1):.4f} of its {kind.noun}, more than "
                f"`{kind.name}={share}`; nothing was written."
            )


def search(ready: Prepared) -> Attempt:
    """Find and carry out a plan that meets the budget.

    Args:
        ready: Scores and losses.

    Returns:
        The attempt.

    Raises:
        BudgetNotMet: There is no such plan; the message names the limit that prevents it.
    """
    limit, extra = _limits(ready)
    if ready.settings.max_drop is not None:
        return _smallest(ready, limit, extra, ready.settings.max_drop)
    if critical_units.is_asked_for(ready.settings, ready.scores):
        return _critical(ready)
    return attempt(ready, limit, extra)


def _limits(ready: Prepared) -> tuple[allocation.Limits, tuple[LinearisedLimit, ...]]:
    """Limits of the counted budgets, and the linear constraint of a latency budget."""
    adds = ready.settings.refit != "none" or folds_constants(ready.settings)
    limit = allocation.limits(
        ready.settings.budget, ready.before, least_squares.new_biases(ready.model) if adds else 0
    )
    if ready.settings.latency is None:
        return limit, ()
    return limit, (_latency(ready, limit, ready.settings.latency),)


# ------------------------------------------------------------------------------------------------------- latency


def _latency(
    ready: Prepared,
    limit: allocation.Limits,
    share: float,
) -> LinearisedLimit:
    """The latency row under which the measured latency of the cut model keeps ``share`` of the original's."""
    assert ready.ladder is not None
    if ready.settings.latency_table is not None:
        return latency_tables.limit(
            ready.settings.latency_table, ready.model, ready.coupling, share
        )
    table = profile(
        ready.model,
        ready.coupling,
        ready.ladder.widths,
        ready.samples,
        device=ready.device,
        seed=ready.settings.seed,
    )
    whole = float(table.measured[0])  # the widest level; what the model fits there may be off
    target = share
    tried: list[tuple[float, float]] = []  # (target, measured)

    def row(target: float) -> LinearisedLimit:
        return LinearisedLimit("latency", table.products, table.constant, target * whole)

    for i in range(LATENCY_TRIES):
        chosen = allocate(ready, limit, (row(target),))
        tried.append(
            (target, latency_ratio(ready, rewrite.cut(ready.model, ready.coupling, chosen.keep)))
        )
        if ready.progress:
            ready.progress("latency", i + 1, LATENCY_TRIES)
        if share * (1 - LATENCY_SLACK) <= tried[-1][1] <= share:
            break
        target = _aim(tried, share)
    met = [(measured, target) for target, measured in tried if measured <= share]
    if not met:
        raise BudgetNotMet(
            f"the `latency` budget cannot be met: the narrowest plan found still takes {min(m for _, m in tried):.2f} "
            f"of the original's time on {ready.device}, asked for {share}; most of the rest does not depend on widths."
        )
    return row(max(met)[1])


def _aim(tried: Sequence[tuple[float, float]], share: float) -> float:
    """The next target, where the measurement should land just below the share.

    The additive model is off by measured / target; between a target that was met and one that was not, by less.
    """
    goal = share * (1 - LATENCY_SLACK / 2)
    met = [(measured, target) for target, measured in tried if measured <= share]
    missed = [(measured, target) for target, measured in tried if measured > share]
    if met and missed:
        (below, low), (above, high) = max(met), min(missed)
        if low < high:  # noise may turn them around
            return low + (high - low) * (goal - below) / (above - below)
    target, measured = tried[-1]
    return target * goal / measured


def latency_ratio(ready: Context, proto: object, seconds: float = 2.0) -> float:
    """Measure the latency of a model relative to the original's, one sample at a time.

    Args:
        ready: The original, its samples and the device.
        proto: The other model.
        seconds: Approximate time of the measurement.

    Returns:
        The ratio of medians over interleaved rounds, under 1 if the other model is faster.
    """
    ratio = compare_latency(ready.model.proto, proto, ready.samples, ready.device, seconds=seconds)  # type: ignore[arg-type]
    return ratio.median


# ---------------------------------------------------------------------------------------------------- accuracy drop


@dataclass(frozen=True)
class Drop:
    """Loss of a model on evaluation data, in points of a ``measure``."""

    lost: float
    measure: str


def _smallest(
    ready: Prepared,
    limit: allocation.Limits,
    extra: tuple[LinearisedLimit, ...],
    points: float,
) -> Attempt:
    """The fewest MACs at which the drop on evaluation data stays within ``points``, by bisection."""
    if ready.held_out is None:
        raise BudgetNotMet(
            "`max_drop` needs data to measure the drop on; give `data` with enough samples, or `eval_data`."
        )
    original = _original(ready)
    silent = replace(ready, progress=None)  # progress is that of the bisection
    best: Attempt | None = None
    tried: list[Trial] = []
    low = 0.0
    high = min(1.0, limit.values.get("macs", ready.before.macs) / ready.before.macs)
    share = high if high < 1 else 0.5
    for i in range(DROP_TRIES):
        try:
            found = attempt(silent, limit.with_limit("macs", share * ready.before.macs), extra)
            measured = _drop(ready, original, found)
            tried.append(Trial(share, found.after.macs, measured.lost, measured.measure))
            held = measured.lost <= points
        except BudgetNotMet:
            tried.append(Trial(share, None, None))
            held = False
        if ready.progress:
            ready.progress("max-drop", i + 1, DROP_TRIES)
        if held:
            best = found
            high = found.after.macs / ready.before.macs
        else:
            low = share
        if high - low < DROP_RESOLUTION:
            break
        share = (low + high) / 2
    if best is None:
        whole = attempt(silent, limit, extra)
        least = _drop(ready, original, whole)
        tried.append(Trial(1.0, whole.after.macs, least.lost, least.measure))
        if least.lost > points:
            raise BudgetNotMet(
                f"no plan within the other budgets loses at most {points} points on {ready.held_out.source} "
                f"({least.measure}); ask for a larger drop or a larger budget."
            )
        best = whole
    return replace(best, tried=tuple(tried))


def _drop(
    ready: Prepared,
    original: equivalence.Answers,
    found: Attempt,
) -> Drop:
    assert ready.held_out is not None
    if ready.metric is not None:
        values = equivalence.user_metric(
            ready.metric,
            ready.model,
            found.pruned.proto,
            samples=ready.held_out,
            device=ready.device,
            batch_size=ready.batch,
        )
        return Drop(values.lost, values.name)
    after = equivalence.watch(ready.model, ready.objective, ready.device, found.pruned.proto)
    return drop(
        equivalence.compare(
            ready.model,
            ready.objective,
            original,
            after,
            samples=ready.held_out,
            batch_size=ready.batch,
        )
    )


def _original(ready: Prepared) -> equivalence.Answers:
    """Outputs of the original on the held-out samples, recorded or computed again for every plan."""
    recorded = answers(ready, ready.batch)
    return recorded or equivalence.watch(ready.model, ready.objective, ready.device)


# --------------------------------------------------------------------------------------------------- critical units


def _critical(ready: Prepared) -> Attempt:
    """The fewest units that keep the accuracy on held-out samples, before and after the refit.

    Losses are measured a second time around the first result, where the groups stand in for each other. If a refit
    makes a plan lose more than ``critical_units.POINTS``, the next wider one follows.
    """
    assert ready.held_out is not None  # `oamip` needs data, a part of which is held out
    original = _original(ready)
    unrepaired = replace(ready, settings=critical_units.without_repair(ready.settings))
    kept = _keeping_accuracy(unrepaired, original)
    if kept:
        narrowest, _ = min(kept, key=_number_of_units)
        curves, ladder = _losses_around(unrepaired, narrowest.keep)
        kept += _keeping_accuracy(replace(unrepaired, curves=curves, ladder=ladder), original)
    else:
        lossless = _within_loss(unrepaired, 0.0)
        kept.append((lossless, _drop(unrepaired, original, carry_out(unrepaired, lossless))))
    silent = replace(ready, progress=None)
    for chosen, lost in sorted(kept, key=_number_of_units):
        found = carry_out(silent, chosen)
        after = _drop(silent, original, found)
        if max(lost.lost, after.lost) <= critical_units.POINTS:
            points = {"without the refit": lost.lost, "with it": after.lost}
            note = critical_units.describe(
                chosen, ready.coupling, points, lost.measure, ready.held_out.count
            )
            return replace(found, plan=replace(chosen, notes=(*chosen.notes, note)))
    raise BudgetNotMet(
        f"no plan loses at most {critical_units.POINTS} points on {ready.held_out.source} before and after the refit; "
        "give a budget, or `max_drop`."
    )


def _number_of_units(kept: tuple[Plan, Drop]) -> int:
    return int(kept[0].widths.sum())


def _keeping_accuracy(ready: Prepared, original: equivalence.Answers) -> list[tuple[Plan, Drop]]:
    """Plans that keep the accuracy without a refit, by a bisection over the bound on the summed loss.

    Args:
        ready: Scores and losses; the settings have no refit.
        original: Outputs of the original on the held-out samples.

    Returns:
        The plans, each with its loss.
    """
    assert ready.ladder is not None
    silent = replace(ready, progress=None)  # progress is that of the search
    least = np.asarray([widths[0] for widths in ready.ladder.widths])
    held, missed = 0.0, np.inf
    kept: list[tuple[Plan, Drop]] = []
    for i in range(critical_units.TRIES):
        bound = critical_units.next_bound(held, missed)
        chosen = _within_loss(silent, bound)
        lost = _drop(silent, original, carry_out(silent, chosen))
        if ready.progress:
            ready.progress("critical units", i + 1, critical_units.TRIES)
        if lost.lost > critical_units.POINTS:
            missed = bound
        else:
            held = bound
            kept.append((chosen, lost))
            if (chosen.widths <= least).all():
                break
        if missed <= critical_units.RESOLUTION * held:
            break
    return kept


def _within_loss(ready: Prepared, bound: float) -> Plan:
    """Plan of the fewest units within a bound on the summed loss."""
    settings = ready.settings.model_copy(update={"max_loss": bound, "threshold": None})
    return allocate(replace(ready, settings=settings), allocation.Limits({}, ready.before))


# ------------------------------------------------------------------------------------------------------ what is lost


def bounded(objective: Objective, metric: Metric | None) -> str:
    """Name what ``max_drop`` bounds.

    Args:
        objective: Terms by which the pruned model is judged.
        metric: The user's own metric, or None.

    Returns:
        A note: the measures of all terms, or the metric.

    Raises:
        DataError: Nothing could be measured, or nothing but the equality of whole numbers.
    """
    if metric is not None:
        return f"`max_drop` bounds the metric {metric.name}, in its own units"
    judged = objective.judged
    if not judged:
        raise DataError(
            "no loss can be measured: every output is a constant or an input of the model; give another budget than "
            "`max_drop`."
        )
    if all(term.kind == "exact" for term in judged):
        raise DataError(
            "`max_drop` would bound the equality of whole numbers, which says little; give `outputs=NAME=KIND` or "
            "`metric`, or another budget."
        )
    measures = "; ".join(f"{promise(term)} of '{term.name}'" for term in judged)
    return f"`max_drop` bounds points of {measures}"


def drop(found: Verification) -> Drop:
    """The loss of the worst term.

    Args:
        found: The measures of all terms.

    Returns:
        Points lost, and of which measure.

    Raises:
        DataError: Nothing was measured.
    """
    if found.metric is not None:
        return Drop(found.metric.lost, found.metric.name)
    known = [m for m in found.outputs if any(v is not None for v in m.values.values())]
    if not known:
        raise DataError(
            "no loss can be measured on the evaluation data: the model has no floating-point output that is not all "
            "zero; give another budget than `max_drop`."
        )
    worst = max(known, key=lambda measure: measure.lost)
    return Drop(worst.lost, f"{worst.measure} of '{worst.term}'")
