"""NNrelief: a connection matters by its share of the absolute signal that enters a unit.

Source: Dekhovich, Tax, Sluiter and Bessa, "Neural network relief: a pruning algorithm based on neural activity",
Machine Learning 113 (2024), section 3 and its algorithms 1 and 2. With inputs x, weights w and bias b of a unit j,

    dense         r_ij = E |w_ij x_i|                      S_j = sum_i r_ij + |b_j|
    convolution   r_ij = E || |K_ij| * |x_i| ||_F          S_j = sum_i r_ij + |b_j| sqrt(positions)

and the score of a connection (of a whole kernel K_ij, in a convolution) is s_ij = r_ij / S_j. Per unit the largest
scores that sum to ``alpha`` are kept, the bias competing with the weights (the alpha rule).

``signal = paper`` takes r as above. ``mean``, the default, takes ``sum |K_ij| E|x_i| sqrt(positions)``: one number a
channel in place of a Gram matrix, equal for dense layers and where a channel is the same everywhere, and it treats a
border as inside.

What was meant and what the authors' code does differ; here it is as meant:

* their rule also drops the smallest entry where all are needed, so that every unit loses one each time; ours does not,
  and never takes a unit's last weight (a bias may outweigh all of them);
* their code drops all entries as small as the smallest that is kept; the paper, and ours, keeps ties;
* their networks' convolutional scores are three formulas, none of which is the printed one;
* their residual rule leaves the shift of a normalisation behind a filter that was cut; see ``connections``;
* their first layer of a residual network is never pruned, by a wrong name.

A bias that a normalisation adds is no connection, as in their residual networks. Depthwise kernels are left alone: a
filter has no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_oamip.core.records import (
    Bools,
    Consumer,
    Coupling,
    Floats,
    Ints,
    Model,
    Scores,
    Statistics,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph.linear_layers import Editor, matrix
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.published.nnrelief.absolute_signal import (
    data_axis,
    depthwise,
    joins,
    maker,
    places,
)
from onnx_oamip.published.nnrelief.requests import ABSOLUTE_ACTIVATIONS, Signal

ALPHA = 0.95
"""Share of the absolute signal that is kept where nothing else is asked, for convolutions and dense layers alike."""


@dataclass(frozen=True)
class Layer:
    """One linear node: shares of the signal of weights (groups, outputs, inputs) and biases (groups, outputs).

    ``inputs`` (groups, inputs) and ``outputs`` (groups, outputs) are the units of its channels, -1 where pinned.
    ``prunable`` is false where the weight belongs to other nodes too.
    """

    place: Site
    shares: Floats
    bias: Floats
    inputs: Ints
    outputs: Ints
    prunable: bool = True


@dataclass(frozen=True)
class Mask:
    """Connections of a layer that stay: weights (groups, outputs, inputs), biases (groups, outputs)."""

    weights: Bools
    bias: Bools


@dataclass(frozen=True)
class Selection:
    """What the rules keep: connections by node, units (n_units,), and rows (outputs,) of branches that were cut.

    ``uncut`` counts shortcut channels that carry too little but have no weights of their own to lose.
    """

    masks: Mapping[str, Mask]
    units: Bools
    muted: Mapping[str, Bools]
    uncut: int


def score(
    model: Model, coupling: Coupling, statistics: Statistics | None, settings: Settings
) -> Scores:
    """Outgoing share of every unit; with ``settings.alpha``, 0 for units that the rules leave without a connection.

    ``O_i = sum over consumers and their outputs j of pi_j s_ij``: pi is what an output is worth to what follows, 1 over
    the classes at the end, and split at a residual sum as its branches share its signal.
    """
    assert statistics is not None
    signal = statistics[ABSOLUTE_ACTIVATIONS]
    found = layers(model, coupling, signal)
    values = outgoing(model, coupling, signal, found)
    if settings.alpha is None:
        return Scores("nnrelief", values)
    kept = rule(model, coupling, signal, found)(settings.alpha).units & ~dead(coupling, signal)
    values = np.where(kept, np.maximum(values, np.finfo(np.float64).tiny), 0.0)
    note = (
        f"{int((~kept).sum())} of {len(kept)} units have no connection at alpha {settings.alpha:g}"
    )
    return Scores("nnrelief", values, notes=(note,))


# -------------------------------------------------------------------------------------------------------- the scores


def contributions(
    model: Model, place: Site, signal: Signal, bias: Floats | None
) -> tuple[Floats, Floats]:
    """r (groups, outputs, inputs) and what the bias brings (groups, outputs)."""
    weight = np.abs(place.factor * matrix(place, model.constants[place.weight]))
    groups, outs, ins, _ = weight.shape
    positions, spread = 1, 1.0
    if place.spatial:
        positions = int(np.prod(model.shapes[place.node.outputs[0]][2:]))
        if place.rules.scatters:  # taps are shared out over the positions between two input pixels
            spread = int(np.prod(model.shapes[place.data][2:])) / positions
    scale = float(np.sqrt(positions))
    if place.node.name in signal.kernels:
        reached = signal.kernels[place.node.name]
    else:
        mean = signal.means[data_axis(model, place)].reshape(groups, 1, ins)
        reached = weight.sum(axis=3) * mean * (scale * spread)
    # An infinite bias rules a class out: it is no signal.
    own = (
        np.zeros(groups * outs)
        if bias is None
        else np.where(np.isfinite(bias), np.abs(bias), 0.0) * scale
    )
    return reached, own.reshape(groups, outs)


def shares(reached: Floats, bias: Floats) -> tuple[Floats, Floats]:
    """s_ij and s_bias,j: they sum to 1 over a unit, or are all 0 where nothing reaches it."""
    whole = reached.sum(axis=-1) + bias
    whole = np.where(whole > 0, whole, 1.0)
    return reached / whole[..., None], bias / whole


def layers(model: Model, coupling: Coupling, signal: Signal) -> tuple[Layer, ...]:
    """Every linear node with a constant weight and more than one input a filter, in graph order."""
    editor = Editor(model.proto)
    uses: dict[str, int] = {}
    for node in model.nodes:
        for name in (*node.inputs, *node.captures):
            uses[name] = uses.get(name, 0) + 1
    result = []
    for place in places(model):
        if depthwise(model, place):
            continue
        weights, bias = shares(*contributions(model, place, signal, editor.whole_bias(place)))
        groups, outs, ins = weights.shape
        out = place.node.outputs[0]
        ends = (out, place.output_axis % len(model.shapes[out]))
        inputs = coupling.axes.get(data_axis(model, place), np.full(groups * ins, -1, np.int64))
        outputs = coupling.axes.get(ends, np.full(groups * outs, -1, np.int64))
        units = inputs.reshape(groups, ins), outputs.reshape(groups, outs)
        result.append(Layer(place, weights, bias, *units, uses[place.weight] == 1))
    return tuple(result)


def outgoing(model: Model, coupling: Coupling, signal: Signal, found: Sequence[Layer]) -> Floats:
    """O (n_units,): see :func:`score`."""
    return worth(model, coupling, signal, found)[0]


def worth(
    model: Model, coupling: Coupling, signal: Signal, found: Sequence[Layer]
) -> tuple[Floats, dict[str, Floats]]:
    """O (n_units,), and by node what its outputs are worth, pi (groups, outputs).

    Nodes are met in reverse, so that an output is worth what comes after it.
    """
    by_name = {layer.place.node.name: layer for layer in found}
    readers: dict[str, list[Consumer]] = {}
    for consumer in coupling.consumers:
        readers.setdefault(consumer.node, []).append(consumer)
    branches = {j.node: [maker(model, t) for t in j.inputs] for j in joins(model, coupling)}
    total, now = np.zeros(coupling.n_units), np.zeros(coupling.n_units)
    given: dict[str, Floats] = {}
    result: dict[str, Floats] = {}

    def add(labels: Ints, values: Floats) -> None:
        free = labels >= 0
        part = np.bincount(labels[free], values[free], minlength=coupling.n_units)
        np.add(total, part, out=total)
        np.add(now, part, out=now)

    for node in reversed(model.nodes):
        if node.name in branches and node.name in signal.joins:
            makers, (axis, norms) = branches[node.name], signal.joins[node.name]
            labels = coupling.axes[node.outputs[0], axis]
            free = labels >= 0
            here = np.where(free, now[labels], 1 / len(labels))
            split = norms / np.where(norms.sum(axis=0) > 0, norms.sum(axis=0), 1.0)
            passed = np.zeros(len(labels))
            for share, place in zip(split, makers, strict=True):
                if place is not None and place.node.name in by_name:
                    given[place.node.name] = here * share
                else:
                    passed += share
            now[labels[free]] *= passed[free]
        elif node.name in by_name:
            layer = by_name[node.name]
            pinned = 1 / layer.outputs.size
            value = np.where(layer.outputs >= 0, now[layer.outputs] if len(now) else 0.0, pinned)
            if node.name in given:
                value = given[node.name].reshape(value.shape)
            result[node.name] = value
            # A grouped convolution may tie its two sides: what a unit tells itself says nothing about it.
            tied = (layer.inputs[:, None, :] == layer.outputs[:, :, None]) & (
                layer.inputs[:, None, :] >= 0
            )
            add(layer.inputs, np.einsum("go,goi->gi", value, np.where(tied, 0.0, layer.shares)))
        else:
            for consumer in readers.get(node.name, ()):
                reached = signal.means[consumer.data, consumer.axis] * _meeting(
                    model, consumer, signal
                )
                whole = float(reached.sum())
                if whole > 0:
                    add(coupling.axes[consumer.data, consumer.axis], reached / whole)
    return total, result


def _meeting(model: Model, consumer: Consumer, signal: Signal) -> Floats:
    """Mean absolute value of what meets each channel (C,) in a consumer that has no weight of a plain form."""
    channels = model.shapes[consumer.data][consumer.axis]
    if consumer.weight is None:
        return np.ones(channels)
    if consumer.weight not in model.constants:
        return signal.means[consumer.weight, consumer.weight_axis]
    weight = np.abs(model.constants[consumer.weight].astype(np.float64))
    value = weight.mean(axis=tuple(a for a in range(weight.ndim) if a != consumer.weight_axis))
    return value if len(value) == channels else np.ones(channels)


# --------------------------------------------------------------------------------------------------------- the rules


def needed(weights: Floats, bias: Floats) -> tuple[Floats, Floats]:
    """Per entry the share of its row that larger entries carry already: it is needed for any alpha above that.

    ``weights`` (..., inputs), ``bias`` (...). An entry of 0 is never needed (infinity). Ties have the same number.
    """
    entries = np.concatenate([weights, bias[..., None]], axis=-1)
    order = np.argsort(-entries, axis=-1, kind="stable")
    falling = np.take_along_axis(entries, order, axis=-1)
    carried = np.cumsum(falling, axis=-1)
    before = np.concatenate([np.zeros_like(carried[..., :1]), carried[..., :-1]], axis=-1)
    fresh = np.concatenate(
        [np.ones(falling[..., :1].shape, bool), falling[..., 1:] < falling[..., :-1]], axis=-1
    )
    # `before` never falls: the first of every run of equal entries speaks for all of them.
    before = np.maximum.accumulate(np.where(fresh, before, 0.0), axis=-1)
    whole = np.where(carried[..., -1:] > 0, carried[..., -1:], 1.0)
    result = np.empty_like(entries)
    np.put_along_axis(result, order, np.where(falling > 0, before / whole, np.inf), axis=-1)
    return result[..., :-1], result[..., -1]


def ranked(
    found: Sequence[Layer], everywhere: Mapping[str, Floats]
) -> dict[str, tuple[Floats, Floats]]:
    """Per connection the share of all connections that rank before it, in place of :func:`needed`.

    They rank by ``pi_j s_ij^2 / sum_i s_ij^2`` per weight, with pi summing to 1 over a layer: the share of the energy
    of a layer's output that goes with a connection, as far as inputs are independent, so that layers can be compared.
    Not in the paper, whose rule takes the same share from every unit: here those that matter less lose more. Entries of
    0 are never needed.
    """
    values = []
    for layer in found:
        pi = everywhere[layer.place.node.name]
        energy = np.concatenate([layer.shares**2, layer.bias[..., None] ** 2], axis=-1)
        whole = energy.sum(axis=-1, keepdims=True)
        value = (
            energy
            * (pi / max(float(pi.sum()), 1e-300))[..., None]
            / np.where(whole > 0, whole, 1.0)
        )
        value[..., :-1] /= int(np.prod(layer.place.kernel))
        values.append(value)
    flat = np.concatenate([value.reshape(-1) for value in values]) if values else np.zeros(0)
    place = np.empty(len(flat))
    place[np.argsort(-flat, kind="stable")] = np.arange(len(flat)) / max(len(flat), 1)
    place[flat == 0] = np.inf
    parts = np.split(place, np.cumsum([value.size for value in values])[:-1])
    result = {}
    for layer, value, part in zip(found, values, parts, strict=False):
        shaped = part.reshape(value.shape)
        result[layer.place.node.name] = shaped[..., :-1], shaped[..., -1]
    return result


def keep_alpha(
    weights: Floats, bias: Floats, alpha: float, guard: bool = True
) -> tuple[Bools, Bools]:
    """The alpha rule on :func:`needed`: (which weights, which biases) stay.

    With p the least number of entries that carry ``alpha`` of a row, all entries stay that are as large as the p-th.
    The largest weight stays unless it is 0, even where the bias alone would do (``guard``).
    """
    if not guard:
        return weights < alpha, bias < alpha
    first = weights.min(axis=-1, keepdims=True, initial=np.inf)
    alone = np.isfinite(first) & (first >= alpha)
    return (weights < alpha) | (alone & (weights == first)), bias < alpha


def rule(
    model: Model,
    coupling: Coupling,
    signal: Signal,
    found: Sequence[Layer],
    everywhere: Mapping[str, Floats] | None = None,
) -> Callable[[float], Selection]:
    """All rules for any alpha: the alpha rule, residual sums, and the sweep back to what is no longer read.

    With ``everywhere`` (what outputs are worth, see :func:`worth`) the alpha rule gives way to one order of all
    connections, and alpha is the share of them that stays: see :func:`ranked`.

    A branch that brings a channel of a residual sum less than (1 - alpha) / alpha of the other's norm is cut there (two
    connections under the alpha rule), where a prunable layer makes it. What leaves a dead unit has a share of 0 and
    goes at any alpha, so that the unit goes too.
    """
    free = [layer for layer in found if layer.prunable]
    if everywhere is None:
        ranks = {layer.place.node.name: needed(layer.shares, layer.bias) for layer in free}
    else:
        ranks = ranked(free, everywhere)
    whole = {
        layer.place.node.name: Mask(
            np.ones(layer.shares.shape, bool), np.ones(layer.bias.shape, bool)
        )
        for layer in found
        if not layer.prunable
    }
    sums: list[tuple[str | None, Floats, Floats]] = []
    for join in joins(model, coupling):
        for side in (0, 1):
            place = maker(model, join.inputs[side])
            name = place.node.name if place is not None and place.node.name in ranks else None
            norms = signal.joins[join.node][1]
            sums.append((name, norms[side], norms[1 - side]))

    def select(alpha: float) -> Selection:
        masks = dict(whole)
        for name, (weights, bias) in ranks.items():
            masks[name] = Mask(*keep_alpha(weights, bias, alpha, everywhere is None))
        muted, uncut = {}, 0
        for made_by, norm, other in sums:
            low = faint(norm, other, alpha if everywhere is None else 1.0)
            if made_by is None:
                uncut += int(low.sum())
            elif low.any():
                muted[made_by] = low
                mask, gone = masks[made_by], low.reshape(masks[made_by].bias.shape)
                masks[made_by] = Mask(mask.weights & ~gone[..., None], mask.bias & ~gone)
        return Selection(*sweep(coupling, found, masks), muted, uncut)

    return select


def dead(coupling: Coupling, signal: Signal) -> Bools:
    """Units (n_units,) that bring nothing to any consumer: their activation is exactly 0 on all samples."""
    loudest = np.full(coupling.n_units, -1.0)
    for consumer in coupling.consumers:
        labels = coupling.axes[consumer.data, consumer.axis]
        free = labels >= 0
        np.maximum.at(loudest, labels[free], signal.means[consumer.data, consumer.axis][free])
    return np.asarray(loudest == 0)


def sweep(
    coupling: Coupling, found: Sequence[Layer], masks: Mapping[str, Mask]
) -> tuple[dict[str, Mask], Bools]:
    """Connections and units (n_units,) that still lead somewhere.

    A unit that no connection leaves goes, with all that enter it, until nothing more goes. Coupled channels are one
    unit: it stays while any layer reads it. So does what a node without connections of this kind reads.
    """
    names = {layer.place.node.name for layer in found}
    seen = np.zeros(coupling.n_units, bool)
    other = np.zeros(coupling.n_units, bool)
    for consumer in coupling.consumers:
        labels = coupling.axes[consumer.data, consumer.axis]
        seen[labels[labels >= 0]] = True
        if consumer.node not in names:
            other[labels[labels >= 0]] = True
    other |= ~seen
    result, units = dict(masks), np.ones(coupling.n_units, bool)
    while True:
        read = other.copy()
        for layer in reversed(found):
            name = layer.place.node.name
            mask = result[name]
            if layer.prunable:
                stays_in = (layer.inputs < 0) | _of(units, layer.inputs)
                stays_out = (layer.outputs < 0) | _of(units, layer.outputs)
                mask = Mask(
                    mask.weights & stays_in[:, None, :] & stays_out[..., None],
                    mask.bias & stays_out,
                )
                result[name] = mask
            tied = (layer.inputs[:, None, :] == layer.outputs[:, :, None]) & (
                layer.inputs[:, None, :] >= 0
            )
            used = (mask.weights & ~tied).any(axis=1) & (layer.inputs >= 0)
            read[layer.inputs[used]] = True
        if (read | ~units).all():
            return result, units
        units &= read


def _of(units: Bools, labels: Ints) -> Bools:
    """``units`` at labels, whatever at -1."""
    return units[labels] if len(units) else np.zeros(labels.shape, bool)


def faint(norm: Floats, other: Floats, alpha: float) -> Bools:
    """Channels of a branch whose norm is below (1 - alpha) / alpha of the other branch's."""
    return np.asarray(alpha * norm < (1 - alpha) * other)
