"""Page of ``compare``, made from its document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from onnx_oamip.core.budgets import COUNTED
from onnx_oamip.reporting.documents import Document
from onnx_oamip.reporting.html import charts
from onnx_oamip.reporting.html.layout import (
    Block,
    Card,
    Cell,
    Figure,
    Figures,
    Page,
    Pairs,
    Part,
    Section,
    Table,
    render,
)
from onnx_oamip.reporting.html.page import ROWS, largest, limited
from onnx_oamip.reporting.html.wording import DASH, count, number, percent, short
from onnx_oamip.reporting.side_by_side import lost
from onnx_oamip.reporting.tables.parts import plural, points


def compare_page(value: Document) -> bytes:
    """Make the page that shows several models of one original side by side.

    Args:
        value: Document of ``compare``.

    Returns:
        An HTML file; the same document gives the same bytes.
    """
    original = value["original"]
    models = value["compared_models"]
    cards = [
        Card(kind.label, short(original[kind.cost], kind.unit), "of the original")
        for kind in COUNTED
    ]
    sections = [
        _picture(models),
        _models(value),
        _outputs(models),
        _widths(models),
        _differences(value),
    ]
    return render(
        Page(
            kicker="Compared by onnx-oamip",
            title=PurePath(original["path"]).name,
            lead=[
                _sentence(models),
                f"{plural(len(models), 'model')} of {original['path']}",
                *(f"Limit broken: {sentence}." for sentence in value.get("broken", ())),
            ],
            cards=cards,
            sections=[section for section in sections if section is not None],
        )
    )


def _sentence(models: Sequence[Document]) -> str:
    """The smallest and the most faithful model, in one sentence."""
    smallest = min(models, key=lambda model: model["bytes"])
    text = f"{smallest['name']} is the smallest, with {percent(smallest['shares']['bytes'])} of the bytes"
    known = [model for model in models if lost(model["verification"]) is not None]
    if known:
        losses = {model["name"]: lost(model["verification"]) or 0.0 for model in known}
        best = min(losses, key=lambda name: losses[name])
        least = points(losses[best])
        if len(losses) > 1 and len({points(loss) for loss in losses.values()}) == 1:
            text += f"; every model loses {least} points"
        else:
            text += f", and {best} loses least, {least} points"
    return f"{text}."


def _picture(models: Sequence[Document]) -> Section:
    figures = []
    for key, label in (("bytes", "bytes, of the original's"), ("macs", "MACs, of the original's")):
        rows = [(m["name"], m["shares"][key] or 0.0, None) for m in models]
        figures.append(Figure(charts.intervals(rows, label, f"c{key}", percent=True)))
    timed = [m for m in models if _latency(m) is not None]
    if timed:
        ratios = [(m["name"], _latency(m)) for m in timed]
        rows_of_time = [(name, r["median"], (r["low"], r["high"])) for name, r in ratios]
        label = "time, of the original's"
        figures.append(Figure(charts.intervals(rows_of_time, label, "ctime", percent=True)))
    judged = [(m["name"], lost(m["verification"])) for m in models]
    known = [(name, value, None) for name, value in judged if value is not None]
    if known:
        label = "points lost by the worst output"
        figures.append(Figure(charts.intervals(known, label, "clost", percent=False)))
    lead = "Shorter is better everywhere. The line on a bar of time is its 95 % interval."
    return Section("picture", "At a glance", lead, [Figures(figures, "wide")])


def _latency(model: Document) -> Any:
    """The measured latency of a model; None where there is none or it is in doubt."""
    verification = model["verification"]
    found = verification and verification["latency"]
    return None if not found or found["doubt"] else found


def _row(model: Document, first: Sequence[str], last: Sequence[str]) -> list[str]:
    """Cells of one model; ``first`` and ``last`` name measures in percent in front and at the end."""
    found = model["verification"] or {}
    ratio = _latency(model)
    if ratio is None:
        time = DASH
    else:
        bounds = f"{percent(ratio['low'])} to {percent(ratio['high'])}"
        time = f"{percent(ratio['median'])} ({bounds})"
    zipped = model["zip_bytes"]
    shares = {kind.cost: percent(model["shares"][kind.cost]) for kind in COUNTED}
    return [
        model["name"],
        shares["bytes"],
        *(percent(found.get(name), 2) for name in first),
        time,
        shares["macs"],
        shares["params"],
        count(model["bytes"]),
        DASH if zipped is None else count(zipped),
        *(percent(found.get(name), 2) for name in last),
        number(found.get("output_relative_error")),
    ]


def _models(value: Document) -> Section:
    """Size, measures and time of every model, and their files."""
    models = value["compared_models"]
    has_labels = any((m["verification"] or {}).get("accuracy_after") is not None for m in models)
    # Deciding columns come first: a telephone shows three of them.
    first = {"accuracy_after": ">accuracy"} if has_labels else {"agreement": ">agreement"}
    last = {"agreement": ">agreement"} if has_labels else {}
    rows = [_row(model, tuple(first), tuple(last)) for model in models]
    columns = (
        "model",
        ">file",
        *first.values(),
        ">time (95 %)",
        ">MACs",
        ">parameters",
        ">bytes",
        ">zipped",
        *last.values(),
        ">output error",
    )
    has_reports = any(m["report"] for m in models)
    files = [
        [m["name"], m["path"] or "(not written)", *([m["report"] or DASH] * has_reports)]
        for m in models
    ]
    digests = [(m["name"], m["sha256"] or DASH) for m in models]
    parts: list[Part] = [
        Table.of(columns, rows),
        Table.of(("model", "file", *(["report"] * has_reports)), files),
        Pairs([Block("SHA-256", digests)]),
    ]
    before = next(
        (m["verification"]["accuracy_before"] for m in models if m["verification"]),
        None,
    )
    lead = "Shares are of the original's; time is measured side by side with the original."
    if before is not None:
        lead += f" The original has {percent(before, 2)} accuracy."
    return Section("models", "Models", lead, parts)


def _outputs(models: Sequence[Document]) -> Section | None:
    """Points lost by every output of every model."""
    by_model = [
        {m["term"]: m for m in (model["verification"] or {"outputs": []})["outputs"]}
        for model in models
    ]
    terms = list(dict.fromkeys(term for measures in by_model for term in measures))
    if not terms:
        return None
    rows = []
    for term in terms[:ROWS]:
        found = [measures.get(term) for measures in by_model]
        first = next(measure for measure in found if measure)
        lost_points = (DASH if m is None else points(m["lost"]) for m in found)
        rows.append([term, first["measure"], *lost_points])
    columns = ("output", "measure", *(f">{model['name']}" for model in models))
    parts: list[Part] = [Table.of(columns, rows), *limited(terms[:ROWS], terms, "outputs")]
    return Section("outputs", "Outputs", "Points that every output lost, by its measure.", parts)


def _widths(models: Sequence[Document]) -> Section | None:
    """Units that every model keeps of every group."""
    with_groups = [model for model in models if model["groups"]]
    if not with_groups:
        return None
    units = {g["name"]: g["units"] for model in with_groups for g in model["groups"]}
    names = list(units)
    shown = largest(list(units.values()), ROWS)
    kept = [{g["name"]: g["kept"] for g in model["groups"]} for model in with_groups]
    rows = []
    for i in shown:
        name = names[i]
        cells = [
            Cell(count(widths[name]), widths[name] / units[name]) if name in widths else Cell(DASH)
            for widths in kept
        ]
        rows.append([name, count(units[name]), *cells])
    columns = ("group", ">units", *(f"#{model['name']}" for model in with_groups))
    parts: list[Part] = [Table.of(columns, rows), *limited(shown, names, "groups")]
    return Section("widths", "Widths", "Units that every model keeps of each group.", parts)


def _differences(value: Document) -> Section | None:
    """Methods and settings of the runs, where they differ."""
    models = value["compared_models"]
    rows = [
        [row["setting"].replace("_", " "), *map(_text, row["values"])]
        for row in value["differences"]
    ]
    if not rows:
        return None
    columns = ("setting", *(model["name"] for model in models))
    return Section(
        "settings",
        "How they were made",
        "Settings in which the runs differ.",
        [Table.of(columns, rows)],
    )


def _text(value: Any) -> str:
    """A setting in a cell."""
    if value is None:
        return DASH
    return value if isinstance(value, str) else json.dumps(value)
