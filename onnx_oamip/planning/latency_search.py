"""Search for the latency row of the budget program under which the measured latency meets its budget.

The additive model of the latency is corrected with measurements of cut models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_oamip.core.errors import BudgetNotMet
from onnx_oamip.core.records import Bools
from onnx_oamip.graph.emptying import effect_of
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.planning import (
    allocation,
    latency_tables,
)
from onnx_oamip.planning.attempts import Prepared, allocate
from onnx_oamip.planning.budget_program import LinearisedLimit
from onnx_oamip.planning.latency_model import LatencyModel, profile
from onnx_oamip.statistics.context import Context
from onnx_oamip.verification.latency import compare_latency

LATENCY_TRIES = 6
LATENCY_SLACK = 0.05


def latency_limit(
    ready: Prepared,
    limit: allocation.Limits,
    share: float,
) -> LinearisedLimit:
    """Find the latency row under which the measured latency of the cut model keeps ``share`` of the original's.

    Args:
        ready: Scores and losses.
        limit: Limits of the counted budgets.
        share: Share of the original's latency.

    Returns:
        The row for the budget program.

    Raises:
        BudgetNotMet: Even the narrowest plan takes longer.
    """
    if ready.settings.latency_table is not None:
        return _by_table(ready, ready.settings.latency_table, share)
    table, whole = _measured(ready)
    target = share
    tried: list[tuple[float, float]] = []  # (target, measured)

    def row(target: float) -> LinearisedLimit:
        return table.limit(target * whole)

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


def predicted_limit(ready: Prepared, share: float) -> LinearisedLimit:
    """Make the latency row under which the predicted latency keeps a share of the original's.

    Args:
        ready: Scores and losses.
        share: Share of the original's latency.

    Returns:
        The row, which no measurement of a cut model has corrected.
    """
    if ready.settings.latency_table is not None:
        return _by_table(ready, ready.settings.latency_table, share)
    table, whole = _measured(ready)
    return table.limit(share * whole)


def _by_table(ready: Prepared, table: str, share: float) -> LinearisedLimit:
    """The row by the times of a table, without those of the branches that are left out."""
    effect = effect_of(ready.model, ready.coupling, _without_emptied(ready))
    removed = (*effect.idle, *effect.biases)
    return latency_tables.limit(table, ready.model, ready.coupling, share, removed)


def _without_emptied(ready: Prepared) -> Bools:
    """Keep mask (n_units,) of all units but those of emptied groups."""
    return ~np.isin(ready.coupling.unit_group, sorted(ready.emptied))


def _measured(ready: Prepared) -> tuple[LatencyModel, float]:
    """The fitted times of the network, and the measured ones of the original: what the model fits there may be off."""
    assert ready.ladder is not None
    table = profile(
        ready.model,
        ready.coupling,
        ready.ladder.widths,
        ready.samples,
        device=ready.device,
        seed=ready.settings.seed,
    )
    widest = float(table.measured[0])
    if not ready.emptied:
        return table, widest
    cut = rewrite.cut(ready.model, ready.coupling, _without_emptied(ready))
    return table, widest / latency_ratio(ready, cut)


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
