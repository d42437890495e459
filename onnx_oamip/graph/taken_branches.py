"""Branches of If nodes that all samples take, in place of the nodes: a graph to analyse, and the way back to the file.

Statistics, sensitivities and refits see the main graph only. Where all samples take the same branch of an If, its nodes
stand there while a model is analysed, cut and refitted; afterwards they return into the branch. Nodes and tensors keep
their names on both ways. The units are those of the whole model, so that the other branch is cut as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from onnx import GraphProto, ModelProto, NodeProto

from onnx_oamip.core.records import Coupling, Model
from onnx_oamip.graph import node_order, subgraphs
from onnx_oamip.graph.ops import build


def inline(proto: ModelProto, taken: Mapping[str, bool]) -> tuple[ModelProto, list[str]]:
    """Replaces If nodes of the main graph by the nodes of one of their branches.

    Args:
        proto: A flattened model, which is not changed.
        taken: Condition of every node to replace, by its name.

    Returns:
        The model, and the names of the nodes in it that give the outputs of branches their names outside.
    """
    result = ModelProto()
    result.CopyFrom(proto)
    names = subgraphs.names(proto.graph)
    nodes: list[NodeProto] = []
    returns: list[str] = []
    for node in result.graph.node:
        if node.name not in taken:
            nodes.append(node)
            continue
        branch = subgraphs.bodies(node)[subgraphs.BRANCHES[taken[node.name]]]
        nodes += branch.node
        for output, value in zip(node.output, branch.output, strict=False):
            if not output:
                continue
            name = subgraphs.unused_name(f"{node.name}/taken/{output}", names)
            names.add(name)
            returns.append(name)
            nodes.append(build.identity(value.name, output, name))
    subgraphs.set_nodes(result.graph, nodes)
    _drop_unread(result)
    return result, returns


def coupling_of(whole: Coupling, model: Model) -> Coupling:
    """Restricts the units of a model to the graph in which branches take the place of their nodes.

    Args:
        whole: Units of the model.
        model: The model with the branches in its main graph.

    Returns:
        The same units, with the axes and the consumers of that graph.
    """
    axes = {key: units for key, units in whole.axes.items() if key[0] in model.shapes}
    groups = []
    for group in whole.groups:
        present = {key: n for key, n in group.multiplicity.items() if key[0] in model.shapes}
        groups.append(replace(group, multiplicity=present))
    main = {node.name for node in model.nodes}
    inner = {node.name for node in model.every} - main
    consumers = [c for c in (*whole.consumers, *whole.inside) if c.node in main]
    order = {node.name: i for i, node in enumerate(model.nodes)}
    consumers.sort(key=lambda consumer: order[consumer.node])
    return replace(
        whole,
        axes=axes,
        groups=tuple(groups),
        consumers=tuple(consumers),
        inside=tuple(c for c in whole.inside if c.node in inner),
    )


def put_back(cut: ModelProto, final: ModelProto, returns: Collection[str]) -> ModelProto:
    """Returns the nodes of branches into the If nodes that they were taken from.

    Args:
        cut: The whole model after the same cut, which has the nodes and the other branches.
        final: The graph that :func:`inline` made, cut and refitted.
        returns: Names of the nodes that :func:`inline` added.

    Returns:
        The whole model with the nodes and the constants of ``final``.
    """
    result = ModelProto()
    result.CopyFrom(cut)
    homes = _Homes(result.graph)
    for node in final.graph.node:
        if node.name not in returns:
            homes.place(node)
    stored = {tensor.name: tensor for tensor in result.graph.initializer}
    for tensor in final.graph.initializer:
        if tensor.name in stored:
            stored[tensor.name].CopyFrom(tensor)
        else:
            result.graph.initializer.append(tensor)
    del result.metadata_props[:]
    result.metadata_props.extend(final.metadata_props)
    _drop_unread(result)
    node_order.sort(result.graph)
    return result


class _Homes:
    """Graphs of a model by the nodes in them and the tensors that they make."""

    def __init__(self, main: GraphProto) -> None:
        self._graphs = list(subgraphs.graphs(main))
        self._nodes: dict[str, NodeProto] = {}
        self._graph_of: dict[str, int] = {}
        self._made_in: dict[str, int] = {}
        for i, graph in enumerate(self._graphs):
            self._made_in.update((value.name, i) for value in graph.input)
            for node in graph.node:
                self._nodes[node.name] = node
                self._graph_of[node.name] = i
                self._made_in.update((name, i) for name in node.output if name)

    def place(self, node: NodeProto) -> None:
        """Updates the node of the same name; a new node comes into the innermost graph that it reads from."""
        held = self._nodes.get(node.name)
        if held is None:
            # Inner graphs come behind those around them.
            home = max((self._made_in.get(name, 0) for name in node.input), default=0)
            self._graphs[home].node.append(node)
        else:
            home = self._graph_of[node.name]
            _update(held, node)
        self._made_in.update((name, home) for name in node.output if name)


def _update(held: NodeProto, node: NodeProto) -> None:
    """Gives a node the inputs, outputs and attributes of another; its subgraphs stay."""
    held.input[:] = node.input
    held.output[:] = node.output
    inner = {body.name for body in held.attribute if body.HasField("g") or body.graphs}
    own = [attribute for attribute in held.attribute if attribute.name in inner]
    kept = [type(attribute).FromString(attribute.SerializeToString()) for attribute in own]
    del held.attribute[:]
    held.attribute.extend(kept)
    held.attribute.extend(a for a in node.attribute if a.name not in inner)


def _drop_unread(proto: ModelProto) -> None:
    """Removes nodes and initialisers that nothing reads, in place."""
    main = proto.graph
    while True:
        read = {value.name for graph in subgraphs.graphs(main) for value in graph.output}
        for node in subgraphs.nodes(main):
            read.update(node.input)
        dropped = False
        for graph in list(subgraphs.graphs(main)):
            kept = [node for node in graph.node if not read.isdisjoint(filter(None, node.output))]
            if len(kept) < len(graph.node):
                subgraphs.set_nodes(graph, kept)
                dropped = True
                break  # a graph that changes holds new copies of the subgraphs within it
        if not dropped:
            break
    inputs = {value.name for value in main.input}
    tensors = [t for t in main.initializer if t.name in read or t.name in inputs]
    if len(tensors) < len(main.initializer):
        copies = [type(t).FromString(t.SerializeToString()) for t in tensors]
        del main.initializer[:]
        main.initializer.extend(copies)
