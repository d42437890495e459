"""Every export pruned by the same command, and the table of docs/guide/exports.md."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx

from ..bench.studies import Row, environment, table
from . import digits

BEGIN, END = "<!-- exports:begin -->", "<!-- exports:end -->"
COLUMNS = ("export", "by", "opset", "params kept", "MACs kept", "cut = masked", "before", "after")


def rows(folder: Path) -> list[Row]:
    """One row for every export; RuntimeError where the command fails."""
    made = json.loads((folder / "made.json").read_text())
    with tempfile.TemporaryDirectory() as place:
        return [_row(folder, name, entry["versions"], Path(place)) for name, entry in made.items()]


def _row(folder: Path, name: str, versions: dict[str, str], place: Path) -> Row:
    model, data = folder / f"{name}.onnx", place / f"{name}.npz"
    proto = onnx.load(model)
    (port,) = proto.graph.input
    digits.data_file(
        folder, data, port.name, [d.dim_value for d in port.type.tensor_type.shape.dim][1:]
    )
    options = [
        "--data",
        str(data),
        "--params",
        "0.5",
        "--force",
        "--json",
        "-o",
        str(place / model.name),
    ]
    command = [sys.executable, "-m", "onnx_oamip", "prune", str(model), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()}")
    found = json.loads(done.stdout)
    print(f"{name}: done", flush=True)
    proof = found["verification"]
    return {
        "export": f"`{name}`",
        "by": ", ".join(f"{package} {version}" for package, version in versions.items()),
        "opset": next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")),
        "params kept": found["after"]["params"] / found["before"]["params"],
        "MACs kept": found["after"]["macs"] / found["before"]["macs"],
        "cut = masked": f"{proof['masked_equivalence']:.0e}",
        "before": f"{100 * proof['accuracy_before']:.1f}",
        "after": f"{100 * proof['accuracy_after']:.1f}",
    }


def write(folder: Path, page: Path) -> None:
    """Put the table between the markers. Raises ValueError if they are missing."""
    head, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no {BEGIN} ... {END}")
    seen = ", ".join(f"{k} {v}" for k, v in environment().items())
    text = f"{table(rows(folder), COLUMNS)}\n\n`python -m tools.exports --table`; {seen}."
    page.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")
