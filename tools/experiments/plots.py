"""The plots of a run, as SVG with text as text, the same bytes for the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .cells import Record, Records, closed, losses, of, pairs, values
from .data import TITLES
from .main_table import METHODS
from .protocol import NETWORKS, PUBLISHED, Protocol
from .studies import RULES

COLOURS = {
    "random": "#999999",
    "critical": "#d95f02",
    "l1": "#66a61e",
    "activation": "#1b9e77",
    "paper": "#7570b3",
    "exact": "#e7298a",
    "decoupled": "#1f78b4",
}
SHOWN = {"fold": "constants folded", "refit": "least-squares refit"}
FORMATS = ("svg",)


def draw(
    out: Path, protocol: Protocol, found: dict[str, Records], formats: tuple[str, ...] = FORMATS
) -> None:
    """All plots into a folder."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "oamip",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
        }
    )
    for name, make in (
        ("methods", _methods),
        ("images", _images),
        ("weights", _weights),
        ("transfer", _transfer),
    ):
        figure = make(protocol, found)
        for kind in formats:
            about = {"Date": None} if kind == "svg" else None
            figure.savefig(out / f"{name}.{kind}", bbox_inches="tight", metadata=about)


def _title(network: str, name: str) -> str:
    return f"{NETWORKS[network].title}, {TITLES[name]}"


def _methods(protocol: Protocol, found: dict[str, Records]) -> Any:
    """Points lost by every method in every row."""
    from matplotlib import pyplot as plt

    rows = pairs(protocol)
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), sharey=True)
    step = 0.7 / len(METHODS)
    for ax, (treatment, title) in zip(axes, SHOWN.items(), strict=True):
        for i, method in enumerate(METHODS):
            lost = losses(found["main"], protocol, method, treatment)
            there = [(k, v) for k, v in enumerate(lost) if v is not None]
            place = [k + (i - (len(METHODS) - 1) / 2) * step for k, _ in there]
            mark = "D" if method == "paper" else "o"
            ax.scatter(
                place,
                [v for _, v in there],
                s=22,
                color=COLOURS[method],
                marker=mark,
                label=method,
                zorder=3,
            )
        ax.set_yscale("symlog", linthresh=1)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_title(title)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xticks(
            range(len(rows)),
            [_title(*r).replace(", ", "\n").replace("-M", "-\nM") for r in rows],
            fontsize=7,
        )
        for k in range(len(rows) - 1):
            ax.axvline(k + 0.5, color="black", linewidth=0.3)
        ax.grid(axis="x", visible=False)
    axes[0].set_ylabel("points of accuracy lost\n(linear up to 1, then logarithmic)")
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def _images(protocol: Protocol, found: dict[str, Records]) -> Any:
    """Every draw of images: what it prunes, and the accuracy."""
    from matplotlib import pyplot as plt

    rows = pairs(protocol, apart=True)
    figure, axes = plt.subplots(1, len(rows), figsize=(2.5 * len(rows), 2.6), squeeze=False)
    for ax, (network, name) in zip(axes[0], rows, strict=True):
        (record,) = of(found["images"], network, name)
        reference = of(found["main"], network, name)[0]["reference"]
        for rule, colour in zip(RULES, (COLOURS["paper"], COLOURS["critical"]), strict=True):
            draws = closed(record[rule]["draws"])
            share = values(draws, "gone", "parameters")
            ax.scatter(
                share,
                values(draws, "accuracy", "fold"),
                s=16,
                color=colour,
                label=f"{rule}, folded",
                zorder=3,
            )
            ax.scatter(
                share,
                values(draws, "accuracy", "refit"),
                s=16,
                facecolors="none",
                edgecolors=colour,
                label=f"{rule}, refit",
                zorder=3,
            )
        ax.axhline(reference, color="black", linewidth=0.8, linestyle="--", label="unpruned")
        ax.set_title(_title(network, name), fontsize=9)
        ax.set_xlabel("parameters removed, %")
    axes[0][0].set_ylabel("test accuracy, %")
    figure.tight_layout()
    figure.legend(
        *axes[0][0].get_legend_handles_labels(),
        loc="lower center",
        ncol=5,
        frameon=False,
        fontsize=8,
        bbox_to_anchor=(0.5, -0.08),
    )
    return figure


def _weights(protocol: Protocol, found: dict[str, Records]) -> Any:
    """Draw the removed share and the accuracy against lambda."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
    marks = dict(zip(PUBLISHED, "os^", strict=True))
    colours = dict(zip(protocol.data, (COLOURS["paper"], COLOURS["critical"]), strict=True))
    for network, name in pairs(protocol):
        (record,) = of(found["weights"], network, name)
        reference = of(found["main"], network, name)[0]["reference"]
        every = [record[f"{w:g}"] for w in protocol.weights]
        style: Record = {
            "marker": marks[network],
            "color": colours[name],
            "markersize": 4,
            "linewidth": 1,
        }
        there = [w for w, e in zip(protocol.weights, every, strict=True) if closed([e])]
        left.plot(
            there, values(closed(every), "gone", "parameters"), label=_title(network, name), **style
        )
        right.plot(there, [reference - e["accuracy"]["fold"] for e in closed(every)], **style)
    for ax, title in ((left, "parameters removed, %"), (right, "points lost, constants folded")):
        ax.set_xscale("log")
        ax.set_xticks(protocol.weights, [f"{w:g}" for w in protocol.weights])
        ax.minorticks_off()
        ax.set_xlabel("lambda")
        ax.set_title(title, fontsize=9)
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="center left",
        bbox_to_anchor=(0.92, 0.5),
        frameon=False,
        fontsize=8,
    )
    return figure


def _transfer(protocol: Protocol, found: dict[str, Records]) -> Any:
    """Accuracy of full, masked and randomly masked networks, every seed a point."""
    from matplotlib import pyplot as plt

    rows = [(n, s, t) for n, s in pairs(protocol, apart=True) for t in protocol.data if t != s]
    figure, axes = plt.subplots(1, len(rows), figsize=(2.3 * len(rows), 2.4), squeeze=False)
    kinds = {"full": "black", **{m: COLOURS[m] for m in ("paper", "decoupled", "random")}}
    for ax, (network, source, target) in zip(axes[0], rows, strict=True):
        records = [
            r for k, r in found["transfer"].items() if k.startswith(f"{network}-{source}-{target}-")
        ]
        for i, (kind, colour) in enumerate(kinds.items()):
            points = [float(v) for v in values(records, kind) if v is not None]
            ax.scatter([i] * len(points), points, s=18, color=colour, zorder=3)
            ax.hlines(np.mean(points), i - 0.25, i + 0.25, color=colour)
        ax.set_xticks(
            range(len(kinds)), ["full", "paper", "decoupled", "random"], fontsize=8, rotation=30
        )
        ax.set_xlim(-0.5, len(kinds) - 0.5)
        ax.set_title(f"{NETWORKS[network].title}\n{TITLES[source]} → {TITLES[target]}", fontsize=9)
    axes[0][0].set_ylabel("test accuracy, %")
    figure.tight_layout()
    return figure
