"""Search for a pruned model that meets its budget, from scores and measured losses.

Counted budgets need one attempt. A measured latency (``latency_search``), a drop (``drop_search``) and the accuracy
that critical units keep (``critical_search``) are approached by several.
"""

from __future__ import annotations

from onnx_oamip.core.budgets import counted_shares
from onnx_oamip.core.errors import GateFailed
from onnx_oamip.core.records import (
    Budget,
    Cost,
    Plan,
)
from onnx_oamip.planning import (
    allocation,
    critical_units,
    emptied_branches,
    latency_search,
)
from onnx_oamip.planning.attempts import Prepared, allocate, attempt, loses_much
from onnx_oamip.planning.budget_program import LinearisedLimit
from onnx_oamip.planning.critical_search import fewest_units
from onnx_oamip.planning.drop_search import smallest
from onnx_oamip.planning.execution import Attempt, folds_constants
from onnx_oamip.repair import refit_scope


def plan(ready: Prepared) -> Plan:
    """Make the plan that :func:`search` would carry out.

    Args:
        ready: Scores and losses.

    Returns:
        The plan. A model is cut only for budgets that are measured on one (`size`, `max_drop`), for critical units, and
        where a plan loses so much that others are compared with it.

    Raises:
        BudgetNotMet: No plan meets the budget.
    """
    settings = ready.settings
    measured = settings.size is not None or settings.max_drop is not None
    critical = critical_units.is_asked_for(settings, ready.scores)
    if not (measured or critical or settings.effort == "high" or ready.emptiable):
        chosen = allocate(ready, *_limits(ready))
        if not loses_much(ready, chosen):
            return chosen
    found = search(ready)
    meets(ready.settings.budget, ready.before, found.after)
    return found.plan


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
    if ready.settings.max_drop is not None:
        return smallest(ready, *_limits(ready), ready.settings.max_drop)
    if critical_units.is_asked_for(ready.settings, ready.scores):
        return fewest_units(ready)
    if ready.emptiable:
        return emptied_branches.search(ready, _counted_limits(ready))
    return attempt(ready, *_limits(ready))


def _limits(ready: Prepared) -> tuple[allocation.Limits, tuple[LinearisedLimit, ...]]:
    """Limits of the counted budgets, and the linear constraint of a latency budget."""
    limit = _counted_limits(ready)
    if ready.settings.latency is None:
        return limit, ()
    budget = latency_search.opened(ready, ready.settings.latency)
    return limit, (latency_search.corrected(ready, limit, budget).row(),)


def _counted_limits(ready: Prepared) -> allocation.Limits:
    """Limits of the counted budgets."""
    adds = ready.settings.refit != "none" or folds_constants(ready.settings)
    return allocation.limits(
        ready.settings.budget, ready.before, refit_scope.new_biases(ready.model) if adds else 0
    )
