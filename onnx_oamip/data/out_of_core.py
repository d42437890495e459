"""Arrays of samples that are too large to hold: they stay in a file, and rows of axis 0 are read when asked for.

``Rows`` looks like an array as far as its shape, its type and reading by index go. ``Spool`` makes one out of parts
that come one after another, in a temporary file without a name where they are more than ``HELD`` bytes.
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

HELD = 1 << 22
"""Bytes up to which an array is simply held; also what is read at a time."""


class File:
    """An open file, read at any place by any thread; closed with the last that reads it.

    Raises DataError where the file behind ``name`` was changed since.
    """

    def __init__(self, stream: IO[bytes], name: str, fixed: bool = True) -> None:
        self._stream, self._name, self._lock = stream, name, threading.Lock()
        self._state = _state(stream) if fixed else None
        weakref.finalize(self, stream.close)

    def fill(self, offset: int, target: memoryview) -> None:
        """Read ``len(target)`` bytes at ``offset``."""
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
    found = os.fstat(stream.fileno())
    return found.st_size, found.st_mtime_ns


class Rows:
    """An array (rows, ...) that ``read`` gives parts of: indices along axis 0 (n,), none negative, to (n, ...)."""

    def __init__(
        self, read: Callable[[Ints], Array], shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self._read, self.shape, self.dtype = read, shape, dtype

    @classmethod
    def at(cls, file: File, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Rows:
        """An array in C order at a place of a file, given in this machine's byte order."""
        size = row_bytes(shape, dtype)

        def read(index: Ints) -> Array:
            found = np.empty((len(index), *shape[1:]), dtype)
            view = _bytes(found)
            # What stands together is read together.
            cuts = [0, *(np.flatnonzero(np.diff(index) != 1) + 1).tolist(), len(index)]
            for first, last in pairwise(cuts):
                if last > first:
                    file.fill(offset + int(index[first]) * size, view[first * size : last * size])
            return found if dtype.isnative else found.astype(dtype.newbyteorder("="))

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
        wanted = np.asarray(index)
        if wanted.size and not -len(self) <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of {len(self)}")
        flat = np.where(wanted < 0, wanted + len(self), wanted).reshape(-1)
        found = self._read(flat)
        return found if wanted.ndim else found[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self[:], dtype)

    def take(self, index: Ints) -> Rows:
        """The rows at ``index``, still to be read."""
        return Rows(lambda part: self._read(index[part]), (len(index), *self.shape[1:]), self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return np.asarray, (self[:],)  # where it arrives there is no such file


Values = Array | Rows
"""Samples along axis 0, held or in a file."""


def row_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Bytes of one index of axis 0."""
    return math.prod(shape[1:]) * dtype.itemsize


def take(values: Values, index: Ints) -> Values:
    """The rows at ``index``: a copy where they are few, a view of what there is where they are many."""
    if len(index) * row_bytes(values.shape, values.dtype) <= HELD:
        return values[index]
    if isinstance(values, Rows):
        return values.take(index)
    held = values
    return Rows(lambda part: held[index[part]], (len(index), *held.shape[1:]), held.dtype)


def blocks(values: Values) -> Iterator[Array]:
    """All rows in order, about ``HELD`` bytes at a time."""
    step = max(1, HELD // max(row_bytes(values.shape, values.dtype), 1))
    for start in range(0, len(values), step):
        yield values[start : start + step]


class NotFinite(NamedTuple):
    """A row with NaN or infinities; ``masks``: all of them, in the block it was met in, are -inf."""

    row: int
    masks: bool


def first_not_finite(values: Values) -> NotFinite | None:
    """The first row that has NaN or infinities; what comes after its block is not read."""
    done = 0
    for block in blocks(values) if values.size else ():
        bad = ~np.isfinite(block.reshape(len(block), -1)).all(axis=1)
        if bad.any():
            return NotFinite(
                done + int(np.argmax(bad)), not (np.isnan(block) | np.isposinf(block)).any()
            )
        done += len(block)
    return None


class Spool:
    """Bytes written one after another, to be read as one array: ``what`` they are, for the sentence of an error.

    Raises OutputError where the folder for temporary files has no room.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._parts: list[bytes] = []
        self._file: IO[bytes] | None = None
        self.bytes = 0

    def append(self, part: bytes | memoryview | Array) -> None:
        """Add values in C order."""
        content = _bytes(np.ascontiguousarray(part)) if isinstance(part, np.ndarray) else part
        self.bytes += len(content)
        try:
            if self._file is None and self.bytes > HELD:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (lives as long as the array)
                self._write(b"".join(self._parts))
                self._parts = []
            if self._file is None:
                self._parts.append(bytes(content))
            else:
                self._write(content)
        except OSError as error:
            folder = tempfile.tempdir or "the folder for temporary files"
            raise OutputError(
                f"{self._what}: there is no room for it in {folder} ({error.strerror or error}); free some, or set "
                "TMPDIR to a folder with more."
            ) from error

    def _write(self, content: bytes | memoryview) -> None:
        assert self._file is not None
        view = memoryview(content)
        while len(view):
            view = view[self._file.write(view) :]

    def finish(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Values:
        """What was written, as an array of this shape and type."""
        if self._file is None:
            found = np.frombuffer(bytearray(b"".join(self._parts)), dtype).reshape(shape)
            return found if dtype.isnative else found.astype(dtype.newbyteorder("="))
        return Rows.at(File(self._file, self._what, fixed=False), 0, shape, dtype)


def _bytes(values: Array) -> memoryview:
    """The memory of an array in C order."""
    return values.reshape(-1).view(np.uint8).data


def room() -> int:
    """Bytes that are free for temporary files."""
    try:
        return shutil.disk_usage(tempfile.gettempdir()).free
    except OSError:
        return 0
