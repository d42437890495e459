"""The file of a packed model: a preamble, a header in JSON, and blobs. Nothing in it is unpickled or executed.

=========  ==========================================================================================================
preamble   magic, schema version, bytes of the packed and of the plain header, bytes and sha256 of all behind the
           preamble, and the preamble's own CRC-32; little-endian, of fixed size
header     JSON, one section of ``entropy``: ``files`` (name, bytes, sha256, and the blob of the bytes between tensors),
           ``tensors`` (name, type, shape, file, offset, bytes, method, blob), ``original_sha256``, ``lossless``,
           ``tool_version``, ``settings``
blobs      one after another; every reference to one is its offset behind the header, its bytes and its CRC-32
=========  ==========================================================================================================

A reader checks sizes before it allocates memory: nothing decodes to more than ``entropy.RATIO`` times its bytes.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from onnx_oamip.core.errors import ModelError
from onnx_oamip.core.version import __version__
from onnx_oamip.published.packing import coding, entropy
from onnx_oamip.published.packing.coding import Coded
from onnx_oamip.published.packing.entropy import Damaged, Reader
from onnx_oamip.published.packing.layout import (
    Files,
    Place,
    digest,
    inside,
    type_name,
    word_type,
)

MAGIC = b"OAMIPACK"
SCHEMA_VERSION = 1
FREE = 1 << 26
"""Bytes that a packed file may decode to whatever its own size is."""
_PREAMBLE = struct.Struct("<8sIQQQ32s")
_CRC = struct.Struct("<I")


@dataclass(frozen=True)
class Contents:
    """The contents of a packed file.

    Attributes:
        files: Files of the model.
        codes: Coding of each of their tensors.
        original_sha256: Digest of the model before any weights were shared.
        lossless: The files are those of the original.
        settings: Settings of ``pack``.
        tool_version: Version that packed it.
    """

    files: Files
    codes: tuple[Coded, ...]
    original_sha256: str
    lossless: bool
    settings: Mapping[str, Any]
    tool_version: str = __version__


class _Blobs:
    """Blobs in the order of their references."""

    def __init__(self) -> None:
        self.blobs: list[bytes] = []
        self._size = 0

    def add(self, blob: bytes) -> list[int]:
        """Append a blob.

        Args:
            blob: The bytes.

        Returns:
            Its reference: offset, bytes and CRC-32.
        """
        offset = self._size
        self.blobs.append(blob)
        self._size += len(blob)
        return [offset, len(blob), zlib.crc32(blob)]


def write(contents: Contents) -> bytes:
    """Make a packed file; equal contents make equal bytes.

    Args:
        contents: Its contents.

    Returns:
        The bytes of the file.
    """
    blobs = _Blobs()
    files = contents.files
    file_entries = []
    for number, (name, content) in enumerate(files.contents.items()):
        between = b"".join(_between(content, number, files.places))
        entry = {
            "name": name,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "between": blobs.add(entropy.shrink(between)),
        }
        file_entries.append(entry)
    tensor_entries = []
    for place, code in zip(files.places, contents.codes, strict=True):
        reference = blobs.add(code.blob)
        entry = {"method": code.method, "clusters": code.clusters, "blob": reference}
        tensor_entries.append({**asdict(place), **entry})
    header = {
        "tool_version": contents.tool_version,
        "original_sha256": contents.original_sha256,
        "lossless": contents.lossless,
        "settings": dict(contents.settings),
        "files": file_entries,
        "tensors": tensor_entries,
    }
    plain = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    packed = entropy.shrink(plain)
    body = b"".join([packed, *blobs.blobs])
    sha256 = hashlib.sha256(body).digest()
    preamble = _PREAMBLE.pack(MAGIC, SCHEMA_VERSION, len(packed), len(plain), len(body), sha256)
    return preamble + _CRC.pack(zlib.crc32(preamble)) + body


def read(data: bytes, where: str) -> Contents:
    """Read a packed file and check every file in it.

    Args:
        data: The bytes of the file.
        where: Its name for messages.

    Returns:
        Its contents.

    Raises:
        ModelError: It is no packed file, or damaged; the sentence begins with ``where``.
    """
    try:
        return _read(memoryview(data))
    except Damaged as error:
        raise ModelError(
            f"{where} {error}; pack the model again, or copy the file again."
        ) from error
    except Exception as error:  # the header may hold anything
        raise ModelError(
            f"{where} has a header that makes no sense; pack the model again."
        ) from error


def _read(data: memoryview) -> Contents:
    start = _PREAMBLE.size + _CRC.size
    if bytes(data[: len(MAGIC)]) != MAGIC:
        raise Damaged(f"is not a packed model: it does not begin with {MAGIC.decode()}")
    if len(data) < start:
        raise Damaged(f"is cut off after {len(data)} bytes")
    preamble = data[: _PREAMBLE.size]
    _, version, packed, plain, size, sha256 = _PREAMBLE.unpack(preamble)
    if version != SCHEMA_VERSION:
        raise Damaged(f"has schema version {version} but this version reads {SCHEMA_VERSION}")
    (checksum,) = _CRC.unpack(data[_PREAMBLE.size : start])
    if checksum != zlib.crc32(preamble):
        raise Damaged("is damaged: its preamble has another checksum")
    body = data[start:]
    if len(body) != size:
        raise Damaged(f"holds {len(body)} bytes behind its preamble where {size} are expected")
    if hashlib.sha256(body).digest() != sha256:
        raise Damaged("is damaged: its contents have another sha256")
    try:
        reader = Reader(body)
        head = Reader(reader.take(packed))
        header = json.loads(head.section(plain))
        head.end()
        return _contents(header, body[packed:], len(data))
    except Damaged as error:
        raise Damaged(f"is damaged: {error}") from error


def _contents(
    header: Mapping[str, Any],
    blobs: memoryview,
    size: int,
) -> Contents:
    """Contents from a header whose fields may hold anything; ``size``: bytes of the packed file."""
    sizes = [_number(entry["bytes"]) for entry in header["files"]]
    if sum(sizes) > entropy.RATIO * size + FREE:
        raise Damaged(
            f"{size} bytes are said to stand for {sum(sizes)}, more than any packed model does"
        )
    places, codes = _tensors(header["tensors"], blobs, sizes)
    contents: dict[str, bytes] = {}
    for number, entry in enumerate(header["files"]):
        name = str(entry["name"])
        # The model itself has an empty name and is the first.
        valid = inside(name) if number else not name
        if name in contents or not valid:
            raise Damaged(f"a file beside the model is called {name!r}")
        own = [pair for pair in zip(places, codes, strict=True) if pair[0].file == number]
        between = _blob(entry["between"], blobs)
        contents[name] = _rebuild(sizes[number], own, between)
        if hashlib.sha256(contents[name]).hexdigest() != entry["sha256"]:
            shown = repr(name) if number else "the model"
            raise Damaged(f"{shown} comes out with another sha256")
    if not contents:
        raise Damaged("it holds no file")
    files = Files(contents, tuple(places), digest(contents))
    lossless = header["lossless"] is True
    original_sha256 = str(header["original_sha256"])
    if lossless and original_sha256 != files.sha256:
        raise Damaged("it is said to hold the original, and holds another model")
    return Contents(
        files=files,
        codes=tuple(codes),
        original_sha256=original_sha256,
        lossless=lossless,
        settings=dict(header["settings"]),
        tool_version=str(header["tool_version"]),
    )


def _tensors(
    entries: Sequence[Mapping[str, Any]],
    blobs: memoryview,
    sizes: Sequence[int],
) -> tuple[list[Place], list[Coded]]:
    """Tensors that lie one behind another in their files, and their codings."""
    places: list[Place] = []
    codes: list[Coded] = []
    for entry in entries:
        place = _place(entry, sizes)
        if places:
            last = places[-1]
            if (place.file, place.offset) < (last.file, last.offset + last.nbytes):
                raise Damaged(f"'{place.name}' shares bytes with '{last.name}'")
        places.append(place)
        blob = _blob(entry["blob"], blobs)
        if not entropy.within(place.nbytes, len(blob)):
            raise Damaged(
                f"'{place.name}' of {place.nbytes} bytes is said to be packed into {len(blob)}"
            )
        codes.append(Coded(str(entry["method"]), bytes(blob), entry["clusters"]))
    return places, codes


def _rebuild(
    size: int,
    tensors: Sequence[tuple[Place, Coded]],
    between: memoryview,
) -> bytes:
    """One file of ``size`` bytes from its tensors and the bytes between them."""
    reader = Reader(between)
    rest = memoryview(reader.section(size - sum(place.nbytes for place, _ in tensors)))
    reader.end()
    parts: list[bytes | memoryview] = []
    at = taken = 0
    for place, code in tensors:
        gap = place.offset - at
        parts.append(rest[taken : taken + gap])
        taken = taken + gap
        at = place.offset + place.nbytes
        words = coding.decode(code.method, memoryview(code.blob), place.form)
        parts.append(np.ascontiguousarray(words, words.dtype.newbyteorder("<")).tobytes())
    return b"".join([*parts, rest[taken:]])


def _between(
    content: bytes,
    file: int,
    places: Sequence[Place],
) -> Iterator[bytes]:
    """The bytes of a file between its tensors."""
    at = 0
    for place in places:
        if place.file == file:
            yield content[at : place.offset]
            at = place.offset + place.nbytes
    yield content[at:]


def _place(entry: Mapping[str, Any], sizes: Sequence[int]) -> Place:
    place = Place(
        name=str(entry["name"]),
        type=_number(entry["type"]),
        shape=tuple(_number(size) for size in entry["shape"]),
        file=_number(entry["file"]),
        offset=_number(entry["offset"]),
        nbytes=_number(entry["nbytes"]),
    )
    if place.file >= len(sizes) or place.offset + place.nbytes > sizes[place.file]:
        raise Damaged(f"'{place.name}' lies behind the end of its file")
    known = type_name(place.type) not in ("", "UNDEFINED", "STRING")
    if not known or place.nbytes % word_type(place.type).itemsize:
        raise Damaged(f"'{place.name}' has {place.nbytes} bytes of a type with number {place.type}")
    return place


def _blob(reference: Any, blobs: memoryview) -> memoryview:
    offset, size, checksum = (_number(value) for value in reference)
    blob = blobs[offset : offset + size]
    if len(blob) != size or zlib.crc32(blob) != checksum:
        raise Damaged(f"the blob at {offset} has another checksum or is not there")
    return blob


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise Damaged(f"{str(value)[:40]!r} is no size")
    return value
