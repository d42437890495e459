"""Output files: checked before any work, then written to a temporary folder and renamed (``core.atomic_files``)."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnx

from onnx_oamip.artifacts import provenance
from onnx_oamip.core.atomic_files import Batch, output_errors
from onnx_oamip.core.errors import OutputError
from onnx_oamip.core.records import Model, Report
from onnx_oamip.core.regular_files import refuse_special, same_file
from onnx_oamip.graph import external_data
from onnx_oamip.graph.loading import ModelSource, external_paths


def check_output(
    path: ModelSource,
    output: str | os.PathLike[str],
    sources: Iterable[object] = (),
    option: str = "-o",
    *,
    others: Iterable[str | os.PathLike[str] | None] = (),
) -> Path:
    """Check that an output can be written, before any work is done.

    Args:
        path: Model that is read; one in memory is no file that could be overwritten.
        output: File to write.
        sources: Other inputs; those that are no paths are ignored.
        option: Option that gives the output, for error messages.
        others: Other files that the run writes, None for those that it does not.

    Returns:
        The path of the output.

    Raises:
        OutputError: The output cannot be written, or is another file of the run.
    """
    target = Path(output)
    if not target.parent.is_dir():
        raise OutputError(
            f"the output folder {target.parent} does not exist; make it or choose another {option}."
        )
    if target.is_dir():
        raise OutputError(f"the output {target} is a folder; give a file name.")
    refuse_special(target, "the output", OutputError)
    if any(other is not None and same_file(target, other) for other in others):
        raise OutputError(
            f"{target} is given as another file of this run too; give {option} another path."
        )
    if not os.access(target.parent, os.W_OK):
        raise OutputError(
            f"the output folder {target.parent} is not writable; choose another {option}."
        )
    inputs = [] if isinstance(path, onnx.ModelProto) else [Path(path), *external_paths(path)]
    for source in sources:
        if isinstance(source, (str, os.PathLike)):
            inputs.append(Path(source))
    for written in (target, target.with_name(f"{target.name}.data")):
        if _is_one_of(written, inputs):
            raise OutputError(
                f"writing {target} would overwrite the input {written}; choose another {option}."
            )
    return target


def check_new_folder(folder: Path, option: str) -> None:
    """Check that a folder can be made, before any work is done.

    Args:
        folder: Folder that does not exist.
        option: Option that gives it, for error messages.

    Raises:
        OutputError: The closest folder above it is a file or not writable.
    """
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise OutputError(
            f"the output folder {folder} cannot be made in {above}; choose another {option}."
        )


def _is_one_of(path: Path, inputs: Iterable[Path]) -> bool:
    """True if a file is the same as one of the inputs, under any name."""
    if not path.exists():
        return False
    return any(other.exists() and path.samefile(other) for other in inputs)


class Page(Protocol):
    """A page about a run, to be written with its model.

    Attributes:
        path: File to write.
    """

    path: Path

    def draw(self, report: Report) -> bytes:
        """Render the page.

        Args:
            report: Report of the run.

        Returns:
            Content of the file.
        """


@dataclass(frozen=True)
class FileTargets:
    """Files that a run writes, all of them or none.

    They are renamed in the order page, keep-map, weights beside the model, model. A reader that sees the new model
    therefore sees the new version of every other file.

    Attributes:
        model: The pruned model, None to write none.
        keep_map: The keep-map, None to write none.
        page: The HTML report, None to write none.
    """

    model: Path | None
    keep_map: Path | None = None
    page: Page | None = None


@dataclass(frozen=True)
class Written:
    """A model in a temporary folder.

    Attributes:
        sha256: Digest of all its files.
        bytes: Size of all its files.
        stale: Weights beside the model that it replaces.
    """

    sha256: str
    bytes: int
    stale: tuple[Path, ...]

    def remove_stale(self) -> None:
        """Remove the weights of the replaced model. To be called after the files were renamed."""
        for path in self.stale:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def stage(batch: Batch, proto: onnx.ModelProto, target: Path) -> Written:
    """Write a model to a temporary folder; ``batch.commit`` renames it.

    Weights beside the model go to a file with a new name, so that a model file never refers to the weights of another
    model. The model is renamed last, so that the weights it refers to exist.

    Args:
        batch: Files that are renamed together.
        proto: Model to write.
        target: Final path of the model.

    Returns:
        Digest and size of the files.

    Raises:
        OutputError: The files cannot be written.
    """
    with output_errors(target):
        previous = [path for path in external_paths(target) if _is_own_name(path, target)]
        folder = batch.folder(target)
        names = external_data.save(proto, folder / target.name, _new_data_name(target))
        digest = hashlib.sha256()
        size = 0
        for name in names:
            with (folder / name).open("rb") as stream:
                while chunk := stream.read(external_data.CHUNK_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
        for name in reversed(names):
            batch.stage(folder / name, target.parent / name)
        stale = tuple(path for path in previous if path.name not in names)
        return Written(digest.hexdigest(), size, stale)


def check_not_larger(model: Model, pruned: onnx.ModelProto, written: int) -> None:
    """Check that a pruned file is not larger than its original, apart from the entry about its provenance.

    Args:
        model: The original.
        pruned: Model that is to be written.
        written: Bytes of its files.

    Raises:
        OutputError: The pruned file is larger; the message names what makes it so.
    """
    own = written - (provenance.size(pruned) - provenance.size(model.proto))
    if own <= model.file_bytes:
        return
    added = _bytes_added(model, pruned)
    cause = max(added, key=lambda what: added[what])
    raise OutputError(
        f"the pruned file would have {own:,} bytes, more than the {model.file_bytes:,} of the original, because "
        f"{cause} adds {added[cause]:,}; nothing was written; try a smaller budget, or `force` to write it anyway."
    )


def _bytes_added(model: Model, pruned: onnx.ModelProto) -> dict[str, int]:
    """Bytes that a pruned file has beyond its original, by what they are for."""

    def of_nodes(proto: onnx.ModelProto) -> int:
        return sum(node.ByteSize() for node in proto.graph.node)

    def of_constants(proto: onnx.ModelProto) -> int:
        references = sum(tensor.ByteSize() for tensor in proto.graph.initializer)
        return references + external_data.size(proto) - proto.ByteSize()

    return {
        "writing out names, functions and fused operators": external_data.size(model.proto)
        - model.file_bytes,
        "what the cut and the refit insert": of_nodes(pruned) - of_nodes(model.proto),
        "storing constants": of_constants(pruned) - of_constants(model.proto),
    }


def write(proto: onnx.ModelProto, target: Path) -> tuple[str, int]:
    """Write one model, completely or not at all.

    Args:
        proto: Model to write.
        target: Path of the model.

    Returns:
        SHA-256 and size in bytes of all files.

    Raises:
        OutputError: The files cannot be written.
    """
    with Batch() as batch:
        written = stage(batch, proto, target)
        batch.commit()
    written.remove_stale()
    return written.sha256, written.bytes


def _new_data_name(target: Path) -> str:
    """A name for the weights beside a model that no file has."""
    name = f"{target.name}.data"
    for i in itertools.count(1):
        if not (target.parent / name).exists():
            break
        name = f"{target.name}.{i}.data"
    return name


def _is_own_name(path: Path, target: Path) -> bool:
    """True if a file of weights has a name that ``stage`` gives."""
    if path.parent != target.parent:
        return False
    if not path.name.startswith(f"{target.name}.") or not path.name.endswith(".data"):
        return False
    middle = path.name.removeprefix(f"{target.name}.").removesuffix("data").removesuffix(".")
    return middle == "" or middle.isdecimal()
