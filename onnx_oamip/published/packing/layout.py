"""Where the numbers of a model lie in its files: byte ranges, found by walking the file's own encoding.

What is between the ranges (the graph, names, small tensors) is kept byte for byte, so that a file comes back as it was
whatever wrote it. Fields are numbered as in ``onnx.proto``; the encoding is that of Protocol Buffers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from onnx_oamip.core.errors import ModelError
from onnx_oamip.core.records import Array
from onnx_oamip.graph import loading as models
from onnx_oamip.published.packing.coding import Form

LEAST = 256
"""Bytes from which a tensor is coded on its own; smaller ones stay with the graph, which is packed as a whole."""
_GRAPHS = {
    "GraphProto",
    "NodeProto",
    "AttributeProto",
    "FunctionProto",
    "SparseTensorProto",
    "TrainingInfoProto",
}
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5
_DIMS, _TYPE, _FLOATS, _NAME, _RAW, _DOUBLES, _EXTERNAL = 1, 2, 4, 8, 9, 10, 13
_NIBBLES = {"UINT4", "INT4", "FLOAT4E2M1"}


@dataclass(frozen=True)
class Place:
    """A tensor's bytes: ``nbytes`` of file number ``file`` from ``offset`` on; ``type`` as in ``TensorProto``."""

    name: str
    type: int
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int

    @property
    def form(self) -> Form:
        """How a coder sees it."""
        dtype = word_type(self.type)
        floating = "FLOAT" in type_name(self.type) or type_name(self.type) == "DOUBLE"
        rows = (
            self.shape[0]
            if len(self.shape) > 1 and dtype.itemsize * prod(self.shape) == self.nbytes
            else 0
        )
        return Form(dtype, self.nbytes // dtype.itemsize, rows, floating)


@dataclass(frozen=True)
class Files:
    """A model as it lies there: the model file and those beside it, by their names in it; ``sha256`` is of all."""

    contents: Mapping[str, bytes]
    places: tuple[Place, ...]
    sha256: str

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(map(len, self.contents.values()))

    def words(self, place: Place) -> Array:
        """A tensor's bits as unsigned numbers (n,)."""
        content = list(self.contents.values())[place.file]
        form = place.form
        return np.frombuffer(content, form.dtype.newbyteorder("<"), form.count, place.offset)

    def substitute(self, words: Mapping[Place, Array]) -> Files:
        """The same files with other bits in some of their tensors."""
        contents = [bytearray(c) for c in self.contents.values()]
        for place, new in words.items():
            little = np.ascontiguousarray(new, new.dtype.newbyteorder("<")).tobytes()
            assert len(little) == place.nbytes
            contents[place.file][place.offset : place.offset + place.nbytes] = little
        named = dict(zip(self.contents, map(bytes, contents), strict=True))
        return replace(self, contents=named, sha256=digest(named))

    def write(self, folder: Path, name: str) -> Path:
        """Put the files into a folder that nobody else uses; the path of the model file."""
        for side, content in self.contents.items():
            target = folder / (side or name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return folder / name


def read(path: str | os.PathLike[str]) -> Files:
    """A checked model's files. Raises ModelError with one sentence, as loading it does."""
    file = Path(path)
    models.read(file)
    contents = {"": file.read_bytes()}
    places: list[Place] = []
    try:
        found = list(_tensors(memoryview(contents[""]), onnx.ModelProto.DESCRIPTOR))
    except (IndexError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{file} is not an ONNX model or is truncated; export it again."
        ) from error
    for tensor in found:
        if tensor.external is None:
            place: Place | None = tensor.place
        else:
            place = _external(tensor, file, contents)
        if place is not None and place.nbytes >= LEAST and _sized(place):
            places.append(place)
    return Files(contents, _apart(places), digest(contents))


def digest(contents: Mapping[str, bytes]) -> str:
    """sha256 of the model file and those beside it, as reports of a model give it."""
    result = hashlib.sha256()
    for name in sorted(contents):
        result.update(contents[name])
    return result.hexdigest()


def inside(name: str) -> bool:
    """Whether a name of a file beside a model stays in the model's folder on every system."""
    path = PurePosixPath(name)
    return (
        bool(name)
        and not path.is_absolute()
        and not {"..", ""} & {*path.parts}
        and not {*name} & {*"\\:\0"}
    )


def type_name(code: int) -> str:
    """The name of a tensor type, such as ``FLOAT16``; empty for a number that stands for none."""
    return str(TensorProto.DataType.Name(code)) if code in TensorProto.DataType.values() else ""


def word_type(code: int) -> np.dtype[np.generic]:
    """The unsigned type that holds one item of a tensor, or half of a complex one; bytes of packed nibbles."""
    if type_name(code) in _NIBBLES:
        return np.dtype(np.uint8)
    size = onnx.helper.tensor_dtype_to_np_dtype(code).itemsize
    return np.dtype(f"u{min(size, 8)}")


def _sized(place: Place) -> bool:
    """Whether a tensor has as many bytes as its shape says, in a type of numbers."""
    if type_name(place.type) in ("", "UNDEFINED", "STRING"):
        return False
    if type_name(place.type) in _NIBBLES:
        return place.nbytes == -(-prod(place.shape) // 2)
    return (
        place.nbytes
        == prod(place.shape) * onnx.helper.tensor_dtype_to_np_dtype(place.type).itemsize
    )


def _apart(places: Sequence[Place]) -> tuple[Place, ...]:
    """In the order in which they lie; of tensors that share bytes the first."""
    result: list[Place] = []
    for place in sorted(places, key=lambda p: (p.file, p.offset)):
        last = result[-1] if result else None
        if last is None or last.file != place.file or last.offset + last.nbytes <= place.offset:
            result.append(place)
    return tuple(result)


# ------------------------------------------------------------------------------------------------- the file's encoding


@dataclass(frozen=True)
class _Tensor:
    place: Place | None
    external: Mapping[str, str] | None
    name: str
    type: int
    shape: tuple[int, ...]


def _tensors(
    data: memoryview, kind: Any, start: int = 0, stop: int | None = None
) -> Iterator[_Tensor]:
    """Every tensor of a message, in attributes and subgraphs as well."""
    for number, wire, begin, end in _fields(data, start, len(data) if stop is None else stop):
        field = kind.fields_by_number.get(number)
        if wire != _BYTES or field is None or field.message_type is None:
            continue
        if field.message_type.name == "TensorProto":
            yield _tensor(data, begin, end)
        elif field.message_type.name in _GRAPHS:
            yield from _tensors(data, field.message_type, begin, end)


def _tensor(data: memoryview, start: int, stop: int) -> _Tensor:
    shape: list[int] = []
    kind, name = 0, ""
    held: list[tuple[int, int]] = []
    external: dict[str, str] = {}
    for number, wire, begin, end in _fields(data, start, stop):
        if number == _DIMS and wire == _VARINT:
            shape.append(_varint(data, begin)[0])
        elif number == _DIMS and wire == _BYTES:
            while begin < end:
                value, begin = _varint(data, begin)
                shape.append(value)
        elif number == _TYPE:
            kind = _varint(data, begin)[0]
        elif number == _NAME:
            name = bytes(data[begin:end]).decode()
        elif number in (_RAW, _FLOATS, _DOUBLES) and wire == _BYTES:
            held.append((begin, end - begin))
        elif number == _EXTERNAL:
            entry = onnx.StringStringEntryProto.FromString(bytes(data[begin:end]))
            external[entry.key] = entry.value
    place = Place(name, kind, tuple(shape), 0, *held[0]) if len(held) == 1 else None
    return _Tensor(place, external or None, name, kind, tuple(shape))


def _external(tensor: _Tensor, file: Path, contents: dict[str, bytes]) -> Place | None:
    """Where a tensor lies in a file beside the model, which is read the first time that it is named."""
    assert tensor.external is not None
    name = tensor.external.get("location", "")
    if not inside(name):
        raise ModelError(
            f"{file} keeps weights in '{name}', outside its own folder; move them beside it."
        )
    try:
        if name not in contents:
            contents[name] = (file.parent / name).read_bytes()
        offset = int(tensor.external.get("offset") or 0)
        nbytes = int(tensor.external.get("length") or len(contents[name]) - offset)
    except OSError as error:
        raise ModelError(
            f"{file} keeps weights in '{name}', which cannot be read: {error.strerror}."
        ) from error
    except ValueError as error:
        raise ModelError(
            f"{file} gives no number for where '{tensor.name}' lies in '{name}'."
        ) from error
    if not 0 <= offset <= offset + nbytes <= len(contents[name]):
        return None
    return Place(tensor.name, tensor.type, tensor.shape, list(contents).index(name), offset, nbytes)


def _fields(data: memoryview, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, first byte, byte behind) of every field of a message."""
    at = start
    while at < stop:
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            end = _varint(data, at)[1]
        elif wire == _BYTES:
            length, at = _varint(data, at)
            end = at + length
        else:
            end = at + {_EIGHT: 8, _FOUR: 4}.get(wire, stop)
        if end > stop:
            raise IndexError("a field ends behind its message")
        yield key >> 3, wire, at, end
        at = end


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(number, byte behind it)."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
