"""README's picture: accuracy against the multiply-accumulates kept, and beside the best rival at half of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .drawing import spread
from .studies import Row, digest

NAME = "accuracy.svg"
COLOURS = ("#1f5fa8", "#d2691e", "#2a8f5b", "#a33b6f", "#6f5bb5", "#7a6a2b")
INK, QUIET, BAD = "#24292f", "#8c959f", "#c4502f"
RIVALS = ("onnxsim", "Torch-Pruning")
HALF = 0.5
APART = 0.055
"""Least distance of two names, as a share of the height."""


def write(rivals: Sequence[Row], file: Path) -> None:
    """Draw rows of the study ``rivals`` as an SVG that says in its metadata which rows it shows."""
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(draw(rivals))


def draw(rivals: Sequence[Row]) -> bytes:
    """The SVG; the same rows give the same bytes under the same version of matplotlib."""
    import matplotlib as mpl

    style = {
        "svg.hashsalt": "onnx-oamip",
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.edgecolor": QUIET,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4.1), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        curves, pairs = _curves(rivals), _pairs(rivals)
        bottom = min(low for *_, lows, _ in curves for low in lows) - 2
        ends = spread([accuracy[-1] for _, _, accuracy, _, _ in curves], APART * (101 - bottom))
        for (name, kept, accuracy, low, high), end, colour in zip(
            curves, ends, COLOURS, strict=False
        ):
            left.fill_between(kept, low, high, color=colour, alpha=0.2, linewidth=0)
            left.plot(kept, accuracy, color=colour, marker="o", markersize=4, linewidth=1.8)
            left.text(kept[-1] - 2, end, name, va="center", fontsize=9, color=colour)
        left.set_xlim(103, -20)
        left.set_ylim(bottom, 101)
        left.set_xticks((100, 75, 50, 25))
        left.set_title("Accuracy as a model shrinks")
        left.set_xlabel("multiply-accumulates kept, %")
        left.set_ylabel("test accuracy, %")
        left.grid(axis="y", color="#eaeef2")

        beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9}
        rows = range(len(pairs), 0, -1)
        for y, (_, before, rival, ours) in zip(rows, pairs, strict=True):
            right.plot((rival, ours), (y, y), color="#d0d7de", linewidth=2.5, zorder=1)
            right.plot(before, y, "|", color=INK, markersize=13, markeredgewidth=1.6)
            right.plot(rival, y, "o", color=BAD, markersize=6.5)
            right.plot(ours, y, "o", color=COLOURS[0], markersize=6.5)
            right.annotate(f"{rival:.1f}", (rival, y), (-8, 0), **beside, ha="right")
            right.annotate(f"{ours:.1f}", (max(before, ours), y), (8, 0), **beside, ha="left")
        right.set_yticks(rows, [name for name, *_ in pairs])
        right.set_ylim(0.4, len(pairs) + 0.6)
        right.set_xlim(0, 115)
        right.set_xticks(range(0, 101, 25))
        right.tick_params(axis="y", length=0)
        right.spines["left"].set_visible(False)
        right.grid(axis="x", color="#eaeef2")
        right.set_axisbelow(True)
        right.set_title("At half of the multiply-accumulates")
        right.set_xlabel("test accuracy, %")
        marks = (("o", BAD, "best rival"), ("o", COLOURS[0], "onnx-oamip"), ("|", INK, "original"))
        for mark, colour, text in marks:
            right.plot([], [], mark, color=colour, markersize=7, markeredgewidth=1.6, label=text)
        figure.legend(
            *right.get_legend_handles_labels(),
            frameon=False,
            fontsize=8.5,
            loc="outside lower right",
            ncols=3,
        )
        buffer = io.BytesIO()
        about = {"Date": None, "Title": "onnx-oamip", "Description": f"rows: {digest(rivals)}"}
        figure.savefig(buffer, format="svg", metadata=about)
    return buffer.getvalue()


def _curves(
    rivals: Sequence[Row],
) -> list[tuple[str, list[float], list[float], list[float], list[float]]]:
    """(model, percent of MACs kept, mean accuracy of ours, lowest, highest), from the original on."""
    found = []
    for name in dict.fromkeys(row["model"] for row in rivals):
        mine = [row for row in rivals if row["model"] == name and "ours" in row]
        mine.sort(key=lambda row: -row["MACs asked"])
        before = mine[0]["before"]
        kept = [100.0, *(100 * row["ours MACs"] for row in mine)]
        found.append(
            (
                name,
                kept,
                *([before, *(row[key] for row in mine)] for key in ("ours", "lowest", "highest")),
            )
        )
    return found


def _pairs(rivals: Sequence[Row]) -> list[tuple[str, float, float, float]]:
    """(model, accuracy before, by the best rival, by the defaults), at half of the MACs."""
    return [
        (
            row["model"],
            row["before"],
            max(row[rival] for rival in RIVALS if rival in row),
            row["ours"],
        )
        for row in rivals
        if row["MACs asked"] == HALF and "ours" in row and any(rival in row for rival in RIVALS)
    ]
