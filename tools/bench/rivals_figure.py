"""Accuracy over MACs kept, one panel per model: ours and chance with their range over seeds, the best of each rival."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from .drawing import FAMILIES, OURS, PALE, legend, sheet
from .studies import Row

LINES = {
    "ours": (OURS, 2.4, "lowest", "highest"),
    "random": (PALE, 1.2, "random low", "random high"),
}


def draw(rows: Sequence[Row], target: Path) -> None:
    """Write rows of the study ``rivals`` as SVG (or what the suffix says); the same rows give the same bytes."""
    panels(rows, rows, target)


def draw_larger(rows: Sequence[Row], target: Path) -> None:
    """The same picture of rows of the study ``larger``, which hold one seed."""
    found = []
    for model, budget in dict.fromkeys((r["model"], r["MACs asked"]) for r in rows):
        here = [r for r in rows if (r["model"], r["MACs asked"]) == (model, budget)]
        row: Row = {k: here[0][k] for k in ("model", "MACs asked", "judged by", "before")}
        for name in (*FAMILIES, *LINES):
            done = [r for r in here if "after" in r and r["method"].startswith(name)]
            if done:
                best = max(done, key=lambda r: r["after"])
                row |= {name: best["after"], f"{name} MACs": best["MACs kept"]}
        found.append(row)
    panels(rows, found, target)


def panels(shown: Sequence[Row], rows: Sequence[Row], target: Path) -> None:
    """A panel a model of ``rows``, which were made from the rows ``shown`` of a study."""
    names = list(dict.fromkeys(r["model"] for r in rows))
    columns = max(1, min(3, len(names)))
    lines = max(1, -(-len(names) // columns))
    with sheet(shown, target, 3.6 * columns, 2.7 * lines + 0.5) as figure:
        for place, name in enumerate(names):
            axes = figure.add_subplot(lines, columns, place + 1)
            _panel(
                axes, sorted((r for r in rows if r["model"] == name), key=lambda r: r["MACs asked"])
            )
            axes.set_title(name)
        legend(figure)


def _panel(axes: Axes, rows: Sequence[Row]) -> None:
    for family, colour in FAMILIES.items():
        seen = [(r[f"{family} MACs"], r[family]) for r in rows if family in r]
        axes.plot(
            *_percent(seen), color=colour, lw=1.5, marker="o", ms=3, label=f"{family}, best variant"
        )
    for method, (colour, width, low, high) in LINES.items():
        mine = [r for r in rows if method in r]
        where, accuracy = _percent([(r[f"{method} MACs"], r[method]) for r in mine])
        if any(low in r for r in mine):
            axes.fill_between(
                where,
                [r[low] for r in mine],
                [r[high] for r in mine],
                color=colour,
                alpha=0.25,
                lw=0,
            )
        axes.plot(
            where, accuracy, color=colour, linewidth=width, marker="o", markersize=3.5, label=method
        )
    if rows:
        axes.axhline(rows[0]["before"], color="#111111", linewidth=0.6, linestyle=":")
    judged = rows[0].get("judged by", "accuracy") if rows else "accuracy"
    axes.set(xlabel="MACs kept, %", ylabel=f"{judged}, %", xlim=(10, 85), ylim=(0, 102))
    axes.grid(alpha=0.25)


def _percent(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [100 * p[0] for p in points], [p[1] for p in points]
