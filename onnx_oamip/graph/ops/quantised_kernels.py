"""Quantised kernels of ONNX Runtime that are counted but not followed: their weights stay as they are.

Weights of a few bits are packed in blocks along the axis that a cut would shorten, and the scales of blocks with them.

Reference: ONNX Runtime, ContribOperators.md.
"""

from __future__ import annotations

from onnx import AttributeProto

from onnx_oamip.core.records import Axis, Node
from onnx_oamip.graph.ops.handles import Labels
from onnx_oamip.graph.ops.linear import matmul_cost
from onnx_oamip.graph.ops.notation import opaque
from onnx_oamip.graph.ops.spec import Codes, LikeProduct, OpSpec, Shapes, Total

DOMAIN = "com.microsoft"


def _whole(node: Node, labels: Labels) -> None:
    opaque(node, labels, f"{node} has a quantised weight that is not followed")


def _packed_shape(node: Node, constants: Shapes) -> tuple[int, int]:
    del constants  # the shape of the packed weight is that of its blocks
    return int(node.attrs["K"]), int(node.attrs["N"])


def _packed_cost(node: Node, shapes: Shapes) -> tuple[Axis | Total, ...]:
    out = node.outputs[0]
    summed: Total = ((), int(node.attrs["K"]))
    return (*((out, axis) for axis in range(len(shapes[out]))), summed)


def _matrix_shape(node: Node, constants: Shapes) -> tuple[int, int] | None:
    shape = constants.get(node.inputs[1])
    return (shape[0], shape[1]) if shape is not None and len(shape) == 2 else None


SPECS = (
    OpSpec(
        "MatMulNBits",
        _whole,
        DOMAIN,
        cost=_packed_cost,
        shape=LikeProduct(_packed_shape),
        codes=Codes((2, 3, 4), bits="bits"),
        attributes=dict.fromkeys(("K", "N", "bits", "block_size"), AttributeProto.INT),
    ),
    OpSpec(
        "DynamicQuantizeMatMul",
        _whole,
        DOMAIN,
        cost=matmul_cost,
        shape=LikeProduct(_matrix_shape),
        codes=Codes((2, 3)),
    ),
)
