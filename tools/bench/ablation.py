"""Ablation at half the MACs: order x refit x allocation, everything else equal.

Widths are not aligned here, so that the comparison is about the methods. Sensitivities are measured under the
refit that follows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from onnx_oamip.api import pipeline
from onnx_oamip.core.settings import Settings
from onnx_oamip.planning import search
from onnx_oamip.verification import equivalence

from .studies import MODELS, Row, paths, save

ORDERS = ("l2", "activation", "obs")
REFITS = ("none", "bias", "least-squares")
ALLOCATIONS = ("uniform", "global", "mip")
COLUMNS = ("model", "order", "allocation", *REFITS, "before")


def run(out: Path, seed: int, names: tuple[str, ...] = (), macs: float = 0.5) -> str:
    """One row per model, order and allocation; a column per refit (accuracy in percent)."""
    rows: list[Row] = []
    for name in names or tuple(MODELS):
        model, data = paths(name)
        for order in ORDERS:
            found: dict[str, Row] = {
                a: {"model": name, "order": order, "allocation": a} for a in ALLOCATIONS
            }
            for refit in REFITS:
                settings = Settings.create(
                    macs=macs, importance=order, align=1, refit=refit, seed=seed
                )
                ready = pipeline.prepare(model, data, settings)
                assert ready.held_out is not None
                original = equivalence.watch(ready.model, ready.objective, ready.device)
                for allocation, row in found.items():
                    here = replace(
                        ready,
                        ladder=ready.ladder if allocation == "mip" else None,
                        settings=settings.model_copy(update={"allocate": allocation}),
                    )
                    after = equivalence.watch(
                        ready.model, ready.objective, ready.device, search.search(here).pruned.proto
                    )
                    v = equivalence.compare(
                        ready.model,
                        ready.objective,
                        original,
                        after,
                        samples=ready.held_out,
                        batch_size=settings.batch_size,
                    )
                    assert v.accuracy_before is not None
                    assert v.accuracy_after is not None
                    row[refit], row["before"] = (
                        round(100 * v.accuracy_after, 2),
                        round(100 * v.accuracy_before, 2),
                    )
            rows += found.values()
            print(*found.values(), sep="\n", flush=True)
    return save(out, "ablation", rows, COLUMNS, seed)
