"""Size of a model as it is shipped: deflated, as in a zip archive."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from onnx_oamip.graph import external_data
from onnx_oamip.graph.loading import external_paths

LEVEL = 6
"""Effort of the compression, the default of zip programs."""


def zipped_file(path: str | os.PathLike[str]) -> int:
    """Bytes of a model file and of the weights beside it, deflated.

    Args:
        path: Model file.

    Returns:
        Sum over the files, without the directory of an archive.
    """
    return sum(_deflated(_content(file)) for file in (Path(path), *external_paths(path)))


def zipped_model(proto: onnx.ModelProto) -> int:
    """Bytes of a model in memory and of the payloads that it refers to, deflated.

    Args:
        proto: The model.

    Returns:
        About the size that ``zipped_file`` finds once the model is written.
    """
    payloads = (
        external_data.array(tensor).reshape(-1).view("u1").data
        for tensor in external_data.references(proto)
    )
    return _deflated([proto.SerializeToString(deterministic=True)]) + _deflated(payloads)


def _content(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(external_data.CHUNK_BYTES):
            yield chunk


def _deflated(chunks: Iterable[bytes | memoryview]) -> int:
    """Length of the deflated content; 0 for none."""
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    size = 0
    is_empty = True
    for chunk in chunks:
        is_empty = False
        size += len(packer.compress(chunk))
    if is_empty:
        return 0
    return size + len(packer.flush())
