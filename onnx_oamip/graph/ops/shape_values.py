"""Values of the operators that exporters compute shapes with, on numbers and on symbolic dimensions.

Some of these operators have no entry in the table, since no channel passes through them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, NodeProto, TensorProto

from onnx_oamip.graph.ops import kinds
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


def evaluate_all(
    node: NodeProto,
    inputs: Sequence[Entries | None],
    shape: Entries | None,
) -> list[Entries]:
    """Computes all outputs of a node that has one, or that splits a list.

    Args:
        node: Node of the default domain.
        inputs: Values of its inputs, None where they are not known or absent.
        shape: Dimensions of its first input.

    Returns:
        The elements of every output, numbers or sizes.

    Raises:
        Unknown: As :func:`evaluate`.
    """
    if node.op_type not in kinds.SPLIT:
        return [np.asarray(evaluate(node, inputs, shape), object)]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    data = inputs[0]
    lengths = inputs[1] if len(inputs) > 1 else None
    if data is None or data.ndim != 1 or (lengths is None and len(inputs) > 1):
        raise Unknown
    if lengths is not None:
        parts = _numbers(lengths)
    elif "split" in attributes:
        parts = list(attributes["split"])
    else:
        longest = -(-len(data) // len(node.output))
        parts = [longest] * (len(node.output) - 1)
        parts.append(len(data) - sum(parts))
    return list(np.split(data, np.cumsum(parts)[:-1]))


def has_rule(node: NodeProto) -> bool:
    """Tells operators that are followed here on symbols as well.

    Args:
        node: Node of the default domain.

    Returns:
        False for those whose values need numbers, see :func:`compute`.
    """
    return node.op_type in _RULES or node.op_type in kinds.SHAPE | kinds.SPLIT


def compute(
    node: NodeProto, inputs: Mapping[str, npt.NDArray[Any]], version: int
) -> list[npt.NDArray[Any]]:
    """Computes a small node on numbers by ONNX's reference implementation.

    Args:
        node: Node of the default domain.
        inputs: Values of all its inputs, by name.
        version: Opset of the default domain.

    Returns:
        Values of its outputs.

    Raises:
        Unknown: The node draws random numbers, runs another graph, may make a large tensor, or cannot be computed.
    """
    is_random = node.op_type.startswith(kinds.RANDOM)
    has_body = any(a.HasField("g") or a.graphs for a in node.attribute)
    if is_random or has_body or node.op_type in kinds.GROWING:
        raise Unknown
    # Imported here: most models need no such node.
    from onnx.reference import ReferenceEvaluator

    graph = GraphProto(name="node")
    graph.node.append(node)
    for name, value in inputs.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, value.shape))
    names = [name for name in node.output if name]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            found = ReferenceEvaluator(graph, opsets={"": version}).run(names, dict(inputs))
    except Exception as error:  # each operator raises errors of its own
        raise Unknown from error
    return [np.asarray(value) for value in found]


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


def _truth(value: Any) -> bool:
    if isinstance(value, Size):
        raise Unknown
    return bool(value)


def _numbers(array: Entries) -> list[int]:
    if any(isinstance(v, Size) for v in array.reshape(-1)):
        raise Unknown
    return [int(v) for v in array.reshape(-1)]


def _cast(attributes: Attributes, given: Sequence[Any]) -> Entries:
    if attributes["to"] == TensorProto.BOOL:
        return _each(_truth)(attributes, given[:1])
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
