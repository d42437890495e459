"""The shared value of tasks on its way to other processes: packed once here, unpacked once there."""

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

FileState = tuple[int, int]
"""Size of a file in bytes, and time of its last change in nanoseconds."""


class Parcel:
    """A packed value. A process unpacks it at its first use, and all tasks there share the result."""

    def __init__(self, content: bytes) -> None:
        """Wrap a packed value.

        Args:
            content: Result of :func:`pack`.
        """
        self.content = content
        self._lock = threading.Lock()
        self._opened: list[Any] = []

    def __reduce__(self) -> tuple[type[Parcel], tuple[bytes]]:
        return Parcel, (self.content,)

    def __sizeof__(self) -> int:
        return len(self.content)

    def open(self) -> Any:
        """Unpack the value.

        Returns:
            The value, the same object for every call.

        Raises:
            ModelError: Weights of a model are in a file that differs from the sender's.
        """
        with self._lock:
            if not self._opened:
                self._opened.append(pickle.loads(self.content))
            return self._opened[0]


def pack(value: Any) -> bytes:
    """Pack a value. Constants of a model are sent once, those in files as a reference to their location.

    Args:
        value: A value that may contain models.

    Returns:
        The packed value.

    Raises:
        ModelError: A model is too large to be sent.
    """
    stream = BytesIO()
    _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """Pickle a model without its constants; the receiver takes them from the graph, which holds them too."""
        if not isinstance(value, Model):
            return NotImplemented
        size = value.proto.ByteSize()
        if size >= external_data.PROTOBUF_LIMIT:
            raise ModelError(
                f"{value.path} holds {size / 1e9:.1f} GB of weights in a form that cannot be sent to "
                "a cluster; leave out `scheduler`."
            )
        tensors = external_data.references(value.proto)
        files = {external_data.location(tensor)[0] for tensor in tensors}
        states = {path: _state(path) for path in sorted(files)}
        attributes = {
            f.name: getattr(value, f.name) for f in fields(value) if f.name != "constants"
        }
        return _restore_model, (attributes, states)


def _restore_model(attributes: Mapping[str, Any], files: Mapping[str, FileState]) -> Model:
    """The model in the receiving process."""
    for path, state in files.items():
        if _state(path) != state:
            raise ModelError(
                f"a worker of the cluster does not see the file {path} as it is here, and large weights stay in their "
                "file; put it (or with TMPDIR what is made anew) on storage that all share, or leave out `scheduler`."
            )
    initializers = attributes["proto"].graph.initializer
    constants = {tensor.name: external_data.array(tensor) for tensor in initializers}
    return Model(**attributes, constants=constants)


def _state(path: str) -> FileState | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
