"""Accuracy kept at a share of the MACs by the default pipeline: 512 unlabelled images, no fine-tuning, no labels.

Two rows show what alignment to the provider's blocks costs in accuracy and wins in time.
"""

from __future__ import annotations

import time
from pathlib import Path

from onnx_oamip.api import pipeline
from onnx_oamip.core.settings import Settings

from .studies import Row, paths, save

CASES = (
    ("lenet300-mnist", 0.5, "auto"),
    ("lenet300-mnist", 0.25, "auto"),
    ("lenet5-mnist", 0.5, "auto"),
    ("lenet5-mnist", 0.25, "auto"),
    ("vgg-fashion", 0.5, "auto"),
    ("vgg-fashion", 0.5, 1),
    ("vgg-fashion", 0.25, "auto"),
    ("vgg-fashion", 0.15, "auto"),
    ("resnet20-fashion", 0.65, "auto"),
    ("resnet20-fashion", 0.5, "auto"),
    ("resnet20-fashion", 0.5, 1),
    ("mobilenet-fashion", 0.6, "auto"),
    ("mobilenet-fashion", 0.5, "auto"),
    ("vit-fashion", 0.6, "auto"),
    ("vit-fashion", 0.5, "auto"),
)
COLUMNS = (
    "model",
    "align",
    "MACs asked",
    "MACs kept",
    "params kept",
    "before",
    "after",
    "points lost",
)
CLOCKED = ("latency ratio", "seconds")


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """One row per model and budget."""
    rows: list[Row] = []
    for name, macs, align in CASES:
        if names and name not in names:
            continue
        model, data = paths(name)
        start = time.perf_counter()
        report = pipeline.prune(
            model, data, None, Settings.create(macs=macs, align=align, seed=seed, force=True)
        )
        v = report.verification
        assert v.accuracy_before is not None
        assert v.accuracy_after is not None
        rows.append(
            {
                "model": name,
                "align": align,
                "MACs asked": macs,
                "MACs kept": round(report.after.macs / report.before.macs, 4),
                "params kept": round(report.after.params / report.before.params, 4),
                "before": round(100 * v.accuracy_before, 2),
                "after": round(100 * v.accuracy_after, 2),
                "points lost": round(100 * (v.accuracy_before - v.accuracy_after), 2),
                "latency ratio": None if v.latency_ratio is None else round(v.latency_ratio, 2),
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
        print(rows[-1], flush=True)
    return save(out, "budgets", rows, COLUMNS, seed, CLOCKED)
