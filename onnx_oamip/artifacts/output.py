"""Where results go: checked before any work, written aside and renamed (see ``aside``)."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnx

from onnx_oamip.core.atomic_files import Batch, telling
from onnx_oamip.core.errors import OutputError
from onnx_oamip.core.records import Report
from onnx_oamip.graph import external_data
from onnx_oamip.graph.loading import external_paths


def check_output(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    sources: Iterable[object] = (),
    option: str = "-o",
) -> Path:
    """The output path given as ``option``, if it can be written to. Raises OutputError before any work is done."""
    target = Path(output)
    if not target.parent.is_dir():
        raise OutputError(
            f"the output folder {target.parent} does not exist; make it or choose another {option}."
        )
    if target.is_dir():
        raise OutputError(f"the output {target} is a folder; give a file name.")
    if not os.access(target.parent, os.W_OK):
        raise OutputError(
            f"the output folder {target.parent} is not writable; choose another {option}."
        )
    inputs = [
        Path(path),
        *external_paths(path),
        *(Path(s) for s in sources if isinstance(s, (str, os.PathLike))),
    ]
    for written in (target, target.with_name(f"{target.name}.data")):
        if any(written.exists() and p.exists() and written.samefile(p) for p in inputs):
            raise OutputError(
                f"writing {target} would overwrite the input {written}; choose another {option}."
            )
    return target


class Page(Protocol):
    """A page about a run, to be written with its model."""

    path: Path

    def draw(self, report: Report) -> bytes:
        """The page."""


@dataclass(frozen=True)
class Targets:
    """What a run writes (None: it does not): all of it, or nothing.

    They are renamed in the order page, keep-map, weights beside the model, model: whoever sees the new model sees all
    else new.
    """

    model: Path | None
    keep_map: Path | None = None
    page: Page | None = None


@dataclass(frozen=True)
class Written:
    """A model that was written aside: its ``sha256``, with the weights beside it, and ``bytes`` of all its files.

    ``stale``: weights beside the model that was there before.
    """

    sha256: str
    bytes: int
    stale: tuple[Path, ...]

    def sweep(self) -> None:
        """Remove the weights of the model that was there before; after the renames."""
        for path in self.stale:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def stage(batch: Batch, proto: onnx.ModelProto, target: Path) -> Written:
    """Write a model aside; ``batch.commit`` renames it. Raises OutputError.

    Weights beside the model go to a file that was not there before, so that a model file never points at weights of
    another one. The model comes last, so that what it points at is there.
    """
    with telling(target):
        old = [p for p in external_paths(target) if _ours(p, target)]
        folder = batch.folder(target)
        names = external_data.save(proto, folder / target.name, _free(target))
        digest, size = hashlib.sha256(), 0
        for name in names:
            with (folder / name).open("rb") as stream:
                while chunk := stream.read(external_data.CHUNK_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
        for name in reversed(names):
            batch.take(folder / name, target.parent / name)
        return Written(digest.hexdigest(), size, tuple(p for p in old if p.name not in names))


def write(proto: onnx.ModelProto, target: Path) -> tuple[str, int]:
    """Write one model: the target is either complete or as it was. Returns (sha256, bytes). Raises OutputError."""
    with Batch() as batch:
        written = stage(batch, proto, target)
        batch.commit()
    written.sweep()
    return written.sha256, written.bytes


def _free(target: Path) -> str:
    """A name for the weights beside a model that no file has."""
    name, i = f"{target.name}.data", 1
    while (target.parent / name).exists():
        name, i = f"{target.name}.{i}.data", i + 1
    return name


def _ours(path: Path, target: Path) -> bool:
    """Whether a file of weights has a name that ``write`` gives."""
    number = path.name.removeprefix(f"{target.name}.").removesuffix("data").removesuffix(".")
    named = path.name.startswith(f"{target.name}.") and path.name.endswith(".data")
    return path.parent == target.parent and named and (number == "" or number.isdecimal())
