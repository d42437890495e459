"""Subgraphs: the branches of If, the bodies of Loop and Scan, and the local functions of a model.

After :func:`flatten` every tensor and node name occurs once in the whole model, and all constants of subgraphs are
initialisers of the main graph. Labels, cuts and costs can then treat the nodes of a subgraph like those of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from itertools import islice

import onnx
import onnx.inliner
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    numpy_helper,
)

from onnx_oamip.core.errors import ModelError
from onnx_oamip.graph.ops import Trait, build, domains, has, kinds

BRANCHES = {True: "then_branch", False: "else_branch"}
OF_FUNCTION = "onnx_oamip.of_function"
"""Doc string of nodes that hold a constant of a function, which the file stores once for all its calls."""
INLINED_NODES = 10_000
"""Nodes that a model may have once its functions are inlined, however few it had before."""
INLINED_GROWTH = 50
"""Factor by which inlining may multiply the number of nodes beyond ``INLINED_NODES``."""


# ------------------------------------------------------------------------------------------------------- traversal


def bodies(node: NodeProto) -> dict[str, GraphProto]:
    """Subgraphs of a node by attribute name.

    Args:
        node: Any node.

    Returns:
        The values of attributes of type GRAPH; lists of graphs are left out.
    """
    return {a.name: a.g for a in node.attribute if a.type == AttributeProto.GRAPH}


def all_bodies(node: NodeProto) -> list[GraphProto]:
    """All subgraphs of a node, those in lists of graphs included.

    Args:
        node: Any node.

    Returns:
        Its subgraphs, without those within them.
    """
    result: list[GraphProto] = []
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            result.append(attribute.g)
        elif attribute.type == AttributeProto.GRAPHS:
            result.extend(attribute.graphs)
    return result


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Iterates over a graph and all subgraphs within it.

    Args:
        graph: Where to start.

    Yields:
        The graph, then its subgraphs, outer ones first.
    """
    yield graph
    for node in graph.node:
        for body in all_bodies(node):
            yield from graphs(body)


def nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Iterates over all nodes of a graph and of the subgraphs within it.

    Args:
        graph: Where to start.

    Returns:
        An iterator over the nodes, those of the graph itself first.
    """
    return (node for part in graphs(graph) for node in part.node)


def names(graph: GraphProto) -> set[str]:
    """Names of all tensors and nodes in a graph and in the subgraphs within it.

    Args:
        graph: Where to start.

    Returns:
        The names, without the empty one of omitted inputs.
    """
    result: set[str] = set()
    for part in graphs(graph):
        result.update(value.name for value in (*part.input, *part.output))
        result.update(tensor.name for tensor in part.initializer)
        for node in part.node:
            result.update((node.name, *node.input, *node.output))
    return result - {""}


def tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Iterates over every tensor that a model stores: initialisers and attributes, in subgraphs and functions too.

    Args:
        proto: The model.

    Yields:
        The tensors, the initialisers of the main graph first.
    """
    parts = list(graphs(proto.graph))
    attributes: list[AttributeProto] = []
    for function in proto.functions:
        attributes.extend(function.attribute_proto)
        for node in function.node:
            for body in all_bodies(node):
                parts.extend(graphs(body))
    for node in nodes_and_function_nodes(proto):
        attributes.extend(node.attribute)

    for part in parts:
        yield from part.initializer
    # The declared type of an attribute is not trusted: a hostile file may store a tensor under another one.
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
    sparse = [tensor for part in parts for tensor in part.sparse_initializer]
    for attribute in attributes:
        sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
    for tensor in sparse:
        yield tensor.values
        yield tensor.indices


def nodes_and_function_nodes(proto: ModelProto) -> Iterator[NodeProto]:
    """Iterates over all nodes of the graph, of its functions, and of the subgraphs in both.

    Args:
        proto: The model.

    Yields:
        The nodes, each before those of its subgraphs.
    """
    for top_nodes in (proto.graph.node, *(function.node for function in proto.functions)):
        for node in top_nodes:
            yield node
            yield from _inner_nodes(node)


def _inner_nodes(node: NodeProto) -> Iterator[NodeProto]:
    return (inner for body in all_bodies(node) for inner in nodes(body))


def reads(node: NodeProto) -> list[str]:
    """Every tensor that a node needs: its inputs and the outer tensors that its subgraphs read.

    Args:
        node: Any node.

    Returns:
        The inputs in order, then the captured tensors by name.
    """
    inputs = [name for name in node.input if name]
    held = all_bodies(node)
    if not held:
        return inputs
    outer = set().union(*(captured(body) for body in held))
    return [*inputs, *sorted(outer - set(inputs))]


def captured(graph: GraphProto) -> set[str]:
    """Outer tensors that a subgraph reads.

    Args:
        graph: The subgraph.

    Returns:
        Names of tensors that are defined outside of it.
    """
    own = {value.name for value in graph.input}
    own.update(tensor.name for tensor in graph.initializer)
    outer: set[str] = set()
    for node in graph.node:
        node_reads = set(node.input).union(*(captured(body) for body in all_bodies(node)))
        outer |= node_reads - own
        own.update(node.output)
    outer |= {value.name for value in graph.output} - own
    return outer - {""}


# ------------------------------------------------------------------------------------------------------- functions


FunctionKey = tuple[str, str, str]
"""Domain, name and overload of a local function."""


def inline(proto: ModelProto) -> ModelProto:
    """Replaces every call of a local function by the nodes of the function.

    Args:
        proto: The model; calls in it get the default values of attributes that they leave out.

    Returns:
        A model without functions, or ``proto`` itself if it has none. Nodes that hold constants of a function have the
        doc string ``OF_FUNCTION``.

    Raises:
        ModelError: A function calls itself, or inlining would multiply the number of nodes beyond reason.
    """
    if not proto.functions:
        return proto
    nodes_before = sum(1 for _ in nodes_and_function_nodes(proto))
    nodes_after = _inlined_size(proto)
    if nodes_after > max(INLINED_NODES, INLINED_GROWTH * nodes_before):
        raise ModelError(
            f"the model has {nodes_before} nodes, and {nodes_after} once its functions are inlined, which is too many; "
            "export it without functions."
        )
    # The inliner forgets the default values that a function declares for attributes which a call leaves out.
    defaults = {(f.domain, f.name, f.overload): f.attribute_proto for f in proto.functions}
    for node in nodes_and_function_nodes(proto):
        given = {a.name for a in node.attribute}
        declared = defaults.get((node.domain, node.op_type, node.overload), ())
        node.attribute.extend(a for a in declared if a.name not in given)
    # Every call gets a copy of the function's constants; the file holds them once.
    for function in proto.functions:
        for node in function.node:
            if node.op_type in kinds.CONSTANT:
                node.doc_string = OF_FUNCTION
    return onnx.inliner.inline_local_functions(proto)


def _inlined_size(proto: ModelProto) -> int:
    """Number of nodes of a model once its functions are inlined, computed without inlining them."""
    function_nodes: dict[FunctionKey, list[NodeProto]] = {}
    for function in proto.functions:
        function_nodes[_function_key(function)] = [
            node for top in function.node for node in (top, *_inner_nodes(top))
        ]
    # A size of None marks a function that is being counted: meeting it again is a recursive call.
    sizes: dict[FunctionKey, int | None] = {}

    def size(called: Iterable[NodeProto]) -> int:
        total = 0
        for node in called:
            key = (domains.plain(node.domain), node.op_type, node.overload)
            if key in function_nodes and key not in sizes:
                sizes[key] = None
                sizes[key] = size(function_nodes[key])
            node_size = sizes.get(key, 1)
            if node_size is None:
                raise ModelError(
                    f"the function '{node.op_type}' of the model calls itself, which ONNX does not allow; export the "
                    "model again."
                )
            total += node_size
        return total

    return size(nodes(proto.graph))


def _function_key(function: FunctionProto) -> FunctionKey:
    return domains.plain(function.domain), function.name, function.overload


# ------------------------------------------------------------------------------------------------------ flattening


def flatten(proto: ModelProto) -> None:
    """Makes all names in subgraphs unique, and moves their constants to the main graph.

    Works in place; the model computes the same.

    Args:
        proto: The model.
    """
    main = proto.graph
    taken = {value.name for value in main.input}
    taken.update(tensor.name for tensor in main.initializer)
    for node in main.node:
        taken.update((node.name, *node.output))
    for node in main.node:
        for body in all_bodies(node):
            _Renaming(taken).apply(body, {})
    lift(proto)


class _Renaming:
    """Renames the tensors and nodes of subgraphs whose names are taken; a number is added to the name."""

    def __init__(self, taken: set[str]) -> None:
        self._taken = taken

    def apply(self, graph: GraphProto, outer: Mapping[str, str]) -> None:
        """Renames a subgraph and those within it.

        Args:
            graph: The subgraph, changed in place.
            outer: New names of the outer tensors that it may read.
        """
        new_names = dict(outer)
        inputs = {value.name for value in graph.input}
        for value in graph.input:
            value.name = self._define(value.name, new_names)
        for tensor in graph.initializer:
            if tensor.name in inputs:  # an input with a default value: one name for both
                tensor.name = new_names[tensor.name]
            else:
                tensor.name = self._define(tensor.name, new_names)
        for node in graph.node:
            self._apply_to_node(node, new_names)
        for value in graph.output:
            value.name = new_names.get(value.name, value.name)
        del graph.value_info[:]

    def _apply_to_node(self, node: NodeProto, new_names: dict[str, str]) -> None:
        if node.name:
            node.name = unused_name(node.name, self._taken)
            self._taken.add(node.name)
        for i, name in enumerate(node.input):
            node.input[i] = new_names.get(name, name)
        for body in all_bodies(node):
            self.apply(body, new_names)
        for i, name in enumerate(node.output):
            node.output[i] = self._define(name, new_names)

    def _define(self, name: str, new_names: dict[str, str]) -> str:
        """Name under which a tensor is defined; an omitted output keeps its empty name."""
        if name:
            new_names[name] = unused_name(name, self._taken)
            self._taken.add(new_names[name])
        return new_names.get(name, name)


def lift(proto: ModelProto) -> None:
    """Moves the constants of subgraphs to the main graph, and makes each subgraph return tensors of its own.

    Works in place.

    Args:
        proto: A model whose names are unique.
    """
    main = proto.graph
    present = {tensor.name for tensor in main.initializer}
    # One after the other: a graph that changes holds new copies of the subgraphs within it.
    for graph in islice(graphs(main), 1, None):
        _lift_initializers(graph, main, present)
        _lift_constant_nodes(graph, main, present)
    return_own_tensors(main)


def _lift_initializers(
    graph: GraphProto,
    main: GraphProto,
    present: set[str],
) -> None:
    inputs = {value.name for value in graph.input}
    kept = []
    for tensor in graph.initializer:
        if tensor.name in inputs:  # the default value of an input
            kept.append(tensor)
        elif tensor.name not in present:
            main.initializer.append(tensor)
            present.add(tensor.name)
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)


def _lift_constant_nodes(
    graph: GraphProto,
    main: GraphProto,
    present: set[str],
) -> None:
    kept = []
    for node in graph.node:
        is_constant = node.op_type in kinds.CONSTANT and node.attribute[0].name == "value"
        if not is_constant:
            kept.append(node)
            continue
        if node.output[0] in present:  # names are unique: the same constant in another subgraph
            continue
        main.initializer.append(node.attribute[0].t)
        main.initializer[-1].name = node.output[0]
        present.add(node.output[0])
    if len(kept) < len(graph.node):
        set_nodes(graph, kept)


def return_own_tensors(main: GraphProto) -> None:
    """Inserts an Identity wherever a subgraph returns an outer tensor.

    ONNX demands that the outputs of a subgraph are tensors that it defines itself. Works in place.

    Args:
        main: The main graph of a flattened model.
    """
    taken: set[str] = set()
    for body in list(graphs(main))[1:]:
        own = {value.name for value in body.input}
        for node in body.node:
            own.update(node.output)
        for value in body.output:
            if value.name in own:
                continue
            taken = taken or names(main)
            returned = unused_name(f"{value.name}_returned", taken)
            node_name = unused_name(f"{returned}_identity", taken)
            taken |= {returned, node_name}
            identity = build.identity(value.name, returned, node_name)
            body.node.append(identity)
            value.name = returned


def unused_name(name: str, taken: Set[str]) -> str:
    """Finds a name that is not taken.

    Args:
        name: The preferred name.
        taken: Names in use.

    Returns:
        ``name``, with a number behind it if it is taken.
    """
    result = name
    i = 1
    while result in taken:
        result = f"{name}_{i}"
        i += 1
    return result


def set_nodes(graph: GraphProto, wanted: Sequence[NodeProto]) -> None:
    """Replaces the nodes of a graph.

    Args:
        graph: The graph, changed in place.
        wanted: Its new nodes, some of which may be its own.
    """
    copies = [NodeProto.FromString(node.SerializeToString()) for node in wanted]
    del graph.node[:]
    graph.node.extend(copies)


# ------------------------------------------------------------------------------------------------ constant branches


def resolve(proto: ModelProto) -> bool:
    """Replaces every If with a constant condition by the branch that is taken.

    Works in place.

    Args:
        proto: A flattened model.

    Returns:
        True if a node was replaced.
    """
    inputs = {value.name for value in proto.graph.input}
    conditions = {
        t.name: t
        for t in proto.graph.initializer
        if t.data_type == TensorProto.BOOL and t.name not in inputs
    }
    changed = False
    for graph in graphs(proto.graph):
        # A branch may hold another such If, which is found in the next turn.
        while (position := _first_decided(graph, conditions)) is not None:
            node = graph.node[position]
            condition = numpy_helper.to_array(conditions[node.input[0]])
            branch = bodies(node)[BRANCHES[bool(condition.reshape(-1)[0])]]
            inlined = _inlined_branch(node, branch)
            set_nodes(graph, [*graph.node[:position], *inlined, *graph.node[position + 1 :]])
            changed = True
    return changed


def _first_decided(graph: GraphProto, conditions: Mapping[str, TensorProto]) -> int | None:
    """Position of the first If with a constant condition."""
    for i, node in enumerate(graph.node):
        if has(node, Trait.BRANCHES) and node.input[0] in conditions:
            return i
    return None


def _inlined_branch(node: NodeProto, branch: GraphProto) -> list[NodeProto]:
    """Nodes of a branch, which define the outputs of the If under their outer names."""
    inlined = [NodeProto.FromString(part.SerializeToString()) for part in branch.node]
    defined = {name for part in inlined for name in part.output}
    outer_names: dict[str, str] = {}
    for output, value in zip(node.output, branch.output, strict=False):
        if not output:
            continue
        if value.name in defined and value.name not in outer_names:
            _rename_tensor(inlined, value.name, output)
            outer_names[value.name] = output
            continue
        # An outer tensor, or one that is returned twice, cannot be renamed.
        source = outer_names.get(value.name, value.name)
        node_name = f"{node.name or output}/taken/{output}"
        inlined.append(build.identity(source, output, node_name))
    return inlined


def _rename_tensor(top_nodes: list[NodeProto], old: str, new: str) -> None:
    """Renames a tensor wherever these nodes, and those of their subgraphs, define or read it."""
    for top in top_nodes:
        for node in (top, *_inner_nodes(top)):
            for node_names in (node.input, node.output):
                for i, name in enumerate(node_names):
                    if name == old:
                        node_names[i] = new
        for body in all_bodies(top):
            for graph in graphs(body):
                for value in graph.output:
                    if value.name == old:
                        value.name = new


# ----------------------------------------------------------------------------------------------------- inserting


def insert(graph: GraphProto, change: Callable[[NodeProto], list[NodeProto]]) -> None:
    """Replaces every node by a list of nodes, in subgraphs too.

    Works in place.

    Args:
        graph: Where to start.
        change: Maps a node to the nodes that take its place, usually the node itself among them.
    """
    wanted = []
    for node in list(graph.node):
        for body in all_bodies(node):
            insert(body, change)
        wanted += change(node)
    set_nodes(graph, wanted)
