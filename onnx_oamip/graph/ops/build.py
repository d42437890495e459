"""Builders of the nodes that the package inserts into graphs, and of stand-ins for shape inference.

A builder takes the names of its inputs, then that of the output, then the name of the node, which is empty where
nothing refers to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

AXES_AS_INPUT = {"ReduceSum": 13, "ReduceSumSquare": 18, "ReduceMean": 18}
"""Opset from which a reduction takes its axes as an input, by operator."""


def add(
    a: str,
    b: str,
    out: str,
    name: str = "",
) -> NodeProto:
    """Build ``out = a + b``.

    Args:
        a: Name of an operand.
        b: Name of the other.
        out: Name of the result.
        name: Name of the node.

    Returns:
        The node.
    """
    return helper.make_node("Add", [a, b], [out], name)


def mul(
    a: str,
    b: str,
    out: str,
    name: str = "",
) -> NodeProto:
    """Build ``out = a * b``, element by element.

    Args:
        a: Name of an operand.
        b: Name of the other.
        out: Name of the result.
        name: Name of the node.

    Returns:
        The node.
    """
    return helper.make_node("Mul", [a, b], [out], name)


def matmul(
    a: str,
    b: str,
    out: str,
    name: str = "",
) -> NodeProto:
    """Build ``out = a @ b``.

    Args:
        a: Name of an operand.
        b: Name of the other.
        out: Name of the result.
        name: Name of the node.

    Returns:
        The node.
    """
    return helper.make_node("MatMul", [a, b], [out], name)


def identity(source: str, out: str, name: str = "") -> NodeProto:
    """Build ``out = source``.

    Args:
        source: Name of the tensor.
        out: Name of the result.
        name: Name of the node.

    Returns:
        The node.
    """
    return helper.make_node("Identity", [source], [out], name)


def absolute(source: str, out: str, name: str = "") -> NodeProto:
    """Build ``out = |source|``.

    Args:
        source: Name of the tensor.
        out: Name of the result.
        name: Name of the node.

    Returns:
        The node.
    """
    return helper.make_node("Abs", [source], [out], name)


def to_float(source: str, out: str, name: str = "") -> NodeProto:
    """Build a cast to single precision; the runtime removes it where there is nothing to cast.

    Args:
        source: Name of the tensor.
        out: Name of the result.
        name: Name of the node.

    Returns:
        The node.
    """
    return helper.make_node("Cast", [source], [out], name, to=TensorProto.FLOAT)


def shape_of(source: str, out: str, name: str = "") -> NodeProto:
    """Build a list of the lengths of ``source``, int64.

    Args:
        source: Name of the tensor.
        out: Name of the result.
        name: Name of the node.

    Returns:
        The node.
    """
    return helper.make_node("Shape", [source], [out], name)


def reshape(
    source: str,
    target: str,
    out: str,
    name: str = "",
) -> NodeProto:
    """Build ``source`` in another shape.

    Args:
        source: Name of the tensor.
        target: Name of the tensor with the shape.
        out: Name of the result.
        name: Name of the node.

    Returns:
        The node.
    """
    return helper.make_node("Reshape", [source, target], [out], name)


def transpose(
    source: str,
    out: str,
    perm: Sequence[int],
    name: str = "",
) -> NodeProto:
    """Build ``source`` with its axes in another order.

    Args:
        source: Name of the tensor.
        out: Name of the result.
        perm: Order of the axes.
        name: Name of the node.

    Returns:
        The node.
    """
    return helper.make_node("Transpose", [source], [out], name, perm=list(perm))


def gather(
    source: str,
    index: str,
    out: str,
    name: str = "",
) -> NodeProto:
    """Build the elements of axis 0 of ``source`` at some indices.

    Args:
        source: Name of the tensor.
        index: Name of the tensor with the indices.
        out: Name of the result.
        name: Name of the node.

    Returns:
        The node.
    """
    return helper.make_node("Gather", [source, index], [out], name, axis=0)


def concat(sources: Sequence[str], out: str, name: str = "") -> NodeProto:
    """Build ``sources`` joined along axis 0.

    Args:
        sources: Names of the tensors.
        out: Name of the result.
        name: Name of the node.

    Returns:
        The node.
    """
    return helper.make_node("Concat", list(sources), [out], name, axis=0)


def reduce_sum(
    graph: GraphProto,
    source: str,
    out: str,
    *,
    axes: Sequence[int],
    opset: int,
) -> None:
    """Append a sum to a graph; over no axes it is the tensor.

    Args:
        graph: Graph that the node, and the constant with its axes where it needs one, are appended to.
        source: Name of the tensor.
        out: Name of the result.
        axes: Axes to reduce over; they are dropped.
        opset: Opset of the model.
    """
    if axes:
        _reduce(graph, "ReduceSum", source, out, axes=axes, opset=opset)
    else:  # an empty list of axes would mean all of them
        graph.node.append(identity(source, out, out))


def reduce_sum_square(
    graph: GraphProto,
    source: str,
    out: str,
    *,
    axes: Sequence[int],
    opset: int,
) -> None:
    """Append a sum of squares to a graph; over no axes it is the square.

    Args:
        graph: Graph that the node, and the constant with its axes where it needs one, are appended to.
        source: Name of the tensor.
        out: Name of the result.
        axes: Axes to reduce over; they are dropped.
        opset: Opset of the model.
    """
    if axes:
        _reduce(graph, "ReduceSumSquare", source, out, axes=axes, opset=opset)
    else:
        graph.node.append(mul(source, source, out, out))


def reduce_mean(
    graph: GraphProto,
    source: str,
    out: str,
    *,
    axes: Sequence[int],
    opset: int,
) -> None:
    """Append a mean to a graph; over no axes it is the tensor.

    Args:
        graph: Graph that the node, and the constant with its axes where it needs one, are appended to.
        source: Name of the tensor.
        out: Name of the result.
        axes: Axes to reduce over; they are dropped.
        opset: Opset of the model.
    """
    if axes:
        _reduce(graph, "ReduceMean", source, out, axes=axes, opset=opset)
    else:
        graph.node.append(identity(source, out, out))


def _reduce(
    graph: GraphProto,
    op: str,
    source: str,
    out: str,
    *,
    axes: Sequence[int],
    opset: int,
) -> None:
    if opset < AXES_AS_INPUT[op]:
        graph.node.append(helper.make_node(op, [source], [out], out, axes=list(axes), keepdims=0))
        return
    listed = f"{out}_axes"
    graph.initializer.append(numpy_helper.from_array(np.asarray(axes, np.int64), listed))
    graph.node.append(helper.make_node(op, [source, listed], [out], out, keepdims=0))


def become_identity(node: NodeProto, *, floats: bool) -> None:
    """Turn a node into one with the shape of its first input, in place, for shape inference.

    Args:
        node: Node of an operator that ONNX's inference does not know.
        floats: The type of the result is float32, not that of the input.
    """
    node.op_type, node.domain = "Cast" if floats else "Identity", ""
    del node.attribute[:], node.input[1:], node.output[1:]
    if floats:
        node.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))


def become_operator(
    node: NodeProto, name: str, *, inputs: Sequence[int], attrs: Sequence[str]
) -> None:
    """Turn a node into one of a standard operator with the same shapes, in place, for shape inference.

    Args:
        node: Node of an operator that ONNX's inference does not know.
        name: The standard operator.
        inputs: Slots of the inputs that it reads.
        attrs: Attributes of the same name in both.
    """
    kept = [attribute for attribute in node.attribute if attribute.name in attrs]
    names = [node.input[slot] for slot in inputs]
    node.op_type, node.domain = name, ""
    del node.input[:], node.attribute[:]
    node.input.extend(names)
    node.attribute.extend(kept)


def become_product(node: NodeProto, matrix: str) -> None:
    """Turn a node into the product of its first input with a matrix, in place, for shape inference.

    Args:
        node: Node of an operator that ONNX's inference does not know.
        matrix: Name of the matrix.
    """
    node.op_type, node.domain, node.input[1] = "MatMul", "", matrix
    del node.attribute[:], node.input[2:], node.output[1:]


def become_transpose(node: NodeProto, source: str, perm: Sequence[int]) -> None:
    """Turn a node into a transposition, in place.

    Args:
        node: Node that is rewritten.
        source: Name of the tensor that is transposed.
        perm: Order of the axes.
    """
    node.op_type, node.input[0] = "Transpose", source
    del node.input[1:], node.attribute[:]
    node.attribute.append(helper.make_attribute("perm", list(perm)))


def renamed(
    node: NodeProto,
    source: str,
    out: str,
    name: str,
) -> NodeProto:
    """Build a copy of a node of one input and one output.

    Args:
        node: The node.
        source: Name of the input of the copy.
        out: Name of its output.
        name: Name of the copy.

    Returns:
        The copy, with the attributes of the node.
    """
    result = NodeProto()
    result.CopyFrom(node)
    result.input[0], result.output[0], result.name = source, out, name
    return result


def become_expand(node: NodeProto, source: str) -> None:
    """Turn a node whose first input is a list of lengths into an expansion to these lengths, in place.

    Args:
        node: Node that is rewritten.
        source: Name of the tensor that is expanded.
    """
    target = node.input[0]
    node.op_type = "Expand"
    del node.input[:], node.attribute[:]
    node.input.extend([source, target])
