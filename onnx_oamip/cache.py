"""What a run learnt about a model and its data, kept by content: pruning again at another budget starts from it.

An entry is named by a digest of everything it depends on: the model file, the data, the settings that matter, the
device, and the code itself. So nothing ever has to be declared stale; entries that were not used for longest go when
the folder grows over its limit. Entries hold plain arrays and are written whole or not at all; one that cannot be read
counts as missing.
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
from typing import Any, Generic, TypeVar

import numpy as np
from platformdirs import user_cache_path

from . import arrays
from .aside import write_bytes
from .data import Samples
from .errors import OutputError
from .records import Array, Gram, Model, Moments, Scores, Sensitivity
from .versions import sources

T = TypeVar("T")
VARIABLE = "ONNX_OAMIP_CACHE"
"""Environment variable: the folder, or ``off``. The flag and the configuration file win over it."""
LIMIT = 2 << 30
"""Bytes that all entries may take together."""
LARGEST = LIMIT // 2
"""Bytes above which one entry is not kept."""


@dataclass(frozen=True)
class Kind(Generic[T]):
    """One kind of entry: how it becomes arrays by name, and back."""

    name: str
    pack: Callable[[T], Mapping[str, Array]]
    unpack: Callable[[Mapping[str, Array]], T]


@dataclass
class Store:
    """A folder of entries (None: nothing is kept). ``taken`` lists the kinds that were found."""

    folder: Path | None = None
    taken: list[str] = field(default_factory=list)

    def keep(
        self, kind: Kind[T], depends: Mapping[str, Any], make: Callable[[], T], fits: Callable[[T], bool]
    ) -> T:
        """The entry for what it ``depends`` on (plain values); made and written where it is not there.

        So it is where the one that is there does not fit: whoever may write to the folder may write anything.
        """
        if self.folder is None:
            return make()
        text = json.dumps({**depends, "code": _code(), "host": _host()}, sort_keys=True, default=str)
        path = self.folder / f"{kind.name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"
        value = _taken(kind, path, fits)
        if value is not None:
            with contextlib.suppress(OSError):
                os.utime(path)
            self.taken.append(kind.name)
            return value
        value = make()
        self._write(path, kind.pack(value))
        return value

    def _write(self, path: Path, made: Mapping[str, Array]) -> None:
        if sum(a.nbytes for a in made.values()) > LARGEST:
            return
        stream = BytesIO()
        np.savez(stream, **dict(made))  # type: ignore[arg-type]
        # Whoever cleans up or fills the disk meanwhile costs the next run time, not this one its result.
        with contextlib.suppress(OutputError):
            write_bytes(stream.getvalue(), path)
            self._shrink()

    def _shrink(self) -> None:
        assert self.folder is not None
        with contextlib.suppress(OSError):
            entries = [(p.stat(), p) for p in self.folder.glob("*.npz")]
            total = 0
            for about, path in sorted(entries, key=lambda entry: -entry[0].st_mtime):
                total += about.st_size
                if total > LIMIT:
                    path.unlink(missing_ok=True)


def open_store(where: str) -> Store:
    """The cache at a folder, ``auto`` (the environment's, or the user's own) or ``off``.

    Raises OutputError where a folder was asked for that cannot be written to; the user's own is then done without.
    """
    asked = where if where != "auto" else os.environ.get(VARIABLE) or "auto"
    if asked == "off":
        return Store()
    folder = user_cache_path("onnx-oamip") if asked == "auto" else Path(asked)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK)
    except OSError:
        usable = False
    if usable:
        return Store(folder)
    if asked == "auto":
        return Store()
    raise OutputError(f"the cache folder {folder} cannot be made or written to; choose another --cache, or off.")


def identity(model: Model, samples: Samples) -> dict[str, Any]:
    """What of a model and of data decides a statistic, as plain values."""
    digest = hashlib.sha256()
    for name in sorted(samples.arrays):
        values = samples.arrays[name]
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        for factor in samples.scales.get(name, ()):
            digest.update(f"{factor.shape} {factor.tolist()}".encode())
        digest.update(np.ascontiguousarray(values).view(np.uint8).reshape(-1).data)
    if samples.labels is not None:
        digest.update(np.ascontiguousarray(samples.labels).tobytes())
    shape = [samples.whole, samples.fixed_batch, sorted(model.bindings.items())]
    return {"model": model.sha256, "data": digest.hexdigest(), "shape": shape}


@once
def _code() -> str:
    """Digest of this package's own sources and what it calls: what other code has found is not taken."""
    digest = hashlib.sha256(sources().encode())
    for name in ("numpy", "onnxruntime", "onnxruntime-gpu", "scipy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            digest.update(f"{name} {metadata.version(name)}".encode())
    return digest.hexdigest()


@once
def _host() -> str:
    return f"{platform.node()} {platform.machine()} {os.cpu_count()}"


def _taken(kind: Kind[T], path: Path, fits: Callable[[T], bool]) -> T | None:
    """What an entry holds; None where there is none, or one that was written by hand or cut short."""
    if not path.is_file():
        return None
    try:
        found = arrays.load(path)
        value = kind.unpack(found) if isinstance(found, dict) else None
        return value if value is not None and fits(value) else None
    except Exception:  # it may hold anything, and is made anew
        return None


# -------------------------------------------------------------------------------------------------- kinds of entries


def _text(value: Any) -> Array:
    return np.asarray(json.dumps(value, default=_number), np.str_)


def _number(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else str(value)


def _pack_moments(found: Mapping[tuple[str, int], Moments]) -> dict[str, Array]:
    index = [[tensor, axis, m.count] for (tensor, axis), m in found.items()]
    held: dict[str, Array] = {"index": _text(index)}
    for i, m in enumerate(found.values()):
        held[f"mean{i}"], held[f"square{i}"] = m.mean, m.mean_square
    return held


def _unpack_moments(held: Mapping[str, Array]) -> dict[tuple[str, int], Moments]:
    index = json.loads(str(held["index"]))
    return {
        (tensor, axis): Moments(held[f"mean{i}"], held[f"square{i}"], count)
        for i, (tensor, axis, count) in enumerate(index)
    }


def _pack_grams(found: Mapping[str, Gram]) -> dict[str, Array]:
    held: dict[str, Array] = {"index": _text([[name, g.taps, g.rows] for name, g in found.items()])}
    for i, g in enumerate(found.values()):
        held[f"matrix{i}"], held[f"mean{i}"], held[f"columns{i}"] = g.matrix, g.mean, g.columns
    return held


def _unpack_grams(held: Mapping[str, Array]) -> dict[str, Gram]:
    index = json.loads(str(held["index"]))
    return {
        name: Gram(held[f"matrix{i}"], held[f"mean{i}"], held[f"columns{i}"], taps, rows)
        for i, (name, taps, rows) in enumerate(index)
    }


def _pack_scores(found: Scores) -> dict[str, Array]:
    about = {"method": found.method, "programs": found.programs, "notes": found.notes}
    return {"values": found.values, "about": _text(about)}


def _unpack_scores(held: Mapping[str, Array]) -> Scores:
    about = json.loads(str(held["about"]))
    return Scores(about["method"], held["values"], tuple(about["programs"]), tuple(about["notes"]))


def _pack_losses(found: tuple[Sensitivity, ...]) -> dict[str, Array]:
    held: dict[str, Array] = {"groups": np.asarray(len(found))}
    for i, s in enumerate(found):
        held[f"widths{i}"], held[f"loss{i}"] = s.widths, s.loss
    return held


def _unpack_losses(held: Mapping[str, Array]) -> tuple[Sensitivity, ...]:
    return tuple(Sensitivity(held[f"widths{i}"], held[f"loss{i}"]) for i in range(int(held["groups"])))


MOMENTS: Kind[Mapping[tuple[str, int], Moments]] = Kind("moments", _pack_moments, _unpack_moments)
GRAMS: Kind[Mapping[str, Gram]] = Kind("grams", _pack_grams, _unpack_grams)
SCORES: Kind[Scores] = Kind("scores", _pack_scores, _unpack_scores)
LOSSES: Kind[tuple[Sensitivity, ...]] = Kind("losses", _pack_losses, _unpack_losses)
STEPS: Kind[Array] = Kind("steps", lambda found: {"steps": found}, lambda held: held["steps"])
