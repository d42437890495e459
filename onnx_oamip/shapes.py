"""Names, types and shapes of a graph's tensors, by ONNX shape inference under sizes for the symbolic dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import GraphProto, ModelProto, TensorProto

from .errors import ModelError
from .ops import lookup
from .records import Port

Dims = list[int | str | None]
"""Sizes of a tensor: a number, a symbol's name, or None where nothing is known."""
SMALL = 1024
"""Constants above this many elements cannot matter for shapes and are left out of shape inference."""
DEFAULT_SPATIAL = 64
DEFAULT_LENGTH = 16


def port_of(value: onnx.ValueInfoProto) -> Port:
    """A declared input or output. Raises ModelError where it is no tensor."""
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        raise ModelError(f"the graph input or output '{value.name}' is not a tensor; only tensors are supported.")
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


def infer(proto: ModelProto, bound: Mapping[str, int]) -> GraphProto:
    """The graph with shapes inferred under sizes for its symbolic dimensions."""
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
    versions = {o.domain: o.version for o in proto.opset_import}
    for node in copy.graph.node:
        spec = lookup(node.domain, node.op_type, versions.get(node.domain, 1))
        if spec is not None and spec.same:  # for shapes it is the identity
            node.op_type, node.domain = "Identity", ""
            del node.attribute[:], node.input[1:], node.output[1:]
    return onnx.shape_inference.infer_shapes(copy, data_prop=True).graph


def tensor_types(graph: GraphProto) -> tuple[dict[str, tuple[int, ...]], dict[str, np.dtype[Any]]]:
    """(shapes, types) of the tensors of an inferred graph, as far as they are known."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, np.dtype[Any]] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if not value.type.HasField("tensor_type"):
            continue
        kind = value.type.tensor_type
        if kind.elem_type:
            dtypes[value.name] = _dtype(kind.elem_type)
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            shapes[value.name] = tuple(d.dim_value for d in kind.shape.dim)
    return shapes, dtypes


def _dtype(elem_type: int) -> np.dtype[Any]:
    if not elem_type:
        return np.dtype(object)
    if elem_type == TensorProto.BFLOAT16:
        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))


def symbolic(proto: ModelProto) -> dict[str, Dims]:
    """Dimensions of every tensor whose rank is known, with symbols as they were declared."""
    graph = onnx.shape_inference.infer_shapes(skeleton(proto), data_prop=True).graph
    return {
        v.name: _dims(v.type.tensor_type.shape)
        for v in (*graph.value_info, *graph.input, *graph.output)
        if v.type.tensor_type.HasField("shape")
    }


def _dims(shape: onnx.TensorShapeProto) -> Dims:
    return [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in shape.dim]


def static_target(before: Dims | None, after: Dims | None) -> list[int] | None:
    """A constant target for a reshape between these dimensions, or None where there is no provably equal one."""
    if before is None or after is None or 0 in after:
        return None
    target: list[int] = []
    for axis, size in enumerate(after):
        if isinstance(size, int):
            target.append(size)
        elif size is not None and axis < len(before) and before[axis] == size:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 else None


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
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return result
