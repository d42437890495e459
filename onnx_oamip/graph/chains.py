"""Chains of nodes behind and in front of a tensor, as long as each tensor between has one consumer.

A linear node is followed by a bias, a batch normalisation or a sum of branches, and preceded by reshapes of its data.
The caller decides through which of them it passes, by traits of operators (:func:`onnx_oamip.graph.ops.has`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from onnx import GraphProto, NodeProto

from onnx_oamip.core.records import Model, Node
from onnx_oamip.graph import subgraphs

N = TypeVar("N", Node, NodeProto)


@dataclass(frozen=True)
class Chains(Generic[N]):
    """Producers and consumers of the tensors of a graph.

    ``consumers`` has a node once for every input that reads the tensor, and once if only its bodies read it;
    ``visible``: tensors that are graph outputs.
    """

    producers: Mapping[str, N]
    consumers: Mapping[str, Sequence[N]]
    visible: frozenset[str]

    def read_once(self, tensor: str) -> bool:
        """Check whether a tensor can be changed for its consumer without affecting another one.

        Args:
            tensor: Name of a tensor.

        Returns:
            True if one input of one node reads it and it is no graph output.
        """
        reads = self.consumers.get(tensor, ())
        return len(reads) == 1 and tensor not in self.visible

    def sole_consumer(self, tensor: str) -> N | None:
        """Return the only consumer of a tensor.

        Args:
            tensor: Name of a tensor.

        Returns:
            The consumer, or None if the tensor is a graph output or is read more than once or not at all.
        """
        if not self.read_once(tensor):
            return None
        return self.consumers[tensor][0]

    def behind(self, tensor: str) -> Iterator[tuple[str, N]]:
        """Yield the chain of sole consumers behind a tensor, along first outputs.

        Args:
            tensor: Name of the tensor to start from.

        Yields:
            A tensor and its only consumer, until one has none.
        """
        while (node := self.sole_consumer(tensor)) is not None:
            yield tensor, node
            if isinstance(node, Node):
                outputs = node.outputs
            else:
                outputs = node.output
            tensor = outputs[0]

    def in_front(self, tensor: str, data_input: Callable[[N], str | None]) -> Iterator[N]:
        """Yield the chain of producers in front of a tensor that nothing else reads.

        Args:
            tensor: Name of the tensor to start from.
            data_input: Names the input of a node along which the chain continues, None where it ends.

        Yields:
            The producers, the last one first.
        """
        source: str | None = tensor
        while source is not None and self.read_once(source):
            node = self.producers.get(source)
            if node is None:
                return
            yield node
            source = data_input(node)


def of_model(model: Model) -> Chains[Node]:
    """Index the graph of a model; a body counts as a consumer of the outer tensors that it reads.

    Args:
        model: The model.

    Returns:
        Its chains.
    """
    return of_nodes(model.nodes, (port.name for port in model.outputs))


def of_nodes(nodes: Iterable[Node], visible: Iterable[str] = ()) -> Chains[Node]:
    """Index some nodes of a graph.

    Args:
        nodes: The only nodes that count as consumers.
        visible: Names of graph outputs.

    Returns:
        Their chains.
    """
    links = ((node, (*node.inputs, *node.captures), node.outputs) for node in nodes)
    return _index(links, visible)


def of_graph(graph: GraphProto) -> Chains[NodeProto]:
    """Index a graph that is being rewritten.

    Args:
        graph: The graph.

    Returns:
        Its chains.
    """
    links = ((node, _reads(node), node.output) for node in graph.node)
    return _index(links, (value.name for value in graph.output))


def _reads(node: NodeProto) -> list[str]:
    """Inputs of a node, and the outer tensors that only its bodies read."""
    inside = [name for name in subgraphs.reads(node) if name not in node.input]
    return [*node.input, *inside]


def _index(
    links: Iterable[tuple[N, Sequence[str], Iterable[str]]], visible: Iterable[str]
) -> Chains[N]:
    """Index nodes with the tensors that they read and write."""
    producers: dict[str, N] = {}
    consumers: dict[str, list[N]] = defaultdict(list)
    for node, reads, writes in links:
        producers.update(dict.fromkeys(writes, node))
        for name in reads:
            consumers[name].append(node)
    return Chains(producers, dict(consumers), frozenset(visible))
