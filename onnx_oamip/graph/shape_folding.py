"""Replacement of computed shapes by constants, where that is provably the same; dynamic axes stay dynamic.

A constant width can be cut, one that is read at run time cannot. The rules for single operators are in
``ops.shape_targets``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, helper, numpy_helper

from onnx_oamip.graph import subgraphs
from onnx_oamip.graph.ops import build, kinds
from onnx_oamip.graph.ops.shape_targets import RULES, drop_expand, is_list_of_lengths
from onnx_oamip.graph.shape_inference import (
    Values,
    known_values,
    symbol_homes,
)
from onnx_oamip.graph.symbolic_dims import Dims, Entries, Size, lengths, numbers


class _Editor:
    """The targets of one round over a graph (``ops.shape_targets.Targets``): adds constants and small nodes."""

    def __init__(self, proto: ModelProto) -> None:
        self.proto = proto
        self.graph = proto.graph
        self.version = {o.domain: o.version for o in proto.opset_import}.get("", 1)
        self.known: Values = known_values(proto)
        self.homes = symbol_homes(proto, self.known.dims)
        self.constants = {t.name for t in self.graph.initializer}
        self.taken = set(self.constants)
        for node in self.graph.node:
            self.taken.update((*node.output, node.name))
        self.taken.update(value.name for value in self.graph.input)
        # Nodes to insert, by the place of the node that reads them.
        self.before: dict[int, list[NodeProto]] = {}
        self.producers = {n: node for node in self.graph.node for n in node.output}
        self.changed = False

    def unused(self, stem: str) -> str:
        """The stem, or with a number where it is taken."""
        result = stem
        number = 1
        while result in self.taken:
            result = f"{stem}_{number}"
            number += 1
        self.taken.add(result)
        return result

    def constant(self, stem: str, value: npt.NDArray[Any]) -> str:
        name = self.unused(stem)
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        self.constants.add(name)
        return name

    def entries(self, tensor: str) -> Entries | None:
        found = self.known.entries.get(tensor)
        return found if found is not None and found.ndim == 1 else None

    def lengths(self, tensor: str) -> Entries | None:
        return lengths(tensor, self.known.dims)

    def read(self, node: NodeProto, slot: int, name: str) -> None:
        while len(node.input) <= slot:
            node.input.append("")
        node.input[slot] = name
        self.changed = True

    def joined(
        self,
        at: int,
        node: NodeProto,
        slot: int,
        *,
        wanted: Sequence[Any],
        source: Sequence[int],
    ) -> None:
        old = node.input[slot]
        stem = node.output[0]
        inserted = self.before.setdefault(at, [])

        def insert(suffix: str, make: Callable[[str, str], NodeProto]) -> str:
            out = self.unused(f"{stem}_{suffix}")
            inserted.append(make(out, self.unused(f"{out}_node")))
            return out

        pieces = []
        for value, place in zip(wanted, source, strict=True):
            if not isinstance(value, Size):
                pieces.append(self.constant(f"{stem}_length", np.asarray([value], np.int64)))
                continue
            tensor = old
            index = place
            home = self.homes.get(value.symbol or "")
            if home is not None:
                tensor = insert("shape", partial(build.shape_of, home[0]))
                index = home[1]
            pick = self.constant(f"{stem}_place", np.asarray([index], np.int64))
            pieces.append(insert("gather", partial(build.gather, tensor, pick)))
        joined = insert("concat", partial(build.concat, pieces))
        self.read(node, slot, joined)

    def expanded(
        self,
        at: int,
        node: NodeProto,
        *,
        known: Sequence[int],
        wanted: Sequence[Any],
    ) -> None:
        out = node.output[0]
        lengths = self.constant(f"{out}_lengths", np.asarray(known, np.int64))
        whole = self.unused(f"{out}_one")
        self.before.setdefault(at, []).append(
            build.renamed(node, lengths, whole, self.unused(f"{whole}_node"))
        )
        build.become_expand(node, whole)
        self.joined(at, node, 1, wanted=wanted, source=range(len(wanted)))

    def producer(self, tensor: str, op: str) -> NodeProto | None:
        node = self.producers.get(tensor)
        if node is not None and node.op_type == op:
            return node
        return None

    def consumers(self, tensor: str) -> list[NodeProto]:
        return [node for node in self.graph.node if tensor in node.input]

    def is_output(self, tensor: str) -> bool:
        return any(value.name == tensor for value in self.graph.output)

    def dims(self, tensor: str) -> Dims | None:
        return self.known.dims.get(tensor)

    def dtype(self, tensor: str) -> np.dtype[Any]:
        kind = self.known.types.get(tensor)
        if kind is None:
            (kind,) = (t.data_type for t in self.graph.initializer if t.name == tensor)
        return helper.tensor_dtype_to_np_dtype(kind)

    def become_transpose(
        self,
        node: NodeProto,
        source: str,
        perm: Sequence[int],
    ) -> None:
        build.become_transpose(node, source, perm)
        self.changed = True

    def canonical(self, name: str) -> bool:
        node = self.producers.get(name)
        return node is not None and is_list_of_lengths(node)


def fold(proto: ModelProto) -> bool:
    """Run one round on a normalised graph, in place. Nodes that lose their readers stay.

    Args:
        proto: The model.

    Returns:
        True if anything changed.
    """
    if not any(n.op_type in kinds.SHAPE for n in proto.graph.node):
        return False
    edit = _Editor(proto)
    _fold_known_values(edit)
    for at, node in enumerate(proto.graph.node):
        drop_expand(node, edit)
        slot, rule = RULES.get(node.op_type, (0, None))
        if rule is not None and slot < len(node.input) and node.input[slot] not in edit.constants:
            rule(node, at, edit)
    if edit.before:
        _insert(proto, edit.before)
    return edit.changed


def _fold_known_values(edit: _Editor) -> None:
    """Replace integer tensors whose elements are all known by constants of the same name."""
    outputs = {value.name for value in edit.graph.output}
    # A node of which another output is unknown stays, and its replaced output must not be replaced in every round.
    read = {name for node in edit.graph.node for name in subgraphs.reads(node)}
    types = edit.known.types
    for node in edit.graph.node:
        for slot, name in enumerate(node.output):
            entries = edit.known.entries.get(name)
            if entries is None or name in outputs or name not in types or not numbers(entries):
                continue
            if name not in read:
                continue
            node.output[slot] = edit.unused(f"{name}_computed")
            dtype = helper.tensor_dtype_to_np_dtype(types[name])
            value = np.asarray(entries.astype(dtype))
            edit.graph.initializer.append(numpy_helper.from_array(value, name))
            edit.constants.add(name)
            edit.changed = True


def _insert(proto: ModelProto, before: Mapping[int, Sequence[NodeProto]]) -> None:
    """Insert nodes in front of those at some places."""
    nodes: list[NodeProto] = []
    for at, node in enumerate(proto.graph.node):
        nodes += [*before.get(at, ()), node]
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
