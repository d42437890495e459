"""Search for the latency row of the budget program under which the measured latency meets its budget.

The additive model of the latency is fitted once, and corrected with measurements of cut models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_oamip.core.errors import BudgetNotMet
from onnx_oamip.graph.emptying import effect_of
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.planning import (
    allocation,
    latency_tables,
)
from onnx_oamip.planning.attempts import Prepared, allocate
from onnx_oamip.planning.budget_program import LinearisedLimit
from onnx_oamip.planning.latency_model import profile
from onnx_oamip.statistics.context import Context
from onnx_oamip.verification.latency import compare_latency

LATENCY_TRIES = 6
LATENCY_SLACK = 0.05


@dataclass(frozen=True)
class LatencyBudget:
    """Latency budget of a run. Times are measured once, and corrected by every cut model that is measured.

    Attributes:
        share: Share of the original's latency.
        base: Limit on the fitted times of the network with all branches.
        factor: Factor of that limit with which the measured latency meets the budget.
    """

    share: float
    base: LinearisedLimit
    factor: float = 1.0

    def row(self, removed: Iterable[str] = ()) -> LinearisedLimit:
        """Make the row of the budget program.

        Args:
            removed: Names of nodes that are removed at any widths.

        Returns:
            The corrected limit.
        """
        return replace(self.base, limit=self.factor * self.base.limit).without(removed)


def opened(ready: Prepared, share: float) -> LatencyBudget:
    """Measure the times of the original at several widths, or read those of a table.

    Args:
        ready: Scores and losses.
        share: Share of the original's latency.

    Returns:
        The budget, which no measurement of a planned model has corrected.
    """
    table = ready.settings.latency_table
    if table is not None:
        return LatencyBudget(share, latency_tables.limit(table, ready.model, ready.coupling, share))
    assert ready.ladder is not None
    fitted = profile(
        ready.model,
        ready.coupling,
        ready.ladder.widths,
        ready.samples,
        device=ready.device,
        seed=ready.settings.seed,
    )
    # Of the original there is a measured time, and what the model fits there may be off.
    return LatencyBudget(share, fitted.limit(share * float(fitted.measured[0])))


def corrected(ready: Prepared, limit: allocation.Limits, budget: LatencyBudget) -> LatencyBudget:
    """Find the factor with which the measured latency of the cut model meets the budget.

    Times of a table are those of another device, on which no model is measured.

    Args:
        ready: Scores and losses, and the branches that are left out.
        limit: Limits of the counted budgets.
        budget: The budget; its factor is tried first.

    Returns:
        The budget with the factor.

    Raises:
        BudgetNotMet: Even the narrowest plan takes longer.
    """
    removed = removed_nodes(ready)
    share = budget.share
    if ready.settings.latency_table is not None:
        latency_tables.refuse_constant(ready.settings.latency_table, budget.row(removed), share)
        return budget
    factor = budget.factor
    tried: list[tuple[float, float]] = []  # (factor, measured)
    for i in range(LATENCY_TRIES):
        row = replace(budget, factor=factor).row(removed)
        chosen = allocate(ready, limit, (row,))
        cut = rewrite.cut(ready.model, ready.coupling, chosen.keep)
        tried.append((factor, latency_ratio(ready, cut)))
        if ready.progress:
            ready.progress("latency", i + 1, LATENCY_TRIES)
        if share * (1 - LATENCY_SLACK) <= tried[-1][1] <= share:
            break
        factor = _aim(tried, share)
    met = [(measured, factor) for factor, measured in tried if measured <= share]
    if not met:
        raise BudgetNotMet(
            f"the `latency` budget cannot be met: the narrowest plan found still takes {min(m for _, m in tried):.2f} "
            f"of the original's time on {ready.device}, asked for {share}; most of the rest does not depend on widths."
        )
    return replace(budget, factor=max(met)[1])


def removed_nodes(ready: Prepared) -> tuple[str, ...]:
    """List the nodes of the branches that every plan leaves out.

    Args:
        ready: The network and the branches.

    Returns:
        Their names, with those of the nodes that become constants.
    """
    keep = ~np.isin(ready.coupling.unit_group, sorted(ready.emptied))
    return effect_of(ready.model, ready.coupling, keep).removed


def _aim(tried: Sequence[tuple[float, float]], share: float) -> float:
    """The next factor, where the measurement should land just below the share.

    The additive model is off in proportion to the factor; between one that was met and one that was not, by less.
    """
    goal = share * (1 - LATENCY_SLACK / 2)
    met = [(measured, factor) for factor, measured in tried if measured <= share]
    missed = [(measured, factor) for factor, measured in tried if measured > share]
    if met and missed:
        (below, low), (above, high) = max(met), min(missed)
        if low < high:  # noise may turn them around
            return low + (high - low) * (goal - below) / (above - below)
    factor, measured = tried[-1]
    return factor * goal / measured


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
