"""Rotary position embedding: queries or keys are rotated within every head, so whole heads are removed.

``RotaryEmbedding`` of ai.onnx (opset 23) and of com.microsoft. Heads are on an axis of their own
(batch, heads, length, size), or lie one behind the other (batch, length, heads * size).

References: ONNX operator specification, "RotaryEmbedding" (opset 23); ONNX Runtime, ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import AttributeProto

from onnx_oamip.core.records import Node
from onnx_oamip.graph.ops.handles import Cuts, Labels
from onnx_oamip.graph.ops.notation import opaque
from onnx_oamip.graph.ops.spec import Edit, EditRules, LikeInput, OpSpec

BY_HEAD = 4
"""Axes of an input whose heads have an axis of their own: (batch, heads, length, size)."""


def _rule(cosines: int) -> Callable[[Node, Labels], None]:
    """Channel rule of an operator that reads the cosines of the angles at one of its inputs."""

    def follow(node: Node, labels: Labels) -> None:
        x = node.inputs[0]
        shape = labels.shape(x)
        heads = _heads(node, labels, cosines)
        if shape is None or not heads:
            opaque(node, labels, f"{node} rotates heads of a number that is not known")
            return
        for name in filter(None, node.inputs[1:]):
            labels.pin_all(name, f"{node} takes angles or positions from it")
        axis = 1 if len(shape) == BY_HEAD else 2
        for other in set(range(len(shape))) - {axis}:
            labels.pin(labels.label(x, other), f"{node} rotates pairs of values by their position")
        channels = labels.label(x, axis)
        if channels is not None and axis == 2:
            by_head = channels.reshape(heads, -1)
            labels.tie(by_head, by_head[:, :1])
        labels.set(node.outputs[0], labels.axes(x))

    return follow


def _heads(node: Node, labels: Labels, cosines: int) -> int:
    """Number of heads, 0 where it is not known or does not divide the channels.

    The angles of a head are half as many as the values that are rotated: all of them where no number is given.
    """
    shape = labels.shape(node.inputs[0])
    if shape is None or len(shape) not in (3, BY_HEAD):
        return 0
    if len(shape) == BY_HEAD:
        return shape[1]
    width = shape[2]
    given = int(node.attrs.get("num_heads", 0))
    if given:
        return given if width % given == 0 else 0
    angles = labels.shape(node.inputs[cosines])
    if node.attrs.get("rotary_embedding_dim", 0) or not angles:
        return 0
    size = 2 * angles[-1]
    return width // size if size and width % size == 0 else 0


def _repair(node: Node, cuts: Cuts) -> Edit:
    """The number of heads, where it is given, shrinks with the channels, whose heads keep their size."""
    given = int(node.attrs.get("num_heads", 0))
    x = node.inputs[0]
    axis = 1 if len(cuts.shape(x)) == BY_HEAD else 2
    keep = cuts.keep(x, axis)
    if not given or keep is None:
        return Edit()
    return Edit({"num_heads": given * int(np.count_nonzero(keep)) // len(keep)})


_ATTRIBUTES = {
    "interleaved": AttributeProto.INT,
    "is_packed_batching": AttributeProto.INT,
    "num_heads": AttributeProto.INT,
    "rotary_embedding_dim": AttributeProto.INT,
    "scale": AttributeProto.FLOAT,
}
"""Types of the attributes of ONNX Runtime's own operator."""

SPECS = (
    OpSpec("RotaryEmbedding", _rule(cosines=1), since=23, edit=EditRules(_repair)),
    OpSpec(
        "RotaryEmbedding",
        _rule(cosines=2),
        domain="com.microsoft",
        attributes=_ATTRIBUTES,
        edit=EditRules(_repair),
        shape=LikeInput(),
    ),
)
