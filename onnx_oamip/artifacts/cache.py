"""Cache of statistics, scores, losses and refits: pruning again at another budget starts from them.

An entry is named by a digest of everything it depends on: the model file, the data, the settings that matter, the
device, and the code itself. So no entry ever has to be invalidated; the least recently used ones are deleted when the
folder exceeds its limit. Entries hold plain arrays and are written completely or not at all; an entry that cannot be
read counts as missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache as once
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
from platformdirs import user_cache_path

from onnx_oamip.artifacts.cache_entries import Kind
from onnx_oamip.core.atomic_files import write_bytes
from onnx_oamip.core.errors import OutputError
from onnx_oamip.core.records import (
    Array,
    Model,
)
from onnx_oamip.core.versions import sources
from onnx_oamip.data import numpy_files, unequal
from onnx_oamip.data.dataset import Samples

T = TypeVar("T")
ENVIRONMENT_VARIABLE = "ONNX_OAMIP_CACHE"
"""Holds the folder, or ``off``. The option and the configuration file override it."""
MAX_TOTAL_BYTES = 2 << 30
"""Size of all entries together."""
MAX_ENTRY_BYTES = MAX_TOTAL_BYTES // 2
"""Size of one entry; larger ones are not stored."""
PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "scipy")
"""Packages whose version decides a result."""


@dataclass
class Store:
    """A folder of entries.

    Attributes:
        folder: The folder, None to store nothing.
        hits: Kinds of the entries that were found.
        problem: Reason why an entry could not be stored, empty if there is none.
    """

    folder: Path | None = None
    hits: list[str] = field(default_factory=list)
    problem: str = ""

    def notes(self) -> tuple[str, ...]:
        """Report the use of the cache.

        Returns:
            Notes on the entries that were found, and on entries that could not be stored.
        """
        notes = []
        if self.hits:
            kinds = ", ".join(dict.fromkeys(self.hits))
            notes.append(
                f"from the cache, as an earlier run on the same model and data found them: {kinds}"
            )
        if self.problem:
            notes.append(self.problem)
        return tuple(notes)

    def recall(
        self,
        kind: Kind[T],
        depends: Mapping[str, Any],
        make: Callable[[], T],
        is_valid: Callable[[T], bool] = lambda _: True,
        is_stored: Callable[[T], bool] = lambda _: True,
    ) -> T:
        """Return an entry, or compute and store it.

        Args:
            kind: Kind of entry.
            depends: Plain values that decide the result, besides the code and the machine.
            make: Computes the result.
            is_valid: Checks an entry before it is used: anyone may write anything to the folder.
            is_stored: Decides if a computed result is stored.

        Returns:
            The stored result if there is a valid one, else the computed one.
        """
        value = self.find(kind, depends, is_valid)
        if value is not None:
            return value
        value = make()
        if is_stored(value):
            self.keep(kind, depends, value)
        return value

    def find(
        self,
        kind: Kind[T],
        depends: Mapping[str, Any],
        is_valid: Callable[[T], bool] = lambda _: True,
    ) -> T | None:
        """Return an entry.

        Args:
            kind: Kind of entry.
            depends: As for :meth:`recall`.
            is_valid: As for :meth:`recall`.

        Returns:
            The stored result; None if there is no valid one.
        """
        path = self._path(kind, depends)
        value = None if path is None else _load(kind, path, is_valid)
        if path is not None and value is not None:
            # Mark the entry as recently used.
            with contextlib.suppress(OSError):
                os.utime(path)
            self.hits.append(kind.name.replace("-", " "))
        return value

    def keep(self, kind: Kind[T], depends: Mapping[str, Any], value: T) -> None:
        """Store an entry in place of an earlier one.

        Args:
            kind: Kind of entry.
            depends: As for :meth:`recall`.
            value: The result.
        """
        path = self._path(kind, depends)
        packed = None if path is None else kind.pack(value)
        if path is not None and packed is not None:
            self._write(path, packed)

    def remove(self, kind: Kind[T], depends: Mapping[str, Any]) -> None:
        """Delete an entry, if there is one.

        Args:
            kind: Kind of entry.
            depends: As for :meth:`recall`.
        """
        path = self._path(kind, depends)
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _path(self, kind: Kind[T], depends: Mapping[str, Any]) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"{kind.name}-{fingerprint(depends)}.npz"

    def _write(self, path: Path, arrays: Mapping[str, Array]) -> None:
        if sum(array.nbytes for array in arrays.values()) > MAX_ENTRY_BYTES:
            return
        stream = BytesIO()
        np.savez(stream, **dict(arrays))  # type: ignore[arg-type]
        # A folder that is deleted or a disk that is full costs the next run time, but not this one its result.
        try:
            write_bytes(stream.getvalue(), path)
            self._evict()
        except OutputError as error:
            self.problem = (
                f"not all of what was learnt is kept for the next run: {str(error).rstrip('.')}"
            )

    def _evict(self) -> None:
        """Delete the least recently used entries above the limit."""
        assert self.folder is not None
        with contextlib.suppress(OSError):
            entries = [(path.stat(), path) for path in self.folder.glob("*.npz")]
            entries.sort(key=lambda entry: -entry[0].st_mtime)
            total = 0
            for status, path in entries:
                total += status.st_size
                if total > MAX_TOTAL_BYTES:
                    path.unlink(missing_ok=True)


def open_store(where: str) -> Store:
    """Open the cache.

    Args:
        where: A folder, ``auto`` (that of the environment variable, or the user's own), or ``off``.

    Returns:
        The store. If the user's own folder cannot be written to, it stores nothing and notes that.

    Raises:
        OutputError: The requested folder cannot be written to.
    """
    requested = where
    if where == "auto":
        requested = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if requested == "off":
        return Store()
    if requested == "auto":
        folder = user_cache_path("onnx-oamip")
    else:
        folder = Path(requested)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if writable:
        return Store(folder)
    if requested == "auto":
        problem = (
            f"nothing is kept for the next run: {folder}, the cache, cannot be made or written to"
        )
        return Store(problem=problem)
    raise OutputError(
        f"the cache folder {folder} cannot be made or written to; choose another `cache`, or off."
    )


def identity(model: Model, samples: Samples) -> dict[str, Any]:
    """Identify a model and data by their content.

    Args:
        model: Model that was loaded from a file.
        samples: Samples that it reads.

    Returns:
        Plain values that decide every statistic of the model on the data.
    """
    digest = hashlib.sha256()
    for name in sorted(samples.arrays):
        values = samples.arrays[name]
        digest.update(f"{name} {values.dtype} {unequal.shape_of(values)}".encode())
        for factor in samples.scales.get(name, ()):
            digest.update(f"{factor.shape} {factor.tolist()}".encode())
        for block in unequal.blocks(values):
            digest.update(np.ascontiguousarray(block).view(np.uint8).reshape(-1).data)
    if samples.labels is not None:
        digest.update(np.ascontiguousarray(samples.labels).tobytes())
    if samples.groups is not None:
        digest.update(f"groups {samples.groups.tolist()}".encode())
    layouts = sorted(samples.layouts.items())
    shape = [samples.whole, samples.fixed_batch, sorted(model.bindings.items()), layouts]
    return {"model": model.sha256, "data": digest.hexdigest(), "shape": shape}


def fingerprint(depends: Mapping[str, Any]) -> str:
    """Digest everything that decides a result, the code and the machine included.

    Args:
        depends: Plain values that decide it besides the code and the machine.

    Returns:
        32 hexadecimal digits.
    """
    everything = {**depends, "code": _code_digest(), "host": _host()}
    text = json.dumps(everything, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def content_digest(proto: onnx.ModelProto) -> str:
    """Identify a model in memory by its content.

    Args:
        proto: The model. Of weights in files only the locations count.

    Returns:
        SHA-256 in hexadecimal.
    """
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


@once
def _code_digest() -> str:
    """Digest of this package's own sources and of the packages it calls: other code may give other results."""
    digest = hashlib.sha256(sources().encode())
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            digest.update(f"{name} {metadata.version(name)}".encode())
    return digest.hexdigest()


@once
def _host() -> str:
    return f"{platform.node()} {platform.machine()} {os.cpu_count()}"


def _load(kind: Kind[T], path: Path, is_valid: Callable[[T], bool]) -> T | None:
    """The content of an entry, or None if it is missing, damaged or not valid."""
    if not path.is_file():
        return None
    try:
        loaded = numpy_files.load(path)
        if not isinstance(loaded, dict):
            return None
        arrays = {name: np.asarray(values) for name, values in loaded.items()}
        value = kind.unpack(arrays)
        return value if is_valid(value) else None
    except Exception:
        # The file may hold anything. It is computed again.
        return None
