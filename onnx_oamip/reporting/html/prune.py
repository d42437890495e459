"""Page of ``prune``, made from its document; only the scores of single units come from the report itself."""

from __future__ import annotations

from pathlib import PurePath

import numpy as np

from onnx_oamip.core.budgets import COUNTED, KINDS
from onnx_oamip.core.options import DataOptions
from onnx_oamip.core.records import Report
from onnx_oamip.core.settings import Settings
from onnx_oamip.reporting import documents
from onnx_oamip.reporting.documents import Document
from onnx_oamip.reporting.html import charts
from onnx_oamip.reporting.html.layout import (
    Block,
    Bullets,
    Card,
    Diagram,
    Figure,
    Figures,
    Note,
    Page,
    Pairs,
    Part,
    Section,
    Table,
    render,
)
from onnx_oamip.reporting.html.network import network
from onnx_oamip.reporting.html.page import (
    ROWS,
    SMALL_CHARTS,
    again,
    largest,
    limited,
    paged,
)
from onnx_oamip.reporting.html.samples import samples_section
from onnx_oamip.reporting.html.wording import (
    DASH,
    count,
    number,
    percent,
    short,
)
from onnx_oamip.reporting.tables.parts import (
    KIND_NAMES,
    agreement_name,
    drop_choice,
    latency_bounds,
    latency_interval,
    of_term,
    plural,
    points,
    same_decisions,
)

APPLIED = (
    "refit",
    "seed",
    "batch_size",
    "force",
    "device",
    "cache",
    *sorted(DataOptions.model_fields),
)
"""Settings that the command ``apply`` has as options."""


def prune_page(report: Report) -> bytes:
    """Makes the page of a pruning run.

    Args:
        report: The report of ``prune`` or ``apply``.

    Returns:
        An HTML file; the same report gives the same bytes.
    """
    value = documents.document(report)
    groups = report.coupling.groups
    value["values"] = (
        [report.scores.values[group.units] for group in groups] if report.scores else []
    )
    value["keep"] = [report.plan.keep[group.units] for group in groups]
    model = value["model"]["path"]
    output = value["output"]["path"]
    sections = [
        _widths(value),
        _network(report),
        _errors(value),
        _sensitivity(value),
        _scores(value),
        _draws(value),
        _search(value),
        _skipped(value),
        _programs(value),
        _outputs(value),
        _checks(value),
        samples_section(report.contact_sheet, report.reading),
        again(value, "apply", APPLIED)
        if "plan" in value["settings"]
        else again(value, "prune", Settings.model_fields),
    ]
    return render(
        Page(
            kicker="Pruned by onnx-oamip",
            title=PurePath(model).name,
            lead=[
                _sentence(value),
                f"{model} → {output or '(not written)'}",
                f"{_asked(value['budget'])} {_how(value)}",
            ],
            cards=_cards(value),
            sections=[s for s in sections if s is not None],
        )
    )


def _asked(budget: Document) -> str:
    wanted = [
        f"{percent(budget[kind.name])} of the {kind.noun}"
        for kind in KINDS
        if kind.noun and budget[kind.name] is not None
    ]
    if wanted:
        asked = [f"to keep at most {' and '.join(wanted)}"]
    else:
        asked = []
    if budget["max_drop"] is not None:
        asked.append(f"to lose at most {budget['max_drop']:g} points")
    if budget["max_loss"] is not None:
        asked.append(
            f"to keep as few units as possible with a loss of at most {budget['max_loss']:g}"
        )
    if budget["threshold"] is not None:
        asked.append(f"to remove what scores below {budget['threshold']:g}")
    if asked:
        return f"Asked {', '.join(asked)}."
    return "No budget was asked for."


def _sentence(value: Document) -> str:
    """The result in one sentence: what is left, what it costs, and how fast it is."""
    before, after, found = value["before"], value["after"], value["verification"]
    parts = [
        f"{percent(after[kind.cost] / before[kind.cost])} of the {kind.noun}"
        for kind in COUNTED[:2]
        if before[kind.cost]
    ]
    text = f"The pruned model has {' and '.join(parts)}"
    if found["latency_ratio"] is not None:
        bounds = latency_bounds(found["latency"])
        text += f", takes {percent(found['latency_ratio'])} of the time (95 % interval {bounds})"
    if found["accuracy_after"] is not None:
        right = f"{percent(found['accuracy_after'], 2)} accuracy"
        text += (
            f", and reaches {right} where the original has {percent(found['accuracy_before'], 2)}"
        )
    elif found["agreement"] is not None:
        text += f", and decides as the original on {percent(found['agreement'], 2)} of the samples"
    elif found["output_relative_error"] is not None:
        text += f", and its outputs differ by {number(found['output_relative_error'])} relative to the original's"
    return f"{text}."


def _how(value: Document) -> str:
    how = {
        "Scores": value["importance"],
        "Allocation": value["allocation"],
        "Refit": value["settings"]["refit"],
    }
    return " ".join(f"{name}: {method}." for name, method in how.items())


def _cards(value: Document) -> list[Card]:
    before = value["before"]
    after = value["after"]
    checks = value["verification"]
    cards = []
    for kind in COUNTED:
        old = before[kind.cost]
        new = after[kind.cost]
        share = new / old if old else None
        note = f"{percent(share)} of {short(old, kind.unit)}"
        if kind.cost == "bytes" and after["zip_bytes"]:
            note += f", {short(after['zip_bytes'], kind.unit)} zipped"
        cards.append(Card(kind.label, short(new, kind.unit), note, share))
    ratio = checks["latency_ratio"]
    if ratio is not None:
        note = f"{1 / ratio:.2f} times as fast; 95 % interval {latency_bounds(checks['latency'])}"
        cards.append(Card("Latency", percent(ratio), note, ratio))
    elif checks["latency"]:
        cards.append(Card("Latency", DASH, "in doubt", None))
    if checks["accuracy_after"] is not None:
        lost = 100 * (checks["accuracy_before"] - checks["accuracy_after"])
        note = f"{_points(lost)} {percent(checks['accuracy_before'], 2)}"
        cards.append(
            Card("Accuracy", percent(checks["accuracy_after"], 2), note, checks["accuracy_after"])
        )
    elif checks["agreement"] is not None:
        note = f"{same_decisions(checks)}, {plural(checks['samples'], 'sample')}"
        cards.append(Card("Agreement", percent(checks["agreement"], 2), note, checks["agreement"]))
    elif checks["output_relative_error"] is not None:
        note = f"relative, {plural(checks['samples'], 'sample')}"
        cards.append(Card("Output error", number(checks["output_relative_error"]), note))
    return cards


def _points(lost: float) -> str:
    """Lost points of accuracy, as a comparison with the original."""
    if not round(lost, 2):
        return "the same as"
    return f"{abs(lost):.2f} points {'below' if lost > 0 else 'above'}"


def _widths(value: Document) -> Section:
    groups = value["groups"]
    shown = largest([g["units"] for g in groups], ROWS)
    rows = [(groups[i]["name"], groups[i]["units"], groups[i]["kept"]) for i in shown]
    table = [
        [
            g["name"],
            count(g["units"]),
            count(g["kept"]),
            percent(g["level"]),
            *(number(g["score"][k]) for k in ("min", "mean", "max")),
        ]
        for g in (groups[i] for i in shown)
    ]
    most = max(g["units"] for g in groups)
    columns = ("group", ">units", ">kept", ">share", ">least score", ">mean", ">largest")
    units, kept = (sum(g[k] for g in groups) for k in ("units", "kept"))
    lead = (
        f"A group is a set of channels that can only be removed with the same indices elsewhere; it is named after "
        f"one of its weights. {count(kept)} of {count(units)} units in {plural(len(groups), 'group')} are kept."
    )
    parts: list[Part] = [
        Figures(
            [Figure(charts.widths(part, f"w{i}", most)) for i, part in enumerate(paged(rows))],
            "wide",
        ),
        *limited(shown, groups, "groups"),
        Table.of(columns, table),
    ]
    return Section("widths", "Widths", lead, parts)


def _network(report: Report) -> Section | None:
    """The graph of the network; None where no width changed."""
    if report.plan.keep.all():
        return None
    lead = (
        "Layers along the data flow, from top to bottom, with the channels of their outputs before and after pruning; "
        "the bar shows the share that is kept. Layers of a large network are drawn in blocks, whose channels are added "
        "up."
    )
    found = network(report.model, report.coupling, report.plan.keep)
    return Section("network", "Network", lead, [Diagram(charts.network(found, "n"))])


def _errors(value: Document) -> Section | None:
    fits = value["fits"]
    if not fits:
        return None
    shown = largest([fit["error_before"] or 0.0 for fit in fits], ROWS)
    errors = [(fits[i]["node"], fits[i]["error_before"], fits[i]["error_after"]) for i in shown]
    # An error that is not finite has no place on an axis.
    rows = [row for row in errors if None not in row]
    span = charts.decades([error for row in rows for error in row[1:]])
    lead = (
        "What is left of the output of every node that was refitted, in graph order: mean squared error on held-out "
        "samples over the variance of the original output. Open: before its refit. Filled: after."
    )
    table = [
        [
            f["node"],
            f["form"],
            count(f["rows"]),
            count(f["unknowns"]),
            number(f["ridge"]),
            number(f["error_before"]),
            number(f["error_after"]),
        ]
        for f in (fits[i] for i in shown)
    ]
    columns = ("node", "refit", ">rows", ">unknowns", ">ridge", ">error before", ">after")
    drawn = [Figure(charts.errors(part, f"e{i}", span)) for i, part in enumerate(paged(rows))]
    parts: list[Part] = [
        Figures(drawn, "wide"),
        *limited(shown, fits, "nodes"),
        Table.of(columns, table),
    ]
    return Section("errors", "Error along the network", lead, parts)


def _sensitivity(value: Document) -> Section | None:
    curves = value["curves"]
    groups = value["groups"]
    if not curves:
        return None
    shown = largest([g["units"] for g in groups], SMALL_CHARTS)
    losses = [np.asarray([np.nan if x is None else x for x in c["losses"]]) for c in curves]
    span = charts.decades(np.concatenate(losses).tolist())
    drawn = []
    for i in shown:
        group = groups[i]
        finite = np.isfinite(losses[i])
        shares = np.asarray(curves[i]["widths"]) / group["units"]
        svg = charts.sensitivity(shares[finite], losses[i][finite], group["level"], span, f"s{i}")
        drawn.append(
            Figure(
                svg,
                group["name"],
                f"{count(group['kept'])} of {plural(group['units'], 'unit')} kept",
            )
        )
    lead = (
        "The measured loss of the model with only this group narrowed and what reads it repaired: 1 where it is as far "
        "off as a model that always gives the average answer. The line marks the width that was chosen. "
        "One scale for all groups; at full width nothing is lost, which is drawn at the foot."
    )
    parts = [Figures(drawn, "narrow"), *limited(shown, groups, "groups")]
    return Section("sensitivity", "Sensitivity", lead, parts)


def _scores(value: Document) -> Section | None:
    groups = value["groups"]
    if not value["values"]:
        return None
    shown = largest([g["units"] for g in groups], SMALL_CHARTS)
    drawn = [
        Figure(
            charts.scores(value["values"][i], value["keep"][i], f"h{i}"),
            groups[i]["name"],
            _spread(groups[i]),
        )
        for i in shown
    ]
    lead = (
        f"How the {value['importance']} scores of each group's units are spread. Dark: kept. Light: removed. Scores "
        "compare units of one group; where they span decades the axis is logarithmic, and zeros stand at its left end."
    )
    return Section(
        "scores",
        "Scores",
        lead,
        [Figures(drawn, "narrow"), *limited(shown, groups, "groups")],
    )


def _spread(group: Document) -> str:
    return f"{number(group['score']['min'])} to {number(group['score']['max'])}"


def _draws(value: Document) -> Section | None:
    """Section about the agreement of several draws of the samples, if there are any."""
    if value["draws"] is None:
        return None
    groups = value["draws"]["groups"]
    shown = largest([group["kept"] for group in groups], ROWS)
    rows = [(groups[i]["name"], groups[i]["kept"], groups[i]["agreed"]) for i in shown]
    most = max(group["kept"] for group in groups)
    kept, agreed = (sum(group[key] for group in groups) for key in ("kept", "agreed"))
    lead = (
        f"Scores are means over {plural(value['draws']['count'], 'draw')} of the samples. Light: units that are kept. "
        f"Dark: those of them that every draw alone would keep at the same widths, {count(agreed)} of {count(kept)}. "
        "The spread is the standard deviation of a score over the draws, relative to the mean score of the group."
    )
    table = [
        [group["name"], count(group["kept"]), count(group["agreed"]), percent(group["spread"])]
        for group in (groups[i] for i in shown)
    ]
    parts: list[Part] = [
        Figures(
            [Figure(charts.agreement(part, f"a{i}", most)) for i, part in enumerate(paged(rows))],
            "wide",
        ),
        *limited(shown, groups, "groups"),
        Table.of(("group", ">kept", ">kept by all draws", ">spread"), table),
    ]
    return Section("draws", "Draws of the samples", lead, parts)


def _search(value: Document) -> Section | None:
    tried = value["tried"]
    allowed = value["budget"]["max_drop"]
    if not tried or allowed is None:
        return None
    whole = value["before"]["macs"]
    final = value["after"]["macs"]
    met = [t for t in tried if t["lost"] is not None]
    drawn = [(t["macs"] / whole, t["lost"], t["macs"] == final) for t in met]
    rows = [
        [
            percent(t["asked"]),
            percent(None if t["macs"] is None else t["macs"] / whole),
            "no plan" if t["lost"] is None else f"{t['lost']:.2f}",
        ]
        for t in tried
    ]
    lead = (
        f"The fewest multiply-accumulates that lose at most {allowed:g} points (dashed), by bisection. Filled: the "
        "model that was taken. A triangle lost more than five times that."
    )
    parts: list[Part] = [Table.of((">MACs asked", ">MACs kept", ">points lost"), rows)]
    if drawn:
        parts.insert(0, Figures([Figure(charts.drops(drawn, allowed, "d"))], "wide"))
    choice = drop_choice(value)
    if choice:
        parts.insert(0, Note(f"{choice}."))
    return Section("search", "Search", lead, parts)


def _skipped(value: Document) -> Section:
    reasons: dict[str, list[Document]] = {}
    for entry in value["skipped"]:
        reasons.setdefault(entry["reason"], []).append(entry)
    ordered = sorted(reasons.items(), key=lambda item: -sum(e["channels"] for e in item[1]))
    rows = [
        [
            reason,
            count(sum(e["channels"] for e in entries)),
            ", ".join(dict.fromkeys(e["tensor"] for e in entries)),
        ]
        for reason, entries in ordered[:ROWS]
    ]
    parts: list[Part] = (
        [Table.of(("reason", ">channels", "of"), rows)] if rows else [Note("Nothing was skipped.")]
    )
    if len(ordered) > ROWS:
        parts.append(Note(f"Showing the {ROWS} largest of {count(len(ordered))} reasons."))
    return Section("skipped", "What cannot be removed", "Channels that are kept, and why.", parts)


def _programs(value: Document) -> Section | None:
    programs = value["programs"]
    if not programs:
        return None
    rows = [
        [
            p["purpose"],
            DASH if p["solver"] is None else p["solver"],
            f"{p['status']}, {p['limit']} limit" if p.get("limit") else p["status"],
            percent(p["gap"], 2),
            DASH if p["seconds"] is None else f"{p['seconds']:.2f} s",
            count(p["variables"]),
            count(p["rows"]),
            DASH if p.get("binding") is None else ", ".join(p["binding"]) or "nothing",
        ]
        for p in programs[:ROWS]
    ]
    columns = ("program", "solver", "status", ">gap", ">time", ">variables", ">rows", "what binds")
    reasons = list(
        dict.fromkeys(
            p["reason"] for p in programs if p.get("reason") not in (None, "", "as asked")
        )
    )
    parts: list[Part] = [Table.of(columns, rows)]
    if len(programs) > ROWS:
        parts.append(Note(f"Showing the first {ROWS} of {count(len(programs))} programs."))
    if reasons:
        parts.append(Bullets([f"Solver: {reason}." for reason in reasons[:ROWS]]))
    return Section(
        "programs",
        "Programs",
        "Mathematical programs behind the result, and how they ended.",
        parts,
    )


def _outputs(value: Document) -> Section | None:
    """Losses of all terms of the objective, the worst first."""
    measures = value["verification"]["outputs"]
    if not measures:
        return None
    shown = measures[:ROWS]
    rows = []
    for measure in shown:
        before = measure["before_refit"]
        rows.append(
            [
                measure["term"],
                KIND_NAMES[measure["kind"]],
                measure["measure"],
                points(before and before["lost"]),
                points(measure["lost"]),
                _numbers(measure["values"]),
            ]
        )
    columns = ("output", "kept as", "measure", ">lost before refit", ">lost", "numbers")
    drawn = [(m["term"], m["before_refit"] and m["before_refit"]["lost"], m["lost"]) for m in shown]
    if value["verification"]["metric"] is None:
        allowed = value["budget"]["max_drop"]
    else:
        allowed = None
    parts: list[Part] = [
        Figures([Figure(charts.outputs(drawn, allowed, "o"))], "wide"),
        *limited(list(range(len(shown))), measures, "outputs"),
        Table.of(columns, rows),
    ]
    parts += [Note(text, warn=True) for m in measures for text in m["warnings"]]
    lead = (
        "Points that every output lost on the evaluation samples, the worst first: of accuracy where there are labels, "
        "of agreement with the original's decisions, or of squared error over variance. Open: before the refit. "
        "Filled: after."
    )
    return Section("outputs", "What is kept", lead, parts)


def _numbers(values: Document) -> str:
    """The numbers of a measure that are known."""
    known = {name: value for name, value in values.items() if value is not None}
    return ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in known.items())


def _latency_rows(latency: Document | None) -> list[tuple[str, str]]:
    """Rows on how sure the measured latency is."""
    if latency is None:
        return []
    rows = [("latency lies between", latency_interval(latency))]
    if latency["doubt"]:
        rows.append(("latency is not shown, as", latency["doubt"]))
    return rows


def _checks(value: Document) -> Section:
    found = value["verification"]
    max_drop = value["budget"]["max_drop"]
    rows = [
        ("differs from the masked original by", number(found["masked_equivalence"])),
        ("relative error of the outputs", number(found["output_relative_error"])),
        (agreement_name(found), percent(found["agreement"], 2)),
        (f"accuracy before{of_term(found)}", percent(found["accuracy_before"], 2)),
        (f"accuracy after{of_term(found)}", percent(found["accuracy_after"], 2)),
        ("latency, of the original's", percent(found["latency_ratio"])),
        *_latency_rows(found["latency"]),
        ("largest drop allowed", DASH if max_drop is None else f"{max_drop:g} points"),
        ("measured on", plural(found["samples"], "sample") if found["samples"] else "no data"),
        ("ran at batch", ", ".join(str(b) for b in found["batches"]) or DASH),
    ]
    parts: list[Part] = [Pairs([Block("Measured", rows)])]
    parts += [Note(f"Failed: {failure}", warn=True) for failure in found["failures"]]
    if value["notes"]:
        parts += [Note("Remarks on single layers:"), Bullets(value["notes"])]
    lead = (
        "Nothing is written unless the model passes the ONNX checker, runs, meets its budgets, and equals the original "
        "with the removed channels set to zero (before the refit)."
    )
    return Section("checks", "Checks", lead, parts)
