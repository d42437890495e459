"""What all studies share: the shipped models, the environment, tables."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "lenet300-mnist": "mnist",
    "lenet5-mnist": "mnist",
    "vgg-fashion": "fashion-mnist",
    "resnet20-fashion": "fashion-mnist",
    "mobilenet-fashion": "fashion-mnist",
    "vit-fashion": "fashion-mnist",
}
Row = dict[str, Any]


def paths(name: str) -> tuple[Path, Path]:
    """(model, data) of a shipped network."""
    return ROOT / "models" / f"{name}.onnx", ROOT / "models" / f"{MODELS[name]}.npz"


def environment() -> dict[str, str]:
    """What a reader needs to judge a number."""
    optional = ("highspy", "gurobipy", "torch", "torch-pruning", "onnxsim")
    used = [p for p in optional if p.replace("-", "_") in sys.modules]
    packages = {p: metadata.version(p) for p in ("onnxruntime", "numpy", "scipy", "onnx", *used)}
    machine = {"machine": platform.machine(), "cores": str(os.cpu_count()), "python": platform.python_version()}
    fixed = {k: v for k, v in os.environ.items() if k in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return {**machine, **packages, **fixed}


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def save(out: Path, study: str, rows: Sequence[Row], columns: Sequence[str], seed: int) -> str:
    """Print and store the rows of a study; returns its Markdown."""
    text = table(rows, columns)
    store(out, study, rows, columns, seed)
    seen = ", ".join(f"{k} {v}" for k, v in environment().items())
    print(f"\n## {study}\n\nseed {seed}; {seen}\n\n{text}\n", flush=True)
    return text


def store(out: Path, study: str, rows: Sequence[Row], columns: Sequence[str], seed: int) -> None:
    """Store the rows that there are so far: a study that is stopped leaves what it found."""
    out.mkdir(parents=True, exist_ok=True)
    record = {"study": study, "environment": environment(), "seed": seed, "columns": list(columns), "rows": list(rows)}
    (out / f"{study}.json").write_text(json.dumps(record, indent=1) + "\n")
