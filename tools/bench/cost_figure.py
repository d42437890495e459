"""Figure of the cost of pruning against network size: seconds by stage with exponents, memory, passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from .cost import STAGES, SWEEPS, exponents
from .drawing import BLUE, GREEN, INK, ORANGE, QUIET, decades, name_lines, sheet, sizes
from .studies import Row

LOOKS = ((BLUE, "s"), (ORANGE, "^"), (GREEN, "D"))
LINES = {
    "seconds": ("all stages", INK, "o", 2.2),
    **{stage: (stage, *look, 1.3) for stage, look in zip(STAGES, LOOKS, strict=True)},
    "other stages": ("other stages", QUIET, "v", 1.0),
}
"""Column: name, colour, mark, width of the line."""
UNITS = {"width": "channels", "depth": "layers", "samples": "images", "resolution": "pixels a side"}
VARIED = dict(zip(SWEEPS, ((INK, "o"), *LOOKS), strict=True))
START = "start-up"
SUMS = (
    ("peak MiB added", "peak memory", "MiB added"),
    ("passes", "seconds in plain passes", "passes"),
)
"""Column, title and unit of what every size has one line of."""


COLUMNS = 3


def draw(rows: Sequence[Row], target: Path) -> None:
    """Draw rows of the study ``cost``; the exponents are those of ``cost-exponents``."""
    start = next((r for r in rows if r["varied"] == START), None)
    grown = [r for r in rows if r["varied"] != START]
    growth = {row["varied"]: row for row in exponents(grown, start)}
    lines = -(-(len(growth) + 2) // COLUMNS)
    times = [r[c] for r in grown for c in LINES if r[c] > 0]
    with sheet(rows, target, 11, 2.9 * lines + 0.2) as figure:
        for number, varied in enumerate(growth):
            axes = figure.add_subplot(lines, COLUMNS, number + 1)
            decades(axes, times)
            names = _stages(axes, _sweep(grown, varied), growth[varied])
            if start is not None:
                axes.axhline(start["seconds"], color=INK, lw=0.7, ls=":")
            axes.set(
                title=varied,
                xlabel=f"{UNITS[varied]} n",
                ylabel="" if number % COLUMNS else "seconds",
            )
            if number % COLUMNS:
                axes.tick_params(labelleft=False)
            name_lines(axes, names)
        for number, (column, title, unit) in enumerate(SUMS, len(growth) + 1):
            axes = figure.add_subplot(lines, COLUMNS, number)
            decades(axes, [r[column] for r in grown])
            axes.set(title=title, xlabel="size n over the smallest", ylabel=unit)
            name_lines(axes, _together(axes, grown, growth, column))
        for axes in figure.axes:
            axes.grid(alpha=0.25)


def _stages(axes: Axes, rows: Sequence[Row], growth: Row) -> list[tuple[float, str, str]]:
    """A line a stage; their names."""
    varied, names = growth["varied"], []
    sizes(axes, [r[varied] for r in rows])
    for column, (name, colour, mark, width) in LINES.items():
        seen = [(r[varied], r[column]) for r in rows if r[column] > 0]
        if seen:
            axes.plot(*zip(*seen, strict=True), color=colour, marker=mark, ms=3.5, lw=width)
            names.append((seen[-1][1], f"{name}{_power(growth.get(column))}", colour))
    return names


def _together(
    axes: Axes, rows: Sequence[Row], growth: Mapping[str, Row], column: str
) -> list[tuple[float, str, str]]:
    """A line for each size that varies, against that size over its smallest; their names."""
    names, factors = [], []
    for varied, found in growth.items():
        here = _sweep(rows, varied)
        where = [r[varied] / here[0][varied] for r in here]
        colour, mark = VARIED[varied]
        axes.plot(where, [r[column] for r in here], color=colour, marker=mark, ms=3.5, lw=1.3)
        names.append((here[-1][column], f"{varied}{_power(found.get(column))}", colour))
        factors += where
    sizes(axes, factors)
    return names


def _sweep(rows: Sequence[Row], varied: str) -> list[Row]:
    return sorted((r for r in rows if r["varied"] == varied), key=lambda r: float(r[varied]))


def _power(exponent: float | None) -> str:
    return "" if exponent is None else f", n^{exponent:.2f}"
