"""Accuracy kept at a share of the MACs by the default pipeline: 512 unlabelled images, no fine-tuning, no labels."""

from __future__ import annotations

import time
from pathlib import Path

from onnx_oamip import pipeline
from onnx_oamip.settings import Settings

from .studies import Row, paths, save

CASES = (
    ("lenet300-mnist", 0.5),
    ("lenet300-mnist", 0.25),
    ("lenet5-mnist", 0.5),
    ("lenet5-mnist", 0.25),
    ("vgg-fashion", 0.5),
    ("vgg-fashion", 0.25),
    ("vgg-fashion", 0.15),
    ("resnet20-fashion", 0.65),
    ("resnet20-fashion", 0.5),
    ("mobilenet-fashion", 0.6),
    ("mobilenet-fashion", 0.5),
    ("vit-fashion", 0.6),
    ("vit-fashion", 0.5),
)
COLUMNS = (
    "model", "MACs asked", "MACs kept", "params kept", "before", "after", "points lost", "latency ratio", "seconds",
)  # fmt: skip


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """One row per model and budget."""
    rows: list[Row] = []
    for name, macs in CASES:
        if names and name not in names:
            continue
        model, data = paths(name)
        start = time.perf_counter()
        report = pipeline.prune(model, data, None, Settings.create(macs=macs, seed=seed))
        v = report.verification
        assert v.accuracy_before is not None
        assert v.accuracy_after is not None
        rows.append({
            "model": name,
            "MACs asked": macs,
            "MACs kept": round(report.after.macs / report.before.macs, 4),
            "params kept": round(report.after.params / report.before.params, 4),
            "before": round(100 * v.accuracy_before, 2),
            "after": round(100 * v.accuracy_after, 2),
            "points lost": round(100 * (v.accuracy_before - v.accuracy_after), 2),
            "latency ratio": None if v.latency_ratio is None else round(v.latency_ratio, 2),
            "seconds": round(time.perf_counter() - start, 1),
        })
        print(rows[-1], flush=True)
    return save(out, "budgets", rows, COLUMNS, seed)
