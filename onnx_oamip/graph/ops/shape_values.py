"""Values of the operators that exporters compute shapes with, on numbers and on symbolic dimensions.

Some of these operators have no entry in the table, since no channel passes through them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from onnx_oamip.graph.symbolic_dims import LIMIT, Entries, Size, Unknown, divide

Attributes = Mapping[str, Any]
Rule = Callable[[Attributes, Sequence[Any]], Entries]


def evaluate(
    node: NodeProto,
    inputs: Sequence[Entries | None],
    shape: Entries | None,
) -> Entries:
    """Compute the first output of a node.

    Args:
        node: Node of the default domain.
        inputs: Values of its inputs, None where they are not known or absent.
        shape: Dimensions of its first input.

    Returns:
        The elements, numbers or sizes.

    Raises:
        Unknown: The operator is not followed here, or the result is no number and no polynomial of dimensions.
    """
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Shape":
        if shape is None:
            raise Unknown
        return shape[attributes.get("start", 0) : attributes.get("end")]
    rule = _RULES.get(node.op_type)
    missing = any(x is None for x, name in zip(inputs, node.input, strict=True) if name)
    if rule is None or missing:
        raise Unknown
    return rule(attributes, inputs)


def _each(rule: Callable[..., Any]) -> Rule:
    """Element by element, with broadcasting."""

    def apply(attributes: Attributes, given: Sequence[Any]) -> Entries:
        del attributes
        cells = np.broadcast_arrays(*given)
        out = np.empty(cells[0].shape, object)
        for i in np.ndindex(out.shape):
            out[i] = rule(*(c[i] for c in cells))
        return out

    return apply


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, Size) and not isinstance(b, Size):
        return bool(a == b)
    if a == b:
        return True
    size, number = (a, b) if isinstance(a, Size) else (b, a)
    if isinstance(number, Size) or number >= 0 or not size.length:
        raise Unknown
    return False  # a length is not negative


def _larger(*values: Any) -> Any:
    """Largest of several values, if that does not depend on the symbols."""
    result, *others = values
    for value in others:
        if _not_below(value, result):
            result = value
        elif not _not_below(result, value):
            raise Unknown
    return result


def _smaller(*values: Any) -> Any:
    """Smallest of several values, if that does not depend on the symbols."""
    return _larger(*(value * -1 for value in values)) * -1


def _not_below(a: Any, b: Any) -> bool:
    """Checks whether a is at least b whatever the lengths are; False also where that is not known."""
    difference = a - b
    if isinstance(difference, Size):
        return difference.length
    return bool(difference >= 0)


def _remainder(a: Any, b: Any) -> Any:
    if isinstance(a, Size) or isinstance(b, Size) or not b:
        raise Unknown
    return a % b


def _pick(condition: Any, a: Any, b: Any) -> Any:
    if not isinstance(condition, Size):
        return a if condition else b
    if a != b:
        raise Unknown
    return a


def _whole(value: Any) -> Any:
    if isinstance(value, Size):
        return value
    return int(value)


def _numbers(array: Entries) -> list[int]:
    if any(isinstance(v, Size) for v in array.reshape(-1)):
        raise Unknown
    return [int(v) for v in array.reshape(-1)]


def _cast(attributes: Attributes, given: Sequence[Any]) -> Entries:
    if attributes["to"] not in (TensorProto.INT64, TensorProto.INT32):
        raise Unknown
    return _each(_whole)(attributes, given[:1])


def _modulo(attributes: Attributes, given: Sequence[Any]) -> Entries:
    if attributes.get("fmod", 0):  # the sign of the dividend
        raise Unknown
    return _each(_remainder)(attributes, given)


def _gather(attributes: Attributes, given: Sequence[Any]) -> Entries:
    index = np.asarray(_numbers(given[1])).reshape(given[1].shape)
    return np.take(given[0], index, axis=attributes.get("axis", 0))


def _concat(attributes: Attributes, given: Sequence[Any]) -> Entries:
    return np.concatenate(given, axis=attributes["axis"])


def _listed_axes(attributes: Attributes, given: Sequence[Any]) -> list[int] | None:
    """Axes given as an attribute (old opsets) or as input 1."""
    if "axes" in attributes:
        return list(attributes["axes"])
    if len(given) > 1:
        return _numbers(given[1])
    return None


def _squeeze(attributes: Attributes, given: Sequence[Any]) -> Entries:
    axes = _listed_axes(attributes, given)
    return np.asarray(np.squeeze(given[0], None if axes is None else tuple(axes)))


def _unsqueeze(attributes: Attributes, given: Sequence[Any]) -> Entries:
    axes = _listed_axes(attributes, given)
    return np.asarray(np.expand_dims(given[0], tuple(axes or ())))


def _slice(attributes: Attributes, given: Sequence[Any]) -> Entries:
    data = given[0]
    if data.ndim != 1:
        raise Unknown
    starts_ends_steps = [a for i, a in enumerate(given[1:5]) if a is not None and i != 2]
    if starts_ends_steps:
        start, stop, *rest = (_numbers(a)[0] for a in starts_ends_steps)
    else:
        start, stop, *rest = (attributes["starts"][0], attributes["ends"][0])
    step = rest[0] if rest else 1
    # Python reads a negative stop from the end; ONNX clips it to the front.
    clipped = None if step < 0 and stop < -len(data) else stop
    return np.asarray(data[start:clipped:step])


def _reshape(attributes: Attributes, given: Sequence[Any]) -> Entries:
    del attributes
    return np.asarray(given[0].reshape(_numbers(given[1])))


def _expand(attributes: Attributes, given: Sequence[Any]) -> Entries:
    del attributes
    shape = np.broadcast_shapes(given[0].shape, tuple(_numbers(given[1])))
    if math.prod(shape) > LIMIT:
        raise Unknown
    return np.array(np.broadcast_to(given[0], shape))


def _fill(attributes: Attributes, given: Sequence[Any]) -> Entries:
    lengths = _numbers(given[0])
    stored = attributes.get("value")
    if stored is None:
        value = np.zeros(1)
    else:
        value = onnx.numpy_helper.to_array(stored)
    if value.dtype.kind not in "ib" or math.prod(lengths) > LIMIT:
        raise Unknown
    return np.full(lengths, value.item(), object)


def _range(attributes: Attributes, given: Sequence[Any]) -> Entries:
    del attributes
    begin, end, step = (_numbers(a)[0] for a in given)
    if not step or abs(end - begin) > LIMIT:
        raise Unknown
    return np.arange(begin, end, step).astype(object)


_RULES: dict[str, Rule] = {
    "Add": _each(lambda a, b: a + b),
    "Sub": _each(lambda a, b: a - b),
    "Mul": _each(lambda a, b: a * b),
    "Div": _each(divide),
    "Max": _each(_larger),
    "Min": _each(_smaller),
    "Mod": _modulo,
    "Neg": _each(lambda a: a * -1),
    "Equal": _each(_equal),
    "Where": _each(_pick),
    "Identity": _each(lambda a: a),
    "Cast": _cast,
    "Gather": _gather,
    "Concat": _concat,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Slice": _slice,
    "Reshape": _reshape,
    "Expand": _expand,
    "ConstantOfShape": _fill,
    "Range": _range,
}
