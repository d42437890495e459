"""Computed shapes become constants, where that is provably the same; axes that are dynamic stay dynamic.

An exporter computes the target of a Reshape, Expand or Resize from the shapes of other tensors, although only a batch
or a sequence length is open. A constant width can be cut, one that is read at run time cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from onnx_oamip.graph.shape_inference import (
    Dims,
    Values,
    known_values,
    symbol_homes,
)
from onnx_oamip.graph.symbolic_dims import (
    Entries,
    Size,
    Unknown,
    divide,
    lengths,
    numbers,
)


class _Editor:
    """One round over a graph: constants and small nodes are added, inputs of nodes replaced."""

    def __init__(self, proto: ModelProto) -> None:
        self.proto = proto
        self.graph = proto.graph
        self.version = {o.domain: o.version for o in proto.opset_import}.get("", 1)
        self.facts: Values = known_values(proto)
        self.homes = symbol_homes(proto, self.facts.dims)
        self.constants = {t.name for t in self.graph.initializer}
        self.taken = self.constants | {
            n for node in self.graph.node for n in (*node.output, node.name)
        }
        self.taken |= {v.name for v in self.graph.input}
        self.before: dict[int, list[NodeProto]] = {}
        self.makers = {n: node for node in self.graph.node for n in node.output}
        self.changed = False

    def name(self, stem: str) -> str:
        result, i = stem, 1
        while result in self.taken:
            result, i = f"{stem}_{i}", i + 1
        self.taken.add(result)
        return result

    def constant(self, stem: str, value: npt.NDArray[Any]) -> str:
        name = self.name(stem)
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        self.constants.add(name)
        return name

    def entries(self, tensor: str) -> Entries | None:
        return self.facts.entries.get(tensor)

    def lengths(self, tensor: str) -> Entries | None:
        return lengths(tensor, self.facts.dims)

    def read(self, node: NodeProto, slot: int, name: str) -> None:
        while len(node.input) <= slot:
            node.input.append("")
        node.input[slot] = name
        self.changed = True

    def joined(
        self, at: int, node: NodeProto, slot: int, wanted: Sequence[Any], source: Sequence[int]
    ) -> None:
        """Give ``node`` a list of numbers and of lengths read where they come from; ``source``: old places."""
        old, pieces = node.input[slot], []
        made = self.before.setdefault(at, [])

        def step(op: str, inputs: list[str], **attrs: Any) -> str:
            out = self.name(f"{node.output[0]}_{op.lower()}")
            made.append(helper.make_node(op, inputs, [out], self.name(f"{out}_node"), **attrs))
            return out

        for value, place in zip(wanted, source, strict=True):
            home = self.homes.get(value.symbol or "") if isinstance(value, Size) else None
            if not isinstance(value, Size):
                pieces.append(
                    self.constant(f"{node.output[0]}_length", np.asarray([value], np.int64))
                )
                continue
            tensor = old if home is None else step("Shape", [home[0]])
            index = place if home is None else home[1]
            pick = self.constant(f"{node.output[0]}_place", np.asarray([index], np.int64))
            pieces.append(step("Gather", [tensor, pick], axis=0))
        self.read(node, slot, step("Concat", pieces, axis=0))

    def canonical(self, name: str) -> bool:
        """Whether a list is joined from single numbers and lengths already."""
        node = self.makers.get(name)
        return node is not None and node.op_type == "Concat" and node.name.endswith("_node")


def _turned(node: NodeProto, edit: _Editor) -> bool:
    """Leading axes merged, the others transposed, the leading ones divided again: that is one transpose.

    torch's exporter writes so the transposed keys of ``scaled_dot_product_attention``.
    """
    transpose = edit.makers.get(node.input[0])
    merge = (
        None
        if transpose is None or transpose.op_type != "Transpose"
        else edit.makers.get(transpose.input[0])
    )
    if transpose is None or merge is None or merge.op_type != "Reshape":
        return False
    before, merged, after = (
        edit.lengths(merge.input[0]),
        edit.entries(merge.input[1]),
        edit.entries(node.input[1]),
    )
    order = [list(a.ints) for a in transpose.attribute if a.name == "perm"]
    if before is None or merged is None or after is None or not order or order[0][0] != 0:
        return False
    lead = len(before) - len(merged) + 1
    perm = [*range(lead), *(lead + i - 1 for i in order[0][1:])]
    same = list(merged[1:]) == list(before[lead:]) and list(after) == [before[i] for i in perm]
    if (
        lead < 1
        or len(after) != len(before)
        or not same
        or any(not isinstance(v, Size) and v < 1 for v in after)
    ):
        return False
    node.op_type, node.input[0] = "Transpose", merge.input[0]
    del node.input[1:], node.attribute[:]
    node.attribute.append(helper.make_attribute("perm", perm))
    edit.changed = True
    return True


def _reshape(node: NodeProto, at: int, edit: _Editor) -> None:  # noqa: ARG001
    if _turned(node, edit):
        return
    target, before = edit.entries(node.input[1]), edit.lengths(node.input[0])
    literal = [a for a in node.attribute if a.name == "allowzero"]
    after = edit.facts.dims.get(node.output[0])
    if any(a.i for a in literal) and (
        target is None or any(not isinstance(v, Size) and v == 0 for v in target)
    ):
        return  # a zero that is meant, or may be
    wanted = None if target is None or before is None else _target(list(target), before)
    if wanted is None:
        wanted = static_target(edit.facts.dims.get(node.input[0]), after)
    if wanted is not None:
        edit.read(node, 1, edit.constant(f"{node.output[0]}_target", np.asarray(wanted, np.int64)))
        for attribute in literal:  # a zero of the new target copies a length
            node.attribute.remove(attribute)


def _target(target: list[Any], before: Entries) -> list[int] | None:
    """The same target in numbers: 0 for a copied length, -1 for at most one that is not known."""
    full = [
        before[i] if isinstance(v, int) and v == 0 and i < len(before) else v
        for i, v in enumerate(target)
    ]
    if -1 in full:  # what is left for it
        place = full.index(-1)
        rest = [v for i, v in enumerate(full) if i != place]
        try:
            full[place] = divide(_product(before), _product(rest))
        except Unknown:
            full[place] = -1
    result = []
    for i, value in enumerate(full):
        copied = isinstance(value, Size) and i < len(before) and before[i] == value
        result.append(0 if copied else -1 if isinstance(value, Size) else int(value))
    return result if result.count(-1) <= 1 else None


def _product(values: Any) -> Any:
    total: Any = 1
    for v in values:
        total = total * v
    return total


def static_target(before: Dims | None, after: Dims | None) -> list[int] | None:
    """A constant target for a reshape between these dimensions, or None where there is no provably equal one."""
    if before is None or after is None or 0 in after:
        return None
    target: list[int] = []
    for axis, size in enumerate(after):
        if isinstance(size, int):
            target.append(size)
        elif size is not None and axis < len(before) and before[axis] == size:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 else None


def _expand(node: NodeProto, at: int, edit: _Editor) -> None:
    """An axis that keeps its length is asked for as 1, whatever the length."""
    target, before = edit.entries(node.input[1]), edit.lengths(node.input[0])
    if target is None or before is None or edit.canonical(node.input[1]):
        return
    shift = len(target) - len(before)
    wanted = [1 if i >= shift and v == before[i - shift] else v for i, v in enumerate(target)]
    if not any(isinstance(v, Size) for v in wanted):
        edit.read(node, 1, edit.constant(f"{node.output[0]}_target", np.asarray(wanted, np.int64)))
    elif any(not isinstance(v, Size) for v in wanted):
        edit.joined(at, node, 1, wanted, range(len(wanted)))


def _resize(node: NodeProto, at: int, edit: _Editor) -> None:
    """Sizes only of the axes that change."""
    if len(node.input) < 4 or not node.input[3] or edit.canonical(node.input[3]):
        return
    target, before = edit.entries(node.input[3]), edit.lengths(node.input[0])
    named = {a.name for a in node.attribute}
    if target is None or before is None or "axes" in named or len(target) != len(before):
        return
    change = [i for i, v in enumerate(target) if v != before[i]]
    wanted = [target[i] for i in change]
    whole = not any(isinstance(v, Size) for v in wanted)
    if not change:
        return
    if edit.version >= 18 and "keep_aspect_ratio_policy" not in named:
        node.attribute.append(helper.make_attribute("axes", change))
        if whole:
            edit.read(
                node, 3, edit.constant(f"{node.output[0]}_sizes", np.asarray(wanted, np.int64))
            )
        else:
            edit.joined(at, node, 3, wanted, change)
    elif whole and all(isinstance(before[i], int) and target[i] % before[i] == 0 for i in change):
        scales = [target[i] / before[i] if i in change else 1.0 for i in range(len(before))]
        edit.read(
            node, 2, edit.constant(f"{node.output[0]}_scales", np.asarray(scales, np.float32))
        )
        del node.input[3:]


def _drop_expand(node: NodeProto, edit: _Editor) -> None:
    """Readers that broadcast anyway, against something of the full shape, need no copies."""
    full, before = edit.lengths(node.output[0]), edit.lengths(node.input[0])
    readers = [n for n in edit.graph.node if node.output[0] in n.input]
    if full is None or before is None or any(v.name == node.output[0] for v in edit.graph.output):
        return
    pairs = [[x for x in n.input if x != node.output[0]] for n in readers]
    if any(
        n.op_type not in ("Add", "Sub", "Mul", "Div") or len(p) != 1
        for n, p in zip(readers, pairs, strict=True)
    ):
        return
    others = [edit.lengths(p[0]) for p in pairs]
    if edit.version >= 7 and all(
        o is not None and len(o) == len(full) and all(o == full) for o in others
    ):
        for n in readers:
            edit.read(n, list(n.input).index(node.output[0]), node.input[0])


_RULES: dict[str, tuple[int, Callable[[NodeProto, int, _Editor], None]]] = {
    "Reshape": (1, _reshape),
    "Expand": (1, _expand),
    "Resize": (3, _resize),
}


def fold(proto: ModelProto) -> bool:
    """One round on a normalised graph, in place; whether anything changed. What is left without readers stays."""
    if not any(n.op_type == "Shape" for n in proto.graph.node):
        return False
    edit = _Editor(proto)
    kept = {v.name for v in proto.graph.output}
    for node in proto.graph.node:
        for i, name in enumerate(node.output):
            entries = edit.entries(name)
            if (
                entries is None
                or name in kept
                or not numbers(entries)
                or name not in edit.facts.types
            ):
                continue
            node.output[i] = edit.name(f"{name}_computed")
            value = np.asarray(
                entries.astype(helper.tensor_dtype_to_np_dtype(edit.facts.types[name]))
            )
            proto.graph.initializer.append(numpy_helper.from_array(value, name))
            edit.constants.add(name)
            edit.changed = True
    for at, node in enumerate(proto.graph.node):
        if node.op_type == "Expand":
            _drop_expand(node, edit)
        slot, rule = _RULES.get(node.op_type, (0, None))
        if rule is not None and slot < len(node.input) and node.input[slot] not in edit.constants:
            rule(node, at, edit)
    if edit.before:
        nodes = [
            n for at, node in enumerate(proto.graph.node) for n in (*edit.before.get(at, ()), node)
        ]
        copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
        del proto.graph.node[:]
        proto.graph.node.extend(copies)
    return edit.changed
