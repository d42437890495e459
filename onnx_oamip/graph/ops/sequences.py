"""Sequences and optional values whose elements are known before the model runs, written out as tensors.

Exporters keep the lists of a program as sequences. Channels are followed through tensors only, so nodes that take a
tensor out of a sequence, or join all of them, are replaced by nodes that read the tensors.

Reference: ONNX operator specification, sequence and optional operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnx_oamip.graph import subgraphs

SPLIT_BY_INPUT = 13
"""Opset from which Split takes its lengths as an input."""
AXES_BY_INPUT = 13
"""Opset from which Unsqueeze and Squeeze take their axes as an input."""


def write_out(proto: ModelProto) -> None:
    """Replace nodes that read a sequence of known tensors, in place. Bodies of nodes are left as they are.

    Args:
        proto: The model, its nodes in topological order.
    """
    if not any(node.op_type in _MAKERS and not node.domain for node in proto.graph.node):
        return
    unrolled = _Unrolled(proto)
    nodes = [made for node in proto.graph.node for made in unrolled.replaced(node)]
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
    _drop_unread(proto.graph, set(unrolled.elements))


def _drop_unread(graph: GraphProto, made: set[str]) -> None:
    """Remove nodes that make a known sequence which nothing reads any more."""
    readers = Counter(name for node in graph.node for name in subgraphs.reads(node))
    readers.update(value.name for value in graph.output)
    for node in reversed(list(graph.node)):
        makes_sequence = not node.domain and (node.op_type in _MAKERS or node.op_type == "Identity")
        if makes_sequence and made.issuperset(node.output) and not readers[node.output[0]]:
            readers.subtract(node.input)
            graph.node.remove(node)


class _Unrolled:
    """The tensors of every sequence that is known, and the nodes written in place of its readers."""

    def __init__(self, proto: ModelProto) -> None:
        graph = proto.graph
        self.version = {o.domain: o.version for o in proto.opset_import}.get("", 1)
        self.elements: dict[str, list[str]] = {}
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and not node.domain:
                for attribute in node.attribute:
                    if attribute.name == "value":
                        self._stored[node.output[0]] = attribute.t
                    elif attribute.name in ("value_int", "value_ints"):
                        value = np.asarray(helper.get_attribute_value(attribute), np.int64)
                        self._stored[node.output[0]] = numpy_helper.from_array(value)
        given = {value.name for value in graph.input}
        self._stored = {
            name: tensor
            for name, tensor in self._stored.items()
            if name not in given and tensor.data_location != TensorProto.EXTERNAL
        }
        self._taken = {value.name for value in (*graph.input, *graph.output)} | set(self._stored)
        for node in graph.node:
            self._taken.update((*node.input, *node.output))

    def replaced(self, node: NodeProto) -> Sequence[NodeProto]:
        """The nodes in place of one; itself where it reads no known sequence."""
        write = None if node.domain else _WRITERS.get(node.op_type)
        made = None if write is None else write(self, node)
        return (node,) if made is None else made

    def integers(self, node: NodeProto, slot: int) -> list[int] | None:
        """Whole numbers of a constant input; None where it is absent or computed."""
        tensor = self._stored.get(node.input[slot]) if slot < len(node.input) else None
        if tensor is None:
            return None
        return [int(v) for v in numpy_helper.to_array(tensor).reshape(-1)]

    def is_vector(self, name: str) -> bool:
        """True for a constant of one axis."""
        return name in self._stored and len(self._stored[name].dims) == 1

    def place(self, node: NodeProto, slot: int, length: int) -> int | None:
        """Position in a sequence of this length; None where it is computed or outside."""
        found = self.integers(node, slot)
        if found is None or not -length <= found[0] < length:
            return None
        return found[0] % length

    def new(self, name: str) -> str:
        """An unused name."""
        number = 0
        result = name
        while result in self._taken:
            number += 1
            result = f"{name}_{number}"
        self._taken.add(result)
        return result

    def constant(self, name: str, value: list[int]) -> NodeProto:
        """A constant of whole numbers."""
        tensor = numpy_helper.from_array(np.asarray(value, np.int64))
        return helper.make_node("Constant", [], [self.new(name)], value=tensor)

    def view(self, op: str, source: str, axis: int, out: str, name: str) -> tuple[NodeProto, ...]:
        """Unsqueeze or Squeeze of one axis."""
        if self.version < AXES_BY_INPUT:
            return (helper.make_node(op, [source], [out], name, axes=[axis]),)
        axes = self.constant(f"{out}_axis", [axis])
        return axes, helper.make_node(op, [source, axes.output[0]], [out], name)


def _attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _known(unrolled: _Unrolled, node: NodeProto) -> list[str] | None:
    return unrolled.elements.get(node.input[0]) if node.input else None


def _construct(unrolled: _Unrolled, node: NodeProto) -> None:
    unrolled.elements[node.output[0]] = list(node.input)


def _empty(unrolled: _Unrolled, node: NodeProto) -> None:
    unrolled.elements[node.output[0]] = []


def _copy(unrolled: _Unrolled, node: NodeProto) -> None:
    found = _known(unrolled, node)
    if found is not None:
        unrolled.elements[node.output[0]] = found


def _insert(unrolled: _Unrolled, node: NodeProto) -> None:
    found = _known(unrolled, node)
    if found is None:
        return
    has_place = len(node.input) > 2 and bool(node.input[2])
    # Inserted behind the last one by default, so that one place more is allowed.
    place = unrolled.place(node, 2, len(found) + 1) if has_place else len(found)
    given = unrolled.integers(node, 2) if has_place else None
    if place is None or (given is not None and given[0] < 0):
        return
    unrolled.elements[node.output[0]] = [*found[:place], node.input[1], *found[place:]]


def _erase(unrolled: _Unrolled, node: NodeProto) -> None:
    found = _known(unrolled, node)
    if not found:
        return
    has_place = len(node.input) > 1 and bool(node.input[1])
    place = unrolled.place(node, 1, len(found)) if has_place else len(found) - 1
    if place is not None:
        unrolled.elements[node.output[0]] = [*found[:place], *found[place + 1 :]]


def _split(unrolled: _Unrolled, node: NodeProto) -> list[NodeProto] | None:
    lengths = unrolled.integers(node, 1)
    if lengths is None or not unrolled.is_vector(node.input[1]):
        return None  # the number of parts depends on the length of the axis
    axis = _attribute(node, "axis", 0)
    outs = [unrolled.new(f"{node.output[0]}_{i}") for i in range(len(lengths))]
    unrolled.elements[node.output[0]] = outs
    name = f"{node.name or node.output[0]}/Split"
    made = [node]  # the sequence itself may have other readers
    if unrolled.version < SPLIT_BY_INPUT:
        made.append(
            helper.make_node("Split", [node.input[0]], outs, name, axis=axis, split=lengths)
        )
    else:
        held = unrolled.constant(f"{node.output[0]}_lengths", lengths)
        made += [
            held,
            helper.make_node("Split", [node.input[0], held.output[0]], outs, name, axis=axis),
        ]
    return made


def _at(unrolled: _Unrolled, node: NodeProto) -> list[NodeProto] | None:
    found = _known(unrolled, node)
    place = None if found is None else unrolled.place(node, 1, len(found))
    if found is None or place is None:
        return None
    return [helper.make_node("Identity", [found[place]], node.output, node.name)]


def _length(unrolled: _Unrolled, node: NodeProto) -> list[NodeProto] | None:
    found = _known(unrolled, node)
    if found is None:
        return None
    tensor = numpy_helper.from_array(np.asarray(len(found), np.int64))
    return [helper.make_node("Constant", [], node.output, node.name, value=tensor)]


def _concatenate(unrolled: _Unrolled, node: NodeProto) -> list[NodeProto] | None:
    found = _known(unrolled, node)
    if not found:
        return None
    axis = _attribute(node, "axis")
    made: list[NodeProto] = []
    if _attribute(node, "new_axis", 0):
        wide = [unrolled.new(f"{node.output[0]}_{i}") for i in range(len(found))]
        for source, out in zip(found, wide, strict=True):
            made += unrolled.view("Unsqueeze", source, axis, out, f"{out}/Unsqueeze")
        found = wide
    return [*made, helper.make_node("Concat", found, node.output, node.name, axis=axis)]


def _element(unrolled: _Unrolled, node: NodeProto) -> list[NodeProto] | None:
    found = _known(unrolled, node)
    if found is None or len(found) != 1:
        return None
    return [helper.make_node("Identity", found, node.output, node.name)]


def _optional(unrolled: _Unrolled, node: NodeProto) -> None:
    if len(node.input) == 1 and node.input[0] not in unrolled.elements:
        unrolled.elements[node.output[0]] = [node.input[0]]


_Writer = Callable[[_Unrolled, NodeProto], list[NodeProto] | None]
_MAKERS: dict[str, _Writer] = {
    "SequenceConstruct": _construct,
    "SequenceEmpty": _empty,
    "SequenceInsert": _insert,
    "SequenceErase": _erase,
    "SplitToSequence": _split,
    "Optional": _optional,
}
"""Operators that make a sequence or an optional value."""
_WRITERS: dict[str, _Writer] = {
    **_MAKERS,
    "Identity": _copy,
    "SequenceAt": _at,
    "SequenceLength": _length,
    "ConcatFromSequence": _concatenate,
    "OptionalGetElement": _element,
}
