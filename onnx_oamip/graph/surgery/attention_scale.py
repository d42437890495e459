"""Attention scale: adapts the factor on attention logits to the pruned size of a head.

Attention divides the products of queries and keys by the square root of the size d of a head. Pruning to e channels per
head does not change that factor, and the pruned model is correct with it. But optimisers that fuse attention into one
operator (ONNX Runtime's transformer optimiser) assume the square root of the size that they see. So the factor becomes
the root of e, and the layer of the queries is multiplied by the root of e / d: the same logits, in the usual form.
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


def rescale(
    model: Model,
    coupling: Coupling,
    units: Bools,
    proto: onnx.ModelProto,
) -> onnx.ModelProto:
    """Brings the attention scales of a cut model into the usual form, the square root of the size of a head.

    Args:
        model: The original model.
        coupling: Its coupling.
        units: Keep mask of the units (n_units,).
        proto: The cut model.

    Returns:
        A changed copy, or ``proto`` itself if no scale has to change.
    """
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = _CutGraph(result)
    nodes = {node.name: node for node in model.nodes}
    changed = False
    for consumer in coupling.consumers:
        node = nodes[consumer.node]
        # The queries are the first input of a product of two activations.
        is_activation_product = (
            node.op in attention.PRODUCTS
            and consumer.weight is not None
            and consumer.weight not in model.constants
        )
        if not is_activation_product or consumer.slot != 0:
            continue
        size = model.shapes[consumer.data][consumer.axis]
        kept = int(coupling.keep((consumer.data, consumer.axis), units).sum())
        if 0 < kept < size and graph.rescale(node, size, kept):
            changed = True
    return result if changed else proto


class _CutGraph:
    """A cut graph with its tensors by name; the cut preserves the names of the original."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._graph = proto.graph
        self._initialisers = {t.name: t for t in proto.graph.initializer}
        self._chains = chains.of_graph(proto.graph)

    def rescale(self, product: Node, size: int, kept: int) -> bool:
        """Changes the scale of one product of queries and keys, and the layer of its queries.

        Args:
            product: The product in the original model.
            size: Size of a head in the original model.
            kept: Size of a head in the cut model.

        Returns:
            False if the pattern does not match; the graph is then unchanged.
        """
        scores = product.outputs[0]
        producers = self._chains.producers
        queries = str(producers[scores].input[0])
        scaler = self._chains.sole_consumer(scores)
        if not self._scales(scaler, scores, size):
            # Some exporters scale the queries instead of the scores.
            scaler = producers.get(queries)
            if scaler is None or not self._scales(scaler, scaler.input[0], size):
                return False
            queries = scaler.input[0]
        layer = self._query_layer(queries)
        if scaler is None or not layer:
            return False
        self._replace_scale(scaler, kept)
        factor = math.sqrt(kept / size)
        for name in layer:
            value = self._value(name)
            scaled = (value.astype(np.float64) * factor).astype(value.dtype)
            self._initialisers[name].CopyFrom(numpy_helper.from_array(scaled, name))
        return True

    def _replace_scale(self, scaler: onnx.NodeProto, kept: int) -> None:
        old = scaler.input[1]
        name = f"{scaler.name}_scale_pruned"
        value = np.full_like(self._value(old), attention.SCALES[scaler.op_type](kept))
        self._graph.initializer.append(numpy_helper.from_array(value, name))
        if self._chains.read_once(old):
            self._graph.initializer.remove(self._initialisers[old])
        scaler.input[1] = name

    def _value(self, name: str) -> Array:
        return numpy_helper.to_array(self._initialisers[name])

    def _scales(
        self,
        node: onnx.NodeProto | None,
        data: str,
        size: int,
    ) -> bool:
        """Tests whether a node, the only consumer of ``data``, scales it for heads of this size."""
        if (
            node is None
            or node.op_type not in attention.SCALES
            or node.input[0] != data
            or not self._chains.read_once(data)
        ):
            return False
        if node.input[1] not in self._initialisers or size < 2:
            return False
        value = self._value(node.input[1])
        if value.size != 1 or not _is_floating(value):
            return False
        return bool(np.allclose(value, attention.SCALES[node.op_type](size), rtol=1e-3))

    def _query_layer(self, tensor: str) -> list[str]:
        """Weight and bias of the linear layer that computes a tensor; empty if other nodes read them or its output."""
        bias: list[str] = []

        def data_input(node: onnx.NodeProto) -> str | None:
            if node.op_type in attention.LAYOUT:
                return str(node.input[0])
            constants = self._constants(node)
            if not has(node, Trait.BIAS) or len(constants) != 1 or bias:
                return None
            bias.extend(constants)
            return next(name for name in node.input if name not in self._initialisers)

        for node in self._chains.in_front(tensor, data_input):
            if node.op_type in attention.PROJECTIONS and node.input[1] in self._initialisers:
                layer = [*self._constants(node), *bias]
                is_own = all(
                    self._chains.read_once(name) and _is_floating(self._value(name))
                    for name in layer
                )
                return layer if is_own else []
        return []

    def _constants(self, node: onnx.NodeProto) -> list[str]:
        return [name for name in node.input if name in self._initialisers]


def _is_floating(value: Array) -> bool:
    return bool(np.issubdtype(value.dtype, np.floating))
