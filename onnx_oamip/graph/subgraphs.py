"""Graphs inside nodes: the branches of If, the bodies of Loop and Scan; and functions that a model brings along.

After :func:`flatten` every tensor and node name occurs once in the whole model and all constants of bodies are
initialisers of the graph, so that a body is just a longer way to write nodes: labels, cuts and costs see no border.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

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
from onnx_oamip.graph.ops import Trait, build, has, kinds

BRANCHES = {True: "then_branch", False: "else_branch"}


def held(node: NodeProto) -> dict[str, GraphProto]:
    """Bodies of a node by attribute name."""
    return {a.name: a.g for a in node.attribute if a.type == AttributeProto.GRAPH}


def inner(node: NodeProto) -> list[GraphProto]:
    """All bodies of a node, those in lists of graphs too."""
    several = (g for a in node.attribute if a.type == AttributeProto.GRAPHS for g in a.graphs)
    return [*held(node).values(), *several]


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and all bodies within, outer ones first."""
    yield graph
    for node in graph.node:
        for body in inner(node):
            yield from graphs(body)


def nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """All nodes of a graph and of the bodies within."""
    return (node for g in graphs(graph) for node in g.node)


def names(graph: GraphProto) -> set[str]:
    """Every name of a tensor or node in a graph and in the bodies within."""
    found: set[str] = set()
    for g in graphs(graph):
        found |= {v.name for v in (*g.input, *g.output)} | {t.name for t in g.initializer}
        found |= {n for node in g.node for n in (node.name, *node.input, *node.output)}
    return found - {""}


def tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Every tensor a model holds: initialisers and attributes, in bodies and functions too."""
    called = [body for f in proto.functions for node in f.node for body in inner(node)]
    every = [*graphs(proto.graph), *(g for body in called for g in graphs(body))]
    for graph in every:
        yield from graph.initializer
    attributes = [a for f in proto.functions for a in f.attribute_proto]
    attributes += [a for node in _calls(proto) for a in node.attribute]
    for attribute in attributes:  # whatever type it says it has
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
    sparse = [s for graph in every for s in graph.sparse_initializer]
    sparse += [s for a in attributes for s in (a.sparse_tensor, *a.sparse_tensors)]
    for stored in sparse:
        yield from (stored.values, stored.indices)


def _calls(proto: ModelProto) -> Iterator[NodeProto]:
    """All nodes of the graph, of its functions, and of the bodies in both."""
    for listed in (proto.graph.node, *(f.node for f in proto.functions)):
        for top in listed:
            yield top
            yield from _within(top)


def reads(node: NodeProto) -> list[str]:
    """Every tensor a node needs: its inputs and what its bodies take from outside."""
    found = [n for n in node.input if n]
    return [*found, *sorted(set().union(*(captured(g) for g in inner(node))) - set(found))]


def captured(graph: GraphProto) -> set[str]:
    """Outer tensors that a body reads."""
    own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    read: set[str] = set()
    for node in graph.node:
        read |= {*node.input}.union(*(captured(g) for g in inner(node))) - own
        own |= set(node.output)
    read |= {v.name for v in graph.output} - own
    return read - {""}


# ------------------------------------------------------------------------------------------------------- functions


INLINED = 10_000
"""Nodes that a model may have once its functions are written out, unless it is not ``TIMES`` as many as it had."""
TIMES = 50


def inline(proto: ModelProto) -> ModelProto:
    """The model without local functions: every call is replaced by what it calls.

    Raises ModelError where a function calls itself, or where few nodes stand for very many.
    """
    if not proto.functions:
        return proto
    held, whole = sum(1 for _ in _calls(proto)), _written_out(proto)
    if whole > max(INLINED, TIMES * held):
        raise ModelError(
            f"the {held} nodes of the model are {whole} once its functions are written out, more than is sensible; "
            "export it without functions."
        )
    # The inliner forgets the values that a function declares for attributes which a call leaves out.
    defaults = {(f.domain, f.name, f.overload): f.attribute_proto for f in proto.functions}
    for node in _calls(proto):
        given = {a.name for a in node.attribute}
        declared = defaults.get((node.domain, node.op_type, node.overload), ())
        node.attribute.extend(a for a in declared if a.name not in given)
    return onnx.inliner.inline_local_functions(proto)


def _written_out(proto: ModelProto) -> int:
    """Nodes of a graph without its functions. Raises ModelError where a function calls itself."""
    calls = {_key(f): [n for top in f.node for n in (top, *_within(top))] for f in proto.functions}
    sizes: dict[tuple[str, str, str], int | None] = {}

    def size(listed: Iterable[NodeProto]) -> int:
        total = 0
        for node in listed:
            key = (_domain(node.domain), node.op_type, node.overload)
            if key in calls and key not in sizes:
                sizes[key] = None
                sizes[key] = size(calls[key])
            inside = sizes.get(key, 1)
            if inside is None:
                raise ModelError(
                    f"the function '{node.op_type}' of the model calls itself, which ONNX does not allow; export the "
                    "model again."
                )
            total += inside
        return total

    return size(nodes(proto.graph))


def _key(function: FunctionProto) -> tuple[str, str, str]:
    return _domain(function.domain), function.name, function.overload


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _within(node: NodeProto) -> Iterator[NodeProto]:
    return (inside for body in inner(node) for inside in nodes(body))


# ------------------------------------------------------------------------------------------------------ flattening


def flatten(proto: ModelProto) -> None:
    """Give every tensor and node of the bodies a name of its own, and make their constants initialisers of the graph.

    In place; nothing is computed differently.
    """
    main = proto.graph
    taken = {v.name for v in main.input} | {t.name for t in main.initializer}
    taken |= {n for node in main.node for n in (node.name, *node.output)}
    for node in main.node:
        for body in inner(node):
            _rename(body, {}, taken)
    lift(proto)


def _rename(graph: GraphProto, outer: Mapping[str, str], taken: set[str]) -> None:
    """Names made in this body, and in those within, that are taken get a number; ``outer`` says what they read now."""
    renamed = dict(outer)

    def define(name: str) -> str:
        if name:
            renamed[name] = unused(name, taken)
            taken.add(renamed[name])
        return renamed.get(name, name)

    given = {value.name for value in graph.input}
    for value in graph.input:
        value.name = define(value.name)
    for tensor in graph.initializer:
        # An input with a default value has one name for both.
        tensor.name = renamed[tensor.name] if tensor.name in given else define(tensor.name)
    for node in graph.node:
        if node.name:
            node.name = unused(node.name, taken)
            taken.add(node.name)
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        for body in inner(node):
            _rename(body, renamed, taken)
        for i, name in enumerate(node.output):
            node.output[i] = define(name)
    for value in graph.output:
        value.name = renamed.get(value.name, value.name)
    del graph.value_info[:]


def lift(proto: ModelProto) -> None:
    """Move the constants of bodies, whose names are their own, to the graph; what a body returns it makes itself."""
    main = proto.graph
    there = {t.name for t in main.initializer}
    for graph in list(graphs(main))[1:]:
        given = {v.name for v in graph.input}
        kept = []
        for tensor in graph.initializer:
            if tensor.name in given:
                kept.append(tensor)
            elif tensor.name not in there:
                main.initializer.append(tensor)
                there.add(tensor.name)
        if len(kept) < len(graph.initializer):
            del graph.initializer[:]
            graph.initializer.extend(kept)
        plain = []
        for node in graph.node:
            constant = node.op_type in kinds.CONSTANT and node.attribute[0].name == "value"
            if not constant or node.output[0] in there:
                plain.append(node)
                continue
            main.initializer.append(node.attribute[0].t)
            main.initializer[-1].name = node.output[0]
            there.add(node.output[0])
        if len(plain) < len(graph.node):
            _replace(graph, plain)
    own_outputs(main)


def own_outputs(main: GraphProto) -> None:
    """Insert an Identity wherever a body returns an outer tensor: ONNX demands that it returns one of its own.

    In place, on a flattened graph.
    """
    taken: set[str] = set()
    for body in list(graphs(main))[1:]:
        own = {v.name for v in body.input} | {n for node in body.node for n in node.output}
        for value in body.output:
            if value.name in own:
                continue
            taken = taken or names(main)
            returned = unused(f"{value.name}_returned", taken)
            label = unused(f"{returned}_identity", taken)
            taken |= {returned, label}
            body.node.append(build.identity(value.name, returned, label))
            value.name = returned


def unused(name: str, taken: set[str]) -> str:
    """``name``, or it with a number behind where it is taken."""
    result, i = name, 1
    while result in taken:
        result, i = f"{name}_{i}", i + 1
    return result


def _replace(graph: GraphProto, wanted: list[NodeProto]) -> None:
    copies = [NodeProto.FromString(n.SerializeToString()) for n in wanted]
    del graph.node[:]
    graph.node.extend(copies)


# ------------------------------------------------------------------------------------------------ constant branches


def resolve(proto: ModelProto) -> bool:
    """Put the branch that is taken in the place of every If with a constant condition; whether there was one.

    In place, on a flattened model.
    """
    known = {t.name: t for t in proto.graph.initializer if t.data_type == TensorProto.BOOL}
    changed = False
    for graph in graphs(proto.graph):
        while (
            at := next((i for i, n in enumerate(graph.node) if _decided(n, known)), None)
        ) is not None:
            node = graph.node[at]
            taken = bool(numpy_helper.to_array(known[node.input[0]]).reshape(-1)[0])
            body = held(node)[BRANCHES[taken]]
            inlined = [NodeProto.FromString(n.SerializeToString()) for n in body.node]
            made = {name for part in inlined for name in part.output}
            called: dict[str, str] = {}
            for out, value in zip(node.output, body.output, strict=False):
                if out and value.name in made and value.name not in called:
                    _call(inlined, value.name, out)
                    called[value.name] = out
                elif out:  # a tensor from outside, or one that is given twice
                    source = called.get(value.name, value.name)
                    step = build.identity(source, out, f"{node.name or out}/taken/{out}")
                    inlined.append(step)
            _replace(graph, [*graph.node[:at], *inlined, *graph.node[at + 1 :]])
            changed = True
    return changed


def _call(wanted: list[NodeProto], old: str, new: str) -> None:
    """Rename a tensor wherever these nodes, and bodies within, make or read it."""
    for top in wanted:
        for node in (top, *(n for body in inner(top) for n in nodes(body))):
            for listed in (node.input, node.output):
                for i, name in enumerate(listed):
                    if name == old:
                        listed[i] = new
        for body in inner(top):
            for value in (v for g in graphs(body) for v in g.output):
                value.name = new if value.name == old else value.name


def _decided(node: NodeProto, known: Mapping[str, TensorProto]) -> bool:
    return has(node, Trait.BRANCHES) and node.input[0] in known


# ----------------------------------------------------------------------------------------------------- inserting


def insert(graph: GraphProto, change: Callable[[NodeProto], list[NodeProto]]) -> None:
    """Put what ``change`` gives for every node (the node itself among it) in the node's place, in bodies too."""
    wanted = []
    for node in list(graph.node):
        for body in inner(node):
            insert(body, change)
        wanted += change(node)
    _replace(graph, wanted)
