"""The file of a packed model: a preamble, a header in JSON, and blobs. Nothing in it is a pickle or is run.

=========  ==========================================================================================================
preamble   magic, schema version, bytes of the packed and of the plain header, bytes and sha256 of all behind the
           preamble, and the preamble's own CRC-32; little-endian, of fixed size
header     JSON, one section of ``entropy``: ``files`` (name, bytes, sha256, and the blob of what lies between tensors),
           ``tensors`` (name, type, shape, file, offset, bytes, method, blob), ``original_sha256``, ``lossless``,
           ``tool_version``, ``settings``
blobs      one after another; every reference to one is its offset behind the header, its bytes and its CRC-32
=========  ==========================================================================================================

A reader checks sizes before it makes room: nothing stands for more than ``entropy.RATIO`` times its bytes.
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
"""Bytes that a packed file may stand for whatever its own size is."""
_PREAMBLE = struct.Struct("<8sIQQQ32s")
_CRC = struct.Struct("<I")


@dataclass(frozen=True)
class Contents:
    """What a packed file holds: the files of a model as they were before and what was said about them."""

    files: Files
    codes: tuple[Coded, ...]
    original_sha256: str
    lossless: bool
    settings: Mapping[str, Any]
    tool_version: str = __version__


def write(contents: Contents) -> bytes:
    """The bytes of a packed file; the same for the same contents."""
    blobs: list[bytes] = []
    at = 0

    def put(blob: bytes) -> list[int]:
        nonlocal at
        blobs.append(blob)
        at += len(blob)
        return [at - len(blob), len(blob), zlib.crc32(blob)]

    files = contents.files
    header = {
        "tool_version": contents.tool_version,
        "original_sha256": contents.original_sha256,
        "lossless": contents.lossless,
        "settings": dict(contents.settings),
        "files": [
            {
                "name": name,
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "between": put(entropy.shrink(b"".join(_between(content, i, files.places)))),
            }
            for i, (name, content) in enumerate(files.contents.items())
        ],
        "tensors": [
            {
                **asdict(place),
                "method": code.method,
                "clusters": code.clusters,
                "blob": put(code.blob),
            }
            for place, code in zip(files.places, contents.codes, strict=True)
        ],
    }
    plain = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    packed = entropy.shrink(plain)
    body = b"".join([packed, *blobs])
    preamble = _PREAMBLE.pack(
        MAGIC, SCHEMA_VERSION, len(packed), len(plain), len(body), hashlib.sha256(body).digest()
    )
    return preamble + _CRC.pack(zlib.crc32(preamble)) + body


def read(data: bytes, where: str) -> Contents:
    """What a packed file holds, every file checked. Raises ModelError with one sentence that begins with ``where``."""
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
    _, version, packed, plain, size, sha256 = _PREAMBLE.unpack(data[: _PREAMBLE.size])
    if version != SCHEMA_VERSION:
        raise Damaged(f"has schema version {version} but this version reads {SCHEMA_VERSION}")
    if _CRC.unpack(data[_PREAMBLE.size : start])[0] != zlib.crc32(data[: _PREAMBLE.size]):
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


def _contents(header: Mapping[str, Any], blobs: memoryview, size: int) -> Contents:
    sizes = [_number(f["bytes"]) for f in header["files"]]
    if sum(sizes) > entropy.RATIO * size + FREE:
        raise Damaged(
            f"{size} bytes are said to stand for {sum(sizes)}, more than any packed model does"
        )
    places: list[Place] = []
    codes: list[Coded] = []
    for entry in header["tensors"]:
        place = _place(entry, sizes)
        if places and (place.file, place.offset) < (
            places[-1].file,
            places[-1].offset + places[-1].nbytes,
        ):
            raise Damaged(f"'{place.name}' shares bytes with '{places[-1].name}'")
        places.append(place)
        blob = _blob(entry["blob"], blobs)
        if not entropy.within(place.nbytes, len(blob)):
            raise Damaged(
                f"'{place.name}' of {place.nbytes} bytes is said to be packed into {len(blob)}"
            )
        codes.append(Coded(str(entry["method"]), bytes(blob), entry["clusters"]))
    named: dict[str, bytes] = {}
    for i, file in enumerate(header["files"]):
        name = str(file["name"])
        if name in named or (not inside(name) if i else name):
            raise Damaged(f"a file beside the model is called {name!r}")
        named[name] = _rebuild(sizes[i], i, places, codes, _blob(file["between"], blobs))
        if hashlib.sha256(named[name]).hexdigest() != file["sha256"]:
            raise Damaged(f"{'the model' if not i else repr(name)} comes out with another sha256")
    if not named:
        raise Damaged("it holds no file")
    files = Files(named, tuple(places), digest(named))
    lossless = header["lossless"] is True
    sha256 = str(header["original_sha256"])
    if lossless and sha256 != files.sha256:
        raise Damaged("it is said to hold the original, and holds another model")
    return Contents(
        files, tuple(codes), sha256, lossless, dict(header["settings"]), str(header["tool_version"])
    )


def _rebuild(
    size: int, file: int, places: Sequence[Place], codes: Sequence[Coded], between: memoryview
) -> bytes:
    """One file from what lies between its tensors and from the tensors."""
    held = [(p, c) for p, c in zip(places, codes, strict=True) if p.file == file]
    reader = Reader(between)
    rest = memoryview(reader.section(size - sum(p.nbytes for p, _ in held)))
    reader.end()
    parts: list[bytes | memoryview] = []
    at = taken = 0
    for place, code in held:
        gap = place.offset - at
        parts.append(rest[taken : taken + gap])
        taken, at = taken + gap, place.offset + place.nbytes
        words = coding.decode(code.method, memoryview(code.blob), place.form)
        parts.append(np.ascontiguousarray(words, words.dtype.newbyteorder("<")).tobytes())
    return b"".join([*parts, rest[taken:]])


def _between(content: bytes, file: int, places: Sequence[Place]) -> Iterator[bytes]:
    at = 0
    for place in places:
        if place.file == file:
            yield content[at : place.offset]
            at = place.offset + place.nbytes
    yield content[at:]


def _place(entry: Mapping[str, Any], sizes: Sequence[int]) -> Place:
    file, offset, nbytes, kind = (_number(entry[k]) for k in ("file", "offset", "nbytes", "type"))
    shape = tuple(_number(d) for d in entry["shape"])
    place = Place(str(entry["name"]), kind, shape, file, offset, nbytes)
    if file >= len(sizes) or offset + nbytes > sizes[file]:
        raise Damaged(f"'{place.name}' lies behind the end of its file")
    if type_name(kind) in ("", "UNDEFINED", "STRING") or nbytes % word_type(kind).itemsize:
        raise Damaged(f"'{place.name}' has {nbytes} bytes of a type with number {kind}")
    return place


def _blob(reference: Any, blobs: memoryview) -> memoryview:
    offset, size, crc = (_number(n) for n in reference)
    blob = blobs[offset : offset + size]
    if len(blob) != size or zlib.crc32(blob) != crc:
        raise Damaged(f"the blob at {offset} has another checksum or is not there")
    return blob


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise Damaged(f"{str(value)[:40]!r} is no size")
    return value
