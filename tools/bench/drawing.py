"""Functions shared by the figures: fonts, colours, labels, and the digest of the rows that a figure shows."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .studies import Row, digest

INK, QUIET, PALE = "#111111", "#57606a", "#8c959f"
ORANGE, BLUE, GREEN, VIOLET = "#d95f02", "#1f78b4", "#1b9e77", "#6f5bb5"
OURS, FAMILIES = INK, {"onnxsim": ORANGE, "Torch-Pruning": BLUE}
SMALL = 8.0
APART = 0.075
"""Least distance of two names, as a share of a panel's height."""
ACCURACIES = (0, 50, 80, 90, 95, 98, 99, 99.5)
LEAST = 0.05
"""Points of error that an accuracy axis still tells from none: one of 2,000 images."""


@contextmanager
def sheet(rows: Sequence[Row], target: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches to draw rows on, written as SVG (or what the suffix says) once that is done.

    The SVG holds no date, and says in its metadata which rows it shows: the same rows give the same bytes under the
    same version of matplotlib. Its ground is white, so that it reads the same on a dark page.
    """
    with matplotlib.rc_context(
        {"svg.hashsalt": target.stem, "font.family": "DejaVu Sans", "font.size": 9}
    ):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        yield figure
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix != ".svg":
            figure.savefig(target)
            return
        drawn = io.StringIO()
        figure.savefig(
            drawn, format="svg", metadata={"Date": None, "Description": f"rows: {digest(rows)}"}
        )
        target.write_text(_compact(drawn.getvalue()), encoding="utf-8")


def _compact(svg: str) -> str:
    """The same picture in fewer bytes: hundredths of a point, short names of letters, none of groups, no indent."""
    svg = re.sub(r"(?<!scale\()(?<![\w.])\d+\.\d{3,}", _short, svg)
    svg = re.sub(r'(<use [^>]*)transform="translate\(([\d.]+) 0\)"', r'\1x="\2"', svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg.replace("DejaVuSans-", "g"))
    return re.sub(r"\s*\n\s*", "\n", svg)


def _short(number: re.Match[str]) -> str:
    value = float(number[0])
    return f"{value:.{2 if value >= 1 else 3}f}".rstrip("0").rstrip(".")


def legend(figure: Figure) -> None:
    """One for all panels, below them; nothing where no line has a name."""
    known: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        known |= dict(zip(labels, handles, strict=True))
    if known:
        figure.legend(
            known.values(),
            known.keys(),
            loc="outside lower center",
            ncols=len(known),
            frameon=False,
        )


def name_lines(axes: Axes, names: Sequence[tuple[float, str, str]], apart: float = APART) -> None:
    """Names (y in data, text, colour) to the right of a panel, at least ``apart`` from each other.

    The limits and the scale of the panel must be set, as the names stand where its lines end.
    """
    x = axes.get_xlim()[1]
    flat = axes.transData + axes.transAxes.inverted()
    heights = [float(flat.transform((x, y))[1]) for y, _, _ in names]
    for height, (_, text, colour) in zip(spread(heights, apart), names, strict=True):
        axes.text(
            1.03, height, text, color=colour, fontsize=SMALL, va="center", transform=axes.transAxes
        )


def sizes(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis with a tick at each of the values, and at no other."""
    places = sorted(set(values))
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{v:,g}" for v in places])
    axes.set_xticks([], minor=True)


def decades(axes: Axes, values: Sequence[float], which: str = "y", room: float = 1.5) -> None:
    """A logarithmic axis for these values: ticks at 1, 2 and 5 of every decade, at 1 alone where there are many."""
    low, high = min(values) / room, max(values) * room
    marks = (1, 2, 5) if high / low < 60 else (1,)
    ticks = [t for k in range(-9, 10) for m in marks if low <= (t := m * 10.0**k) <= high]
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_ticks(ticks, [f"{t:,g}" for t in ticks])
    axis.set_ticks([], minor=True)


def accuracies(axes: Axes, lowest: float, highest: float) -> None:
    """A y axis of accuracy in percent spaced by the logarithm of the error: near 100, tenths of a point show."""

    def error(accuracy: Any) -> Any:
        return -np.log10(np.maximum(100 - np.asarray(accuracy, float), LEAST))

    axes.set_yscale("function", functions=(error, lambda e: 100 - 10 ** -np.asarray(e, float)))
    bottom, top = 100 - 1.5 * max(100 - lowest, 2 * LEAST), 100 - max(0.75 * (100 - highest), LEAST)
    axes.set_ylim(bottom, top)
    ticks = [a for a in ACCURACIES if bottom <= a <= top]
    axes.set_yticks(ticks, [f"{a:g}" for a in ticks])
    axes.set_yticks([], minor=True)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Places at least ``gap`` apart, in the same order, and as a whole where they were."""
    order = np.argsort(places, kind="stable")
    found = np.asarray(places, float)[order]
    moved = found.copy()
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    for i in range(1, len(moved)):  # every run that was pushed up sinks back around its middle
        if moved[i] == moved[i - 1] + gap and (
            i + 1 == len(moved) or moved[i + 1] > moved[i] + gap
        ):
            start = i
            while start > 0 and moved[start] == moved[start - 1] + gap:
                start -= 1
            down = float((moved[start : i + 1] - found[start : i + 1]).mean())
            room = moved[start] - (moved[start - 1] + gap) if start else down
            moved[start : i + 1] -= min(down, room)
    result = np.empty_like(moved)
    result[order] = moved
    return [float(v) for v in result]
