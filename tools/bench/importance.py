"""Study of importance methods at equal widths, without and with a repair, on every shipped model.

Every group keeps the same share of its units, so that nothing but the choice of units differs between columns.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from onnx_oamip.api import pipeline
from onnx_oamip.core.records import Plan
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph import cost
from onnx_oamip.planning import allocation, execution
from onnx_oamip.verification import equivalence

from .studies import MODELS, Row, paths, save

METHODS = ("random", "l1", "l2", "activation", "obs", "oamip")
REFITS = ("none", "bias", "least-squares")
SHARES = (0.7, 0.5, 0.3)
COLUMNS = ("model", "refit", "units kept", *METHODS, "best of l1, l2, activation", "oamip ahead by")


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """One row per model, refit and share of units kept; accuracy in percent for each method."""
    rows: list[Row] = []
    for name in names or tuple(MODELS):
        model, data = paths(name)
        found: dict[tuple[str, float], Row] = {}
        for refit in REFITS:
            for method in METHODS:
                settings = Settings.create(
                    macs=0.5,
                    importance=method,
                    allocate="uniform",
                    refit=refit,
                    mode="decoupled",
                    seed=seed,
                )
                ready = pipeline.prepare(model, data, settings)
                assert ready.held_out is not None
                original = equivalence.watch(ready.model, ready.objective, ready.device)
                full = cost.full_widths(ready.coupling)
                for share in SHARES:
                    widths = np.maximum(1, np.round(share * full)).astype(np.int64)
                    keep = allocation.best_units(ready.coupling, ready.scores.values, widths)
                    chosen = Plan(keep, widths, "uniform", replace(ready.before))
                    cut = execution.carry_out(ready, chosen)
                    after = equivalence.watch(
                        ready.model, ready.objective, ready.device, cut.pruned.proto
                    )
                    seen = equivalence.compare(
                        ready.model,
                        ready.objective,
                        original,
                        after,
                        samples=ready.held_out,
                        batch_size=settings.batch_size,
                    )
                    assert seen.accuracy_after is not None
                    fresh: Row = {"model": name, "refit": refit, "units kept": f"{share:.0%}"}
                    row = found.setdefault((refit, share), fresh)
                    row[method] = round(100 * seen.accuracy_after, 2)
        for row in found.values():
            best = max(row[m] for m in ("l1", "l2", "activation"))
            row["best of l1, l2, activation"] = best
            row["oamip ahead by"] = round(row["oamip"] - best, 2)
            print(row, flush=True)
            rows.append(row)
    return save(out, "importance", rows, COLUMNS, seed)
