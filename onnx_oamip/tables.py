"""The documents of ``report`` as terminal tables, readable at 80 columns.

Drawn from the documents and from nothing else, so that tables and JSON always say the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from .report import Document

_ROWS = 40
"""Rows of a table before the rest is left to --json."""
_BAR = 12
"""Width of a bar, in characters."""


def show(value: Document, console: Console) -> None:
    """Draw a document of any command on a console."""
    draw = next(draw for key, draw in _DRAW.items() if key in value)
    first = True
    for part in draw(value, console):
        if not first:
            console.print()
        console.print(part, soft_wrap=isinstance(part, Text))
        first = False


def _prune(value: Document, console: Console) -> Iterator[RenderableType]:
    output = value["output"]["path"] or "(not written)"
    yield Text.assemble((value["model"]["path"], "bold"), " -> ", (output, "bold"))
    yield _costs(value["before"], value["after"], value["budget"], value["verification"]["latency_ratio"])
    yield from _groups(value["groups"], console)
    if value["connections"]:
        yield from _connections(value["connections"], console)
    yield from _reasons(value["skipped"])
    yield from _programs(value["programs"])
    yield from _fits(value["fits"])
    yield _checks(value["verification"], value["budget"]["max_drop"])
    if value["notes"]:
        yield Text("\n".join(f"note: {note}" for note in value["notes"]))


def _plan(value: Document, console: Console) -> Iterator[RenderableType]:
    output = value["output"]["path"] or "(a dry run: nothing is written)"
    yield Text.assemble((value["model"]["path"], "bold"), " -> ", (output, "bold"))
    yield _costs(value["before"], value["predicted"], value["budget"])
    yield from _groups(value["groups"], console)
    yield from _reasons(value["skipped"])
    yield from _programs(value["programs"])
    if value["notes"]:
        yield Text("\n".join(f"note: {note}" for note in value["notes"]))


def _groups(groups: Sequence[Document], console: Console) -> Iterator[RenderableType]:
    table = _table("group", ">units", ">kept", "share kept", ">scores")
    for group in groups[:_ROWS]:
        scores = group["score"]
        table.add_row(
            _cell(group["name"]),
            f"{group['units']:,}",
            f"{group['kept']:,}",
            _bar(group["level"], console),
            "-" if scores["min"] is None else f"{_number(scores['min'])} .. {_number(scores['max'])}",
        )
    yield from _limited(table, groups, "groups")


def _frontier(value: Document, _: Console) -> Iterator[RenderableType]:
    before = value["before"]
    accuracy = _percent(before["accuracy"], "not measured", 2)
    yield Text.assemble((value["model"]["path"], "bold"), f"  {value['importance']} scores, accuracy {accuracy}")
    yield _costs(before)
    table = _table(">MACs asked", ">kept", ">params", ">bytes", ">accuracy", ">agreement", ">error", ">latency")
    for point in value["points"]:
        shares = (_percent(share) for share in (point["asked"], *point["shares"].values()))
        right = (_percent(point[key], digits=2) for key in ("accuracy", "agreement"))
        error, latency = _number(point["output_relative_error"]), _percent(point["latency_ratio"])
        table.add_row(*shares, *right, error, latency)
    yield table
    lines = ["shares, and latency, of the original's; error: of the outputs, relative."]
    lines += [f"at {_percent(p['asked'])}: {p['reason']}" for p in value["points"] if p["reason"]]
    lines += [f"wrote {p['output']}" for p in value["points"] if p["output"]]
    yield Text("\n".join([*lines, *(f"note: {note}" for note in value["notes"])]))


def _score(value: Document, _: Console) -> Iterator[RenderableType]:
    yield Text.assemble((value["model"]["path"], "bold"), " -> ", (value["output"]["path"], "bold"))
    table = _table("group", ">units", ">least", ">median", ">largest", f">below {value['low']:g}")
    for group in value["groups"][:_ROWS]:
        scores = group["score"]
        spread = (_number(scores[key]) for key in ("min", "median", "max"))
        table.add_row(_cell(group["name"]), f"{group['units']:,}", *spread, _percent(scores["below"]))
    yield from _limited(table, value["groups"], "groups")
    yield from _programs(value["programs"])
    notes = [f"scored by {value['method']}", *(f"note: {note}" for note in value["notes"])]
    yield Text("\n".join(notes))


def _inspect(value: Document, _: Console) -> Iterator[RenderableType]:
    model = value["model"]
    opset = ", ".join(f"{domain} {version}" for domain, version in model["opset"].items())
    yield Text.assemble((model["path"], "bold"), f"  opset {opset}")
    table = _table("", "name", "type", "shape", header=False)
    for kind in ("inputs", "outputs"):
        for port in model[kind]:
            dims = ", ".join("?" if d is None else str(d) for d in port["dims"])
            table.add_row(kind[:-1], _cell(port["name"]), port["dtype"], _cell(f"[{dims}]"))
    yield table
    yield _costs(value["cost"])
    table = _table("group", ">units", ">weights", "summed over by")
    for group in value["groups"][:_ROWS]:
        weights = len({a["tensor"] for a in group["axes"] if a["constant"]})
        table.add_row(_cell(group["name"]), f"{group['units']:,}", str(weights), _cell(_some(group["consumers"])))
    yield from _limited(table, value["groups"], "groups")
    yield from _reasons(value["skipped"])


def _verify(value: Document, _: Console) -> Iterator[RenderableType]:
    before, after = value["original"], value["pruned"]
    yield Text.assemble((before["path"], "bold"), " and ", (after["path"], "bold"))
    yield _costs(before["cost"], after["cost"])
    yield _checks(value["verification"])


def _bench(value: Document, _: Console) -> Iterator[RenderableType]:
    paths = [PurePath(model["path"]) for model in value["models"]]
    names = [p.name for p in paths] if len({p.name for p in paths}) == len(set(paths)) else [str(p) for p in paths]
    threads = f", {_count(value['threads'], 'thread')}" if value["threads"] else ""
    for place, batch in enumerate(value["batch"]):
        yield Text(f"{_count(batch, 'sample')} a run on {value['device']}{threads}")
        table = _table("model", ">p50 ms", ">p95 ms", ">samples/s", ">peak MiB", ">time, 95 %")
        for model, name in zip(value["models"], names, strict=True):
            timing = model["timings"][place]
            ratio, peak = timing["ratio"], timing["peak_bytes"]
            table.add_row(
                _cell(name),
                f"{timing['p50_ms']:,.3f}",
                f"{timing['p95_ms']:,.3f}",
                f"{timing['throughput']:,.0f}",
                "-" if peak is None else f"{peak / 2**20:,.1f}",
                f"{_times(ratio['median'])} ({_times(ratio['low'])}-{_times(ratio['high'])})",
            )
        yield table
    yield Text(
        "time: of the first model's, the median over rounds and its 95 % interval;\n"
        "peak: memory that loading and running added to a fresh process."
    )


def _checkpoint(value: Document, _: Console) -> Iterator[RenderableType]:
    yield Text(f"-> {value['output']['path']}", "bold")
    cut = [t for t in value["tensors"] if t["weight"] is not None]
    table = _table("tensor", "before", "after")
    for tensor in cut[:_ROWS]:
        table.add_row(_cell(tensor["name"]), *(" x ".join(map(str, tensor[k])) for k in ("before", "after")))
    yield from _limited(table, cut, "tensors")
    yield Text(f"{len(value['tensors']) - len(cut)} tensors stay as they are.")
    if value["unmatched"]:
        yield Text(f"in no tensor, by name or by content: {', '.join(value['unmatched'])}")


def _operators(value: Document, _: Console) -> Iterator[RenderableType]:
    kinds: dict[str, list[str]] = {"counted and refitted": [], "counted": [], "repaired": [], "followed": []}
    for op in value["operators"]:
        kind = "counted and refitted" if op["macs"] and op["refit"] else "counted" if op["macs"] else ""
        kinds[kind or ("repaired" if op["repair"] else "followed")].append(_operator(op))
    table = _table("", "operators", header=False)
    for kind, names in kinds.items():
        if names:
            table.add_row(kind, _cell(", ".join(names)))
    yield table
    yield Text(
        f"{len(value['operators'])} entries. Counted: their multiply-accumulates are MACs. Repaired:\n"
        "attributes or constants follow the cut. Channels that meet any other operator\n"
        "stay, with the reason."
    )


def _solvers(value: Document, _: Console) -> Iterator[RenderableType]:
    table = _table("solver", "version", "usable", ">variables", ">rows", "licence")
    for solver in value["solvers"]:
        sizes = [f"{solver[k]:,}" if solver[k] else "any" if solver["usable"] else "-" for k in ("variables", "rows")]
        usable = "yes" if solver["usable"] else "no"
        table.add_row(solver["name"], solver["version"] or "-", usable, *sizes, _cell(solver["licence"]))
    yield table
    yield Text("--solver auto takes the first that is usable and whose licence allows the size.")


def _pack(value: Document, _: Console) -> Iterator[RenderableType]:
    yield Text.assemble((value["model"]["path"], "bold"), " -> ", (value["output"]["path"], "bold"))
    before, rivals = value["before"]["bytes"], value["rivals"]
    table = _table("", ">bytes", ">of the model")
    sizes = {"model": before, "packed": value["after"]["bytes"]}
    if rivals:
        sizes |= {"zip": rivals["zip"], "fp16": rivals["fp16"], "fp16, zip": rivals["fp16_zip"]}
    for name, size in sizes.items():
        table.add_row(name, f"{size:,}", _percent(size / before))
    yield table
    columns = (">psi", ">zip", ">fp16, zip") if rivals else (">packed", ">psi")
    table = _table("tensor", "method", ">values", ">bytes", *columns)
    largest = sorted(value["tensors"], key=lambda t: -t["before"])
    for tensor in largest[:_ROWS]:
        psi = _percent(tensor["psi"])
        others = [_percent(tensor["rivals"][key] / tensor["before"]) for key in ("zip", "fp16_zip") if rivals]
        table.add_row(
            _cell(tensor["name"] or "(no name)"),
            tensor["method"],
            "-" if tensor["clusters"] is None else str(tensor["clusters"]),
            f"{tensor['before']:,}",
            *([psi, *others] if rivals else [f"{tensor['after']:,}", psi]),
        )
    yield from _limited(table, largest, "tensors")
    if value["verification"]:
        yield _checks(value["verification"], value["settings"]["max_drop"])
    if value["unpacked"]["lossless"]:
        yield Text("every bit comes back")
    elif not value["verification"]:
        yield Text("note: what the shared values cost was not measured; --data measures it.")


def _unpack(value: Document, _: Console) -> Iterator[RenderableType]:
    yield Text.assemble((value["packed"]["path"], "bold"), " -> ", (value["output"]["path"], "bold"))
    lines = [f"{value['packed']['bytes']:,} bytes -> {value['output']['bytes']:,} bytes"]
    lines += [f"and beside it {name}" for name in value["beside"]]
    lines.append("bit by bit the original" if value["lossless"] else "weights share values: not the original bits")
    yield Text("\n".join(lines))


_DRAW = {
    "ratio": _pack,
    "packed": _unpack,
    "points": _frontier,
    "after": _prune,
    "predicted": _plan,
    "tensors": _checkpoint,
    "method": _score,
    "groups": _inspect,
    "pruned": _verify,
    "models": _bench,
    "operators": _operators,
    "solvers": _solvers,
}
"""How to draw a document, by a key that no other document before it in the list has."""


def _operator(op: Document) -> str:
    name = f"{op['domain']}::{op['name']}" if op["domain"] else op["name"]
    if op["until"] is not None:
        return f"{name} (opset {op['since']}-{op['until']})"
    return name if op["since"] == 1 else f"{name} (opset {op['since']}+)"


def _costs(
    before: Document, after: Document | None = None, budget: Document | None = None, latency: float | None = None
) -> Table:
    if after is None:
        table = _table(">MACs", ">parameters", ">bytes")
        table.add_row(*(f"{before[k]:,}" for k in ("macs", "params", "bytes")))
        return table
    table = _table("", ">before", ">after", ">kept", *([">budget"] if budget else []))
    for key, name, wanted in (("macs", "MACs", "macs"), ("params", "parameters", "params"), ("bytes", "bytes", "size")):
        row = [name, f"{before[key]:,}", f"{after[key]:,}", _percent(after[key] / before[key] if before[key] else None)]
        table.add_row(*row, *([_percent(budget[wanted], "")] if budget else []))
    if budget and latency is not None:
        table.add_row("latency", "", f"{1 / latency:.2f} x as fast", _percent(latency), _percent(budget["latency"], ""))
    return table


def _connections(found: Document, console: Console) -> Iterator[RenderableType]:
    table = _table("layer", ">connections", ">kept", "share kept")
    whole = {"node": "all layers", "total": found["total"], "kept": found["kept"]}
    for layer in [*found["layers"][:_ROWS], whole]:
        share = layer["kept"] / max(layer["total"], 1)
        table.add_row(_cell(layer["node"]), f"{layer['total']:,}", f"{layer['kept']:,}", _bar(share, console))
    yield from _limited(table, found["layers"], "layers")
    rounds = _count(len(found["rounds"]), "round")
    yield Text(f"{found['compression']:.1f} times fewer connections after {rounds}")


def _programs(programs: Sequence[Document]) -> Iterator[RenderableType]:
    if not programs:
        return
    table = _table("program", "solver", "status", ">gap", ">seconds", ">variables", ">rows", "what binds")
    for program in programs:
        limit = program.get("limit")
        binding = program.get("binding")
        table.add_row(
            program["purpose"],
            program["solver"],
            _cell(f"{program['status']}, {limit} limit" if limit else program["status"]),
            _percent(program["gap"], digits=2),
            "-" if program["seconds"] is None else f"{program['seconds']:.2f}",
            f"{program['variables']:,}",
            f"{program['rows']:,}",
            _cell("-" if binding is None else ", ".join(binding) or "nothing"),
        )
    yield table
    reasons = dict.fromkeys(p["reason"] for p in programs if p.get("reason") not in (None, "", "as asked"))
    if reasons:
        yield Text("\n".join(f"solver: {reason}." for reason in reasons))


def _fits(fits: Sequence[Document]) -> Iterator[RenderableType]:
    if not fits:
        return
    counts: dict[str, int] = {}
    for fit in fits:
        counts[fit["form"]] = counts.get(fit["form"], 0) + 1
    table = _table("refit", ">result", header=False)
    table.add_row("nodes refitted", _cell(", ".join(f"{n:,} by {form}" for form, n in counts.items())))
    worst = max(fits, key=lambda fit: fit["error_after"])
    before, after = _number(worst["error_before"]), _number(worst["error_after"])
    table.add_row("largest relative error left", _cell(f"{before} -> {after} in {worst['node']}"))
    yield table


def _checks(verification: Document, max_drop: float | None = None) -> Table:
    table = _table("check", ">result", header=False)
    if verification["masked_equivalence"] is not None:
        table.add_row("differs from the masked original by", _number(verification["masked_equivalence"]))
    if verification["rounding"] is not None:
        table.add_row("rounding alone moves the masked original by", _number(verification["rounding"]))
    table.add_row("relative error of the outputs", _number(verification["output_relative_error"]))
    if verification["agreement"] is not None:
        table.add_row("same top class as the original", _percent(verification["agreement"], digits=2))
    if verification["accuracy_after"] is not None:
        before = _percent(verification["accuracy_before"], digits=2)
        table.add_row("accuracy", f"{before} -> {_percent(verification['accuracy_after'], digits=2)}")
    if max_drop is not None:
        table.add_row("largest drop allowed", f"{max_drop:g} points")
    table.add_row("measured on", _count(verification["samples"], "sample") if verification["samples"] else "no data")
    if verification["batches"]:
        table.add_row("ran at batch", ", ".join(str(b) for b in verification["batches"]))
    for failure in verification["failures"]:
        table.add_row(Text("FAILED", "bold red"), _cell(failure))
    return table


def _reasons(skipped: Sequence[Document]) -> Iterator[RenderableType]:
    if not skipped:
        return
    grouped: dict[str, list[Document]] = {}
    for entry in skipped:
        grouped.setdefault(entry["reason"], []).append(entry)
    table = _table("cannot go, because", ">channels", "of")
    ordered = sorted(grouped.items(), key=lambda item: -sum(e["channels"] for e in item[1]))
    for reason, entries in ordered[:_ROWS]:
        channels = sum(e["channels"] for e in entries)
        table.add_row(_cell(reason), f"{channels:,}", _cell(_some(list(dict.fromkeys(e["tensor"] for e in entries)))))
    yield from _limited(table, ordered, "reasons")


def _limited(table: Table, rows: Sequence[Any], what: str) -> Iterator[RenderableType]:
    if not rows:
        yield Text(f"no {what}")
        return
    yield table
    if len(rows) > _ROWS:
        yield Text(f"... and {len(rows) - _ROWS:,} more {what}; --json lists all.")


def _table(*columns: str, header: bool = True) -> Table:
    """A plain table; a column whose name starts with '>' is flushed right and never wrapped."""
    table = Table(box=box.SIMPLE_HEAD if header else None, show_header=header, show_edge=False, pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        table.add_column(
            column.removeprefix(">"), justify="right" if right else "left", no_wrap=right, overflow="fold"
        )
    return table


def _cell(text: str) -> Text:
    """Text that comes from a model: never read as markup."""
    return Text(text, overflow="fold")


def _bar(level: float, console: Console) -> Text:
    encoding = (console.encoding or "").lower()
    full, empty = ("█", "░") if encoding.startswith("utf") else ("#", ".")
    filled = min(_BAR, max(round(level * _BAR), 1 if level > 0 else 0))
    return Text(f"{full * filled}{empty * (_BAR - filled)} {100 * level:5.1f} %")


def _percent(value: float | None, missing: str = "-", digits: int = 1) -> str:
    return missing if value is None else f"{100 * value:.{digits}f} %"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.3g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _some(names: Sequence[str], limit: int = 2) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
