"""Rounds of scoring, pruning and refitting single connections: the state of the weights, and how a round changes it.

The network keeps its shape: what is pruned is zero. Rounds stand in for the rounds of scoring, pruning and retraining
of NNrelief: every round scores the network that the last one left, and the refit brings what survives as near as least
squares can to what the original layer gave, front to back. Nothing that was pruned comes back.

Where a branch of a residual sum is cut and nothing is refitted, the normalisation behind it is silenced too, as the
paper means it; with a refit the bias takes the mean of what the branch gave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
import onnx

from onnx_oamip.core.errors import BudgetNotMet
from onnx_oamip.core.records import (
    Bools,
    Coupling,
    Fit,
    Floats,
    Model,
    Round,
    Scores,
)
from onnx_oamip.data.feeds import feeds_within_memory
from onnx_oamip.graph.im2col import data_rows, output_rows
from onnx_oamip.graph.linear_layers import Editor, matrix, unmatrix
from onnx_oamip.graph.ops import Trait, has
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.ops.norm import BATCH_AFFINE_SLOTS
from onnx_oamip.graph.partial_execution import Frontier, element_types
from onnx_oamip.published.nnrelief import absolute_signal, score
from onnx_oamip.published.nnrelief.masked_ridge import supported
from onnx_oamip.published.nnrelief.requests import ABSOLUTE_ACTIVATIONS
from onnx_oamip.published.nnrelief.score import Selection
from onnx_oamip.repair.least_squares import (
    GRAM_CAP,
    HELD_OUT,
    Target,
    collect_targets,
)
from onnx_oamip.repair.ridge import RIDGES, choose_ridge
from onnx_oamip.statistics.collector import collect
from onnx_oamip.statistics.context import Collected, Context

ROUNDING = 1e-10
"""Error, relative to the variance of what a layer gives, that single precision alone makes."""
SHARE_STEPS = 40
"""Halvings of alpha on the way to a share of connections."""


@dataclass(frozen=True)
class State:
    """Weights (groups, outputs, inputs, taps) and whole biases (outputs,) by node; a bias of None is computed."""

    weights: Mapping[str, Floats]
    biases: Mapping[str, Floats | None]


@dataclass(frozen=True)
class Thinned:
    """The network after all rounds: its state and what led there."""

    state: State
    proto: onnx.ModelProto
    scores: Scores
    selection: Selection
    rounds: tuple[Round, ...]
    fits: tuple[Fit, ...]
    notes: tuple[str, ...]


class Bench:
    """What all rounds and all tries share: the original, and what its layers gave on the calibration samples."""

    def __init__(self, opened: Context) -> None:
        self.opened, self.progress = opened, opened.progress
        model = opened.model
        uses: dict[str, int] = {}
        for node in model.nodes:
            for name in (*node.inputs, *node.captures):
                uses[name] = uses.get(name, 0) + 1
        places = [
            p for p in absolute_signal.places(model) if not absolute_signal.depthwise(model, p)
        ]
        alone = [p for p in places if uses[p.weight] == 1]
        self.sites = {p.node.name: p for p in alone if not _excluded(p, opened.settings.exclude)}
        self.free = tuple(self.sites)
        kept = {
            "layers share their weight with others": len(places) - len(alone),
            "layers are excluded": len(alone) - len(self.free),
        }
        self.notes = tuple(
            f"{count} {why} and keep all connections" for why, count in kept.items() if count
        )
        editor = Editor(model.proto)
        self.original = State(
            {name: matrix(p, model.constants[p.weight]) for name, p in self.sites.items()},
            {name: editor.whole_bias(p) for name, p in self.sites.items()},
        )
        self.total = sum(self.size(name) for name in self.free)
        self.targets: Mapping[str, Target] | None = None
        self._feeds = feeds_within_memory(
            model, opened.samples, opened.batch, opened.settings.activation_memory_limit
        )[0]
        self._types = element_types(model.proto, model.dtypes)

    def size(self, name: str) -> int:
        """Connections of a layer: all its weights, and the biases it has."""
        return self.original.weights[name].size + _present(self.original.biases[name])

    def thin(self, share: float | None) -> Thinned:
        """All rounds: at the asked alpha, or down to a share of connections, the same factor every round."""
        settings = self.opened.settings
        state, proto = self.original, self.opened.model.proto
        rounds: list[Round] = []
        fits: tuple[Fit, ...] = ()
        ridges: Mapping[str, float] = {}  # found in the first round, good enough until the last
        for i in range(1, settings.iterations + 1):
            view = _view(self.opened.model, self.sites, state, proto)
            scores, select = self._scored(view, share)
            if share is None:
                alpha = settings.alpha or score.ALPHA
                selection = select(alpha)
            else:
                alpha, selection = self._reach(
                    select, share ** (i / settings.iterations) * self.total, state
                )
            state = _masked(state, selection, settings.refit)
            if settings.refit == "none":
                proto = realise(self.opened.model, self.sites, state, selection.muted)
            else:
                state, proto, fits = self._refit(
                    state, selection, {} if i == settings.iterations else ridges
                )
                ridges = {fit.node: fit.ridge for fit in fits if fit.ridge is not None}
            rounds.append(Round(alpha, _count(state)))
            if self.progress:
                self.progress("round", i, settings.iterations)
        if share is not None and _count(state) > share * self.total:
            raise BudgetNotMet(
                f"`params={share:g}` cannot be met: {_count(state) / self.total:.4f} of the connections are left "
                "at the least; ask for more, or for more `iterations`."
            )
        notes = self.notes
        if selection.uncut:
            notes = (
                *notes,
                f"{selection.uncut} shortcut channels carry too little but have no weights to prune",
            )
        return Thinned(state, proto, scores, selection, tuple(rounds), fits, notes)

    def _scored(
        self, view: Model, share: float | None
    ) -> tuple[Scores, Callable[[float], Selection]]:
        opened, settings = self.opened, self.opened.settings
        # Every round scores other weights: what was collected before says nothing about them.
        now = replace(opened, model=view, collected=Collected())
        heard = collect(now, {ABSOLUTE_ACTIVATIONS})[ABSOLUTE_ACTIVATIONS]
        layers = tuple(
            replace(layer, prunable=layer.prunable and layer.place.node.name in self.sites)
            for layer in score.layers(view, opened.coupling, heard)
        )
        values, worth = score.worth(view, opened.coupling, heard, layers)
        everywhere = worth if share is not None and settings.allocate != "uniform" else None
        return Scores("nnrelief", values), score.rule(
            view, opened.coupling, heard, layers, everywhere
        )

    def _reach(
        self, select: Callable[[float], Selection], limit: float, state: State
    ) -> tuple[float, Selection]:
        """The largest alpha that leaves at most ``limit`` connections; the smallest alpha where none does."""

        def size(selection: Selection) -> int:
            taps = {n: self.original.weights[n].shape[3] for n in self.free}
            weights: int = sum(int(selection.masks[n].weights.sum()) * taps[n] for n in self.free)
            opened = self.opened
            refitted = opened.settings.refit != "none"
            biases = 0
            for name, place in self.sites.items():
                if state.biases[name] is not None:
                    live = _live(
                        selection, place, state.weights[name], opened.model, opened.coupling
                    )
                    biases += int((live if refitted else selection.masks[name].bias).sum())
            return weights + biases

        low, high = 0.0, 1.0
        best = select(1e-9)
        if size(whole := select(1.0)) <= limit:
            return 1.0, whole
        for _ in range(SHARE_STEPS):
            alpha = (low + high) / 2
            found = select(alpha)
            if size(found) <= limit:
                low, best = alpha, found
            else:
                high = alpha
        return low, best

    def _refit(
        self, state: State, selection: Selection, ridges: Mapping[str, float]
    ) -> tuple[State, onnx.ModelProto, tuple[Fit, ...]]:
        """Every layer fitted to what the original gave, front to back, on what now reaches it."""
        opened, settings = self.opened, self.opened.settings
        model = opened.model
        places = list(self.sites.values())
        if self.targets is None:
            rng = np.random.default_rng(settings.seed)
            self.targets = collect_targets(
                model,
                places,
                self._feeds,
                types=self._types,
                device=opened.device,
                rng=rng,
                cap=GRAM_CAP,
            )
        proto = realise(model, self.sites, replace(state, biases=self.original.biases), {})
        editor = Editor(proto)
        frontier = Frontier(proto, self._feeds, self._types, opened.device)
        weights, biases, fits = dict(state.weights), dict(state.biases), []
        for i, (name, place) in enumerate(self.sites.items()):
            own, first = biases[name], self.original.biases[name]
            if own is None or first is None:
                continue
            live = _live(selection, place, weights[name], model, opened.coupling)
            x, y = _rows(place, frontier, self.targets[name], editor, first)
            weight, bias, fit = fitted(
                place,
                weights[name],
                own,
                x,
                y,
                selection.masks[name].weights,
                live,
                settings.refit == "least-squares" and not self.targets[name].inputs,
                (ridges[name],) if name in ridges else RIDGES,
            )
            weights[name], biases[name] = weight, bias
            like = model.constants[place.weight]
            editor.replace(editor.nodes[name], place.weight_slot, unmatrix(place, weight, like))
            if (bias != first).any():
                editor.add_bias(place, bias - first)
            fits += [fit] if fit else []
            if self.progress:
                self.progress("refit", i + 1, len(places))
        return State(weights, biases), proto, tuple(fits)


def _excluded(place: Site, patterns: Sequence[str]) -> bool:
    """Whether a pattern of ``--exclude`` names the node or its weight."""
    return any(
        fnmatchcase(name, pattern)
        for pattern in patterns
        for name in (place.node.name, place.weight)
    )


def _live(
    selection: Selection, place: Site, weight: Floats, model: Model, coupling: Coupling
) -> Bools:
    """Outputs (outputs,) that something still reads."""
    out = place.node.outputs[0]
    key = (out, place.output_axis % len(model.shapes[out]))
    if key not in coupling.axes:
        return np.ones(weight.shape[0] * weight.shape[1], bool)
    return coupling.keep(key, selection.units)


def _rows(
    place: Site, frontier: Frontier, target: Target, editor: Editor, first: Floats
) -> tuple[Floats, Floats]:
    """What the layer now reads (groups, rows, inputs * taps), and what it should give (groups, rows, outputs).

    That is what the original gave, with the bias that is added right behind it; at the end of a residual branch it is
    also to make up for the other branch.
    """
    inputs = frontier.reach([place.data])[place.data]
    found = [
        data_rows(place, v, r, s)
        for v, r, s in zip(inputs, target.rows, target.shapes, strict=True)
    ]
    x = np.concatenate(found).transpose(1, 0, 2)
    y = np.concatenate(target.values).astype(np.float64)
    inside = editor.bias(place)
    y += first - (inside if inside is not None else 0.0)
    if target.join is not None:
        now = frontier.reach([target.join.other])[target.join.other]
        there = [output_rows(place, t, r) for t, r in zip(now, target.rows, strict=True)]
        y += target.join.correction(
            np.concatenate(target.joined) - np.concatenate(there), np.ones(y.shape[1], bool)
        )
    return x, y.reshape(len(y), place.groups, -1).transpose(1, 0, 2)


def fitted(
    place: Site,
    weight: Floats,
    bias: Floats,
    x: Floats,
    y: Floats,
    mask: Bools,
    live: Bools,
    weights_too: bool,
    ridges: Sequence[float] = RIDGES,
) -> tuple[Floats, Floats, Fit | None]:
    """(weight, bias, how it went): ``weight`` refitted where ``mask`` (groups, outputs, inputs) has a connection.

    Outputs that are not ``live`` have no bias and no say. ``ridges`` are the strengths to choose from.
    """
    groups, outs, ins, taps = weight.shape
    flat = (place.factor * weight).reshape(groups, outs, ins * taps)
    alive = live.reshape(groups, 1, outs)
    residual = np.where(alive, y - x @ flat.transpose(0, 2, 1) - bias.reshape(groups, 1, outs), 0.0)
    rows = x.shape[1]
    if rows < 2:
        return weight, np.where(live, bias, 0.0), None
    split = min(int(np.ceil((1 - HELD_OUT) * rows)), rows - 1)
    support = np.repeat(mask, taps, axis=2) & alive.transpose(0, 2, 1)
    solve = supported(x, residual, split, support) if weights_too and support.any() else None
    change, shift, ridge, errors = choose_ridge(x, residual, split, solve, ridges)
    scale = float(np.where(alive[:, 0], y.var(axis=1), 0.0).sum()) or 1.0
    form = "least squares" if weights_too else "bias"
    fit = Fit(
        place.node.name, form, rows, int(support.sum()), ridge, errors[0] / scale, errors[1] / scale
    )
    bias = np.where(live, bias, 0.0)
    if errors[1] < errors[0] and errors[0] > ROUNDING * scale:  # else nothing was lost
        if change is not None:
            weight = weight + change.transpose(0, 2, 1).reshape(weight.shape) / place.factor
        bias = bias + np.where(live, shift.reshape(-1), 0.0)
    return weight, bias, fit


def held(state: State, name: str) -> int:
    """Weights and biases of a layer that are not zero."""
    return int(np.count_nonzero(state.weights[name])) + _present(state.biases[name])


def _count(state: State) -> int:
    return sum(held(state, name) for name in state.weights)


def _present(bias: Floats | None) -> int:
    return 0 if bias is None else int(np.count_nonzero(bias))


def _masked(state: State, selection: Selection, refit: str) -> State:
    """The state without what the selection drops; biases only where nothing refits them."""
    weights = {
        n: np.where(selection.masks[n].weights[..., None], w, 0.0) for n, w in state.weights.items()
    }
    biases = dict(state.biases)
    if refit == "none":
        biases = {
            n: None if b is None else np.where(selection.masks[n].bias.reshape(-1), b, 0.0)
            for n, b in biases.items()
        }
    return State(weights, biases)


def realise(
    model: Model, sites: Mapping[str, Site], state: State, muted: Mapping[str, Bools]
) -> onnx.ModelProto:
    """The original graph with the weights and biases of ``state``; normalisation behind ``muted`` rows says nothing."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    editor = Editor(proto)
    for name, place in sites.items():
        like = model.constants[place.weight]
        value = unmatrix(place, state.weights[name], like)
        if not np.array_equal(value, like):
            editor.replace(editor.nodes[name], place.weight_slot, value)
        new, old = state.biases[name], editor.whole_bias(place)
        if new is not None and old is not None and (new != old).any():
            editor.add_bias(place, new - old)
    for name, rows in muted.items():
        for join in model.nodes:
            _silence(model, editor, join.inputs if has(join, Trait.SUM) else (), name, rows)
    return proto


def _silence(model: Model, editor: Editor, inputs: Sequence[str], name: str, rows: Bools) -> None:
    """Zero scale and shift of every normalisation between the layer and the branch's end, at ``rows``."""
    for tensor in inputs:
        found = absolute_signal.trail(model, tensor)
        if found is None or found[0].node.name != name:
            continue
        for node in found[1]:
            slots = BATCH_AFFINE_SLOTS if has(node, Trait.BATCH_NORM) else ()
            for slot in slots:
                value = model.constants[node.inputs[slot]]
                editor.replace(
                    editor.nodes[node.name], slot, np.where(rows, np.zeros((), value.dtype), value)
                )


def _view(model: Model, sites: Mapping[str, Site], state: State, proto: onnx.ModelProto) -> Model:
    """The model as it is now: graph and weights of the last round under the names of the original."""
    changed = {
        p.weight: unmatrix(p, state.weights[n], model.constants[p.weight]) for n, p in sites.items()
    }
    return replace(model, proto=proto, constants={**model.constants, **changed})
