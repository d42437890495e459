"""Elementwise operators: every axis passes through; broadcasting ties what meets.

Reference: ONNX operator specification, "Multidirectional Broadcasting".
"""

from __future__ import annotations

from ..records import Axis, Node
from .spec import LabelAxis, Labels, OpSpec


def passes(node: Node, labels: Labels) -> None:
    """The first input's axes pass through; the others (bounds, ratios) are scalars."""
    axes = labels.axes(node.inputs[0])
    for name in node.inputs[1:]:
        if name and (labels.shape(name) or ()) not in ((), (1,)):
            broadcast(node, labels)
            return
    for name in node.outputs:
        if name:
            labels.set(name, axes)


def _dropout(node: Node, labels: Labels) -> None:
    """Inference: the identity. The mask it may also give has the shape of the data."""
    labels.set(node.outputs[0], labels.axes(node.inputs[0]))
    for name in node.outputs[1:]:
        labels.set(name, labels.axes(node.inputs[0]) if labels.shape(name) else [], f"the mask of {node}")


def broadcast(node: Node, labels: Labels) -> None:
    """Multidirectional broadcasting: axes aligned from the right go together; a length of 1 has no say."""
    names = [n for n in node.inputs if n]
    shapes = [labels.shape(n) for n in names]
    known = [s for s in shapes if s is not None]
    if len(known) < len(names):
        for name in names:
            labels.pin_all(name, f"{node} broadcasts a tensor of unknown shape")
        labels.set(node.outputs[0], [])
        return
    rank = max(len(s) for s in known)
    result: list[LabelAxis] = []
    for i in range(rank):
        here: list[Axis] = []
        sizes = []
        for name, shape in zip(names, known, strict=True):
            axis = i - (rank - len(shape))
            if axis >= 0:
                here.append((name, axis))
                sizes.append(shape[axis])
        result.append(_meet(node, labels, here, sizes))
    labels.set(node.outputs[0], result)


def _meet(node: Node, labels: Labels, here: list[Axis], sizes: list[int]) -> LabelAxis:
    size = max(sizes)
    full = [a for a, n in zip(here, sizes, strict=True) if n == size]
    for axis, n in zip(here, sizes, strict=True):
        if n != size and not labels.is_constant(axis[0]):
            labels.pin(labels.label(*axis), f"{node} broadcasts its single channel")
    tracked = [a for a in full if not labels.is_constant(a[0]) and labels.label(*a) is not None]
    # Constants alone (a positional table along an untracked axis) need no labels: nothing there can shrink.
    return labels.unify(full, node) if tracked else None


def _cast(node: Node, labels: Labels) -> None:
    labels.set(node.outputs[0], labels.axes(node.inputs[0]))


UNARY = (
    "Relu LeakyRelu Sigmoid Tanh Elu Selu Celu ThresholdedRelu HardSigmoid HardSwish Softplus Softsign Gelu Mish "
    "Swish Erf Exp Log Sqrt Neg Abs Reciprocal Sign Floor Ceil Round Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh "
    "Acosh Atanh Not IsNaN IsInf Clip Shrink BitwiseNot"
)
BINARY = (
    "Add Sub Mul Div Pow Mod Min Max Sum Mean Where And Or Xor Equal Greater Less GreaterOrEqual LessOrEqual "
    "BitwiseAnd BitwiseOr BitwiseXor BitShift"
)
SPECS = (
    *(OpSpec(name, passes) for name in UNARY.split()),
    OpSpec("Dropout", _dropout),
    OpSpec("Identity", _cast),
    OpSpec("Cast", _cast),
    OpSpec("Gelu", passes, domain="com.microsoft", same=True),
    OpSpec("QuickGelu", passes, domain="com.microsoft", same=True),
    *(OpSpec(name, broadcast) for name in BINARY.split()),
    # The slope broadcasts one way, to the data; multidirectional alignment gives the same axes.
    OpSpec("PRelu", broadcast),
)
