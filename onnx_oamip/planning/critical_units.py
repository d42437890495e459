"""Critical units: the fewest units that keep the accuracy, found without a budget (``--importance oamip``).

The published program decides by ``loss_weight * loss + kept units`` how many neurons are critical, for networks that
fit into one program. For all networks, one program over the measured losses of all groups takes its place: as few units
as possible within a bound on the summed loss, which is the same trade with the multiplier of that bound as the weight.
The bound is the largest at which the pruned model, without a repair, keeps its accuracy on held-out samples.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.records import Budget, Coupling, Plan, Scores
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph.cost import full_widths

POINTS = 0.5
"""Most points that may be lost on held-out samples, before and after the refit."""
FIRST_BOUND = 0.01
"""Summed loss of the first plan that is tried; 1 is the loss of the average answer."""
FACTOR = 4.0
"""Factor between bounds until one keeps the accuracy and the next one does not."""
RESOLUTION = 1.1
"""Factor between two bounds below which the search ends."""
TRIES = 14
"""Most plans that are tried."""
MAX_LISTED_GROUPS = 12
"""Groups that the note lists by name."""


def is_possible(settings: Settings) -> bool:
    """Check whether the settings ask for critical units, whatever the scores turn out to be.

    Args:
        settings: Settings of the run.

    Returns:
        True for ``importance=oamip`` without a budget, and with a threshold in (0, 1] as the only one.
    """
    if settings.importance != "oamip" or settings.allocate != "mip":
        return False
    if settings.alpha is not None or settings.granularity != "unit":
        return False
    threshold = settings.threshold
    if settings.budget == Budget():
        return True
    return (
        threshold is not None
        and 0 < threshold <= 1
        and settings.budget == Budget(threshold=threshold)
    )


def is_asked_for(settings: Settings, scores: Scores) -> bool:
    """Check whether a run finds critical units.

    Args:
        settings: Settings of the run.
        scores: Scores of the units.

    Returns:
        True if the settings ask for it, and a threshold, if there is one, is on decoupled scores: these are losses of
        single layers, not the keep variables that the published threshold speaks of.
    """
    if not is_possible(settings) or scores.method != "oamip":
        return False
    return settings.threshold is None or not any("mode" in p for p in scores.programs)


def without_repair(settings: Settings) -> Settings:
    """Copy settings for scores and losses: critical units are those that the network needs as it is.

    Args:
        settings: Settings of the run.

    Returns:
        The settings, without a refit if critical units are asked for.
    """
    if not is_possible(settings):
        return settings
    return settings.model_copy(update={"refit": "none"})


def check(settings: Settings) -> None:
    """Refuse settings that contradict the search for critical units.

    Args:
        settings: Settings of the run.

    Raises:
        SettingsError: A setting excludes the search.
    """
    if not is_possible(settings):
        return
    if settings.iterations > 1:
        raise SettingsError(
            "`iterations` approaches a counted budget, and none is given; give `macs`, `params` or `size`."
        )
    if settings.effort == "high":
        raise SettingsError(
            "`effort=high` chooses widths under a fixed budget, and none is given; give `macs`, `params`, `size` or "
            "`latency`."
        )
    if settings.metric is not None and settings.threshold is None:
        raise SettingsError(
            "`metric` is in units of its own, in which nothing says how much may be lost; give `max_drop`."
        )


def describe(
    plan: Plan,
    coupling: Coupling,
    losses: Mapping[str, float],
    measure: str,
    samples: int,
) -> str:
    """Describe the critical units of a plan.

    Args:
        plan: The plan, with the record of its program.
        coupling: The units.
        losses: Points lost by state of the model, such as "without the refit".
        measure: What the points are of.
        samples: Number of held-out samples.

    Returns:
        A note: numbers of units by group, the multiplier, the bound, and the points lost.
    """
    record = plan.programs[-1]
    lost = ", ".join(f"{points:.2f} {state}" for state, points in losses.items())
    return (
        f"critical units: {record['units']} of {len(plan.keep)} ({_by_group(plan, coupling)}), the fewest within a "
        f"summed loss of {record['max_loss']:.3g} (lambda {record['lambda']:.3g} units per loss, at least "
        f"{record['least_units']:.1f} units by the relaxation); points lost on {samples:,} held-out samples: "
        f"{lost} ({measure})"
    )


def _by_group(plan: Plan, coupling: Coupling) -> str:
    wide = full_widths(coupling).tolist()
    parts = [
        f"{group.name} {width} of {full}"
        for group, width, full in zip(coupling.groups, plan.widths.tolist(), wide, strict=True)
    ]
    listed = ", ".join(parts[:MAX_LISTED_GROUPS])
    if len(parts) > MAX_LISTED_GROUPS:
        listed += ", ..."
    return listed


def next_bound(held: float, missed: float) -> float:
    """Choose the bound on the loss that is tried next.

    Args:
        held: Largest bound at which the accuracy was kept; 0 if there is none.
        missed: Smallest bound at which it was not; infinite if there is none.

    Returns:
        The geometric mean of both, or a step beyond the one that is known.
    """
    if held == 0 and np.isinf(missed):
        return FIRST_BOUND
    if held == 0:
        return missed / FACTOR
    if np.isinf(missed):
        return held * FACTOR
    return float(np.sqrt(held * missed))
