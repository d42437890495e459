"""Execution of a plan: cut the model, refit it in several ways, and take the refit that loses least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

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
from onnx_oamip.data.feeds import run_size
from onnx_oamip.graph import cost
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.surgery import attention_scale, branch_constants, rewrite
from onnx_oamip.importance import find
from onnx_oamip.objective.position_weights import has_rare_decisions, weighting
from onnx_oamip.planning import (
    calibration_loss,
    rotation,
)
from onnx_oamip.repair import least_squares, mean_folding, refit_scope, removed_constants
from onnx_oamip.statistics.collector import are_groups_apart, collect, parts
from onnx_oamip.statistics.context import Context
from onnx_oamip.statistics.requests import MOMENTS

REFIT, EQUAL_ROWS, AUGMENTED, WITHOUT = "refit", "refit_of_equal_rows", "refit_with_copies", "none"
"""Names of the models that are compared by loss: the refit, one that does not weight rare decisions, one with augmented
copies of the samples, and the cut model without a refit."""
LENIENCE = 1.25
"""Loss of a refit with copies, relative to that of one without, up to which it is kept unless whole groups of samples
are kept for the comparison."""


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
    return draft(ready, chosen).finished


def draft(ready: Context, chosen: Plan) -> Draft:
    """Begin to carry out a plan, which may be compared with others before one of them is finished.

    Args:
        ready: The model, its samples and the settings, which choose the refit.
        chosen: The plan.

    Returns:
        The draft.
    """
    ready = rotation.for_plan(ready, chosen)
    raw = rewrite.cut(ready.model, ready.coupling, chosen.keep)
    return Draft(ready, chosen, raw, _LeastSquares(ready, chosen, raw))


@dataclass(frozen=True, eq=False)
class Draft:
    """A plan that is carried out on demand: its loss takes one refit, its model the best of several.

    Attributes:
        ready: The context of the plan.
        plan: The plan.
        raw: The cut model.
        least_squares: Its refits by least squares.
    """

    ready: Context
    plan: Plan
    raw: onnx.ModelProto
    least_squares: _LeastSquares

    @cached_property
    def loss(self) -> float:
        """Loss on calibration samples that the refit did not use."""
        if self._is_fitted:
            return min(self.least_squares.first_losses.values())
        (lost,) = calibration_loss.losses(self.ready, [self.finished.pruned.proto])
        return lost

    @cached_property
    def finished(self) -> Attempt:
        """The cut and refitted model with its costs."""
        ready, chosen = self.ready, self.plan
        pruned = self._repaired()
        # Last: a refit fits the queries to what they gave before.
        proto = _rescaled(ready, chosen, pruned.proto)
        proto = branch_constants.fold(ready.model, ready.coupling, chosen.keep, proto)
        pruned = replace(pruned, proto=proto)
        if not ready.settings.no_provenance:
            what = plan_files.digest(ready.model, ready.coupling, chosen.keep)
            provenance.sign(pruned.proto, ready.model.sha256, what)
        after = cost.count(models.remade(ready.model, pruned.proto))
        return Attempt(chosen, pruned, after)

    def noted(self, note: str) -> Draft:
        """Add a note to the plan.

        Args:
            note: The note.

        Returns:
            The draft with the note, which repeats nothing that was carried out.
        """
        return replace(self, plan=replace(self.plan, notes=(*self.plan.notes, note)))

    @property
    def _is_fitted(self) -> bool:
        """True if anything is removed and refitted by least squares."""
        return self.ready.settings.refit == "least-squares" and not self.plan.keep.all()

    def _repaired(self) -> Pruned:
        """The cut model with the refit of the settings, or with constants folded; as it is if nothing is removed."""
        ready, chosen, raw = self.ready, self.plan, self.raw
        if self._is_fitted:
            return self.least_squares.best
        if chosen.keep.all():
            return Pruned(raw, raw)
        if ready.settings.refit == "bias":
            moments = collect(ready, {MOMENTS})
            folded = mean_folding.fold_means(ready.model, ready.coupling, chosen.keep, moments, raw)
            refits = _with_none({REFIT: folded})
            losses = _losses(ready, chosen, refits)
            return _least_loss(refits, losses, unused="")[1]
        if folds_constants(ready.settings):
            return removed_constants.fold_constants(
                ready.model,
                ready.coupling,
                chosen.keep,
                raw,
                samples=ready.samples,
                device=ready.device,
            )
        return Pruned(raw, raw)


def _rescaled(ready: Context, chosen: Plan, proto: onnx.ModelProto) -> onnx.ModelProto:
    return attention_scale.rescale(ready.model, ready.coupling, chosen.keep, proto)


@dataclass(frozen=True, eq=False)
class _LeastSquares:
    """Least-squares refits of one cut model.

    They are compared on calibration samples that none of them used. These may be akin to others that were used, as
    crops of one photograph, and favour a refit without copies, which fits closer to what it knows. Unless whole groups
    of samples are kept for the comparison, one with copies is therefore kept up to ``LENIENCE``. The best is then made
    again on all samples from the first node on that is short of them; the nodes in front of it have enough rows, and
    are refitted once.

    Attributes:
        ready: The model and its samples.
        chosen: The plan.
        raw: The cut model.
    """

    ready: Context
    chosen: Plan
    raw: onnx.ModelProto
    _fronts: dict[bool, Pruned] = field(default_factory=dict)

    @cached_property
    def first(self) -> dict[str, Pruned]:
        """The refit without copies, and the cut model without one."""
        return _with_none({REFIT: self._fit(REFIT, self._fitted)})

    @cached_property
    def first_losses(self) -> dict[str, float]:
        """Losses of :attr:`first`."""
        return _losses(self.ready, self.chosen, self.first)

    @cached_property
    def best(self) -> Pruned:
        """The refit that loses least, or the cut model without one."""
        if not self.first[REFIT].fits:
            return self.first[REFIT]
        others = {}
        if self._change is not None:
            others[AUGMENTED] = self._fit(AUGMENTED, self._fitted)
        if has_rare_decisions(self.ready.objective):
            others[EQUAL_ROWS] = self._fit(EQUAL_ROWS, self._fitted)
        refits = {REFIT: self.first[REFIT], **others, WITHOUT: self.first[WITHOUT]}
        measured = {**self.first_losses, **_losses(self.ready, self.chosen, others)}
        losses = {name: measured[name] for name in refits}
        is_lenient = AUGMENTED in others and not are_groups_apart(self.ready.samples)
        if is_lenient and losses[AUGMENTED] <= LENIENCE * losses[REFIT]:
            del refits[REFIT]
        name, best = _least_loss(refits, losses, unused="that it did not use ")
        samples = self.ready.samples
        if name != WITHOUT and self._short and self._fitted.count < samples.count:
            best = replace(self._fit(name, samples), losses=losses)
        if name == AUGMENTED and losses[AUGMENTED] > losses[REFIT]:
            best = replace(best, notes=(*best.notes, _note_of_copies(losses)))
        return best

    @cached_property
    def _fitted(self) -> Samples:
        """The samples without those of the comparison."""
        return parts(self.ready.samples)[0]

    @cached_property
    def _short(self) -> frozenset[str]:
        """Nodes whose fit more samples would improve."""
        ready = self.ready
        return refit_scope.short_of_samples(
            ready.model, ready.coupling, self.chosen.keep, self._fitted
        )

    @cached_property
    def _change(self) -> Augment | None:
        """Changes behind the augmented copies of the samples; None where no refit takes copies into account."""
        if not self._short:
            return None
        model, settings = self.ready.model, self.ready.settings
        size = run_size(model, settings.activation_memory_limit)
        first = next(self._fitted.batches(size))[1]
        return augmentation.for_refit(settings.augment, model, first)

    def _fit(self, name: str, samples: Samples) -> Pruned:
        """A refit by its name, from the cache where an earlier run kept it.

        The refit on copies that a user's own function makes is not kept: the function may change between runs.
        """
        ready, settings = self.ready, self.ready.settings
        objective = None if name == EQUAL_ROWS else ready.objective
        change = self._change if name == AUGMENTED else None

        def fit() -> Pruned:
            return least_squares.rest(
                ready.model,
                ready.coupling,
                self.chosen.keep,
                self._front(objective),
                self._sampling(samples, objective),
                short=self._short,
                change=change,
            )

        if change is not None and settings.augment != "auto":
            return fit()
        identity = {
            **ready.cache_identity,
            **(weighting(objective) if objective else {}),
            "units": plan_files.digest(ready.model, ready.coupling, self.chosen.keep),
            **({"samples": "all"} if samples.count == ready.samples.count else {}),
            **({} if change is None else {"augment": settings.augment}),
        }
        found = ready.store.recall(
            cache_entries.REFITS,
            identity,
            fit,
            lambda found: least_squares.is_valid_cache_entry(found, self.raw),
        )
        return replace(found, raw=self.raw)

    def _front(self, objective: Objective | None) -> Pruned:
        """The refit of the nodes in front of the first that is short of samples, made once for each weighting."""
        ready, is_weighted = self.ready, objective is not None
        if is_weighted not in self._fronts:
            self._fronts[is_weighted] = least_squares.front(
                ready.model,
                ready.coupling,
                self.chosen.keep,
                self.raw,
                self._sampling(self._fitted, objective),
                short=self._short,
            )
        return self._fronts[is_weighted]

    def _sampling(self, samples: Samples, objective: Objective | None) -> least_squares.Sampling:
        ready = self.ready
        return least_squares.Sampling(
            samples=samples,
            device=ready.device,
            batch_size=ready.batch,
            seed=ready.settings.seed,
            memory_limit=ready.settings.activation_memory_limit,
            objective=objective,
            progress=ready.progress,
        )


def _with_none(refits: Mapping[str, Pruned]) -> dict[str, Pruned]:
    """Refits, and the cut model without one."""
    first = refits[REFIT]
    return {**refits, WITHOUT: Pruned(first.raw, first.raw, first.notes)}


def _losses(ready: Context, chosen: Plan, refits: Mapping[str, Pruned]) -> dict[str, float]:
    """Losses of refits by name, on the calibration samples kept for this."""
    if not refits:
        return {}
    protos = [_rescaled(ready, chosen, refit.proto) for refit in refits.values()]
    return dict(zip(refits, calibration_loss.losses(ready, protos), strict=True))


def _least_loss(
    refits: Mapping[str, Pruned], losses: Mapping[str, float], *, unused: str
) -> tuple[str, Pruned]:
    """The refit, or the cut model without one, that loses least on the calibration samples kept for this.

    A refit brings every layer near to what it gave, which need not bring the outputs near.

    Args:
        refits: The refits by name.
        losses: Their losses.
        unused: Clause of the note about the samples of the comparison.

    Returns:
        Its name, the first of equal ones, and the model with the losses of all.
    """
    best = min(refits, key=lambda name: losses[name])
    notes = refits[best].notes
    if best == WITHOUT:
        note = (
            f"the refit is left out: on calibration samples {unused}the model loses {losses[REFIT]:.3g} with it and "
            f"{losses[WITHOUT]:.3g} without"
        )
        notes = (*notes, note)
    return best, replace(refits[best], notes=notes, losses=losses)


def _note_of_copies(losses: Mapping[str, float]) -> str:
    """Note of a refit with copies that is kept although it loses more."""
    return (
        "the refit with augmented copies is kept although the model loses more than without: "
        f"{losses[AUGMENTED]:.3g} against {losses[REFIT]:.3g} on calibration samples that no refit used, but that may "
        "resemble others, as crops of one photograph; the array 'groups' in the data names what belongs together"
    )


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
