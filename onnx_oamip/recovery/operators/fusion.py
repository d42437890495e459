"""Fusion of nodes that torch computes by one function: GELU that is written out by an error function."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence

import numpy as np

from onnx_oamip.core.records import Model, Node

CLOSE = 1e-6
"""Relative error up to which a stored number is the constant of the formula."""


def fused(model: Model, nodes: Sequence[Node], kept: Collection[str]) -> list[Node]:
    """Replace GELU that is written out by one node each.

    Written out, x * (1 + erf(x / sqrt(2))) / 2 takes five nodes, and its gradient as many passes over the tensor.

    Args:
        model: The model.
        nodes: Nodes in graph order.
        kept: Tensors that are needed besides those that the nodes read.

    Returns:
        Nodes in graph order. A chain is left as it is where one of its inner tensors is needed elsewhere.
    """
    chains = _Chains(model, nodes, kept)
    places = {node.name: place for place, node in enumerate(nodes)}
    found: dict[int, Node | None] = {}
    for node in nodes:
        chain = chains.gelu(node)
        if chain is None:
            continue
        data, parts = chain
        last = parts[-1]
        found.update((places[part.name], None) for part in parts)
        found[places[last.name]] = Node(
            last.name, "Gelu", "com.microsoft", 1, (data,), last.outputs, {}
        )
    every = (found.get(place, node) for place, node in enumerate(nodes))
    return [node for node in every if node is not None]


class _Chains:
    """Search for chains of nodes whose inner tensors nothing else reads."""

    def __init__(self, model: Model, nodes: Sequence[Node], kept: Collection[str]) -> None:
        self._model = model
        self._producers = {name: node for node in nodes for name in node.outputs}
        self._readers: dict[str, list[Node]] = defaultdict(list)
        self._uses = Counter(kept)
        for node in nodes:
            self._uses.update((*node.inputs, *node.captures))
            for name in node.inputs:
                self._readers[name].append(node)

    def gelu(self, erf: Node) -> tuple[str, list[Node]] | None:
        """The input of a GELU and its nodes, the last one at the end; None where the node is no part of one."""
        if erf.op != "Erf":
            return None
        scaled = self._producers.get(erf.inputs[0])
        data = None if scaled is None else self._scaled(scaled)
        if scaled is None or data is None or not self._is_inner(erf.inputs[0]):
            return None
        added = self._reader(erf, "Add")
        if added is None or not self._is_number(_other(added, erf.outputs[0]), 1.0):
            return None
        parts = [scaled, erf, added]
        halved = multiplied = False
        while not (halved and multiplied):
            inner = parts[-1].outputs[0]
            product = self._reader(parts[-1], "Mul")
            if product is None:
                return None
            factor = _other(product, inner)
            half = self._producers.get(factor)
            if not halved and self._is_number(factor, 0.5):
                halved = True
            elif not multiplied and factor == data:
                multiplied = True
            elif not (halved or multiplied) and half is not None and self._is_half(half, data):
                halved = multiplied = True
                parts.insert(0, half)
            else:
                return None
            parts.append(product)
        return data, parts

    def _scaled(self, node: Node) -> str | None:
        """The tensor that a node divides by the root of two."""
        for data, number in (node.inputs, node.inputs[::-1]) if len(node.inputs) == 2 else ():
            is_divided = node.op == "Div" and data == node.inputs[0]
            if is_divided and self._is_number(number, math.sqrt(2)):
                return data
            if node.op == "Mul" and self._is_number(number, math.sqrt(0.5)):
                return data
        return None

    def _is_half(self, node: Node, data: str) -> bool:
        """True for a product of a tensor with one half that one node reads."""
        is_product = node.op == "Mul" and data in node.inputs
        return (
            is_product
            and self._is_number(_other(node, data), 0.5)
            and self._is_inner(node.outputs[0])
        )

    def _reader(self, node: Node, op: str) -> Node | None:
        """The only node that reads the output of another, if it is of an operator."""
        if not self._is_inner(node.outputs[0]):
            return None
        (reader,) = self._readers[node.outputs[0]]
        return reader if reader.op == op else None

    def _is_inner(self, tensor: str) -> bool:
        return self._uses[tensor] == 1 and len(self._readers[tensor]) == 1

    def _is_number(self, tensor: str, number: float) -> bool:
        value = self._model.constants.get(tensor)
        return (
            value is not None and value.size == 1 and bool(np.allclose(value, number, rtol=CLOSE))
        )


def _other(node: Node, tensor: str) -> str:
    """The other input of a node of two inputs."""
    first, second = node.inputs
    return second if first == tensor else first
