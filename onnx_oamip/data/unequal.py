"""Arrays of unequal shapes, one per sample: graphs, audio and texts as they are.

``FeedCollector`` stacks the arrays of equal shapes and keeps those of unequal ones behind one another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import Array, Ints
from onnx_oamip.data import out_of_core
from onnx_oamip.data.out_of_core import FileArray, Spool, Values

TEXT_KINDS = "USO"
"""Kinds of numpy types whose values have no fixed size."""


class UnequalArrays:
    """One array per sample, all of one type and rank. The values lie behind one another, and are read on demand.

    Attributes:
        values: Values of all arrays in C order, (n,).
        shapes: Shape of every array (samples, rank).
        starts: Position of the first value of every array (samples,).
    """

    def __init__(
        self,
        values: Values,
        shapes: Ints,
        starts: Ints | None = None,
    ) -> None:
        """Divide values into arrays.

        Args:
            values: Values of all arrays in C order, (n,).
            shapes: Shape of every array (samples, rank).
            starts: Position of the first value of every array; without gaps in order if not given.
        """
        sizes = shapes.prod(axis=1)
        self.values = values
        self.shapes = shapes
        self.starts = np.cumsum(sizes) - sizes if starts is None else starts

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""
        return self.values.dtype

    @property
    def rank(self) -> int:
        """Number of axes of every array."""
        return int(self.shapes.shape[1])

    @property
    def sizes(self) -> Ints:
        """Number of values of every array (samples,)."""
        return np.asarray(self.shapes.prod(axis=1), np.int64)

    def __getitem__(self, place: int) -> Array:
        shape = self.shapes[place].tolist()
        start = int(self.starts[place])
        return np.asarray(self.values[start : start + int(np.prod(shape))]).reshape(shape)

    def take(self, index: Ints) -> UnequalArrays:
        """Select arrays without reading them.

        Args:
            index: Indices of the samples (n,).

        Returns:
            The arrays in that order.
        """
        return UnequalArrays(self.values, self.shapes[index], self.starts[index])

    def sample_of(self, position: int) -> int:
        """Find the sample that holds a value.

        Args:
            position: Position of the value.

        Returns:
            Index of the first array that holds it.
        """
        inside = (self.starts <= position) & (position < self.starts + self.sizes)
        return int(np.argmax(inside))


Stored = Values | UnequalArrays
"""Samples along axis 0, or one array of its own shape per sample."""


def differ_in_length(arrays: UnequalArrays) -> bool:
    """Compare the axes behind the first.

    Args:
        arrays: Arrays of unequal shapes.

    Returns:
        True if all arrays have axis 0, and differ on no other.
    """
    return arrays.rank > 0 and len(np.unique(arrays.shapes[:, 1:], axis=0)) == 1


def joined(arrays: UnequalArrays) -> Values:
    """Join arrays along axis 0.

    Args:
        arrays: Arrays that differ in length only, without gaps between their values.

    Returns:
        One array.
    """
    shape = (int(arrays.shapes[:, 0].sum()), *arrays.shapes[0, 1:].tolist())
    values = arrays.values
    if isinstance(values, np.ndarray):
        return values.reshape(shape)
    size = int(np.prod(shape[1:]))

    def read(index: Ints) -> Array:
        rows = [values[row * size : (row + 1) * size] for row in index.tolist()]
        return np.asarray(rows, values.dtype).reshape(len(rows), *shape[1:])

    return FileArray(read, shape, values.dtype)


def blocks(stored: Stored) -> Iterator[Array]:
    """Iterate over all values in order.

    Args:
        stored: Samples.

    Yields:
        Blocks of samples, or one sample after another where their shapes are unequal.
    """
    if isinstance(stored, UnequalArrays):
        for place in range(len(stored)):
            yield stored[place]
    else:
        yield from out_of_core.blocks(stored)


def shape_of(stored: Stored) -> tuple[int, ...] | list[list[int]]:
    """Describe the shape of stored samples.

    Args:
        stored: Samples.

    Returns:
        The shape of an array, or the shapes of all samples.
    """
    return stored.shapes.tolist() if isinstance(stored, UnequalArrays) else stored.shape


class FeedCollector:
    """Collects feeds that arrive one by one.

    Feeds need the same names, and arrays of one name the same type and rank; shapes may differ.
    """

    def __init__(self, where: str) -> None:
        """Start empty.

        Args:
            where: Name of the source.
        """
        self._where = where
        self._columns: dict[str, _Column] = {}
        self.count = 0

    def append(self, feed: Mapping[str, Any], name: str = "") -> None:
        """Add a feed.

        Args:
            feed: Arrays by name.
            name: Name of the feed in messages; its number if empty.

        Raises:
            DataError: The feed differs from the first one in its names, types or ranks.
        """
        shown = name or f"feed {self.count}"
        if not self.count:
            self._columns = {key: _Column(f"{self._where}: '{key}'") for key in feed}
        if set(feed) != set(self._columns):
            odd = sorted(map(str, set(feed) ^ set(self._columns)))
            has = "has" if odd[0] in feed else "lacks"
            raise DataError(
                f"{self._where} has feeds of unequal names ({shown} {has} '{odd[0]}', unlike the first); give every "
                "feed the same names."
            )
        for key, column in self._columns.items():
            difference = column.append(feed[key])
            if difference:
                raise DataError(
                    f"{self._where} has feeds of unequal types or ranks ('{key}' is {difference[0]} in the first and "
                    f"{difference[1]} in {shown}); convert them to one type and one number of axes, lengths may differ."
                )
        self.count += 1

    def finish(self) -> dict[str, Stored]:
        """Turn the feeds into arrays.

        Returns:
            By name, an array (feeds, ...) if all have one shape, otherwise arrays of unequal shapes.
        """
        return {key: column.finish() for key, column in self._columns.items()}


class _Column:
    """The arrays of one name."""

    def __init__(self, description: str) -> None:
        self._spool = Spool(description)
        self._texts: list[Array] = []
        self._shapes: list[tuple[int, ...]] = []
        self._dtype: np.dtype[Any] | None = None

    def append(self, value: Any) -> tuple[str, str] | None:
        """Add an array; the first array and this one in words if they differ in type or rank."""
        array = as_text(np.asarray(value))
        if self._dtype is None:
            self._dtype = array.dtype
        elif not self._fits(array):
            first = f"{self._dtype} with {len(self._shapes[0])} axes"
            return first, f"{array.dtype} with {array.ndim} axes"
        self._shapes.append(array.shape)
        if array.dtype.kind in TEXT_KINDS:
            self._texts.append(array.reshape(-1))
        else:
            self._spool.append(array)
        return None

    def _fits(self, array: Array) -> bool:
        assert self._dtype is not None
        both_texts = array.dtype.kind == "U" and self._dtype.kind == "U"
        return (array.dtype == self._dtype or both_texts) and array.ndim == len(self._shapes[0])

    def finish(self) -> Stored:
        """All arrays, as one if they have one shape."""
        assert self._dtype is not None
        count = len(self._shapes)
        equal = len(set(self._shapes)) == 1
        shape = (count, *self._shapes[0])
        if self._texts:
            texts = np.concatenate(self._texts)
            values: Values = texts.reshape(shape) if equal else texts
        elif equal:
            values = self._spool.finish(shape, self._dtype)
        else:
            values = self._spool.finish((_total(self._shapes),), self._dtype)
        if equal:
            return values
        return UnequalArrays(values, np.asarray(self._shapes, np.int64).reshape(count, -1))


def _total(shapes: Sequence[tuple[int, ...]]) -> int:
    """Number of values of arrays of these shapes."""
    return sum(int(np.prod(shape)) for shape in shapes)


def as_text(array: Array) -> Array:
    """Convert texts, which come as objects or bytes as well.

    Args:
        array: Any array.

    Returns:
        An array of str for objects that are all texts, and for bytes; otherwise the array itself.
    """
    if array.dtype.kind == "S":
        return np.char.decode(array, "utf-8")
    if array.dtype.kind == "O" and all(isinstance(value, str) for value in array.reshape(-1)):
        return array.astype(np.str_)
    return array
