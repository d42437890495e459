"""Shape inference: names, types and shapes of the tensors of a graph, for given sizes of its symbolic dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from onnx_oamip.core.errors import ModelError, SettingsError
from onnx_oamip.core.records import Axis, Node, Port
from onnx_oamip.graph import subgraphs
from onnx_oamip.graph.input_guards import inferred
from onnx_oamip.graph.ops import (
    LikeInput,
    LikeOperator,
    LikeProduct,
    MatrixRule,
    Trait,
    build,
    has,
    kinds,
    lookup,
    rule_errors,
)
from onnx_oamip.graph.ops.spec import Flow
from onnx_oamip.graph.ops.windows import missing
from onnx_oamip.graph.symbolic_dims import Dims, Entries, Size, numbers, product
from onnx_oamip.graph.symbolic_values import follow

Shapes = dict[str, tuple[int, ...]]
Types = dict[str, np.dtype[Any]]

SMALL = 1024
"""Constants with more elements than this cannot matter for shapes and are left out of shape inference."""
DEFAULT_SPATIAL = 64
"""Default size of symbolic dimensions of images."""
DEFAULT_LENGTH = 16
"""Default size of other symbolic dimensions, except for the batch."""
ROUNDS = 20
"""Bound on rounds of inference, each of which uses the results of the last."""
PRIMES = (10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079, 10091, 10093, 10099, 10103)
"""Sizes by which symbolic dimensions are recognised in inferred shapes."""
ENLARGED = 4
"""Factor by which assumed sizes grow where an axis would be shorter than a kernel."""
LARGEST_ASSUMED = 1 << 17
"""Size beyond which no assumption is tried."""
FLOATING_TYPES = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
)
FOLLOWED_TYPES = frozenset(
    {
        TensorProto.INT64,
        TensorProto.INT32,
        TensorProto.BOOL,
        TensorProto.FLOAT,
        TensorProto.DOUBLE,
    }
)
"""Element types of small tensors whose elements are followed: integers symbolically, floats as numbers."""


# ------------------------------------------------------------------------------------------------------ interface


def port_of(value: onnx.ValueInfoProto) -> Port:
    """Record of a declared input or output.

    Args:
        value: The declaration.

    Returns:
        Its name, element type and dimensions.

    Raises:
        ModelError: It is not a tensor, or of an element type that ONNX does not define.
    """
    if not is_tensor(value):
        raise ModelError(
            f"the graph input or output '{value.name}' is not a tensor; only tensors are supported."
        )
    tensor_type = value.type.tensor_type
    kind = tensor_type.elem_type
    if kind not in TensorProto.DataType.values():
        raise ModelError(
            f"the graph input or output '{value.name}' has the element type {kind}, which this version of onnx does "
            "not know."
        )
    return Port(value.name, _dtype(kind), tuple(_dims(tensor_type.shape)))


def is_tensor(value: onnx.ValueInfoProto) -> bool:
    """Check whether a declared value is a tensor, not a sequence, a map or an optional value.

    Args:
        value: The declaration.

    Returns:
        True for a tensor.
    """
    return bool(value.type.HasField("tensor_type"))


def output_ports(graph: onnx.GraphProto) -> tuple[Port, ...]:
    """Records of the graph outputs that are tensors. The others stay in the graph and are not compared.

    Args:
        graph: The graph.

    Returns:
        One record per output that is a tensor.

    Raises:
        ModelError: There are outputs, and none of them is a tensor.
    """
    tensors = [value for value in graph.output if is_tensor(value)]
    if graph.output and not tensors:
        value = graph.output[0]
        # skl2onnx turns the probabilities of a classifier into a sequence of dictionaries by default.
        is_list_of_maps = value.type.sequence_type.elem_type.HasField("map_type")
        hint = "; for probabilities as one, export with skl2onnx's options={'zipmap': False}"
        raise ModelError(
            f"the graph output '{value.name}' is not a tensor, and nothing else is there to compare"
            f"{hint if is_list_of_maps else ''}."
        )
    return tuple(port_of(value) for value in tensors)


def symbol(port: Port, axis: int) -> str | None:
    """Name of a symbolic dimension.

    Args:
        port: A graph input or output.
        axis: One of its axes.

    Returns:
        The declared name, 'input.axis' if it has none, or None for a fixed length.
    """
    dim = port.dims[axis]
    if isinstance(dim, int) and dim > 0:
        return None
    return str(dim) if isinstance(dim, str) else f"{port.name}.{axis}"


def bind(inputs: tuple[Port, ...], wanted: Mapping[str, int]) -> dict[str, int]:
    """Chooses a size for every symbolic dimension.

    Args:
        inputs: Graph inputs.
        wanted: Sizes by name of the dimension.

    Returns:
        The wanted size, or a default: 1 for the leading dimension, ``DEFAULT_SPATIAL`` in inputs of rank 4 and more,
        ``DEFAULT_LENGTH`` elsewhere.
    """
    bound: dict[str, int] = {}
    for port in inputs:
        rank = len(port.dims)
        for axis in range(rank):
            name = symbol(port, axis)
            if name is None:
                continue
            if axis == 0 and rank > 1:
                default = 1
            elif rank >= 4:
                default = DEFAULT_SPATIAL
            else:
                default = DEFAULT_LENGTH
            bound.setdefault(name, int(wanted.get(name, default)))
    return bound


def sizes(inputs: tuple[Port, ...], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Finds the sizes of symbolic dimensions that stated shapes give.

    Args:
        inputs: Graph inputs.
        shapes: Lengths by name of an input or of a symbolic dimension.

    Returns:
        Sizes by name of the dimension.

    Raises:
        SettingsError: A name is neither, or a shape does not fit its input.
    """
    ports = {port.name: port for port in inputs}
    symbols = [name for port in inputs for a in range(len(port.dims)) if (name := symbol(port, a))]
    result: dict[str, int] = {}
    for name, lengths in shapes.items():
        stated = "x".join(map(str, lengths))
        if name in ports:
            found = _sizes_of_input(ports[name], lengths, f"`shape={name}={stated}`")
        elif name in symbols and len(lengths) == 1:
            found = {name: lengths[0]}
        else:
            known = ", ".join(dict.fromkeys((*ports, *symbols)))
            raise SettingsError(
                f"`shape={name}={stated}` names no input and no symbolic dimension; there are {known}."
            )
        for key, size in found.items():
            if result.setdefault(key, size) != size:
                raise SettingsError(
                    f"`shape={name}={stated}` gives '{key}' the length {size}, another one {result[key]}; give both "
                    "the same."
                )
    return result


def _sizes_of_input(port: Port, lengths: tuple[int, ...], stated: str) -> dict[str, int]:
    declared = "x".join("?" if dim is None else str(dim) for dim in port.dims)
    if len(lengths) != len(port.dims):
        raise SettingsError(
            f"{stated} has {len(lengths)} lengths, but the input has {len(port.dims)} axes ({declared})."
        )
    result: dict[str, int] = {}
    for axis, length in enumerate(lengths):
        name = symbol(port, axis)
        fits = length == port.dims[axis] if name is None else result.get(name, length) == length
        if not fits:
            raise SettingsError(f"{stated} does not fit the input, which is {declared}.")
        if name is not None:
            result[name] = length
    return result


# ------------------------------------------------------------------------------------------------------ inference


def infer(proto: ModelProto, bound: Mapping[str, int], known: Shapes | None = None) -> GraphProto:
    """Infers the shapes of a graph.

    Args:
        proto: The model.
        bound: Sizes of its symbolic dimensions.
        known: Shapes of intermediate tensors that were found by other means.

    Returns:
        The graph with inferred shapes; large constants are inputs in it.
    """
    return _inferred(_with_sizes(proto, bound, known or {}), proto)


def _with_sizes(proto: ModelProto, bound: Mapping[str, int], known: Shapes) -> ModelProto:
    """A skeleton whose inputs have the sizes of symbolic dimensions."""
    copy = skeleton(proto)
    inputs = {value.name for value in proto.graph.input}
    for value in copy.graph.input:
        if value.name not in inputs:  # a large constant
            continue
        port = port_of(value)
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            name = symbol(port, axis)
            if name is not None:
                dim.dim_value = bound[name]
    clear_output_shapes(copy.graph)
    _declare(copy, known)
    return copy


def _declare(copy: ModelProto, known: Shapes) -> None:
    for name, shape in known.items():
        copy.graph.value_info.append(onnx.helper.make_tensor_value_info(name, 0, list(shape)))


def clear_output_shapes(graph: GraphProto) -> None:
    """Clears the declared shapes of outputs, which may be wrong or hold for other sizes.

    An output that is an input gets the declaration of the input.

    Args:
        graph: The graph, changed in place.
    """
    inputs = {value.name: value for value in graph.input}
    for value in graph.output:
        if value.name in inputs:
            value.CopyFrom(inputs[value.name])
        else:
            value.type.tensor_type.ClearField("shape")


def _inferred(copy: ModelProto, proto: ModelProto) -> GraphProto:
    """Infers the shapes of a graph whose inputs have theirs.

    Args:
        copy: The graph, without large constants; changed in place.
        proto: The model with all constants.
    """
    _replace_unknown_operators(copy, proto)
    graph = inferred(copy)
    # ONNX's inference does not compute the target of a Reshape through operators such as Where. The symbolic values
    # do: tensors known by them become constants, and the inference runs again.
    missing = _without_shape(copy, graph)
    while missing and _insert_known_values(copy, graph):
        graph = inferred(copy)
        before, missing = missing, _without_shape(copy, graph)
        if len(missing) == len(before):  # the new constants did not help
            break
    return graph


def _without_shape(copy: ModelProto, graph: GraphProto) -> set[str]:
    """Tensors computed by a graph whose shapes are not known, given the same graph with inferred shapes."""
    shapes, _ = tensor_types(graph)
    return {name for node in copy.graph.node for name in node.output if name and name not in shapes}


def _replace_unknown_operators(copy: ModelProto, proto: ModelProto) -> None:
    """Replaces operators that ONNX's inference does not know by standard ones with the same shapes."""
    versions = {o.domain: o.version for o in proto.opset_import}
    for node in copy.graph.node:
        spec = lookup(node.domain, node.op_type, versions.get(node.domain, 1))
        if spec is None:
            continue
        if isinstance(spec.shape, LikeInput):
            build.become_identity(node, floats=spec.shape.floats)
        elif isinstance(spec.shape, LikeOperator):
            like = spec.shape
            build.become_operator(node, like.name, inputs=like.inputs, attrs=like.attrs)
        elif isinstance(spec.shape, LikeProduct):
            _as_product(copy, node, spec.shape.matrix, proto)


def _insert_known_values(copy: ModelProto, graph: GraphProto) -> bool:
    """Turns tensors whose elements are known numbers into constants.

    Args:
        copy: The model, changed in place.
        graph: The same graph with inferred shapes.

    Returns:
        False if there are none.
    """
    entries = known_values(copy, graph).entries
    constants = {tensor.name for tensor in copy.graph.initializer}
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    fresh = {
        name
        for name, values in entries.items()
        if name not in constants and name in types and numbers(values)
    }
    if not fresh:
        return False
    for node in copy.graph.node:
        for i, name in enumerate(node.output):
            if name in fresh:
                dtype = onnx.helper.tensor_dtype_to_np_dtype(types[name])
                value = np.asarray(entries[name].astype(dtype))
                copy.graph.initializer.append(numpy_helper.from_array(value, name))
                node.output[i] = f"{name}/computed"
    return True


def _as_product(copy: ModelProto, node: NodeProto, rule: MatrixRule, source: ModelProto) -> None:
    """Replaces a node by the product of its first input with a matrix, which has the same shape."""
    attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    inputs, outputs = tuple(node.input), tuple(node.output)
    record = Node(node.name, node.op_type, node.domain, 1, inputs, outputs, attrs)
    constants = {tensor.name: tensor for tensor in source.graph.initializer}
    shape = rule(record, {name: tuple(tensor.dims) for name, tensor in constants.items()})
    if shape is None:
        return
    name = f"oamip_matrix_{len(copy.graph.input)}"
    element_type = constants[node.input[1]].data_type
    # Codes of a quantised weight: the product is that of the data.
    if element_type not in FLOATING_TYPES:
        element_type = TensorProto.FLOAT
    matrix = onnx.helper.make_tensor_value_info(name, element_type, list(shape))
    copy.graph.input.append(matrix)
    build.become_product(node, name)


# ------------------------------------------------------------------------------------------------------ subgraphs


def all_types(
    proto: ModelProto, bound: Mapping[str, int], nodes: Sequence[Node]
) -> tuple[Shapes, Types]:
    """Shapes and types of the tensors of a graph and of all its subgraphs.

    Args:
        proto: The model.
        bound: Sizes of its symbolic dimensions.
        nodes: The nodes of its main graph.

    Returns:
        Shapes and element types by tensor name, as far as they can be inferred.
    """
    protos = {node.name: node for node in subgraphs.nodes(proto.graph)}

    def run(known: Shapes) -> tuple[ModelProto, GraphProto]:
        copy = _with_sizes(proto, bound, known)
        return copy, _inferred(copy, proto)

    found = _settled(_Known({}, {}, {}), nodes, run, proto=proto, protos=protos)
    return found.shapes, found.dtypes


@dataclass(frozen=True)
class _Known:
    """Known properties of the tensors around a subgraph.

    Attributes:
        shapes: Their shapes.
        dtypes: Their element types.
        values: Values of those that are computed from shapes.
    """

    shapes: Shapes
    dtypes: Types
    values: Mapping[str, np.ndarray[Any, Any]]


def _settled(
    outer: _Known,
    nodes: Sequence[Node],
    run: Callable[[Shapes], tuple[ModelProto, GraphProto]],
    *,
    proto: ModelProto,
    protos: Mapping[str, NodeProto],
) -> _Known:
    """Infers a graph and its subgraphs, until the outputs of subgraphs give no further shapes.

    Args:
        outer: The tensors around the graph.
        nodes: Its nodes.
        run: Infers the graph itself, given shapes of outputs of subgraphs; returns it before and after.
        proto: The model.
        protos: All its nodes by name.

    Returns:
        The tensors of the graph and of its subgraphs.
    """
    known: Shapes = {}
    while True:
        copy, graph = run(known)
        shapes, dtypes = tensor_types(graph)
        shapes.update({n: s for n, s in known.items() if n not in shapes})
        if not any(node.bodies for node in nodes):
            return _Known(shapes, dtypes, {})
        around = _Known(
            {**outer.shapes, **shapes},
            {**outer.dtypes, **dtypes},
            {**outer.values, **_numeric_values(copy, graph)},
        )
        inference = _SubgraphInference(proto, protos, around)
        inference.follow(nodes)
        fresh = {n: s for n, s in inference.outputs.items() if n not in shapes}
        if not fresh:
            inner_shapes, inner_dtypes = inference.shapes, inference.dtypes
            return _Known({**inner_shapes, **shapes}, {**inner_dtypes, **dtypes}, {})
        # The shape of a loop's output is known now: infer the nodes behind it.
        known.update(fresh)


def _numeric_values(copy: ModelProto, graph: GraphProto) -> dict[str, np.ndarray[Any, Any]]:
    """Values of the small tensors that a graph computes from shapes, given the same graph with inferred shapes."""
    known = known_values(copy, graph)
    types = {**known.types, **{t.name: t.data_type for t in copy.graph.initializer}}
    return {
        name: np.asarray(entries.astype(onnx.helper.tensor_dtype_to_np_dtype(types[name])))
        for name, entries in known.entries.items()
        if name in types and numbers(entries)
    }


def fitting_types(
    proto: ModelProto, bound: Mapping[str, int], nodes: Sequence[Node], growing: Set[str]
) -> tuple[dict[str, int], Shapes, Types]:
    """Shapes and types at sizes that no kernel is longer than: assumed sizes grow until every kernel fits.

    Args:
        proto: The model.
        bound: Sizes of its symbolic dimensions.
        nodes: The nodes of its main graph.
        growing: Dimensions whose size may be changed.

    Returns:
        The sizes, and shapes and element types by tensor name. A tensor that has no elements at any size keeps its
        length of 0, and one with a negative length has no shape.
    """
    sizes = dict(bound)
    shapes, dtypes = all_types(proto, sizes, nodes)
    found = dict(sizes), shapes, dtypes
    empty = _lengths_without_elements(shapes, proto, nodes)
    while empty and growing and max(sizes[name] for name in growing) < LARGEST_ASSUMED:
        for name in growing:
            sizes[name] *= ENLARGED
        shapes, dtypes = all_types(proto, sizes, nodes)
        previous, empty = empty, _lengths_without_elements(shapes, proto, nodes)
        if not empty:
            return sizes, shapes, dtypes
        if empty == previous and min(empty.values()) == 0:
            break  # they have no elements whatever the sizes; by a large stride, negative lengths may repeat
    sizes, shapes, dtypes = found
    return sizes, {n: s for n, s in shapes.items() if min(s, default=0) >= 0}, dtypes


def _lengths_without_elements(
    shapes: Shapes, proto: ModelProto, nodes: Sequence[Node]
) -> dict[str, int]:
    """The least length of every computed tensor that has one of 0 or less, or that less than a window is read for."""
    given = {value.name for value in proto.graph.input}
    given.update(tensor.name for tensor in proto.graph.initializer)
    least = {name: min(shape, default=1) for name, shape in shapes.items() if name not in given}
    for node in nodes:
        kernel = _kernel(node, shapes)
        if kernel is not None:
            lacking = missing(node, kernel, shapes[node.inputs[0]][2:])
            if lacking:
                least[node.outputs[0]] = min(least.get(node.outputs[0], 0), -lacking)
    return {name: length for name, length in least.items() if length <= 0}


def _kernel(node: Node, shapes: Shapes) -> tuple[int, ...] | None:
    """Spatial shape of the kernel that moves over an input; None for other nodes, and where it does not fit in rank."""
    if node.op not in kinds.WINDOWED or node.inputs[0] not in shapes:
        return None
    if "kernel_shape" in node.attrs:
        kernel = tuple(int(length) for length in node.attrs["kernel_shape"])
    else:
        kernel = shapes.get(node.inputs[1], ())[2:] if len(node.inputs) > 1 else ()
    return kernel if kernel and len(kernel) == len(shapes[node.inputs[0]]) - 2 else None


class _SubgraphInference:
    """Shape inference in the subgraphs of nodes, given the shapes of the graph around them.

    A value that a loop carries from step to step is assumed to keep the shape of its first value. If a step gives it
    another one, its shape is unknown, and the subgraph is inferred again without it.

    Attributes:
        shapes: Shapes of the tensors in the subgraphs.
        dtypes: Element types of these tensors.
        outputs: Shapes of the outputs of the nodes.
    """

    def __init__(
        self,
        proto: ModelProto,
        protos: Mapping[str, NodeProto],
        outer: _Known,
    ) -> None:
        self._proto = proto
        self._protos = protos
        self._outer_shapes = outer.shapes
        self._outer_dtypes = outer.dtypes
        self._outer_values = outer.values
        self.shapes: Shapes = {}
        self.dtypes: Types = {}
        self.outputs: Shapes = {}

    def follow(self, nodes: Sequence[Node]) -> None:
        """Infers the subgraphs of several nodes of one graph.

        Args:
            nodes: All nodes of the graph; those without subgraphs are skipped.
        """
        for node in nodes:
            spec = lookup(node.domain, node.op, node.version)
            if spec is None or spec.flow is None:
                continue
            with rule_errors(node):
                flow = spec.flow(node)
            shapes, dtypes = self._infer_node(node, flow)
            self.shapes.update({n: s for n, s in shapes.items() if n not in self._outer_shapes})
            self.dtypes.update({n: t for n, t in dtypes.items() if n not in self._outer_dtypes})
            self._infer_outputs(node, flow, shapes)

    def _infer_node(self, node: Node, flow: Flow) -> tuple[Shapes, Types]:
        """Shapes and types of all tensors that the subgraphs of a node see."""
        outer = self._outer_shapes
        inputs = {name: outer[first] for (first, _), name in flow.enters if first in outer}
        for source, name, axis in flow.slices:
            if source in outer:
                inputs[name] = tuple(np.delete(outer[source], axis).tolist())
        while True:
            shapes, dtypes = dict(outer), dict(self._outer_dtypes)
            for key, body in node.bodies.items():
                graph = subgraphs.bodies(self._protos[node.name])[key]
                self._infer_body(graph, body.nodes, inputs, shapes, dtypes)
            changing = [
                name
                for (_, carried), name in flow.enters
                if name in inputs and shapes.get(carried) != inputs[name]
            ]
            if not changing:
                return shapes, dtypes
            for name in changing:
                del inputs[name]

    def _infer_outputs(self, node: Node, flow: Flow, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Shapes of the outputs of a node, from those of its subgraphs."""
        condition = self._outer_values.get(node.inputs[0]) if has(node, Trait.BRANCHES) else None
        for (first, second), output in flow.joins:
            if condition is not None:  # the sizes decide which branch runs
                first = second = first if condition.reshape(-1)[0] else second
            if first in shapes and shapes[first] == shapes.get(second):
                self.outputs[output] = shapes[first]
        outer = self._outer_shapes
        steps = [outer[source][axis] for source, _, axis in flow.slices if source in outer]
        for element, output, axis in flow.stacks:
            if element in shapes and steps:
                shape = shapes[element]
                position = axis % (len(shape) + 1)
                self.outputs[output] = (*shape[:position], steps[0], *shape[position:])

    def _infer_body(
        self,
        graph: GraphProto,
        nodes: Sequence[Node],
        inputs: Mapping[str, tuple[int, ...]],
        shapes: Shapes,
        dtypes: Types,
    ) -> None:
        """Infers one subgraph and those within it.

        Args:
            graph: The subgraph.
            nodes: Its nodes.
            inputs: Shapes of its inputs.
            shapes: Shapes of the tensors around it, extended by its own.
            dtypes: Element types of the tensors around it, extended by its own.
        """

        def run(known: Shapes) -> tuple[ModelProto, GraphProto]:
            model = self._as_model(graph, inputs, shapes, dtypes)
            _declare(model, known)
            return model, _inferred(model, self._proto)

        around = _Known(shapes, dtypes, self._outer_values)
        found = _settled(around, nodes, run, proto=self._proto, protos=self._protos)
        shapes.update(found.shapes)
        dtypes.update(found.dtypes)

    def _as_model(
        self,
        graph: GraphProto,
        inputs: Mapping[str, tuple[int, ...]],
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, np.dtype[Any]],
    ) -> ModelProto:
        """A subgraph as a model of its own; the outer tensors that it reads are inputs."""
        model = ModelProto(ir_version=max(self._proto.ir_version, 4))
        model.opset_import.extend(self._proto.opset_import)
        model.graph.name = graph.name or "body"
        model.graph.node.extend(graph.node)
        for value in graph.input:
            tensor_type = value.type.tensor_type
            is_scalar = tensor_type.HasField("shape") and not tensor_type.shape.dim
            shape = inputs.get(value.name, () if is_scalar else None)
            declared = onnx.helper.make_tensor_value_info(value.name, tensor_type.elem_type, shape)
            model.graph.input.append(declared)
        read: set[str] = set()
        defined = {value.name for value in graph.input}
        for node in graph.node:
            read.update(subgraphs.reads(node))
            defined.update(node.output)
        for tensor in self._proto.graph.initializer:
            if tensor.name in read and int(np.prod(tensor.dims)) <= SMALL:
                model.graph.initializer.append(tensor)
                defined.add(tensor.name)
        for name in sorted((read - defined) & self._outer_values.keys()):
            known = self._outer_values[name]
            model.graph.initializer.append(numpy_helper.from_array(known, name))
            defined.add(name)
        for name in sorted(read - defined):
            element_type = 0
            if name in dtypes:
                element_type = int(onnx.helper.np_dtype_to_tensor_dtype(dtypes[name]))
            outer = onnx.helper.make_tensor_value_info(name, element_type, shapes.get(name))
            model.graph.input.append(outer)
        model.graph.output.extend(graph.output)
        clear_output_shapes(model.graph)
        return model


# ---------------------------------------------------------------------------------------------- inferred graphs


def tensor_types(graph: GraphProto) -> tuple[Shapes, Types]:
    """Reads shapes and types from an inferred graph.

    Args:
        graph: The graph.

    Returns:
        Shapes and element types by tensor name, as far as they are known.
    """
    shapes: Shapes = {}
    dtypes: Types = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if not value.type.HasField("tensor_type"):
            continue
        tensor_type = value.type.tensor_type
        if tensor_type.elem_type:
            dtypes[value.name] = _dtype(tensor_type.elem_type)
        dims = tensor_type.shape.dim
        if tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            shapes[value.name] = tuple(d.dim_value for d in dims)
    # Initialisers include tensors that were computed symbolically.
    for tensor in graph.initializer:
        shapes[tensor.name] = tuple(tensor.dims)
        dtypes[tensor.name] = _dtype(tensor.data_type)
    return shapes, dtypes


def _dtype(element_type: int) -> np.dtype[Any]:
    if not element_type:
        return np.dtype(object)
    if element_type == TensorProto.BFLOAT16:
        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element_type))


def _dims(shape: onnx.TensorShapeProto) -> list[int | str | None]:
    return [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in shape.dim]


# ----------------------------------------------------------------------------------------------- symbolic values


@dataclass(frozen=True)
class Values:
    """Static knowledge about the tensors of a graph.

    Attributes:
        dims: Dimensions by tensor name.
        types: ONNX element types by tensor name.
        entries: Elements of small tensors by name, as numbers or symbolic sizes.
    """

    dims: Mapping[str, Dims]
    types: Mapping[str, int]
    entries: Mapping[str, Entries]


def known_values(proto: ModelProto, graph: GraphProto | None = None) -> Values:
    """Follows symbolic dimensions through a graph.

    Args:
        proto: The model.
        graph: Its graph with inferred shapes. Default: shapes are inferred with dimensions as they are declared.

    Returns:
        Dimensions, element types, and the lists that the graph computes from dimensions.
    """
    recognised: dict[str, Dims] = {}
    nodes = proto.graph.node if graph is None else graph.node
    if graph is None:
        copy = skeleton(proto)
        _replace_unknown_operators(copy, proto)
        graph = inferred(copy)
        recognised = _recognised_dims(proto)
    dims: dict[str, Dims] = {}
    types: dict[str, int] = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.type.HasField("tensor_type"):
            types[value.name] = value.type.tensor_type.elem_type
        if value.type.tensor_type.HasField("shape"):
            dims[value.name] = _dims(value.type.tensor_type.shape)
    for name, symbols in recognised.items():
        inferred_dims = list(dims.get(name, []))
        if len(inferred_dims) != len(symbols):  # not known, or declared with another rank
            inferred_dims = [None] * len(symbols)
        dims[name] = [
            dim if isinstance(dim, int) or symbol is None else symbol
            for dim, symbol in zip(inferred_dims, symbols, strict=True)
        ]
    for tensor in proto.graph.initializer:
        dims[tensor.name] = list(tensor.dims)
    constants = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_type in FOLLOWED_TYPES
    }
    dtypes = {
        name: onnx.helper.tensor_dtype_to_np_dtype(kind)
        for name, kind in types.items()
        if kind in FOLLOWED_TYPES
    }
    dtypes.update((name, value.dtype) for name, value in constants.items())
    version = {o.domain: o.version for o in proto.opset_import}.get("", 1)
    entries = follow(nodes, constants, dims, dtypes=dtypes, version=version)
    return Values(dims, types, entries)


def _recognised_dims(proto: ModelProto) -> dict[str, Dims]:
    """Dynamic dimensions that ONNX's inference loses, recognised by their sizes under three bindings.

    A dimension is recognised as a product of symbols and a number if it equals that under every binding. Two of the
    bindings use large primes, so that no other computation gives the same number. Fixed lengths are not recognised.

    A large size exceeds the tables of positions and causal masks of a model: behind a sum of both, inference fails at
    such a size. There, and only there, the table is assumed to be as long as the model asks for.
    """
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = tuple(port_of(v) for v in proto.graph.input if v.name not in constants)
    default = bind(inputs, {})
    if not default or len(default) > len(PRIMES):
        return {}
    bindings = [
        default,
        dict(zip(default, PRIMES, strict=False)),
        dict(zip(default, PRIMES[::-1], strict=False)),
    ]
    found = [_inferred_shapes(proto, binding) for binding in bindings]
    endless = _with_endless_tables(proto)
    if endless is not None:
        for i, binding in enumerate(bindings):
            found[i] = {**_inferred_shapes(endless, binding), **found[i]}
    result: dict[str, Dims] = {}
    for name in set(found[0]) & set(found[1]) & set(found[2]):
        shapes = [by_name[name] for by_name in found]
        if len({len(shape) for shape in shapes}) > 1:
            continue
        result[name] = [_product_of_sizes(sizes, bindings) for sizes in zip(*shapes, strict=True)]
    return result


def _inferred_shapes(proto: ModelProto, binding: Mapping[str, int]) -> Shapes:
    shapes, _ = tensor_types(infer(proto, binding))
    return shapes


def _product_of_sizes(
    sizes: tuple[int, ...], bindings: Sequence[Mapping[str, int]]
) -> Size | str | None:
    """Product of symbols that has these sizes under the bindings, of which the second one is of primes."""
    factor = sizes[1]
    names: list[str] = []
    for name, prime in bindings[1].items():
        while factor and factor % prime == 0:
            factor //= prime
            names.append(name)
    expected = (math.prod((factor, *(binding[name] for name in names))) for binding in bindings)
    if not names or sizes != tuple(expected):
        return None
    return product(names, factor)


def _with_endless_tables(proto: ModelProto) -> ModelProto | None:
    """A skeleton in which constants that are only sliced to a computed length are longer than any such length.

    Returns:
        None if the model has no such constants.
    """
    result = skeleton(proto)
    constants = {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    values = {t.name: numpy_helper.to_array(t) for t in result.graph.initializer}
    # The constant that a tensor is a slice of, possibly over several slices.
    origin: dict[str, str] = {name: name for name in constants}
    sliced_axes: dict[str, set[int]] = {}
    read_whole: set[str] = set()
    for node in proto.graph.node:
        is_slice = has(node, Trait.SLICES)
        for slot, name in enumerate(node.input):
            if name in constants and (slot > 0 or not is_slice):
                read_whole.add(name)
        if not is_slice or node.input[0] not in origin:
            continue
        table = origin[node.input[0]]
        origin[node.output[0]] = table
        # Inputs of a Slice: data, starts, ends, axes.
        axes = values.get(node.input[3]) if len(node.input) > 3 else None
        if axes is not None and node.input[2] not in constants:
            rank = len(constants[table])
            sliced_axes.setdefault(table, set()).update(int(axis) % rank for axis in axes)
    tables = sliced_axes.keys() - read_whole
    for name in tables:
        _lengthen(result, name, sliced_axes[name])
    return result if tables else None


def _lengthen(proto: ModelProto, name: str, axes: set[int]) -> None:
    """Turns a constant into an input that is longer along some axes than any size that is tried."""
    graph = proto.graph
    others = [tensor for tensor in graph.initializer if tensor.name != name]
    if len(others) < len(graph.initializer):
        (table,) = [tensor for tensor in graph.initializer if tensor.name == name]
        declared = onnx.helper.make_tensor_value_info(name, table.data_type, list(table.dims))
        graph.input.append(declared)
        del graph.initializer[:]
        graph.initializer.extend(others)
    (value,) = [v for v in graph.input if v.name == name]
    for axis in axes:
        value.type.tensor_type.shape.dim[axis].dim_value = 2 * max(PRIMES)


def symbol_homes(proto: ModelProto, dims: Mapping[str, Dims]) -> dict[str, Axis]:
    """Axes at which the lengths of symbols can be read.

    Args:
        proto: The model.
        dims: Dimensions by tensor name.

    Returns:
        One axis per symbol, that of a graph input where there is one. A dimension without a name is called
        'tensor:axis'.
    """
    homes: dict[str, Axis] = {}
    inputs = [value.name for value in proto.graph.input]
    for name in (*inputs, *(tensor for tensor in dims if tensor not in inputs)):
        for axis, dim in enumerate(dims.get(name, [])):
            if not isinstance(dim, int | Size):
                homes.setdefault(dim or f"{name}:{axis}", (name, axis))
    return homes


def skeleton(proto: ModelProto) -> ModelProto:
    """Copies a model without its large constants, which become inputs: enough for shape inference.

    Args:
        proto: The model.

    Returns:
        A small copy.
    """
    result = ModelProto()
    result.ir_version = max(proto.ir_version, 4)
    result.opset_import.extend(proto.opset_import)
    result.functions.extend(proto.functions)
    graph = result.graph
    graph.name = proto.graph.name or "graph"
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = {value.name for value in proto.graph.input}
    graph.input.extend(value for value in proto.graph.input if value.name not in constants)
    graph.output.extend(proto.graph.output)
    graph.node.extend(proto.graph.node)
    for tensor in proto.graph.initializer:
        is_small = int(np.prod(tensor.dims)) <= SMALL
        # A feed may replace the value of a constant that is also an input.
        if is_small and tensor.name not in inputs:
            graph.initializer.append(tensor)
        else:
            value = onnx.helper.make_tensor_value_info(
                tensor.name, tensor.data_type, list(tensor.dims)
            )
            graph.input.append(value)
    return result
