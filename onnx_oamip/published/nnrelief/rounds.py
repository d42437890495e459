"""Rounds of scoring, pruning and refitting single connections.

The network keeps its shape: pruned connections are zero. Rounds stand in for the rounds of scoring, pruning and
retraining of NNrelief: every round scores the network after the last one, and the refit brings the outputs of each
layer as near as least squares can to those of the original layer, front to back. A pruned connection is never restored.

Where a branch of a residual sum is cut and nothing is refitted, the normalisation behind it is silenced too, as in the
paper; with a refit the bias takes the mean output of the branch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnx_oamip.core.errors import BudgetNotMet
from onnx_oamip.core.records import (
    Bools,
    Coupling,
    Fit,
    Model,
    Round,
    Scores,
)
from onnx_oamip.data.feeds import feeds_within_memory
from onnx_oamip.graph.coupling import matches, weight_names
from onnx_oamip.graph.linear_layers import Editor, unmatrix
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.partial_execution import Frontier, element_types
from onnx_oamip.published.nnrelief.branches import is_depthwise, linear_nodes
from onnx_oamip.published.nnrelief.connection_shares import layers, tensor_uses
from onnx_oamip.published.nnrelief.layer_refit import Connected, collect_rows, refit
from onnx_oamip.published.nnrelief.requests import ABSOLUTE_ACTIVATIONS
from onnx_oamip.published.nnrelief.selection import Rules, Selection
from onnx_oamip.published.nnrelief.state import State, realise, view
from onnx_oamip.published.nnrelief.unit_worth import worth
from onnx_oamip.repair.ridge import RIDGES
from onnx_oamip.repair.row_sampling import GRAM_CAP, is_wide
from onnx_oamip.repair.targets import Target, collect_targets
from onnx_oamip.statistics.collector import collect
from onnx_oamip.statistics.context import Collected, Context

ALPHA = 0.95
"""Share of the absolute signal that is kept by default, for convolutions and dense layers alike."""
SHARE_STEPS = 40
"""Halvings of alpha in the search for a share of connections."""
LEAST_ALPHA = 1e-9
"""Keeps the largest connection of every unit only."""


@dataclass(frozen=True)
class Thinned:
    """The network after all rounds.

    Attributes:
        state: Its weights and biases.
        proto: Its graph.
        scores: Scores of the units in the last round.
        selection: Selection of the last round.
        rounds: One record per round.
        fits: Refits of the last round.
        notes: Remarks for the report.
    """

    state: State
    proto: onnx.ModelProto
    scores: Scores
    selection: Selection
    rounds: tuple[Round, ...]
    fits: tuple[Fit, ...]
    notes: tuple[str, ...]


class ConnectionPruner:
    """Prunes the connections of one model, to any share of them.

    Attributes:
        context: The original model and its calibration samples.
        sites: Layers whose connections can be pruned, by name.
        original: Their weights and biases.
        total: Number of their connections.
    """

    def __init__(self, context: Context) -> None:
        """Find the layers whose connections can be pruned.

        Args:
            context: The original model and its calibration samples.
        """
        self.context = context
        model = context.model
        settings = context.settings
        uses = tensor_uses(model)
        every = [site for site in linear_nodes(model) if not is_depthwise(model, site)]
        unshared = [site for site in every if uses[site.weight] == 1]
        own = {
            site.node.name: (site.node.name, *weight_names(model, site.weight)) for site in every
        }
        names = set().union(*own.values())
        self.sites = {
            site.node.name: site
            for site in unshared
            if not _is_excluded(own[site.node.name], settings.exclude, names)
        }
        left_alone = {
            "layers share their weight with others": len(every) - len(unshared),
            "layers are excluded": len(unshared) - len(self.sites),
        }
        self._notes = tuple(
            f"{count} {reason} and keep all connections"
            for reason, count in left_alone.items()
            if count
        )
        self.original = State.of(model, self.sites)
        self.total = sum(self.size(name) for name in self.sites)
        # Outputs of the original layers: collected in the first refit, and valid for all rounds and shares.
        self._targets: Mapping[str, Target] | None = None
        self._feeds, _ = feeds_within_memory(
            model,
            context.samples,
            context.batch,
            settings.activation_memory_limit,
        )
        self._types = element_types(model.proto, model.dtypes)

    def size(self, name: str) -> int:
        """Count the connections of an original layer: all weights, and the biases that are not zero.

        Args:
            name: Name of the node.

        Returns:
            Number of connections.
        """
        return self.original.weights[name].size + self.original.biases_of(name)

    def prune(self, share: float | None) -> Thinned:
        """Run all rounds, at the requested alpha or down to a share of connections by equal factors.

        Args:
            share: Share of connections to keep; None to prune by alpha.

        Returns:
            The pruned network.

        Raises:
            BudgetNotMet: More connections than the share are left.
        """
        model = self.context.model
        settings = self.context.settings
        iterations = settings.iterations
        refits = settings.refit != "none"
        state = self.original
        proto = model.proto
        rounds: list[Round] = []
        fits: tuple[Fit, ...] = ()
        # Ridges of the first round are good enough until the last.
        ridges: Mapping[str, float] = {}
        for i in range(1, iterations + 1):
            scores, rules = self._score(view(model, self.sites, state, proto), share)
            if share is None:
                alpha = settings.alpha or ALPHA
                selection = rules.select(alpha)
            else:
                limit = share ** (i / iterations) * self.total
                alpha, selection = self._largest_alpha(rules, limit, state)
            state = state.masked(selection, biases=not refits)
            if refits:
                known = {} if i == iterations else ridges
                state, proto, fits = self._refit(state, selection, known)
                ridges = {fit.node: fit.ridge for fit in fits if fit.ridge is not None}
            else:
                proto = realise(model, self.sites, state, muted=selection.muted)
            rounds.append(Round(alpha, state.connections))
            if self.context.progress:
                self.context.progress("round", i, iterations)

        if share is not None and state.connections > share * self.total:
            raise BudgetNotMet(
                f"`params={share:g}` cannot be met: {state.connections / self.total:.4f} of the connections are left "
                "at the least; ask for more, or for more `iterations`."
            )
        notes = self._notes
        if selection.uncut:
            note = (
                f"{selection.uncut} shortcut channels carry too little but have no weights to prune"
            )
            notes = (*notes, note)
        return Thinned(state, proto, scores, selection, tuple(rounds), fits, notes)

    def _score(self, model: Model, share: float | None) -> tuple[Scores, Rules]:
        """Scores of the units of the present network, and the rules for its connections."""
        coupling = self.context.coupling
        # Every round has other weights: statistics of the round before are not valid.
        present = replace(self.context, model=model, collected=Collected())
        signal = collect(present, {ABSOLUTE_ACTIVATIONS})[ABSOLUTE_ACTIVATIONS]
        every = tuple(
            replace(layer, prunable=layer.prunable and layer.name in self.sites)
            for layer in layers(model, coupling, signal)
        )
        values, output_worth = worth(model, coupling, signal, every)
        together = share is not None and self.context.settings.allocate != "uniform"
        rules = Rules(model, coupling, signal, every, worth=output_worth if together else None)
        return Scores("nnrelief", values), rules

    def _largest_alpha(
        self,
        rules: Rules,
        limit: float,
        state: State,
    ) -> tuple[float, Selection]:
        """The largest alpha that leaves at most ``limit`` connections; the smallest alpha if none does."""
        everything = rules.select(1.0)
        if self._size_after(everything, state) <= limit:
            return 1.0, everything
        low, high = 0.0, 1.0
        best = rules.select(LEAST_ALPHA)
        for _ in range(SHARE_STEPS):
            alpha = (low + high) / 2
            selection = rules.select(alpha)
            if self._size_after(selection, state) <= limit:
                low = alpha
                best = selection
            else:
                high = alpha
        return low, best

    def _size_after(self, selection: Selection, state: State) -> int:
        """Number of connections after the refit of a selection, which gives every live output a bias."""
        model = self.context.model
        coupling = self.context.coupling
        refits = self.context.settings.refit != "none"
        total = 0
        for name, site in self.sites.items():
            mask = selection.masks[name]
            taps = state.weights[name].shape[3]
            total += int(mask.weights.sum()) * taps
            if state.biases[name] is not None:
                if refits:
                    biases = _live(selection, site, model, coupling)
                else:
                    biases = mask.bias
                total += int(biases.sum())
        return total

    def _refit(
        self,
        state: State,
        selection: Selection,
        ridges: Mapping[str, float],
    ) -> tuple[State, onnx.ModelProto, tuple[Fit, ...]]:
        """Fit every layer to the outputs of the original, front to back, on its inputs in the pruned network."""
        context = self.context
        model = self.context.model
        targets = self._original_outputs()
        unfitted = replace(state, biases=self.original.biases)
        proto = realise(model, self.sites, unfitted, muted={})
        editor = Editor(proto)
        frontier = Frontier(proto, self._feeds, self._types, context.device)
        weights = dict(state.weights)
        biases = dict(state.biases)
        fits = []
        for i, (name, site) in enumerate(self.sites.items()):
            bias = biases[name]
            original_bias = self.original.biases[name]
            if bias is None or original_bias is None:
                continue
            layer = Connected(
                site=site,
                weight=weights[name],
                bias=bias,
                mask=selection.masks[name].weights,
                live=_live(selection, site, model, context.coupling),
            )
            rows = collect_rows(
                site,
                frontier,
                target=targets[name],
                editor=editor,
                original_bias=original_bias,
            )
            # Weights behind a mask are solved by a Gram matrix, so that only the bias of a wide layer is fitted.
            too_wide = is_wide(site, model.constants[site.weight])
            bias_only = context.settings.refit != "least-squares" or too_wide
            candidates = (ridges[name],) if name in ridges else RIDGES
            weight, bias, fit = refit(layer, rows, bias_only=bias_only, ridges=candidates)
            weights[name], biases[name] = weight, bias
            value = unmatrix(site, weight, model.constants[site.weight])
            editor.replace(editor.nodes[name], site.weight_slot, value)
            if (bias != original_bias).any():
                editor.add_bias(site, bias - original_bias)
            if fit is not None:
                fits.append(fit)
            if context.progress:
                context.progress("refit", i + 1, len(self.sites))
        return State(weights, biases), proto, tuple(fits)

    def _original_outputs(self) -> Mapping[str, Target]:
        if self._targets is None:
            self._targets = collect_targets(
                self.context.model,
                list(self.sites.values()),
                self._feeds,
                types=self._types,
                device=self.context.device,
                rng=np.random.default_rng(self.context.settings.seed),
                cap=GRAM_CAP,
            )
        return self._targets


def _is_excluded(
    own: Sequence[str],
    patterns: Sequence[str],
    names: Collection[str],
) -> bool:
    """True if a pattern of ``exclude`` matches a name of the node or of its weight, out of those of all of them."""
    return any(matches(name, pattern, names) for pattern in patterns for name in own)


def _live(
    selection: Selection,
    site: Site,
    model: Model,
    coupling: Coupling,
) -> Bools:
    """Outputs (outputs,) of kept units."""
    output = site.node.outputs[0]
    axis = (output, site.output_axis % len(model.shapes[output]))
    if axis not in coupling.axes:
        return np.ones(model.shapes[output][axis[1]], bool)
    return coupling.keep(axis, selection.units)
