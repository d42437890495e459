"""README's picture: accuracy against the multiply-accumulates kept, and what the repair is worth at half of them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .studies import ROOT, Row

FILE = ROOT / "docs" / "accuracy.svg"
COLOURS = ("#1f5fa8", "#d2691e", "#2a8f5b", "#a33b6f", "#6f5bb5", "#7a6a2b")
INK, QUIET, BAD = "#24292f", "#8c959f", "#c4502f"
LIFT = {"mobilenet-fashion": -11, "resnet20-fashion": -23}
"""Points by which names are moved apart where two curves end together."""
USUAL = ("l2", "uniform", "none")
"""Order, allocation and refit of plain magnitude pruning, as the study of the parts has it."""
OURS = ("obs", "mip", "least-squares")


def write(budgets: Sequence[Row], ablation: Sequence[Row], file: Path = FILE) -> None:
    """Draw the rows of two studies as an SVG that says in its metadata which rows it shows."""
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(draw(budgets, ablation))


def digest(budgets: Sequence[Row], ablation: Sequence[Row]) -> str:
    """SHA-256 of what the picture shows."""
    return hashlib.sha256(json.dumps([_curves(budgets), _pairs(ablation)]).encode()).hexdigest()


def draw(budgets: Sequence[Row], ablation: Sequence[Row]) -> bytes:
    """The SVG; the same rows give the same bytes under the same version of matplotlib."""
    import matplotlib as mpl

    style = {
        "svg.hashsalt": "onnx-oamip", "font.family": "DejaVu Sans", "font.size": 10, "axes.edgecolor": QUIET,
        "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlesize": 11,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with mpl.rc_context(style):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4.1), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        pairs = _pairs(ablation)
        names = [name for name, *_ in pairs]
        for name, kept, accuracy in _curves(budgets):
            colour = COLOURS[names.index(name) % len(COLOURS)]
            left.plot(kept, accuracy, color=colour, marker="o", markersize=4.5, linewidth=1.8)
            left.annotate(
                name, (kept[-1], accuracy[-1]), (8, LIFT.get(name, 0)), textcoords="offset points", va="center",
                fontsize=9, color=colour,
            )  # fmt: skip
        left.set_xlim(103, -12)
        left.set_xticks((100, 75, 50, 25))
        left.set_title("Accuracy as a model shrinks")
        left.set_xlabel("multiply-accumulates kept, %")
        left.set_ylabel("test accuracy, %")
        left.grid(axis="y", color="#eaeef2")

        beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9}
        rows = range(len(pairs), 0, -1)
        for y, (_, before, usual, ours) in zip(rows, pairs, strict=True):
            right.plot((usual, ours), (y, y), color="#d0d7de", linewidth=2.5, zorder=1)
            right.plot(before, y, "|", color=INK, markersize=13, markeredgewidth=1.6)
            right.plot(usual, y, "o", color=BAD, markersize=6.5)
            right.plot(ours, y, "o", color=COLOURS[0], markersize=6.5)
            right.annotate(f"{usual:.0f}", (usual, y), (-8, 0), **beside, ha="right")
            right.annotate(f"{ours:.1f}", (before, y), (8, 0), **beside, ha="left")
        right.set_yticks(rows, names)
        right.set_ylim(0.4, len(pairs) + 0.6)
        right.set_xlim(0, 113)
        right.set_xticks(range(0, 101, 25))
        right.tick_params(axis="y", length=0)
        right.spines["left"].set_visible(False)
        right.grid(axis="x", color="#eaeef2")
        right.set_axisbelow(True)
        right.set_title("At half of the multiply-accumulates")
        right.set_xlabel("test accuracy, %")
        marks = (("o", BAD, "smallest weights out"), ("o", COLOURS[0], "onnx-oamip"), ("|", INK, "original"))
        for mark, colour, text in marks:
            right.plot([], [], mark, color=colour, markersize=7, markeredgewidth=1.6, label=text)
        figure.legend(
            *right.get_legend_handles_labels(), frameon=False, fontsize=8.5, loc="outside lower right", ncols=3
        )
        buffer = io.BytesIO()
        about = {"Date": None, "Title": "onnx-oamip", "Description": f"rows: {digest(budgets, ablation)}"}
        figure.savefig(buffer, format="svg", metadata=about)
    return buffer.getvalue()


def _curves(budgets: Sequence[Row]) -> list[tuple[str, list[float], list[float]]]:
    """(model, percent of MACs kept, accuracy), from the original on."""
    rows = [row for row in budgets if row["align"] == "auto"]
    found = []
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = sorted((row for row in rows if row["model"] == name), key=lambda row: -row["MACs kept"])
        kept = [100.0, *(100 * row["MACs kept"] for row in mine)]
        found.append((name, kept, [mine[0]["before"], *(row["after"] for row in mine)]))
    return found


def _pairs(ablation: Sequence[Row]) -> list[tuple[str, float, float, float]]:
    """(model, accuracy before, by plain magnitude pruning, by the defaults), at the same share of the MACs."""
    cells = {
        (row["model"], row["order"], row["allocation"], refit): (row["before"], row[refit])
        for row in ablation
        for refit in ("none", "least-squares")
    }
    names = dict.fromkeys(row["model"] for row in ablation)
    return [(name, *cells[(name, *USUAL)], cells[(name, *OURS)][1]) for name in names]
