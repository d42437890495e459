"""Conformance: files that ONNX Runtime runs although they do not keep to all rules of ONNX, made to keep to them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx
from google.protobuf.message import Message
from onnx import AttributeProto, ModelProto, TensorProto, ValueInfoProto

from onnx_oamip.core.errors import ModelError
from onnx_oamip.core.printable import shortened
from onnx_oamip.graph import default_inputs, node_order, ops, subgraphs
from onnx_oamip.graph.input_guards import inferred, refuse_negative_lengths
from onnx_oamip.graph.ops import kinds
from onnx_oamip.graph.shape_inference import clear_output_shapes, skeleton

DEFAULT_DOMAIN = "ai.onnx"
"""Second spelling of the default domain, whose first one is empty."""
EQUATION = re.compile(rb"[A-Za-z., ]*(->[A-Za-z. ]*)?")
"""Characters of an equation."""
REMARKS = frozenset(
    {"doc_string", "producer_name", "producer_version", "denotation", "key", "value"}
)
"""Fields with text that nothing refers to."""
FIRST_VERSION = 4
"""Version of the format since which initialisers need not be inputs; before, no feed could replace them."""


def conform(proto: ModelProto) -> None:
    """Rewrites what the checker of ONNX refuses and ONNX Runtime accepts; the model computes the same.

    Nodes are sorted, the default domain gets one spelling, and initialisers need not be inputs. Works in place.

    Args:
        proto: A model as it is in its file.

    Raises:
        ModelError: A name is not UTF-8, the nodes read each other's outputs in a cycle, an attribute refers to one of
            a function outside of any or has the wrong type, a branch gives fewer outputs than its node, a tensor is
            stored in segments or has an unknown type, or an equation holds other characters than those of ONNX.
    """
    _decode_texts(proto)
    _check_tensors(proto)
    _check_equations(proto)
    _check_attributes(proto)
    _check_branches(proto)
    node_order.sort(proto.graph)
    if proto.ir_version < FIRST_VERSION:
        default_inputs.close(proto)
        proto.ir_version = FIRST_VERSION
    _spell_default_domain(proto)


def _decode_texts(message: Message) -> None:
    """Replaces bytes that are not UTF-8 in remarks; raises ModelError for such bytes in names.

    Protocol buffers give such a text as bytes, in place of a string.
    """
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            for text in [value] if isinstance(value, str | bytes) else value:
                if not isinstance(text, bytes):
                    continue
                readable = text.decode("utf-8", "replace")
                if field.name not in REMARKS:
                    raise ModelError(
                        f"the {field.name} '{shortened(readable)}' in {type(message).__name__} is not UTF-8; "
                        "export the model again with names in UTF-8."
                    )
                setattr(message, field.name, readable)
        elif field.type == field.TYPE_MESSAGE:
            for part in [value] if isinstance(value, Message) else value:
                _decode_texts(part)


def _check_tensors(proto: ModelProto) -> None:
    """Raises ModelError for a tensor of unknown type, or in segments, which no reader of ONNX puts together."""
    known = set(TensorProto.DataType.values())
    for tensor in subgraphs.tensors(proto):
        if tensor.data_type not in known:
            raise ModelError(
                f"the tensor '{shortened(tensor.name)}' has the element type {tensor.data_type}, which ONNX does not "
                "have; export the model again."
            )
        if tensor.HasField("segment"):
            raise ModelError(
                f"the tensor '{shortened(tensor.name)}' is one segment of a tensor, which is not supported; export the "
                "model again."
            )


def _check_equations(proto: ModelProto) -> None:
    """Raises ModelError for an equation of other characters: ONNX's shape inference writes outside of its memory."""
    for node in subgraphs.nodes_and_function_nodes(proto):
        for attribute in node.attribute:
            is_equation = node.op_type in kinds.EQUATION and attribute.name == "equation"
            if is_equation and not EQUATION.fullmatch(attribute.s):
                text = attribute.s.decode("utf-8", "replace")
                raise ModelError(
                    f"the equation '{shortened(text)}' of {node.op_type} '{shortened(node.name)}' is not one of "
                    "letters, commas, '...' and one '->'; export the model again."
                )


def _check_attributes(proto: ModelProto) -> None:
    """Raises ModelError for references to attributes of a function outside of any function, and for wrong types."""
    versions = {opset.domain: opset.version for opset in proto.opset_import}
    for node in subgraphs.nodes(proto.graph):
        spec = ops.lookup(node.domain, node.op_type, versions.get(node.domain, 1))
        types = spec.attributes if spec is not None else {}
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                raise ModelError(
                    f"the attribute '{attribute.name}' of {node.op_type} '{shortened(node.name)}' refers to one of a "
                    "function, outside of any function; export the model again."
                )
            expected = types.get(attribute.name, attribute.type)
            if attribute.type != expected:
                raise ModelError(
                    f"the attribute '{attribute.name}' of {node.op_type} '{shortened(node.name)}' is of the type "
                    f"{_type_name(attribute.type)}, but {_type_name(expected)} is expected; export the model again."
                )


def _type_name(number: int) -> str:
    """Name of a type of attributes."""
    return str(AttributeProto.AttributeType.Name(number))


def _check_branches(proto: ModelProto) -> None:
    """Raises ModelError for a branch of an If that gives fewer outputs than the node."""
    for node in subgraphs.nodes(proto.graph):
        given = subgraphs.bodies(node)
        for name in subgraphs.BRANCHES.values():
            if name in given and len(given[name].output) < len(node.output):
                raise ModelError(
                    f"{node.op_type} '{shortened(node.name)}' has {len(node.output)} outputs, and its {name} gives "
                    f"{len(given[name].output)}; export the model again."
                )


def _spell_default_domain(proto: ModelProto) -> None:
    nodes = list(subgraphs.nodes(proto.graph))
    imports = [proto.opset_import]
    for function in proto.functions:
        nodes.extend(function.node)
        imports.append(function.opset_import)
    for node in nodes:
        if node.domain == DEFAULT_DOMAIN:
            node.domain = ""
    for imported in imports:
        spelt = [opset for opset in imported if opset.domain == DEFAULT_DOMAIN]
        if len(spelt) < len(imported) and any(not opset.domain for opset in imported):
            for opset in spelt:
                imported.remove(opset)
        else:
            for opset in spelt:
                opset.domain = ""


def with_shapes(proto: ModelProto) -> ModelProto:
    """Declares a shape for inputs and outputs that have none, for the checker, which demands one.

    Args:
        proto: Any model.

    Returns:
        The model itself if all have a shape, else a copy.
    """
    if not _without_shape((*proto.graph.input, *proto.graph.output)):
        return proto
    result = ModelProto()
    result.CopyFrom(proto)
    for value in _without_shape((*result.graph.input, *result.graph.output)):
        value.type.tensor_type.shape.SetInParent()
    return result


def _without_shape(values: Sequence[ValueInfoProto]) -> list[ValueInfoProto]:
    tensors = [value for value in values if value.type.HasField("tensor_type")]
    return [value for value in tensors if not value.type.tensor_type.HasField("shape")]


def declare_outputs(proto: ModelProto) -> tuple[str, ...]:
    """Declares outputs without a shape, or with one that the graph contradicts, as the graph computes them.

    Works in place. Dimensions that are not known as numbers are left as they are.

    Args:
        proto: A valid model.

    Returns:
        A note for every shape that was wrong.

    Raises:
        ModelError: An input has no shape, an output has none and none can be inferred, or a length is negative.
    """
    graph = proto.graph
    for value in _without_shape(graph.input):
        raise ModelError(
            f"the input '{value.name}' declares no shape, so that its number of axes is not known; declare one, with "
            "names for lengths that vary, and save the model again."
        )
    copy = skeleton(proto)
    clear_output_shapes(copy.graph)
    complete = inferred(copy)
    refuse_negative_lengths(complete, copy.graph)
    computed = {value.name: value for value in complete.output}
    notes: dict[str, None] = {}  # a set in order
    for value in graph.output:
        found = computed[value.name].type
        if not (value.type.HasField("tensor_type") and found.tensor_type.HasField("shape")):
            continue
        declared = value.type.tensor_type
        if not declared.HasField("shape"):
            declared.shape.CopyFrom(found.tensor_type.shape)
            continue
        before = _text(declared.shape)
        if _correct(declared.shape, found.tensor_type.shape):
            notes[
                f"the file declares the output '{value.name}' as {before}, but its graph computes "
                f"{_text(declared.shape)}; the result declares what is computed"
            ] = None
    for value in _without_shape(graph.output):
        raise ModelError(
            f"the output '{value.name}' declares no shape, and none can be inferred; declare one, with names for "
            "lengths that vary, and save the model again."
        )
    return tuple(notes)


def _correct(declared: onnx.TensorShapeProto, found: onnx.TensorShapeProto) -> bool:
    """Replaces what contradicts the shape that was found; True if anything did."""
    if len(declared.dim) != len(found.dim):
        declared.CopyFrom(found)
        return True
    wrong = [
        (ours, theirs)
        for ours, theirs in zip(declared.dim, found.dim, strict=True)
        if ours.HasField("dim_value")
        and theirs.HasField("dim_value")
        and ours.dim_value != theirs.dim_value
    ]
    for ours, theirs in wrong:
        ours.CopyFrom(theirs)
    return bool(wrong)


def _text(shape: onnx.TensorShapeProto) -> str:
    dims = [str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in shape.dim]
    return f"[{', '.join(dims)}]"
