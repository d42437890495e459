"""Search for critical units: the fewest units that keep the accuracy on held-out samples.

Plans come from the budget program with a bound on the summed loss; ``critical_units`` has its rules and constants.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnx_oamip.core.records import (
    Plan,
)
from onnx_oamip.planning import (
    allocation,
    critical_units,
)
from onnx_oamip.planning.attempts import Prepared, allocate, losses_around
from onnx_oamip.planning.drop_search import Drop, measured_drop
from onnx_oamip.planning.execution import Attempt, carry_out
from onnx_oamip.planning.recorded_answers import original_answers
from onnx_oamip.verification import equivalence


def fewest_units(ready: Prepared) -> Attempt:
    """Find the fewest units that keep the accuracy on held-out samples, before and after the refit.

    Losses are measured a second time around the first result, where the groups stand in for each other. If a refit
    makes a plan lose more than ``critical_units.POINTS``, the next wider one follows; the last one keeps all units.

    Args:
        ready: Scores and losses.

    Returns:
        The attempt; a note of its plan describes the units.
    """
    assert ready.held_out is not None  # `oamip` needs data, a part of which is held out
    original = original_answers(ready)
    unrepaired = replace(ready, settings=critical_units.without_repair(ready.settings))
    kept = _keeping_accuracy(unrepaired, original)
    if kept:
        narrowest, _ = min(kept, key=_number_of_units)
        curves, ladder = losses_around(unrepaired, narrowest.keep)
        kept += _keeping_accuracy(replace(unrepaired, curves=curves, ladder=ladder), original)
    else:
        lossless = _within_loss(unrepaired, 0.0)
        kept.append(
            (lossless, measured_drop(unrepaired, original, carry_out(unrepaired, lossless)))
        )
    silent = replace(ready, progress=None)
    for chosen, lost in sorted(kept, key=_number_of_units):
        found = carry_out(silent, chosen)
        after = measured_drop(silent, original, found)
        if max(lost.lost, after.lost) <= critical_units.POINTS:
            points = {"without the refit": lost.lost, "with it": after.lost}
            note = critical_units.describe(
                chosen, ready.coupling, points, lost.measure, ready.held_out.count
            )
            return replace(found, plan=replace(chosen, notes=(*chosen.notes, note)))
    chosen = _all_units(silent)
    note = (
        f"critical units: all {len(chosen.keep)}, as every plan that was tried with fewer of them loses more than "
        f"{critical_units.POINTS} points on {ready.held_out.source}, before or after the refit; a budget, or "
        "`max_drop`, allows more"
    )
    return carry_out(silent, replace(chosen, notes=(*chosen.notes, note)))


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
        lost = measured_drop(silent, original, carry_out(silent, chosen))
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


def _all_units(ready: Prepared) -> Plan:
    """Plan that nothing limits."""
    settings = ready.settings.model_copy(update={"threshold": None})
    return allocate(replace(ready, settings=settings), allocation.Limits({}, ready.before))


def _within_loss(ready: Prepared, bound: float) -> Plan:
    """Plan of the fewest units within a bound on the summed loss."""
    settings = ready.settings.model_copy(update={"max_loss": bound, "threshold": None})
    return allocate(replace(ready, settings=settings), allocation.Limits({}, ready.before))
