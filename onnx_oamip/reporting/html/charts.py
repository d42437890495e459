"""Charts as inline SVG: the same numbers give the same bytes.

One unit of a chart is one CSS pixel at the width of a telephone, and a page puts several charts side by side, so that
text has the same size on every screen. Text remains text, in the reader's fonts; it is measured in a wide font, so that
it fits. Matplotlib's metadata, its style rules and unreferenced ids are removed, and the ids that remain differ from
chart to chart.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from xml.etree import ElementTree

import numpy as np

_LOG = logging.getLogger("matplotlib")
_LEVEL = _LOG.level
_LOG.setLevel(logging.ERROR)  # it reports on its font cache on stderr

import matplotlib.style  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.font_manager import FontProperties  # noqa: E402
from matplotlib.patches import PathPatch, Rectangle  # noqa: E402
from matplotlib.path import Path  # noqa: E402
from matplotlib.textpath import TextToPath  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator  # noqa: E402

_LOG.setLevel(_LEVEL)

from onnx_oamip.core.printable import visible  # noqa: E402
from onnx_oamip.core.records import Bools, Floats  # noqa: E402
from onnx_oamip.reporting.html.network import Box, Network  # noqa: E402

WIDE, NARROW = 420, 190
INK, MUTED, GRID, BEFORE, AFTER, MARK = (
    "#1c2733",
    "#5d6b7a",
    "#e4e9ef",
    "#cbd5e0",
    "#1f5fa8",
    "#c2571a",
)
SIZE = 10.5
_FONT = FontProperties(family=["DejaVu Sans"], size=SIZE)
_STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": SIZE,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "xtick.major.pad": 6,
    "ytick.major.size": 3,
    "svg.fonttype": "none",
    "path.simplify": False,
}
_BOX, _TALL, _BETWEEN, _BELOW, _ASIDE = 140, 38, 14, 18, 20
"""Sizes in pixels of a network: width and height of a box, gaps between boxes and rows, and room at the sides."""
_ROW, _NAME, _VALUE, _TOP, _FOOT = 20, 160, 92, 6, 44
"""Sizes in pixels of a chart with rows: height of a row, widths of the columns of names and values, margins."""


def widths(rows: Sequence[tuple[str, int, int]], salt: str, most: int) -> str:
    """Draws the widths of groups as horizontal bars.

    Args:
        rows: Name of each group, its units before and after pruning.
        salt: Prefix of the ids in the drawing.
        most: End of the axis.

    Returns:
        SVG.
    """
    values = [f"{units:,} → {kept:,}" for _, units, kept in rows]
    return _nested_bars(
        rows, values, salt=salt, most=most, title="Channels before and after", axis="channels"
    )


def agreement(rows: Sequence[tuple[str, int, int]], salt: str, most: int) -> str:
    """Draws how many of the kept units of each group every draw of the samples keeps.

    Args:
        rows: Name of each group, its kept units, and those of them that all draws keep.
        salt: Prefix of the ids in the drawing.
        most: End of the axis.

    Returns:
        SVG.
    """
    values = [f"{agreed:,} of {kept:,}" for _, kept, agreed in rows]
    return _nested_bars(
        rows, values, salt=salt, most=most, title="Units that all draws keep", axis="kept units"
    )


def _nested_bars(
    rows: Sequence[tuple[str, int, int]],
    values: Sequence[str],
    *,
    salt: str,
    most: int,
    title: str,
    axis: str,
) -> str:
    """A light bar per row, and inside it a dark one for a part of the same units."""
    with _figure(WIDE, _TOP + _FOOT + _ROW * len(rows), salt, title) as (fig, done):
        axes = _rows(fig, [name for name, _, _ in rows])
        places = np.arange(len(rows))
        axes.barh(places, [whole for _, whole, _ in rows], height=0.62, color=BEFORE)
        axes.barh(places, [part for _, _, part in rows], height=0.62, color=AFTER)
        axes.set_xlim(0, most)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_xlabel(axis)
        _values(axes, values)
    return done()


def errors(
    rows: Sequence[tuple[str, float, float]],
    salt: str,
    span: tuple[float, float],
) -> str:
    """Draws the errors of refitted nodes: two dots per row on a logarithmic axis.

    Args:
        rows: Name of each node, its error before and after the refit.
        salt: Prefix of the ids in the drawing.
        span: Range of the axis.

    Returns:
        SVG.
    """
    with _figure(
        WIDE,
        _TOP + _FOOT + _ROW * len(rows),
        salt,
        "Relative error of every node, refitted",
    ) as (fig, done):
        axes = _rows(fig, [name for name, _, _ in rows])
        places = np.arange(len(rows))
        low = span[0]
        before, after = (np.maximum([row[i] for row in rows], low) for i in (1, 2))
        axes.set_xscale("log")
        axes.set_xlim(*span)
        axes.hlines(places, after, before, color=BEFORE, linewidth=2.5)
        axes.scatter(
            before,
            places,
            s=26,
            color="white",
            edgecolors=MARK,
            linewidths=1.4,
            zorder=3,
            clip_on=False,
        )
        axes.scatter(after, places, s=26, color=AFTER, zorder=4, clip_on=False)
        _powers(axes, "x", span)
        axes.grid(axis="x")
        axes.set_xlabel("error / variance of the output")
        _values(axes, [f"{a:.2g} → {b:.2g}" for _, a, b in rows])
    return done()


def sensitivity(
    shares: Floats,
    losses: Floats,
    chosen: float,
    span: tuple[float, float],
    salt: str,
) -> str:
    """Draws the sensitivity of a group.

    Args:
        shares: Kept shares of the group (levels,).
        losses: Loss of the model at each share (levels,).
        chosen: The share that was chosen, which is marked.
        span: Range of the logarithmic axis; smaller losses are drawn at its lower end.
        salt: Prefix of the ids in the drawing.

    Returns:
        SVG.
    """
    with _figure(NARROW, 146, salt, "Loss by share kept") as (fig, done):
        axes = _axes(fig, 46, 17, 8, 42)
        floor = np.maximum(losses, span[0])
        axes.set_yscale("log")
        axes.set_ylim(*span)
        axes.set_xlim(0, 1)
        axes.grid()
        axes.axvline(chosen, color=MARK, linewidth=1, clip_on=False)
        axes.plot(
            shares,
            floor,
            color=AFTER,
            linewidth=1.4,
            marker="o",
            markersize=3,
            clip_on=False,
        )
        height = np.exp(np.interp(chosen, shares, np.log(floor)))
        axes.plot(
            [chosen],
            [height],
            marker="o",
            markersize=7,
            color="white",
            markeredgecolor=MARK,
            markeredgewidth=1.6,
            clip_on=False,
            zorder=5,
        )
        _powers(axes, "y", span)
        _shares(axes, [0, 0.5, 1])
        axes.set_xlabel("share kept")
        axes.set_ylabel("loss")
    return done()


def scores(values: Floats, kept: Bools, salt: str) -> str:
    """Draws a histogram of the scores of a group, on a logarithmic axis if they span decades.

    Args:
        values: Scores (units,).
        kept: Keep mask (units,).
        salt: Prefix of the ids in the drawing.

    Returns:
        SVG.
    """
    with _figure(NARROW, 146, salt, "Scores of the units") as (fig, done):
        axes = _axes(fig, 46, 17, 8, 42)
        values, kept = values[np.isfinite(values)], kept[np.isfinite(values)]
        positive = values[values > 0]
        low, high = (float(positive.min()), float(positive.max())) if len(positive) else (0.0, 0.0)
        logarithmic = low > 0 and high > 30 * low
        if logarithmic:
            edges = np.geomspace(low, high, 17)
            axes.set_xscale("log")
        else:
            least = float(values.min(initial=0))
            most = float(values.max(initial=0))
            edges = np.linspace(least, most if most > least else least + 1, 17)
        drawn = np.clip(values, edges[0], edges[-1])
        for units, colour in ((drawn, BEFORE), (drawn[kept], AFTER)):
            axes.stairs(np.histogram(units, edges)[0], edges, fill=True, color=colour)
        axes.set_ylim(0, None)
        axes.set_xlim(edges[0], edges[-1])
        if logarithmic:
            _powers(axes, "x", (low, high))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.set_xlabel("score")
        axes.set_ylabel("units")
    return done()


def outputs(
    rows: Sequence[tuple[str, float | None, float]],
    allowed: float | None,
    salt: str,
) -> str:
    """Draw the points that every output lost, two dots a row: before the refit, if there was one, and after it.

    Args:
        rows: (output, points lost before the refit or None, points lost).
        allowed: The most that may be lost, None without a limit.
        salt: Makes ids of the chart its own.

    Returns:
        The chart as SVG.
    """
    with _figure(WIDE, _TOP + _FOOT + _ROW * len(rows), salt, "Points lost by every output") as (
        fig,
        done,
    ):
        axes = _rows(fig, [name for name, _, _ in rows])
        places = np.arange(len(rows))
        after = np.asarray([lost for _, _, lost in rows])
        before = np.asarray([np.nan if lost is None else lost for _, lost, _ in rows])
        known = np.isfinite(before)
        top = max(float(np.append(after, before[known]).max()), allowed or 0.0, 1.0)
        axes.set_xlim(0, 1.05 * top)
        if allowed is not None:
            axes.axvline(allowed, color=MARK, linewidth=1.2, linestyle=(0, (5, 3)))
        axes.hlines(places[known], after[known], before[known], color=BEFORE, linewidth=2.5)
        axes.scatter(
            before[known],
            places[known],
            s=26,
            color="white",
            edgecolors=MARK,
            linewidths=1.4,
            zorder=3,
            clip_on=False,
        )
        axes.scatter(after, places, s=26, color=AFTER, zorder=4, clip_on=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x")
        axes.set_xlabel("points lost")
        _values(axes, [f"{lost:.2f}" for lost in after])
    return done()


def intervals(
    rows: Sequence[tuple[str, float, tuple[float, float] | None]],
    label: str,
    salt: str,
    *,
    percent: bool,
) -> str:
    """Draw one number of several models as bars, with intervals where they are known.

    Args:
        rows: Name of each model, its number, and the interval of that.
        label: What the number is.
        salt: Prefix of the ids in the drawing.
        percent: The numbers are shares.

    Returns:
        SVG.
    """
    with _figure(WIDE, _TOP + _FOOT + _ROW * len(rows), salt, label) as (fig, done):
        axes = _rows(fig, [name for name, _, _ in rows])
        places = np.arange(len(rows))
        values = np.asarray([value for _, value, _ in rows], np.float64)
        axes.barh(places, values, height=0.62, color=AFTER)
        known = [(place, found) for place, (_, _, found) in enumerate(rows) if found is not None]
        if known:
            marked, ends = zip(*known, strict=True)
            low, high = zip(*ends, strict=True)
            axes.hlines(marked, low, high, color=MARK, linewidth=2)
        tops = [float(values.max(initial=0)), *(high for _, (_, high) in known)]
        least = 1.0 if percent else 0.1
        axes.set_xlim(0, max(1.02 * max(tops), least))
        scale = 100 if percent else 1
        unit = " %" if percent else ""
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{scale * v:.3g}{unit}"))
        axes.set_xlabel(label)
        _values(axes, [f"{scale * value:.{1 if percent else 2}f}{unit}" for value in values])
    return done()


def network(found: Network, salt: str) -> str:
    """Draw the layers of a network as boxes in rows, each with its channels before and after pruning.

    Args:
        found: The network.
        salt: Prefix of the ids in the drawing.

    Returns:
        SVG.
    """
    places = found.places()
    half = max((abs(column) for column, _ in places), default=0.0)
    deepest = max((row for _, row in places), default=0)
    width = (2 * half + 1) * (_BOX + _BETWEEN) + 2 * _ASIDE
    height = (deepest + 1) * (_TALL + _BELOW) + _BELOW
    with _figure(width, height, salt, "Layers with their channels before and after") as (fig, done):
        axes = fig.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        axes.axis("off")
        corners = [
            (
                (column + half) * (_BOX + _BETWEEN) + _ASIDE + _BETWEEN / 2,
                row * (_TALL + _BELOW) + _BELOW,
            )
            for column, row in places
        ]
        for start, end in sorted(found.edges):
            is_next = places[end][1] - places[start][1] == 1
            axes.add_patch(_edge(corners[start], corners[end], is_next))
        for box, corner in zip(found.boxes, corners, strict=True):
            _box(axes, box, corner)
    return done()


def _edge(start: tuple[float, float], end: tuple[float, float], is_next: bool) -> PathPatch:
    """Curve from a box to one of the next row, or past boxes in between to a later one."""
    if is_next:
        first = (start[0] + _BOX / 2, start[1] + _TALL)
        last = (end[0] + _BOX / 2, end[1])
        bend = (last[1] - first[1]) / 2
        points = [first, (first[0], first[1] + bend), (last[0], last[1] - bend), last]
    else:
        first = (start[0] + _BOX, start[1] + _TALL / 2)
        last = (end[0] + _BOX, end[1] + _TALL / 2)
        side = max(first[0], last[0]) + 1.3 * _ASIDE
        points = [first, (side, first[1]), (side, last[1]), last]
    codes = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
    return PathPatch(Path(points, codes), facecolor="none", edgecolor=MUTED, linewidth=1.1)


def _box(axes: Axes, box: Box, corner: tuple[float, float]) -> None:
    """A box with its name, its operator and channels, and the kept share as a bar at its foot."""
    left, top = corner
    axes.add_patch(
        Rectangle(corner, _BOX, _TALL, facecolor="#f5f7fa", edgecolor=BEFORE, linewidth=1)
    )
    text = box.kind
    if box.before is not None and box.after is not None:
        text += f"  {box.before:,} → {box.after:,}"
        foot = (left, top + _TALL - 4)
        axes.add_patch(Rectangle(foot, _BOX, 4, facecolor=BEFORE))
        axes.add_patch(Rectangle(foot, _BOX * box.after / box.before, 4, facecolor=AFTER))
    name = shortened(box.name, _BOX - 10)
    axes.text(left + 6, top + 15, name, fontsize=9.5, color=INK, va="baseline")
    axes.text(
        left + 6, top + 29, shortened(text, _BOX - 4), fontsize=8.5, color=MUTED, va="baseline"
    )


def drops(
    tries: Sequence[tuple[float, float, bool]],
    allowed: float,
    salt: str,
) -> str:
    """Draws the trials of a search for the smallest model.

    A trial that misses the limit by far is a triangle at the upper edge, so that the axis resolves the others.

    Args:
        tries: Share of MACs kept, points of accuracy lost, and whether the trial was chosen.
        allowed: Largest loss that is allowed, in points.
        salt: Prefix of the ids in the drawing.

    Returns:
        SVG.
    """
    with _figure(WIDE, 270, salt, "Points lost by share of MACs kept") as (fig, done):
        axes = _axes(fig, 50, 14, 12, 44)
        axes.grid()
        axes.axhline(allowed, color=MARK, linewidth=1.2, linestyle=(0, (5, 3)))
        x, y, taken = (np.asarray(column) for column in zip(*tries, strict=True))
        low = min(0.0, float(y.min()))
        high = max(float(y.max()), allowed)
        if allowed > 0:
            far = y > 5 * allowed
        else:
            far = np.zeros(len(y), bool)
        if far.any():
            high = max(float(y[~far].max(initial=0)), 2 * allowed)
        foot = low - 0.08 * max(high - low, 0.1)
        top = high + 0.12 * max(high - low, 0.1)
        shown = np.where(far, top, y)
        order = np.argsort(x, kind="stable")
        axes.plot(x[order], shown[order], color=BEFORE, linewidth=1.4, zorder=2)
        for part, marker in ((~far, "o"), (far, "^")):
            axes.scatter(
                x[part],
                shown[part],
                s=32,
                marker=marker,
                color="white",
                edgecolors=AFTER,
                linewidths=1.4,
                zorder=3,
                clip_on=False,
            )
        axes.scatter(x[taken], shown[taken], s=52, color=AFTER, zorder=4, clip_on=False)
        axes.set_xlim(0, 1)
        axes.set_ylim(foot, top)
        _shares(axes)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("share of MACs kept")
        axes.set_ylabel("points lost")
    return done()


def frontier(
    points: Sequence[tuple[float, float]],
    whole: float | None,
    name: str,
    salt: str,
) -> str:
    """Draws a quality over the share of MACs kept.

    Args:
        points: Share of MACs kept, and the quality in [0, 1].
        whole: Quality of the original; None if unknown.
        name: Name of the quality.
        salt: Prefix of the ids in the drawing.

    Returns:
        SVG.
    """
    with _figure(WIDE, 270, salt, f"{name} by share of MACs kept") as (fig, done):
        axes = _axes(fig, 56, 20, 22, 44)
        axes.grid()
        x, y = (np.asarray(column, np.float64) for column in zip(*sorted(points), strict=True))
        seen = np.append(y, [] if whole is None else [whole])
        if whole is not None:
            axes.axhline(whole, color=MARK, linewidth=1.2, linestyle=(0, (5, 3)))
            axes.scatter(
                [1],
                [whole],
                s=34,
                color="white",
                edgecolors=MARK,
                linewidths=1.4,
                zorder=4,
                clip_on=False,
            )
        axes.plot(
            x,
            y,
            color=AFTER,
            linewidth=1.6,
            marker="o",
            markersize=5.5,
            zorder=3,
            clip_on=False,
        )
        low = float(seen.min())
        high = float(seen.max())
        room = max(high - low, 0.002)
        axes.set_xlim(0, 1)
        axes.set_ylim(low - 0.22 * room, high + 0.12 * room)
        for a, b in zip(x.tolist(), y.tolist(), strict=True):
            axes.annotate(
                f"{100 * b:.1f}",
                (a, b),
                (5, -12),
                textcoords="offset points",
                fontsize=9.5,
                zorder=6,
            )
        _shares(axes)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.4g} %"))
        axes.set_xlabel("share of MACs kept")
        axes.set_title(name, fontsize=SIZE, color=MUTED, loc="left", pad=6)
    return done()


def latency(points: Sequence[tuple[float, float]], salt: str) -> str:
    """Draws the relative latency over the share of MACs kept, with the line on which the two are equal.

    Args:
        points: Share of MACs kept, and latency relative to the original.
        salt: Prefix of the ids in the drawing.

    Returns:
        SVG.
    """
    with _figure(WIDE, 270, salt, "Latency by share of MACs kept") as (fig, done):
        axes = _axes(fig, 56, 20, 22, 44)
        axes.grid()
        x, y = (np.asarray(column, np.float64) for column in zip(*sorted(points), strict=True))
        axes.plot([0, 1], [0, 1], color=MARK, linewidth=1.2, linestyle=(0, (5, 3)))
        axes.plot(
            x,
            y,
            color=AFTER,
            linewidth=1.6,
            marker="o",
            markersize=5.5,
            zorder=3,
            clip_on=False,
        )
        for a, b in zip(x.tolist(), y.tolist(), strict=True):
            axes.annotate(
                f"{100 * b:.0f}",
                (a, b),
                (0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=9.5,
                zorder=6,
            )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, max(1.0, 1.12 * float(y.max())))
        _shares(axes)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.4g} %"))
        axes.set_xlabel("share of MACs kept")
        axes.set_title("latency, of the original's", fontsize=SIZE, color=MUTED, loc="left", pad=6)
    return done()


def decades(values: Sequence[float]) -> tuple[float, float]:
    """Chooses the range of a logarithmic axis.

    Args:
        values: The values to show; those that are not positive and finite are ignored.

    Returns:
        Whole powers of ten around the values, at most six and at least one decade apart.
    """
    shown = np.asarray(values, np.float64)
    shown = shown[np.isfinite(shown) & (shown > 0)]
    if not len(shown):
        return 0.1, 1.0
    high = int(np.ceil(np.log10(shown.max())))
    lowest = int(np.floor(np.log10(shown.min())))
    low = min(max(lowest, high - 6), high - 1)
    return 10.0**low, 10.0**high


# ------------------------------------------------------------------------------------------------------------- parts


def _axes(
    fig: Figure,
    left: float,
    right: float,
    top: float,
    foot: float,
) -> Axes:
    """Axes with margins in pixels."""
    width, height = (72 * v for v in fig.get_size_inches())
    return fig.add_axes(
        (
            left / width,
            foot / height,
            (width - left - right) / width,
            (height - top - foot) / height,
        )
    )


def _rows(fig: Figure, names: Sequence[str]) -> Axes:
    """Axes with one named row after another, from the top."""
    axes = _axes(fig, _NAME, _VALUE, _TOP, _FOOT)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.yaxis.set_major_locator(FixedLocator(range(len(names))))
    axes.set_yticklabels([shortened(name, _NAME - 10) for name in names], color=INK)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return axes


def _values(axes: Axes, texts: Sequence[str]) -> None:
    for place, text in enumerate(texts):
        axes.annotate(
            text,
            (1, place),
            (_VALUE - 2, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="center_baseline",
            fontsize=9.5,
        )


def _shares(axes: Axes, ticks: Sequence[float] = (0, 0.25, 0.5, 0.75, 1)) -> None:
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f} %"))


def _powers(axes: Axes, side: str, span: tuple[float, float]) -> None:
    """At most four ticks at powers of ten."""
    axis = axes.xaxis if side == "x" else axes.yaxis
    raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    if (
        np.log10(span[1] / span[0]) < 2
        and np.floor(np.log10(span[1])) == np.ceil(np.log10(span[0])) - 1
    ):
        axis.set_major_locator(FixedLocator([span[0], span[1]]))  # no power of ten in between
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.1g}"))
    else:
        axis.set_major_locator(LogLocator(numticks=4))
        axis.set_major_formatter(
            FuncFormatter(lambda v, _: "10" + f"{round(np.log10(v))}".translate(raised))
        )
    axis.set_minor_locator(NullLocator())


def shortened(text: str, available: float) -> str:
    """Shortens a name to a width in pixels, measured in a wide font.

    Words shrink to their first letter, from the left, as in ``e.l.3.attention.dense.weight``; numbers, which
    distinguish layers, are kept. A name that is too long even so loses its middle.

    Args:
        text: The name.
        available: Largest width in pixels.

    Returns:
        The name, with invisible characters spelt out.
    """
    text = visible(text)[:400]
    found = text
    words = list(re.finditer(r"[^\W\d_]{2,}(?=[./_:])", text))
    for i in range(len(words)):
        if _extent(found) <= available:
            return found
        end = words[i].end()
        found = (
            re.sub(r"([^\W\d_])[^\W\d_]+(?=[./_:])", r"\1", text[:end] + text[end : end + 1])
            + text[end + 1 :]
        )
    kept = len(found)
    short = found
    while kept > 2 and (extent := _extent(short)) > available:
        kept = max(min(kept - 1, int(kept * available / extent)), 2)
        short = f"{found[: kept - kept // 2]}…{found[-(kept // 2) :]}"
    return short


def _extent(text: str) -> float:
    """Width in pixels in a wide font; characters that it lacks count as a box, those of wide scripts as more."""
    with _quietly():
        extent, _, _ = TextToPath().get_text_width_height_descent(text, _FONT, False)
    return float(extent) + 0.5 * SIZE * sum(ord(c) > 0x2E7F for c in text)


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        # The reader's fonts draw the texts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


@contextmanager
def _figure(
    width: float,
    height: float,
    salt: str,
    label: str,
) -> Iterator[tuple[Figure, Callable[[], str]]]:
    """Context of a drawing: a figure in pixels, and a function that gives the SVG once the context has ended."""
    result: list[str] = []
    with _quietly(), matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": salt}]):
        figure = Figure((width / 72, height / 72), dpi=72, facecolor="none")
        FigureCanvasSVG(figure)
        yield figure, lambda: result[0]
        for axes in figure.axes:
            axes.set_facecolor("none")
        stream = io.BytesIO()
        figure.savefig(
            stream,
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
        result.append(_inline(stream.getvalue(), salt, label, width, height))


def _inline(
    content: bytes,
    salt: str,
    label: str,
    width: float,
    height: float,
) -> str:
    """Strips an SVG file to the drawing: no prologue, namespaces, page-wide style rules, or unreferenced ids."""
    root = ElementTree.fromstring(content)
    used = set(re.findall(rb"(?:url\(#|href=\"#)([^)\"]+)", content))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.tail = None
        for child in [c for c in element if c.tag.rpartition("}")[2] in ("metadata", "style")]:
            element.remove(child)
        if element.text is not None and not element.text.strip() and element.tag != "text":
            element.text = None
        for name in list(element.attrib):
            value = element.attrib.pop(name)
            name = name.rpartition("}")[2]
            if name == "id":
                if value.encode() not in used:
                    continue
                value = f"{salt}-{value}"
            if name == "href":
                value = f"#{salt}-{value[1:]}"
            else:
                value = value.replace("url(#", f"url(#{salt}-")
            element.set(name, re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", value))
    root.attrib.clear()
    root.attrib.update(
        {
            "role": "img",
            "aria-label": label,
            "viewBox": f"0 0 {width:g} {height:g}",
            "width": f"{width:g}",
            "height": f"{height:g}",
        }
    )
    return ElementTree.tostring(root, encoding="unicode")
