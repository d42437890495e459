"""Integer lists that a graph computes from shapes, element by element, with the symbols of unknown dimensions.

Exporters write ``x.view(n, -1, 64)`` as a chain of Shape, Gather, Concat, Where and the like. Such a chain is followed
here as far as it is known: an element is a number, or a :class:`Size`, a polynomial of dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto

Entries = npt.NDArray[np.object_]
"""Elements of an integer or boolean tensor: ``int``, ``bool`` or ``Size``."""
LIMIT = 1024
"""Longer tensors are no shapes."""
VALUE = "?"
"""First letter of symbols that stand for a value that may be negative; others stand for lengths."""


class Unknown(Exception):
    """An operation on sizes whose result is not a polynomial."""


@dataclass(frozen=True)
class Size:
    """A sum of products of symbols, never a plain number; ``terms`` are (symbols, factor), in order."""

    terms: tuple[tuple[tuple[str, ...], int], ...]

    @staticmethod
    def of(symbol: str) -> Size:
        """A single dimension or value."""
        return Size((((symbol,), 1),))

    @property
    def symbol(self) -> str | None:
        """The one symbol that this is, or None."""
        (names, factor), *more = self.terms
        return names[0] if not more and len(names) == 1 and factor == 1 else None

    @property
    def length(self) -> bool:
        """Not negative: a sum of products of lengths."""
        return all(f > 0 and not any(s.startswith(VALUE) for s in names) for names, f in self.terms)

    def __add__(self, other: Any) -> Any:
        return _collect([*self.terms, *_terms(other)])

    def __mul__(self, other: Any) -> Any:
        return _collect(
            [(tuple(sorted(a + b)), f * g) for a, f in self.terms for b, g in _terms(other)]
        )

    def __sub__(self, other: Any) -> Any:
        return self + other * -1

    def __rsub__(self, other: Any) -> Any:
        return self * -1 + other

    def __floordiv__(self, other: Any) -> Any:
        return divide(self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return divide(other, self)

    __radd__, __rmul__ = __add__, __mul__


def _terms(value: Any) -> Sequence[tuple[tuple[str, ...], int]]:
    return value.terms if isinstance(value, Size) else [((), int(value))]


def _collect(terms: Sequence[tuple[tuple[str, ...], int]]) -> Any:
    total: dict[tuple[str, ...], int] = {}
    for names, factor in terms:
        total[names] = total.get(names, 0) + factor
    left = tuple(sorted((names, f) for names, f in total.items() if f))
    if not left:
        return 0
    return left[0][1] if len(left) == 1 and not left[0][0] else Size(left)


def divide(a: Any, b: Any) -> Any:
    """a / b where that is exact whatever the symbols are; numbers are divided as ONNX does, towards zero."""
    if not isinstance(a, Size) and not isinstance(b, Size):
        if not b:
            raise Unknown
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    (below, factor), *more = _terms(b)
    if more or not factor:
        raise Unknown
    result = []
    for names, f in _terms(a):
        rest = list(names)
        for symbol in below:
            if symbol not in rest:
                raise Unknown
            rest.remove(symbol)
        if f % factor:
            raise Unknown
        result.append((tuple(rest), f // factor))
    return _collect(result)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Size) or isinstance(b, Size):
        if a == b:
            return True
        size, number = (a, b) if isinstance(a, Size) else (b, a)
        if isinstance(number, Size) or number >= 0 or not size.length:
            raise Unknown
        return False
    return bool(a == b)


def _pick(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, Size):
        if a == b:
            return a
        raise Unknown
    return a if condition else b


def _each(rule: Callable[..., Any]) -> Callable[..., Entries]:
    """Element by element, with broadcasting."""

    def apply(*arrays: Entries) -> Entries:
        cells = np.broadcast_arrays(*arrays)
        out = np.empty(cells[0].shape, object)
        for i in np.ndindex(out.shape):
            out[i] = rule(*(c[i] for c in cells))
        return out

    return apply


_ELEMENTWISE: dict[str, Callable[..., Entries]] = {
    "Add": _each(lambda a, b: a + b),
    "Sub": _each(lambda a, b: a - b),
    "Mul": _each(lambda a, b: a * b),
    "Div": _each(divide),
    "Equal": _each(_equal),
    "Where": _each(_pick),
    "Identity": _each(lambda a: a),
}


def _plain(array: Entries) -> list[int]:
    if any(isinstance(v, Size) for v in array.reshape(-1)):
        raise Unknown
    return [int(v) for v in array.reshape(-1)]


def _evaluate(node: NodeProto, inputs: Sequence[Entries | None], shape: Entries | None) -> Entries:
    """What a node gives. ``shape``: dimensions of its first input. Raises Unknown for whatever is not followed."""
    attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Shape":
        if shape is None:
            raise Unknown
        return shape[attrs.get("start", 0) : attrs.get("end")]
    if any(x is None for x, name in zip(inputs, node.input, strict=True) if name):
        raise Unknown
    given: list[Any] = list(inputs)
    x = given[0]
    listed = attrs.get("axes") if "axes" in attrs or len(given) < 2 else None
    if node.op_type in _ELEMENTWISE:
        return _ELEMENTWISE[node.op_type](*given)
    if node.op_type == "Cast" and attrs["to"] in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
        return _each(lambda v: v if isinstance(v, Size) else int(v))(x)
    if node.op_type == "Gather":
        return np.take(
            x, np.asarray(_plain(given[1])).reshape(given[1].shape), axis=attrs.get("axis", 0)
        )
    if node.op_type == "Concat":
        return np.concatenate(given, axis=attrs["axis"])
    if node.op_type in ("Squeeze", "Unsqueeze"):
        axes = listed if listed is not None else _plain(given[1]) if len(given) > 1 else None
        if node.op_type == "Squeeze":
            return np.asarray(np.squeeze(x, None if axes is None else tuple(axes)))
        return np.asarray(np.expand_dims(x, tuple(axes or ())))
    if node.op_type == "Slice" and x.ndim == 1:
        bounds = [a for i, a in enumerate(given[1:5]) if a is not None and i != 2]
        start, stop, *rest = (
            (_plain(a)[0] for a in bounds) if bounds else (attrs["starts"][0], attrs["ends"][0])
        )
        step = rest[0] if rest else 1
        return np.asarray(x[start : None if step < 0 and stop < -len(x) else stop : step])
    if node.op_type == "Reshape":
        return np.asarray(x.reshape(_plain(given[1])))
    if node.op_type == "Expand":
        wide = np.broadcast_shapes(x.shape, tuple(_plain(given[1])))
        if math.prod(wide) > LIMIT:
            raise Unknown
        return np.array(np.broadcast_to(x, wide))
    if node.op_type == "ConstantOfShape":
        lengths = _plain(x)
        value = onnx.numpy_helper.to_array(attrs["value"]) if "value" in attrs else np.zeros(1)
        if value.dtype.kind not in "ib" or math.prod(lengths) > LIMIT:
            raise Unknown
        return np.full(lengths, value.item(), object)
    if node.op_type == "Range":
        begin, end, step = (_plain(a)[0] for a in given)
        if not step or abs(end - begin) > LIMIT:
            raise Unknown
        return np.arange(begin, end, step).astype(object)
    raise Unknown


def follow(
    nodes: Sequence[NodeProto],
    constants: Mapping[str, npt.NDArray[Any]],
    dims: Mapping[str, Sequence[int | str | None]],
    integers: set[str],
) -> dict[str, Entries]:
    """Entries of every tensor in ``integers`` that is made of shapes; ``constants`` are those of integer type."""
    found = {
        n: v.astype(object)
        for n, v in constants.items()
        if v.dtype.kind in "ib" and v.size <= LIMIT
    }
    for node in nodes:
        name = node.output[0] if node.output else ""
        if node.domain not in ("", "ai.onnx") or name not in integers or not node.input:
            continue
        try:
            known_shape = lengths(node.input[0], dims)
            made = np.asarray(
                _evaluate(node, [found.get(n) for n in node.input], known_shape), object
            )
        except (Unknown, ValueError, IndexError):
            known = dims.get(name)
            if (
                known is None
                or not all(isinstance(d, int) and d <= LIMIT for d in known)
                or len(known) > 1
            ):
                continue
            # A value that is not known before the model runs, at a known place.
            made = np.empty(
                [int(d) for d in known if d is not None and not isinstance(d, str)], object
            )
            for at in np.ndindex(made.shape):
                made[at] = Size.of(f"{VALUE}{name}{list(at)}")
        if made.size <= LIMIT:
            found[name] = made
    return found


def lengths(tensor: str, dims: Mapping[str, Sequence[int | str | None]]) -> Entries | None:
    """The dimensions of a tensor; one without a name is called after its place."""
    known = dims.get(tensor)
    if known is None:
        return None
    out = np.empty(len(known), object)
    for axis, d in enumerate(known):
        out[axis] = d if isinstance(d, int) else Size.of(d or f"{tensor}:{axis}")
    return out


def numbers(entries: Entries) -> bool:
    """Whether every element is known."""
    return not any(isinstance(v, Size) for v in entries.reshape(-1))
