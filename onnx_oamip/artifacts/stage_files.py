"""Records of the stages of a run: a stage whose inputs, settings and output are unchanged is not run again.

A record is a JSON file beside the model of its stage: a digest of everything that the stage depends on, the file that
it wrote with its digest, the seconds that it took, and its JSON document.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_oamip.core.atomic_files import write_bytes
from onnx_oamip.graph import external_data
from onnx_oamip.graph.loading import external_paths

SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class StageRecord:
    """A stage that was run.

    Attributes:
        stage: Its name.
        inputs: Digest of all that it depends on.
        output: Model that it wrote, None for a stage that writes none.
        sha256: Digest of the files of that model.
        seconds: Time that it took.
        document: Its JSON document.
        reused: True if an earlier run wrote it.
    """

    stage: str
    inputs: str
    output: Path | None
    sha256: str | None
    seconds: float
    document: Mapping[str, Any]
    reused: bool = False


def save(record: StageRecord, path: Path) -> None:
    """Write a record, completely or not at all.

    Args:
        record: The record.
        path: File to write.

    Raises:
        OutputError: The file cannot be written.
    """
    content = {
        "schema_version": SCHEMA_VERSION,
        "stage": record.stage,
        "inputs": record.inputs,
        "output": None if record.output is None else record.output.name,
        "sha256": record.sha256,
        "seconds": record.seconds,
        "document": record.document,
    }
    write_bytes(f"{json.dumps(content, indent=1)}\n".encode(), path)


def load(path: Path, inputs: str) -> StageRecord | None:
    """Read the record of a stage that need not be run again.

    Args:
        path: File of the record.
        inputs: Digest of what the stage depends on now.

    Returns:
        The record; None if there is none, its inputs were others, or its output was changed or removed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        name, sha256 = content["output"], content["sha256"]
        output = None if name is None else path.parent / name
        is_current = content["inputs"] == inputs and content["schema_version"] == SCHEMA_VERSION
        if not is_current or (output is not None and digest(output) != sha256):
            return None
        return StageRecord(
            stage=str(content["stage"]),
            inputs=inputs,
            output=output,
            sha256=sha256,
            seconds=float(content["seconds"]),
            document=dict(content["document"]),
            reused=True,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None  # missing, or written by something else: the stage is run again


def digest(path: Path) -> str:
    """Digest a model file and the weights beside it, as the report of the run that wrote it does.

    Args:
        path: Model file.

    Returns:
        SHA-256 in hexadecimal digits.

    Raises:
        OSError: A file cannot be read.
    """
    found = hashlib.sha256()
    for file in (path, *external_paths(path)):
        with file.open("rb") as stream:
            while chunk := stream.read(external_data.CHUNK_BYTES):
                found.update(chunk)
    return found.hexdigest()
