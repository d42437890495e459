"""What removed units carried is folded into their consumers.

``bias``: the mean of every removed channel moves, through its weights, into the consumer's bias. For a convolution
with zero padding this is exact away from the border.
"""

from __future__ import annotations

import numpy as np
import onnx

from .affine import Editor, by_name, matrix, stride_product
from .records import Bools, Coupling, Floats, Model, Pruned, Statistics


def fold_means(
    model: Model, coupling: Coupling, units: Bools, statistics: Statistics, raw: onnx.ModelProto
) -> Pruned:
    """The cut model ``raw`` with the means of removed channels in the consumers' biases, and notes."""
    proto = onnx.ModelProto()
    proto.CopyFrom(raw)
    editor = Editor(proto)
    nodes = by_name(model.nodes)
    notes = []
    for consumer in coupling.consumers:
        keep = coupling.keep((consumer.data, consumer.axis), units)
        if keep.all() or consumer.weight is None:
            continue
        node = nodes[consumer.node]
        weight = matrix(node, consumer, model.constants[consumer.weight]) if consumer.weight in model.constants else None
        if weight is None:
            notes.append(f"{node}: its weight has no plain matrix form, so the mean of what was removed is not added")
            continue
        lost = np.where(keep, 0.0, statistics.moments[consumer.data, consumer.axis].mean)
        alpha = float(node.attrs.get("alpha", 1.0)) if node.op == "Gemm" else 1.0
        shift: Floats = alpha * np.einsum("goit,gi->go", weight, lost.reshape(len(weight), -1)).reshape(-1)
        shift /= stride_product(node)
        kept = output_mask(coupling, node.outputs[0], len(shift), units, len(model.shapes[node.outputs[0]]), consumer.slot)
        if not editor.add_bias(consumer, shift[kept]):
            notes.append(f"{node}: its bias is computed, so the mean of what was removed is not added")
    return Pruned(raw, proto, tuple(notes))


def output_mask(coupling: Coupling, output: str, size: int, units: Bools, rank: int, slot: int) -> Bools:
    """Which of a consumer's own outputs stay: channels are axis 1 of images, the last (or second to last) of products."""
    places = (1, rank - 1) if slot == 0 else (rank - 2,)
    for axis in places:
        labels = coupling.axes.get((output, axis))
        if labels is not None and len(labels) == size:
            return coupling.keep((output, axis), units)
    return np.ones(size, bool)


def new_biases(model: Model, coupling: Coupling) -> int:
    """Elements that a refit may add: outputs of linear consumers that have no bias yet (before pruning)."""
    editor = Editor(model.proto)
    total = 0
    for name in {c.node for c in coupling.consumers if c.weight is not None}:
        node = editor.nodes[name]
        if not editor.has_bias(node):
            shape = model.shapes[node.output[0]]
            total += max(shape[1:2] if node.op_type.startswith("Conv") else shape[-2:])
    return total
