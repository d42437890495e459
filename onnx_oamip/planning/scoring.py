"""Scores of all units by the importance method of the settings, and the order of removal that loses least."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np

from onnx_oamip.artifacts import cache_entries
from onnx_oamip.core.foreign_code import is_own
from onnx_oamip.core.options import (
    AllocationOptions,
    BudgetOptions,
    ConstraintOptions,
    DataOptions,
    ObjectiveOptions,
)
from onnx_oamip.core.records import (
    Coupling,
    Floats,
    Ints,
    Scores,
    Statistics,
)
from onnx_oamip.graph.cost import full_widths
from onnx_oamip.graph.outputs import with_outputs
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.importance import Method, find
from onnx_oamip.objective import document, loss, sums
from onnx_oamip.planning import foreign_scores, score_draws, sensitivity
from onnx_oamip.planning.allocation import best_units
from onnx_oamip.repair import mean_folding
from onnx_oamip.statistics import workload
from onnx_oamip.statistics.collector import collect, parts
from onnx_oamip.statistics.context import Collected, Context
from onnx_oamip.statistics.layer_problems import parallel_groups
from onnx_oamip.statistics.requests import COVARIANCE, MOMENTS

CHOICE_SAMPLES = 64
"""Samples on which orders of removal are compared for one group."""
MARGIN = 0.2
"""Share by which another order must lose less than that of the method: so much comes by chance on few samples."""
TRIALS = 64
"""Choices of orders for all groups that are measured at most."""
AVERAGE = 1.0
"""Loss of a model that gives the average answer."""
_IRRELEVANT = {
    *BudgetOptions.model_fields,
    *AllocationOptions.model_fields,
    *ConstraintOptions.model_fields,
    *DataOptions.model_fields,
    *ObjectiveOptions.model_fields,
    "force",
    "strict",
    "workers",
    "scheduler",
    "cache",
    "batch_size",
    "max_memory",
    "no_provenance",
}
"""Settings that no score depends on, or that the identity of the context and the objective cover."""


def score(context: Context) -> Scores:
    """Score every unit of a model by the importance method of the settings.

    All scores are computed here, for every command and every round of ``--iterations``. The statistics that the method
    requests are collected first; scores that rest on them are taken from the store where an earlier run kept them.

    Args:
        context: The model, its calibration samples and the settings.

    Returns:
        One score per unit. Constraints on plans are not part of it (see ``limits.constraints``).
    """
    settings = context.settings
    if settings.draws == 1:
        return _score(context)
    found = []
    samples = context.samples
    indices = score_draws.samples_of_draws(
        samples.count, settings.draws, settings.seed, samples.fixed_batch or 1
    )
    for draw, index in enumerate(indices):
        identity = {**context.cache_identity, "draw": [draw, settings.draws]}
        drawn = replace(
            context,
            samples=samples.take(index),
            cache_identity=identity,
            collected=Collected(),
        )
        found.append(_score(drawn))
    return score_draws.combine(found)


def _score(context: Context) -> Scores:
    """Scores on all samples of a context, from the store where they are there."""
    settings = context.settings
    method = find(settings.importance)
    requests = method.requests(settings)

    def make() -> Scores:
        if requests:
            statistics = collect(context, requests)
        else:
            statistics = None
        return apply_method(context, method, statistics)

    with context.clock("score"):
        # Looking at weights alone costs less than looking up, and code from elsewhere may have changed.
        # A program is only written, and a solution of it only read, where it is solved.
        has_files = settings.write_program is not None or settings.read_solutions is not None
        if not requests or not is_own(method.score) or has_files:
            return make()
        depends = {
            **settings.model_dump(mode="json", exclude=_IRRELEVANT),
            **context.cache_identity,
            "objective": document(context.objective),
        }
        return context.store.recall(
            cache_entries.SCORES, depends, make, lambda found: fits(found, context.coupling)
        )


def fits(found: Scores, coupling: Coupling) -> bool:
    """Validate a cache entry: the scores of a coupling.

    Args:
        found: Scores as read.
        coupling: The units.

    Returns:
        True if there is one finite float64 score per unit, and texts and records have their types.
    """
    texts = all(isinstance(text, str) for text in (found.method, *found.notes))
    whole = found.values.dtype == np.float64 and found.values.shape == (coupling.n_units,)
    records = all(isinstance(program, dict) for program in found.programs)
    return whole and texts and records and bool(np.isfinite(found.values).all())


def apply_method(context: Context, method: Method, statistics: Statistics | None) -> Scores:
    """Score all units by a method; if it offers other orders as well, choose the order of every group by measurement.

    The values of the scores of a group stay the same, sorted into that order. For programs without a repair by least
    squares whole models are measured too, as the losses of other layers then count.

    Args:
        context: The model, its calibration samples and the settings.
        method: The method.
        statistics: The statistics that it requests.

    Returns:
        The scores, with a note on the choice.
    """
    model = context.model
    coupling = context.coupling
    settings = context.settings
    if is_own(method.score):
        found = method.score(model, coupling, statistics, settings)
    else:
        found = foreign_scores.score(context, method, statistics)
    if not found.others:
        return found
    measured = parts(context.samples)[1]
    levels = len(sensitivity.CHOICE) * (1 + len(found.others))
    passes = sensitivity.passes(coupling, levels)
    few = workload.measured(context, passes, workload.LOSS_MACS).first(CHOICE_SAMPLES)
    names = ["the program" if found.method == "oamip" else found.method, *found.others]
    orders = np.stack([found.values, *found.others.values()])
    programmed = found.method == "oamip"
    grams = collect(context, {COVARIANCE})[COVARIANCE]
    alone = sensitivity.choose(
        model,
        coupling,
        grams,
        list(orders),
        [feed for _, feed in few.batches(context.batch)],
        device=context.device,
        objective=context.objective,
        workers=parallel_groups(context.workers, model, coupling, grams, settings.max_memory),
        progress=context.progress,
        repair=settings.refit,
        scheduler=settings.scheduler,
        margin=0.0 if programmed else MARGIN,
    )
    whole = programmed and settings.refit != "least-squares"
    picks = _together(context, orders, alone) if whole else alone
    values = found.values.copy()
    for group, pick in zip(coupling.groups, picks.tolist(), strict=True):
        if pick:
            values[group.units] = _sorted_into(orders[pick][group.units], values[group.units])
    counts = ", ".join(
        f"{name} {n}" for i, name in enumerate(names) if (n := int((picks == i).sum()))
    )
    if not programmed and not picks.any():
        return replace(found, others={})
    count = measured.count if whole else few.count
    note = f"orders of removal measured on {count} samples; least loss by groups: {counts}"
    return replace(found, values=values, others={}, notes=(*found.notes, note))


def _sorted_into(order: Floats, values: Floats) -> Floats:
    """Values of a group in another order (units,). Equal ones are moved apart by rounding errors, to keep the order."""
    ranked = np.sort(values)
    apart = 4 * np.finfo(np.float64).eps * (np.abs(ranked).max(initial=0.0) or 1.0)
    among_equals = np.arange(len(values)) - np.searchsorted(ranked, ranked, side="left")
    result = np.empty_like(values)
    rising = np.maximum.accumulate(ranked + apart * among_equals)
    result[np.argsort(order, kind="stable")] = rising
    return result


def _together(context: Context, orders: Floats, alone: Ints) -> Ints:
    """Per group an index into ``orders`` (orders, n_units), such that the whole model loses little.

    Layers that lost units do not behave as layers alone: every order for all groups is measured, and ``alone`` (the
    best per group); the best of them is then changed group by group while that helps, for ``TRIALS`` trials at most.
    The loss is that of the cut model at the shares of ``sensitivity.CHOICE``, by its logarithms, and nowhere counts as
    more than that of a model that gives the average answer: where all is lost, differences mean nothing.
    """
    model = context.model
    coupling = context.coupling
    device = context.device
    progress = context.progress
    repair = context.settings.refit
    if repair == "bias":
        moments = collect(context, {MOMENTS})
    else:
        moments = None
    feeds = [feed for _, feed in parts(context.samples)[1].batches(context.batch)]
    objective = context.objective
    wanted = objective.tensors
    original = Session(with_outputs(model, wanted), device)
    truth = [original.run(feed, wanted) for feed in feeds]
    groups = len(coupling.groups)
    tried = 0

    def total_loss(picks: Ints) -> float:
        nonlocal tried
        tried += 1
        if progress:
            progress("choose together", min(tried, TRIALS), TRIALS)
        values = orders[picks[coupling.unit_group], np.arange(coupling.n_units)]
        total = 0.0
        for share in sensitivity.CHOICE:
            widths = np.maximum(1, np.round(share * full_widths(coupling))).astype(np.int64)
            keep = best_units(coupling, values, widths)
            proto = rewrite.cut(model, coupling, keep)
            if moments is not None:
                proto = mean_folding.fold_means(model, coupling, keep, moments, proto).proto
            session = Session(with_outputs(model, wanted, proto), device, what="the cut model")
            found = sum(
                sums(objective, t, session.run(f, wanted))
                for f, t in zip(feeds, truth, strict=True)
            )
            lost = loss(objective, np.asarray(found)).total
            total += float(np.log(min(lost, AVERAGE) + 1e-9))
        return total

    starts = [alone, *(np.full(groups, i, np.int64) for i in range(len(orders)))]
    losses = [total_loss(start) for start in starts]
    best = starts[int(np.argmin(losses))].copy()
    least = min(losses)
    for g, i in product(range(groups), range(len(orders))):
        if tried >= TRIALS:
            break
        trial = best.copy()
        trial[g] = i
        if i != best[g] and (found := total_loss(trial)) < least:
            best = trial
            least = found
    return best


def order(scores: Scores, coupling: Coupling) -> Floats:
    """Return the removal order as scores without ties.

    Args:
        scores: Scores of all units.
        coupling: The units.

    Returns:
        Ranks (n_units,), larger means keep. Of equal scores the higher index is removed first, as in
        ``allocation.best_units``.
    """
    rank = np.lexsort((-np.arange(coupling.n_units), scores.values))
    order = np.empty(coupling.n_units)
    order[rank] = np.arange(coupling.n_units)
    return order
