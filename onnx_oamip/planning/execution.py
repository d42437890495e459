"""Execution of a plan: cut the model, refit it in several ways, and take the refit that loses least."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx

from onnx_oamip.artifacts import cache_entries, plan_files, provenance
from onnx_oamip.core.records import (
    Cost,
    Objective,
    Plan,
    Pruned,
    Trial,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import augmentation
from onnx_oamip.data.augmentation import Augment
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph import cost
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.surgery import attention_scale, rewrite
from onnx_oamip.importance import find
from onnx_oamip.objective.position_weights import has_rare_decisions, weighting
from onnx_oamip.planning import (
    calibration_loss,
    rotation,
)
from onnx_oamip.repair import least_squares, mean_folding, refit_scope, removed_constants
from onnx_oamip.statistics.collector import collect, parts
from onnx_oamip.statistics.context import Context
from onnx_oamip.statistics.requests import MOMENTS

REFIT, EQUAL_ROWS, AUGMENTED, WITHOUT = "refit", "refit_of_equal_rows", "refit_with_copies", "none"
"""Names of what is compared by loss: the refit, one that does not count rare decisions more, one with augmented copies
of the samples, and no refit."""


@dataclass(frozen=True)
class Attempt:
    """A plan with the model pruned by it; ``tried``: the trials of the search that chose the plan."""

    plan: Plan
    pruned: Pruned
    after: Cost
    tried: tuple[Trial, ...] = ()


def carry_out(ready: Context, chosen: Plan) -> Attempt:
    """Cut a model as planned, and refit its consumers.

    Args:
        ready: The model, its samples and the settings, which choose the refit.
        chosen: The plan.

    Returns:
        The cut and refitted model with its costs.
    """
    ready = rotation.for_plan(ready, chosen)
    raw = rewrite.cut(ready.model, ready.coupling, chosen.keep)
    pruned = Pruned(raw, raw)
    refits = {} if chosen.keep.all() else _compared_refits(ready, chosen, raw)
    if refits:
        pruned = _least_loss(ready, chosen, refits)
    elif not chosen.keep.all() and folds_constants(ready.settings):
        pruned = removed_constants.fold_constants(
            ready.model,
            ready.coupling,
            chosen.keep,
            raw,
            samples=ready.samples,
            device=ready.device,
        )
    # Last: a refit fits the queries to what they gave before.
    pruned = replace(pruned, proto=_rescaled(ready, chosen, pruned.proto))
    if not ready.settings.no_provenance:
        what = plan_files.digest(ready.model, ready.coupling, chosen.keep)
        provenance.sign(pruned.proto, ready.model.sha256, what)
    after = cost.count(models.remade(ready.model, pruned.proto))
    return Attempt(chosen, pruned, after)


def _rescaled(ready: Context, chosen: Plan, proto: onnx.ModelProto) -> onnx.ModelProto:
    return attention_scale.rescale(ready.model, ready.coupling, chosen.keep, proto)


def _compared_refits(ready: Context, chosen: Plan, raw: onnx.ModelProto) -> dict[str, Pruned]:
    """Refits of a cut model by their names in the report, that of the settings first.

    They leave out the calibration samples on which they are compared.
    """
    if ready.settings.refit == "bias":
        moments = collect(ready, {MOMENTS})
        folded = mean_folding.fold_means(ready.model, ready.coupling, chosen.keep, moments, raw)
        return {REFIT: folded}
    if ready.settings.refit != "least-squares":
        return {}
    samples = parts(ready.samples)[0]
    change = _change(ready, chosen)
    refits = _least_squares(ready, chosen, raw, samples, objective=ready.objective, change=change)
    if has_rare_decisions(ready.objective):
        equal = _least_squares(ready, chosen, raw, samples, objective=None, change=None)
        refits[EQUAL_ROWS] = equal[REFIT]
    return refits


def _on_all_samples(ready: Context, chosen: Plan, raw: onnx.ModelProto, name: str) -> Pruned | None:
    """The refit that lost least, made again on all calibration samples.

    Args:
        ready: The model and its samples.
        chosen: The plan.
        raw: The cut model.
        name: Name of the refit.

    Returns:
        The refit; None where the samples of the comparison would add little: no sample is left out of the refit, or
        every node has many more rows than its fit takes.
    """
    is_split = parts(ready.samples)[0].count < ready.samples.count
    if not is_split or not _is_short_of_samples(ready, chosen):
        return None
    objective = None if name == EQUAL_ROWS else ready.objective
    change = _change(ready, chosen) if name == AUGMENTED else None
    refits = _least_squares(ready, chosen, raw, ready.samples, objective=objective, change=change)
    return refits[AUGMENTED if name == AUGMENTED else REFIT]


def _change(ready: Context, chosen: Plan) -> Augment | None:
    """Changes behind the augmented copies of the samples; None where no refit takes copies into account."""
    samples = parts(ready.samples)[0]
    feed = next(iter(samples.batches(1)))[1]
    change = augmentation.for_refit(ready.settings.augment, ready.model, feed)
    if change is None:
        return None
    return change if _is_short_of_samples(ready, chosen) else None


def _is_short_of_samples(ready: Context, chosen: Plan) -> bool:
    """Test whether further samples would add to the rows of any fit."""
    samples = parts(ready.samples)[0]
    return refit_scope.is_short_of_samples(ready.model, ready.coupling, chosen.keep, samples)


def _least_squares(
    ready: Context,
    chosen: Plan,
    raw: onnx.ModelProto,
    samples: Samples,
    *,
    objective: Objective | None,
    change: Augment | None,
) -> dict[str, Pruned]:
    """Least-squares refits of a cut model by name, from the cache where an earlier run kept them.

    The refit on copies that a user's own function makes is not kept: the function may change between runs.
    """
    s = ready.settings
    sampling = least_squares.Sampling(
        samples=samples,
        device=ready.device,
        batch_size=ready.batch,
        seed=s.seed,
        memory_limit=s.activation_memory_limit,
        objective=objective,
        progress=ready.progress,
    )
    cut = ready.model, ready.coupling, chosen.keep, raw, sampling
    kept = {
        **ready.cache_identity,
        **(weighting(objective) if objective else {}),
        "units": plan_files.digest(ready.model, ready.coupling, chosen.keep),
        **({"samples": "all"} if samples.count == ready.samples.count else {}),
    }

    def recall(identity: Mapping[str, Any], fit: Callable[[], Pruned]) -> Pruned:
        def is_valid(found: Pruned) -> bool:
            return least_squares.is_valid_cache_entry(found, raw)

        return replace(ready.store.recall(cache_entries.REFITS, identity, fit, is_valid), raw=raw)

    if change is None:
        return {REFIT: recall(kept, lambda: least_squares.least_squares(*cut)[0])}
    both = functools.cache(lambda: least_squares.least_squares(*cut, change=change))
    if s.augment != "auto":
        return {REFIT: both()[0], AUGMENTED: both()[1]}
    copied = recall({**kept, "augment": s.augment}, lambda: both()[1])
    return {REFIT: recall(kept, lambda: both()[0]), AUGMENTED: copied}


def _least_loss(ready: Context, chosen: Plan, refits: Mapping[str, Pruned]) -> Pruned:
    """The refit, or the cut model without one, that loses least on the calibration samples kept for this.

    A refit brings every layer near to what it gave, which need not bring the outputs near. The first of equal ones is
    taken, and the first one without a comparison where it changed nothing. The refit that is taken is made again with
    the samples of the comparison.
    """
    first = refits[REFIT]
    if ready.settings.refit == "least-squares" and not first.fits:
        return first
    candidates = {**refits, WITHOUT: Pruned(first.raw, first.raw, first.notes)}
    protos = [_rescaled(ready, chosen, candidate.proto) for candidate in candidates.values()]
    losses = dict(zip(candidates, calibration_loss.losses(ready, protos), strict=True))
    best = min(losses, key=lambda name: losses[name])
    winner = candidates[best]
    if best != WITHOUT and ready.settings.refit == "least-squares":
        winner = _on_all_samples(ready, chosen, first.raw, best) or winner
    notes = winner.notes
    if best == WITHOUT:
        unused = "" if ready.settings.refit == "bias" else "that it did not use "
        note = (
            f"the refit is left out: on calibration samples {unused}the model loses {losses[REFIT]:.3g} with it and "
            f"{losses[WITHOUT]:.3g} without"
        )
        notes = (*notes, note)
    return replace(winner, notes=notes, losses=losses)


def folds_constants(settings: Settings) -> bool:
    """Check whether constant outputs of removed units are folded into the biases of their consumers.

    Args:
        settings: Settings of the run.

    Returns:
        True without a refit, for a method whose removed units keep their biases.
    """
    # In the exact formulation and the decoupled programs a removed unit has no constant left.
    published = settings.formulation == "paper" and settings.mode != "decoupled"
    return settings.refit == "none" and find(settings.importance).keeps_bias and published
