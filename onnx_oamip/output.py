"""Where results go: checked before any work, written aside, flushed and renamed, so that nothing is ever half there."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import onnx

from . import weights
from .errors import OutputError
from .model import external_paths


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
    """Write aside, flush, rename: the target is either complete or as it was. Returns (sha256, bytes).

    Weights beside the model go to a file that was not there before, so that a model file never points at weights of
    another one; the ones it had before are removed last.
    """
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        old = [p for p in external_paths(target) if _ours(p, target)]
        names = weights.save(proto, folder / target.name, _free(target))
        digest, size = hashlib.sha256(), 0
        for name in reversed(names):  # the model comes last
            with (folder / name).open("rb+") as stream:
                os.fsync(stream.fileno())
            size += (folder / name).stat().st_size
            os.replace(folder / name, target.parent / name)
        for path in old:
            if path.name not in names:
                path.unlink(missing_ok=True)
        for name in names:
            with (target.parent / name).open("rb") as stream:
                while chunk := stream.read(weights.CHUNK):
                    digest.update(chunk)
        return digest.hexdigest(), size
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
