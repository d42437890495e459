"""What tasks share, as it travels to another process: packed once here, opened once there."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Mapping
from dataclasses import fields
from io import BytesIO
from typing import Any

from onnx_oamip.core.errors import ModelError
from onnx_oamip.core.records import Model
from onnx_oamip.graph import external_data

Stamp = tuple[int, int]
"""Bytes of a file, and when it was changed last (ns)."""


class Parcel:
    """A value as bytes. A process that receives it opens it at its first use, and every task there gets the same."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self._lock = threading.Lock()
        self._opened: list[Any] = []

    def __reduce__(self) -> tuple[type[Parcel], tuple[bytes]]:
        return Parcel, (self.content,)

    def __sizeof__(self) -> int:
        return len(self.content)

    def open(self) -> Any:
        """The value. Raises ModelError where the model's weights are in a file that is not the same here."""
        with self._lock:
            if not self._opened:
                self._opened.append(pickle.loads(self.content))
            return self._opened[0]


def pack(value: Any) -> bytes:
    """A value as bytes; constants of a model travel once, those in files as a reference to their place.

    Raises ModelError for a model that is too large.
    """
    stream = BytesIO()
    _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """Constants of a model are what its graph holds already."""
        if not isinstance(value, Model):
            return NotImplemented
        if value.proto.ByteSize() >= external_data.PROTOBUF_LIMIT:
            raise ModelError(
                f"{value.path} holds {value.proto.ByteSize() / 1e9:.1f} GB of weights in a form that cannot be sent to "
                "a cluster; leave out `scheduler`."
            )
        files = {external_data.location(t)[0] for t in external_data.references(value.proto)}
        parts = {f.name: getattr(value, f.name) for f in fields(value) if f.name != "constants"}
        return _model, (parts, {path: _stamp(path) for path in sorted(files)})


def _model(parts: Mapping[str, Any], files: Mapping[str, Stamp]) -> Model:
    for path, stamp in files.items():
        if _stamp(path) != stamp:
            raise ModelError(
                f"a worker of the cluster does not see the file {path} as it is here, and large weights stay in their "
                "file; put it (or with TMPDIR what is made anew) on storage that all share, or leave out `scheduler`."
            )
    return Model(
        **parts,
        constants={t.name: external_data.array(t) for t in parts["proto"].graph.initializer},
    )


def _stamp(path: str) -> Stamp | None:
    try:
        about = os.stat(path)
    except OSError:
        return None
    return about.st_size, about.st_mtime_ns
