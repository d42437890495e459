"""Elementwise operators: every axis passes through; broadcasting ties the axes that meet.

Reference: ONNX operator specification, "Multidirectional Broadcasting".
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnx_oamip.core.records import (
    Array,
    Axis,
    Floats,
    Node,
)
from onnx_oamip.graph.ops import domains, maps
from onnx_oamip.graph.ops.handles import LabelAxis, Labels, Refused, Terms, operand
from onnx_oamip.graph.ops.spec import NO_TRAITS, ChannelRule, EncodeRule, LikeInput, OpSpec, Trait


def passes(node: Node, labels: Labels) -> None:
    """Channel rule: the axes of the first input pass through; the others (bounds, ratios) are scalars.

    Args:
        node: The node.
        labels: Labels of the graph.
    """
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
        labels.set(
            name, labels.axes(node.inputs[0]) if labels.shape(name) else [], f"the mask of {node}"
        )


def broadcast(node: Node, labels: Labels) -> None:
    """Channel rule of multidirectional broadcasting: axes aligned from the right are tied; those of length 1 are not.

    Args:
        node: The node.
        labels: Labels of the graph.
    """
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


def _meet(
    node: Node,
    labels: Labels,
    here: list[Axis],
    sizes: list[int],
) -> LabelAxis:
    size = max(sizes)
    full = [a for a, n in zip(here, sizes, strict=True) if n == size]
    for axis, n in zip(here, sizes, strict=True):
        if n != size and not labels.is_constant(axis[0]):
            labels.pin(labels.label(*axis), f"{node} broadcasts its single channel")
    tracked = [a for a in full if not labels.is_constant(a[0]) and labels.label(*a) is not None]
    # Constants that meet a single channel make channels of their own: the gain of a normalisation times the spread, the
    # scales of channels times the scale of what is quantised at run time. A positional table along an untracked axis
    # needs no labels: nothing there can shrink.
    made_here = size > 1 and all(labels.is_constant(name) for name, _ in full)
    if tracked or made_here:
        return labels.unify(full, node)
    return None


def _cast(node: Node, labels: Labels) -> None:
    labels.set(node.outputs[0], labels.axes(node.inputs[0]))


def _affine(
    node: Node,
    terms: Terms,
    x: str,
    weights: Array | float,
    offset: Array | float = 0.0,
) -> None:
    """``out = weights * x + offset``, all broadcast to the output."""
    shape = terms.shape(node.outputs[0])
    matrix = maps.broadcast(terms.shape(x), shape, weights)
    terms.affine(node.outputs[0], [(x, matrix)], np.broadcast_to(offset, shape))


def same(node: Node, terms: Terms) -> None:
    """Encode the first output as the first input: Dropout in inference, and casts between floating types (no rounding).

    Args:
        node: The node.
        terms: Statements of the program.

    Raises:
        Refused: The node rounds, or drops values out.
    """
    if node.op == "Cast" and int(node.attrs["to"]) not in (1, 10, 11, 16):
        raise Refused(f"{node} casts to a type that is not floating")
    training = operand(node, 2) if node.op == "Dropout" else None
    if training is not None and (value := terms.constant(training)) is not None and value.any():
        raise Refused(f"{node} is in training mode")
    _affine(node, terms, node.inputs[0], 1.0)


def _relu_encode(node: Node, terms: Terms) -> None:
    terms.relu(node.outputs[0], node.inputs[0])


def _slope(node: Node, terms: Terms) -> Floats:
    if node.op == "LeakyRelu":
        return np.asarray(node.attrs.get("alpha", 0.01), np.float64)
    value = terms.constant(node.inputs[1])
    if value is None:
        raise Refused(f"{node} takes its slope from a computation")
    return value.astype(np.float64)


def _leaky_encode(node: Node, terms: Terms) -> None:
    """``slope x + (1 - slope) max(x, 0)``."""
    x = node.inputs[0]
    out = node.outputs[0]
    shape = terms.shape(x)
    slope = _slope(node, terms)
    positive = f"{out}/positive"
    terms.relu(positive, x)
    parts = [
        (x, maps.broadcast(shape, shape, slope)),
        (positive, maps.broadcast(shape, shape, 1 - slope)),
    ]
    terms.affine(out, parts)


def _clip_bound(
    node: Node,
    terms: Terms,
    name: str,
    index: int,
) -> float | None:
    tensor = operand(node, index)
    if tensor is None:
        value = node.attrs.get(name)
    else:
        value = terms.constant(tensor)
    if tensor is not None and value is None:
        raise Refused(f"{node} takes its bounds from a computation")
    if value is None:
        return None
    bound = float(np.asarray(value, np.float64).reshape(()))
    # Exporters write an absent side as the largest number of the type.
    return bound if abs(bound) < 3e38 else None


def _clip_encode(node: Node, terms: Terms) -> None:
    """``low + max(x - low, 0)``, then ``high - max(high - x, 0)``: one after the other, so that bounds stay tight."""
    x = node.inputs[0]
    out = node.outputs[0]
    low = _clip_bound(node, terms, "min", 1)
    high = _clip_bound(node, terms, "max", 2)
    shape = terms.shape(x)
    same = maps.broadcast(shape, shape)
    minus = maps.broadcast(shape, shape, -1.0)
    if low is not None:
        terms.affine(f"{out}/above", [(x, same)], -low)
        terms.relu(f"{out}/over", f"{out}/above")
        terms.affine(f"{out}/low", [(f"{out}/over", same)], low)
        x = f"{out}/low"
    if high is not None:
        terms.affine(f"{out}/below", [(x, minus)], high)
        terms.relu(f"{out}/under", f"{out}/below")
        terms.affine(f"{out}/high", [(f"{out}/under", minus)], high)
        x = f"{out}/high"
    terms.affine(out, [(x, same)])


def clamp_bounds(node: Node, constants: Mapping[str, Array]) -> tuple[float, float] | None:
    """Read the bounds between which an operator passes its data on unchanged, and beyond which its output is constant.

    Args:
        node: Any node.
        constants: Values of constants by name.

    Returns:
        (lower, upper), infinite where there is none; None for a node that is no clamp, and for bounds that are computed
        or differ between elements.
    """
    if node.domain not in domains.STANDARD:
        return None
    if node.op == "Relu":
        return 0.0, np.inf
    if node.op == "Clip":
        given = [_side(node, constants, name, i) for i, name in enumerate(("min", "max"), 1)]
    elif node.op in ("Max", "Min") and len(node.inputs) == 2:
        held = [name for name in node.inputs if name in constants]
        value = _number(constants[held[0]]) if len(held) == 1 else None
        given = [value, np.inf] if node.op == "Max" else [-np.inf, value]
    else:
        return None
    lower, upper = given
    if lower is None or upper is None or not lower < upper:
        return None
    return lower, upper


def _side(node: Node, constants: Mapping[str, Array], name: str, slot: int) -> float | None:
    """One bound of a Clip, infinite where it is absent; None where it is computed."""
    tensor = operand(node, slot)
    if tensor is not None:
        return _number(constants[tensor]) if tensor in constants else None
    if name in node.attrs:
        return float(node.attrs[name])
    return -np.inf if name == "min" else np.inf


def _number(value: Array) -> float | None:
    """The value of a constant with one element."""
    return float(value.reshape(())) if value.size == 1 else None


def _old_broadcast(node: Node, terms: Terms) -> None:
    if node.version < 7 and len({terms.shape(n) for n in node.inputs}) > 1:
        raise Refused(f"{node} broadcasts in the way of opset {node.version}")


def _sum_encode(node: Node, terms: Terms) -> None:
    """Add, Sub and Sum of activations and constants."""
    _old_broadcast(node, terms)
    after = terms.shape(node.outputs[0])
    parts = []
    offset = np.zeros(after)
    for i, name in enumerate(node.inputs):
        sign = -1.0 if node.op == "Sub" and i else 1.0
        value = terms.constant(name)
        if value is None:
            parts.append((name, maps.broadcast(terms.shape(name), after, sign)))
        else:
            offset = offset + sign * value.astype(np.float64)
    terms.affine(node.outputs[0], parts, offset)


def _scale_encode(node: Node, terms: Terms) -> None:
    """Mul with a constant, Div by one."""
    _old_broadcast(node, terms)
    values = [terms.constant(n) for n in node.inputs]
    if node.op == "Div" and values[1] is not None:
        _affine(node, terms, node.inputs[0], 1 / values[1].astype(np.float64))
        return
    for data, value in ((0, values[1]), (1, values[0])):
        if node.op == "Mul" and value is not None:
            _affine(node, terms, node.inputs[data], value.astype(np.float64))
            return
    raise Refused(
        f"{node} {'multiplies two activations' if node.op == 'Mul' else 'divides by an activation'}"
    )


def _neg_encode(node: Node, terms: Terms) -> None:
    _affine(node, terms, node.inputs[0], -1.0)


ENCODE: dict[str, EncodeRule] = {
    "Relu": _relu_encode,
    "LeakyRelu": _leaky_encode,
    "Clip": _clip_encode,
    "Neg": _neg_encode,
    "Add": _sum_encode,
    "Sub": _sum_encode,
    "Sum": _sum_encode,
    "Mul": _scale_encode,
    "Div": _scale_encode,
}
TRAITS: dict[str, Trait] = {
    "Relu": Trait.RECTIFIES | Trait.PIECEWISE,
    "LeakyRelu": Trait.PIECEWISE,
    "Clip": Trait.PIECEWISE,
    "Add": Trait.BIAS | Trait.SUM | Trait.CHANNEL_AFFINE,
    "Sum": Trait.SUM,
    "Sub": Trait.SUBTRACTS | Trait.CHANNEL_AFFINE,
    "Mul": Trait.SCALES | Trait.CHANNEL_AFFINE,
    "Sigmoid": Trait.SATURATES,
    "HardSigmoid": Trait.SATURATES,
    "Tanh": Trait.SATURATES,
    "Softsign": Trait.SATURATES,
    "Erf": Trait.SATURATES,
}
UNARY = (
    "Relu LeakyRelu Sigmoid Tanh Elu Selu Celu ThresholdedRelu HardSigmoid HardSwish Softplus Softsign Gelu Mish "
    "Swish Erf Exp Log Sqrt Neg Abs Reciprocal Sign Floor Ceil Round Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh "
    "Acosh Atanh Not IsNaN IsInf Clip Shrink BitwiseNot"
)
BINARY = (
    "Add Sub Mul Div Pow Mod Min Max Sum Mean Where And Or Xor Equal Greater Less GreaterOrEqual LessOrEqual "
    "BitwiseAnd BitwiseOr BitwiseXor BitShift"
)


def _elementwise(name: str, channels: ChannelRule) -> OpSpec:
    traits = Trait.ELEMENTWISE | TRAITS.get(name, NO_TRAITS)
    return OpSpec(name, channels, encode=ENCODE.get(name), traits=traits)


SPECS = (
    *(_elementwise(name, passes) for name in UNARY.split()),
    OpSpec(
        "Dropout",
        _dropout,
        encode=same,
        traits=Trait.ELEMENTWISE | Trait.IDENTITY | Trait.MOVES,
    ),
    OpSpec(
        "Identity",
        _cast,
        encode=same,
        traits=Trait.ELEMENTWISE | Trait.COPIES | Trait.IDENTITY | Trait.MOVES,
    ),
    OpSpec("Cast", _cast, encode=same, traits=Trait.ELEMENTWISE | Trait.CASTS),
    *(
        OpSpec(name, passes, "com.microsoft", shape=LikeInput(), traits=Trait.ELEMENTWISE)
        for name in ("Gelu", "QuickGelu", "FastGelu")
    ),
    *(_elementwise(name, broadcast) for name in BINARY.split()),
    # The slope broadcasts one way, to the data; multidirectional alignment gives the same axes.
    OpSpec("PRelu", broadcast, encode=_leaky_encode, traits=Trait.ELEMENTWISE | Trait.PIECEWISE),
)
