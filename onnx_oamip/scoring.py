"""What a run learns before it plans: statistics of the calibration data, and scores of all units."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from . import calibrate, gram, images, sensitivity
from .data import Samples
from .importance import METHODS, Method
from .records import Coupling, Floats, Model, Scores, Statistics
from .settings import Settings
from .subgraph import affordable

SENSITIVITY_SAMPLES = 128
GRAM_SAMPLES = 512
CHOICE_SAMPLES = 64
"""Samples on which orders of removal are compared."""


def statistics(
    model: Model,
    coupling: Coupling,
    samples: Samples,
    device: str,
    settings: Settings,
    grams: bool,
    progress: calibrate.Progress | None,
) -> Statistics:
    """Moments of all samples, images where the method asks; with ``grams`` second moments of the first samples too."""
    found = calibrate.collect(model, coupling, samples, device, settings.batch_size, progress)
    if METHODS[settings.importance].needs_images and settings.mode != "decoupled":
        few = images.collect(model, samples, device, settings.images_per_class, settings.seed, settings.batch_size)
        found = replace(found, images=few)
    if not grams:
        return found
    fitted, _ = parts(samples)
    feeds, _ = affordable(model, fitted, settings.batch_size)
    return replace(found, grams=gram.collect(model, coupling, feeds, device, settings.seed, progress))


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
    few = parts(samples)[1]
    few = few.take(np.arange(min(few.count, max(CHOICE_SAMPLES, samples.fixed_batch or 1))))
    feeds = [feed for _, feed in few.batches(settings.batch_size)]
    orders = [found.values, *found.others.values()]
    chosen = sensitivity.choose(
        model, coupling, statistics.grams, orders, feeds, device, settings.workers, progress, settings.refit
    )
    values = found.values.copy()
    for group, pick in zip(coupling.groups, chosen.tolist(), strict=True):
        values[group.units[np.argsort(orders[pick][group.units], kind="stable")]] = np.sort(values[group.units])
    names = [f"the program's {int((chosen == 0).sum())}"]
    names += [f"{name} {n}" for i, name in enumerate(found.others, 1) if (n := int((chosen == i).sum()))]
    note = f"orders of removal measured on {few.count} samples; least loss by groups: {', '.join(names)}"
    return replace(found, values=values, others={}, notes=(*found.notes, note))


def order(scores: Scores, coupling: Coupling) -> Floats:
    """Removal order as scores; ties fall as ``plan.best_units`` lets them fall (higher index first)."""
    rank = np.lexsort((-np.arange(coupling.n_units), scores.values))
    order = np.empty(coupling.n_units)
    order[rank] = np.arange(coupling.n_units)
    return order
