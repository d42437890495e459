"""Polynomials of symbolic dimensions: the elements of integer lists that a graph computes from shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

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
