"""Rules that select the connections to keep: the alpha rule, residual sums, and the removal of unread units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_oamip.core.records import (
    Bools,
    Coupling,
    Floats,
    Ints,
    Model,
)
from onnx_oamip.published.nnrelief.branches import branch_layer, joins
from onnx_oamip.published.nnrelief.connection_shares import Layer
from onnx_oamip.published.nnrelief.requests import Signal

Ranks = tuple[Floats, Floats]
"""Ranks of weights (groups, outputs, inputs) and biases (groups, outputs): kept for any alpha above them."""


@dataclass(frozen=True)
class Mask:
    """Connections of a layer that are kept.

    Attributes:
        weights: One boolean per weight or kernel (groups, outputs, inputs).
        bias: One boolean per bias (groups, outputs).
    """

    weights: Bools
    bias: Bools


@dataclass(frozen=True)
class Selection:
    """The result of the rules.

    Attributes:
        masks: Kept connections by node.
        units: Kept units (n_units,).
        muted: Outputs (outputs,) that were cut off at the end of a branch, by node.
        uncut: Number of shortcut channels below the threshold that have no weights of their own to prune.
    """

    masks: Mapping[str, Mask]
    units: Bools
    muted: Mapping[str, Bools]
    uncut: int


@dataclass(frozen=True)
class _BranchNorms:
    """The norms of a branch of a residual sum and of the other branch, and the prunable layer of the branch, if any."""

    layer: str | None
    norm: Floats
    other: Floats


class Rules:
    """All rules for any alpha."""

    def __init__(
        self,
        model: Model,
        coupling: Coupling,
        signal: Signal,
        layers: Sequence[Layer],
        *,
        worth: Mapping[str, Floats] | None = None,
    ) -> None:
        """Prepare the rules.

        Args:
            model: The model.
            coupling: Its units and consumers.
            signal: Absolute signal of its channels.
            layers: Its layers.
            worth: Worth of outputs by node (see ``unit_worth.worth``). If it is given, all connections are ranked
                together in place of the alpha rule, and alpha is the share of them that is kept.
        """
        self._coupling, self._layers = coupling, layers
        self._together = worth is not None
        prunable = [layer for layer in layers if layer.prunable]
        if worth is None:
            self._ranks = {layer.name: needed(layer.shares, layer.bias) for layer in prunable}
        else:
            self._ranks = ranked(prunable, worth)
        self._whole = {layer.name: _whole(layer) for layer in layers if not layer.prunable}
        self._branches: list[_BranchNorms] = []
        for join in joins(model, coupling):
            norms = signal.joins[join.node][1]
            for side, tensor in enumerate(join.inputs):
                site = branch_layer(model, tensor)
                if site is not None:
                    layer = site.node.name
                else:
                    layer = None
                if layer in self._ranks:
                    prunable_layer = layer
                else:
                    prunable_layer = None
                self._branches.append(_BranchNorms(prunable_layer, norms[side], norms[1 - side]))

    def select(self, alpha: float) -> Selection:
        """Select the connections to keep.

        A branch that brings a channel of a residual sum less than (1 - alpha) / alpha of the other's norm is cut there
        (two connections under the alpha rule), if a prunable layer produces it. Connections that leave a dead unit have
        a share of 0 and are removed at any alpha, so that the unit is removed too.

        Args:
            alpha: Share of the signal that every unit keeps, or the share of all connections.

        Returns:
            The selection.
        """
        masks = dict(self._whole)
        for name, (weights, bias) in self._ranks.items():
            masks[name] = Mask(*keep_alpha(weights, bias, alpha, guard=not self._together))
        muted: dict[str, Bools] = {}
        uncut = 0
        threshold = 1.0 if self._together else alpha
        for branch in self._branches:
            low = faint(branch.norm, branch.other, threshold)
            if branch.layer is None:
                uncut += int(low.sum())
            elif low.any():
                muted[branch.layer] = low
                mask = masks[branch.layer]
                kept = ~low.reshape(mask.bias.shape)
                masks[branch.layer] = Mask(mask.weights & kept[..., None], mask.bias & kept)
        swept, units = sweep(self._coupling, self._layers, masks)
        return Selection(swept, units, muted, uncut)


def needed(weights: Floats, bias: Floats) -> Ranks:
    """Rank the connections of each unit by the share of its signal that larger ones carry.

    Args:
        weights: Shares of the weights (..., inputs).
        bias: Shares of the biases (...).

    Returns:
        Ranks of the same shapes. Equal shares have equal ranks; the rank of a share of 0 is infinite, so that it is
        never kept.
    """
    entries = np.concatenate([weights, bias[..., None]], axis=-1)
    order = np.argsort(-entries, axis=-1, kind="stable")
    falling = np.take_along_axis(entries, order, axis=-1)
    carried = np.cumsum(falling, axis=-1)
    total = carried[..., -1:]
    first = np.zeros_like(total)
    before = np.concatenate([first, carried[..., :-1]], axis=-1)
    is_smaller = falling[..., 1:] < falling[..., :-1]
    begins_run = np.concatenate([first == 0, is_smaller], axis=-1)
    # `before` never falls: the first of every run of equal entries stands for all of them.
    before = np.maximum.accumulate(np.where(begins_run, before, 0.0), axis=-1)
    whole = np.where(total > 0, total, 1.0)
    ranks = np.empty_like(entries)
    by_size = np.where(falling > 0, before / whole, np.inf)
    np.put_along_axis(ranks, order, by_size, axis=-1)
    return ranks[..., :-1], ranks[..., -1]


def ranked(layers: Sequence[Layer], worth: Mapping[str, Floats]) -> dict[str, Ranks]:
    """Rank all connections together, in place of :func:`needed`.

    They rank by ``pi_j s_ij^2 / sum_i s_ij^2`` per weight, with pi summing to 1 over a layer: the share of the energy
    of a layer's output that is lost with a connection, as far as inputs are independent, so that layers can be
    compared. Not in the paper, whose rule takes the same share from every unit: here units of little worth lose more.

    Args:
        layers: The layers.
        worth: Worth of their outputs by node.

    Returns:
        By node, the share of all connections that rank before each one. A connection with a share of 0 is never kept.
    """
    values = [_energy(layer, worth[layer.name]) for layer in layers]
    flat = np.concatenate([np.zeros(0), *(value.reshape(-1) for value in values)])
    count = len(flat)
    by_energy = np.argsort(-flat, kind="stable")
    ranks = np.empty(count)
    ranks[by_energy] = np.arange(count) / max(count, 1)
    ranks[flat == 0] = np.inf
    result: dict[str, Ranks] = {}
    start = 0
    for layer, value in zip(layers, values, strict=True):
        part = ranks[start : start + value.size].reshape(value.shape)
        result[layer.name] = part[..., :-1], part[..., -1]
        start += value.size
    return result


def keep_alpha(
    weights: Floats,
    bias: Floats,
    alpha: float,
    *,
    guard: bool = True,
) -> tuple[Bools, Bools]:
    """Apply the alpha rule to ranks.

    With p the least number of connections that carry ``alpha`` of a unit, all are kept that are as large as the p-th.

    Args:
        weights: Ranks of the weights (..., inputs).
        bias: Ranks of the biases (...).
        alpha: Share of the signal to keep.
        guard: Keep the largest weight of a unit unless it is 0, even if the bias alone carries enough.

    Returns:
        Kept weights and kept biases.
    """
    kept = weights < alpha
    if guard:
        first = weights.min(axis=-1, keepdims=True, initial=np.inf)
        only_bias = np.isfinite(first) & (first >= alpha)
        kept |= only_bias & (weights == first)
    return kept, bias < alpha


def faint(norm: Floats, other: Floats, alpha: float) -> Bools:
    """Find the channels of a branch whose norm is below (1 - alpha) / alpha of the other branch's.

    Args:
        norm: Norms of the branch (C,).
        other: Norms of the other branch (C,).
        alpha: Share of the signal to keep.

    Returns:
        One boolean per channel.
    """
    return np.asarray(alpha * norm < (1 - alpha) * other)


def dead(coupling: Coupling, signal: Signal) -> Bools:
    """Find the units whose activation is exactly 0 on all samples, at every consumer.

    Args:
        coupling: The units and consumers.
        signal: Absolute signal of the channels.

    Returns:
        One boolean per unit (n_units,).
    """
    loudest = np.full(coupling.n_units, -1.0)
    for consumer in coupling.consumers:
        axis = (consumer.data, consumer.axis)
        labels = coupling.axes[axis]
        free = labels >= 0
        np.maximum.at(loudest, labels[free], signal.means[axis][free])
    return np.asarray(loudest == 0)


def sweep(
    coupling: Coupling,
    layers: Sequence[Layer],
    masks: Mapping[str, Mask],
) -> tuple[dict[str, Mask], Bools]:
    """Remove units that no kept connection leaves, with all connections that enter them, until none is left.

    Coupled channels are one unit: it is kept while any layer reads it, or a node without connections of this kind.

    Args:
        coupling: The units and consumers.
        layers: The layers.
        masks: Kept connections by node.

    Returns:
        Kept connections by node, and kept units (n_units,).
    """
    elsewhere = _read_elsewhere(coupling, {layer.name for layer in layers})
    result = dict(masks)
    units = np.ones(coupling.n_units, bool)
    while True:
        read = elsewhere.copy()
        for layer in reversed(layers):
            mask = result[layer.name]
            if layer.prunable:
                mask = _without_removed(layer, mask, units)
                result[layer.name] = mask
            used = (mask.weights & ~layer.tied).any(axis=1) & (layer.inputs >= 0)
            read[layer.inputs[used]] = True
        if (read | ~units).all():
            return result, units
        units &= read


def _whole(layer: Layer) -> Mask:
    """The mask that keeps all connections."""
    weights = np.ones(layer.shares.shape, bool)
    bias = np.ones(layer.bias.shape, bool)
    return Mask(weights, bias)


def _energy(layer: Layer, worth: Floats) -> Floats:
    """Energy (groups, outputs, inputs + 1) of each connection per weight, the bias last."""
    squares = np.concatenate([layer.shares**2, layer.bias[..., None] ** 2], axis=-1)
    whole = squares.sum(axis=-1, keepdims=True)
    relative_worth = worth / max(float(worth.sum()), 1e-300)
    value = squares * relative_worth[..., None] / np.where(whole > 0, whole, 1.0)
    value[..., :-1] /= int(np.prod(layer.site.kernel))
    return np.asarray(value)


def _read_elsewhere(coupling: Coupling, names: set[str]) -> Bools:
    """Units (n_units,) that a consumer other than the named layers reads, or that have no consumer at all."""
    consumed = np.zeros(coupling.n_units, bool)
    elsewhere = np.zeros(coupling.n_units, bool)
    for consumer in coupling.consumers:
        labels = coupling.axes[consumer.data, consumer.axis]
        units = labels[labels >= 0]
        consumed[units] = True
        if consumer.node not in names:
            elsewhere[units] = True
    return elsewhere | ~consumed


def _without_removed(layer: Layer, mask: Mask, units: Bools) -> Mask:
    """The mask without connections that enter or leave removed units."""
    inputs = (layer.inputs < 0) | _at(units, layer.inputs)
    outputs = (layer.outputs < 0) | _at(units, layer.outputs)
    weights = mask.weights & inputs[:, None, :] & outputs[..., None]
    return Mask(weights, mask.bias & outputs)


def _at(units: Bools, labels: Ints) -> Bools:
    """``units`` at labels; entries at -1 are arbitrary."""
    if len(units):
        return units[labels]
    return np.zeros(labels.shape, bool)
