"""Large weights stay in the files they came from: a graph names them, arrays map them, nothing copies them.

In a model of ``MAPPED`` bytes and more, a tensor of ``LEAST`` bytes and more keeps no payload of its own but a
reference (path, offset, length), however the file held it. Graphs can then be copied freely, sessions of ONNX Runtime
share one mapping of the weights, and what was not cut goes from file to file. Weights that are made anew for such a
model go to temporary files (``TMPDIR`` says where).
"""

from __future__ import annotations

import atexit
import mmap
import os
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto, numpy_helper

from onnx_oamip.core import atomic_files
from onnx_oamip.core.records import Array

MAPPED = 1 << 28
LEAST = 1 << 20
LARGE = 1_900_000_000
"""Protobuf cannot serialise 2 GB; above this the weights are written beside the graph."""
CHUNK = 1 << 24
ALIGN = 4096
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
"""Element types that numpy has, one element after the other."""

PACKED = frozenset(
    kind
    for name in ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2")
    if (kind := getattr(TensorProto, name, None))
)
"""Element types smaller than a byte."""
TWO_BITS = frozenset(
    kind for name in ("INT2", "UINT2") if (kind := getattr(TensorProto, name, None))
)
KNOWN = frozenset(TensorProto.DataType.values()) - {TensorProto.UNDEFINED, TensorProto.STRING}
MEMORY = "memory"
"""Stands for a file where the value is handed over."""
ROOT = Path.cwd().anchor
GRAPH, INITIALIZER, RAW = 7, 5, 9
"""Field numbers of onnx.proto: the graph in a model, an initialiser in a graph, the bytes in a tensor."""
BYTES = 2
"""Wire type of a field with a length."""


def is_reference(tensor: TensorProto) -> bool:
    """Whether the payload is in a file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def place(tensor: TensorProto) -> tuple[str, int, int | None]:
    """(file, offset, length or None where it is not said) of a payload in a file. Raises ValueError for bad numbers."""
    said = {e.key: e.value for e in tensor.external_data}
    offset, length = (
        int(said.get("offset") or 0),
        int(said["length"]) if said.get("length") else None,
    )
    if offset < 0 or (length is not None and length < 0):
        raise ValueError(f"'{tensor.name}' has a negative offset or length")
    return said.get("location", ""), offset, length


def refer(tensor: TensorProto, path: str | os.PathLike[str], offset: int, length: int) -> None:
    """Make a tensor name its payload instead of holding it."""
    for field in (
        "raw_data",
        "float_data",
        "int32_data",
        "int64_data",
        "double_data",
        "uint64_data",
        "external_data",
    ):
        tensor.ClearField(field)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", os.fspath(path)), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def size_of(tensor: TensorProto) -> int:
    """Bytes of the elements."""
    count = int(np.prod(tensor.dims, dtype=np.int64))
    if tensor.data_type in PACKED:
        each = 4 if tensor.data_type in TWO_BITS else 2
        return -(-count // each)
    return count * int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize)


def array(tensor: TensorProto) -> Array:
    """The value of a tensor: a read-only view of its file, or what it holds."""
    if not is_reference(tensor):
        return numpy_helper.to_array(tensor)
    path, offset, _ = place(tensor)
    kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).newbyteorder("<")
    there = os.stat(path)
    held = _mapped(path, there.st_ino, there.st_mtime_ns, there.st_size)
    return held[offset : offset + size_of(tensor)].view(kind).reshape(tuple(tensor.dims))


@lru_cache(maxsize=1024)
def _mapped(path: str, *state: int) -> Array:  # noqa: ARG001 (a file that changed is mapped anew)
    """All bytes of a file, mapped once for all who read it."""
    return np.memmap(path, np.uint8, "r").view(np.ndarray)


def hold(tensor: TensorProto) -> None:
    """Read a payload into the tensor itself."""
    if is_reference(tensor):
        path, offset, _ = place(tensor)
        with open(path, "rb") as stream:
            stream.seek(offset)
            tensor.raw_data = stream.read(size_of(tensor))
        tensor.ClearField("external_data")
        tensor.data_location = TensorProto.DEFAULT


class _Store:
    """A folder for new weights of large models; it goes with the process."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._count = 0

    def path(self) -> Path:
        if self._folder is None:
            self._folder = atomic_files.make(Path(tempfile.gettempdir()), atomic_files.SCRATCH)
            atexit.register(atomic_files.remove, self._folder)
        self._count += 1
        return self._folder / str(self._count)


_STORE = _Store()


def tensor(value: Array, name: str, away: bool) -> TensorProto:
    """A new weight; a large one goes to a file of its own in the folder for temporary files where ``away``."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    if not away or value.nbytes < LEAST or kind not in WHOLE_BYTES:
        return numpy_helper.from_array(value, name)
    path = _STORE.path()
    result = TensorProto(name=name, dims=value.shape, data_type=kind)
    with path.open("wb") as stream:
        refer(result, path, *_append(stream, value))
    return result


def references(proto: ModelProto) -> list[TensorProto]:
    """Initialisers whose payload is in a file."""
    return [t for t in proto.graph.initializer if is_reference(t)]


def size(proto: ModelProto) -> int:
    """Bytes of a model with all its weights."""
    return int(proto.ByteSize()) + sum(size_of(t) for t in references(proto))


# ------------------------------------------------------------------------------------------------------- reading


def parse(path: Path) -> ModelProto:
    """The model in a file; in a large one, large weights become references to their place in it.

    Raises DecodeError where the file is no model.
    """
    proto = ModelProto()
    if path.stat().st_size < MAPPED:
        proto.ParseFromString(path.read_bytes())
        return proto
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            graph, places = _without_weights(data)
        except (IndexError, ValueError) as error:
            raise DecodeError("a field ends behind the end of the file") from error
    proto.ParseFromString(graph)
    for i, (start, end) in places.items():
        refer(proto.graph.initializer[i], path.resolve(), start, end - start)
    return proto


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(number, wire type, start of the field, start of its content, end) of the fields of one message."""
    at = start
    while at < end:
        key, content = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == BYTES:
            length, content = _varint(data, content)
            stop = content + length
        elif kind in (1, 5):
            stop = content + (8 if kind == 1 else 4)
        elif kind == 0:
            stop = _varint(data, content)[1]
        else:
            raise ValueError
        if stop > end:
            raise ValueError
        yield number, kind, at, content, stop
        at = stop


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError


def _message(number: int, content: bytes) -> bytes:
    length, key = len(content), number << 3 | BYTES
    coded = bytearray([key])
    while length > 127:
        coded.append(length & 127 | 128)
        length >>= 7
    return bytes(coded) + bytes([length]) + content


def _without_weights(data: mmap.mmap) -> tuple[bytes, dict[int, tuple[int, int]]]:
    """The file without the bytes of large initialisers, and where those are, by the initialiser's number."""
    places: dict[int, tuple[int, int]] = {}
    count = 0
    model: list[bytes] = []
    for number, kind, at, content, end in _fields(data, 0, len(data)):
        if (number, kind) != (GRAPH, BYTES):
            model.append(data[at:end])
            continue
        graph: list[bytes] = []
        for field, wire, start, inside, stop in _fields(data, content, end):
            if (field, wire) != (INITIALIZER, BYTES):
                graph.append(data[start:stop])
                continue
            parts = list(_fields(data, inside, stop)) if stop - inside >= LEAST else []
            raw = [p for p in parts if p[:2] == (RAW, BYTES) and p[4] - p[3] >= LEAST]
            if len(raw) == 1 and _whole(data, parts):
                places[count] = raw[0][3:]
                rest = b"".join(data[p[2] : p[4]] for p in parts if p is not raw[0])
                graph.append(_message(INITIALIZER, rest))
            else:
                graph.append(data[start:stop])
            count += 1
        model.append(_message(GRAPH, b"".join(graph)))
    return b"".join(model), places


def _whole(data: mmap.mmap, parts: list[tuple[int, int, int, int, int]]) -> bool:
    """Whether a tensor, given by its fields, is of a type with whole bytes."""
    kinds = [
        _varint(data, content)[0]
        for number, wire, _, content, _ in parts
        if (number, wire) == (2, 0)
    ]
    return bool(kinds) and kinds[-1] in WHOLE_BYTES


# ------------------------------------------------------------------------------------------------------- running


def detached(proto: ModelProto) -> tuple[ModelProto, dict[str, Array]]:
    """(a graph that can be serialised, values by name of the initialisers that it names and no file holds)."""
    values: dict[str, Array] = {}
    if proto.ByteSize() < LARGE:
        return proto, values
    small = ModelProto()
    for field, value in proto.ListFields():
        if field.name != "graph":
            _set(small, field.name, value)
    for field, value in proto.graph.ListFields():
        if field.name != "initializer":
            _set(small.graph, field.name, value)
    for tensor in proto.graph.initializer:
        if is_reference(tensor) or tensor.ByteSize() < LEAST or tensor.data_type not in WHOLE_BYTES:
            small.graph.initializer.append(tensor)
        else:
            values[tensor.name] = numpy_helper.to_array(tensor)
            named = small.graph.initializer.add(
                name=tensor.name, dims=tensor.dims, data_type=tensor.data_type
            )
            refer(named, MEMORY, 0, size_of(tensor))
    return small, values


def under_root(proto: ModelProto) -> ModelProto:
    """A copy whose references start at ``ROOT``: the runtime takes no absolute paths."""
    result = ModelProto()
    result.CopyFrom(proto)
    for tensor in references(result):
        path, offset, length = place(tensor)
        if path != MEMORY:
            refer(
                tensor, Path(path).relative_to(ROOT).as_posix(), offset, length or size_of(tensor)
            )
    return result


def aligned(value: Array) -> Array:
    """The array itself where it starts as its type wants it to, else a copy."""
    return np.require(value, requirements=["C", "A"])


def _set(message: object, name: str, value: object) -> None:
    if isinstance(value, (int, str, bytes)):
        setattr(message, name, value)
    else:
        getattr(message, name).MergeFrom(value)


def checkable(proto: ModelProto) -> ModelProto:
    """The model as the checker takes it: weights in files, and those too large to hand over, become inputs."""
    if not references(proto) and proto.ByteSize() < LARGE:
        return proto
    small, _ = detached(proto)
    result = ModelProto()
    result.CopyFrom(small)
    del result.graph.initializer[:]
    given = {value.name for value in small.graph.input}
    for tensor in small.graph.initializer:
        if is_reference(tensor) and tensor.name not in given:
            port = onnx.helper.make_tensor_value_info(
                tensor.name, tensor.data_type, list(tensor.dims)
            )
            result.graph.input.append(port)
        elif not is_reference(tensor):
            result.graph.initializer.append(tensor)
    return result


# ------------------------------------------------------------------------------------------------------- writing


def save(proto: ModelProto, path: Path, side: str) -> list[str]:
    """Write a model, weights beside it in ``side`` where it refers to files or is too large for one. Names written.

    One weight after the other passes through memory, at most ``CHUNK`` bytes of those in files.
    """
    if not references(proto) and proto.ByteSize() < LARGE:
        path.write_bytes(proto.SerializeToString(deterministic=True))
        return [path.name]
    small, values = detached(proto)
    result = ModelProto()
    result.CopyFrom(small)
    with (path.parent / side).open("wb") as stream:
        for tensor in references(result):
            value = values[tensor.name] if tensor.name in values else array(tensor)
            refer(tensor, side, *_append(stream, value))
    path.write_bytes(result.SerializeToString(deterministic=True))
    return [path.name, side]


def _append(stream: BinaryIO, value: Array) -> tuple[int, int]:
    """(offset, length) of an array written behind what is there."""
    start = -(-stream.tell() // ALIGN) * ALIGN
    stream.seek(start)
    flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    stream.writelines(flat[first : first + CHUNK].data for first in range(0, len(flat), CHUNK))
    return start, len(flat)
