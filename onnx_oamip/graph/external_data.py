"""External tensor data: large weights stay in their files, and graphs and arrays refer to them.

In a model of ``MAPPED_MODEL_BYTES`` and more, a tensor of ``MAPPED_TENSOR_BYTES`` and more has no payload of its own
but a reference (path, offset, length), however the file stored it. Graphs can then be copied freely, sessions of ONNX
Runtime share one mapping of the weights, and weights that pruning leaves alone are copied from file to file. New
weights of such a model go to temporary files (in ``TMPDIR``).
"""

from __future__ import annotations

import atexit
import mmap
import os
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto, numpy_helper

from onnx_oamip.core import atomic_files
from onnx_oamip.core.records import Array

MAPPED_MODEL_BYTES = 1 << 28
"""Size of a model from which on its large weights stay in their files."""
MAPPED_TENSOR_BYTES = 1 << 20
"""Size of a tensor from which on it counts as large."""
PROTOBUF_LIMIT = 1_900_000_000
"""Protobuf cannot serialise 2 GB; above this size the weights are written beside the graph."""
CHUNK_BYTES = 1 << 24
"""Bytes that pass through memory at a time."""
ALIGNMENT = 4096
"""Weights start at multiples of this offset, so that a page can be mapped for each of them."""
WHOLE_BYTES = frozenset(
    {
        TensorProto.FLOAT,
        TensorProto.DOUBLE,
        TensorProto.FLOAT16,
        TensorProto.INT8,
        TensorProto.UINT8,
        TensorProto.INT16,
        TensorProto.UINT16,
        TensorProto.INT32,
        TensorProto.UINT32,
        TensorProto.INT64,
        TensorProto.UINT64,
    }
)
"""Element types that numpy has, and that occupy whole bytes in a file."""

# Older releases of onnx do not have all of these types.
PACKED = frozenset(
    kind
    for name in ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2")
    if (kind := getattr(TensorProto, name, None))
)
"""Element types smaller than a byte."""
TWO_BITS = frozenset(
    kind for name in ("INT2", "UINT2") if (kind := getattr(TensorProto, name, None))
)
SIZED_TYPES = frozenset(TensorProto.DataType.values()) - {
    TensorProto.UNDEFINED,
    TensorProto.STRING,
}
"""Element types whose size in bytes follows from the shape."""
IN_MEMORY = "memory"
"""Stands for the path of a weight that is passed to ONNX Runtime as an array."""
FILESYSTEM_ROOT = Path.cwd().anchor

PAYLOAD_FIELDS = (
    "raw_data",
    "float_data",
    "int32_data",
    "int64_data",
    "double_data",
    "uint64_data",
    "external_data",
)
"""Fields of a tensor that hold its elements, or say where they are."""

# Field numbers of onnx.proto, and wire types of protobuf.
GRAPH_OF_MODEL = 7
INITIALIZER_OF_GRAPH = 5
DATA_TYPE_OF_TENSOR = 2
RAW_DATA_OF_TENSOR = 9
VARINT, EIGHT_BYTES, LENGTH_DELIMITED, FOUR_BYTES = 0, 1, 2, 5


class Location(NamedTuple):
    """Place of a payload in a file.

    Attributes:
        file: Path, as the tensor names it.
        offset: First byte.
        length: Bytes, or None if the tensor does not state it.
    """

    file: str
    offset: int
    length: int | None


def is_reference(tensor: TensorProto) -> bool:
    """Tests whether the payload of a tensor is in a file.

    Args:
        tensor: Any tensor.

    Returns:
        True if the tensor refers to a file.
    """
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def location(tensor: TensorProto) -> Location:
    """Reads the place of a payload from its tensor.

    Args:
        tensor: A tensor that refers to a file.

    Returns:
        The place as the tensor states it.

    Raises:
        ValueError: Offset or length is negative or not a number.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    offset = int(entries.get("offset") or 0)
    if entries.get("length"):
        length = int(entries["length"])
    else:
        length = None
    if offset < 0 or (length is not None and length < 0):
        raise ValueError(f"'{tensor.name}' has a negative offset or length")
    return Location(entries.get("location", ""), offset, length)


def set_reference(
    tensor: TensorProto,
    path: str | os.PathLike[str],
    offset: int,
    length: int,
) -> None:
    """Replaces the payload of a tensor by a reference to a file.

    Args:
        tensor: The tensor, changed in place.
        path: File with the payload.
        offset: First byte of the payload.
        length: Bytes of the payload.
    """
    for field in PAYLOAD_FIELDS:
        tensor.ClearField(field)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", os.fspath(path)), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def size_of(tensor: TensorProto) -> int:
    """Bytes of the elements of a tensor.

    Args:
        tensor: A tensor of one of the types in ``SIZED_TYPES``.

    Returns:
        Its size in a file, in bytes.
    """
    count = int(np.prod(tensor.dims, dtype=np.int64))
    if tensor.data_type in PACKED:
        if tensor.data_type in TWO_BITS:
            elements_per_byte = 4
        else:
            elements_per_byte = 2
        return -(-count // elements_per_byte)
    return count * int(_dtype(tensor).itemsize)


def _dtype(tensor: TensorProto) -> np.dtype[Any]:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))


def array(tensor: TensorProto) -> Array:
    """Value of a tensor.

    Args:
        tensor: Any tensor; a reference must name an existing file.

    Returns:
        A read-only view of the mapped file for a reference, else a copy of the payload.
    """
    if not is_reference(tensor):
        return numpy_helper.to_array(tensor)
    path, offset, _ = location(tensor)
    state = os.stat(path)
    content = _mapped(path, state.st_ino, state.st_mtime_ns, state.st_size)
    payload = content[offset : offset + size_of(tensor)]
    return payload.view(_dtype(tensor).newbyteorder("<")).reshape(tuple(tensor.dims))


@lru_cache(maxsize=1024)
def _mapped(path: str, *state: int) -> Array:  # noqa: ARG001 (a file that changed is mapped anew)
    """All bytes of a file, mapped once for all readers."""
    return np.memmap(path, np.uint8, "r").view(np.ndarray)


def load_payload(tensor: TensorProto) -> None:
    """Reads the payload of a reference into the tensor itself.

    Args:
        tensor: The tensor, changed in place; left alone if it is no reference.
    """
    if not is_reference(tensor):
        return
    path, offset, _ = location(tensor)
    with open(path, "rb") as stream:
        stream.seek(offset)
        tensor.raw_data = stream.read(size_of(tensor))
    tensor.ClearField("external_data")
    tensor.data_location = TensorProto.DEFAULT


class _TemporaryFiles:
    """Folder for new weights of large models; it is removed when the process ends."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._count = 0

    def new_path(self) -> Path:
        if self._folder is None:
            self._folder = atomic_files.create_folder(
                Path(tempfile.gettempdir()), atomic_files.SCRATCH
            )
            atexit.register(atomic_files.remove_folder, self._folder)
        self._count += 1
        return self._folder / str(self._count)


_TEMPORARY_FILES = _TemporaryFiles()


def tensor(value: Array, name: str, away: bool) -> TensorProto:
    """Makes a tensor for a new weight.

    Args:
        value: Its value.
        name: Its name.
        away: Write a large payload to a temporary file and refer to it.

    Returns:
        The tensor, with its payload or a reference to it.
    """
    element_type = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    is_large = value.nbytes >= MAPPED_TENSOR_BYTES and element_type in WHOLE_BYTES
    if not away or not is_large:
        return numpy_helper.from_array(value, name)
    path = _TEMPORARY_FILES.new_path()
    result = TensorProto(name=name, dims=value.shape, data_type=element_type)
    with path.open("wb") as stream:
        set_reference(result, path, *_append(stream, value))
    return result


def references(proto: ModelProto) -> list[TensorProto]:
    """Initialisers whose payload is in a file.

    Args:
        proto: The model.

    Returns:
        Initialisers of the main graph.
    """
    return [t for t in proto.graph.initializer if is_reference(t)]


def size(proto: ModelProto) -> int:
    """Size of a model with all its weights.

    Args:
        proto: The model.

    Returns:
        Bytes of the serialised graph and of the payloads that it refers to.
    """
    return int(proto.ByteSize()) + sum(size_of(t) for t in references(proto))


# ------------------------------------------------------------------------------------------------------- reading


def parse(path: Path) -> ModelProto:
    """Parses a model file; in a large one, large weights become references to their place in it.

    Args:
        path: The file.

    Returns:
        The model.

    Raises:
        DecodeError: The file is no model, or is truncated.
        OSError: The file cannot be read.
    """
    proto = ModelProto()
    if path.stat().st_size < MAPPED_MODEL_BYTES:
        proto.ParseFromString(path.read_bytes())
        return proto
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            content, payloads = _ModelWithoutWeights(data).split()
        except (IndexError, ValueError) as error:
            raise DecodeError("a field ends behind the end of the file") from error
    proto.ParseFromString(content)
    for i, (start, end) in payloads.items():
        set_reference(proto.graph.initializer[i], path.resolve(), start, end - start)
    return proto


class _Field(NamedTuple):
    """A field of a serialised protobuf message.

    Attributes:
        number: Its number in the message type.
        wire_type: Its encoding.
        start: Position of its first byte, that of the tag.
        content: Position of its first byte behind tag and length.
        end: Position behind its last byte.
    """

    number: int
    wire_type: int
    start: int
    content: int
    end: int

    def is_submessage(self, number: int) -> bool:
        """Tests for a length-delimited field (a message, a string or bytes) of a number."""
        return self.number == number and self.wire_type == LENGTH_DELIMITED


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[_Field]:
    """Fields of the message between two positions. Raises ValueError if they are malformed."""
    position = start
    while position < end:
        key, content = _varint(data, position)
        number = key >> 3
        wire_type = key & 7
        if wire_type == LENGTH_DELIMITED:
            length, content = _varint(data, content)
            stop = content + length
        elif wire_type == EIGHT_BYTES:
            stop = content + 8
        elif wire_type == FOUR_BYTES:
            stop = content + 4
        elif wire_type == VARINT:
            _, stop = _varint(data, content)
        else:
            raise ValueError
        if stop > end:
            raise ValueError
        yield _Field(number, wire_type, position, content, stop)
        position = stop


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    """A variable-length integer (seven bits a byte, low ones first) and the position behind it."""
    value = 0
    shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError


def _encoded(number: int, content: bytes) -> bytes:
    """A length-delimited field with a number below 16."""
    coded = bytearray([number << 3 | LENGTH_DELIMITED])
    length = len(content)
    while length > 127:
        coded.append(length & 127 | 128)
        length >>= 7
    return bytes(coded) + bytes([length]) + content


class _ModelWithoutWeights:
    """Splits a serialised model into a message without large payloads, and the positions of these payloads.

    The file is walked field by field, so that the payloads are never copied into memory.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._payloads: dict[int, tuple[int, int]] = {}
        self._count = 0

    def split(self) -> tuple[bytes, dict[int, tuple[int, int]]]:
        """Splits the model.

        Returns:
            The message, and (start, end) of each payload by the index of its initialiser.
        """
        model: list[bytes] = []
        for field in _fields(self._data, 0, len(self._data)):
            if field.is_submessage(GRAPH_OF_MODEL):
                model.append(_encoded(GRAPH_OF_MODEL, self._graph(field)))
            else:
                model.append(self._data[field.start : field.end])
        return b"".join(model), self._payloads

    def _graph(self, graph: _Field) -> bytes:
        content: list[bytes] = []
        for field in _fields(self._data, graph.content, graph.end):
            if field.is_submessage(INITIALIZER_OF_GRAPH):
                content.append(self._initializer(field))
                self._count += 1
            else:
                content.append(self._data[field.start : field.end])
        return b"".join(content)

    def _initializer(self, tensor: _Field) -> bytes:
        """The field of an initialiser; a large payload is left out and noted."""
        unchanged = slice(tensor.start, tensor.end)
        if tensor.end - tensor.content < MAPPED_TENSOR_BYTES:
            return self._data[unchanged]
        fields = list(_fields(self._data, tensor.content, tensor.end))
        large = [
            field
            for field in fields
            if field.is_submessage(RAW_DATA_OF_TENSOR)
            and field.end - field.content >= MAPPED_TENSOR_BYTES
        ]
        if len(large) != 1 or not self._has_whole_bytes(fields):
            return self._data[unchanged]
        payload = large[0]
        self._payloads[self._count] = (payload.content, payload.end)
        rest = [self._data[field.start : field.end] for field in fields if field is not payload]
        return _encoded(INITIALIZER_OF_GRAPH, b"".join(rest))

    def _has_whole_bytes(self, fields: list[_Field]) -> bool:
        """Tests the element type of a tensor, given by its fields; the last one counts, as in protobuf."""
        element_type = None
        for field in fields:
            if field.number == DATA_TYPE_OF_TENSOR and field.wire_type == VARINT:
                element_type, _ = _varint(self._data, field.content)
        return element_type in WHOLE_BYTES


# ------------------------------------------------------------------------------------------------------- running


def detached(proto: ModelProto) -> tuple[ModelProto, dict[str, Array]]:
    """Splits a model that is too large to serialise into a small graph and the values that it refers to.

    Args:
        proto: Any model.

    Returns:
        A graph that can be serialised, and the values of its initialisers that are neither in it nor in a file, by
        name. A small model is returned as it is, without values.
    """
    values: dict[str, Array] = {}
    if proto.ByteSize() < PROTOBUF_LIMIT:
        return proto, values
    small = ModelProto()
    for field, value in proto.ListFields():
        if field.name != "graph":
            _set_field(small, field.name, value)
    for field, value in proto.graph.ListFields():
        if field.name != "initializer":
            _set_field(small.graph, field.name, value)
    for tensor in proto.graph.initializer:
        is_large = tensor.ByteSize() >= MAPPED_TENSOR_BYTES and tensor.data_type in WHOLE_BYTES
        if is_reference(tensor) or not is_large:
            small.graph.initializer.append(tensor)
            continue
        values[tensor.name] = numpy_helper.to_array(tensor)
        named = small.graph.initializer.add(
            name=tensor.name, dims=tensor.dims, data_type=tensor.data_type
        )
        set_reference(named, IN_MEMORY, 0, size_of(tensor))
    return small, values


def under_root(proto: ModelProto) -> ModelProto:
    """Makes the references of a model relative to ``FILESYSTEM_ROOT``: ONNX Runtime takes no absolute paths.

    Args:
        proto: The model.

    Returns:
        A copy with relative paths.
    """
    result = ModelProto()
    result.CopyFrom(proto)
    for tensor in references(result):
        path, offset, length = location(tensor)
        if path != IN_MEMORY:
            relative = Path(path).relative_to(FILESYSTEM_ROOT).as_posix()
            set_reference(tensor, relative, offset, length or size_of(tensor))
    return result


def aligned(value: Array) -> Array:
    """Makes an array contiguous, and aligned as its element type demands.

    Args:
        value: Any array.

    Returns:
        The array itself where it already is, else a copy.
    """
    return np.require(value, requirements=["C", "A"])


def _set_field(message: object, name: str, value: object) -> None:
    if isinstance(value, (int, str, bytes)):
        setattr(message, name, value)
    else:
        getattr(message, name).MergeFrom(value)


def checkable(proto: ModelProto) -> ModelProto:
    """Makes a model small enough for the ONNX checker.

    Args:
        proto: Any model.

    Returns:
        The model itself, or a copy in which weights in files, and those too large to pass on, are inputs.
    """
    if not references(proto) and proto.ByteSize() < PROTOBUF_LIMIT:
        return proto
    small, _ = detached(proto)
    result = ModelProto()
    result.CopyFrom(small)
    del result.graph.initializer[:]
    inputs = {value.name for value in small.graph.input}
    for tensor in small.graph.initializer:
        if not is_reference(tensor):
            result.graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            value = onnx.helper.make_tensor_value_info(
                tensor.name, tensor.data_type, list(tensor.dims)
            )
            result.graph.input.append(value)
    return result


# ------------------------------------------------------------------------------------------------------- writing


def save(proto: ModelProto, path: Path, side: str) -> list[str]:
    """Writes a model; if it refers to files or is too large for one, its weights go to a file beside it.

    One weight after the other passes through memory, of those in files at most ``CHUNK_BYTES`` at a time.

    Args:
        proto: The model.
        path: File to write.
        side: Name of the file for weights, in the same folder.

    Returns:
        Names of the files that were written.
    """
    if not references(proto) and proto.ByteSize() < PROTOBUF_LIMIT:
        path.write_bytes(proto.SerializeToString(deterministic=True))
        return [path.name]
    small, values = detached(proto)
    result = ModelProto()
    result.CopyFrom(small)
    with (path.parent / side).open("wb") as stream:
        for tensor in references(result):
            if tensor.name in values:
                value = values[tensor.name]
            else:
                value = array(tensor)
            set_reference(tensor, side, *_append(stream, value))
    path.write_bytes(result.SerializeToString(deterministic=True))
    return [path.name, side]


def _append(stream: BinaryIO, value: Array) -> tuple[int, int]:
    """Writes an array at the end of a file; (offset, length) of its bytes."""
    start = -(-stream.tell() // ALIGNMENT) * ALIGNMENT
    stream.seek(start)
    content = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    starts = range(0, len(content), CHUNK_BYTES)
    stream.writelines(content[first : first + CHUNK_BYTES].data for first in starts)
    return start, len(content)
