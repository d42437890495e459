"""Figure of the published program by formulation and solver: size, processor seconds, objective and proven bound."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from .drawing import INK, ORANGE, QUIET, SMALL, decades, legend, sheet
from .studies import Row

NAMES = {"highs": "HiGHS", "gurobi": "Gurobi", "clarabel": "Clarabel"}
SIZE = ("variables", "rows")
TIME = "processor s"
BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": SMALL}


def draw(rows: Sequence[Row], target: Path) -> None:
    """Draw rows of the study ``programs``, one line each."""
    counts, seconds = ([float(r[c]) for r in rows for c in columns] for columns in (SIZE, (TIME,)))
    ends = [float(r[c]) for r in rows for c in ("objective", "bound") if c in r]
    with sheet(rows, target, 10.5, 0.55 * len(rows) + 1.3) as figure:
        size, time, value = figure.subplots(1, 3, width_ratios=(1.3, 1, 1.2))
        decades(size, counts, "x", 2)
        decades(time, seconds, "x", 3)
        room = 0.25 * (max(ends) - min(ends)) or 0.01
        value.set_xlim(min(ends) - room, max(ends) + room)
        value.locator_params(axis="x", nbins=5)
        for place, row in enumerate(rows):
            colour = INK if "bound" in row else ORANGE
            _size(size, row, place, colour)
            time.plot(row[TIME], place, "o", color=colour, ms=5)
            time.annotate(
                f"{row[TIME]:g} s",
                (row[TIME], place),
                (0, 9),
                **BESIDE,
                ha="center",
                color=colour,
            )
            _value(value, row, place, colour)
        value.plot([], [], "o", color=QUIET, ms=5, label="objective")
        value.plot([], [], "|", color=QUIET, ms=11, mew=1.6, label="its proven bound")
        for axes, title in (
            (size, "size"),
            (time, "processor seconds, building included"),
            (value, "objective, to be small"),
        ):
            axes.set(title=title, ylim=(len(rows) - 0.5, -0.7))
            axes.set_yticks(
                range(len(rows)), [_name(row) for row in rows] if axes is size else [""] * len(rows)
            )
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", alpha=0.25)
        legend(figure)


def _size(axes: Axes, row: Row, place: int, colour: str) -> None:
    """Both counts, and in words on the side where there is room."""
    counts = sorted(row[c] for c in SIZE)
    axes.plot(counts, [place] * len(counts), color=colour, marker="o", ms=5, lw=1.2)
    low, high = axes.get_xlim()
    right = counts[0] * counts[-1] < low * high
    text = ", ".join(f"{row[c]:,} {c}" for c in SIZE)
    axes.annotate(
        text,
        (counts[-1 if right else 0], place),
        (8 if right else -8, 0),
        **BESIDE,
        ha="left" if right else "right",
        color=colour,
    )


def _value(axes: Axes, row: Row, place: int, colour: str) -> None:
    objective = float(row["objective"])
    axes.plot(objective, place, "o", color=colour, ms=5, zorder=3)
    if "bound" in row:
        bound = float(row["bound"])
        axes.plot((bound, objective), (place, place), color=colour, lw=1.2)
        axes.plot(bound, place, "|", color=colour, ms=11, mew=1.6)
        text, middle = f"gap {(objective - bound) / abs(objective):.2%}", (objective + bound) / 2
    else:
        text, middle = row["status"].replace("_", ", "), objective
    axes.annotate(text, (middle, place), (0, 9), **BESIDE, ha="center", color=colour)


def _name(row: Row) -> str:
    asked = (
        "its own tolerance" if row["gap asked"] is None else f"gap of {row['gap asked']:.0%} asked"
    )
    return f"{row['program']}\n{NAMES.get(row['solver'], row['solver'])}, {asked}"
