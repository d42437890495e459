"""Measured speed-ups beside the ideal ones: a panel per device, threads and batch, a line per network and budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from .drawing import FAMILIES, OURS, PALE, QUIET, legend, sheet
from .studies import Row

MARKS = {
    "onnxsim": ("^", FAMILIES["onnxsim"], 0.26, "onnxsim, L2"),
    "align 1": ("s", "#7f9fc6", 0.0, "ours, --align 1"),
    "ours": ("o", OURS, -0.26, "ours"),
}
"""Mark, colour, place within the line, and name in the legend."""
TICKS = (0.5, 1, 2, 4, 8, 16)


def draw(rows: Sequence[Row], target: Path) -> None:
    """Write rows of the study ``latency`` as SVG (or what the suffix says); the same rows give the same bytes."""
    places = list(dict.fromkeys((r["device"], r["threads"], r["batch"]) for r in rows))
    lines = list(dict.fromkeys((r["model"], r["MACs asked"]) for r in rows))
    columns = max(1, min(4, len(places)))
    deep = max(1, -(-len(places) // columns))
    seen = [r[k] for r in rows for k in (*MARKS, "ideal", "predicted") if k in r]
    span = min([0.9, *(0.9 * v for v in seen)]), max([2.0, *(1.15 * v for v in seen)])
    with sheet(
        rows, target, 2.35 * columns + 1.7, (0.34 * len(lines) + 0.7) * deep + 0.5
    ) as figure:
        for number, place in enumerate(places):
            axes = figure.add_subplot(deep, columns, number + 1)
            _panel(
                axes, [r for r in rows if (r["device"], r["threads"], r["batch"]) == place], lines
            )
            device, threads, batch = place
            on = (
                device.upper()
                if threads is None
                else f"{device.upper()}, {threads} thread{'s' * (threads > 1)}"
            )
            axes.set_title(f"{on}, batch {batch}", fontsize=9)
            named = (
                [f"{model}, {budget:.0%}" for model, budget in lines]
                if number % columns == 0
                else []
            )
            axes.set_yticks(range(len(lines)), named or [""] * len(lines))
            axes.set(xscale="log", xlim=span, ylim=(len(lines) - 0.5, -0.5), xlabel="speed-up")
            ticks = [t for t in TICKS if span[0] <= t <= span[1]]
            axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
            axes.set_xticks([], minor=True)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", alpha=0.25)
        legend(figure)


def _panel(axes: Axes, rows: Sequence[Row], lines: Sequence[tuple[str, float]]) -> None:
    for line in range(0, len(lines), 2):
        axes.axhspan(line - 0.5, line + 0.5, color="#f3f5f7", linewidth=0, zorder=0)
    axes.axvline(1, color=PALE, linewidth=0.8, zorder=1)

    def at(row: Row, shift: float) -> float:
        return lines.index((row["model"], row["MACs asked"])) + shift

    for key, mark, label in (
        ("ideal", "|", "ideal (MACs)"),
        ("predicted", "d", "predicted for ours"),
    ):
        mine = [r for r in rows if key in r]
        shift = 0.0 if key == "ideal" else MARKS["ours"][2]
        axes.plot(
            [r[key] for r in mine],
            [at(r, shift) for r in mine],
            mark,
            color=QUIET,
            label=label,
            markersize=22 if key == "ideal" else 6,
            markerfacecolor="none",
            markeredgewidth=1.0,
        )
    for method, (mark, colour, shift, label) in MARKS.items():
        mine = [r for r in rows if method in r]
        apart = [
            [r[method] - r[f"{method}, low"] for r in mine],
            [r[f"{method}, high"] - r[method] for r in mine],
        ]
        axes.errorbar(
            [r[method] for r in mine],
            [at(r, shift) for r in mine],
            xerr=apart,
            fmt=mark,
            color=colour,
            markersize=4,
            elinewidth=0.8,
            label=label,
        )
