"""Byte ranges of the tensors in the files of a model, found in the encoding of the files.

The bytes between the ranges (the graph, names, small tensors) are kept, so that a file is restored exactly, whatever
program wrote it. Fields are numbered as in ``onnx.proto``; the encoding is that of Protocol Buffers.
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
"""Bytes from which a tensor is coded on its own; smaller ones are packed with the graph, as a whole."""
_MESSAGES = {
    "GraphProto",
    "NodeProto",
    "AttributeProto",
    "FunctionProto",
    "SparseTensorProto",
    "TrainingInfoProto",
}
"""Messages that may contain tensors."""
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5
"""Wire types of Protocol Buffers."""
_DIMS, _TYPE, _FLOATS, _NAME, _RAW, _DOUBLES, _EXTERNAL = 1, 2, 4, 8, 9, 10, 13
"""Fields of ``TensorProto``."""
_NIBBLES = {"UINT4", "INT4", "FLOAT4E2M1"}
"""Types with two items per byte."""


@dataclass(frozen=True)
class Place:
    """The bytes of a tensor.

    Attributes:
        name: Name of the tensor.
        type: Number of its type, as in ``TensorProto``.
        shape: Its shape.
        file: Number of the file.
        offset: First byte in the file.
        nbytes: Number of bytes.
    """

    name: str
    type: int
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int

    @property
    def form(self) -> Form:
        """Properties that a coder needs."""
        dtype = word_type(self.type)
        kind = type_name(self.type)
        floating = "FLOAT" in kind or kind == "DOUBLE"
        one_word_per_item = dtype.itemsize * prod(self.shape) == self.nbytes
        if len(self.shape) > 1 and one_word_per_item:
            rows = self.shape[0]
        else:
            rows = 0
        return Form(dtype, self.nbytes // dtype.itemsize, rows, floating)


@dataclass(frozen=True)
class Files:
    """The files of a model.

    Attributes:
        contents: Bytes by name; the model file has an empty name and is the first.
        places: Tensors in them that are coded on their own.
        sha256: Digest of all files.
    """

    contents: Mapping[str, bytes]
    places: tuple[Place, ...]
    sha256: str

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(map(len, self.contents.values()))

    def words(self, place: Place) -> Array:
        """Read the bits of a tensor.

        Args:
            place: The tensor.

        Returns:
            Unsigned numbers (n,).
        """
        content = list(self.contents.values())[place.file]
        form = place.form
        return np.frombuffer(content, form.dtype.newbyteorder("<"), form.count, place.offset)

    def substitute(self, words: Mapping[Place, Array]) -> Files:
        """Replace the bits of some tensors.

        Args:
            words: New words by tensor.

        Returns:
            The new files.
        """
        contents = [bytearray(content) for content in self.contents.values()]
        for place, new in words.items():
            little = np.ascontiguousarray(new, new.dtype.newbyteorder("<")).tobytes()
            assert len(little) == place.nbytes
            contents[place.file][place.offset : place.offset + place.nbytes] = little
        named = dict(zip(self.contents, map(bytes, contents), strict=True))
        return replace(self, contents=named, sha256=digest(named))

    def write(self, folder: Path, name: str) -> Path:
        """Write the files into an empty folder.

        Args:
            folder: The folder.
            name: Name of the model file.

        Returns:
            Path of the model file.
        """
        for side, content in self.contents.items():
            target = folder / (side or name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return folder / name


def read(path: str | os.PathLike[str]) -> Files:
    """Read the files of a model and find the tensors in them.

    Args:
        path: Model file.

    Returns:
        The files.

    Raises:
        ModelError: The file is no ONNX model, or its external data cannot be read.
    """
    file = Path(path)
    models.read(file)
    contents = {"": file.read_bytes()}
    try:
        tensors = list(_tensors(memoryview(contents[""]), onnx.ModelProto.DESCRIPTOR))
    except (IndexError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{file} is not an ONNX model or is truncated; export it again."
        ) from error
    places: list[Place] = []
    for tensor in tensors:
        place = tensor.place
        if tensor.external is not None:
            place = _external(tensor, tensor.external, file, contents)
        if place is not None and place.nbytes >= LEAST and _has_expected_size(place):
            places.append(place)
    return Files(contents, _apart(places), digest(contents))


def digest(contents: Mapping[str, bytes]) -> str:
    """Compute the sha256 of the files of a model, as reports of a model give it.

    Args:
        contents: Bytes by name.

    Returns:
        The digest.
    """
    result = hashlib.sha256()
    for name in sorted(contents):
        result.update(contents[name])
    return result.hexdigest()


def inside(name: str) -> bool:
    """Test whether the name of a file beside a model stays in the model's folder on every system.

    Args:
        name: The name.

    Returns:
        True for a relative path without backslashes, colons, NUL and parent folders.
    """
    path = PurePosixPath(name)
    if not name or path.is_absolute():
        return False
    leads_out = bool({"..", ""} & {*path.parts})
    has_special = bool({*name} & {*"\\:\0"})
    return not leads_out and not has_special


def type_name(code: int) -> str:
    """Name a tensor type.

    Args:
        code: Number of the type, as in ``TensorProto``.

    Returns:
        Its name, such as ``FLOAT16``; empty for an unknown number.
    """
    if code in TensorProto.DataType.values():
        return str(TensorProto.DataType.Name(code))
    return ""


def word_type(code: int) -> np.dtype[np.generic]:
    """Find the unsigned type that holds one item of a tensor.

    Args:
        code: Number of the tensor's type.

    Returns:
        The type. It holds half of a complex item, and two packed nibbles.
    """
    if type_name(code) in _NIBBLES:
        return np.dtype(np.uint8)
    size = onnx.helper.tensor_dtype_to_np_dtype(code).itemsize
    return np.dtype(f"u{min(size, 8)}")


def _has_expected_size(place: Place) -> bool:
    """True if a tensor of numbers has as many bytes as its shape requires."""
    kind = type_name(place.type)
    items = prod(place.shape)
    if kind in ("", "UNDEFINED", "STRING"):
        return False
    if kind in _NIBBLES:
        return place.nbytes == -(-items // 2)
    itemsize: int = onnx.helper.tensor_dtype_to_np_dtype(place.type).itemsize
    return place.nbytes == items * itemsize


def _apart(places: Sequence[Place]) -> tuple[Place, ...]:
    """Places in the order of their bytes; of places that share bytes, the first."""
    result: list[Place] = []
    for place in sorted(places, key=lambda p: (p.file, p.offset)):
        last = result[-1] if result else None
        if last is None or last.file != place.file or last.offset + last.nbytes <= place.offset:
            result.append(place)
    return tuple(result)


# ------------------------------------------------------------------------------------------------- the file's encoding


@dataclass(frozen=True)
class _Tensor:
    """A tensor in the encoding of a model.

    Attributes:
        place: Its bytes in the model file; None if there are none, or several fields with some.
        external: Its reference to another file.
        name: Its name.
        type: Number of its type.
        shape: Its shape.
    """

    place: Place | None
    external: Mapping[str, str] | None
    name: str
    type: int
    shape: tuple[int, ...]


def _tensors(
    data: memoryview,
    kind: Any,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[_Tensor]:
    """Every tensor of a message, those in attributes and subgraphs included."""
    end_of_message = len(data) if stop is None else stop
    for number, wire, begin, end in _fields(data, start, end_of_message):
        field = kind.fields_by_number.get(number)
        if wire != _BYTES or field is None or field.message_type is None:
            continue
        if field.message_type.name == "TensorProto":
            yield _tensor(data, begin, end)
        elif field.message_type.name in _MESSAGES:
            yield from _tensors(data, field.message_type, begin, end)


def _tensor(data: memoryview, start: int, stop: int) -> _Tensor:
    shape: list[int] = []
    kind, name = 0, ""
    ranges: list[tuple[int, int]] = []
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
            ranges.append((begin, end - begin))
        elif number == _EXTERNAL:
            entry = onnx.StringStringEntryProto.FromString(bytes(data[begin:end]))
            external[entry.key] = entry.value
    place = None
    if len(ranges) == 1:
        ((offset, nbytes),) = ranges
        place = Place(name, kind, tuple(shape), 0, offset, nbytes)
    return _Tensor(place, external or None, name, kind, tuple(shape))


def _external(
    tensor: _Tensor,
    reference: Mapping[str, str],
    file: Path,
    contents: dict[str, bytes],
) -> Place | None:
    """Place of a tensor in a file beside the model, which is read at the first reference to it."""
    name = reference.get("location", "")
    if not inside(name):
        raise ModelError(
            f"{file} keeps weights in '{name}', outside its own folder; move them beside it."
        )
    try:
        if name not in contents:
            contents[name] = (file.parent / name).read_bytes()
        offset = int(reference.get("offset") or 0)
        nbytes = int(reference.get("length") or len(contents[name]) - offset)
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
    number = list(contents).index(name)
    return Place(tensor.name, tensor.type, tensor.shape, number, offset, nbytes)


def _fields(
    data: memoryview,
    start: int,
    stop: int,
) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type, first byte, and the byte behind the last, of every field of a message."""
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
    """A number, and the position behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
