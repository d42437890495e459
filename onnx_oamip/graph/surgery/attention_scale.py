"""The scale of attention logits, in step with the size of a head.

Attention divides the products of queries and keys by the root of the head's size d. A cut to e channels a head leaves
that number alone: the logits lose terms and nothing else. But what fuses attention into one operator (ONNX Runtime's
transformer optimiser) takes the number for the root of the size that it sees. So it becomes the root of e, and the
queries' layer is multiplied by the root of e / d: the same logits, now in the usual form.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_oamip.core.records import (
    Array,
    Bools,
    Coupling,
    Model,
    Node,
)
from onnx_oamip.graph import chains
from onnx_oamip.graph.ops import Trait, attention, has


def usual(
    model: Model, coupling: Coupling, units: Bools, proto: onnx.ModelProto
) -> onnx.ModelProto:
    """A cut model whose attention scales fit its heads; the model itself where there are none to change."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = _Graph(result)
    before = {node.name: node for node in model.nodes}
    done = False
    for consumer in coupling.consumers:
        node = before[consumer.node]
        if (
            node.op not in attention.PRODUCTS
            or consumer.slot != 0
            or consumer.weight in model.constants
            or consumer.weight is None
        ):
            continue
        size = model.shapes[consumer.data][consumer.axis]
        kept = int(coupling.keep((consumer.data, consumer.axis), units).sum())
        if kept < size:
            done |= graph.rescale(node, size, kept)
    return result if done else proto


class _Graph:
    """The cut graph by tensor names, which the cut keeps."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._graph = proto.graph
        self._held = {t.name: t for t in proto.graph.initializer}
        self._chains = chains.of_graph(proto.graph)

    def rescale(self, product: Node, size: int, kept: int) -> bool:
        """Change the number behind (or in front of) one product of queries and keys, and the layer of its queries."""
        scores = product.outputs[0]
        producers = self._chains.producers
        queries = str(producers[scores].input[0])
        scaler = self._chains.sole_consumer(scores)
        if not self._scales(scaler, scores, size):
            scaler = producers.get(queries)
            if scaler is None or not self._scales(scaler, scaler.input[0], size):
                return False
            queries = scaler.input[0]
        layer = self._layer(queries)
        if scaler is None or not layer:
            return False
        old = self._value(scaler.input[1])
        name = f"{scaler.name}_scale_pruned"
        made = np.full_like(old, attention.SCALES[scaler.op_type](kept))
        self._graph.initializer.append(numpy_helper.from_array(made, name))
        if self._chains.read_once(scaler.input[1]):
            self._graph.initializer.remove(self._held[scaler.input[1]])
        scaler.input[1] = name
        for name in layer:
            value = self._value(name)
            self._set(name, (value.astype(np.float64) * math.sqrt(kept / size)).astype(value.dtype))
        return True

    def _value(self, name: str) -> Array:
        return numpy_helper.to_array(self._held[name])

    def _set(self, name: str, value: Array) -> None:
        self._held[name].CopyFrom(numpy_helper.from_array(value, name))

    def _scales(self, node: onnx.NodeProto | None, data: str, size: int) -> bool:
        """Whether a node divides (or multiplies) the data by the root of the head's size, and nobody else reads it."""
        if (
            node is None
            or node.op_type not in attention.SCALES
            or node.input[0] != data
            or not self._chains.read_once(data)
        ):
            return False
        if node.input[1] not in self._held or size < 2:
            return False
        value = self._value(node.input[1])
        if value.size != 1 or not _floating(value):
            return False
        return bool(np.allclose(value, attention.SCALES[node.op_type](size), rtol=1e-3))

    def _layer(self, tensor: str) -> list[str]:
        """Weight and bias of the linear layer that a tensor comes from; nothing where others see it, too."""
        bias: list[str] = []

        def data_input(node: onnx.NodeProto) -> str | None:
            if node.op_type in attention.LAYOUT:
                return str(node.input[0])
            held = self._constants(node)
            if not has(node, Trait.BIAS) or len(held) != 1 or bias:
                return None
            bias.extend(held)
            return next(name for name in node.input if name not in self._held)

        for node in self._chains.in_front(tensor, data_input):
            if node.op_type in attention.PROJECTIONS and node.input[1] in self._held:
                layer = [*self._constants(node), *bias]
                own = all(self._chains.read_once(n) and _floating(self._value(n)) for n in layer)
                return layer if own else []
        return []

    def _constants(self, node: onnx.NodeProto) -> list[str]:
        return [name for name in node.input if name in self._held]


def _floating(value: Array) -> bool:
    return bool(np.issubdtype(value.dtype, np.floating))
