"""Quantised models: scales and zero points are removed with their channels; a channel is masked by its code of zero.

Reference: ONNX operator specification, "QuantizeLinear", "DequantizeLinear" (per tensor, per axis, blocked),
"DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger". All scales but the dynamic ones
are constants, so that taking channels away changes no other number. DynamicQuantizeLinear takes the range of the whole
tensor and zero: a channel of zeros does not change it, so there channels are masked, as at a consumer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np

from onnx_oamip.core.records import Array, Axis, Node
from onnx_oamip.graph.ops.handles import Cuts, Labels, operand
from onnx_oamip.graph.ops.linear import conv, conv_cost, matmul, matmul_cost, regroup
from onnx_oamip.graph.ops.notation import opaque
from onnx_oamip.graph.ops.spec import Codes, EditRules, OpSpec, Shapes, Trait

# ------------------------------------------------------------------------------- QuantizeLinear and DequantizeLinear


def _scaled(node: Node, labels: Labels) -> None:
    x, scale = node.inputs[:2]
    shape = labels.shape(x)
    size = labels.shape(scale)
    axis = _axis(node, shape)
    if (
        shape is None
        or size is None
        or (len(size) == 1 and size[0] > 1 and (axis is None or shape[axis] != size[0]))
    ):
        opaque(node, labels, f"{node} reads a tensor or a scale of unknown shape")
        return
    axes = labels.axes(x)
    parameters = [scale, *([zero] if (zero := operand(node, 2)) else [])]
    if len(size) == 1 and axis is not None and shape[axis] == size[0]:
        axes[axis] = labels.unify([(x, axis), *((name, 0) for name in parameters)], node)
    elif len(size) == len(shape) and max(size, default=1) > 1:
        # One scale for a block of neighbours along one axis, one for every index of the others.
        for a, n in enumerate(size):
            if n == shape[a]:
                axes[a] = labels.unify([(x, a), *((name, a) for name in parameters)], node)
            else:
                labels.pin(axes[a], f"{node} has one scale for several of it")
    labels.set(node.outputs[0], axes)


def _axis(node: Node, shape: tuple[int, ...] | None) -> int | None:
    axis = int(node.attrs.get("axis", 1))
    if shape and -len(shape) <= axis < len(shape):
        return axis % len(shape)
    return None


def _zero_stored(node: Node, cuts: Cuts) -> dict[int, Array]:
    """DequantizeLinear: its zero point, as broadcasts to the data."""
    shape = cuts.shape(node.inputs[0])
    zero = operand(node, 2)
    value = None if zero is None else cuts.constant(zero)
    if zero is not None and value is None:
        return {}
    if value is None:
        return {0: np.zeros(())}
    axis = _axis(node, shape)
    if value.ndim == 1 and value.size > 1 and axis is not None:
        return {0: value.reshape([-1 if a == axis else 1 for a in range(len(shape))])}
    if value.ndim == len(shape) > 1:
        for a, n in enumerate(shape):
            if value.shape[a] != n:
                value = np.repeat(value, -(-n // value.shape[a]), axis=a).take(np.arange(n), axis=a)
        return {0: value}
    if value.size == 1:
        return {0: value.reshape(())}
    return {}


def _zero_real(node: Node, cuts: Cuts) -> dict[int, Array]:
    """QuantizeLinear: a real zero becomes the zero point exactly."""
    return {0: np.zeros(())}


# --------------------------------------------------------------------------------------------- DynamicQuantizeLinear


def _dynamic(node: Node, labels: Labels) -> None:
    x = node.inputs[0]
    axes = labels.axes(x)
    for a, found in enumerate(axes):
        if found is not None:
            labels.consume(node, (x, a), None)
    labels.set(node.outputs[0], axes)
    for name in node.outputs[1:]:
        labels.set(name, [], f"{node} makes one of it for the whole tensor")


# -------------------------------------------------------------------------------------------------- integer products


def _integer(
    node: Node,
    labels: Labels,
    weight: int,
    whole: tuple[int, ...],
    each: tuple[int, ...],
) -> None:
    """A convolution or product of a quantised activation (slot 0) and a quantised constant (slot ``weight``)."""
    x = node.inputs[0]
    w = node.inputs[weight]
    shape = labels.shape(w)
    if shape is None or not labels.is_constant(w) or labels.is_constant(x):
        opaque(node, labels, f"{node} multiplies two quantised activations")
        return
    if any(_size(labels, name) != 1 for slot in whole if (name := operand(node, slot)) is not None):
        opaque(node, labels, f"{node} has a scale or zero point for every row")
        return
    convolution = "Conv" in node.op
    bias = operand(node, 8) if node.op == "QLinearConv" else None
    axis = 0 if convolution else len(shape) - 1
    several = [name for slot in each if (name := operand(node, slot)) and _size(labels, name) != 1]
    if any(not labels.is_constant(n) or (labels.shape(n) or ()) != (shape[axis],) for n in several):
        opaque(node, labels, f"{node} has scales that do not line up with its channels")
        return
    view = replace(node, inputs=(x, w, bias) if bias else (x, w))
    (conv if convolution else matmul)(view, cast(Labels, _Turned(node, labels)))
    if several and len(shape) > 1:
        labels.unify([(w, axis), *((name, 0) for name in several)], node)


class _Turned:
    """Labels that mask the constant instead of the data, in which a code of zero is not a zero."""

    def __init__(self, node: Node, labels: Labels) -> None:
        self._node, self._labels = node, labels

    def __getattr__(self, name: str) -> Any:
        return getattr(self._labels, name)

    def consume(
        self,
        _: Node,
        data: Axis,
        weight: Axis | None,
        groups: int = 1,
    ) -> None:
        assert weight is not None
        self._labels.consume(self._node, weight, data if groups == 1 else None)


def _size(labels: Labels, name: str) -> int:
    shape = labels.shape(name)
    if shape is None:
        return -1
    return int(np.prod(shape))


def _zero_weight(
    node: Node,
    cuts: Cuts,
    weight: int,
    zero: int,
) -> dict[int, Array]:
    w = node.inputs[weight]
    name = operand(node, zero)
    value = np.zeros(()) if name is None else cuts.constant(name)
    if value is None:
        return {}
    if value.size == 1:
        return {weight: value.reshape(())}
    rank = len(cuts.shape(w))
    return {weight: value.reshape([-1, *[1] * (rank - 1)]) if "Conv" in node.op else value}


def _linear_conv(node: Node, labels: Labels) -> None:
    _integer(node, labels, 3, (1, 2, 6, 7), (4, 5))


def _linear_matmul(node: Node, labels: Labels) -> None:
    _integer(node, labels, 3, (1, 2, 6, 7), (4, 5))


def _integers(node: Node, labels: Labels) -> None:
    _integer(node, labels, 1, (2,), (3,))


def _zero_linear(node: Node, cuts: Cuts) -> dict[int, Array]:
    return _zero_weight(node, cuts, 3, 5)


def _zero_integer(node: Node, cuts: Cuts) -> dict[int, Array]:
    return _zero_weight(node, cuts, 1, 3)


def _linear_conv_cost(node: Node, shapes: Shapes) -> tuple[Axis, ...]:
    return conv_cost(node, shapes, weight=3)


_SCALE = Codes((1, 2))
_ZERO_POINTS = Codes((2, 3))
_SCALES = Codes((1, 2, 4, 5, 6, 7))

SPECS = (
    OpSpec(
        "DequantizeLinear",
        _scaled,
        since=10,
        edit=EditRules(zero=_zero_stored),
        codes=_SCALE,
        traits=Trait.DEQUANTISES,
    ),
    OpSpec(
        "QuantizeLinear",
        _scaled,
        since=10,
        edit=EditRules(zero=_zero_real),
        codes=_SCALE,
        traits=Trait.QUANTISES,
    ),
    OpSpec("DynamicQuantizeLinear", _dynamic),
    OpSpec(
        "QLinearConv",
        _linear_conv,
        edit=EditRules(regroup, _zero_linear),
        cost=_linear_conv_cost,
        codes=_SCALES,
    ),
    OpSpec(
        "ConvInteger",
        _integers,
        edit=EditRules(regroup, _zero_integer),
        cost=conv_cost,
        codes=_ZERO_POINTS,
    ),
    OpSpec(
        "QLinearMatMul",
        _linear_matmul,
        edit=EditRules(zero=_zero_linear),
        cost=matmul_cost,
        codes=_SCALES,
    ),
    OpSpec(
        "MatMulInteger",
        _integers,
        edit=EditRules(zero=_zero_integer),
        cost=matmul_cost,
        codes=_ZERO_POINTS,
    ),
)
