"""Where results go: checked before any work, written aside, flushed and renamed, so that nothing is ever half there."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import onnx

from .errors import OutputError
from .model import external_paths
from .runtime import LARGE


def check_output(
    path: str | os.PathLike[str], output: str | os.PathLike[str], sources: Iterable[object] = (), option: str = "-o"
) -> Path:
    """The output path given as ``option``, if it can be written to. Raises OutputError before any work is done."""
    target = Path(output)
    if not target.parent.is_dir():
        raise OutputError(f"the output folder {target.parent} does not exist; make it or choose another {option}.")
    if target.is_dir():
        raise OutputError(f"the output {target} is a folder; give a file name.")
    if not os.access(target.parent, os.W_OK):
        raise OutputError(f"the output folder {target.parent} is not writable; choose another {option}.")
    inputs = [Path(path), *external_paths(path), *(Path(s) for s in sources if isinstance(s, (str, os.PathLike)))]
    for written in (target, target.with_name(f"{target.name}.data")):
        if any(written.exists() and p.exists() and written.samefile(p) for p in inputs):
            raise OutputError(f"writing {target} would overwrite the input {written}; choose another {option}.")
    return target


def write(proto: onnx.ModelProto, target: Path) -> tuple[str, int]:
    """Write aside, flush, rename: the target is either complete or as it was. Returns (sha256, bytes)."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        side = f"{target.name}.data"
        if proto.ByteSize() >= LARGE:
            copy = onnx.ModelProto()
            copy.CopyFrom(proto)
            onnx.save_model(copy, str(folder / target.name), save_as_external_data=True, location=side)
        else:
            (folder / target.name).write_bytes(proto.SerializeToString(deterministic=True))
        digest, size = hashlib.sha256(), 0
        # Weights first: a model file never points at weights that are not there yet.
        for name in (side, target.name):
            if (folder / name).exists():
                with (folder / name).open("rb+") as stream:
                    os.fsync(stream.fileno())
                size += (folder / name).stat().st_size
                os.replace(folder / name, target.parent / name)
        for name in (target.name, side) if proto.ByteSize() >= LARGE else (target.name,):
            with (target.parent / name).open("rb") as stream:
                while chunk := stream.read(1 << 24):
                    digest.update(chunk)
        return digest.hexdigest(), size
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
