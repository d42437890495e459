"""Arrays in .npy and .npz files. The header is read first: nothing is unpickled, and no memory is asked for in vain.

Large arrays are read by rows when these are asked for (``rows``).
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from onnx_oamip.core.errors import DataError, OutputError
from onnx_oamip.core.records import Array
from onnx_oamip.data.out_of_core import (
    HELD,
    File,
    Rows,
    Spool,
    Values,
    room,
)
from onnx_oamip.graph.input_guards import amount, memory

MAGIC = b"\x93NUMPY"
PACKED = b"PK"
LOCAL = struct.Struct("<26xHH")
"""A member's header in an archive: at its end the lengths of the name and of what else stands before the content."""
HEADER = 10_000
"""Most bytes of a header, as numpy has it: longer ones take long to parse."""


class _Broken(ValueError):
    """Why a file cannot be read, and what it should hold where that is to be said."""

    def __init__(self, why: str, of: str = "") -> None:
        super().__init__(why)
        self.of = of


def load(path: Path, what: str = "numpy data", again: str = "") -> Values | dict[str, Values]:
    """The array of a .npy file, or the arrays of a .npz file by name, in this machine's byte order.

    ``what`` it is to be read as and how to make it ``again`` are for people. Large ones stay in the file, those of
    a compressed archive in a temporary one, and are read by rows. Raises DataError with one sentence for whatever
    is no such file, for Python objects and records, and for a file that says it holds more than there is room for;
    OutputError where the temporary file cannot be written.
    """
    try:
        stream = path.open("rb", buffering=0)
        held = File(stream, str(path))
        start = stream.read(len(MAGIC))
        stream.seek(0)
        if start == MAGIC:
            return _array(_Place(stream, path, "it", path.stat().st_size, held, 0))
        if start.startswith(PACKED):
            return _archive(stream, path, held)
        raise _Broken("it does not start as an .npy or .npz file does")
    except (DataError, OutputError):
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (
        Exception
    ) as error:  # what a broken archive makes zipfile and zlib raise is not documented
        of = error.of if isinstance(error, _Broken) else ""
        again = again or (f"write it as arrays of {of}" if of else "write it with numpy.savez")
        raise DataError(f"{path} cannot be read as {what}: {_said(error)}; {again}.") from error


def native(array: Array) -> Array:
    """The same values in this machine's byte order."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


@dataclass(frozen=True)
class _Place:
    """Where one array is: a stream of its ``size`` bytes, header first; ``what`` it is called.

    ``file`` has the same bytes from ``offset`` on; None where they are compressed.
    """

    stream: IO[bytes]
    path: Path
    what: str
    size: int
    file: File | None
    offset: int


def _archive(stream: IO[bytes], path: Path, held: File) -> dict[str, Values]:
    found: dict[str, Values] = {}
    with zipfile.ZipFile(stream) as archive:
        listed = archive.infolist()
        _fits(path, listed)
        for member in listed:
            name = member.filename.removesuffix(".npy")
            if name in found:
                raise DataError(f"{path} holds '{name}' twice; keep one of them.")
            plain = member.compress_type == zipfile.ZIP_STORED
            offset = _offset(held, member) if plain else 0
            with archive.open(member) as inside:
                found[name] = _array(
                    _Place(
                        inside,
                        path,
                        f"its array '{name}'",
                        member.file_size,
                        held if plain else None,
                        offset,
                    )
                )
    return found


def _offset(held: File, member: zipfile.ZipInfo) -> int:
    """Where in the file the content of a member that is not compressed starts: behind its local header."""
    head = bytearray(LOCAL.size)
    held.fill(member.header_offset, memoryview(head))
    name, extra = LOCAL.unpack(head)
    return member.header_offset + LOCAL.size + int(name) + int(extra)


def _fits(path: Path, listed: Sequence[zipfile.ZipInfo]) -> None:
    """Raises DataError where an archive says that it holds more than there is room for when it is unpacked."""
    whole = path.stat().st_size
    small = sum(m.file_size for m in listed if m.file_size <= HELD)
    unpacked = sum(
        m.file_size
        for m in listed
        if m.file_size > HELD and (m.compress_type != zipfile.ZIP_STORED or m.file_size > whole)
    )
    if small > (free := memory()) or unpacked > room():
        raise DataError(
            f"{path} asks for {amount(small + unpacked)} of memory and this machine has {amount(free)}, and "
            f"{amount(room())} for temporary files; give fewer samples, or save them with numpy.savez, uncompressed."
        )


def _array(place: _Place) -> Values:
    """One array with its header."""
    what, stream = place.what, place.stream
    try:
        version = np.lib.format.read_magic(stream)
        shape, fortran, kind = _header(stream, version)
        start = stream.tell()
    except (
        Exception
    ) as error:  # the header is text that numpy parses: anything may come out of that
        raise _Broken(f"the header of {what} is broken, {_said(error)}") from error
    if kind.hasobject:
        raise _Broken(f"{what} holds Python objects, which could run code", "numbers")
    if kind.names is not None or kind.subdtype is not None or not kind.itemsize:
        raise _Broken(f"{what} holds records of type {str(kind)[:100]}", "numbers")
    if any(type(length) is not int or length < 0 for length in shape):
        raise _Broken(f"{what} has the shape {shape}, which is none")
    asked = math.prod(shape) * kind.itemsize
    done, values = _content(place, start, shape, fortran and len(shape) > 1, kind)
    if values is None:
        there = amount(done or place.size)
        raise _Broken(
            f"{what} is truncated: {shape} of {kind} is {amount(asked)}, and {there} are there"
        )
    return values


def _content(
    place: _Place, start: int, shape: tuple[int, ...], fortran: bool, kind: np.dtype[Any]
) -> tuple[int, Values | None]:
    """(bytes found, the array of that shape; None where it is truncated)."""
    asked = math.prod(shape) * kind.itemsize
    if asked > place.size:
        return 0, None
    if asked <= HELD or fortran:  # of columns, rows lie scattered over the file
        if asked > HELD and asked > (free := memory()):
            raise DataError(
                f"{place.path}: {place.what} is in Fortran order, so it asks for {amount(asked)} of memory and this "
                f"machine has {amount(free)}; save it in C order."
            )
        content = bytearray(asked)
        view = memoryview(content)
        done = 0
        for part in _parts(place.stream, asked):
            view[done : done + len(part)] = part
            done += len(part)
        flat = np.frombuffer(content, kind)
        values: Values = native(flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape))
    elif place.file is None:
        spool = Spool(f"{place.path}: {place.what} is {amount(asked)} when unpacked")
        for part in _parts(place.stream, asked):
            spool.append(part)
        done = spool.bytes
        values = spool.finish(shape, kind)
    else:
        # In an archive a checksum is compared once all has been read.
        done = (
            sum(map(len, _parts(place.stream, asked)))
            if place.offset
            else min(asked, place.size - start)
        )
        values = Rows.at(place.file, place.offset + start, shape, kind)
    return done, values if done == asked else None


def _parts(stream: IO[bytes], size: int) -> Iterator[bytes]:
    """What is there of the next ``size`` bytes."""
    while size and (part := stream.read(min(size, 1 << 20))):
        yield part
        size -= len(part)


def _header(
    stream: IO[bytes], version: tuple[int, int]
) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    readers: Mapping[tuple[int, int], Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"format version {version[0]}.{version[1]} is not read")
    shape, fortran, kind = readers[version](stream, max_header_size=HEADER)
    return shape, fortran, kind


def _said(error: Exception) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text[:200].rstrip(".")
