"""Fused attention: whole heads are removed, with their query, key, value and output channels.

``Attention`` (com.microsoft, with packed weights; ai.onnx, opset 23), ``MultiHeadAttention``, ``GroupQueryAttention``.
Heads do not see each other and the scale of the logits depends on the size of a head only, so that removing heads is
exact. With fewer key and value heads than query heads, one of them is removed with all the query heads that read it.

MACs are those of the two products, queries with keys and probabilities with values, as for the same attention written
with MatMul, and of the projection that com.microsoft::Attention contains.

References: ONNX operator specification, "Attention" (opset 23 and 24); ONNX Runtime, ContribOperators.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from onnx import AttributeProto

from onnx_oamip.core.printable import shortened
from onnx_oamip.core.records import Axis, Ints, Node
from onnx_oamip.graph.ops.handles import Cuts, Labels, operand
from onnx_oamip.graph.ops.notation import opaque
from onnx_oamip.graph.ops.spec import Edit, EditRules, LikeInput, LikeProduct, OpSpec, Shapes, Total

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
ANGLES = (7, 8, 9)
"""Inputs of GroupQueryAttention with the cosines and sines of rotated queries and keys, and their positions."""
SINK = 11
"""Input of GroupQueryAttention with a logit of every query head that stands beside those of the keys."""


def _heads(labels: Labels, channels: Ints, units: Ints) -> None:
    """Tie the channels (heads * size,) of every head to its unit; neighbouring query heads may share one."""
    per_unit = channels.reshape(len(units), -1)
    labels.tie(per_unit, units[:, None])


@dataclass(frozen=True)
class _Form:
    """Layout of the inputs of an operator, and its numbers of query heads and of key and value heads (0: not given).

    ``added``: input that is added to the logits; ``past``: inputs with a state of earlier steps.
    """

    heads: int
    groups: int
    added: int
    past: tuple[int, ...] = ()


def _per_head(
    node: Node,
    labels: Labels,
    slot: int,
    units: Ints,
    heads: int,
) -> str | None:
    """Follow an input that is added to the logits (..., heads, queries, keys); a reason where that cannot be done."""
    name = operand(node, slot)
    if name is None:
        return None
    shape = labels.shape(name)
    if shape is None:
        return f"{node} adds '{shortened(name)}', whose shape is unknown"
    axis = len(shape) - 3
    if axis >= 0 and shape[axis] != 1:
        found = labels.label(name, axis)
        if found is None or shape[axis] != heads:
            return f"{node} adds '{shortened(name)}', which has its own values for every head"
        _heads(labels, found, units)
    if not labels.is_constant(name):
        for other in range(len(shape)):
            if other != axis or shape[other] == 1:
                labels.pin(labels.label(name, other), f"{node} attends along this axis")
    return None


def _separate(node: Node, labels: Labels, form: _Form) -> bool:
    """Query, key and value (batch, length, heads * size) as inputs of their own. False where nothing is followed."""
    reason = _not_separate(node, labels, form)
    if reason is not None:
        opaque(node, labels, reason)
        return False
    names = node.inputs[:3]
    channels = [_tracked(labels, name, 2) for name in names]
    units = _first(channels[1], form.groups)
    reason = _per_head(node, labels, form.added, units, form.heads)
    if reason is not None:
        opaque(node, labels, reason)
        return False
    for found in channels:
        _heads(labels, found, units)
    _pin_lengths(node, labels, names)
    size = (labels.shape(names[2]) or ())[2] // form.groups
    shared_by = form.heads // form.groups
    labels.set(node.outputs[0], [None, None, np.repeat(units, shared_by * size)])
    _states(node, labels, units, form.heads)
    return True


def _not_separate(node: Node, labels: Labels, form: _Form) -> str | None:
    """Reason that queries, keys and values cannot be followed, None where they can."""
    names = [name for slot in range(3) if (name := operand(node, slot)) is not None]
    if any(operand(node, slot) for slot in form.past):
        return f"{node} reads a past state"
    if len(names) < 3:
        return f"{node} reads queries, keys and values packed in one tensor"
    if not form.heads or not form.groups or form.heads % form.groups:
        return f"{node} has query heads that do not divide among its key heads"
    for name, count in zip(names, (form.heads, form.groups, form.groups), strict=True):
        shape = labels.shape(name)
        if shape is None or len(shape) != 3 or shape[2] % count:
            return f"{node} has an input that is not of shape (batch, length, heads * size)"
    if any(labels.is_constant(name) or labels.label(name, 2) is None for name in names):
        return f"{node} has a query, key or value that is not followed"
    return None


def _count(node: Node, attribute: str) -> int:
    """Number of heads, 0 where it is not given."""
    return int(node.attrs.get(attribute, 0))


def _tracked(labels: Labels, name: str, axis: int) -> Ints:
    """Labels of an axis that is known to be followed."""
    found = labels.label(name, axis)
    assert found is not None
    return found


def _first(channels: Ints, heads: int) -> Ints:
    """The label of the first channel of every head."""
    by_head = channels.reshape(heads, -1)
    return np.ascontiguousarray(by_head[:, 0])


def _pin_lengths(node: Node, labels: Labels, names: Iterable[str]) -> None:
    for name in names:
        for axis in (0, 1):
            labels.pin(labels.label(name, axis), f"{node} attends along this axis")


def _further_outputs(node: Node, labels: Labels) -> list[tuple[int, str]]:
    """(index, name) of the outputs behind the first that something reads."""
    named = enumerate(node.outputs[1:])
    return [(i, n) for i, n in named if n and (labels.readers(n) or labels.is_output(n))]


def _states(
    node: Node,
    labels: Labels,
    units: Ints,
    heads: int,
) -> None:
    """Keys and values (or logits) as further outputs, of shape (batch, heads, ...)."""
    for index, name in _further_outputs(node, labels):
        logits = index >= 2
        if logits:
            per_head = np.repeat(units, heads // len(units))
        else:
            per_head = units
        labels.set(name, [None, per_head, None, None], f"{node} gives it out head by head")


# ----------------------------------------------------------------------------------------------------- the operators


def _multi_head(node: Node, labels: Labels) -> None:
    heads = _count(node, "num_heads")
    bias = operand(node, 3)
    widths = [(labels.shape(name) or ())[-1:] for name in node.inputs[:3]]
    total = sum(width[0] for width in widths if width)
    if bias and (not labels.is_constant(bias) or labels.shape(bias) != (total,)):
        opaque(node, labels, f"{node} has a bias that is not followed")
        return
    if all(operand(node, slot) for slot in range(3)) and len(set(widths)) > 1:
        opaque(node, labels, f"{node} has values of another width than its queries")
        return
    if not _separate(node, labels, _Form(heads, heads, added=5, past=(6, 7, 8, 9))):
        return
    mask = operand(node, 4)
    if mask:
        labels.pin_all(mask, f"{node} takes it as a mask")
    if bias:
        rows = [_tracked(labels, name, 2) for name in node.inputs[:3]]
        labels.tie(_tracked(labels, bias, 0), np.concatenate(rows))


def _group_query(node: Node, labels: Labels) -> None:
    heads = _count(node, "num_heads")
    groups = _count(node, "kv_num_heads")
    for slot in ANGLES:
        if name := operand(node, slot):
            labels.pin_all(name, f"{node} takes angles or positions from it")
    sink = operand(node, SINK)
    unknown = [name for name in node.inputs[SINK + 1 :] if name]
    if unknown:
        opaque(node, labels, f"{node} takes '{shortened(unknown[0])}', which is not followed")
        return
    if sink and (not labels.is_constant(sink) or labels.shape(sink) != (heads,)):
        opaque(node, labels, f"{node} takes a logit per head from '{shortened(sink)}'")
        return
    is_followed = _separate(node, labels, _Form(heads, groups, added=10, past=(3, 4)))
    if is_followed and sink:
        units = _first(_tracked(labels, node.inputs[1], 2), groups)
        _heads(labels, _tracked(labels, sink, 0), units)


def _standard(node: Node, labels: Labels) -> None:
    shape = labels.shape(node.inputs[0])
    if shape is not None and len(shape) == 3:
        heads = _count(node, "q_num_heads")
        groups = _count(node, "kv_num_heads")
        _separate(node, labels, _Form(heads, groups, added=3, past=(4, 5)))
    else:
        _four_axes(node, labels)


def _four_axes(node: Node, labels: Labels) -> None:
    """Query, key and value of shape (batch, heads, length, size)."""
    names = list(node.inputs[:3])
    computed = [name for name in names if not labels.is_constant(name)]
    axes = [x for name in computed if (x := labels.label(name, 1)) is not None]
    reason = _not_four_axes(node, labels, names, len(axes))
    if reason is None:
        units = axes[1]
        heads = (labels.shape(names[0]) or ())[1]
        reason = _per_head(node, labels, 3, units, heads)
    if reason is not None:
        opaque(node, labels, reason)
        return
    for found in axes:
        _heads(labels, found, units)
    for name in names:
        for axis in (0, 2):
            labels.pin(labels.label(name, axis), f"{node} attends along this axis")
    for name in names[:2]:
        labels.pin(labels.label(name, 3), f"{node} scales by the length of this axis")
    size = labels.label(names[2], 3)
    labels.set(node.outputs[0], [None, axes[0], None, size])
    _states(node, labels, units, heads)
    for _, name in _further_outputs(node, labels):
        labels.pin(size, f"{node} gives '{shortened(name)}' as an extra output")


def _not_four_axes(
    node: Node,
    labels: Labels,
    names: list[str],
    followed: int,
) -> str | None:
    """Reason that heads on an axis of their own cannot be followed, None where they can."""
    if any(operand(node, slot) for slot in (4, 5)):
        return f"{node} reads a past state"
    shapes = [shape for name in names if (shape := labels.shape(name)) is not None]
    if len(shapes) < 3 or any(len(shape) != 4 for shape in shapes):
        return f"{node} has an input that is not of shape (batch, heads, length, size)"
    if followed < 3:
        return f"{node} has a query, key or value whose heads are not followed"
    return None


def _packed(node: Node, labels: Labels) -> None:
    """com.microsoft::Attention: one weight (inputs, queries + keys + values), bias of the same columns."""
    x, w = node.inputs[:2]
    heads = _count(node, "num_heads")
    shape = labels.shape(w)
    if shape is not None and len(shape) == 2:
        sizes = _sizes(node, shape[1])
    else:
        sizes = ()
    reason = _not_packed(node, labels, sizes, heads)
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
    bias = operand(node, 2)
    if bias:
        labels.unify([(w, 1), (bias, 0)], node)
    mask = operand(node, 3)
    if mask:
        labels.pin_all(mask, f"{node} takes it as a mask")
    _pin_lengths(node, labels, [x])
    if labels.unify([(x, 2), (w, 0)], node) is not None:
        labels.consume(node, (x, 2), (w, 0))
    labels.set(node.outputs[0], [None, None, np.repeat(units, sizes[2] // heads)])


def _not_packed(
    node: Node,
    labels: Labels,
    sizes: tuple[int, ...],
    heads: int,
) -> str | None:
    """Reason that packed weights cannot be followed, None where they can."""
    bias = operand(node, 2)
    constant = labels.is_constant(node.inputs[1]) and (not bias or labels.is_constant(bias))
    if not constant or not sizes:
        return f"{node} takes its weights from a computation"
    if operand(node, 4) or operand(node, 6) or any(node.outputs[1:]):
        return f"{node} reads or gives out a past state"
    if node.attrs.get("do_rotary"):
        return f"{node} rotates queries and keys"
    if not heads or len(set(sizes)) > 1 or sizes[0] % heads:
        return f"{node} has values of another width than its queries"
    return None


def _sizes(node: Node, columns: int) -> tuple[int, ...]:
    """Widths of queries, keys and values; nothing where they do not add up to the columns."""
    given = tuple(int(n) for n in node.attrs.get("qkv_hidden_sizes", ()))
    sizes = given or (columns // 3,) * 3
    if len(sizes) == 3 and sum(sizes) == columns:
        return sizes
    return ()


# ---------------------------------------------------------------------------------------------------- repair and cost


def _repair(node: Node, cuts: Cuts) -> Edit:
    """Head counts shrink with the channels of queries (and keys), whose heads keep their size."""
    out = node.outputs[0]
    rank = len(cuts.shape(out))
    keep = cuts.keep(out, rank - 1) if rank == 3 else None
    if keep is None:
        return Edit()
    attrs: dict[str, object] = {}
    kept = int(keep.sum())
    for name in ("num_heads", "kv_num_heads", "q_num_heads"):
        if name in node.attrs:
            attrs[name] = int(node.attrs[name]) * kept // len(keep)
    if "qkv_hidden_sizes" in node.attrs:
        attrs["qkv_hidden_sizes"] = [kept] * 3
    return Edit(attrs)


def _products(node: Node, shapes: Shapes) -> tuple[Axis | Total, ...]:
    """Queries times keys, then probabilities times values."""
    q = node.inputs[0]
    k = operand(node, 1)
    out = node.outputs[0]
    if k is None or len(shapes[k]) != len(shapes[q]) or len(shapes[q]) not in (3, 4):
        return (((), 0),)  # packed inputs: nothing there is followed
    rank = len(shapes[q])
    length = rank - 2
    size = rank - 1
    widths: Total = (((q, size), (out, size)), 0)
    batch_and_heads = ((q, axis) for axis in range(length))
    return (*batch_and_heads, (q, length), (k, length), widths)


def _packed_cost(node: Node, shapes: Shapes) -> tuple[Axis | Total, ...]:
    """Three projections and two products over as many keys as queries, all as wide as the output."""
    x = node.inputs[0]
    w = node.inputs[1]
    out = node.outputs[0]
    sizes = _sizes(node, shapes[w][1])
    if len(set(sizes)) == 1:
        projections = [(w, 0)] * 3
        products = [(x, 1)] * 2
        per_column: Total = ((*projections, *products), 0)
        return ((x, 0), (x, 1), (out, 2), per_column)
    # Widths differ: nothing here may be cut, and the cost is a number.
    batch, length, width = shapes[x]
    projections_cost = width * shapes[w][1]
    if sizes:
        products_cost = length * (sizes[0] + sizes[2])
    else:
        products_cost = 0
    fixed: Total = ((), batch * length * (projections_cost + products_cost))
    return (fixed,)


def _packed_shape(node: Node, constants: Shapes) -> tuple[int, int] | None:
    shape = constants.get(node.inputs[1])
    if shape is None or len(shape) != 2:
        return None
    inputs, columns = shape
    sizes = _sizes(node, columns)
    return (inputs, sizes[2]) if sizes else None


_ATTRIBUTES = {
    "do_rotary": AttributeProto.INT,
    "kv_num_heads": AttributeProto.INT,
    "num_heads": AttributeProto.INT,
    "qkv_hidden_sizes": AttributeProto.INTS,
    "rotary_embedding_dim": AttributeProto.INT,
    "scale": AttributeProto.FLOAT,
    "unidirectional": AttributeProto.INT,
}
"""Types of the attributes of ONNX Runtime's own attention operators."""

SPECS = (
    OpSpec(
        "Attention",
        _packed,
        domain="com.microsoft",
        attributes=_ATTRIBUTES,
        edit=EditRules(_repair),
        cost=_packed_cost,
        shape=LikeProduct(_packed_shape),
    ),
    OpSpec(
        "MultiHeadAttention",
        _multi_head,
        domain="com.microsoft",
        attributes=_ATTRIBUTES,
        edit=EditRules(_repair),
        cost=_products,
        shape=LikeInput(),
    ),
    OpSpec(
        "GroupQueryAttention",
        _group_query,
        domain="com.microsoft",
        attributes=_ATTRIBUTES,
        edit=EditRules(_repair),
        cost=_products,
        shape=LikeInput(),
    ),
    OpSpec("Attention", _standard, since=23, edit=EditRules(_repair), cost=_products),
)
