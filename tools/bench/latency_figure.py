"""Measured speed-up over the ideal one, a panel per device, threads and batch: aligned, not aligned, and onnxsim."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .studies import Row

MARKS = {
    "ours": ("o", "#111111", "ideal", "ours"),
    "align 1": ("s", "#7f9fc6", "ideal, align 1", "ours, --align 1"),
    "onnxsim": ("^", "#d95f02", "ideal, onnxsim", "onnxsim, L2"),
}
TICKS = (0.5, 1, 2, 4, 8)


def draw(rows: Sequence[Row], target: Path) -> None:
    """Write rows of the study ``latency`` as SVG (or what the suffix says); the same rows give the same bytes."""
    places = list(dict.fromkeys((r["device"], r["threads"], r["batch"]) for r in rows))
    columns = max(1, min(4, len(places)))
    lines = max(1, -(-len(places) // columns))
    seen = [r[k] for r in rows for mark in MARKS for k in (mark, MARKS[mark][2]) if k in r]
    span = min([0.9, *(0.9 * v for v in seen)]), max([2.0, *(1.15 * v for v in seen)])
    with matplotlib.rc_context({"svg.hashsalt": "latency", "font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(2.9 * columns + 0.3, 2.9 * lines + 0.5), layout="constrained", facecolor="white")
        for number, place in enumerate(places):
            axes = figure.add_subplot(lines, columns, number + 1)
            _panel(axes, [r for r in rows if (r["device"], r["threads"], r["batch"]) == place], span)
            device, threads, batch = place
            on = device.upper() if threads is None else f"{device.upper()}, {threads} thread{'s' * (threads > 1)}"
            axes.set_title(f"{on}, batch {batch}", fontsize=9)
            if number % columns == 0:
                axes.set_ylabel("measured speed-up")
        if figure.axes:
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def _panel(axes: Axes, rows: Sequence[Row], span: tuple[float, float]) -> None:
    axes.plot(span, span, color="#8c959f", linewidth=0.8, linestyle=":")
    axes.axhline(1, color="#8c959f", linewidth=0.6)
    for method, (mark, colour, ideal, label) in MARKS.items():
        mine = [r for r in rows if method in r]
        middle = [r[method] for r in mine]
        apart = [[r[method] - r[f"{method}, low"] for r in mine], [r[f"{method}, high"] - r[method] for r in mine]]
        axes.errorbar(
            [r[ideal] for r in mine], middle, apart, fmt=mark, color=colour, markersize=4, elinewidth=0.8, alpha=0.85,
            label=label,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=span, ylim=span, xlabel="ideal speed-up (fewer MACs)", aspect="equal")
    ticks = [t for t in TICKS if span[0] <= t <= span[1]]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{t:g}x" for t in ticks])
        axis.set_ticks([], minor=True)
    axes.grid(alpha=0.25)
