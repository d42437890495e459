"""Arrays in .npy and .npz files.

The header is read first, so that nothing is unpickled and no memory is requested in vain. Large arrays stay in the
file and are read by rows on demand (``out_of_core``).
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from onnx_oamip.core.errors import DataError, OutputError
from onnx_oamip.core.records import Model, Reading
from onnx_oamip.data.loaded import Format, Loaded
from onnx_oamip.data.out_of_core import (
    IN_MEMORY_BYTES,
    FileArray,
    SharedFile,
    Spool,
    Values,
    free_disk_space,
    native,
)
from onnx_oamip.graph.input_guards import amount, memory

NPY_MAGIC = b"\x93NUMPY"
ZIP_MAGIC = b"PK"
LOCAL_HEADER = struct.Struct("<26xHH")
"""Header of an archive member: it ends with the lengths of the name and of an extra field, which follow it."""
MAX_HEADER_BYTES = 10_000
"""Largest header of an array, numpy's own limit: longer ones take long to parse."""
READ_BYTES = 1 << 20
"""Size of one read from a stream."""
MAX_REASON_CHARACTERS = 200
"""Characters of another library's message in an error."""
MAX_TYPE_CHARACTERS = 100
"""Characters of a record type in an error."""


class _UnreadableFile(ValueError):
    """Reason why a file cannot be read, and the content that it should have, if that can be named."""

    def __init__(self, reason: str, expected: str = "") -> None:
        super().__init__(reason)
        self.expected = expected


def load(
    path: Path,
    purpose: str = "numpy data",
    advice: str = "",
) -> Values | dict[str, Values]:
    """Load a .npy or .npz file, in this machine's byte order.

    Large arrays stay in the file, those of a compressed archive in a temporary one, and are read by rows on demand.

    Args:
        path: File to load.
        purpose: Kind of file that was expected, for error messages.
        advice: Way to create such a file, for error messages.

    Returns:
        The array of a .npy file, or the arrays of a .npz file by name.

    Raises:
        DataError: The file is not one of these, holds Python objects or records, or claims to hold more than fits into
            memory.
        OutputError: The temporary file cannot be written.
    """
    try:
        return _load(path)
    except (DataError, OutputError):
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:
        # The exceptions of zipfile and zlib for broken archives are not documented.
        if isinstance(error, _UnreadableFile):
            expected = error.expected
        else:
            expected = ""
        if not advice and expected:
            advice = f"write it as arrays of {expected}"
        elif not advice:
            advice = "write it with numpy.savez"
        raise DataError(
            f"{path} cannot be read as {purpose}: {_first_line(error)}; {advice}."
        ) from error


def _load(path: Path) -> Values | dict[str, Values]:
    stream = path.open("rb", buffering=0)
    file = SharedFile(stream, str(path))
    start = stream.read(len(NPY_MAGIC))
    stream.seek(0)
    if start == NPY_MAGIC:
        size = path.stat().st_size
        return _read_array(_Source(stream, path, "it", size, file, 0))
    if start.startswith(ZIP_MAGIC):
        return _read_archive(stream, path, file)
    raise _UnreadableFile("it does not start as an .npy or .npz file does")


@dataclass(frozen=True)
class _Source:
    """Location of one array, its header included.

    Attributes:
        stream: Stream of its bytes.
        path: File that holds it.
        name: Name in error messages.
        size: Number of bytes.
        file: File with the same bytes, None if they are compressed.
        offset: Position of the first byte in that file.
    """

    stream: IO[bytes]
    path: Path
    name: str
    size: int
    file: SharedFile | None
    offset: int


class _Header(NamedTuple):
    """Content of an array's header."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _read_archive(
    stream: IO[bytes],
    path: Path,
    file: SharedFile,
) -> dict[str, Values]:
    arrays: dict[str, Values] = {}
    with zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
        _check_memory(path, members)
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                raise DataError(f"{path} holds '{name}' twice; keep one of them.")
            stored = member.compress_type == zipfile.ZIP_STORED
            if stored:
                offset = _content_offset(file, member)
            else:
                offset = 0
            with archive.open(member) as content:
                source = _Source(
                    stream=content,
                    path=path,
                    name=f"its array '{name}'",
                    size=member.file_size,
                    file=file if stored else None,
                    offset=offset,
                )
                arrays[name] = _read_array(source)
    return arrays


def _content_offset(file: SharedFile, member: zipfile.ZipInfo) -> int:
    """Position of the content of a member that is not compressed: behind its local header."""
    header = bytearray(LOCAL_HEADER.size)
    file.fill(member.header_offset, memoryview(header))
    name_length, extra_length = LOCAL_HEADER.unpack(header)
    return member.header_offset + LOCAL_HEADER.size + int(name_length) + int(extra_length)


def _check_memory(path: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    """Refuse an archive that claims to hold more than fits into memory and the temporary folder."""
    archive_size = path.stat().st_size
    in_memory = 0
    on_disk = 0
    for member in members:
        if member.file_size <= IN_MEMORY_BYTES:
            in_memory += member.file_size
        elif member.compress_type != zipfile.ZIP_STORED or member.file_size > archive_size:
            on_disk += member.file_size
    free = memory()
    free_disk = free_disk_space()
    if in_memory > free or on_disk > free_disk:
        raise DataError(
            f"{path} asks for {amount(in_memory + on_disk)} of memory and this machine has {amount(free)}, and "
            f"{amount(free_disk)} for temporary files; give fewer samples, or save them with numpy.savez, uncompressed."
        )


def _read_array(source: _Source) -> Values:
    """Read one array with its header."""
    name = source.name
    try:
        header = _read_header(source.stream)
        start = source.stream.tell()
    except Exception as error:
        # The header is text that numpy parses: any exception is possible.
        reason = f"the header of {name} is broken, {_first_line(error)}"
        raise _UnreadableFile(reason) from error
    _check_header(header, name)
    available, values = _read_content(source, start, header)
    if values is None:
        present = amount(available or source.size)
        raise _UnreadableFile(
            f"{name} is truncated: {header.shape} of {header.dtype} is {amount(header.bytes)}, and {present} are there"
        )
    return values


def _read_header(stream: IO[bytes]) -> _Header:
    readers: Mapping[tuple[int, int], Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(stream)
    if version not in readers:
        raise ValueError(f"format version {version[0]}.{version[1]} is not read")
    return _Header(*readers[version](stream, max_header_size=MAX_HEADER_BYTES))


def _check_header(header: _Header, name: str) -> None:
    """Refuse arrays that are not numbers, and shapes that are not lengths."""
    dtype = header.dtype
    if dtype.hasobject:
        raise _UnreadableFile(
            f"{name} holds Python objects, which could run code",
            "numbers or of str, and samples of unequal lengths as a folder with one .npz per sample",
        )
    if dtype.names is not None or dtype.subdtype is not None or not dtype.itemsize:
        described = str(dtype)[:MAX_TYPE_CHARACTERS]
        raise _UnreadableFile(f"{name} holds records of type {described}", "numbers")
    # Not isinstance: True is an int.
    if any(type(length) is not int or length < 0 for length in header.shape):
        raise _UnreadableFile(f"{name} has the shape {header.shape}, which is none")


def _read_content(
    source: _Source,
    start: int,
    header: _Header,
) -> tuple[int, Values | None]:
    """The array behind a header, or the number of bytes that are there and None if it is truncated."""
    size = header.bytes
    if size > source.size:
        return 0, None
    # Rows of an array in Fortran order are scattered over the file.
    fortran = header.fortran and len(header.shape) > 1
    if size <= IN_MEMORY_BYTES or fortran:
        available, values = _read_in_memory(source, header, fortran)
    elif source.file is None:
        spool = Spool(f"{source.path}: {source.name} is {amount(size)} when unpacked")
        for part in _read_parts(source.stream, size):
            spool.append(part)
        available = spool.bytes
        values = spool.finish(header.shape, header.dtype)
    else:
        available = min(size, source.size - start)
        if source.offset:
            # An archive compares a checksum as soon as all has been read.
            available = sum(map(len, _read_parts(source.stream, size)))
        position = source.offset + start
        values = FileArray.at(source.file, position, header.shape, header.dtype)
    return available, values if available == size else None


def _read_in_memory(
    source: _Source,
    header: _Header,
    fortran: bool,
) -> tuple[int, Values]:
    """Number of bytes that are there, and the array that they begin."""
    size = header.bytes
    if size > IN_MEMORY_BYTES:
        free = memory()
        if size > free:
            raise DataError(
                f"{source.path}: {source.name} is in Fortran order, so it asks for {amount(size)} of memory and this "
                f"machine has {amount(free)}; save it in C order."
            )
    content = bytearray(size)
    view = memoryview(content)
    available = 0
    for part in _read_parts(source.stream, size):
        view[available : available + len(part)] = part
        available += len(part)
    flat = np.frombuffer(content, header.dtype)
    if fortran:
        return available, native(flat.reshape(header.shape[::-1]).T)
    return available, native(flat.reshape(header.shape))


def _read_parts(stream: IO[bytes], size: int) -> Iterator[bytes]:
    """The next ``size`` bytes of a stream, or as many as there are."""
    while size:
        part = stream.read(min(size, READ_BYTES))
        if not part:
            return
        yield part
        size -= len(part)


def _first_line(error: Exception) -> str:
    """First line of an exception's message, or its type if it has none."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    return line[:MAX_REASON_CHARACTERS].rstrip(".")


def only_input(path: Path, model: Model) -> str:
    """Name the input that a file with a single array is for.

    Args:
        path: The file.
        model: The model.

    Returns:
        Name of the model's only input.

    Raises:
        DataError: The model has several inputs.
    """
    if len(model.inputs) != 1:
        names = ", ".join(port.name for port in model.inputs)
        raise DataError(
            f"{path} holds one array but the model has the inputs {names}; use an .npz with those names."
        )
    return model.inputs[0].name


def matches(source: str) -> bool:
    """Test for a file of arrays by its suffix, or by its first bytes: links into a store have no suffix.

    Args:
        source: Path.

    Returns:
        True for a .npz or .npy file.
    """
    path = Path(source)
    if path.is_dir():
        return False
    if path.suffix in (".npz", ".npy"):
        return True
    try:
        with path.open("rb") as stream:
            start = stream.read(len(NPY_MAGIC))
    except (OSError, ValueError):
        # ValueError: a name with a zero byte.
        return False
    return start == NPY_MAGIC or start.startswith(ZIP_MAGIC)


def read(source: str, model: Model, _reading: Reading) -> Loaded:
    """Load a .npy or .npz file for a model.

    Args:
        source: File to load.
        model: Model that reads the samples.
        _reading: Ignored: arrays are fed as they are.

    Returns:
        Arrays by input name.

    Raises:
        DataError: The file cannot be read, or holds one array for several inputs.
    """
    path = Path(source)
    loaded = load(path)
    if isinstance(loaded, dict):
        return Loaded(loaded, source)
    return Loaded({only_input(path, model): loaded}, source)


FORMAT = Format("an .npz or .npy file", matches, read, has_parts=True)
