"""Parts that pages share: which of many things are shown, how they are cut into charts, and how to do it again."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from onnx_oamip.core.options.validation import kind_of
from onnx_oamip.core.settings import Settings
from onnx_oamip.data.sources import ARRAYS
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
"""Groups that get charts of their own; of more, the largest."""
ROWS = 200
"""Rows in charts and tables; of more, the largest."""
CHART_ROWS = 25
"""Rows in one chart, at most."""
HALVED = 8
"""More rows than this make two charts at least, side by side where there is room."""

_ASKED = frozenset(
    (
        "levels",
        "macs",
        "params",
        "size",
        "threshold",
        "latency",
        "max_drop",
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
"""Settings that say how much and on what; the others say how."""
_OF_A_PLAN = {"apply": ("refit", "seed", "batch_size")}


def again(value: Document, command: str, names: Iterable[str]) -> Section:
    """The section that tells what was asked, with what it ran, and the command; ``names``: settings it takes."""
    settings = value["settings"]
    lines = _command(value, command, names)
    parts: list[Part] = (
        [Code(lines)] if lines else [Note("The data were arrays in memory: no command reads them.")]
    )
    listed: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for name, item in settings.items():
        listed[name in _ASKED].append((name.replace("_", " "), _setting(item)))
    versions = [(name, item or "not installed") for name, item in value["versions"].items()]
    seconds = [(name, f"{item:.2f} s") for name, item in value["timings"].items()]
    files = [("model", value["model"]["sha256"])]
    if value.get("output", {}).get("sha256"):
        files.append(("output", value["output"]["sha256"]))
    blocks = {
        "Budget and data": listed[True],
        "Method": listed[False],
        "Versions": versions,
        "Time by stage": seconds,
    }
    parts.append(Pairs([Block(title, rows) for title, rows in blocks.items()]))
    parts.append(Pairs([Block("SHA-256", files)]))
    return Section("again", "To do it again", "", parts)


def _command(value: Document, command: str, names: Iterable[str]) -> list[str] | None:
    """The command line, an option a line, with the same result; None where the data cannot be named."""
    settings = value["settings"]
    if ARRAYS in (settings["data"], settings["eval_data"]):
        return None
    words: list[tuple[str, ...]] = [("onnx-oamip", command, value["model"]["path"])]
    for option in ("data", "eval_data", "scores", "plan"):
        if settings.get(option) is not None:
            words.append((f"--{option.replace('_', '-')}", settings[option]))
    if command == "frontier":
        words.append(("--levels", ",".join(str(share) for share in settings["levels"])))
        if settings["save_dir"] is not None:
            words.append(("--save-dir", settings["save_dir"]))
    for name in names:
        field = Settings.model_fields[name]
        item, usual = settings[name], field.get_default()
        # What apply is not told it takes from the plan.
        if item == (
            list(usual) if isinstance(usual, tuple) else usual
        ) and name not in _OF_A_PLAN.get(command, ()):
            continue
        if name == "importance" and settings["scores"] is not None:
            continue
        option = f"--{name.replace('_', '-')}"
        if item is True:
            words.append((option,))
        elif isinstance(item, list) and (kind := kind_of(field)) and kind.separator:
            words.append((option, kind.separator.join(map(str, item))))
        else:
            words += [(option, str(one)) for one in (item if isinstance(item, list) else [item])]
    if command != "frontier":
        words.append(("-o", value["output"]["path"] or "OUT.onnx"))
    return [shlex.join(part) for part in words]


def _setting(item: Any) -> str:
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
    """Indices of the largest sizes, at most so many, in their own order."""
    order = np.argsort(-np.asarray(sizes, np.float64), kind="stable")[:most]
    return sorted(order.tolist())


def limited(shown: Sequence[int], every: Sequence[Any], what: str) -> list[Part]:
    """What is to be said where not everything is shown."""
    if len(shown) == len(every):
        return []
    return [
        Note(
            f"Showing the {count(len(shown))} largest of {count(len(every))} {what}; --json lists all."
        )
    ]


def paged(rows: Sequence[Any]) -> list[Sequence[Any]]:
    """Rows cut into charts of about the same height."""
    pages = max(-(-len(rows) // CHART_ROWS), 2 if len(rows) > HALVED else 1)
    edges = np.linspace(0, len(rows), pages + 1).round().astype(int).tolist()
    return [rows[a:b] for a, b in pairwise(edges)]
