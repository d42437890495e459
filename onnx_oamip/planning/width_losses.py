"""Losses by width of every group: measured at a few widths, interpolated to every width that a plan may choose."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_oamip.artifacts import cache_entries
from onnx_oamip.artifacts.cache import Store
from onnx_oamip.core.records import (
    Bools,
    Budget,
    Coupling,
    Floats,
    Ints,
    Scores,
    Sensitivity,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph import cost
from onnx_oamip.objective import document
from onnx_oamip.planning import allocation, critical_units, scoring, sensitivity
from onnx_oamip.planning.budget_program import Ladder
from onnx_oamip.statistics import workload
from onnx_oamip.statistics.collector import collect, parts
from onnx_oamip.statistics.context import Context
from onnx_oamip.statistics.layer_problems import parallel_groups
from onnx_oamip.statistics.requests import COVARIANCE

LOW_SHARE = 0.25
"""Share of the samples for losses, and of the bound on their multiply-accumulates, with ``effort=low``."""
LOW_SAMPLES = 64
"""Samples that are taken with ``effort=low``, if there are so many, however small the share is."""
SECONDS_BETWEEN_WRITES = 1.0
"""Seconds of measurement that an interrupted run loses, at most, besides the groups it was at."""


def programmed(settings: Settings) -> bool:
    """Check whether the budget program runs, which needs measured losses.

    Args:
        settings: Settings of the run.

    Returns:
        False for other allocations, and if `alpha` is the only budget; True also for critical units.
    """
    if settings.allocate != "mip":
        return False
    return settings.budget != Budget() or critical_units.is_possible(settings)


def measure(
    context: Context,
    scores: Scores,
    *,
    step: Ints,
    floor: Floats,
    emptiable: frozenset[int] = frozenset(),
) -> tuple[Ladder | None, tuple[Sensitivity, ...]]:
    """Measure the losses of the original model when its units are removed in the order of some scores.

    Args:
        context: The original model, whose groups are narrowed one at a time.
        scores: They give the order of removal.
        step: Units per alignment step of every group (groups,).
        floor: Least share of every group (groups,).
        emptiable: Groups that are measured without any unit as well.

    Returns:
        (losses at every width that a plan may choose, losses as measured); (None, ()) where no program needs them.
    """
    if not programmed(context.settings):
        return None, ()
    curves = losses_of_groups(context, scores, emptiable=emptiable)
    return rungs(context.coupling, curves, step, floor, most=context.widest), curves


def note(context: Context) -> str:
    """Describe a measurement on fewer samples than there are for losses.

    Args:
        context: The original model.

    Returns:
        A sentence for the user; empty where all samples are measured on, or none.
    """
    if not programmed(context.settings):
        return ""
    every = parts(context.samples)[1].count
    count = _measured(context).count
    if context.settings.effort == "low":
        return (
            f"losses of widths are measured on {count} of {every} samples, at {len(sensitivity.FEW_LEVELS) + 1} widths "
            f"of a group in place of {len(sensitivity.LEVELS) + 1}, as `effort=low` asks"
        )
    if count == every:
        return ""
    macs = context.before.macs / max(context.model.batch, 1) / 1e9
    runs = round(sensitivity.passes(context.coupling))
    return (
        f"losses of widths are measured on {count} of {every} samples, because a network of {macs:.2g} GMACs runs "
        f"about {runs} times on each; `effort=high` takes all"
    )


def _measured(context: Context) -> Samples:
    """Samples that the losses of groups are measured on: with ``effort=high`` all that there are for losses."""
    every = parts(context.samples)[1]
    if context.settings.effort == "high":
        return every
    few = context.settings.effort == "low"
    passes = sensitivity.passes(context.coupling, len(_shares(context.settings)) + 1)
    most = workload.LOSS_MACS * (LOW_SHARE if few else 1.0)
    samples = workload.measured(context, passes, most)
    if few:
        enough = max(math.ceil(LOW_SHARE * every.count), LOW_SAMPLES)
        return samples.first(min(enough, samples.count))
    return samples


def _shares(settings: Settings) -> tuple[float, ...]:
    """Shares of a group's width at which its loss is measured."""
    return sensitivity.FEW_LEVELS if settings.effort == "low" else sensitivity.LEVELS


def losses_of_groups(
    context: Context,
    scores: Scores,
    around: Bools | None = None,
    *,
    emptiable: frozenset[int] = frozenset(),
    only: Collection[int] | None = None,
) -> tuple[Sensitivity, ...]:
    """Measure the losses of all groups, or read them from the cache.

    Args:
        context: The original model.
        scores: They give the order of removal.
        around: Keep mask (n_units,) of a plan at whose widths the other groups are; None for the original.
        emptiable: Groups that are measured without any unit as well.
        only: Groups that are measured without any unit alone; the losses of all others are then 0. None for all groups
            at all widths.

    Returns:
        The losses of every group.
    """
    model, coupling, settings = context.model, context.coupling, context.settings
    order = scoring.order(scores, coupling)
    samples = _measured(context)
    known = {
        **context.cache_identity,
        "order": order.tolist(),
        "refit": settings.refit,
        "objective": document(context.objective),
    }
    if samples.count < parts(context.samples)[1].count:
        known["samples"] = samples.count
    if around is not None:
        known["around"] = np.flatnonzero(~around).tolist()
    wide = cost.full_widths(coupling)
    others: dict[int, Sensitivity] = {}
    if only is None:
        widths = _unusual_widths(wide, _shares(settings), emptiable)
    else:
        widths = {g: np.asarray([0, wide[g]], np.int64) for g in only}
        others = {
            g: Sensitivity(wide[g : g + 1], np.zeros(1)) for g in range(len(wide)) if g not in only
        }
    if widths:
        known["widths"] = {str(g): at.tolist() for g, at in sorted(widths.items())}

    def run() -> tuple[Sensitivity, ...]:
        feeds = [feed for _, feed in samples.batches(context.batch)]
        unfinished = Unfinished.open(context.store, known, wide)
        grams = collect(context, {COVARIANCE})[COVARIANCE]
        found = sensitivity.measure(
            model,
            coupling,
            grams,
            order,
            feeds,
            device=context.device,
            objective=context.objective,
            workers=parallel_groups(context.workers, model, coupling, grams, settings.max_memory),
            progress=context.progress,
            repair=settings.refit,
            scheduler=settings.scheduler,
            around=around,
            widths=widths,
            known={**others, **unfinished.losses},
            receive=unfinished.receive,
        )
        unfinished.close()
        return found

    return context.store.recall(
        cache_entries.LOSSES,
        known,
        run,
        lambda found: sensitivity.fits(found, wide),
    )


def _unusual_widths(
    wide: Ints, shares: tuple[float, ...], emptiable: frozenset[int]
) -> dict[int, Ints]:
    """Widths at which losses are measured, of the groups for which these are not the default ones."""
    widths = {g: np.append(0, sensitivity.levels(int(wide[g]), shares)) for g in emptiable}
    if shares != sensitivity.LEVELS:
        others = (g for g in range(len(wide)) if g not in emptiable)
        widths.update((g, sensitivity.levels(int(wide[g]), shares)) for g in others)
    return widths


@dataclass
class Unfinished:
    """Losses that are measured group by group, kept in the cache for a run that starts again after an interruption.

    Attributes:
        store: The cache.
        known: What the losses depend on.
        losses: Losses by the number of the group.
        kept: Time on the monotonic clock at which they were last written.
    """

    store: Store
    known: Mapping[str, Any]
    losses: dict[int, Sensitivity]
    kept: float

    @classmethod
    def open(cls, store: Store, known: Mapping[str, Any], wide: Ints) -> Unfinished:
        """Take up what an earlier run has left.

        Args:
            store: The cache.
            known: What the losses depend on.
            wide: Units of every group (groups,).

        Returns:
            Losses of the groups that it had measured.
        """
        kind = cache_entries.SOME_LOSSES
        found = store.find(kind, known, lambda left: sensitivity.some_fit(left, wide))
        return cls(store, known, dict(found or {}), time.monotonic())

    def receive(self, group: int, losses: Sensitivity) -> None:
        """Add the losses of a group, and write all of them now and then.

        Args:
            group: Number of the group.
            losses: Its losses.
        """
        self.losses[group] = losses
        if time.monotonic() - self.kept >= SECONDS_BETWEEN_WRITES:
            self.store.keep(cache_entries.SOME_LOSSES, self.known, self.losses)
            self.kept = time.monotonic()

    def close(self) -> None:
        """Remove the entry: the losses of all groups are one of their own."""
        self.store.remove(cache_entries.SOME_LOSSES, self.known)


def rungs(
    coupling: Coupling,
    sensitivities: tuple[Sensitivity, ...],
    step: Ints,
    floor: Floats | float,
    emptied: Collection[int] = (),
    *,
    most: Ints | None = None,
) -> Ladder:
    """List the widths that a plan may choose for each group, with their losses.

    Args:
        coupling: The groups.
        sensitivities: Measured losses of every group.
        step: Units per alignment step of every group (groups,).
        floor: Least share of a group, one for all or (groups,).
        emptied: Groups without units, whose loss is counted elsewhere.
        most: Widest width of every group (groups,); the full one where it is None.

    Returns:
        Widths: all multiples of the step from the floor on, and the widest. Losses are interpolated.
    """
    widths = []
    losses = []
    wide = cost.full_widths(coupling)
    widest = wide if most is None else most
    narrow = np.minimum(allocation.least(floor, step, wide), widest)
    for group, found, s, first, last in zip(
        range(len(wide)),
        sensitivities,
        step.tolist(),
        narrow.tolist(),
        widest.tolist(),
        strict=True,
    ):
        if group in emptied:
            widths.append(np.zeros(1, np.int64))
            losses.append(np.zeros(1))
            continue
        every = np.unique(np.append(np.arange(first, last + 1, s), last))
        widths.append(every.astype(np.int64))
        losses.append(interpolate(found, every))
    return Ladder(tuple(widths), tuple(losses))


def interpolate(found: Sensitivity, widths: Ints) -> Floats:
    """Interpolate the losses of a group by a monotone cubic.

    Args:
        found: Losses at the measured widths. That without any unit is no part of the curve.
        widths: Other widths.

    Returns:
        Losses at those widths, never negative and never rising with the width.

    Source:
        Fritsch and Butland, A method for constructing local monotone piecewise cubic interpolants, 1984 (PCHIP of
        scipy).
    """
    has_units = found.widths > 0
    if has_units.sum() == 1:
        return np.zeros(len(widths))
    from scipy.interpolate import PchipInterpolator  # brings half of scipy

    return np.maximum(
        np.asarray(
            PchipInterpolator(found.widths[has_units], found.loss[has_units])(widths), np.float64
        ),
        0.0,
    )
