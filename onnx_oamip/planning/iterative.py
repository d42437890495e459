"""Iterative pruning: score, prune, refit, and score the remaining units again.

Every round cuts the original by all units removed so far, and refits it against the original. The model of the
previous round is only scored. Counted budgets shrink by the same factor every round, an alpha is taken each time.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnx_oamip.artifacts import cache
from onnx_oamip.core.budgets import COUNTED, KINDS, counted_shares
from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.records import (
    Bools,
    Coupling,
    Floats,
    Ints,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph import loading as models
from onnx_oamip.planning import idle_branches, scoring, search, width_losses
from onnx_oamip.planning.attempts import Prepared
from onnx_oamip.planning.execution import Attempt
from onnx_oamip.statistics.context import Collected


def check(settings: Settings, scored: bool) -> None:
    """Refuse settings that contradict rounds, and an `alpha` that the method does not use.

    Args:
        settings: Settings of the run.
        scored: True if scores are read from a file.

    Raises:
        SettingsError: Two settings exclude each other.
    """
    if settings.alpha is not None and settings.importance != "nnrelief" and not scored:
        raise SettingsError(f"`alpha` is about `importance=nnrelief`, not {settings.importance}.")
    if settings.sparse and settings.granularity != "connection":
        raise SettingsError(
            "`sparse` is about `granularity=connection`: units that go leave no zeros."
        )
    if settings.iterations == 1 or settings.granularity == "connection":
        return
    if scored:
        raise SettingsError("`iterations` scores the model anew each time; leave out `scores`.")
    names = [kind.name for kind in COUNTED]
    for kind in KINDS:
        if kind.name not in names and getattr(settings, kind.name) is not None:
            counted = ", ".join(f"`{name}`" for name in names)
            raise SettingsError(
                f"`iterations` approaches counted budgets, not `{kind.name}`; give {counted} or `alpha`."
            )


def approach(ready: Prepared) -> tuple[Prepared, Attempt]:
    """Prune in several rounds, each with a smaller budget and with new scores of the remaining model.

    Args:
        ready: Scores and losses of the original. ``settings.iterations`` is the number of rounds.

    Returns:
        The attempt of the last round, and the scores and losses that it was made from.

    Raises:
        BudgetNotMet: A round has no plan within its budget.
    """
    asked = ready.settings
    rounds = asked.iterations
    for i in range(1, rounds):
        softer = {kind.name: share ** (i / rounds) for kind, share in counted_shares(asked.budget)}
        here = replace(ready, settings=asked.model_copy(update=softer))
        ready = _rescored(ready, search.search(here))
        if ready.progress:
            ready.progress("round", i, rounds)
    return ready, search.search(ready)


def _rescored(ready: Prepared, left: Attempt) -> Prepared:
    """The same task with the scores of the model that an attempt left, under the constraints of the original.

    Removed units score below all others. Losses are measured on the original again, in the new order.
    """
    keep = left.plan.keep
    proto = left.pruned.proto
    model = models.remade(ready.model, proto)
    coupling = idle_branches.removable(model, ready.settings.exclude, ready.objective)
    remaining = replace(
        ready,
        model=model,
        coupling=coupling,
        cache_identity={**ready.cache_identity, "left": cache.content_digest(proto)},
        collected=Collected(),
    )
    found = scoring.score(remaining)
    places = units(ready.coupling, coupling, keep)
    places[~_is_same_unit(ready, left)[places]] = -1
    values = below(ready.scores.values, keep, places, found.values)
    # The draws of a round are over the units that remained.
    scores = ready.constraints.apply(ready.coupling, replace(found, values=values, draws=None))
    ladder, curves = width_losses.measure(
        ready,
        scores,
        step=ready.steps,
        floor=ready.constraints.floor,
    )
    return replace(ready, scores=scores, ladder=ladder, curves=curves)


def _is_same_unit(ready: Prepared, left: Attempt) -> Bools:
    """Mask of the units that an attempt left as they are in the original (n_units,).

    A linear stream of which it removed nothing has channels there, not principal components.
    """
    bases = () if ready.rotation is None else ready.rotation.bases
    groups = ready.coupling.groups
    turned_back = [s.group for s, _ in bases if groups[s.group].name not in left.plan.rotated]
    return ~np.isin(ready.coupling.unit_group, turned_back)


def units(whole: Coupling, part: Coupling, keep: Bools) -> Ints:
    """Map the units of a pruned model to those of its original.

    Args:
        whole: Units of the original.
        part: Units of the pruned model.
        keep: Keep mask of the original's units (n_units,) that the pruned model was made by.

    Returns:
        The original's unit of every unit of ``part`` (units of ``part``,); -1 where both share no axis of a name.
    """
    result = np.full(part.n_units, -1, np.int64)
    for key, labels in part.axes.items():
        if key in whole.axes:
            old = whole.axes[key][whole.keep(key, keep)]
            if len(old) == len(labels):
                free = (labels >= 0) & (old >= 0)
                result[labels[free]] = old[free]
    return result


def below(
    before: Floats,
    keep: Bools,
    places: Ints,
    values: Floats,
) -> Floats:
    """Scores (n_units,) of the original's units after a round.

    Args:
        before: Scores of the round before.
        keep: Units that remain.
        places: The original's unit of every unit of the remaining model, -1 where it is not found.
        values: New scores of the units of the remaining model.

    Returns:
        New scores of remaining units, or those of before where a unit is not found again. Removed units score 0, or
        below the least remaining score where that is not above 0.
    """
    result = before.copy()
    known = places >= 0
    result[places[known]] = values[known]
    least = result[keep].min(initial=np.inf)
    result[~keep] = 0.0 if least > 0 else np.nextafter(least, -np.inf)
    return result
