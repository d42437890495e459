"""Worth of units: their share of the signal that later layers receive, up to the outputs of the network.

``O_i = sum over consumers and their outputs j of pi_j s_ij``: pi is the worth of an output to the layers behind it, 1
over the number of classes at the end, and divided at a residual sum as its branches share its signal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from onnx_oamip.core.records import (
    Consumer,
    Coupling,
    Floats,
    Ints,
    Model,
    Node,
)
from onnx_oamip.published.nnrelief.branches import branch_layer, joins
from onnx_oamip.published.nnrelief.connection_shares import Layer
from onnx_oamip.published.nnrelief.requests import Signal


def worth(
    model: Model,
    coupling: Coupling,
    signal: Signal,
    layers: Sequence[Layer],
) -> tuple[Floats, dict[str, Floats]]:
    """Compute the worth of every unit and of every output of a layer.

    Args:
        model: The model.
        coupling: Its units and consumers.
        signal: Absolute signal of its channels.
        layers: Its layers.

    Returns:
        O (n_units,), and pi (groups, outputs) by node.
    """
    walk = _Walk(model, coupling, signal, layers)
    # In reverse, so that the worth of an output is known before the layer that computes it.
    for node in reversed(model.nodes):
        walk.visit(node)
    return walk.total, walk.output_worth


class _Walk:
    """Walk through the nodes of a model from its outputs to its inputs.

    Attributes:
        total: Worth of units (n_units,).
        output_worth: Worth of the outputs of layers (groups, outputs), by node.
    """

    def __init__(
        self,
        model: Model,
        coupling: Coupling,
        signal: Signal,
        layers: Sequence[Layer],
    ) -> None:
        self.total = np.zeros(coupling.n_units)
        self.output_worth: dict[str, Floats] = {}
        self._model, self._coupling, self._signal = model, coupling, signal
        self._layers = {layer.name: layer for layer in layers}
        self._consumers: dict[str, list[Consumer]] = defaultdict(list)
        for consumer in coupling.consumers:
            self._consumers[consumer.node].append(consumer)
        self._branches = {
            join.node: [branch_layer(model, tensor) for tensor in join.inputs]
            for join in joins(model, coupling)
        }
        # Worth of units in front of the present node; that of a branch that is cut off is taken out of it.
        self._current = np.zeros(coupling.n_units)
        self._branch_worth: dict[str, Floats] = {}

    def visit(self, node: Node) -> None:
        """Pass the worth of a node's outputs on to its inputs.

        Args:
            node: The node.
        """
        if node.name in self._branches and node.name in self._signal.joins:
            self._divide(node)
        elif node.name in self._layers:
            self._pass_through(self._layers[node.name])
        else:
            for consumer in self._consumers.get(node.name, ()):
                self._pass_by_signal(consumer)

    def _divide(self, node: Node) -> None:
        """Divide the worth of a residual sum between its branches."""
        axis, norms = self._signal.joins[node.name]
        labels = self._coupling.axes[node.outputs[0], axis]
        free = labels >= 0
        worth = np.where(free, self._current[labels], 1 / len(labels))
        total = norms.sum(axis=0)
        shares = norms / np.where(total > 0, total, 1.0)
        shortcut = np.zeros(len(labels))
        for share, layer in zip(shares, self._branches[node.name], strict=True):
            if layer is not None and layer.node.name in self._layers:
                self._branch_worth[layer.node.name] = worth * share
            else:
                shortcut += share
        self._current[labels[free]] *= shortcut[free]

    def _pass_through(self, layer: Layer) -> None:
        pinned = 1 / layer.outputs.size
        of_units = self._current[layer.outputs] if len(self._current) else 0.0
        value = np.where(layer.outputs >= 0, of_units, pinned)
        if layer.name in self._branch_worth:
            value = self._branch_worth[layer.name].reshape(value.shape)
        self.output_worth[layer.name] = value
        # The signal from a unit to itself does not make it worth more.
        shares = np.where(layer.tied, 0.0, layer.shares)
        self._add(layer.inputs, np.einsum("go,goi->gi", value, shares))

    def _pass_by_signal(self, consumer: Consumer) -> None:
        axis = (consumer.data, consumer.axis)
        reached = self._signal.means[axis] * self._mean_weight(consumer)
        whole = float(reached.sum())
        if whole > 0:
            self._add(self._coupling.axes[axis], reached / whole)

    def _mean_weight(self, consumer: Consumer) -> Floats:
        """Mean absolute weight of each channel (C,) of a consumer without a plain weight matrix."""
        channels = self._model.shapes[consumer.data][consumer.axis]
        if consumer.weight is None:
            return np.ones(channels)
        axis = consumer.weight_axis
        if consumer.weight not in self._model.constants:
            return self._signal.means[consumer.weight, axis]
        weight = np.abs(self._model.constants[consumer.weight].astype(np.float64))
        mean = weight.mean(axis=tuple(a for a in range(weight.ndim) if a != axis))
        return mean if len(mean) == channels else np.ones(channels)

    def _add(self, labels: Ints, values: Floats) -> None:
        free = labels >= 0
        part = np.bincount(labels[free], values[free], minlength=self._coupling.n_units)
        self.total += part
        self._current += part
