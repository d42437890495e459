"""Whether the division of work changes a result: models pruned with several numbers of workers and batch sizes.

One row a model and a release of ONNX Runtime: run the study once in every environment, with the same ``--out``. A study
that is stopped goes on where it was. ``--model`` also takes the path of an ONNX file with its samples beside it, under
the same name with ``.npz``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from onnx_oamip import Report, Settings, document, prune
from onnx_oamip.api import proof
from onnx_oamip.verification.latency import Ratio

from .studies import MODELS, Row, environment, paths, save, store

SAMPLES = 32
WORKERS = (1, 2)
BATCHES = (None, 7)
"""Samples a run; None is the default."""
COLUMNS = ("model", "onnxruntime", "runs", "MACs kept %", "files", "reports", "file")
DIGITS = 4
"""Digits of a measure that are compared: ONNX Runtime rounds outputs differently in batches of another size."""


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """Number of different files and reports over all divisions of the work, of every model."""
    saved = out / "determinism.json"
    rows: list[Row] = []
    measured = environment()
    if saved.exists():
        record = json.loads(saved.read_text(encoding="utf-8"))
        rows, measured = record["rows"], record["environment"]
    here = environment()["onnxruntime"]
    for name in names or tuple(MODELS):
        stem = Path(name).stem if name.endswith(".onnx") else name
        if not any((row["model"], row["onnxruntime"]) == (stem, here) for row in rows):
            rows.append({"model": stem, "onnxruntime": here, **_row(name, seed)})
            print(rows[-1], flush=True)
            store(out, "determinism", rows, COLUMNS, seed, measured=measured)
    return save(out, "determinism", rows, COLUMNS, seed, measured=measured)


def _row(name: str, seed: int) -> Row:
    if name.endswith(".onnx"):
        model, source = Path(name), Path(name).with_suffix(".npz")
    else:
        model, source = paths(name)
    divisions = list(itertools.product(WORKERS, BATCHES))
    files, reports = set(), set()
    measured = proof.compare_latency
    proof.compare_latency = lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9)
    try:
        for workers, batch in divisions:
            with TemporaryDirectory() as folder:
                target = Path(folder) / "out.onnx"
                report = prune(model, str(source), target, _settings(seed, workers, batch))
                files.add(hashlib.sha256(target.read_bytes()).hexdigest())
                reports.add(_timeless(report, folder))
    finally:
        proof.compare_latency = measured
    return {
        "runs": len(divisions),
        "MACs kept %": round(100 * report.after.macs / report.before.macs, 2),
        "files": len(files),
        "reports": len(reports),
        "file": min(files)[:12],
    }


def _settings(seed: int, workers: int, batch: int | None) -> Settings:
    division = {"workers": workers, **({} if batch is None else {"batch_size": batch})}
    return Settings.create(
        macs=0.5,
        align=1,
        samples=SAMPLES,
        seed=seed,
        device="cpu",
        cache="off",
        **division,
    )


def _timeless(report: Report, folder: str) -> str:
    """All of the document but times, the division of the work and the folder."""
    found: dict[str, Any] = document(report)
    del found["timings"]
    for key in ("workers", "batch_size"):
        del found["settings"][key]
    for program in found["programs"]:
        del program["seconds"]
    del found["verification"]["latency"]
    found["verification"] = _rounded(found["verification"])
    return json.dumps(found).replace(folder, "")


def _rounded(value: Any) -> Any:
    """Measures over batches without their last digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list | tuple) else value
