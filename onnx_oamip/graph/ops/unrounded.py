"""Quantised models without the rounding of their activations, which jumps where real numbers are near a tie."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnx_oamip.core.records import Array

DOMAINS = ("", "ai.onnx", "com.microsoft")


def unrounded(proto: ModelProto) -> ModelProto | None:
    """Replace every pair of QuantizeLinear and DequantizeLinear on an activation by the range of its codes.

    Args:
        proto: A model. Bodies of nodes are left as they are.

    Returns:
        The model in which such activations are clipped and not rounded; None where there is no such pair with one
        scale for all elements.
    """
    result = ModelProto()
    result.CopyFrom(proto)
    stored = {tensor.name: tensor for tensor in result.graph.initializer}
    makers = {name: node for node in result.graph.node for name in node.output}
    nodes: list[NodeProto] = []
    for node in result.graph.node:
        made = makers.get(node.input[0]) if _is(node, "DequantizeLinear") else None
        limits = _limits(made, node, stored) if made is not None else None
        if made is None or limits is None:
            nodes.append(node)
            continue
        out = node.output[0]
        low, high = (f"{out}_{side}_code" for side in ("least", "largest"))
        result.graph.initializer.extend(
            numpy_helper.from_array(limit, name)
            for limit, name in zip(limits, (low, high), strict=True)
        )
        nodes.append(helper.make_node("Max", [made.input[0], low], [f"{out}_above"]))
        nodes.append(helper.make_node("Min", [f"{out}_above", high], [out], name=node.name))
    if len(nodes) == len(result.graph.node):
        return None
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def _is(node: NodeProto, op: str) -> bool:
    return node.op_type == op and node.domain in DOMAINS


def _limits(
    first: NodeProto, second: NodeProto, stored: dict[str, TensorProto]
) -> tuple[Array, Array] | None:
    """The real numbers of the least and the largest code, where both nodes have the same one scale and zero point."""
    if not _is(first, "QuantizeLinear") or first.input[0] in stored:
        return None
    if any(name not in stored for node in (first, second) for name in node.input[1:] if name):
        return None
    formats = [
        [numpy_helper.to_array(stored[name]) for name in node.input[1:] if name]
        for node in (first, second)
    ]
    alike = all(np.array_equal(one, other) for one, other in zip(*formats, strict=False))
    if len(formats[0]) != 2 or len(formats[1]) != 2 or not alike:
        return None
    scale, zero = formats[0]
    if scale.size != 1 or zero.dtype.kind not in "iu":
        return None
    codes = np.iinfo(zero.dtype)
    low, high = (
        ((code - zero.astype(np.float64)) * scale).astype(scale.dtype)
        for code in (codes.min, codes.max)
    )
    return low.reshape(()), high.reshape(())
