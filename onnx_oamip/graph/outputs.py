"""Outputs of a model: the operator behind one, floating activations, and models with other outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnx_oamip.core.records import (
    Model,
    Node,
)
from onnx_oamip.graph.ops import Trait, has


def producer_with(model: Model, tensor: str, traits: Trait) -> Node | None:
    """Return the producer of a tensor, if its operator has one of some traits.

    Args:
        model: The model.
        tensor: Name of a tensor.
        traits: Any of these.

    Returns:
        The producer, Identity nodes skipped, or None if there is none or its operator has none of the traits.
    """
    producers = {out: node for node in model.nodes for out in node.outputs}
    node = producers.get(tensor)
    while node is not None and has(node, Trait.COPIES):
        node = producers.get(node.inputs[0])
    if node is not None and has(node, traits):
        return node
    return None


def is_float(kind: np.dtype[Any]) -> bool:
    """Check whether an element type is floating-point.

    Args:
        kind: Element type.

    Returns:
        True for floating types, those that numpy has no name for (bfloat16, float8) among them.
    """
    return bool(np.issubdtype(kind, np.floating)) or "float" in kind.name


def float_activations(model: Model) -> list[str]:
    """List the activations of a floating type and a known shape.

    Args:
        model: The model.

    Returns:
        Names of tensors in graph order, each once.
    """
    activations = dict.fromkeys(n for node in model.nodes for n in node.outputs if n)
    known = (n for n in activations if n in model.shapes and n in model.dtypes)
    return [n for n in known if np.issubdtype(model.dtypes[n], np.floating)]


def with_outputs(
    model: Model,
    names: Sequence[str],
    proto: onnx.ModelProto | None = None,
) -> onnx.ModelProto:
    """Copy a model and give it other outputs.

    Args:
        model: The model, which knows the element types.
        names: Tensors that become the outputs.
        proto: A graph made of the model's, to copy in place of it.

    Returns:
        The copy.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model.proto if proto is None else proto)
    del result.graph.output[:]
    declared = {port.name: port.dtype for port in model.outputs}
    for name in names:
        dtype = model.dtypes.get(name, declared.get(name))
        if (
            dtype is None
        ):  # of an operator that shape inference does not know; the runtime infers it
            result.graph.output.append(onnx.ValueInfoProto(name=name))
            continue
        kind = helper.np_dtype_to_tensor_dtype(dtype)
        result.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    return result
