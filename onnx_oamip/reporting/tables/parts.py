"""Shared tables of several commands, and formatting of cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from onnx_oamip.core.budgets import COUNTED
from onnx_oamip.core.printable import shortened, visible
from onnx_oamip.reporting.documents import Document
from onnx_oamip.reporting.side_by_side import lost
from onnx_oamip.reporting.tables.grid import Grid
from onnx_oamip.verification.equivalence import FEW_SAMPLES

KIND_NAMES = {
    "classes": "classes",
    "binary": "decisions",
    "values": "values",
    "embedding": "vectors",
    "ambiguous": "classes or values",
    "exact": "equal numbers",
    "ignore": "not measured",
}
"""Words for the kinds of terms."""
ROWS = 40
"""Largest number of rows of a table; the JSON document has all."""
BAR = 12
"""Width of a bar, in characters."""
NAME = 28
"""Longest name, in characters, beside numbers that are never cut."""
NARROW_BAR = 4
"""Width of a bar on a narrow terminal."""
WIDE = 80
"""Columns from which on tables have all their columns."""


def operator_name(op: Document) -> str:
    """Name of an operator with its domain and opset range.

    Args:
        op: An entry of ``operators``.

    Returns:
        The name.
    """
    if op["domain"]:
        name = f"{op['domain']}::{op['name']}"
    else:
        name = op["name"]
    if op["until"] is not None:
        return f"{name} (opset {op['since']}-{op['until']})"
    if op["since"] == 1:
        return name
    return f"{name} (opset {op['since']}+)"


def costs(
    before: Document,
    after: Document | None = None,
    budget: Document | None = None,
    latency: Document | None = None,
) -> Table:
    """Makes the table of costs.

    Args:
        before: Cost of the original.
        after: Cost of the result; None for a table of one model.
        budget: The budgets, shown beside the kept shares.
        latency: Measured latency relative to the original, as documents describe it.

    Returns:
        The table.
    """
    if after is None:
        table = grid(*(f">{kind.noun}" for kind in COUNTED))
        table.add_row(*(f"{before[kind.cost]:,}" for kind in COUNTED))
        return table
    table = grid("", ">before", ">after", ">kept", *([">budget"] if budget else []))
    for kind in COUNTED:
        old = before[kind.cost]
        new = after[kind.cost]
        row = [kind.noun, f"{old:,}", f"{new:,}", percent(new / old if old else None)]
        table.add_row(*row, *([percent(budget[kind.name], "")] if budget else []))
    zipped = [side["zip_bytes"] for side in (before, after) if side.get("zip_bytes")]
    if len(zipped) == 2:
        kept = percent(zipped[1] / zipped[0])
        table.add_row(
            "bytes, zip", *(f"{size:,}" for size in zipped), kept, *([""] if budget else [])
        )
    if budget and latency is not None:
        if latency["doubt"]:
            speed, kept = "in doubt", "-"
        else:
            speed, kept = f"{1 / latency['median']:.2f} x as fast", percent(latency["median"])
        table.add_row("latency", "", speed, kept, percent(budget["latency"], ""))
    return table


def latency_interval(found: Document) -> str:
    """Describes how sure a measured latency is.

    Args:
        found: The ``latency`` of a document.

    Returns:
        The 95 % interval with the number of rounds, the threads and the load of the machine.
    """
    measured = [f"{found['rounds']:,} rounds", f"threads {found['threads']}"]
    if found["load"] is not None:
        measured.append(f"load {found['load']:.1f}")
    return f"{latency_bounds(found)} (95 % interval, {', '.join(measured)})"


def latency_bounds(found: Document) -> str:
    """Writes the 95 % interval of a measured latency.

    Args:
        found: The ``latency`` of a document.

    Returns:
        Its two ends as shares of the original's latency, such as "38.1 to 44.0 %".
    """
    low = percent(found["low"]).rstrip(" %")
    return f"{low} to {percent(found['high'])}"


def latency_cell(found: Document | None) -> str:
    """Writes a measured latency with its interval.

    Args:
        found: The ``latency`` of a document; None if it was not measured.

    Returns:
        Such as "40.8 % (38.1 to 44.0 %)"; a dash where it was not measured or is in doubt.
    """
    if found is None or found["doubt"]:
        return percent(None)
    return f"{percent(found['median'])} ({latency_bounds(found)})"


def latency_rows(found: Document) -> Iterator[RenderableType]:
    """Makes the lines about a measured latency.

    Args:
        found: The ``latency`` of a document.

    Yields:
        The interval, and why the ratio is not shown where it is in doubt.
    """
    yield Text(f"latency: {latency_interval(found)}")
    if found["doubt"]:
        yield Text(
            f"note: the latency is not shown: {found['doubt']}; measure both models again with 'onnx-oamip bench' "
            f"while the machine is idle."
        )


def point_table(found: Sequence[Document]) -> Table:
    """Makes the table of the models of a frontier.

    Args:
        found: Its ``points``, so far or all.

    Returns:
        The table.
    """
    qualities = ["accuracy", "agreement"]
    if found and all(point["accuracy"] is None for point in found):
        qualities.remove("accuracy")
    words = (f">{name}" for name in qualities)
    table = grid(">MACs asked", ">kept", ">params", ">bytes", *words, ">error", ">latency (95 %)")
    for point in found:
        shares = (percent(share) for share in (point["asked"], *point["shares"].values()))
        right = (percent(point[key], digits=2) for key in qualities)
        error = number(point["output_relative_error"])
        table.add_row(*shares, *right, error, latency_cell(point["latency"]))
    return table


def drop_choice(value: Document) -> str:
    """Explain the choice of a search for the smallest model within a loss.

    Args:
        value: Document of ``prune``.

    Returns:
        One sentence without a full stop; empty if there was no such search.
    """
    allowed = value["budget"]["max_drop"]
    measured = [trial for trial in value["tried"] if trial["lost"] is not None]
    chosen = [trial for trial in measured if trial["macs"] == value["after"]["macs"]]
    if allowed is None or not chosen:
        return ""
    whole = value["before"]["macs"]
    text = (
        f"`max_drop={allowed:g}` keeps {percent(chosen[-1]['macs'] / whole)} of the MACs, the fewest of "
        f"{plural(len(value['tried']), 'plan')} that lose at most {allowed:g} ({points(chosen[-1]['lost'])} of "
        f"{chosen[-1]['measure']})"
    )
    smaller = [t for t in measured if t["lost"] > allowed and t["macs"] < chosen[-1]["macs"]]
    if smaller:
        nearest = max(smaller, key=lambda trial: trial["macs"])
        text += f"; the next smaller one, of {percent(nearest['macs'] / whole)}, loses {points(nearest['lost'])}"
    return text


def stage_sizes(rows: Sequence[Document], *, is_wide: bool) -> Table:
    """Makes the table of the sizes of the models of a run.

    Args:
        rows: The ``stages`` of a document, the original first.
        is_wide: Show all columns.

    Returns:
        The table.
    """
    table = grid("model", ">MACs", ">bytes", ">kept", ">zip", *([">kept"] * is_wide))
    first = rows[0]
    for row in rows:
        kept = {key: percent(row[key] / first[key]) for key in ("macs", "bytes", "zip_bytes")}
        table.add_row(
            cell(row["stage"]),
            kept["macs"],
            f"{row['bytes']:,}",
            kept["bytes"],
            f"{row['zip_bytes']:,}",
            *([kept["zip_bytes"]] * is_wide),
        )
    return table


def stage_quality(rows: Sequence[Document], reused: Sequence[str], *, is_wide: bool) -> Table:
    """Makes the table of latency and quality of the models of a run.

    Args:
        rows: The ``stages`` of a document, the original first.
        reused: Names of the stages that were not run again.
        is_wide: Show all columns; otherwise accuracy is left out where there are no labels, and agreement elsewhere.

    Returns:
        The table.
    """
    accuracy = next((r["verification"]["accuracy_before"] for r in rows if r["verification"]), None)
    judged = ["agreement", "accuracy"]
    if not is_wide:
        judged.remove("accuracy" if accuracy is None else "agreement")
    names = ("time (95 %)", *judged, "lost", *(["ms"] * is_wide))
    table = grid("model", *(f">{name}" for name in names), *(["run"] * is_wide))
    for row in rows:
        found = row["verification"]
        if found is None:
            cells = {"time (95 %)": "100 %", "accuracy": percent(accuracy, digits=2)}
            run = ""
        else:
            cells = {
                "time (95 %)": time_cell(found),
                "agreement": percent(found["agreement"], digits=2),
                "accuracy": percent(found["accuracy_after"], digits=2),
                "lost": points(lost(found)),
            }
            run = "unchanged" if row["stage"] in reused else "now"
        cells["ms"] = f"{row['milliseconds']:.3f}"
        texts = (cells.get(name, "") for name in names)
        table.add_row(cell(row["stage"]), *texts, *([run] * is_wide))
    return table


def time_cell(verification: Document | None) -> str:
    """Describe a measured latency in a cell.

    Args:
        verification: Verification of a document, or None.

    Returns:
        The median with its interval; a dash where nothing was measured.
    """
    ratio = verification and verification["latency"]
    if not ratio:
        return "-"
    if ratio["doubt"]:
        return "in doubt"
    interval = f"{percent(ratio['low']).rstrip(' %')}-{percent(ratio['high'])}"
    return f"{percent(ratio['median'])} ({interval})"


def assumption_rows(model: Document) -> Iterator[RenderableType]:
    """Makes the lines about the sizes and the nodes that costs depend on.

    Args:
        model: The model, as documents describe it.

    Yields:
        Assumed sizes, and operators that are not counted; nothing if there are none.
    """
    lines = []
    # One sample is what costs are counted for: no assumption.
    lengths = {name: model["bindings"][name] for name in model["assumed"]}
    if any(length != 1 for length in lengths.values()):
        sizes = ", ".join(f"{name} = {length:,}" for name, length in lengths.items())
        lines.append(f"sizes assumed: {sizes}; --shape NAME=LENGTHS states others.")
    for record in model["uncounted"]:
        nodes = plural(len(record["nodes"]), "node")
        lines.append(f"not in the MACs: {record['operator']} ({nodes}), {record['reason']}")
    if lines:
        yield Text("\n".join(lines))


def connection_rows(found: Document, console: Console) -> Iterator[RenderableType]:
    """Makes the table of kept connections per layer.

    Args:
        found: The ``connections`` of a document.
        console: Where it is shown.

    Yields:
        The table, and a summary.
    """
    table = grid("layer", ">connections", ">kept", "share kept")
    whole = {"node": "all layers", "total": found["total"], "kept": found["kept"]}
    for layer in [*found["layers"][:ROWS], whole]:
        share = layer["kept"] / max(layer["total"], 1)
        table.add_row(
            cell(layer["node"]), f"{layer['total']:,}", f"{layer['kept']:,}", bar(share, console)
        )
    yield from limited(table, found["layers"], "layers")
    rounds = plural(len(found["rounds"]), "round")
    yield Text(f"{found['compression']:.1f} times fewer connections after {rounds}")


def program_rows(programs: Sequence[Document], console: Console) -> Iterator[RenderableType]:
    """Makes the table of solved programs.

    Args:
        programs: The ``programs`` of a document.
        console: Where it is shown; a narrow one gets fewer columns, so that no word is broken.

    Yields:
        The table, and the reasons for the choice of the solver; nothing without programs.
    """
    if not programs:
        return
    is_wide = console.width >= WIDE
    sizes = (">seconds", ">size") if is_wide else ()
    table = grid("program", "solver", "status", ">gap", *sizes, "binding")
    for program in programs:
        limit = program.get("limit")
        binding = program.get("binding")
        seconds = "-" if program["seconds"] is None else f"{program['seconds']:.2f}"
        size = (seconds, f"{program['variables']:,} x {program['rows']:,}")
        table.add_row(
            cell(program["purpose"]),
            cell("-" if program["solver"] is None else program["solver"]),
            cell(f"{program['status']}, {limit} limit" if limit else program["status"]),
            percent(program["gap"], digits=2),
            *(size if is_wide else ()),
            cell("-" if binding is None else ", ".join(binding) or "nothing"),
        )
    yield table
    reasons = dict.fromkeys(
        p["reason"] for p in programs if p.get("reason") not in (None, "", "as asked")
    )
    if reasons:
        yield Text("\n".join(f"solver: {reason}." for reason in reasons))


def fit_rows(fits: Sequence[Document]) -> Iterator[RenderableType]:
    """Makes the summary of a refit.

    Args:
        fits: The ``fits`` of a document.

    Yields:
        The table; nothing without fits.
    """
    if not fits:
        return
    counts: dict[str, int] = {}
    for fit in fits:
        counts[fit["form"]] = counts.get(fit["form"], 0) + 1
    table = grid("refit", ">result", header=False)
    table.add_row(
        "nodes refitted", cell(", ".join(f"{n:,} by {form}" for form, n in counts.items()))
    )
    worst = max(fits, key=lambda fit: fit["error_after"])
    before = number(worst["error_before"])
    after = number(worst["error_after"])
    node = shortened(worst["node"], NAME)
    table.add_row("largest relative error left", cell(f"{before} -> {after} in {node}"))
    yield table


def recovery_lines(recovery: Document) -> Text:
    """Build the lines about a recovery.

    Args:
        recovery: The part ``recovery`` of a document.

    Returns:
        Its losses on held-out samples, its steps, and whether it was taken.
    """
    after = recovery["after"]
    losses = f"{recovery['before']:.4g} -> {'-' if after is None else f'{after:.4g}'}"
    taken = "taken" if recovery["accepted"] else "not taken"
    return Text(
        f"recovery {taken}: held-out objective {losses} at step {recovery['best_step']:,} of {recovery['steps']:,} "
        f"({recovery['ended']}, {recovery['seconds']:,.0f} s)"
    )


def checks(verification: Document, max_drop: float | None = None) -> Table:
    """Makes the table of the verification.

    Args:
        verification: The ``verification`` of a document.
        max_drop: Largest loss of accuracy that was allowed, in points.

    Returns:
        The table.
    """
    table = grid("check", ">result", header=False)
    if verification["masked_equivalence"] is not None:
        table.add_row(
            "differs from the masked original by", number(verification["masked_equivalence"])
        )
    if verification["rounding"] is not None:
        table.add_row(
            "rounding alone moves the masked original by", number(verification["rounding"])
        )
    table.add_row("relative error of the outputs", number(verification["output_relative_error"]))
    if verification["agreement"] is not None:
        table.add_row(
            cell(agreement_name(verification)), percent(verification["agreement"], digits=2)
        )
    if verification["accuracy_after"] is not None:
        before = percent(verification["accuracy_before"], digits=2)
        after = percent(verification["accuracy_after"], digits=2)
        few = verification["samples"] < FEW_SAMPLES
        of = f" of {plural(verification['samples'], 'sample')}" if few else ""
        name = f"accuracy{of_term(verification)}"
        table.add_row(cell(name), f"{before} -> {after}{of}")
    metric = verification["metric"]
    if metric is not None:
        table.add_row(cell(metric["name"]), f"{metric['before']:.6g} -> {metric['after']:.6g}")
    if max_drop is not None:
        if metric is None:
            unit = "points"
        else:
            unit = f"of {metric['name']}"
        table.add_row("largest drop allowed", cell(f"{max_drop:g} {unit}"))
    table.add_row(
        "measured on",
        plural(verification["samples"], "sample") if verification["samples"] else "no data",
    )
    if verification["batches"]:
        table.add_row("ran at batch", ", ".join(str(b) for b in verification["batches"]))
    for failure in verification["failures"]:
        table.add_row(Text("FAILED", "bold red"), cell(failure))
    return table


def agreement_name(verification: Document) -> str:
    """Name the agreement of a verification.

    Args:
        verification: Its JSON document.

    Returns:
        Words for equal top classes, or for equal decisions at a threshold, and the term where there are several.
    """
    return f"{same_decisions(verification)} as the original"


def same_decisions(verification: Document) -> str:
    """Name the decisions that an agreement counts.

    Args:
        verification: Its JSON document.

    Returns:
        As :func:`agreement_name`, without what they are compared with.
    """
    kinds = {measure["kind"] for measure in verification["outputs"]}
    top = not verification["outputs"] or kinds & {"classes", "ambiguous"}
    what = "same top class" if top else "same decisions"
    return f"{what}{of_term(verification)}"


def of_term(verification: Document) -> str:
    """Name the term of an agreement and of accuracies.

    Args:
        verification: JSON document of a verification.

    Returns:
        Words to put behind the measure; empty where the objective has one term.
    """
    term = verification["agreement_of"]
    if term is None or len(verification["outputs"]) < 2:
        return ""
    return f" of '{shortened(term, NAME)}'"


def output_rows(verification: Document) -> Iterator[RenderableType]:
    """Draw a table of how well each term of the objective is kept, the worst first.

    Args:
        verification: JSON document of a verification.

    Yields:
        The table, and a line that counts the rows left out; nothing without terms.
    """
    if not verification["outputs"]:
        return
    refitted = any(measure["before_refit"] for measure in verification["outputs"])
    table = grid("output", "kept as", "measure", ">points lost", *([">before refit"] * refitted))
    for measure in verification["outputs"][:ROWS]:
        row: list[RenderableType] = [cell(measure["term"]), KIND_NAMES[measure["kind"]]]
        row += [cell(measure["measure"]), points(measure["lost"])]
        before = measure["before_refit"]
        if refitted:
            row.append(points(before and before["lost"]))
        table.add_row(*row)
    yield from limited(table, verification["outputs"], "outputs")


def objective_rows(terms: Sequence[Document]) -> Iterator[RenderableType]:
    """Draw a table of the terms of an objective.

    Args:
        terms: Their JSON documents.

    Yields:
        The table, and a line that counts the rows left out; nothing without terms.
    """
    if not terms:
        return
    table = grid("output", "kept as", ">weight", "measured at", "because of")
    for term in terms[:ROWS]:
        if term["part"] is None:
            part = ""
        else:
            part = " [{1}:{2}] of axis {0}".format(*term["part"])
        if term["kind"] == "ignore":
            place = "-"
        else:
            place = f"{term['tensor']}{part}"
        reason = (
            term["tail"]
            or {"structure": "-", "labels": "the labels", "user": "your statement"}[term["source"]]
        )
        table.add_row(
            cell(term["name"]),
            KIND_NAMES[term["kind"]],
            f"{term['weight']:g}",
            cell(place),
            cell(reason),
        )
    yield from limited(table, terms, "outputs")


def reason_rows(skipped: Sequence[Document]) -> Iterator[RenderableType]:
    """Makes the table of pinned channels by reason, the most frequent first.

    Args:
        skipped: The ``skipped`` channels of a document.

    Yields:
        The table; nothing without pinned channels.
    """
    if not skipped:
        return
    grouped: dict[str, list[Document]] = {}
    for entry in skipped:
        grouped.setdefault(entry["reason"], []).append(entry)
    table = grid("cannot be removed, because", ">channels", "of")
    ordered = sorted(grouped.items(), key=lambda item: -sum(e["channels"] for e in item[1]))
    for reason, entries in ordered[:ROWS]:
        channels = sum(e["channels"] for e in entries)
        tensors = list(dict.fromkeys(e["tensor"] for e in entries))
        table.add_row(cell(reason), f"{channels:,}", cell(some(tensors)))
    yield from limited(table, ordered, "reasons")


def limited(table: Table, rows: Sequence[Any], nouns: str) -> Iterator[RenderableType]:
    """Shows a table of at most ``ROWS`` rows, with a line for those that are left out.

    Args:
        table: The table.
        rows: All rows, shown or not.
        nouns: What the rows are, in plural.

    Yields:
        The table, or a line if there are no rows.
    """
    if not rows:
        yield Text(f"no {nouns}")
        return
    yield table
    if len(rows) > ROWS:
        yield Text(f"... and {len(rows) - ROWS:,} more {nouns}; --json lists all.")


def grid(*columns: str, header: bool = True) -> Grid:
    """Makes an empty table.

    Args:
        columns: Headings. A leading '>' aligns the column to the right and never wraps it.
        header: Show the headings.

    Returns:
        The table.
    """
    table = Grid(header=header)
    for column in columns:
        right = column.startswith(">")
        table.add_column(
            column.removeprefix(">"),
            justify="right" if right else "left",
            no_wrap=right,
            overflow="fold",
        )
    return table


def cell(text: str) -> Text:
    """Makes a cell of text that comes from a model, so that it is never read as markup.

    Args:
        text: The text.

    Returns:
        The cell, with invisible characters spelt out.
    """
    return Text(visible(text), overflow="fold")


def bar(level: float, console: Console) -> Text:
    """Draws a bar of characters.

    Args:
        level: Its length in [0, 1].
        console: Where it is shown; block characters need a Unicode encoding.

    Returns:
        The bar with its percentage.
    """
    encoding = (console.encoding or "").lower()
    full, empty = ("█", "░") if encoding.startswith("utf") else ("#", ".")
    width = BAR if console.width >= WIDE else NARROW_BAR
    filled = min(width, max(round(level * width), 1 if level > 0 else 0))
    return Text(f"{full * filled}{empty * (width - filled)} {100 * level:5.1f} %")


def percent(value: float | None, missing: str = "-", digits: int = 1) -> str:
    """Formats a share in percent.

    Args:
        value: The share, 1 for all.
        missing: Text for None.
        digits: Digits behind the point.

    Returns:
        The text.
    """
    if value is None:
        return missing
    return f"{100 * value:.{digits}f} %"


def plural(number: int, noun: str) -> str:
    """Formats a count with its noun: 1 round, 2 rounds.

    Args:
        number: The count.
        noun: The noun in singular.

    Returns:
        The text.
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def times(value: float) -> str:
    """Formats a ratio of times.

    Args:
        value: The ratio.

    Returns:
        The text, with two decimals, or three digits if the ratio is 10 or more.
    """
    if value < 10:
        return f"{value:.2f}"
    return f"{value:.3g}"


def points(lost: float | None) -> str:
    """Format a loss of percentage points.

    Args:
        lost: Points, or None where nothing was measured.

    Returns:
        Two decimals, or a dash.
    """
    return "-" if lost is None else f"{lost:.2f}"


def number(value: float | None) -> str:
    """Formats a number with three digits.

    Args:
        value: The number; None if it was not measured.

    Returns:
        The text, a dash for None.
    """
    if value is None:
        return "-"
    return f"{value:.3g}"


def some(names: Sequence[str], limit: int = 2) -> str:
    """Lists the first names and the number of the others.

    Args:
        names: All names.
        limit: Number of names to list.

    Returns:
        The text.
    """
    rest = len(names) - limit
    return ", ".join(shortened(name) for name in names[:limit]) + (
        f" and {rest} more" if rest > 0 else ""
    )
