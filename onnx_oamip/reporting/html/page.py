"""Shared sections of pages: row limits, division of rows into charts, and the command that reproduces a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from onnx_oamip.core.budgets import KINDS
from onnx_oamip.data.sources import ARRAYS
from onnx_oamip.reporting.command_lines import command_line
from onnx_oamip.reporting.documents import Document
from onnx_oamip.reporting.html.layout import (
    Block,
    Code,
    Note,
    Pairs,
    Part,
    Section,
)
from onnx_oamip.reporting.html.wording import DASH, count

SMALL_CHARTS = 24
"""Largest number of groups with charts of their own; of more groups, the widest are shown."""
ROWS = 200
"""Largest number of rows in charts and tables; of more rows, the largest are shown."""
CHART_ROWS = 25
"""Largest number of rows in one chart."""
HALVED = 8
"""Rows from which on there are at least two charts, side by side on wide screens."""

_ASKED = frozenset(
    (
        *(kind.name for kind in KINDS),
        "levels",
        "data",
        "eval_data",
        "scores",
        "save_dir",
        "evaluated",
        "samples",
        "align",
        "steps",
        "floor",
        "exclude",
        "force",
    )
)
"""Settings listed under "Budget and data"; the others are listed under "Method"."""


def again(value: Document, command: str, names: Iterable[str]) -> Section:
    """Makes the section with the settings, the versions and the command line that reproduces the run.

    Args:
        value: The document of the run.
        command: The command to repeat.
        names: Settings that the command has as options.

    Returns:
        The section.
    """
    parts: list[Part] = []
    if _has_arrays(value):
        parts.append(Note("The data were arrays in memory: no command reads them."))
    else:
        parts.append(Code(command_line(value, command, names)))
    budget_and_data: list[tuple[str, str]] = []
    method: list[tuple[str, str]] = []
    for name, item in value["settings"].items():
        row = (name.replace("_", " "), _setting(item))
        if name in _ASKED:
            budget_and_data.append(row)
        else:
            method.append(row)
    versions = [(name, item or "not installed") for name, item in value["versions"].items()]
    seconds = [(name, f"{item:.2f} s") for name, item in value["timings"].items()]
    files = [("model", value["model"]["sha256"])]
    if value.get("output", {}).get("sha256"):
        files.append(("output", value["output"]["sha256"]))
    blocks = [
        Block("Budget and data", budget_and_data),
        Block("Method", method),
        Block("Versions", versions),
        Block("Time by stage", seconds),
    ]
    parts.append(Pairs(blocks))
    parts.append(Pairs([Block("SHA-256", files)]))
    return Section("again", "To do it again", "", parts)


def _has_arrays(value: Document) -> bool:
    """Tests for data that were passed as arrays, which no command line can name."""
    settings = value["settings"]
    return ARRAYS in (settings["data"], settings["eval_data"])


def _setting(item: Any) -> str:
    """Text of a setting in the tables."""
    if item is None:
        return DASH
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, float):
        return f"{item:g}"
    if isinstance(item, list):
        return ", ".join(_setting(one) for one in item) or DASH
    return str(item)


def largest(sizes: Sequence[float], most: int) -> list[int]:
    """Selects the largest of several things.

    Args:
        sizes: Their sizes.
        most: Largest number to select.

    Returns:
        Ascending indices.
    """
    order = np.argsort(-np.asarray(sizes, np.float64), kind="stable")[:most]
    return sorted(order.tolist())


def limited(
    shown: Sequence[int],
    every: Sequence[Any],
    nouns: str,
) -> list[Part]:
    """Makes a note for a table or a set of charts that does not show everything.

    Args:
        shown: The shown items.
        every: All items.
        nouns: What the items are, in plural.

    Returns:
        The note, or nothing if all are shown.
    """
    if len(shown) == len(every):
        return []
    shares = f"the {count(len(shown))} largest of {count(len(every))} {nouns}"
    return [Note(f"Showing {shares}; --json lists all.")]


def paged(rows: Sequence[Any]) -> list[Sequence[Any]]:
    """Divides rows into charts of about the same height.

    Args:
        rows: All rows.

    Returns:
        The rows of each chart.
    """
    least = 2 if len(rows) > HALVED else 1
    pages = max(-(-len(rows) // CHART_ROWS), least)
    edges = np.linspace(0, len(rows), pages + 1).round().astype(int).tolist()
    return [rows[a:b] for a, b in pairwise(edges)]
