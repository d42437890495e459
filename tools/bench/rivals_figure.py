"""Accuracy over MACs kept, one panel per model: ours, chance, and every variant of each rival with its best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .studies import Row

LINES = {"ours": ("#111111", 2.6), "random": ("#999999", 1.2)}
FAMILIES = {"onnxsim": "#d95f02", "Torch-Pruning": "#1f78b4"}


def draw(rows: Sequence[Row], target: Path) -> None:
    """Write the curves as SVG (or what the suffix says); the same rows give the same bytes."""
    names = list(dict.fromkeys(r["model"] for r in rows))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    with matplotlib.rc_context({"svg.hashsalt": "rivals", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(3.6 * columns, 2.9 * lines + 0.5), layout="constrained")
        for place, name in enumerate(names):
            axes = figure.add_subplot(lines, columns, place + 1)
            _panel(axes, [r for r in rows if r["model"] == name and "accuracy" in r])
            axes.set_title(name)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def _panel(axes: Axes, rows: Sequence[Row]) -> None:
    for family, colour in FAMILIES.items():
        theirs = [r for r in rows if r["method"].startswith(family)]
        for method in dict.fromkeys(r["method"] for r in theirs):
            seen = sorted((r["MACs kept"], r["accuracy"]) for r in theirs if r["method"] == method)
            axes.plot(*_percent(seen), color=colour, linewidth=0.6, alpha=0.35)
        budgets = sorted({r["MACs asked"] for r in theirs})
        tops = [max((r for r in theirs if r["MACs asked"] == b), key=lambda r: r["accuracy"]) for b in budgets]
        seen = [(r["MACs kept"], r["accuracy"]) for r in tops]
        axes.plot(*_percent(seen), color=colour, lw=1.6, marker="o", ms=3, label=f"{family}, best variant")
    for method, (colour, width) in LINES.items():
        mine = [r for r in rows if r["method"] == method]
        budgets = sorted({r["MACs asked"] for r in mine})
        seen = [
            tuple(float(np.mean([r[k] for r in mine if r["MACs asked"] == b])) for k in ("MACs kept", "accuracy"))
            for b in budgets
        ]
        axes.plot(*_percent(seen), color=colour, linewidth=width, marker="o", markersize=4, label=method)
    if rows:
        axes.axhline(rows[0]["before"], color="#111111", linewidth=0.6, linestyle=":")
    axes.set(xlabel="MACs kept, %", ylabel="accuracy, %", xlim=(10, 85), ylim=(0, 102))
    axes.grid(alpha=0.25)


def _percent(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [100 * p[0] for p in points], [p[1] for p in points]
