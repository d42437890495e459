"""Operators computed by torch: one function per operator, for all versions, in families.

Imports torch. ``graph/ops`` has everything else about an operator; this table is apart, because torch is optional.
"""

from __future__ import annotations

from onnx_oamip.core.records import Node
from onnx_oamip.recovery.operators import (
    attention,
    elementwise,
    linear,
    movement,
    norm,
    pool,
    quantize,
    recurrent,
    resize,
)
from onnx_oamip.recovery.operators.calls import Call, Kernel, Table, UnsupportedForm

TABLE: Table = {
    **linear.KERNELS,
    **recurrent.KERNELS,
    **attention.KERNELS,
    **quantize.KERNELS,
    **norm.KERNELS,
    **pool.KERNELS,
    **elementwise.KERNELS,
    **movement.KERNELS,
    **resize.KERNELS,
}
OLDEST = 7
"""Opset version since which the functions hold: broadcasting had other rules before."""


def kernel_of(node: Node) -> Kernel | None:
    """Return how torch computes a node.

    Args:
        node: A node of the graph or of a body.

    Returns:
        The kernel, or None if the table has none for the operator or its version.
    """
    if not node.domain and node.version < OLDEST:
        return None
    return TABLE.get((node.domain, node.op))


__all__ = ["TABLE", "Call", "Kernel", "UnsupportedForm", "kernel_of"]
