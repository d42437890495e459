"""Peak memory by number of calibration samples, stage by stage: a panel for each verb."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .drawing import BLUE, GREEN, INK, ORANGE, QUIET, VIOLET, name_lines, sheet, sizes
from .studies import Row

UNIT, MEMORY = " MiB", "own"
LOOKS = {
    "load": (QUIET, "v"),
    "calibrate": (BLUE, "s"),
    "gram": (VIOLET, "D"),
    "sensitivity": (ORANGE, "^"),
    "refit": (INK, "o"),
    "verify": (GREEN, "P"),
    "rest": (QUIET, "x"),
}
"""Colour and mark of each stage."""


def draw(rows: Sequence[Row], target: Path) -> None:
    """Draw the rows of the study ``memory`` that tell stages apart."""
    shown = [r for r in rows if r["stage"] in LOOKS and r["memory"] == MEMORY]
    panels = list(dict.fromkeys((r["model"], r["data"], r["run"]) for r in shown))
    columns = max(1, min(2, len(panels)))
    with sheet(rows, target, 4.9 * columns, 3.2 * max(1, -(-len(panels) // columns))) as figure:
        top = 1.1 * max((v for r in shown for v in _peaks(r).values()), default=1)
        for number, (model, data, verb) in enumerate(panels):
            axes = figure.add_subplot(-(-len(panels) // columns), columns, number + 1)
            names = []
            axes.set_ylim(0, top)
            for row in (
                r for r in shown if (r["model"], r["data"], r["run"]) == (model, data, verb)
            ):
                peaks, (colour, mark) = _peaks(row), LOOKS[row["stage"]]
                sizes(axes, list(peaks))
                axes.plot(
                    list(peaks), list(peaks.values()), color=colour, marker=mark, ms=4, lw=1.4
                )
                names.append((list(peaks.values())[-1], row["stage"], colour))
            axes.set(
                title=f"{verb}, {model}, {data}",
                xlabel="calibration samples",
                ylabel="peak memory, MiB",
            )
            axes.grid(alpha=0.25)
            name_lines(axes, names)


def _peaks(row: Row) -> dict[int, float]:
    """By number of samples."""
    found = {key.removesuffix(UNIT): value for key, value in row.items() if key.endswith(UNIT)}
    return {int(key.replace(",", "")): value for key, value in found.items()}
