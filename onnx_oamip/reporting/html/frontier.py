"""Page of ``frontier``, made from its document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from onnx_oamip.core.budgets import COUNTED
from onnx_oamip.core.records import Frontier
from onnx_oamip.core.settings import Settings
from onnx_oamip.reporting import documents
from onnx_oamip.reporting.command_lines import knee_command
from onnx_oamip.reporting.documents import Document
from onnx_oamip.reporting.html import charts
from onnx_oamip.reporting.html.layout import (
    Bullets,
    Card,
    Cell,
    Figure,
    Figures,
    Note,
    Page,
    Part,
    Section,
    Table,
    render,
)
from onnx_oamip.reporting.html.page import (
    ROWS,
    again,
    largest,
    limited,
)
from onnx_oamip.reporting.html.wording import (
    count,
    number,
    percent,
    short,
)
from onnx_oamip.reporting.tables.parts import latency_cell, plural

ASKED = tuple(name for name in Settings.model_fields if name not in ("macs", "force"))
"""Settings that the command ``frontier`` has as options."""


def frontier_page(found: Frontier) -> bytes:
    """Makes the page of a frontier.

    Args:
        found: The result of ``frontier``.

    Returns:
        An HTML file; the same result gives the same bytes.
    """
    value = documents.frontier(found)
    model = value["model"]["path"]
    settings = value["settings"]
    before = value["before"]
    how = f"Scores: {value['importance']}. Allocation: {settings['allocate']}. Refit: {settings['refit']}."
    made = [p for p in value["points"] if p["reason"] is None]
    cards = [
        Card(
            kind.label,
            short(before[kind.cost], kind.unit),
            f"{count(before[kind.cost])}{kind.detail}",
        )
        for kind in COUNTED
    ]
    if before["accuracy"] is not None:
        cards.append(
            Card(
                "Accuracy",
                percent(before["accuracy"], 2),
                f"on {plural(settings['evaluated'], 'sample')}",
            )
        )
    sections = [
        _curve(value, made),
        _points(value),
        _kept(value, made),
        again(value, "frontier", ASKED),
    ]
    return render(
        Page(
            kicker="Frontier by onnx-oamip",
            title=PurePath(model).name,
            lead=[
                f"{model} at {plural(len(value['points']), 'share')} of its multiply-accumulates. {how}"
            ],
            cards=cards,
            sections=[s for s in sections if s is not None],
        )
    )


def _curve(value: Document, made: Sequence[Document]) -> Section:
    quality = next(
        (q for q in ("accuracy", "agreement") if all(p[q] is not None for p in made)), None
    )
    drawn = []
    if quality is not None:
        if quality == "accuracy":
            whole = value["before"]["accuracy"]
        else:
            whole = 1.0
        drawn.append(
            charts.frontier([(p["shares"]["macs"], p[quality]) for p in made], whole, quality, "q")
        )
    elif all(p["output_relative_error"] is not None for p in made):
        pairs = [(p["shares"]["macs"], p["output_relative_error"]) for p in made]
        drawn.append(charts.frontier(pairs, 0.0, "relative error of the outputs", "q"))
    timed = [
        (p["shares"]["macs"], p["latency_ratio"]) for p in made if p["latency_ratio"] is not None
    ]
    if timed:
        drawn.append(charts.latency(timed, "t"))
    lead = (
        "What the model still does, and how long it takes, at every share of its multiply-accumulates. Dashed: what "
        "the original does, and a latency that falls as the multiply-accumulates do."
    )
    parts: list[Part] = [Figures([Figure(svg) for svg in drawn], "wide")]
    if value["knee"] is not None:
        text = f"Knee: {percent(value['knee'])}, below which quality falls faster. For that model: "
        parts.append(Note(text + knee_command(value)))
    return Section("curve", "Curve", lead, parts)


def _points(value: Document) -> Section:
    points = value["points"]
    has_labels = any(p["accuracy"] is not None for p in points)
    # Deciding columns come first: a telephone shows three of them.
    first = {"accuracy": ">accuracy"} if has_labels else {"agreement": ">same class"}
    last = {"agreement": ">same class"} if has_labels else {}
    rows = [
        [
            percent(p["asked"]),
            *(percent(p[name], 2) for name in first),
            latency_cell(p["latency"]),
            *(percent(p[name], 2) for name in last),
            number(p["output_relative_error"]),
            *(percent(p["shares"][kind.cost]) for kind in COUNTED),
        ]
        for p in points
    ]
    columns = (
        ">asked",
        *first.values(),
        ">latency (95 %)",
        *last.values(),
        ">output error",
        ">MACs",
        ">parameters",
        ">bytes",
    )
    parts: list[Part] = [Table.of(columns, rows)]
    parts += [
        Note(f"At {percent(p['asked'])}: {p['reason']}", warn=True)
        for p in value["points"]
        if p["reason"]
    ]
    saved = [p for p in value["points"] if p["output"]]
    if saved:
        files = [
            [p["output"], percent(p["shares"]["macs"]), count(p["bytes"]), p["sha256"]]
            for p in saved
        ]
        parts.append(Table.of(("file", ">MACs", ">bytes", "sha256"), files))
    if value["notes"]:
        parts.append(Bullets(value["notes"]))
    return Section(
        "points",
        "Models",
        "Asked: share of the MACs to keep. Shares are of the original's; latency is measured side by side.",
        parts,
    )


def _kept(value: Document, made: Sequence[Document]) -> Section:
    groups = value["groups"]
    shown = largest([g["units"] for g in groups], ROWS)
    rows = [
        [
            groups[i]["name"],
            count(groups[i]["units"]),
            *(_tinted(p["kept"][i], groups[i]["units"]) for p in made),
        ]
        for i in shown
    ]
    columns = ("group", ">units", *(f"#{percent(p['shares']['macs'], 0)}" for p in made))
    parts: list[Part] = [Table.of(columns, rows), *limited(shown, groups, "groups")]
    return Section(
        "widths",
        "Widths",
        "Units kept in every group, by the share of MACs kept.",
        parts,
    )


def _tinted(kept: int, units: int) -> Cell:
    return Cell(count(kept), kept / units)
