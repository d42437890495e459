"""Names, types and shapes of a graph's tensors, by ONNX shape inference under sizes for the symbolic dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from onnx_oamip.core.errors import ModelError
from onnx_oamip.core.records import Axis, Node, Port
from onnx_oamip.graph import subgraphs
from onnx_oamip.graph.input_guards import inferred
from onnx_oamip.graph.ops import (
    LikeInput,
    LikeProduct,
    MatrixRule,
    Trait,
    build,
    has,
    lookup,
    rule_errors,
)
from onnx_oamip.graph.symbolic_dims import Entries, numbers
from onnx_oamip.graph.symbolic_values import follow

Dims = list[int | str | None]
"""Sizes of a tensor: a number, a symbol's name, or None where nothing is known."""
SMALL = 1024
"""Constants above this many elements cannot matter for shapes and are left out of shape inference."""
DEFAULT_SPATIAL = 64
DEFAULT_LENGTH = 16
ROUNDS = 20
PRIMES = (10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079, 10091, 10093, 10099, 10103)


def port_of(value: onnx.ValueInfoProto) -> Port:
    """A declared input or output. Raises ModelError where it is no tensor."""
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        # Dictionaries of probabilities, one a sample, are what skl2onnx makes of a classifier where nothing is said.
        maps = value.type.sequence_type.elem_type.HasField("map_type")
        hint = (
            "; for probabilities as one, export with skl2onnx's options={'zipmap': False}"
            if maps
            else ""
        )
        raise ModelError(
            f"the graph input or output '{value.name}' is not a tensor; only tensors are supported{hint}."
        )
    return Port(value.name, _dtype(kind.elem_type), tuple(_dims(kind.shape)))


def symbol(port: Port, axis: int) -> str | None:
    """Name of a symbolic dimension: its own, or 'input.axis' where it has none. None for a fixed length."""
    dim = port.dims[axis]
    if isinstance(dim, int) and dim > 0:
        return None
    return str(dim) if isinstance(dim, str) else f"{port.name}.{axis}"


def bind(inputs: tuple[Port, ...], wanted: Mapping[str, int]) -> dict[str, int]:
    """A size for every symbolic dimension: the one wanted, or the default of its place."""
    bound: dict[str, int] = {}
    for port in inputs:
        for axis in range(len(port.dims)):
            name = symbol(port, axis)
            if name is None:
                continue
            rest = DEFAULT_SPATIAL if len(port.dims) >= 4 else DEFAULT_LENGTH
            default = 1 if axis == 0 and len(port.dims) > 1 else rest
            bound.setdefault(name, int(wanted.get(name, default)))
    return bound


Shapes = dict[str, tuple[int, ...]]
Types = dict[str, np.dtype[Any]]


def infer(proto: ModelProto, bound: Mapping[str, int], known: Shapes | None = None) -> GraphProto:
    """The graph with shapes inferred under sizes for its symbolic dimensions; ``known`` are shapes found elsewhere."""
    copy = skeleton(proto)
    names = {v.name for v in proto.graph.input}
    for value in copy.graph.input:
        if value.name in names:
            port = port_of(value)
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                name = symbol(port, axis)
                if name is not None:
                    dim.dim_value = bound[name]
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    for name, shape in (known or {}).items():
        copy.graph.value_info.append(onnx.helper.make_tensor_value_info(name, 0, list(shape)))
    return _inferred(copy, proto)


def _inferred(copy: ModelProto, proto: ModelProto) -> GraphProto:
    """Shapes of a graph whose inputs have theirs; ``proto`` holds the constants."""
    versions = {o.domain: o.version for o in proto.opset_import}
    for node in copy.graph.node:
        spec = lookup(node.domain, node.op_type, versions.get(node.domain, 1))
        if spec is None:
            continue
        if isinstance(spec.shape, LikeInput):
            build.become_identity(node, floats=spec.shape.floats)
        elif isinstance(spec.shape, LikeProduct):
            _as_product(copy, node, spec.shape.matrix, proto)
    graph = inferred(copy)
    # ONNX's own inference loses a computed shape at operators like Where: what is followed here is put in.
    for _ in range(ROUNDS):
        entries = known_values(copy, graph).entries
        held = {t.name for t in copy.graph.initializer}
        types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
        fresh = [n for n, e in entries.items() if n not in held and n in types and numbers(e)]
        if not fresh or set(tensor_types(graph)[0]).issuperset(
            n for node in copy.graph.node for n in node.output if n
        ):
            break
        for node in copy.graph.node:
            for i, name in enumerate(node.output):
                if name in fresh:
                    found = np.asarray(
                        entries[name].astype(onnx.helper.tensor_dtype_to_np_dtype(types[name]))
                    )
                    copy.graph.initializer.append(numpy_helper.from_array(found, name))
                    node.output[i] = f"{name}/computed"
        graph = inferred(copy)
    return graph


def all_types(
    proto: ModelProto, bound: Mapping[str, int], nodes: Sequence[Node]
) -> tuple[Shapes, Types]:
    """(shapes, types) of the tensors of a graph and of all its bodies, as far as they are known."""
    shapes, dtypes = tensor_types(infer(proto, bound))
    protos = {n.name: n for n in subgraphs.nodes(proto.graph)}
    found: Shapes = {}
    while any(node.bodies for node in nodes):
        inside, kinds, given = _follow(proto, protos, nodes, shapes, dtypes)
        fresh = {n: s for n, s in given.items() if n not in shapes}
        if not fresh:
            return {**inside, **shapes}, {**kinds, **dtypes}
        found.update(fresh)  # what a loop gives is known: on from there
        shapes, dtypes = tensor_types(infer(proto, bound, found))
        shapes.update({n: s for n, s in found.items() if n not in shapes})
    return shapes, dtypes


def _follow(
    proto: ModelProto,
    protos: Mapping[str, NodeProto],
    nodes: Sequence[Node],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype[Any]],
) -> tuple[Shapes, Types, Shapes]:
    """(shapes, types) of the tensors in the bodies of the nodes, and the shapes that the nodes give, by induction.

    What is carried from step to step is taken to have the shape of the first value; where a step gives it another one,
    nothing is known of it, and it is all done again.
    """
    inside: Shapes = {}
    kinds: Types = {}
    given: Shapes = {}
    for node in nodes:
        spec = lookup(node.domain, node.op, node.version)
        if spec is None or spec.flow is None:
            continue
        with rule_errors(node):
            flow = spec.flow(node)
        entering = {x: shapes[first] for (first, _), x in flow.enters if first in shapes}
        for outer, x, axis in flow.slices:
            if outer in shapes:
                entering[x] = tuple(np.delete(shapes[outer], axis).tolist())
        while True:
            here, types = dict(shapes), dict(dtypes)
            for key, body in node.bodies.items():
                graph = subgraphs.bodies(protos[node.name])[key]
                _body(proto, protos, graph, body.nodes, entering, here, types)
            wrong = [
                x for (_, made), x in flow.enters if x in entering and here.get(made) != entering[x]
            ]
            if not wrong:
                break
            for x in wrong:
                del entering[x]
        inside.update({n: s for n, s in here.items() if n not in shapes})
        kinds.update({n: t for n, t in types.items() if n not in dtypes})
        for (a, b), out in flow.joins:
            if a in here and here[a] == here.get(b):
                given[out] = here[a]
        for made, out, axis in flow.stacks:
            scanned = [shapes[outer][along] for outer, _, along in flow.slices if outer in shapes]
            if made in here and scanned:
                place = axis % (len(here[made]) + 1)
                given[out] = (*here[made][:place], scanned[0], *here[made][place:])
    return inside, kinds, given


def _body(
    proto: ModelProto,
    protos: Mapping[str, NodeProto],
    graph: GraphProto,
    nodes: Sequence[Node],
    entering: Mapping[str, tuple[int, ...]],
    shapes: Shapes,
    dtypes: Types,
) -> None:
    """Add the shapes and types of one body's tensors, and of the bodies within."""
    copy = ModelProto(ir_version=max(proto.ir_version, 4))
    copy.opset_import.extend(proto.opset_import)
    copy.graph.name = graph.name or "body"
    copy.graph.node.extend(graph.node)
    for value in graph.input:
        kind = value.type.tensor_type.elem_type
        scalar = value.type.tensor_type.HasField("shape") and not value.type.tensor_type.shape.dim
        shape = entering.get(value.name, () if scalar else None)
        copy.graph.input.append(onnx.helper.make_tensor_value_info(value.name, kind, shape))
    read = {n for node in graph.node for n in subgraphs.reads(node)}
    made = {n for node in graph.node for n in node.output} | {v.name for v in graph.input}
    for tensor in proto.graph.initializer:
        if tensor.name in read and int(np.prod(tensor.dims)) <= SMALL:
            copy.graph.initializer.append(tensor)
            made.add(tensor.name)
    for name in sorted(read - made):
        kind = int(onnx.helper.np_dtype_to_tensor_dtype(dtypes[name])) if name in dtypes else 0
        copy.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, shapes.get(name)))
    copy.graph.output.extend(onnx.ValueInfoProto(name=v.name, type=v.type) for v in graph.output)
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    found, types = tensor_types(_inferred(copy, proto))
    shapes.update(found)
    dtypes.update(types)
    inside, kinds, _ = _follow(proto, protos, nodes, shapes, dtypes)
    shapes.update(inside)
    dtypes.update(kinds)


def _as_product(copy: ModelProto, node: NodeProto, rule: MatrixRule, source: ModelProto) -> None:
    """For shapes it is the product of its first input with a matrix."""
    attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    seen = Node(
        node.name, node.op_type, node.domain, 1, tuple(node.input), tuple(node.output), attrs
    )
    held = {t.name: t for t in source.graph.initializer}
    shape = rule(seen, {name: tuple(t.dims) for name, t in held.items()})
    if shape is None:
        return
    name = f"oamip_matrix_{len(copy.graph.input)}"
    kind = held[node.input[1]].data_type
    copy.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, list(shape)))
    build.become_product(node, name)


def tensor_types(graph: GraphProto) -> tuple[Shapes, Types]:
    """(shapes, types) of the tensors of an inferred graph, as far as they are known."""
    shapes: Shapes = {}
    dtypes: Types = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if not value.type.HasField("tensor_type"):
            continue
        kind = value.type.tensor_type
        if kind.elem_type:
            dtypes[value.name] = _dtype(kind.elem_type)
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            shapes[value.name] = tuple(d.dim_value for d in kind.shape.dim)
    for tensor in graph.initializer:  # shapes that were computed, among them
        shapes[tensor.name], dtypes[tensor.name] = tuple(tensor.dims), _dtype(tensor.data_type)
    return shapes, dtypes


def _dtype(elem_type: int) -> np.dtype[Any]:
    if not elem_type:
        return np.dtype(object)
    if elem_type == TensorProto.BFLOAT16:
        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))


def _dims(shape: onnx.TensorShapeProto) -> Dims:
    return [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in shape.dim]


@dataclass(frozen=True)
class Values:
    """What is known of a graph before it runs: dimensions, element types, and entries of integer tensors."""

    dims: Mapping[str, Dims]
    types: Mapping[str, int]
    entries: Mapping[str, Entries]


def known_values(proto: ModelProto, graph: GraphProto | None = None) -> Values:
    """Dimensions as they were declared, and the lists that the graph computes from them."""
    named: dict[str, Dims] = {}
    if graph is None:
        graph = inferred(skeleton(proto))
        named = _named(proto)
    listed = (*graph.value_info, *graph.input, *graph.output)
    dims = {
        v.name: _dims(v.type.tensor_type.shape)
        for v in listed
        if v.type.tensor_type.HasField("shape")
    }
    for name, found in named.items():
        known = dims.get(name, [None] * len(found))
        dims[name] = [
            a if isinstance(a, int) or b is None else b for a, b in zip(known, found, strict=True)
        ]
    for tensor in proto.graph.initializer:
        dims[tensor.name] = list(tensor.dims)
    types = {v.name: v.type.tensor_type.elem_type for v in listed if v.type.HasField("tensor_type")}
    whole = {TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL}
    small = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.data_type in whole}
    return Values(
        dims,
        types,
        follow(graph.node, small, dims, {n for n, kind in types.items() if kind in whole}),
    )


def _named(proto: ModelProto) -> dict[str, Dims]:
    """Dynamic dimensions that ONNX's inference loses track of: lengths that equal a symbol's at three different sizes.

    Two of the sizes are large primes, so that nothing else gives the same number. Fixed lengths are not taken. Where
    such a size is more than a table of positions or a causal mask holds, shapes end: behind a sum of both the model
    does not run at that size. There, and only there, the table is taken to be as long as it is asked for.
    """
    held = {t.name for t in proto.graph.initializer}
    inputs = tuple(port_of(v) for v in proto.graph.input if v.name not in held)
    usual = bind(inputs, {})
    if not usual or len(usual) > len(PRIMES):
        return {}
    sizes = [
        usual,
        dict(zip(usual, PRIMES, strict=False)),
        dict(zip(usual, PRIMES[::-1], strict=False)),
    ]
    found = [tensor_types(infer(proto, s))[0] for s in sizes]
    endless = _endless(proto)
    if endless is not None:
        found = [
            {**tensor_types(infer(endless, s))[0], **known}
            for s, known in zip(sizes, found, strict=True)
        ]
    named: dict[str, Dims] = {}
    for name in set(found[0]) & set(found[1]) & set(found[2]):
        shapes = [f[name] for f in found]
        if len({len(s) for s in shapes}) == 1:
            columns = list(zip(*shapes, strict=True))
            named[name] = [
                next((s for s in usual if c == tuple(b[s] for b in sizes)), None) for c in columns
            ]
    return named


def _endless(proto: ModelProto) -> ModelProto | None:
    """A skeleton in which constants that are only sliced to a computed length never end; None if there are none."""
    result = skeleton(proto)
    held = {t.name: list(t.dims) for t in proto.graph.initializer}
    whole = {t.name: numpy_helper.to_array(t) for t in result.graph.initializer}
    source: dict[str, str] = {name: name for name in held}
    longer: dict[str, set[int]] = {}
    read_whole: set[str] = set()
    for node in proto.graph.node:
        for slot, name in enumerate(node.input):
            if name in held and (slot > 0 or not has(node, Trait.SLICES)):
                read_whole.add(name)
        if has(node, Trait.SLICES) and node.input[0] in source:
            origin = source[node.output[0]] = source[node.input[0]]
            axes = whole.get(node.input[3]) if len(node.input) > 3 else None
            if axes is not None and len(node.input) > 2 and node.input[2] not in held:
                longer.setdefault(origin, set()).update(int(a) % len(held[origin]) for a in axes)
    tables = longer.keys() - read_whole
    for name in tables:
        _lengthen(result, name, longer[name])
    return result if tables else None


def _lengthen(proto: ModelProto, name: str, axes: set[int]) -> None:
    """Turn a constant into an input that is longer along some axes than any size that is tried."""
    graph = proto.graph
    kept = [t for t in graph.initializer if t.name != name]
    if len(kept) < len(graph.initializer):
        (table,) = [t for t in graph.initializer if t.name == name]
        graph.input.append(
            onnx.helper.make_tensor_value_info(name, table.data_type, list(table.dims))
        )
        del graph.initializer[:]
        graph.initializer.extend(kept)
    (value,) = [v for v in graph.input if v.name == name]
    for axis in axes:
        value.type.tensor_type.shape.dim[axis].dim_value = 2 * max(PRIMES)


def symbol_homes(proto: ModelProto, dims: Mapping[str, Dims]) -> dict[str, Axis]:
    """Where the length behind a symbol can be read: preferably from a graph input."""
    found: dict[str, Axis] = {}
    inputs = [v.name for v in proto.graph.input]
    for name in (*inputs, *(n for n in dims if n not in inputs)):
        for axis, d in enumerate(dims.get(name, [])):
            if not isinstance(d, int):
                # A dimension without a name is called after its place.
                found.setdefault(d or f"{name}:{axis}", (name, axis))
    return found


def skeleton(proto: ModelProto) -> ModelProto:
    """A copy without the payload of large constants, which become inputs: enough for shape inference."""
    result = ModelProto()
    result.ir_version = max(proto.ir_version, 4)
    result.opset_import.extend(proto.opset_import)
    result.functions.extend(proto.functions)
    graph = result.graph
    graph.name = proto.graph.name or "graph"
    graph.input.extend(proto.graph.input)
    graph.output.extend(proto.graph.output)
    graph.node.extend(proto.graph.node)
    for tensor in proto.graph.initializer:
        if int(np.prod(tensor.dims)) <= SMALL:
            graph.initializer.append(tensor)
        else:
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    return result
