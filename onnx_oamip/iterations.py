"""Budgets approached in rounds: score, prune, refit, and score again what is left.

Every round cuts the original anew by all that has gone so far and refits it against the original; what the round before
left is only scored. Counted budgets shrink by the same factor every round, an alpha is taken each time.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from . import cache, scoring, search, sensitivity
from . import model as models
from .budget import Ladder
from .calibrate import Progress
from .coupling import couple, exclude
from .errors import SettingsError
from .importance import METHODS
from .records import Bools, Budget, Coupling, Floats, Ints, Scores, Sensitivity
from .search import Attempt, Prepared
from .settings import Settings
from .subgraph import run_size


def check(settings: Settings, scored: bool) -> None:
    """Raises SettingsError for settings that contradict rounds, or an alpha that nobody asks for."""
    if settings.alpha is not None and settings.importance != "nnrelief" and not scored:
        raise SettingsError(f"--alpha is about --importance nnrelief, not {settings.importance}.")
    if settings.sparse and settings.granularity != "connection":
        raise SettingsError("--sparse is about --granularity connection: units that go leave no zeros.")
    if settings.iterations == 1 or settings.granularity == "connection":
        return
    if scored:
        raise SettingsError("--iterations scores the model anew each time; leave out --scores.")
    for name in ("latency", "max_drop", "threshold"):
        if getattr(settings, name) is not None:
            raise SettingsError(
                f"--iterations approaches counted budgets, not --{name.replace('_', '-')}; give --macs, --params, "
                "--size or --alpha."
            )


def programmed(settings: Settings) -> bool:
    """Whether losses are measured for the budget program: an alpha alone leaves it nothing to choose."""
    return settings.allocate == "mip" and settings.budget != Budget()


def ladder(
    ready: Prepared, scores: Scores, progress: Progress | None
) -> Ladder | None:
    """Losses by width of the original in another order; None where no program asks for them."""
    settings, coupling = ready.settings, ready.coupling
    if not programmed(settings):
        return None
    order = scoring.order(scores, coupling)

    def measure() -> tuple[Sensitivity, ...]:
        found = scoring.statistics(
            ready.model, coupling, ready.samples, ready.device, settings, True, progress, ready.store, ready.known
        )
        batch = run_size(ready.model, settings.room)
        feeds = [feed for _, feed in scoring.parts(ready.samples)[1].batches(batch)]
        return sensitivity.measure(
            ready.model, coupling, found.grams, order, feeds, ready.device, scoring.workers(ready.model, settings),
            progress, settings.refit, settings.scheduler,
        )

    known = {**ready.known, "order": order.tolist(), "refit": settings.refit}
    losses = ready.store.keep(cache.LOSSES, known, measure)
    return search.rungs(coupling, losses, ready.steps, ready.floor)


def approach(ready: Prepared, progress: Progress | None = None) -> tuple[Prepared, Attempt]:
    """The last of ``settings.iterations`` attempts, and what it was made from. Raises BudgetNotMet."""
    asked = ready.settings
    rounds = asked.iterations
    for i in range(1, rounds):
        shares = {name: getattr(asked, name) for name in ("macs", "params", "size")}
        softer = {name: share ** (i / rounds) for name, share in shares.items() if share is not None}
        here = replace(ready, settings=asked.model_copy(update=softer))
        ready = _rescored(ready, search.search(here, progress), progress)
        if progress:
            progress("round", i, rounds)
    return ready, search.search(ready, progress)


def _rescored(ready: Prepared, left: Attempt, progress: Progress | None) -> Prepared:
    """The same task with the scores of the model that an attempt left; what has gone scores below everything."""
    settings, keep = ready.settings, left.plan.keep
    proto = left.pruned.proto
    model = models.from_proto(proto, ready.model.bindings, ready.model.path, ready.model.sha256)
    coupling = exclude(model, couple(model), settings.exclude)
    method = METHODS[settings.importance]
    statistics = None
    if method.needs_data:
        statistics = scoring.statistics(
            model, coupling, ready.samples, ready.device, settings, method.needs_grams, progress, ready.store,
            {**ready.known, "left": cache.content(proto)},
        )
    found = scoring.scores(
        model, coupling, statistics, ready.samples, ready.device, settings, method, progress
    )
    values = below(ready.scores.values, keep, units(ready.coupling, coupling, keep), found.values)
    scores = replace(found, values=values, others={})
    return replace(ready, scores=scores, ladder=ladder(ready, scores, progress))


def units(whole: Coupling, part: Coupling, keep: Bools) -> Ints:
    """The unit of ``whole`` that every unit of ``part`` is, where ``part`` is what ``keep`` (n_units,) left of it.

    -1 for a unit that shares no named axis with it.
    """
    result = np.full(part.n_units, -1, np.int64)
    for key, labels in part.axes.items():
        if key in whole.axes:
            old = whole.axes[key][whole.keep(key, keep)]
            if len(old) == len(labels):
                free = (labels >= 0) & (old >= 0)
                result[labels[free]] = old[free]
    return result


def below(before: Floats, keep: Bools, places: Ints, values: Floats) -> Floats:
    """Scores (n_units,): of units that are left the new ones, of those that have gone 0.

    A unit that is left but is no longer told apart keeps its score of before.
    """
    result = np.where(keep, before, 0.0)
    known = places >= 0
    result[places[known]] = values[known]
    return result
