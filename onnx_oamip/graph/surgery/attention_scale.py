"""The scale of attention logits, in step with the size of a head.

Attention divides the products of queries and keys by the root of the head's size d. A cut to e channels a head leaves
that number alone: the logits lose terms and nothing else. But what fuses attention into one operator (ONNX Runtime's
transformer optimiser) takes the number for the root of the size that it sees. So it becomes the root of e, and the
queries' layer is multiplied by the root of e / d: the same logits, now in the usual form.
"""

from __future__ import annotations

import math
from collections import Counter

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

MOVES = ("Reshape", "Transpose", "Identity")


def usual(
    model: Model, coupling: Coupling, units: Bools, proto: onnx.ModelProto
) -> onnx.ModelProto:
    """A cut model whose attention scales fit its heads; the model itself where there are none to change."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = _Graph(result, model)
    before = {node.name: node for node in model.nodes}
    done = False
    for consumer in coupling.consumers:
        node = before[consumer.node]
        if (
            node.op != "MatMul"
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

    def __init__(self, proto: onnx.ModelProto, model: Model) -> None:
        self._graph = proto.graph
        self._held = {t.name: t for t in proto.graph.initializer}
        self._makers = {name: node for node in proto.graph.node for name in node.output}
        self._reads = Counter(name for node in proto.graph.node for name in node.input)
        self._reads.update(port.name for port in model.outputs)
        self._readers = {name: node for node in proto.graph.node for name in node.input}

    def rescale(self, product: Node, size: int, kept: int) -> bool:
        """Change the number behind (or in front of) one product of queries and keys, and the layer of its queries."""
        scores = product.outputs[0]
        queries = str(self._makers[scores].input[0])
        scaler = self._readers.get(scores)
        if not self._scales(scaler, scores, size):
            scaler = self._makers.get(queries)
            if scaler is None or not self._scales(scaler, scaler.input[0], size):
                return False
            queries = scaler.input[0]
        layer = self._layer(queries)
        if scaler is None or not layer:
            return False
        old = self._value(scaler.input[1])
        name = f"{scaler.name}_scale_pruned"
        made = np.full_like(
            old, math.sqrt(kept) if scaler.op_type == "Div" else 1 / math.sqrt(kept)
        )
        self._graph.initializer.append(numpy_helper.from_array(made, name))
        if self._only(scaler.input[1]):
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

    def _only(self, name: str) -> bool:
        return self._reads[name] == 1

    def _scales(self, node: onnx.NodeProto | None, data: str, size: int) -> bool:
        """Whether a node divides (or multiplies) the data by the root of the head's size, and nobody else reads it."""
        if (
            node is None
            or node.op_type not in ("Div", "Mul")
            or node.input[0] != data
            or not self._only(data)
        ):
            return False
        if node.input[1] not in self._held or size < 2:
            return False
        value = self._value(node.input[1])
        wanted = math.sqrt(size) if node.op_type == "Div" else 1 / math.sqrt(size)
        return value.size == 1 and _floating(value) and bool(np.allclose(value, wanted, rtol=1e-3))

    def _layer(self, tensor: str) -> list[str]:
        """Weight and bias of the linear layer that a tensor comes from; nothing where others see it, too."""
        found: list[str] = []
        while self._only(tensor) and tensor in self._makers:
            node = self._makers[tensor]
            held = [name for name in node.input if name in self._held]
            if node.op_type in MOVES:
                tensor = node.input[0]
            elif node.op_type == "Add" and len(held) == 1 and not found:
                found, tensor = held, next(name for name in node.input if name not in self._held)
            elif node.op_type in ("MatMul", "Gemm") and node.input[1] in self._held:
                found = [*held, *found]
                return (
                    found if all(self._only(n) and _floating(self._value(n)) for n in found) else []
                )
            else:
                return []
        return []


def _floating(value: Array) -> bool:
    return bool(np.issubdtype(value.dtype, np.floating))
