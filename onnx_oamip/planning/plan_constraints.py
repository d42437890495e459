"""Constraints on plans: least shares of groups that are kept, and units that are never removed.

They bound any importance and allocation. Upper limits of removal come from a limit method (see ``limits``). Protection
follows the sensitivity criterion of SNACS (Ganesh, Blanchard, Corso, Sekeh, arXiv 2006.12463): a unit weighs what its
consumers' absolute weights give it, each row summing to one. The authors' code takes signed weights and protects the
smallest; here the largest are protected, as was meant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from onnx_oamip.core.records import (
    Bools,
    Coupling,
    Floats,
    Model,
    Scores,
)
from onnx_oamip.graph.cost import full_widths
from onnx_oamip.graph.linear_layers import linear_consumers, matrix
from onnx_oamip.planning import limits
from onnx_oamip.planning.allocation import best_units
from onnx_oamip.statistics.context import Context


@dataclass(frozen=True)
class Constraints:
    """Lower bounds on the units that every plan keeps, found once on the original model.

    They hold for the whole run: a round of ``--iterations`` scores the remaining units anew, but the protected units
    are the ones chosen on the original, and shares are shares of the original's groups.

    Attributes:
        floor: Least share of every group (groups,).
        protected: Units that no plan removes (n_units,).
        notes: What a reader should know about them.
    """

    floor: Floats
    protected: Bools
    notes: tuple[str, ...] = ()

    def apply(self, coupling: Coupling, scores: Scores) -> Scores:
        """Scores in which protected units rank highest in their group, with the notes of these constraints."""
        if self.protected.any():
            scores = promote(coupling, scores, self.protected)
        return replace(scores, notes=(*scores.notes, *self.notes))


def constraints(context: Context, scores: Scores) -> Constraints:
    """Find the constraints that ``--floor``, ``--limits`` and ``--protect`` impose together.

    Args:
        context: The original model; ``--limits`` collects pooled activations of its samples.
        scores: Scores of its units: upper limits depend on the order of removal.
    """
    model, coupling, settings = context.model, context.coupling, context.settings
    full = full_widths(coupling)
    floor = np.full(len(full), settings.floor)
    kept = np.zeros(coupling.n_units, bool)
    notes: tuple[str, ...] = ()
    with context.clock("limits"):
        if settings.protect > 0:
            kept = protected(model, coupling, settings.protect)
            scores = promote(coupling, scores, kept)
            floor = np.maximum(
                floor,
                np.bincount(coupling.unit_group[kept], minlength=len(full)) / np.maximum(full, 1),
            )
        method = limits.find(settings.limits)
        if method is not None and len(full):
            upper = method.limits(context, scores)
            floor = np.maximum(floor, 1 - upper.shares)
            tightest = np.argsort(upper.shares, kind="stable")[:3]
            tight = ", ".join(f"{coupling.groups[g].name} {upper.shares[g]:.0%}" for g in tightest)
            note = f"`limits={settings.limits}` ({upper.criterion}): the least may go from {tight}"
            notes = (note,)
    return Constraints(floor, kept, notes)


def sensitivity(model: Model, coupling: Coupling) -> Floats:
    """Share (n_units,) of the absolute weights of linear consumers, mean over their outputs, summed over consumers."""
    total = np.zeros(coupling.n_units)
    for consumer, place in linear_consumers(model, coupling):
        weight = np.abs(matrix(place, model.constants[place.weight])).mean(axis=3)
        sums = weight.sum(axis=2, keepdims=True)
        column = (weight / np.where(sums > 0, sums, 1.0)).mean(axis=1).reshape(-1)
        labels = coupling.axes[consumer.data, consumer.axis]
        free = labels >= 0
        total += np.bincount(labels[free], column[free], minlength=coupling.n_units)
    return total


def protected(model: Model, coupling: Coupling, share: float) -> Bools:
    """(n_units,) the ``share`` of every group, rounded up, with the largest sensitivity."""
    values = sensitivity(model, coupling)
    full = full_widths(coupling)
    return best_units(coupling, values, np.ceil(share * full - 1e-9).astype(np.int64))


def promote(coupling: Coupling, scores: Scores, kept: Bools) -> Scores:
    """Scores whose values in a group change hands so that ``kept`` units have the largest, in the old order else.

    A score above 0 stays above 0: under ``--alpha`` a unit with a score of 0 must go.
    """
    values = scores.values.copy()
    for group in coupling.groups:
        units = group.units
        order = np.lexsort((-np.arange(len(units)), scores.values[units], kept[units]))
        ranked = np.sort(scores.values[units])
        held = int(kept[units].sum())
        if held:
            ranked[-held:] = np.nextafter(
                ranked[-held:], np.inf
            )  # above all others, also where scores are equal
        values[units[order]] = ranked
    values = np.where((scores.values > 0) & (values <= 0), scores.values, values)
    return replace(scores, values=values)
