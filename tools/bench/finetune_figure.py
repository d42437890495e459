"""Accuracy after pruning and after each epoch of a short fine-tune: ours and the rival, a panel a budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from .drawing import BLUE, INK, QUIET, SMALL, accuracies, name_lines, sheet
from .studies import Row

EPOCHS = " epochs"


def draw(rows: Sequence[Row], target: Path) -> None:
    """Draw rows of the study ``finetune``."""
    panels = list(dict.fromkeys((r["model"], r["MACs asked"]) for r in rows))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    with sheet(rows, target, 4.9 * columns, 3.3 * lines) as figure:
        for number, (model, budget) in enumerate(panels):
            axes = figure.add_subplot(lines, columns, number + 1)
            here = [r for r in rows if (r["model"], r["MACs asked"]) == (model, budget)]
            before = here[0]["before"]
            seen = [a for r in here for a in (*_accuracies(r).values(), before)]
            accuracies(axes, min(seen), max(seen))
            last = max(max(_accuracies(r)) for r in here)
            axes.set(title=f"{model}, {budget:.0%} of the MACs", xlabel="epochs of fine-tuning")
            axes.set_xlim(-0.3, last + 0.5)
            axes.set_ylabel("" if number % columns else "accuracy, %")
            axes.set_xticks(range(last + 1))
            axes.axhline(before, color=QUIET, lw=0.9, ls=":")
            axes.grid(alpha=0.25)
            names = [
                (before, f"original, {before:.2f}", QUIET),
                *(_line(axes, row) for row in here),
            ]
            name_lines(axes, names, 0.13)


def _line(axes: Axes, row: Row) -> tuple[float, str, str]:
    """A line with its figures, ours above it and a rival's below; its name."""
    mine, found = row["method"] == "ours", _accuracies(row)
    colour, mark, width, where = (INK, "o", 2.2, (0, 9)) if mine else (BLUE, "s", 1.5, (10, -9))
    axes.plot(list(found), list(found.values()), color=colour, marker=mark, ms=4, lw=width)
    for epoch, accuracy in found.items():
        axes.annotate(
            f"{accuracy:.2f}",
            (epoch, accuracy),
            where,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=SMALL,
            color=colour,
            bbox={"fc": "white", "ec": "none", "pad": 0.4},
        )
    return (
        list(found.values())[-1],
        f"{row['method'].partition(',')[0]},\n{row['MACs kept']:.1%} kept",
        colour,
    )


def _accuracies(row: Row) -> dict[int, float]:
    """By epochs; none is the pruned network as it is."""
    later = {
        int(key.removesuffix(EPOCHS)): value for key, value in row.items() if key.endswith(EPOCHS)
    }
    return {0: row["pruned"], **dict(sorted(later.items()))}
