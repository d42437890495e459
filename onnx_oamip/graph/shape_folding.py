"""Replacement of computed shapes by constants, where that is provably the same; dynamic axes stay dynamic.

A constant width can be cut, one that is read at run time cannot. The rules for single operators are in
``ops.shape_targets``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from onnx_oamip.graph.ops import build, kinds
from onnx_oamip.graph.ops.shape_targets import RULES, drop_expand, is_list_of_lengths
from onnx_oamip.graph.shape_inference import (
    Dims,
    Values,
    known_values,
    symbol_homes,
)
from onnx_oamip.graph.symbolic_dims import Entries, Size, lengths, numbers


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

        def insert(stem: str, make: Callable[[str, str], NodeProto]) -> str:
            out = self.name(f"{node.output[0]}_{stem}")
            made.append(make(out, self.name(f"{out}_node")))
            return out

        for value, place in zip(wanted, source, strict=True):
            home = self.homes.get(value.symbol or "") if isinstance(value, Size) else None
            if not isinstance(value, Size):
                pieces.append(
                    self.constant(f"{node.output[0]}_length", np.asarray([value], np.int64))
                )
                continue
            tensor = old if home is None else insert("shape", partial(build.shape_of, home[0]))
            index = place if home is None else home[1]
            pick = self.constant(f"{node.output[0]}_place", np.asarray([index], np.int64))
            pieces.append(insert("gather", partial(build.gather, tensor, pick)))
        self.read(node, slot, insert("concat", partial(build.concat, pieces)))

    def producer(self, tensor: str, op: str) -> NodeProto | None:
        node = self.makers.get(tensor)
        return node if node is not None and node.op_type == op else None

    def consumers(self, tensor: str) -> list[NodeProto]:
        return [node for node in self.graph.node if tensor in node.input]

    def is_output(self, tensor: str) -> bool:
        return any(value.name == tensor for value in self.graph.output)

    def dims(self, tensor: str) -> Dims | None:
        return self.facts.dims.get(tensor)

    def become_transpose(self, node: NodeProto, source: str, perm: Sequence[int]) -> None:
        build.become_transpose(node, source, perm)
        self.changed = True

    def canonical(self, name: str) -> bool:
        """Whether a list is joined from single numbers and lengths already."""
        node = self.makers.get(name)
        return node is not None and is_list_of_lengths(node)


def fold(proto: ModelProto) -> bool:
    """One round on a normalised graph, in place; whether anything changed. What is left without readers stays."""
    if not any(n.op_type in kinds.SHAPE for n in proto.graph.node):
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
        drop_expand(node, edit)
        slot, rule = RULES.get(node.op_type, (0, None))
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
