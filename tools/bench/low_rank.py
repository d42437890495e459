"""Low-rank factors of dense and 1x1 layers beside narrower groups, at equal MACs.

A layer ``y = W x`` of full rank R is written as ``W = U V`` with the principal components of its outputs as the inner
channels: of all factors of rank r, the first r components lose least of the outputs' variance (a singular value
decomposition of W whitened by the covariance of x). Rank r costs ``r (inputs + outputs)`` in place of
``inputs * outputs``. The losses of ranks are measured as those of widths are: the objective of the run on samples that
no fit has used, with one layer changed at a time.

``low_rank`` has one row per layer: the loss at a rank over the least loss of a group that the layer reads or writes,
narrowed until the model saves the same MACs. ``low_rank-gain`` has one row per network and budget: the loss that the
budget program predicts with widths alone, and with ranks as a further choice. As losses of single changes are added
up, that gain is an upper estimate of what a program with ranks could win. Beside it are the accuracy and the divergence
of pruned networks without and with ``--factor auto``, for the networks of the repository.

Layers with less than a hundredth of the MACs are left out. ``--larger DIR``, see ``larger``, adds EfficientNet-Lite0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_oamip.api import prepare
from onnx_oamip.core.records import Axis, Budget, Floats, Gram, Ints, Model, Sensitivity
from onnx_oamip.core.settings import Settings
from onnx_oamip.data.feeds import all_feeds
from onnx_oamip.graph import cost, low_rank
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.linear_layers import matrix, unmatrix
from onnx_oamip.graph.loading import remade
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.planning import allocation, budget_program, search, sensitivity, width_losses
from onnx_oamip.planning.attempts import Prepared
from onnx_oamip.statistics import stream_moments, workload
from onnx_oamip.statistics.collector import parts
from onnx_oamip.statistics.stream_moments import StreamMoments

from .larger import Bench, absent
from .studies import MODELS, Resumable, Row, paths

STUDY = "low_rank"
GAIN = "low_rank-gain"
NETWORKS = ("lenet300-mnist", "vgg-fashion", "vit-fashion", "efficientnet-lite0")
BUDGETS = (0.65, 0.5, 0.35)
SHARES = (0.75, 0.5, 0.25)
"""Shares of a layer's MACs that ranks are compared at."""
SHOWN = 0.5
"""Share at which the losses are shown."""
LEAST = 0.01
"""Share of the MACs from which on a layer counts."""
BETTER, ABOVE = 0.9, 1e-5
"""A rank loses less than a width if its loss is below this share of the width's, which is itself above the second."""
DAMPING = 1e-6
"""Share of the plain matrix in the one whose components are taken: directions that no sample shows keep their order."""
PRICES = 20
"""Steps of the search for the price of a MAC."""
ROWS = 65536
"""Rows that a covariance counts as computed from: enough for no shrinkage."""
SCALE = "x 1000"
COLUMNS = (
    "model",
    "layer",
    "inputs",
    "outputs",
    "% of MACs",
    *(f"rank over width at {share:.0%}" for share in SHARES),
    f"loss by rank {SCALE} at {SHOWN:.0%}",
    f"loss by width {SCALE} at {SHOWN:.0%}",
)
GAINS = (
    "model",
    "MACs asked",
    "layers",
    "lower by rank",
    f"loss by widths {SCALE}",
    f"by search {SCALE}",
    f"with ranks {SCALE}",
    "factored",
    "gain %",
    "accuracy",
    "accuracy factored",
    f"divergence {SCALE}",
    f"divergence {SCALE} factored",
)


def run(out: Path, seed: int, names: tuple[str, ...] = (), larger: Path | None = None) -> str:
    """Measure the layers of every network, and solve for the budgets."""
    study = Resumable(out, STUDY, COLUMNS, seed)
    gains = Resumable(out, GAIN, GAINS, seed)
    for name in names or NETWORKS:
        if name not in MODELS and (missing := absent(name, larger)):
            print(missing, flush=True)
            continue
        if gains.holds({"model": name, "MACs asked": BUDGETS[-1]}):
            continue
        found = measured(name, larger, seed)
        rows = [found.row(layer) for layer in found.layers]
        study.measure({"model": name}, len(rows), rows)
        pruned = _pruned(name, seed) if name in MODELS and found.layers else {}
        gained = [found.gain(b, rows) | pruned.get(b, {}) for b in BUDGETS]
        gains.measure({"model": name}, len(BUDGETS), gained)
    gains.save()
    return study.save()


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer that may be factored.

    Attributes:
        place: Its weight.
        inner: Name of the tensor between the factors.
        rank: Full rank.
        macs_per_entry: MACs of the layer per entry of its weight.
        lengths: Channels of its input and of its output at some widths: a fixed part (2,) and one per unit (2, groups).
        losses: Loss of the model at every rank from 1 to the full one.
    """

    place: Site
    inner: str
    rank: int
    macs_per_entry: float
    lengths: tuple[Ints, Ints]
    losses: Floats

    def channels(self, widths: Ints) -> Ints:
        """Inputs and outputs (2,) at the widths of all groups."""
        fixed, per_unit = self.lengths
        result: Ints = fixed + per_unit @ widths
        return result

    def saved(self, widths: Ints, rank: int | Ints) -> Floats:
        """MACs that a rank below the full one saves at the widths of all groups; 0 at the full rank."""
        inputs, outputs = self.channels(widths)
        below = self.macs_per_entry * (inputs * outputs - np.asarray(rank) * (inputs + outputs))
        return np.where(np.asarray(rank) < self.rank, below, 0.0)


@dataclass(frozen=True, eq=False)
class Found:
    """Losses of the widths and of the ranks of one network."""

    name: str
    ready: Prepared
    layers: tuple[Layer, ...]

    @property
    def full(self) -> Ints:
        """Full widths (groups,)."""
        return cost.full_widths(self.ready.coupling)

    @property
    def macs(self) -> int:
        """MACs of the network."""
        return self.ready.ledger.cost(self.full).macs

    def row(self, layer: Layer) -> Row:
        """Losses of a layer by rank and by width at equal saved MACs."""
        inputs, outputs = layer.channels(self.full)
        whole = layer.macs_per_entry * inputs * outputs
        row: Row = {
            "model": self.name,
            "layer": layer.place.node.name,
            "inputs": int(inputs),
            "outputs": int(outputs),
            "% of MACs": _short(100 * float(whole) / self.macs),
        }
        levels = []
        for share in SHARES:
            rank = int(share * inputs * outputs / (inputs + outputs))
            by_rank = float(layer.losses[max(rank, 1) - 1])
            by_width = self.by_width(layer, float(layer.saved(self.full, max(rank, 1))))
            levels.append((by_rank, by_width))
            ratio = None if by_width is None else by_rank / max(by_width, ABOVE)
            row[f"rank over width at {share:.0%}"] = _short(ratio)
            if share == SHOWN:
                scaled = None if by_width is None else 1000 * by_width
                row[f"loss by rank {SCALE} at {share:.0%}"] = _short(1000 * by_rank)
                row[f"loss by width {SCALE} at {share:.0%}"] = _short(scaled)
        row["lower by rank"] = any(_is_lower(*level) for level in levels)
        return row

    def by_width(self, layer: Layer, saved: float) -> float | None:
        """Least loss of a group that the layer reads or writes, narrowed until it saves so many MACs."""
        assert self.ready.ladder is not None
        losses = []
        for group in np.flatnonzero(layer.lengths[1].any(axis=0)):
            widths, loss = self.ready.ladder.widths[group], self.ready.ladder.cost[group]
            gained = self.macs - _macs_along(self.ready.ledger, self.full, int(group), widths)
            if gained[0] >= saved:
                losses.append(float(np.interp(-saved, -gained, loss)))
        return min(losses, default=None)

    def gain(self, budget: float, rows: Sequence[Row]) -> Row:
        """Predicted losses at a budget: by widths alone, and with ranks."""
        ready = self.ready
        assert ready.ladder is not None
        limit = allocation.limits(Budget(macs=budget), ready.before, 0)
        chosen = budget_program.choose(ready.ledger, ready.ladder, limit)
        exact = float(chosen.program["objective"])
        search = _Search(self, budget * self.macs)
        starts = [self.full, chosen.widths]
        alone, _ = min(search.best(start, False) for start in starts)
        both, factored = min(search.best(start, True) for start in starts)
        return {
            "model": self.name,
            "MACs asked": budget,
            "layers": len(self.layers),
            "lower by rank": sum(bool(row["lower by rank"]) for row in rows),
            f"loss by widths {SCALE}": _short(1000 * exact),
            f"by search {SCALE}": _short(1000 * alone),
            f"with ranks {SCALE}": _short(1000 * both),
            "factored": factored,
            "gain %": _short(100 * max(0.0, 1 - both / min(exact, alone))),
        }


def _short(value: float | None) -> float | None:
    """The first digits of a number."""
    return None if value is None else float(f"{value:.5g}")


def _is_lower(by_rank: float, by_width: float | None) -> bool:
    return by_width is not None and by_width > ABOVE and by_rank < BETTER * by_width


def _macs_along(ledger: cost.Ledger, widths: Ints, group: int, wanted: Ints) -> Floats:
    """MACs with one group at several widths: a polynomial of the second degree at most, through three of them."""
    few = np.unique([wanted[0], wanted[len(wanted) // 2], wanted[-1]])
    at_few = []
    for width in few.tolist():
        changed = widths.copy()
        changed[group] = width
        at_few.append(ledger.cost(changed).macs)
    scaled = few / wanted[-1]
    return np.polyval(np.polyfit(scaled, at_few, len(few) - 1), wanted / wanted[-1])


class _Search:
    """Search for widths and ranks of least summed loss within a number of MACs.

    For a price of a MAC, groups and layers in turn take their best level until none changes; the price is bisected.
    """

    def __init__(self, found: Found, limit: float) -> None:
        assert found.ready.ladder is not None
        self.found, self.limit, self.ladder = found, limit, found.ready.ladder
        self.layers = found.layers

    def best(self, start: Ints, with_ranks: bool) -> tuple[float, int]:
        """Least loss found from some widths on, and the number of factored layers."""
        low, high = 0.0, 1.0
        widths, ranks = self._descend(start, high, with_ranks)
        while self._macs(widths, ranks) > self.limit:
            low, high = high, 8 * high
            widths, ranks = self._descend(start, high, with_ranks)
        found = widths, ranks
        for _ in range(PRICES):
            price = high / 8 if low == 0 else float(np.sqrt(low * high))
            widths, ranks = self._descend(start, price, with_ranks)
            if self._macs(widths, ranks) > self.limit:
                low = price
            else:
                high, found = price, (widths, ranks)
        self._fill(*found, with_ranks)
        return self._result(*found)

    def _result(self, widths: Ints, ranks: Ints) -> tuple[float, int]:
        loss = sum(
            float(losses[np.searchsorted(levels, width)])
            for levels, losses, width in zip(
                self.ladder.widths, self.ladder.cost, widths.tolist(), strict=True
            )
        )
        loss += sum(
            float(layer.losses[rank - 1])
            for layer, rank in zip(self.layers, ranks.tolist(), strict=True)
        )
        return loss, int(sum(r < layer.rank for layer, r in zip(self.layers, ranks, strict=True)))

    def _macs(self, widths: Ints, ranks: Ints) -> float:
        saved = sum(
            float(layer.saved(widths, rank))
            for layer, rank in zip(self.layers, ranks.tolist(), strict=True)
        )
        return self.found.ready.ledger.cost(widths).macs - saved

    def _along(self, widths: Ints, ranks: Ints, group: int) -> Floats:
        """MACs at all levels of a group."""
        levels = self.ladder.widths[group]
        total = _macs_along(self.found.ready.ledger, widths, group, levels)
        for layer, rank in zip(self.layers, ranks.tolist(), strict=True):
            if rank < layer.rank and layer.lengths[1][:, group].any():
                fixed = layer.channels(widths) - layer.lengths[1][:, group] * widths[group]
                inputs, outputs = fixed[:, None] + np.outer(layer.lengths[1][:, group], levels)
                total = total - layer.macs_per_entry * (
                    inputs * outputs - rank * (inputs + outputs)
                )
            else:
                total = total - float(layer.saved(widths, rank))
        return total

    def _descend(self, start: Ints, price: float, with_ranks: bool) -> tuple[Ints, Ints]:
        """Widths and ranks that no single change improves at a price per MAC."""
        per_mac = price / self.found.macs
        widths = start.copy()
        ranks = np.asarray([layer.rank for layer in self.layers], np.int64)
        for _ in range(20):
            before = widths.copy(), ranks.copy()
            for i, layer in enumerate(self.layers if with_ranks else ()):
                saved = layer.saved(widths, np.arange(1, layer.rank + 1))
                ranks[i] = 1 + int(np.argmin(layer.losses - per_mac * saved))
            for group, (levels, losses) in enumerate(
                zip(self.ladder.widths, self.ladder.cost, strict=True)
            ):
                macs = self._along(widths, ranks, group)
                widths[group] = levels[np.argmin(losses + per_mac * macs)]
            if np.array_equal(before[0], widths) and np.array_equal(before[1], ranks):
                break
        return widths, ranks

    def _fill(self, widths: Ints, ranks: Ints, with_ranks: bool) -> None:
        """Use up the MACs that are left, in place, the largest fall of the loss first."""
        while True:
            left = self.limit - self._macs(widths, ranks)
            moves = []
            for group, (levels, losses) in enumerate(
                zip(self.ladder.widths, self.ladder.cost, strict=True)
            ):
                macs = self._along(widths, ranks, group)
                at = int(np.searchsorted(levels, widths[group]))
                fits = np.flatnonzero(macs - macs[at] <= left)
                best = int(fits[np.argmin(losses[fits])])
                moves.append((float(losses[at] - losses[best]), True, group, int(levels[best])))
            for i, layer in enumerate(self.layers if with_ranks else ()):
                saved = layer.saved(widths, np.arange(1, layer.rank + 1))
                fits = np.flatnonzero(saved[ranks[i] - 1] - saved <= left)
                best = int(fits[np.argmin(layer.losses[fits])])
                falls = float(layer.losses[ranks[i] - 1] - layer.losses[best])
                moves.append((falls, False, i, best + 1))
            falls, is_width, index, value = max(moves)
            if falls <= 0:
                return
            (widths if is_width else ranks)[index] = value


def _pruned(name: str, seed: int) -> dict[float, Row]:
    """Accuracy and divergence without and with factors, by budget."""
    model, data = paths(name)
    bench = Bench(name, model.parent, data)
    found: dict[float, Row] = {budget: {} for budget in BUDGETS}
    for factor, suffix in (("none", ""), ("auto", " factored")):
        settings = Settings.create(macs=BUDGETS[0], seed=seed, factor=factor)
        ready = prepare.prepare(bench.model, bench.data, settings)
        for budget in BUDGETS:
            here = replace(ready, settings=settings.model_copy(update={"macs": budget}))
            row = bench.row(budget, "", search.search(here).pruned.proto)
            found[budget][f"accuracy{suffix}"] = row["after"]
            found[budget][f"divergence {SCALE}{suffix}"] = 1000 * row["divergence"]
    return found


def measured(name: str, larger: Path | None, seed: int) -> Found:
    """Measure the losses of all widths and of the ranks of all large layers of a network."""
    if name in MODELS:
        model, data = paths(name)
    else:
        assert larger is not None
        model, data = larger / f"{name}.onnx", larger / f"{name}.npz"
    settings = Settings.create(macs=BUDGETS[0], seed=seed)
    ready = prepare.prepare(model, data, settings)
    places = _large_layers(ready)
    axes = [_input_axis(ready.model, place) for place in places]
    samples = parts(ready.samples)[0]
    feeds = all_feeds(ready.model, samples, ready.batch, ready.settings.activation_memory_limit)
    moments = stream_moments.collect(ready.model, axes, feeds, ready.device, seed=seed)
    curves = _rank_losses(ready, places, [moments[axis] for axis in axes])
    layers = tuple(_layer(ready, place, curve) for place, curve in zip(places, curves, strict=True))
    return Found(name, ready, layers)


def _large_layers(ready: Prepared) -> list[Site]:
    """Dense layers and 1x1 convolutions of stride 1 with a share of the MACs."""
    model, ledger = ready.model, ready.ledger
    widths = cost.full_widths(ready.coupling)
    terms = ledger.terms(ledger.macs, ledger.lengths(widths))
    shares = dict(zip(ledger.nodes, (terms / terms.sum()).tolist(), strict=True))
    return [
        place for place in low_rank.candidates(model) if shares.get(place.node.name, 0.0) >= LEAST
    ]


def _input_axis(model: Model, place: Site) -> Axis:
    return place.data, place.data_axis % len(model.shapes[place.data])


def _output_axis(model: Model, place: Site) -> Axis:
    output = place.node.outputs[0]
    return output, place.output_axis % len(model.shapes[output])


def _layer(ready: Prepared, place: Site, curve: Sensitivity) -> Layer:
    model, coupling = ready.model, ready.coupling
    weight = matrix(place, model.constants[place.weight])[0, :, :, 0]
    rank = min(weight.shape)
    fixed = np.asarray(weight.shape[::-1], np.int64)
    per_unit = np.zeros((2, len(coupling.groups)), np.int64)
    for side, axis in enumerate((_input_axis(model, place), _output_axis(model, place))):
        for g, group in enumerate(coupling.groups):
            per_unit[side, g] = group.multiplicity.get(axis, 0)
    fixed = fixed - per_unit @ cost.full_widths(coupling)
    term = ready.ledger.nodes.index(place.node.name)
    lengths = ready.ledger.lengths(cost.full_widths(coupling))
    macs = ready.ledger.terms(ready.ledger.macs, lengths)[term] / ready.ledger.batch
    losses = width_losses.interpolate(curve, np.arange(1, rank + 1))
    return Layer(
        place=place,
        inner=_inner(place),
        rank=rank,
        macs_per_entry=float(macs) / weight.size,
        lengths=(fixed, per_unit),
        losses=losses,
    )


def _inner(place: Site) -> str:
    return f"low_rank_{place.node.name}"


def _rank_losses(
    ready: Prepared, places: Sequence[Site], moments: Sequence[StreamMoments]
) -> list[Sensitivity]:
    """Losses of the model by the rank of each layer."""
    proto = onnx.ModelProto()
    proto.CopyFrom(ready.model.proto)
    grams: dict[str, Gram] = {}
    factors: dict[str, tuple[Floats, Floats]] = {}
    for place, found in zip(places, moments, strict=True):
        weight = matrix(place, ready.model.constants[place.weight])[0, :, :, 0]
        outer, inner, variances = factorised(weight, found.covariance)
        factors[place.node.name] = outer, inner
        size = len(variances)
        grams[place.node.name] = Gram(
            matrix=np.diag(variances)[None],
            mean=(inner @ found.mean)[None],
            columns=np.arange(size)[:, None],
            taps=1,
            rows=ROWS,
        )
    factor(proto, ready.model, places, factors)
    model = remade(ready.model, proto)
    coupling = couple(model)
    order = np.zeros(coupling.n_units)
    wanted = []
    for place in places:
        axis = place.output_axis % len(model.shapes[place.node.outputs[0]])
        labels = coupling.axes[_inner(place), axis]
        order[labels] = -np.arange(len(labels))
        wanted.append(
            next(g for g, group in enumerate(coupling.groups) if labels[0] in group.units)
        )
    nothing = Sensitivity(np.ones(1, np.int64), np.zeros(1))
    others = {g: nothing for g in range(len(coupling.groups)) if g not in wanted}
    passes = sensitivity.passes(ready.coupling)
    samples = workload.measured(ready, passes, workload.LOSS_MACS)
    losses = sensitivity.measure(
        model,
        coupling,
        grams,
        order,
        [feed for _, feed in samples.batches(ready.batch)],
        device=ready.device,
        objective=ready.objective,
        workers=ready.workers,
        known=others,
    )
    return [losses[g] for g in wanted]


def factorised(weight: Floats, covariance: Floats) -> tuple[Floats, Floats, Floats]:
    """Factor a weight by the principal components of its outputs.

    Args:
        weight: W (outputs, inputs).
        covariance: Covariance of the inputs (inputs, inputs).

    Returns:
        U (outputs, rank), V (rank, inputs) with ``W = U V``, and the variances of ``V x``, the largest first.
    """
    of_outputs = weight @ covariance @ weight.T
    plain = weight @ weight.T
    scale = DAMPING * np.trace(of_outputs) / np.trace(plain)
    _, vectors = np.linalg.eigh(of_outputs + scale * plain)
    outer = vectors[:, ::-1][:, : min(weight.shape)]
    inner = outer.T @ weight
    variances = np.einsum("ri,ij,rj->r", inner, covariance, inner)
    return outer, inner, np.maximum(variances, 0.0)


def factor(
    proto: onnx.ModelProto,
    model: Model,
    places: Sequence[Site],
    factors: Mapping[str, tuple[Floats, Floats]],
) -> None:
    """Write every layer as two, in place: the second has the name of the layer."""
    by_name = {place.node.name: place for place in places}
    nodes = []
    for node in proto.graph.node:
        if node.name in by_name:
            place = by_name[node.name]
            outer, inner = factors[node.name]
            like = model.constants[place.weight]
            first = onnx.NodeProto()
            first.CopyFrom(node)
            del first.input[2:]
            first.name, first.output[0] = f"{node.name}_inner", _inner(place)
            first.input[place.weight_slot] = f"{node.name}_inner_weight"
            node.input[place.slot] = _inner(place)
            node.input[place.weight_slot] = f"{node.name}_outer_weight"
            for value, target in ((inner, first), (outer, node)):
                stored = unmatrix(place, value[None, :, :, None], like)
                name = target.input[place.weight_slot]
                proto.graph.initializer.append(numpy_helper.from_array(stored, name))
            nodes.append(first)
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
