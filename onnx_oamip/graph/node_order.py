"""Order of nodes: ONNX demands that nodes stand behind those that they read; converters do not always keep to it."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set

from onnx import GraphProto, NodeProto

from onnx_oamip.core.errors import ModelError
from onnx_oamip.core.printable import shortened
from onnx_oamip.graph import subgraphs

LONGEST_CYCLE = 6
"""Nodes of a cycle that an error message names."""


def sort(graph: GraphProto, outer: Set[str] = frozenset()) -> None:
    """Sorts the nodes of a graph and of the subgraphs within it topologically.

    Nodes keep their order as far as possible: a sorted graph stays as it is. Works in place.

    Args:
        graph: The graph.
        outer: Tensors that are defined around it.

    Raises:
        ModelError: The nodes have no such order, because some of them read each other's outputs.
    """
    defined = {value.name for value in graph.input} | outer
    defined.update(tensor.name for tensor in graph.initializer)
    defined.update(sparse.values.name for sparse in graph.sparse_initializer)
    producers: dict[str, int] = {}
    for i, node in enumerate(graph.node):
        for name in node.output:
            if name and name not in defined:
                producers.setdefault(name, i)
    visible = defined.union(producers)
    for node in graph.node:
        for body in subgraphs.all_bodies(node):
            sort(body, visible)
    needs = [
        {producers[name] for name in subgraphs.reads(node) if name in producers}
        for node in graph.node
    ]
    if all(max(needed, default=-1) < i for i, needed in enumerate(needs)):
        return
    order = _topological(needs)
    if len(order) < len(needs):
        raise ModelError(_cycle_message(graph.node, needs, set(order)))
    subgraphs.set_nodes(graph, [graph.node[i] for i in order])


def _topological(needs: Sequence[Set[int]]) -> list[int]:
    """Positions in topological order, of equal ones the lowest first; nodes in or behind a cycle are left out."""
    readers: Mapping[int, list[int]] = defaultdict(list)
    for i, needed in enumerate(needs):
        for j in needed:
            readers[j].append(i)
    open_needs = [len(needed) for needed in needs]
    ready = [i for i, count in enumerate(open_needs) if not count]
    order: list[int] = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for reader in readers[i]:
            open_needs[reader] -= 1
            if not open_needs[reader]:
                heapq.heappush(ready, reader)
    return order


def _cycle_message(
    nodes: Sequence[NodeProto],
    needs: Sequence[Set[int]],
    sorted_: Set[int],
) -> str:
    cycle = _cycle(needs, sorted_)
    named = [_described(nodes[i]) for i in (*cycle[:LONGEST_CYCLE], cycle[0])]
    if len(cycle) > LONGEST_CYCLE:
        named.insert(LONGEST_CYCLE, f"{len(cycle) - LONGEST_CYCLE} more")
    return (
        f"the graph has a cycle of {len(cycle)} nodes, each of which reads an output of the next "
        f"({' <- '.join(named)}), so that none of them can be computed first; export the model again."
    )


def _cycle(needs: Sequence[Set[int]], sorted_: Iterable[int]) -> list[int]:
    """Positions of the nodes of one cycle; each needs the next."""
    done = set(sorted_)
    path: list[int] = []
    position: dict[int, int] = {}
    i = next(i for i in range(len(needs)) if i not in done)
    while i not in position:
        position[i] = len(path)
        path.append(i)
        # A node that could not be sorted needs another such node.
        i = min(j for j in needs[i] if j not in done)
    return path[position[i] :]


def _described(node: NodeProto) -> str:
    name = node.name or next((name for name in node.output if name), "")
    return f"{node.op_type} '{shortened(name)}'"
