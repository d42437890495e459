"""The JSON documents of ``pack`` and ``unpack``, with the sizes of usual ways to store the same model."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from typing import Any

import numpy as np

from onnx_oamip.core.versions import versions
from onnx_oamip.published.packing.coding import Coded
from onnx_oamip.published.packing.layout import Files, Place, type_name
from onnx_oamip.published.packing.packing import Packed, Unpacked
from onnx_oamip.reporting.documents import SCHEMA_VERSION, Document

SINGLE = 4
"""Bytes of a float32: psi is the packed bytes over the bytes of as many float32."""


def packing(packed: Packed, rivals: bool = False) -> Document:
    """Make the JSON document of ``pack``.

    Args:
        packed: The packed model.
        rivals: Add the sizes under zip, in half precision, and both.

    Returns:
        The document.
    """
    before = packed.original
    contents = packed.contents
    tensors = zip(before.places, contents.codes, strict=True)
    verification = packed.verification
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {"path": packed.path, "sha256": before.sha256},
        "output": {"path": packed.output, "sha256": packed.sha256},
        "unpacked": {"sha256": contents.files.sha256, "lossless": contents.lossless},
        "before": {"bytes": before.nbytes},
        "after": {"bytes": packed.nbytes},
        "ratio": packed.nbytes / before.nbytes,
        "tensors": [_tensor(place, code, before if rivals else None) for place, code in tensors],
        "rivals": _rivals(before) if rivals else None,
        "verification": None if verification is None else {**asdict(verification)},
        "timings": dict(packed.seconds),
        "settings": dict(contents.settings),
        "versions": versions(),
    }


def unpacking(unpacked: Unpacked) -> Document:
    """Make the JSON document of ``unpack``.

    Args:
        unpacked: The unpacked model.

    Returns:
        The document.
    """
    contents = unpacked.contents
    files = contents.files
    return {
        "schema_version": SCHEMA_VERSION,
        "packed": {
            "path": unpacked.path,
            "sha256": unpacked.packed_sha256,
            "bytes": unpacked.packed_bytes,
        },
        "output": {"path": unpacked.output, "sha256": files.sha256, "bytes": files.nbytes},
        "beside": [name for name in files.contents if name],
        "lossless": contents.lossless,
        "original_sha256": contents.original_sha256,
        "tool_version": contents.tool_version,
        "versions": versions(),
    }


def _tensor(place: Place, code: Coded, files: Files | None) -> Document:
    entries = prod(place.shape)
    return {
        "name": place.name,
        "type": type_name(place.type).lower(),
        "shape": list(place.shape),
        "method": code.method,
        "clusters": code.clusters,
        "before": place.nbytes,
        "after": len(code.blob),
        "psi": len(code.blob) / (SINGLE * entries),
        **({} if files is None else {"rivals": _sizes(files, place)}),
    }


def _sizes(files: Files, place: Place) -> Mapping[str, int]:
    """Bytes of one tensor zipped, in half precision, and both."""
    half = _half(files, place)
    return {
        "zip": len(zlib.compress(files.words(place).tobytes(), 9)),
        "fp16": len(half),
        "fp16_zip": len(zlib.compress(half, 9)),
    }


def _rivals(files: Files) -> Mapping[str, int]:
    """Bytes of the files zipped, with float32 tensors in half precision, and both."""
    halves: dict[str, bytes] = {}
    for number, (name, content) in enumerate(files.contents.items()):
        parts: list[bytes] = []
        at = 0
        for place in files.places:
            if place.file != number:
                continue
            parts += [content[at : place.offset], _half(files, place)]
            at = place.offset + place.nbytes
        halves[name] = b"".join([*parts, content[at:]])
    return {
        "zip": _zipped(files.contents),
        "fp16": sum(map(len, halves.values())),
        "fp16_zip": _zipped(halves),
    }


def _zipped(contents: Mapping[str, Any]) -> int:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in contents.items():
            archive.writestr(name or "model.onnx", content)
    return stream.tell()


def _half(files: Files, place: Place) -> bytes:
    """The bytes of a tensor, those of float32 in half precision."""
    words = files.words(place)
    if type_name(place.type) != "FLOAT":
        return words.tobytes()
    with np.errstate(over="ignore"):
        return words.view(np.float32).astype(np.float16).tobytes()
