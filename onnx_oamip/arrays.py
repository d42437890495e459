"""Arrays in .npy and .npz files. The header is read first: nothing is unpickled, and no memory is asked for in vain."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from .bounds import amount, memory
from .errors import DataError
from .records import Array

MAGIC = b"\x93NUMPY"
PACKED = b"PK"
HEADER = 10_000
"""Most bytes of a header, as numpy has it: longer ones take long to parse."""


class _Broken(ValueError):
    """Why a file cannot be read, and what it should hold where that is to be said."""

    def __init__(self, why: str, of: str = "") -> None:
        super().__init__(why)
        self.of = of


def load(path: Path, what: str = "numpy data", again: str = "") -> Array | dict[str, Array]:
    """The array of a .npy file, or the arrays of a .npz file by name, in this machine's byte order.

    ``what`` it is to be read as and how to make it ``again`` are for people. Raises DataError with one sentence for
    whatever is no such file, for Python objects and records, and for a file that says it holds more than the machine
    has memory.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(len(MAGIC))
            stream.seek(0)
            if start == MAGIC:
                size = path.stat().st_size
                _fits(path, size)
                return _array(stream, size, "it")
            if start.startswith(PACKED):
                return _archive(stream, path)
        raise _Broken("it does not start as an .npy or .npz file does")
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # what a broken archive makes zipfile and zlib raise is not documented
        of = error.of if isinstance(error, _Broken) else ""
        again = again or (f"write it as arrays of {of}" if of else "write it with numpy.savez")
        raise DataError(f"{path} cannot be read as {what}: {_said(error)}; {again}.") from error


def native(array: Array) -> Array:
    """The same values in this machine's byte order."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _archive(stream: IO[bytes], path: Path) -> dict[str, Array]:
    found: dict[str, Array] = {}
    with zipfile.ZipFile(stream) as archive:
        listed = archive.infolist()
        _fits(path, sum(member.file_size for member in listed))
        for member in listed:
            name = member.filename.removesuffix(".npy")
            if name in found:
                raise DataError(f"{path} holds '{name}' twice; keep one of them.")
            with archive.open(member) as inside:
                found[name] = _array(inside, member.file_size, f"its array '{name}'")
    return found


def _fits(path: Path, size: int) -> None:
    """Raises DataError where a file says that it holds more than there is memory for."""
    free = memory()
    if size > free:
        raise DataError(
            f"{path} asks for {amount(size)} of memory and this machine has {amount(free)}; give fewer samples."
        )


def _array(stream: IO[bytes], size: int, what: str) -> Array:
    """One array of ``size`` bytes with its header."""
    try:
        version = np.lib.format.read_magic(stream)
        shape, fortran, kind = _header(stream, version)
    except Exception as error:  # the header is text that numpy parses: anything may come out of that
        raise _Broken(f"the header of {what} is broken, {_said(error)}") from error
    if kind.hasobject:
        raise _Broken(f"{what} holds Python objects, which could run code", "numbers")
    if kind.names is not None or kind.subdtype is not None or not kind.itemsize:
        raise _Broken(f"{what} holds records of type {str(kind)[:100]}", "numbers")
    if any(type(length) is not int or length < 0 for length in shape):
        raise _Broken(f"{what} has the shape {shape}, which is none")
    asked = math.prod(shape) * kind.itemsize
    content = bytearray(asked if asked <= size else 0)
    done = _fill(stream, content)
    if done < asked:
        there = amount(done or size)
        raise _Broken(f"{what} is truncated: {shape} of {kind} is {amount(asked)}, and {there} are there")
    flat = np.frombuffer(content, kind)
    return native(flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape))


def _header(stream: IO[bytes], version: tuple[int, int]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    readers: Mapping[tuple[int, int], Any] = {
        (1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0,
    }  # fmt: skip
    if version not in readers:
        raise ValueError(f"format version {version[0]}.{version[1]} is not read")
    shape, fortran, kind = readers[version](stream, max_header_size=HEADER)
    return shape, fortran, kind


def _fill(stream: IO[bytes], content: bytearray) -> int:
    view, done = memoryview(content), 0
    while done < len(content) and (part := stream.read(min(len(content) - done, 1 << 20))):
        view[done : done + len(part)] = part
        done += len(part)
    return done


def _said(error: Exception) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text[:200].rstrip(".")
