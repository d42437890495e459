"""Scores over several draws of the calibration samples: their mean, their spread, and the units all draws agree on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_oamip.core.records import Bools, Coupling, Floats, Ints, Scores
from onnx_oamip.graph.cost import full_widths
from onnx_oamip.planning.allocation import best_units

SHARE = 0.5
"""Share of the calibration samples in one draw."""
TINY = 1e-30
"""Divisor in place of a mean score of 0."""


@dataclass(frozen=True)
class Agreement:
    """Agreement of the draws on one group.

    Attributes:
        name: Name of the group.
        spread: Standard deviation of a score over the draws, averaged over the units, relative to the mean score.
        kept: Units that the plan keeps.
        agreed: Those of them that every draw alone would keep at the same width.
    """

    name: str
    spread: float
    kept: int
    agreed: int


def samples_of_draws(count: int, draws: int, seed: int, fixed_batch: int = 1) -> list[Ints]:
    """Draw samples without replacement, anew for every draw.

    Args:
        count: Number of calibration samples.
        draws: Number of draws.
        seed: Seed of the run.
        fixed_batch: Batch that the model is fixed to; a draw holds a multiple of it.

    Returns:
        Ascending indices of the samples of each draw.
    """
    size = round(SHARE * count)
    size = max(size - size % fixed_batch, fixed_batch)
    rng = np.random.default_rng([seed, draws])
    return [np.sort(rng.permutation(count)[:size]) for _ in range(draws)]


def combine(found: Sequence[Scores]) -> Scores:
    """Combine the scores of several draws.

    Args:
        found: Scores by one method on each draw.

    Returns:
        Their mean, with the scores of every draw. Records of programs say their draw; notes are those of the first.
    """
    draws = np.stack([scores.values for scores in found])
    programs = [
        {**program, "draw": draw}
        for draw, scores in enumerate(found)
        for program in scores.programs
    ]
    return replace(found[0], values=draws.mean(axis=0), programs=tuple(programs), draws=draws)


def agreements(scores: Scores, coupling: Coupling, keep: Bools) -> list[Agreement]:
    """Compare the draws under a plan.

    Args:
        scores: Scores with their draws.
        coupling: The units.
        keep: Keep mask of the plan (n_units,).

    Returns:
        One record per group; empty without draws.
    """
    if scores.draws is None:
        return []
    widths = np.bincount(coupling.unit_group[keep], minlength=len(full_widths(coupling)))
    by_draw = [best_units(coupling, values, widths) for values in scores.draws]
    agreed = np.logical_and.reduce([keep, *by_draw])
    deviation: Floats = scores.draws.std(axis=0)
    mean = np.abs(scores.draws).mean(axis=0)
    return [
        Agreement(
            name=group.name,
            spread=float(
                deviation[group.units].mean() / max(float(mean[group.units].mean()), TINY)
            ),
            kept=int(keep[group.units].sum()),
            agreed=int(agreed[group.units].sum()),
        )
        for group in coupling.groups
    ]


def notes(scores: Scores, coupling: Coupling, keep: Bools) -> tuple[str, ...]:
    """Describe the agreement of the draws.

    Args:
        scores: Scores with their draws.
        coupling: The units.
        keep: Keep mask of the plan (n_units,).

    Returns:
        One note; none without draws.
    """
    found = agreements(scores, coupling, keep)
    if scores.draws is None or not found:
        return ()
    kept = sum(group.kept for group in found)
    agreed = sum(group.agreed for group in found)
    least = min(found, key=lambda group: group.agreed / max(group.kept, 1))
    spread = float(np.mean([group.spread for group in found]))
    note = (
        f"scores are means over {len(scores.draws)} draws of the samples: all draws agree on {agreed} of {kept} kept "
        f"units, in '{least.name}' on {least.agreed} of {least.kept}; a score spreads by {spread:.0%} of the mean"
    )
    return (note,)
