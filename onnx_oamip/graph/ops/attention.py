"""Fused attention: whole heads go, with their query, key, value and output channels.

``Attention`` (com.microsoft, with packed weights; ai.onnx, opset 23), ``MultiHeadAttention``, ``GroupQueryAttention``.
Heads do not see each other and the scale of the logits depends on the size of a head only, so that taking heads away is
exact. With fewer key and value heads than query heads, one of them goes with all the query heads that read it.

MACs are those of the two products, queries with keys and probabilities with values, as for the same attention written
with MatMul, and of the projection that com.microsoft::Attention contains.

References: ONNX operator specification, "Attention" (opset 23 and 24); ONNX Runtime, ContribOperators.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from onnx_oamip.core.records import Axis, Ints, Node
from onnx_oamip.graph.ops.notation import opaque
from onnx_oamip.graph.ops.spec import (
    Cuts,
    Edit,
    EditRules,
    LabelAxis,
    Labels,
    LikeInput,
    LikeProduct,
    OpSpec,
    Shapes,
    Total,
    operand,
)

PRODUCTS = frozenset({"MatMul"})
"""The product of queries and keys, where attention is written out in elementary operators."""
SCALES: dict[str, Callable[[int], float]] = {
    "Div": math.sqrt,
    "Mul": lambda size: 1 / math.sqrt(size),
}
"""The number that is applied to the logits, by operator, for a size of a head."""
LAYOUT = frozenset({"Reshape", "Transpose", "Identity"})
"""Operators that divide the queries of a layer into heads."""
PROJECTIONS = frozenset({"MatMul", "Gemm"})
"""Layers that make queries."""
ROTARY = ("do_rotary", "rotary_embedding_dim", "rotary_interleaved")


def _heads(labels: Labels, channels: Ints, units: Ints) -> None:
    """Tie the channels (heads * size,) of every head to its unit; neighbouring query heads may share one."""
    labels.tie(channels.reshape(len(units), -1), units[:, None])


def _per_head(node: Node, labels: Labels, slot: int, units: Ints, heads: int) -> str | None:
    """Follow something that is added to the logits (..., heads, queries, keys); a reason where that cannot be done."""
    name = operand(node, slot)
    if name is None:
        return None
    shape = labels.shape(name)
    if shape is None:
        return f"{node} adds '{name}', whose shape is unknown"
    axis = len(shape) - 3
    if axis >= 0 and shape[axis] != 1:
        found = labels.label(name, axis)
        if found is None or shape[axis] != heads:
            return f"{node} adds '{name}', which has its own values for every head"
        labels.tie(found.reshape(len(units), -1), units[:, None])
    if not labels.is_constant(name):
        for a in range(len(shape)):
            if a != axis or shape[a] == 1:
                labels.pin(labels.label(name, a), f"{node} attends along this axis")
    return None


def _separate(
    node: Node, labels: Labels, heads: int, groups: int, logits: int, past: tuple[int, ...]
) -> bool:
    """Query, key and value (batch, length, heads * size) as inputs of their own. False where nothing is followed."""
    names = [operand(node, slot) for slot in range(3)]
    reason = None
    if any(operand(node, slot) for slot in past):
        reason = f"{node} reads a past state"
    elif any(name is None for name in names):
        reason = f"{node} reads queries, keys and values packed in one tensor"
    elif any(name in ROTARY and value for name, value in node.attrs.items()):
        reason = f"{node} rotates queries and keys"
    if reason is None:
        given = [name for name in names if name is not None]
        sizes = [labels.shape(name) for name in given]
        counts = (heads, groups, groups)
        if not all(counts) or heads % groups:
            reason = f"{node} has query heads that do not divide among its key heads"
        elif any(s is None or len(s) != 3 or s[2] % n for s, n in zip(sizes, counts, strict=True)):
            reason = f"{node} has an input that is not of shape (batch, length, heads * size)"
        elif any(labels.is_constant(n) or labels.label(n, 2) is None for n in given):
            reason = f"{node} has a query, key or value that is not followed"
    if reason is None:
        found = [labels.label(name, 2) for name in given]
        units = _first(found[1], groups)
        reason = _per_head(node, labels, logits, units, heads)
    if reason is not None:
        opaque(node, labels, reason)
        return False
    for channels in found:
        assert channels is not None
        _heads(labels, channels, units)
    _pin_lengths(node, labels, given)
    size = (labels.shape(given[2]) or ())[2] // groups
    labels.set(node.outputs[0], [None, None, np.repeat(units, heads // groups * size)])
    _states(node, labels, units, heads)
    return True


def _counts(node: Node, queries: str, keys: str) -> tuple[int, int]:
    """Numbers of query heads and of key and value heads; 0 where they are not said."""
    return int(node.attrs.get(queries, 0)), int(node.attrs.get(keys, 0))


def _first(channels: LabelAxis, heads: int) -> Ints:
    assert channels is not None
    return np.ascontiguousarray(channels.reshape(heads, -1)[:, 0])


def _pin_lengths(node: Node, labels: Labels, names: list[str]) -> None:
    for name in names:
        for axis in (0, 1):
            labels.pin(labels.label(name, axis), f"{node} attends along this axis")


def _states(node: Node, labels: Labels, units: Ints, heads: int) -> None:
    """Keys and values (or logits) as further outputs, of shape (batch, heads, ...)."""
    for i, name in enumerate(node.outputs[1:]):
        if name and (labels.readers(name) or labels.is_output(name)):
            held = units if i < 2 else np.repeat(units, heads // len(units))
            labels.set(name, [None, held, None, None], f"{node} gives it out head by head")


# ----------------------------------------------------------------------------------------------------- the operators


def _multi_head(node: Node, labels: Labels) -> None:
    heads, _ = _counts(node, "num_heads", "num_heads")
    bias = operand(node, 3)
    sizes = [(labels.shape(n) or ())[-1:] for n in node.inputs[:3]]
    if bias and (
        not labels.is_constant(bias) or labels.shape(bias) != (sum(s[0] for s in sizes if s),)
    ):
        opaque(node, labels, f"{node} has a bias that is not followed")
        return
    if all(operand(node, slot) for slot in range(3)) and len(set(sizes)) > 1:
        opaque(node, labels, f"{node} has values of another width than its queries")
        return
    if not _separate(node, labels, heads, heads, 5, (6, 7, 8, 9)):
        return
    mask = operand(node, 4)
    if mask:
        labels.pin_all(mask, f"{node} takes it as a mask")
    if bias:
        parts = labels.label(bias, 0)
        rows = [labels.label(n, 2) for n in node.inputs[:3]]
        assert parts is not None
        labels.tie(parts, np.concatenate([r for r in rows if r is not None]))


def _group_query(node: Node, labels: Labels) -> None:
    _separate(node, labels, *_counts(node, "num_heads", "kv_num_heads"), 10, (3, 4))


def _standard(node: Node, labels: Labels) -> None:
    shapes = [labels.shape(n) for n in node.inputs[:3]]
    if shapes[0] is not None and len(shapes[0]) == 3:
        _separate(node, labels, *_counts(node, "q_num_heads", "kv_num_heads"), 3, (4, 5))
        return
    names = list(node.inputs[:3])
    known = [s for s in shapes if s is not None]
    axes = [x for n in names if not labels.is_constant(n) and (x := labels.label(n, 1)) is not None]
    reason = None
    if any(operand(node, slot) for slot in (4, 5)):
        reason = f"{node} reads a past state"
    elif any(len(s) != 4 for s in known) or len(known) < 3:
        reason = f"{node} has an input that is not of shape (batch, heads, length, size)"
    elif len(axes) < 3:
        reason = f"{node} has a query, key or value whose heads are not followed"
    if reason is None:
        reason = _per_head(node, labels, 3, axes[1], known[0][1])
    if reason is not None:
        opaque(node, labels, reason)
        return
    units = axes[1]
    for found in axes:
        labels.tie(found.reshape(len(units), -1), units[:, None])
    for name in names:
        for axis in (0, 2):
            labels.pin(labels.label(name, axis), f"{node} attends along this axis")
    for name in names[:2]:
        labels.pin(labels.label(name, 3), f"{node} scales by the length of this axis")
    labels.set(node.outputs[0], [None, axes[0], None, labels.label(names[2], 3)])
    _states(node, labels, units, known[0][1])
    for name in node.outputs[1:]:
        if name and (labels.readers(name) or labels.is_output(name)):
            labels.pin(labels.label(names[2], 3), f"{node} gives '{name}' as an extra output")


def _packed(node: Node, labels: Labels) -> None:
    """com.microsoft::Attention: one weight (inputs, queries + keys + values), bias of the same columns."""
    x, w = node.inputs[:2]
    bias, (heads, _) = operand(node, 2), _counts(node, "num_heads", "num_heads")
    shape = labels.shape(w)
    reason = None
    sizes = _sizes(node, shape[1]) if shape is not None and len(shape) == 2 else ()
    if not labels.is_constant(w) or (bias and not labels.is_constant(bias)) or not sizes:
        reason = f"{node} takes its weights from a computation"
    elif operand(node, 4) or operand(node, 6) or any(node.outputs[1:]):
        reason = f"{node} reads or gives out a past state"
    elif any(node.attrs.get(name) for name in ROTARY):
        reason = f"{node} rotates queries and keys"
    elif not heads or len(set(sizes)) > 1 or sizes[0] % heads:
        reason = f"{node} has values of another width than its queries"
    columns = labels.label(w, 1) if reason is None else None
    if columns is not None:
        units = _first(columns[: sizes[0]], heads)
        reason = _per_head(node, labels, 5, units, heads)
    if columns is None or reason is not None:
        reason = reason or f"{node} has a weight whose columns are not followed"
        labels.pin(columns, reason)
        opaque(node, labels, reason)
        return
    for part in np.split(columns, 3):
        _heads(labels, part, units)
    if bias:
        labels.unify([(w, 1), (bias, 0)], node)
    mask = operand(node, 3)
    if mask:
        labels.pin_all(mask, f"{node} takes it as a mask")
    _pin_lengths(node, labels, [x])
    if labels.unify([(x, 2), (w, 0)], node) is not None:
        labels.consume(node, (x, 2), (w, 0))
    labels.set(node.outputs[0], [None, None, np.repeat(units, sizes[2] // heads)])


def _sizes(node: Node, columns: int) -> tuple[int, ...]:
    """Widths of queries, keys and values."""
    found = tuple(int(n) for n in node.attrs.get("qkv_hidden_sizes", ())) or (columns // 3,) * 3
    return found if len(found) == 3 and sum(found) == columns else ()


# ---------------------------------------------------------------------------------------------------- repair and cost


def _repair(node: Node, cuts: Cuts) -> Edit:
    """Head counts shrink with the channels of queries (and keys), whose heads keep their size."""
    out = node.outputs[0]
    rank = len(cuts.shape(out))
    keep = cuts.keep(out, rank - 1) if rank == 3 else None
    if keep is None:
        return Edit()
    attrs: dict[str, object] = {}
    for name in ("num_heads", "kv_num_heads", "q_num_heads"):
        if name in node.attrs:
            attrs[name] = int(node.attrs[name]) * int(keep.sum()) // len(keep)
    if "qkv_hidden_sizes" in node.attrs:
        attrs["qkv_hidden_sizes"] = [int(keep.sum())] * 3
    return Edit(attrs)


def _products(node: Node, shapes: Shapes) -> tuple[Axis | Total, ...]:
    """Queries times keys, then probabilities times values."""
    q, k, out = node.inputs[0], operand(node, 1), node.outputs[0]
    if k is None or len(shapes[k]) != len(shapes[q]) or len(shapes[q]) not in (3, 4):
        return (((), 0),)  # packed inputs: nothing there is followed
    if len(shapes[q]) == 4:
        return ((q, 0), (q, 1), (q, 2), (k, 2), (((q, 3), (out, 3)), 0))
    return ((q, 0), (q, 1), (k, 1), (((q, 2), (out, 2)), 0))


def _packed_cost(node: Node, shapes: Shapes) -> tuple[Axis | Total, ...]:
    """Three projections and two products over as many keys as queries, all as wide as the output."""
    x, w, out = node.inputs[0], node.inputs[1], node.outputs[0]
    sizes = _sizes(node, shapes[w][1])
    if len(set(sizes)) == 1:
        return ((x, 0), (x, 1), (out, 2), (((w, 0), (w, 0), (w, 0), (x, 1), (x, 1)), 0))
    batch, length, width = shapes[x]
    other = length * (sizes[0] + sizes[2]) if sizes else 0
    return (((), batch * length * (width * shapes[w][1] + other)),)  # nothing here may be cut


def _packed_shape(node: Node, constants: Shapes) -> tuple[int, int] | None:
    shape = constants.get(node.inputs[1])
    if shape is None or len(shape) != 2 or not (sizes := _sizes(node, shape[1])):
        return None
    return shape[0], sizes[2]


SPECS = (
    OpSpec(
        "Attention",
        _packed,
        domain="com.microsoft",
        edit=EditRules(_repair),
        cost=_packed_cost,
        shape=LikeProduct(_packed_shape),
    ),
    OpSpec(
        "MultiHeadAttention",
        _multi_head,
        domain="com.microsoft",
        edit=EditRules(_repair),
        cost=_products,
        shape=LikeInput(),
    ),
    OpSpec(
        "GroupQueryAttention",
        _group_query,
        domain="com.microsoft",
        edit=EditRules(_repair),
        cost=_products,
        shape=LikeInput(),
    ),
    OpSpec("Attention", _standard, since=23, edit=EditRules(_repair), cost=_products),
)
