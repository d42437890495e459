"""Shares of connections in the absolute signal that enters a unit.

With inputs x, weights w and bias b of a unit j,

    dense         r_ij = E |w_ij x_i|                      S_j = sum_i r_ij + |b_j|
    convolution   r_ij = E || |K_ij| * |x_i| ||_F          S_j = sum_i r_ij + |b_j| sqrt(positions)

and the share of a connection (of a whole kernel K_ij, in a convolution) is s_ij = r_ij / S_j.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from onnx_oamip.core.records import (
    Axis,
    Bools,
    Coupling,
    Floats,
    Ints,
    Model,
)
from onnx_oamip.graph.linear_layers import Editor, matrix
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.published.nnrelief.branches import data_axis, is_depthwise, linear_nodes
from onnx_oamip.published.nnrelief.requests import Signal


@dataclass(frozen=True)
class Layer:
    """One linear node with the signal of its connections.

    Attributes:
        site: The linear node.
        shares: Shares of the weights (groups, outputs, inputs).
        bias: Shares of the biases (groups, outputs).
        inputs: Units of its input channels (groups, inputs), -1 where pinned.
        outputs: Units of its output channels (groups, outputs), -1 where pinned.
        prunable: False if other nodes use its weight too.
    """

    site: Site
    shares: Floats
    bias: Floats
    inputs: Ints
    outputs: Ints
    prunable: bool = True

    @property
    def name(self) -> str:
        """Name of the node."""
        return self.site.node.name

    @property
    def tied(self) -> Bools:
        """Connections (groups, outputs, inputs) from a unit to itself, as grouped convolutions have them."""
        same = self.inputs[:, None, :] == self.outputs[:, :, None]
        return np.asarray(same & (self.inputs[:, None, :] >= 0))


def layers(
    model: Model,
    coupling: Coupling,
    signal: Signal,
) -> tuple[Layer, ...]:
    """List the linear nodes with a constant weight and more than one input per filter.

    Args:
        model: The model.
        coupling: Its units.
        signal: Absolute signal of its channels.

    Returns:
        The layers, in graph order.
    """
    editor = Editor(model.proto)
    uses = tensor_uses(model)
    result = []
    for site in linear_nodes(model):
        if is_depthwise(model, site):
            continue
        reached, own = contributions(model, site, signal, editor.whole_bias(site))
        weights, bias = shares(reached, own)
        groups, outs, ins = weights.shape
        output = site.node.outputs[0]
        output_axis = (output, site.output_axis % len(model.shapes[output]))
        layer = Layer(
            site=site,
            shares=weights,
            bias=bias,
            inputs=_units(coupling, data_axis(model, site), (groups, ins)),
            outputs=_units(coupling, output_axis, (groups, outs)),
            prunable=uses[site.weight] == 1,
        )
        result.append(layer)
    return tuple(result)


def tensor_uses(model: Model) -> Counter[str]:
    """Count the nodes that read each tensor, those inside bodies by the node that contains the body.

    Args:
        model: The model.

    Returns:
        Number of uses by tensor.
    """
    return Counter(name for node in model.nodes for name in (*node.inputs, *node.captures))


def contributions(
    model: Model,
    site: Site,
    signal: Signal,
    bias: Floats | None,
) -> tuple[Floats, Floats]:
    """Compute the absolute signal of every connection of a layer.

    Args:
        model: The model.
        site: The layer.
        signal: Absolute signal of the channels.
        bias: Its biases (outputs,); None if they are not constant.

    Returns:
        r of the weights (groups, outputs, inputs), and the signal of the biases (groups, outputs).
    """
    weight = np.abs(site.factor * matrix(site, model.constants[site.weight]))
    groups, outs, ins, _ = weight.shape
    positions, spread = 1, 1.0
    if site.spatial:
        positions = int(np.prod(model.shapes[site.node.outputs[0]][2:]))
        if site.rules.scatters:
            # The taps of a transposed convolution are divided among the positions between two input pixels.
            spread = int(np.prod(model.shapes[site.data][2:])) / positions
    scale = float(np.sqrt(positions))
    if site.node.name in signal.kernels:
        reached = signal.kernels[site.node.name]
    else:
        mean = signal.means[data_axis(model, site)].reshape(groups, 1, ins)
        reached = weight.sum(axis=3) * mean * (scale * spread)
    own = np.zeros(groups * outs)
    if bias is not None:
        # An infinite bias rules a class out: it is no signal.
        own = np.where(np.isfinite(bias), np.abs(bias), 0.0) * scale
    return reached, own.reshape(groups, outs)


def shares(reached: Floats, bias: Floats) -> tuple[Floats, Floats]:
    """Divide the signal of connections by the signal that enters their unit.

    Args:
        reached: Signal of the weights (..., inputs).
        bias: Signal of the biases (...).

    Returns:
        Shares of the weights and of the biases. They sum to 1 over a unit, or are all 0 if no signal reaches it.
    """
    whole = reached.sum(axis=-1) + bias
    whole = np.where(whole > 0, whole, 1.0)
    return reached / whole[..., None], bias / whole


def _units(coupling: Coupling, axis: Axis, shape: tuple[int, int]) -> Ints:
    pinned = np.full(shape[0] * shape[1], -1, np.int64)
    return coupling.axes.get(axis, pinned).reshape(shape)
