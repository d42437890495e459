"""Polynomials of symbolic dimensions: the elements of integer lists that a graph computes from shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Entries = npt.NDArray[np.object_]
"""Elements of an integer or boolean tensor: ``int``, ``bool`` or ``Size``; of a float tensor: ``float``."""
LIMIT = 1024
"""Longer tensors are no shapes."""
VALUE = "?"
"""First letter of symbols that stand for a value that may be negative; others stand for lengths."""

Product = tuple[tuple[str, ...], int]
"""Symbols, in order, and the factor in front of them."""


class Unknown(Exception):
    """An operation on sizes whose result is not a polynomial."""


@dataclass(frozen=True)
class Size:
    """A sum of products of symbols, never a plain number; ``terms`` are in order."""

    terms: tuple[Product, ...]

    @staticmethod
    def of(symbol: str) -> Size:
        """Make the size that is a single symbol.

        Args:
            symbol: Name of a dimension or a value.

        Returns:
            The size.
        """
        product: Product = ((symbol,), 1)
        return Size((product,))

    @property
    def symbol(self) -> str | None:
        """The one symbol that this is, or None."""
        (names, factor), *more = self.terms
        single = not more and len(names) == 1 and factor == 1
        return names[0] if single else None

    @property
    def length(self) -> bool:
        """Not negative: a sum of products of lengths."""
        return all(
            factor > 0 and not any(symbol.startswith(VALUE) for symbol in names)
            for names, factor in self.terms
        )

    def __add__(self, other: Any) -> Any:
        return _collect([*self.terms, *_terms(other)])

    def __mul__(self, other: Any) -> Any:
        products = []
        for names, factor in self.terms:
            for other_names, other_factor in _terms(other):
                joined = tuple(sorted(names + other_names))
                products.append((joined, factor * other_factor))
        return _collect(products)

    def __sub__(self, other: Any) -> Any:
        return self + other * -1

    def __rsub__(self, other: Any) -> Any:
        return self * -1 + other

    def __floordiv__(self, other: Any) -> Any:
        return divide(self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return divide(other, self)

    __radd__ = __add__
    __rmul__ = __mul__


def _terms(value: Any) -> Sequence[Product]:
    if isinstance(value, Size):
        return value.terms
    return [((), int(value))]


def _collect(terms: Sequence[Product]) -> Any:
    """Add up terms of the same symbols: a size, or a number where no symbol is left."""
    total: dict[tuple[str, ...], int] = {}
    for names, factor in terms:
        total[names] = total.get(names, 0) + factor
    left = tuple(sorted((names, factor) for names, factor in total.items() if factor))
    if not left:
        return 0
    names, factor = left[0]
    constant = len(left) == 1 and not names
    return factor if constant else Size(left)


def divide(a: Any, b: Any) -> Any:
    """Divide where the result is exact whatever the symbols are.

    Args:
        a: Dividend, a number or a size.
        b: Divisor, a number or a size.

    Returns:
        The quotient. Numbers are divided as ONNX does, towards zero.

    Raises:
        Unknown: The quotient is not a polynomial, or the divisor is zero.
    """
    if not isinstance(a, Size) and not isinstance(b, Size):
        return _divide_numbers(a, b)
    (symbols, factor), *more = _terms(b)
    if more or not factor:
        raise Unknown
    result = []
    for names, dividend in _terms(a):
        rest = list(names)
        for symbol in symbols:
            if symbol not in rest:
                raise Unknown
            rest.remove(symbol)
        if dividend % factor:
            raise Unknown
        result.append((tuple(rest), dividend // factor))
    return _collect(result)


def _divide_numbers(a: int, b: int) -> int:
    if not b:
        raise Unknown
    size = abs(a) // abs(b)
    return size if (a < 0) == (b < 0) else -size


Dims = Sequence["int | str | Size | None"]
"""Dimensions of a tensor: a number, the name of a symbol, a polynomial of symbols, or None if nothing is known."""


def product(names: Sequence[str], factor: int) -> Size | str:
    """Return a product of symbols.

    Args:
        names: Symbols, repeated for a power.
        factor: The number in front of them.

    Returns:
        The name itself if that is all, else a size.
    """
    if len(names) == 1 and factor == 1:
        return names[0]
    return Size(((tuple(sorted(names)), factor),))


def lengths(tensor: str, dims: Mapping[str, Dims]) -> Entries | None:
    """Return the dimensions of a tensor as numbers and sizes.

    Args:
        tensor: Name of the tensor.
        dims: Dimensions by tensor.

    Returns:
        The dimensions, or None if nothing is known of the tensor. One without a name is called after its place.
    """
    known = dims.get(tensor)
    if known is None:
        return None
    out = np.empty(len(known), object)
    for axis, dim in enumerate(known):
        out[axis] = dim if isinstance(dim, int | Size) else Size.of(dim or f"{tensor}:{axis}")
    return out


def numbers(entries: Entries) -> bool:
    """Check whether a list holds numbers only, and no symbols.

    Args:
        entries: Elements of a tensor.

    Returns:
        True if every element is a number.
    """
    return not any(isinstance(value, Size) for value in entries.reshape(-1))
