"""Weights and biases of the layers whose connections are pruned, and the graphs that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnx_oamip.core.records import Bools, Floats, Model
from onnx_oamip.graph.linear_layers import Editor, matrix, unmatrix
from onnx_oamip.graph.ops import Trait, has
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.ops.norm import BATCH_AFFINE_SLOTS
from onnx_oamip.published.nnrelief.branches import branch
from onnx_oamip.published.nnrelief.selection import Selection

Sites = Mapping[str, Site]
"""Linear nodes by name."""


@dataclass(frozen=True)
class State:
    """Weights and biases of layers.

    Attributes:
        weights: By node (groups, outputs, inputs, taps).
        biases: By node (outputs,), with a constant that is added behind the node; None if the bias is not constant.
    """

    weights: Mapping[str, Floats]
    biases: Mapping[str, Floats | None]

    @classmethod
    def of(cls, model: Model, sites: Sites) -> State:
        """Read the state of a model.

        Args:
            model: The model.
            sites: Its layers.

        Returns:
            Weights and biases of the layers.
        """
        editor = Editor(model.proto)
        weights = {name: matrix(site, model.constants[site.weight]) for name, site in sites.items()}
        biases = {name: editor.whole_bias(site) for name, site in sites.items()}
        return cls(weights, biases)

    def biases_of(self, name: str) -> int:
        """Count the biases of a layer that are not zero.

        Args:
            name: Name of the node.

        Returns:
            Number of biases.
        """
        bias = self.biases[name]
        if bias is None:
            return 0
        return int(np.count_nonzero(bias))

    def connections_of(self, name: str) -> int:
        """Count the connections of a layer: its weights and biases that are not zero.

        Args:
            name: Name of the node.

        Returns:
            Number of connections.
        """
        return int(np.count_nonzero(self.weights[name])) + self.biases_of(name)

    @property
    def connections(self) -> int:
        """Number of connections of all layers."""
        return sum(self.connections_of(name) for name in self.weights)

    def masked(self, selection: Selection, *, biases: bool) -> State:
        """Set the connections that a selection drops to zero.

        Args:
            selection: The selection.
            biases: Also drop biases. A refit finds them anew.

        Returns:
            The new state.
        """
        weights = {}
        for name, weight in self.weights.items():
            kept = selection.masks[name].weights[..., None]
            weights[name] = np.where(kept, weight, 0.0)
        if not biases:
            return State(weights, self.biases)
        kept_biases: dict[str, Floats | None] = {}
        for name, bias in self.biases.items():
            kept = selection.masks[name].bias.reshape(-1)
            kept_biases[name] = None if bias is None else np.where(kept, bias, 0.0)
        return State(weights, kept_biases)


def realise(
    model: Model,
    sites: Sites,
    state: State,
    *,
    muted: Mapping[str, Bools],
) -> onnx.ModelProto:
    """Write a state into the original graph.

    Args:
        model: The original model.
        sites: Its layers.
        state: Weights and biases of the layers.
        muted: Outputs by node behind which normalisations get a scale and a shift of zero.

    Returns:
        The graph.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    editor = Editor(proto)
    for name, site in sites.items():
        original = model.constants[site.weight]
        value = unmatrix(site, state.weights[name], original)
        if not np.array_equal(value, original):
            editor.replace(editor.nodes[name], site.weight_slot, value)
        new = state.biases[name]
        old = editor.whole_bias(site)
        if new is not None and old is not None and (new != old).any():
            editor.add_bias(site, new - old)
    sums = [node for node in model.nodes if has(node, Trait.SUM)]
    for name, outputs in muted.items():
        for node in sums:
            _silence(model, editor, node.inputs, name=name, outputs=outputs)
    return proto


def view(
    model: Model,
    sites: Sites,
    state: State,
    proto: onnx.ModelProto,
) -> Model:
    """Make a model of the graph and the weights of the last round, under the names of the original.

    Args:
        model: The original model.
        sites: Its layers.
        state: Weights of the layers.
        proto: The graph.

    Returns:
        The model.
    """
    changed = {}
    for name, site in sites.items():
        original = model.constants[site.weight]
        changed[site.weight] = unmatrix(site, state.weights[name], original)
    return replace(model, proto=proto, constants={**model.constants, **changed})


def _silence(
    model: Model,
    editor: Editor,
    ends: Sequence[str],
    *,
    name: str,
    outputs: Bools,
) -> None:
    """Zero the scale and shift of every normalisation between a layer and the end of its branch, at ``outputs``."""
    for tensor in ends:
        found = branch(model, tensor)
        if found is None or found.layer.node.name != name:
            continue
        for node in found.between:
            if not has(node, Trait.BATCH_NORM):
                continue
            for slot in BATCH_AFFINE_SLOTS:
                value = model.constants[node.inputs[slot]]
                silent = np.where(outputs, np.zeros((), value.dtype), value)
                editor.replace(editor.nodes[node.name], slot, silent)
