"""Part of a graph that is trained: all of it, or what lies in front of or behind nodes that torch cannot compute."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_oamip.core.records import Model, Node
from onnx_oamip.graph.outputs import is_float


@dataclass(frozen=True)
class Part:
    """Part of a model that is computed and trained.

    Attributes:
        tensors: Tensors that are compared with the original's.
        given: Tensors that ONNX Runtime computes with the weights as they are.
        weights: Initialisers that are trained.
    """

    tensors: tuple[str, ...]
    given: tuple[str, ...]
    weights: tuple[str, ...]


Weights = Callable[[Sequence[Node]], Sequence[str]]
"""Initialisers that training may change, of some nodes."""


def ancestors(model: Model, tensors: Iterable[str], given: Collection[str] = ()) -> list[Node]:
    """List the nodes that tensors depend on.

    Args:
        model: The model.
        tensors: Names of tensors.
        given: Tensors that are fed, whose producers are not needed.

    Returns:
        The nodes in graph order.
    """
    needed = {name for name in tensors if name not in given}
    found: list[Node] = []
    for node in reversed(model.nodes):
        if needed.intersection(node.outputs):
            found.append(node)
            needed.update(n for n in (*node.inputs, *node.captures) if n and n not in given)
    return found[::-1]


def choose(
    model: Model,
    tensors: Sequence[str],
    blocked: Collection[str],
    weights: Weights,
) -> Part:
    """Choose the part to train: of two, the one with more elements of weights.

    Args:
        model: The pruned model.
        tensors: Tensors that can be compared: those of the objective and features.
        blocked: Names of nodes that cannot be computed.
        weights: Initialisers that training may change.

    Returns:
        The whole where nothing that the tensors depend on is blocked; else the part in front of the blocked nodes, or
        the one behind them. Its weights are empty where nothing can be trained.
    """
    nodes = ancestors(model, tensors)
    stops = [node for node in nodes if node.name in blocked]
    if not stops:
        return Part(tuple(tensors), (), tuple(weights(nodes)))
    front = _front(model, nodes, stops, tensors, weights)
    behind = _behind(model, stops, tensors, weights)
    return max(front, behind, key=lambda part: _elements(model, part.weights))


def _front(
    model: Model,
    nodes: Sequence[Node],
    stops: Sequence[Node],
    tensors: Sequence[str],
    weights: Weights,
) -> Part:
    """Tensors that depend on no blocked node, with the weights in front of them."""
    reached = _descendants(nodes, stops)
    behind = {name for node in nodes if node.name in reached for name in node.outputs}
    kept = tuple(name for name in tensors if name not in behind)
    return Part(kept, (), tuple(weights(ancestors(model, kept))))


def _behind(
    model: Model,
    stops: Sequence[Node],
    tensors: Sequence[str],
    weights: Weights,
) -> Part:
    """Weights that no blocked node depends on, with the tensors that depend on them."""
    given = tuple(name for node in stops for name in node.outputs if name)
    fixed = set(weights(ancestors(model, given)))
    computed = ancestors(model, tensors, given)
    trained = tuple(name for name in weights(computed) if name not in fixed)
    readers = [n for n in computed if set(trained) & {model.source(i) for i in n.inputs}]
    reached = _descendants(computed, readers)
    outputs = {name for node in computed if node.name in reached for name in node.outputs}
    kept = tuple(name for name in tensors if name in outputs)
    needed = {name for node in ancestors(model, kept, given) for name in node.inputs}
    return Part(kept, tuple(name for name in given if name in needed), trained if kept else ())


def _descendants(nodes: Sequence[Node], sources: Iterable[Node]) -> set[str]:
    """Names of some nodes and of all that read what they compute."""
    reached = {node.name for node in sources}
    tensors: set[str] = set()
    for node in nodes:
        if node.name in reached or tensors.intersection((*node.inputs, *node.captures)):
            reached.add(node.name)
            tensors.update(name for name in node.outputs if name)
    return reached


def _elements(model: Model, names: Iterable[str]) -> int:
    return sum(int(np.prod(model.shapes[name])) for name in names)


def floating(model: Model, tensors: Iterable[str]) -> list[str]:
    """Select the tensors of a floating type.

    Args:
        model: The model.
        tensors: Names of tensors.

    Returns:
        Those of which the type is known and floating.
    """
    return [name for name in tensors if name in model.dtypes and is_float(model.dtypes[name])]
