"""Functions shared by the studies: the shipped models, the environment, tables."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from onnx_oamip.graph.runtime import resolve_device
from onnx_oamip.planning import allocation
from onnx_oamip.verification import latency

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


class LeftOut(Exception):
    """A study lacks something; the message is a sentence that says what, and what to do."""


@contextmanager
def known_step(known: bool = True) -> Iterator[None]:
    """``--align auto`` takes the step of widths that the device has by default, not the one it is measured to like.

    The measurement may come out differently the next time, and other widths have another accuracy.
    """
    measured = allocation.find_step
    if known:
        allocation.find_step = lambda device: latency.Step(  # type: ignore[assignment]
            latency.DEFAULT_STEP[resolve_device(device)], False, "the default of the device"
        )
    try:
        yield
    finally:
        allocation.find_step = measured


def paths(name: str) -> tuple[Path, Path]:
    """(model, data) of a shipped network."""
    return ROOT / "models" / f"{name}.onnx", ROOT / "models" / f"{MODELS[name]}.npz"


def environment() -> dict[str, str]:
    """Machine, versions and thread settings of a measurement."""
    optional = ("highspy", "gurobipy", "torch", "torch-pruning", "onnxsim")
    used = [p for p in optional if p.replace("-", "_") in sys.modules]
    packages = {p: metadata.version(p) for p in ("onnxruntime", "numpy", "scipy", "onnx", *used)}
    machine = {
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
    }
    fixed = {
        k: v for k, v in os.environ.items() if k in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    }
    return {**machine, **packages, **fixed}


def digest(rows: Sequence[Row]) -> str:
    """SHA-256 of rows, for pictures to say what they show."""
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{round(value, 2) + 0.0:.2f}"  # a small negative number is 0.00, not -0.00
    return str(value)


def save(
    out: Path,
    study: str,
    rows: Sequence[Row],
    columns: Sequence[str],
    seed: int,
    clocked: Sequence[str] = (),
    measured: Mapping[str, str] | None = None,
) -> str:
    """Print and store the rows of a study; returns its Markdown. Without rows nothing is stored: that is no result."""
    if not rows:
        return ""
    text = table(rows, columns)
    record = store(out, study, rows, columns, seed, clocked, measured)
    seen = ", ".join(f"{k} {v}" for k, v in record["environment"].items())
    print(f"\n## {study}\n\nseed {seed}; {seen}\n\n{text}\n", flush=True)
    return text


def store(
    out: Path,
    study: str,
    rows: Sequence[Row],
    columns: Sequence[str],
    seed: int,
    clocked: Sequence[str] = (),
    measured: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Store the rows that there are so far, in one step: a study that is stopped leaves what it found.

    ``clocked``: keys of rows that hold what a clock or a memory gauge read, or follow from it, and that a second run
    will not give again. All others it must (``agree``). ``measured``: the environment, where it is not this one.
    """
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "study": study,
        "environment": dict(measured or environment()),
        "seed": seed,
    }
    record |= {"columns": list(columns), "clocked": list(clocked), "rows": list(rows)}
    part = out / f"{study}.json.part"
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(out / f"{study}.json")
    return record


class Resumable:
    """Rows of a study that is continued where it was stopped.

    Attributes:
        rows: Rows so far, those that the folder already held for this seed first.
    """

    def __init__(
        self,
        out: Path,
        study: str,
        columns: Sequence[str],
        seed: int,
        clocked: Sequence[str] = (),
    ) -> None:
        self._out, self._study, self._columns, self._seed = out, study, columns, seed
        self._clocked = clocked
        file = out / f"{study}.json"
        stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self.rows: list[Row] = stored["rows"] if stored.get("seed") == seed else []
        self._environments = [stored["environment"]] if self.rows else []

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the stored rows and of this run."""
        return together([*self._environments, environment()])

    def holds(self, key: Row) -> bool:
        """Check whether there is a row with some values."""
        return any(_matches(row, key) for row in self.rows)

    def add(self, row: Row) -> None:
        """Print a row, and store it with those before it."""
        self.rows.append(row)
        print({k: row[k] for k in self._columns if row.get(k) is not None}, flush=True)
        self.store()

    def store(self) -> None:
        """Store the rows so far."""
        store(
            self._out,
            self._study,
            self.rows,
            self._columns,
            self._seed,
            self._clocked,
            self.environment,
        )

    def measure(self, key: Row, count: int, rows: Iterable[Row]) -> None:
        """Add rows one by one, unless all of them are there.

        Args:
            key: Values that these rows have in common, and no others have.
            count: Number of the rows; if the folder holds fewer, all are measured again.
            rows: The rows, measured as they are iterated over.
        """
        others = [row for row in self.rows if not _matches(row, key)]
        if len(self.rows) - len(others) == count:
            return
        self.rows = others
        for row in rows:
            self.add(row)

    def save(self) -> str:
        """Print and store the finished study; returns its Markdown."""
        measured = self.environment if self.rows else None
        return save(
            self._out,
            self._study,
            self.rows,
            self._columns,
            self._seed,
            self._clocked,
            measured,
        )


def _matches(row: Row, key: Row) -> bool:
    return all(row.get(column) == value for column, value in key.items())


def together(environments: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """One environment of several: what differs is listed."""
    found: dict[str, list[str]] = {}
    for environment in environments:
        for key, values in environment.items():
            listed = found.setdefault(key, [])
            listed += [value for value in values.split(" and ") if value not in listed]
    return {key: " and ".join(values) for key, values in found.items()}
