"""Outputs of a model: the classification head, floating activations, and models with other outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnx_oamip.core.records import (
    Model,
    Node,
)
from onnx_oamip.graph.ops import Trait, has


@dataclass(frozen=True, slots=True)
class Head:
    """A classification head: the place of the output of shape (samples, classes), and the tensor with its logits."""

    index: int
    logits: str


def head(model: Model) -> Head | None:
    """The first floating output of shape (samples, classes), two or more; its logits are what a softmax makes it from.

    None where the model has no such output.
    """
    for i, port in enumerate(model.outputs):
        shape = model.shapes.get(port.name)
        if shape is not None and len(shape) == 2 and shape[1] > 1 and is_float(port.dtype):
            maker = producer_with(model, port.name, Trait.SOFTMAX)
            across = maker is not None and int(maker.attrs.get("axis", -1)) in (-1, 1)
            return Head(i, maker.inputs[0] if maker is not None and across else port.name)
    return None


def producer_with(model: Model, tensor: str, traits: Trait) -> Node | None:
    """Return the producer of a tensor, if its operator has one of some traits.

    Args:
        model: The model.
        tensor: Name of a tensor.
        traits: Any of these.

    Returns:
        The producer, Identity nodes skipped, or None if there is none or its operator has none of the traits.
    """
    makers = {out: node for node in model.nodes for out in node.outputs}
    node = makers.get(tensor)
    while node is not None and has(node, Trait.COPIES):
        node = makers.get(node.inputs[0])
    return node if node is not None and has(node, traits) else None


def is_float(kind: np.dtype[Any]) -> bool:
    """Whether an element type is floating, those that numpy does not know among them."""
    return bool(np.issubdtype(kind, np.floating)) or "float" in kind.name


def float_activations(model: Model) -> list[str]:
    """Every activation of floating type and known shape, each named once."""
    made = dict.fromkeys(n for node in model.nodes for n in node.outputs if n)
    return [
        n
        for n in made
        if n in model.shapes and n in model.dtypes and np.issubdtype(model.dtypes[n], np.floating)
    ]


def with_outputs(
    model: Model, names: Sequence[str], proto: onnx.ModelProto | None = None
) -> onnx.ModelProto:
    """The model (or ``proto``, made of it) with other outputs."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model.proto if proto is None else proto)
    del shown.graph.output[:]
    for name in names:
        kind = helper.np_dtype_to_tensor_dtype(model.dtypes[name])
        shown.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    return shown
