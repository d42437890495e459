"""Arrays of samples that are too large for memory: they stay in a file, and rows of axis 0 are read on demand.

``FileArray`` resembles a numpy array in its shape, its type and reading by index. ``Spool`` collects an array that
arrives in parts, in an unnamed temporary file if it exceeds ``IN_MEMORY_BYTES``.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import IO, Any, NamedTuple

import numpy as np

from onnx_oamip.core.errors import DataError, OutputError
from onnx_oamip.core.records import Array, Ints

IN_MEMORY_BYTES = 1 << 22
"""Bytes up to which an array is kept in memory; also the size of one read."""


class SharedFile:
    """An open file that any thread can read at any position. It is closed when its last reader is deleted."""

    def __init__(
        self,
        stream: IO[bytes],
        name: str,
        fixed: bool = True,
    ) -> None:
        """Take over an open file.

        Args:
            stream: The file, unbuffered.
            name: Name for error messages.
            fixed: True if the content must not change from now on.
        """
        self._stream = stream
        self._name = name
        self._lock = threading.Lock()
        self._state = _state(stream) if fixed else None
        weakref.finalize(self, stream.close)

    def fill(self, offset: int, target: memoryview) -> None:
        """Read bytes at a position.

        Args:
            offset: Position in the file.
            target: Memory to fill completely.

        Raises:
            DataError: The file was changed since it was opened, or is too short.
        """
        with self._lock:
            changed = self._state is not None and _state(self._stream) != self._state
            self._stream.seek(offset)
            done = 0
            while not changed and done < len(target):
                read = self._stream.readinto(target[done:])  # type: ignore[attr-defined]
                changed = not read
                done += read or 0
        if changed:
            raise DataError(
                f"{self._name} was changed while it was read; leave it as it is until the run is over."
            )


def _state(stream: IO[bytes]) -> tuple[int, int]:
    """Size and time of the last change of a file."""
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns


class FileArray:
    """An array (rows, ...) whose rows are read on demand.

    Attributes:
        shape: Shape of the array.
        dtype: Type of its elements, in this machine's byte order.
    """

    def __init__(
        self,
        read: Callable[[Ints], Array],
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
    ) -> None:
        """Make an array of a function.

        Args:
            read: Returns the rows at non-negative indices (n,) as (n, ...).
            shape: Shape of the array.
            dtype: Type of the elements that ``read`` returns.
        """
        self._read = read
        self.shape = shape
        self.dtype = dtype

    @classmethod
    def at(
        cls,
        file: SharedFile,
        offset: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
    ) -> FileArray:
        """Make an array of a part of a file.

        Args:
            file: File that holds the values in C order.
            offset: Position of the first value.
            shape: Shape of the array.
            dtype: Type of the elements in the file.

        Returns:
            An array in this machine's byte order.
        """
        size = row_bytes(shape, dtype)

        def read(index: Ints) -> Array:
            rows = np.empty((len(index), *shape[1:]), dtype)
            view = _bytes(rows)
            # Consecutive rows are read together.
            starts = np.flatnonzero(np.diff(index) != 1) + 1
            cuts = [0, *starts.tolist(), len(index)]
            for first, last in pairwise(cuts):
                if last > first:
                    position = offset + int(index[first]) * size
                    file.fill(position, view[first * size : last * size])
            return native(rows)

        return cls(read, shape, dtype.newbyteorder("="))

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def __getitem__(self, index: int | slice | Ints) -> Array:
        if isinstance(index, slice):
            return self._read(np.arange(*index.indices(len(self)), dtype=np.int64))
        requested = np.asarray(index)
        length = len(self)
        if requested.size and not -length <= requested.min() <= requested.max() < length:
            raise IndexError(f"rows {requested.min()} to {requested.max()} of {length}")
        flat = np.where(requested < 0, requested + length, requested).reshape(-1)
        rows = self._read(flat)
        return rows if requested.ndim else rows[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self[:], dtype)

    def take(self, index: Ints) -> FileArray:
        """Select rows without reading them.

        Args:
            index: Non-negative indices (n,).

        Returns:
            An array (n, ...).
        """
        shape = (len(index), *self.shape[1:])
        return FileArray(lambda part: self._read(index[part]), shape, self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        # The receiver of a pickle does not have the file: send the values.
        return np.asarray, (self[:],)


Values = Array | FileArray
"""Samples along axis 0, in memory or in a file."""


def native(array: Array) -> Array:
    """Convert an array to this machine's byte order.

    Args:
        array: Array in any byte order.

    Returns:
        The same values; the array itself if its order is native already.
    """
    if array.dtype.isnative:
        return array
    return array.astype(array.dtype.newbyteorder("="))


def row_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Compute the size of one row.

    Args:
        shape: Shape of an array.
        dtype: Type of its elements.

    Returns:
        Bytes of one index of axis 0.
    """
    return math.prod(shape[1:]) * dtype.itemsize


def take(values: Values, index: Ints) -> Values:
    """Select rows.

    Args:
        values: Samples along axis 0.
        index: Non-negative indices (n,).

    Returns:
        A copy if the rows are small, otherwise a view.
    """
    if len(index) * row_bytes(values.shape, values.dtype) <= IN_MEMORY_BYTES:
        return values[index]
    if isinstance(values, FileArray):
        return values.take(index)
    array = values
    shape = (len(index), *array.shape[1:])
    return FileArray(lambda part: array[index[part]], shape, array.dtype)


def blocks(values: Values) -> Iterator[Array]:
    """Iterate over all rows in order.

    Args:
        values: Samples along axis 0.

    Yields:
        Blocks of about ``IN_MEMORY_BYTES``.
    """
    step = max(1, IN_MEMORY_BYTES // max(row_bytes(values.shape, values.dtype), 1))
    for start in range(0, len(values), step):
        yield values[start : start + step]


class NotFinite(NamedTuple):
    """A row with NaN or infinite values.

    Attributes:
        row: Index of the row.
        only_negative_infinity: True if all such values of its block are -inf, as in an attention mask.
    """

    row: int
    only_negative_infinity: bool


def first_not_finite(values: Values) -> NotFinite | None:
    """Find the first row with NaN or infinite values. Nothing behind its block is read.

    Args:
        values: Floating-point samples along axis 0.

    Returns:
        The row, or None if all values are finite.
    """
    if not values.size:
        return None
    start = 0
    for block in blocks(values):
        finite = np.isfinite(block.reshape(len(block), -1)).all(axis=1)
        if not finite.all():
            other = np.isnan(block) | np.isposinf(block)
            return NotFinite(start + int(np.argmin(finite)), not other.any())
        start += len(block)
    return None


class Spool:
    """Collects bytes that arrive in parts, to be read as one array."""

    def __init__(self, description: str) -> None:
        """Start empty.

        Args:
            description: Subject of an error message.
        """
        self._description = description
        self._parts: list[bytes] = []
        self._file: IO[bytes] | None = None
        self.bytes = 0

    def append(self, part: bytes | memoryview | Array) -> None:
        """Append values in C order.

        Args:
            part: An array, or its bytes.

        Raises:
            OutputError: The folder for temporary files is full.
        """
        content = _bytes(np.ascontiguousarray(part)) if isinstance(part, np.ndarray) else part
        self.bytes += len(content)
        try:
            self._append(content)
        except OSError as error:
            folder = tempfile.tempdir or "the folder for temporary files"
            raise OutputError(
                f"{self._description}: there is no room for it in {folder} ({error.strerror or error}); free some, or "
                "set TMPDIR to a folder with more."
            ) from error

    def _append(self, content: bytes | memoryview) -> None:
        if self._file is None and self.bytes > IN_MEMORY_BYTES:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (lives as long as the array)
            self._write(b"".join(self._parts))
            self._parts = []
        if self._file is None:
            self._parts.append(bytes(content))
        else:
            self._write(content)

    def _write(self, content: bytes | memoryview) -> None:
        assert self._file is not None
        view = memoryview(content)
        # An unbuffered file may take only a part.
        while len(view):
            view = view[self._file.write(view) :]

    def finish(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Values:
        """Turn the collected bytes into an array.

        Args:
            shape: Shape of the array.
            dtype: Type of the elements as they were appended.

        Returns:
            The array, in this machine's byte order.
        """
        if self._file is None:
            content = bytearray(b"".join(self._parts))
            return native(np.frombuffer(content, dtype).reshape(shape))
        file = SharedFile(self._file, self._description, fixed=False)
        return FileArray.at(file, 0, shape, dtype)


def _bytes(values: Array) -> memoryview:
    """The memory of an array in C order."""
    return values.reshape(-1).view(np.uint8).data


def free_disk_space() -> int:
    """Measure the space for temporary files.

    Returns:
        Free bytes, 0 if the folder for temporary files does not exist.
    """
    try:
        return shutil.disk_usage(tempfile.gettempdir()).free
    except OSError:
        return 0
