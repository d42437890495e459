"""Accuracy over MACs kept, one panel per model: ours and chance with their range over seeds, the best of each rival."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .studies import Row, digest

LINES = {"ours": ("#111111", 2.4, "lowest", "highest"), "random": ("#8c959f", 1.2, "random low", "random high")}
FAMILIES = {"onnxsim": "#d95f02", "Torch-Pruning": "#1f78b4"}


def draw(rows: Sequence[Row], target: Path) -> None:
    """Write rows of the study ``rivals`` as SVG (or what the suffix says); the same rows give the same bytes."""
    names = list(dict.fromkeys(r["model"] for r in rows))
    columns = max(1, min(3, len(names)))
    lines = max(1, -(-len(names) // columns))
    with matplotlib.rc_context({"svg.hashsalt": "rivals", "font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(3.6 * columns, 2.7 * lines + 0.5), layout="constrained", facecolor="white")
        for place, name in enumerate(names):
            axes = figure.add_subplot(lines, columns, place + 1)
            _panel(axes, sorted((r for r in rows if r["model"] == name), key=lambda r: r["MACs asked"]))
            axes.set_title(name)
        known = {}
        for axes in figure.axes:
            known |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        if known:
            figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=len(known), frameon=False)
        target.parent.mkdir(parents=True, exist_ok=True)
        about = {"Date": None, "Description": f"rows: {digest(rows)}"}
        figure.savefig(target, metadata=about if target.suffix == ".svg" else None)


def _panel(axes: Axes, rows: Sequence[Row]) -> None:
    for family, colour in FAMILIES.items():
        seen = [(r[f"{family} MACs"], r[family]) for r in rows if family in r]
        axes.plot(*_percent(seen), color=colour, lw=1.5, marker="o", ms=3, label=f"{family}, best variant")
    for method, (colour, width, low, high) in LINES.items():
        mine = [r for r in rows if method in r]
        where, accuracy = _percent([(r[f"{method} MACs"], r[method]) for r in mine])
        axes.fill_between(where, [r[low] for r in mine], [r[high] for r in mine], color=colour, alpha=0.25, lw=0)
        axes.plot(where, accuracy, color=colour, linewidth=width, marker="o", markersize=3.5, label=method)
    if rows:
        axes.axhline(rows[0]["before"], color="#111111", linewidth=0.6, linestyle=":")
    axes.set(xlabel="MACs kept, %", ylabel="accuracy, %", xlim=(10, 85), ylim=(0, 102))
    axes.grid(alpha=0.25)


def _percent(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [100 * p[0] for p in points], [p[1] for p in points]
