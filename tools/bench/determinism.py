"""Study of determinism: models pruned with several numbers of workers and batch sizes.

One row a model and a release of ONNX Runtime: run the study once in every environment, with the same ``--out``. A study
that is stopped goes on where it was. ``--model`` also takes the path of an ONNX file with its samples beside it, under
the same name with ``.npz``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from onnx_oamip import Report, Settings, document, prune
from onnx_oamip.api import proof
from onnx_oamip.verification.latency import Ratio

from .studies import MODELS, Resumable, Row, environment, paths

SAMPLES = 32
WORKERS = (1, 2)
BATCHES = (None, 7)
"""Samples a run; None is the default."""
DIVISIONS = tuple(itertools.product(WORKERS, BATCHES))
UNFINISHED = "determinism-unfinished.json"
COLUMNS = ("model", "onnxruntime", "runs", "MACs kept %", "files", "reports", "file")
DIGITS = 4
"""Digits of a measure that are compared: ONNX Runtime rounds outputs differently in batches of another size."""


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """Number of different files and reports over all divisions of the work, of every model."""
    study = Resumable(out, "determinism", COLUMNS, seed)
    here = environment()["onnxruntime"]
    for name in names or tuple(MODELS):
        stem = Path(name).stem if name.endswith(".onnx") else name
        if not study.holds({"model": stem, "onnxruntime": here}):
            for workers, batch in DIVISIONS:
                prune_once(out, seed, name, workers, batch)
            unfinished = _unfinished(out)
            study.add({"model": stem, "onnxruntime": here, **_row(unfinished.pop(name))})
            _keep(out, unfinished)
    return study.save()


def prune_once(out: Path, seed: int, name: str, workers: int, batch: int | None) -> None:
    """Prune a model with one division of the work, unless an earlier run did, and save what it gave.

    Args:
        out: Folder of the study.
        seed: Seed of the run.
        name: A shipped model, or the path of an ONNX file.
        workers: Number of workers.
        batch: Samples a run; None for the default.
    """
    found = _unfinished(out)
    done = found.setdefault(name, {})
    key = f"{workers} workers, batch {batch}, ONNX Runtime {environment()['onnxruntime']}"
    if key in done:
        return
    model, source = (
        (Path(name), Path(name).with_suffix(".npz")) if name.endswith(".onnx") else paths(name)
    )
    measured = proof.compare_latency
    proof.compare_latency = lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9)
    try:
        with TemporaryDirectory() as folder:
            target = Path(folder) / "out.onnx"
            report = prune(model, str(source), target, _settings(seed, workers, batch))
            done[key] = {
                "file": hashlib.sha256(target.read_bytes()).hexdigest(),
                "report": hashlib.sha256(_timeless(report, folder).encode()).hexdigest(),
                "kept": report.after.macs / report.before.macs,
            }
    finally:
        proof.compare_latency = measured
    _keep(out, found)


Runs = dict[str, dict[str, Any]]
"""Digests and costs of the runs of a model, by the division of the work."""


def _keep(out: Path, unfinished: Mapping[str, Runs]) -> None:
    """Save the runs of models whose row is not complete."""
    out.mkdir(parents=True, exist_ok=True)
    saved = out / UNFINISHED
    if unfinished:
        saved.write_text(json.dumps(unfinished, indent=1) + "\n", encoding="utf-8")
    else:
        saved.unlink(missing_ok=True)


def _unfinished(out: Path) -> dict[str, Runs]:
    """Runs of models whose row is not complete, by model."""
    saved = out / UNFINISHED
    found: dict[str, Runs] = {}
    if saved.exists():
        found = json.loads(saved.read_text(encoding="utf-8"))
    return found


def _row(runs: Runs) -> Row:
    here = environment()["onnxruntime"]
    own = [found for key, found in runs.items() if key.endswith(f" {here}")]
    files = sorted({found["file"] for found in own})
    return {
        "runs": len(own),
        "MACs kept %": round(100 * own[0]["kept"], 2),
        "files": len(files),
        "reports": len({found["report"] for found in own}),
        "file": files[0][:12],
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
