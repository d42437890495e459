"""Quantised graphs in the form that one optimiser of ONNX Runtime needs.

On processors without instructions for int8, sums of 16 bits saturate; an exact session therefore lets ONNX Runtime make
uint8 of the weights of integer products (``session.x64quantprecision``). The optimiser that does so names each new
constant after the old one, fails where that name is taken, and in some releases ends the process where a zero point is
left out without an empty name in its place.
"""

from __future__ import annotations

from collections import Counter

from onnx import ModelProto, NodeProto, TensorProto

from onnx_oamip.graph import subgraphs
from onnx_oamip.graph.ops import kinds


def separated(proto: ModelProto) -> ModelProto:
    """Gives every integer product codes and zero points of its own, and a place for each optional zero point.

    Args:
        proto: Any model.

    Returns:
        An equal model; the same object if it has no integer products.
    """
    if not any(_is_product(node) for node in subgraphs.nodes(proto.graph)):
        return proto
    result = ModelProto()
    result.CopyFrom(proto)
    codes = {t.name: t for t in result.graph.initializer if t.data_type == TensorProto.INT8}
    products = [node for node in subgraphs.nodes(result.graph) if _is_product(node)]
    taken = subgraphs.names(result.graph)
    readers = Counter(name for node in subgraphs.nodes(result.graph) for name in node.input)
    for node in products:
        missing = kinds.INTEGER_PRODUCTS[node.op_type] - len(node.input)
        node.input.extend([""] * missing)
        for slot, name in enumerate(node.input):
            if name not in codes or readers[name] < 2:
                continue
            readers[name] -= 1
            own = result.graph.initializer.add()
            own.CopyFrom(codes[name])
            own.name = subgraphs.unused_name(f"{name}_of_{node.name}_{slot}", taken)
            taken.add(own.name)
            node.input[slot] = own.name
    return result


def _is_product(node: NodeProto) -> bool:
    return node.op_type in kinds.INTEGER_PRODUCTS
