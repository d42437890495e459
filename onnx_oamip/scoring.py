"""What a run learns before it plans: statistics of the calibration data, and scores of all units."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from . import cache, calibrate, gram, images, pooled, refit, rewrite, sensitivity, signals
from .allocation import best_units
from .cost import full_widths
from .data import Samples
from .importance import METHODS, Method
from .records import Array, Coupling, Floats, Ints, Model, Scores, Statistics
from .runtime import Session
from .settings import Settings
from .subgraph import affordable, run_size, side_by_side

SENSITIVITY_SAMPLES = 128
GRAM_SAMPLES = 512
CHOICE_SAMPLES = 64
"""Samples on which orders of removal are compared for one group."""
TRIALS = 64
"""Choices of orders for all groups that are measured at most."""


def statistics(
    model: Model,
    coupling: Coupling,
    samples: Samples,
    device: str,
    settings: Settings,
    grams: bool,
    progress: calibrate.Progress | None,
    store: cache.Store | None = None,
    known: Mapping[str, Any] | None = None,
) -> Statistics:
    """Moments of all samples, images and signal where the method asks; with ``grams`` second moments of the first.

    ``store`` and what the data is ``known`` by: where moments are looked up before they are collected.
    """
    store, known = store or cache.Store(), known or {}

    start = time.perf_counter()
    batch = run_size(model, settings.room)
    moments = store.keep(
        cache.MOMENTS,
        known,
        lambda: calibrate.collect(model, coupling, samples, device, batch, progress).moments,
    )
    found = Statistics(moments, samples.usable(), device, time.perf_counter() - start)
    if METHODS[settings.importance].needs_images and settings.mode != "decoupled":
        few = images.collect(model, samples, device, settings.images_per_class, settings.seed, batch)
        found = replace(found, images=few)
    if METHODS[settings.importance].needs_signal:
        exact = settings.signal == "paper"
        heard = signals.collect(model, coupling, samples, device, batch, progress, exact)
        found = replace(found, signal=heard)
    if not grams:
        return found
    fitted, _ = parts(samples)
    feeds, _ = affordable(model, fitted, batch, settings.room)
    cap = gram.CAP if settings.max_memory is None else gram.cap(coupling, settings.room)
    second = store.keep(
        cache.GRAMS, known, lambda: gram.collect(model, coupling, feeds, device, settings.seed, progress, cap)
    )
    return replace(found, grams=second)


def pool(
    found: Statistics,
    model: Model,
    coupling: Coupling,
    samples: Samples,
    device: str,
    settings: Settings,
    progress: calibrate.Progress | None,
) -> Statistics:
    """The statistics with pooled activations, as ``--limits`` and some methods ask for them."""
    limited = settings.limits != "none"
    batch = run_size(model, settings.room)
    seen = pooled.collect(model, coupling, samples, device, settings.seed, batch, by_tap=limited, progress=progress)
    return replace(found, pooled=seen)


def workers(model: Model, settings: Settings) -> int | None:
    """Threads that run parts of the model at the same time: as asked, but what they hold together fits in memory."""
    if settings.max_memory is None:
        return settings.workers
    return min(settings.workers or os.cpu_count() or 1, side_by_side(model, settings.room))


def parts(samples: Samples) -> tuple[Samples, Samples]:
    """Samples for second moments and others for sensitivities: a repair is not judged on the rows that made it."""
    count = samples.count
    measured = min(SENSITIVITY_SAMPLES, count // 4)
    if measured < (samples.fixed_batch or 1):
        return samples, samples
    split = count - measured
    return samples.take(np.arange(min(split, GRAM_SAMPLES))), samples.take(np.arange(split, count))


def scores(
    model: Model,
    coupling: Coupling,
    statistics: Statistics | None,
    samples: Samples,
    device: str,
    settings: Settings,
    method: Method,
    progress: calibrate.Progress | None,
) -> Scores:
    """The method's scores; where it offers other orders as well, per group the order that was measured to lose least.

    The scores of a group keep their values and change hands.
    """
    found = method.score(model, coupling, statistics, settings)
    if not found.others:
        return found
    assert statistics is not None
    measured = parts(samples)[1]
    few = measured.take(np.arange(min(measured.count, max(CHOICE_SAMPLES, samples.fixed_batch or 1))))
    batch = run_size(model, settings.room)
    feeds = [feed for _, feed in few.batches(batch)]
    names = ["the program", *found.others]
    orders = np.stack([found.values, *found.others.values()])
    alone = sensitivity.choose(
        model, coupling, statistics.grams, list(orders), feeds, device, workers(model, settings), progress,
        settings.refit, settings.scheduler,
    )  # fmt: skip
    feeds = [feed for _, feed in measured.batches(batch)]
    picks = _together(model, coupling, statistics, orders, alone, feeds, device, settings.refit, progress)
    values = found.values.copy()
    for group, pick in zip(coupling.groups, picks.tolist(), strict=True):
        values[group.units[np.argsort(orders[pick][group.units], kind="stable")]] = np.sort(values[group.units])
    counts = ", ".join(f"{name} {n}" for i, name in enumerate(names) if (n := int((picks == i).sum())))
    note = f"orders of removal measured on {measured.count} samples; least loss by groups: {counts}"
    return replace(found, values=values, others={}, notes=(*found.notes, note))


def _together(
    model: Model,
    coupling: Coupling,
    statistics: Statistics,
    orders: Floats,
    alone: Ints,
    feeds: Sequence[Mapping[str, Array]],
    device: str,
    repair: str,
    progress: calibrate.Progress | None,
) -> Ints:
    """Per group an index into ``orders`` (orders, n_units), such that the whole model loses little.

    Layers that lost units do not behave as layers alone: every order for all groups is measured, and ``alone`` (the
    best per group); the best of them is then changed group by group while that helps, for ``TRIALS`` trials at most.
    The loss is that of the cut model at the shares of ``sensitivity.CHOICE``, by its logarithms, and nowhere counts as
    more than that of a model that says nothing: where all is lost, differences mean nothing.
    """
    original = Session(model.proto, device)
    wanted = sensitivity.targets(model)
    truth = [original.run(feed, wanted) for feed in feeds]
    ranked = images.head(model) is not None
    nothing = float(np.log(truth[0][0].shape[1])) if ranked else 1.0  # uniform over the classes, or all zeros
    groups = len(coupling.groups)
    tried = 0

    def loss(picks: Ints) -> float:
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
            if repair == "bias":
                proto = refit.fold_means(model, coupling, keep, statistics, proto).proto
            session = Session(proto, device, what="the cut model")
            lost = [sensitivity.divergence(model, t, session.run(f, wanted)) for f, t in zip(feeds, truth, strict=True)]
            total += float(np.log(min(float(np.mean(lost)), nothing) + 1e-9))
        return total

    starts = [alone, *(np.full(groups, i, np.int64) for i in range(len(orders)))]
    losses = [loss(start) for start in starts]
    best, least = starts[int(np.argmin(losses))].copy(), min(losses)
    for g, i in product(range(groups), range(len(orders))):
        if tried >= TRIALS:
            break
        trial = best.copy()
        trial[g] = i
        if i != best[g] and (found := loss(trial)) < least:
            best, least = trial, found
    return best


def order(scores: Scores, coupling: Coupling) -> Floats:
    """Removal order as scores; ties fall as ``allocation.best_units`` lets them fall (higher index first)."""
    rank = np.lexsort((-np.arange(coupling.n_units), scores.values))
    order = np.empty(coupling.n_units)
    order[rank] = np.arange(coupling.n_units)
    return order
