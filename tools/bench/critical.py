"""Critical units: units kept and points lost where oamip decides how many units stay, without a budget.

The default finds them with decoupled scores, one program over all groups, and held-out samples. The published program
and the exact one, over ten images, decide by their keep variables at the published threshold 0.1; only LeNet-300-100 is
small enough for them. Rows are stored as they are found.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from onnx_oamip.api import pipeline
from onnx_oamip.core.records import Measure
from onnx_oamip.core.settings import Settings

from .studies import MODELS, Row, known_step, paths, save, store

THRESHOLD = 0.1
"""Threshold of the published experiments on MNIST."""
JOINT = "lenet300-mnist"
"""The network that the programs over the network are solved for."""
PROGRAMS: dict[str, dict[str, Any]] = {
    "decoupled": {},
    "paper": {"mode": "joint", "formulation": "paper", "threshold": THRESHOLD},
    "exact": {"mode": "joint", "formulation": "exact", "threshold": THRESHOLD, "time_limit": 120},
}
COLUMNS = (
    "model",
    "program",
    "units",
    "kept",
    "accuracy",
    "lost without refit",
    "lost with refit",
    "lambda",
    "loss bound",
    "gap",
    "seconds",
)
CLOCKED = ("seconds", "gap")


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """A row per network and program."""
    rows: list[Row] = []
    for name in names or tuple(MODELS):
        for program in PROGRAMS if name == JOINT else ("decoupled",):
            rows.append(_row(name, program, seed))
            store(out, "critical", rows, COLUMNS, seed, CLOCKED)
    return save(out, "critical", rows, COLUMNS, seed, CLOCKED)


def _row(name: str, program: str, seed: int) -> Row:
    model, data = paths(name)
    settings = Settings.create(importance="oamip", seed=seed, **PROGRAMS[program])
    began = time.perf_counter()
    with known_step():
        report = pipeline.prune(model, data, None, settings)
    found = report.verification
    assert found.accuracy_before is not None
    plan = report.plan
    chosen = plan.programs[-1]
    # The gap of the program that decides: over widths for decoupled scores, over the network for the others.
    gap = chosen["gap"] if program == "decoupled" else report.scores.programs[0]["gap"]
    row = {
        "model": name,
        "program": program,
        "units": len(plan.keep),
        "kept": int(plan.keep.sum()),
        "accuracy": round(100 * found.accuracy_before, 2),
        "lost without refit": _lost(found.outputs_before_refit or found.outputs),
        "lost with refit": _lost(found.outputs),
        "lambda": f"{chosen['lambda']:.3g}" if "lambda" in chosen else None,
        "loss bound": f"{chosen['max_loss']:.3g}" if "max_loss" in chosen else None,
        "gap": f"{gap:.1%}",
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(row, flush=True)
    return row


def _lost(measures: tuple[Measure, ...]) -> float:
    return round(max(measure.lost for measure in measures), 2)
