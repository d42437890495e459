"""Emptied branches: whole branches that a plan leaves out where that loses less than narrower layers.

Losses of several emptied branches do not add up: where one block stands in for another, each can be left out alone. So
they are chosen one after the other. The budget program is solved with each branch left out that could pay, the best is
carried out, and stays if the model then loses less on samples that no refit used. Before the next one, the losses of
leaving out the others are measured again without those that are gone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from onnx_oamip.core.errors import BudgetNotMet
from onnx_oamip.core.records import Budget, Floats, Plan
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph.cost import full_widths
from onnx_oamip.graph.emptying import Emptying
from onnx_oamip.planning import allocation, attempts, latency_search, width_losses
from onnx_oamip.planning.attempts import Prepared
from onnx_oamip.planning.budget_program import LinearisedLimit
from onnx_oamip.planning.execution import Attempt, Draft
from onnx_oamip.planning.latency_search import LatencyBudget
from onnx_oamip.statistics.context import Context

ROUNDS: Mapping[str, int] = {"low": 1, "normal": 2, "high": 6}
"""Most branches that are left out one after the other, by ``effort``."""
MOST_PROGRAMS = 6
"""Most branches that a program is solved for in a round: those of least loss per saved cost."""
SLACK = 1.5
"""A branch is tried although the program predicts up to this many times the loss with it.

Measured alone, only the constant in place of a branch is fitted. In a plan, the layers behind it are refitted as well.
"""
MAX_LISTED = 6
"""Branches that the note lists by name."""


def applies(settings: Settings) -> bool:
    """Check whether a run may leave out branches.

    Args:
        settings: Settings of the run.

    Returns:
        True for the budget program under limits on costs, in one round. By default only where latency is limited: there
        a kernel saves time that narrower layers do not.
    """
    budget = settings.budget
    is_asked_for = settings.empty == "always" or (
        settings.empty == "auto" and budget.latency is not None
    )
    return (
        is_asked_for
        and width_losses.programmed(settings)
        and settings.granularity == "unit"
        and settings.iterations == 1
        and budget != Budget()
        and budget
        == Budget(macs=budget.macs, params=budget.params, size=budget.size, latency=budget.latency)
    )


def emptiable(context: Context, floor: Floats) -> frozenset[int]:
    """Find the groups of which a plan may keep no unit.

    Args:
        context: The original model and the settings.
        floor: Least share of every group (groups,).

    Returns:
        Numbers of the groups; none where branches of If nodes stand in the graph.
    """
    if not applies(context.settings) or context.whole is not None:
        return frozenset()
    bundles = Emptying(context.model, context.coupling).bundles()
    return frozenset(g for g, bundle in bundles.items() if not floor[sorted(bundle)].any())


def search(ready: Prepared, limit: allocation.Limits) -> Attempt:
    """Find and carry out a plan that may leave out branches.

    Args:
        ready: Scores and losses.
        limit: Limits of the counted budgets.

    Returns:
        The attempt that loses least.

    Raises:
        BudgetNotMet: There is no plan within the limits, with all branches or without some.
    """
    budget = None
    if ready.settings.latency is not None:
        budget = latency_search.opened(ready, ready.settings.latency)
    best: Draft | None = None
    missed: BudgetNotMet | None = None
    try:
        best, budget = _draft(ready, limit, budget)
    except BudgetNotMet as error:
        if budget is None:
            raise
        missed = error
    first = math.inf if best is None else best.loss
    current = ready
    for _ in range(ROUNDS[ready.settings.effort]):
        following = _next(current, limit, budget, is_met=best is not None)
        if following is None:
            break
        current = following
        try:
            found, budget = _draft(current, limit, budget)
        except BudgetNotMet:
            continue
        if best is not None and found.loss >= best.loss:
            break
        best = found.noted(_note(current, found.loss, first))
    if best is None:
        assert missed is not None
        raise missed
    return best.finished


def _draft(
    ready: Prepared, limit: allocation.Limits, budget: LatencyBudget | None
) -> tuple[Draft, LatencyBudget | None]:
    """A plan without some branches, and the latency budget as corrected for it."""
    if budget is not None:
        budget = latency_search.corrected(ready, limit, budget)
    return attempts.draft(ready, limit, _rows(ready, budget)), budget


def _rows(ready: Prepared, budget: LatencyBudget | None) -> tuple[LinearisedLimit, ...]:
    """The row of a latency budget for the network without some branches."""
    return () if budget is None else (budget.row(latency_search.removed_nodes(ready)),)


def _next(
    ready: Prepared,
    limit: allocation.Limits,
    budget: LatencyBudget | None,
    *,
    is_met: bool,
) -> Prepared | None:
    """Leaves out the branch with which the program predicts the least loss; None if none of them can pay.

    Args:
        ready: Scores and losses, with the branches that are left out already.
        limit: Limits of the counted budgets.
        budget: Latency budget, as corrected by the last measurement.
        is_met: Whether the limits can be met with the branches that are left.
    """
    graph = Emptying(ready.model, ready.coupling)
    bundles = {g: b for g, b in graph.bundles(ready.emptied).items() if g in ready.emptiable}
    losses = _losses(ready, frozenset(bundles))
    rows = _rows(ready, budget)
    bound = _predicted(ready, limit, rows) if is_met else math.inf
    saved = {g: _saving(ready, limit, rows, bundle) for g, bundle in bundles.items()}
    hopeful = [g for g in bundles if saved[g] > 0 and losses[g] < SLACK * bound]
    hopeful.sort(key=lambda g: (losses[g] - ready.emptied_loss) / saved[g])
    chosen = None
    least = SLACK * bound
    for group in hopeful[:MOST_PROGRAMS]:
        narrower = ready.without(ready.emptied | bundles[group], losses[group])
        predicted = _predicted(narrower, limit, _rows(narrower, budget))
        if predicted < least:
            chosen, least = narrower, predicted
    if chosen is None and not is_met and hopeful:
        group = hopeful[0]
        return ready.without(ready.emptied | bundles[group], losses[group])
    return chosen


def _losses(ready: Prepared, groups: frozenset[int]) -> dict[int, float]:
    """Loss without each of some groups and those that are left out already."""
    if not ready.emptied:
        return {group: float(ready.curves[group].loss[0]) for group in groups}
    keep = ~np.isin(ready.coupling.unit_group, sorted(ready.emptied))
    around = width_losses.losses_of_groups(ready, ready.scores, keep, only=groups)
    return {group: ready.emptied_loss + float(around[group].loss[0]) for group in groups}


def _predicted(
    ready: Prepared, limit: allocation.Limits, extra: tuple[LinearisedLimit, ...]
) -> float:
    """Summed loss of the plan that the program chooses; infinite if there is none."""
    try:
        plan = attempts.allocate(ready, limit, extra)
    except BudgetNotMet:
        return math.inf
    return ready.emptied_loss + _summed(ready, plan)


def _summed(ready: Prepared, plan: Plan) -> float:
    assert ready.ladder is not None
    rows = zip(ready.ladder.widths, ready.ladder.cost, plan.widths.tolist(), strict=True)
    return sum(float(np.interp(width, widths, cost)) for widths, cost, width in rows)


def _saving(
    ready: Prepared,
    limit: allocation.Limits,
    extra: tuple[LinearisedLimit, ...],
    bundle: frozenset[int],
) -> float:
    """Largest share of a limit that the network without some groups saves beyond what it saves already."""
    with_them = full_widths(ready.coupling)
    with_them[sorted(ready.emptied)] = 0
    without = with_them.copy()
    without[sorted(bundle)] = 0
    ledger = ready.ledger
    before, after = (limit.shares(ledger.cost(widths)) for widths in (with_them, without))
    saved = [before[name] - after[name] for name in before]
    for row in extra:
        times = [ledger.terms(row.products, ledger.lengths(w)).sum() for w in (with_them, without)]
        saved.append(float(times[0] - times[1]) / row.limit)
    return max(saved, default=0.0)


def _note(ready: Prepared, lost: float, first: float) -> str:
    """Note on what a plan leaves out."""
    names = [ready.coupling.groups[group].name for group in sorted(ready.emptied)]
    listed = ", ".join(names[:MAX_LISTED]) + (", ..." if len(names) > MAX_LISTED else "")
    gain = (
        f"in place of {first:.3g}" if math.isfinite(first) else "and meets a budget that it missed"
    )
    return (
        f"{len(names)} groups are emptied, so that their branches are removed ({listed}): on calibration samples that "
        f"no refit used the model loses {lost:.3g} {gain}"
    )
