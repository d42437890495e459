"""Constraints on plans: least shares of groups that are kept, and units that are never removed.

They bound any importance and allocation. Upper limits of removal come from a limit method (see ``limits``). Protection
follows the sensitivity criterion of SNACS (Ganesh, Blanchard, Corso, Sekeh, arXiv 2006.12463): a unit counts by its
share in the absolute weights of its consumers, whose rows sum to one. The authors' code takes signed weights and
protects the smallest; here the largest are protected, as was meant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.foreign_code import foreign_code, is_own
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

    They hold for the whole run: a round of ``iterations`` scores the remaining units anew, but the protected units are
    the ones chosen on the original, and shares are shares of the original's groups.

    Attributes:
        floor: Least share of every group (groups,).
        protected: Units that no plan removes (n_units,).
        notes: Remarks for the report.
    """

    floor: Floats
    protected: Bools
    notes: tuple[str, ...] = ()

    def apply(self, coupling: Coupling, scores: Scores) -> Scores:
        """Apply the protection to scores.

        Args:
            coupling: The units and groups.
            scores: Scores of the units.

        Returns:
            Scores in which protected units rank highest in their group, with the notes of these constraints.
        """
        if self.protected.any():
            scores = promote(coupling, scores, self.protected)
        return replace(scores, notes=(*scores.notes, *self.notes))


def constraints(context: Context, scores: Scores) -> Constraints:
    """Find the constraints that the settings ``floor``, ``limits`` and ``protect`` impose together.

    Args:
        context: The original model and its calibration samples.
        scores: Scores of its units: upper limits depend on the order of removal.

    Returns:
        The constraints.
    """
    model = context.model
    coupling = context.coupling
    settings = context.settings
    full = full_widths(coupling)
    floor = np.full(len(full), settings.floor)
    kept = np.zeros(coupling.n_units, bool)
    notes: tuple[str, ...] = ()
    with context.clock("limits"):
        if settings.protect > 0:
            kept = protected(model, coupling, settings.protect)
            scores = promote(coupling, scores, kept)
            kept_widths = np.bincount(coupling.unit_group[kept], minlength=len(full))
            floor = np.maximum(floor, kept_widths / np.maximum(full, 1))
        method = limits.find(settings.limits)
        if method is not None and len(full):
            upper = _upper_limits(method, context, scores)
            floor = np.maximum(floor, 1 - upper.shares)
            notes = (_note(coupling, upper, settings.limits),)
    return Constraints(floor, kept, notes)


def _upper_limits(
    method: limits.LimitMethod, context: Context, scores: Scores
) -> limits.UpperLimits:
    """Limits by a method; those of another package are checked.

    Raises:
        SettingsError: The method raised an exception, or returned no share from 0 to 1 for every group.
    """
    if is_own(method.limits):
        return method.limits(context, scores)
    name = f"`limits={context.settings.limits}`"
    advice = "correct the method, or choose other `limits`"
    with foreign_code(name, SettingsError, advice):
        found = method.limits(context, scores)
        shares = np.asarray(found.shares, np.float64)
        criterion = str(found.criterion)
    groups = len(context.coupling.groups)
    if shares.shape != (groups,):
        raise SettingsError(
            f"{name} returned shares of shape {shares.shape} for {groups} groups; {advice}."
        )
    outside = np.flatnonzero(~((shares >= 0) & (shares <= 1)))
    if outside.size:
        first = int(outside[0])
        raise SettingsError(
            f"{name} returned {shares[first]:g} as the share of group {first} that may be removed, expected a number "
            f"from 0 to 1; {advice}."
        )
    return limits.UpperLimits(shares, criterion)


def _note(coupling: Coupling, upper: limits.UpperLimits, name: str) -> str:
    """A remark about the groups with the tightest limits."""
    tightest = np.argsort(upper.shares, kind="stable")[:3]
    shares = ", ".join(f"{coupling.groups[g].name} {upper.shares[g]:.0%}" for g in tightest)
    return f"`limits={name}` ({upper.criterion}): the least may go from {shares}"


def sensitivity(model: Model, coupling: Coupling) -> Floats:
    """Compute the share of each unit in the absolute weights of its linear consumers.

    Args:
        model: The model.
        coupling: Its units and consumers.

    Returns:
        Shares (n_units,), each the mean over the outputs of a consumer, summed over consumers.
    """
    total = np.zeros(coupling.n_units)
    for consumer, layer in linear_consumers(model, coupling):
        weight = np.abs(matrix(layer, model.constants[layer.weight])).mean(axis=3)
        sums = weight.sum(axis=2, keepdims=True)
        shares = weight / np.where(sums > 0, sums, 1.0)
        by_channel = shares.mean(axis=1).reshape(-1)
        labels = coupling.axes[consumer.data, consumer.axis]
        free = labels >= 0
        total += np.bincount(labels[free], by_channel[free], minlength=coupling.n_units)
    return total


def protected(model: Model, coupling: Coupling, share: float) -> Bools:
    """Choose the units of every group with the largest sensitivity.

    Args:
        model: The model.
        coupling: Its units and groups.
        share: Share of every group, rounded up to whole units.

    Returns:
        One boolean per unit (n_units,), true for protected units.
    """
    values = sensitivity(model, coupling)
    # 1e-9 below: a product such as 0.1 * 30 that rounding leaves just above 3 is 3.
    counts = np.ceil(share * full_widths(coupling) - 1e-9)
    return best_units(coupling, values, counts.astype(np.int64))


def promote(coupling: Coupling, scores: Scores, kept: Bools) -> Scores:
    """Exchange scores within groups so that some units rank highest.

    A score above 0 stays above 0: under ``alpha`` a unit with a score of 0 must be removed.

    Args:
        coupling: The units and groups.
        scores: Scores of the units.
        kept: Units that rank highest (n_units,).

    Returns:
        The same scores in every group, with the largest at ``kept`` units; the order is the old one otherwise.
    """
    values = scores.values.copy()
    for group in coupling.groups:
        units = group.units
        later_first = -np.arange(len(units))
        order = np.lexsort((later_first, scores.values[units], kept[units]))
        ranked = np.sort(scores.values[units])
        count = int(kept[units].sum())
        if count:
            # Strictly above all others, also where scores are equal.
            ranked[-count:] = np.nextafter(ranked[-count:], np.inf)
        values[units[order]] = ranked
    lowered_to_zero = (scores.values > 0) & (values <= 0)
    values = np.where(lowered_to_zero, scores.values, values)
    return replace(scores, values=values)
