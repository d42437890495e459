"""What a run says about itself: one JSON document per command, and the same document as terminal tables.

The tables are drawn from the documents and from nothing else, so that both always say the same. Documents hold plain
values only and are strict JSON: what is not a finite number is null.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from importlib import metadata
from pathlib import PurePath
from typing import Any, TypeAlias

import numpy as np
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from . import __version__
from .cost import full_widths, ledger
from .ops import REGISTRY
from .records import Cost, Coupling, Floats, Model, Port, Report, Verification

SCHEMA_VERSION = 1
Document: TypeAlias = dict[str, Any]

_ROWS = 40
"""Rows of a terminal table before the rest is left to --json."""
_BAR = 12


# ------------------------------------------------------------------------------------------------------ documents


def document(report: Report) -> Document:
    """The JSON document of ``prune``."""
    kept = np.asarray(report.plan.widths, np.int64)
    result = {
        "schema_version": SCHEMA_VERSION,
        "model": _model(report.model),
        "output": {"path": report.output, "sha256": report.output_sha256},
        "before": _cost(report.before),
        "after": _cost(report.after),
        "budget": {
            "macs": report.budget.macs,
            "params": report.budget.params,
            "size": report.budget.size,
            "threshold": report.budget.threshold,
        },
        "groups": [
            {
                "name": group.name,
                "units": len(group.units),
                "kept": int(width),
                "level": int(width) / len(group.units),
                "score": _summary(report.scores.values[group.units]),
            }
            for group, width in zip(report.coupling.groups, kept, strict=True)
        ],
        "skipped": _skipped(report.coupling),
        "importance": report.scores.method,
        "allocation": report.plan.allocation,
        "programs": [*report.scores.programs, *report.plan.programs],
        "verification": _verification(report.verification),
        "notes": _distinct([*report.notes, *report.plan.notes]),
        "timings": report.timings,
        "settings": report.settings,
        "versions": versions(),
    }
    return _document(result)


def inspection(model: Model, coupling: Coupling) -> Document:
    """The JSON document of ``inspect``: what can go, what cannot, and why."""
    result = {
        "schema_version": SCHEMA_VERSION,
        "model": _model(model),
        "cost": _cost(ledger(model, coupling).cost(full_widths(coupling))),
        "groups": [
            {
                "name": group.name,
                "units": len(group.units),
                "axes": [
                    {"tensor": tensor, "axis": axis, "per_unit": held, "constant": tensor in model.constants}
                    for (tensor, axis), held in group.multiplicity.items()
                ],
                "consumers": consumers,
            }
            for group, consumers in zip(coupling.groups, _consumers(coupling), strict=True)
        ],
        "skipped": _skipped(coupling),
        "versions": versions(),
    }
    return _document(result)


def comparison(original: Model, pruned: Model, verification: Verification) -> Document:
    """The JSON document of ``verify``."""
    sides = []
    for model in (original, pruned):
        # Costs at full width do not depend on what could be cut.
        nothing = Coupling(0, (), np.zeros(0, np.int64), {}, (), ())
        sides.append({**_model(model), "cost": _cost(ledger(model, nothing).cost(full_widths(nothing)))})
    result = {
        "schema_version": SCHEMA_VERSION,
        "original": sides[0],
        "pruned": sides[1],
        "verification": _verification(verification),
        "versions": versions(),
    }
    return _document(result)


def operators() -> Document:
    """The JSON document of ``ops``: every operator whose channels can be followed."""
    result = {
        "schema_version": SCHEMA_VERSION,
        "operators": [
            {
                "name": spec.name,
                "domain": spec.domain,
                "since": spec.since,
                "until": spec.until,
                "macs": spec.cost is not None,
                "refit": spec.linear,
                "repair": spec.repair is not None,
            }
            for spec in sorted(REGISTRY, key=lambda s: (s.domain, s.name.lower(), s.since))
        ],
        "versions": versions(),
    }
    return _document(result)


def dumps(value: Document) -> str:
    """Strict JSON text of a document."""
    return json.dumps(value, indent=2, allow_nan=False)


def versions() -> dict[str, str | None]:
    """Versions of what decides a result; null for what is not installed."""
    return {
        "onnx_oamip": __version__,
        "onnx": _installed("onnx"),
        "onnxruntime": _installed("onnxruntime", "onnxruntime-gpu"),
        "numpy": _installed("numpy"),
        "python": platform.python_version(),
        "onnx_graphsurgeon": _installed("onnx-graphsurgeon"),
    }


def _installed(*names: str) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _model(model: Model) -> Document:
    return {
        "path": model.path,
        "sha256": model.sha256,
        "inputs": [_port(p) for p in model.inputs],
        "outputs": [_port(p) for p in model.outputs],
        "opset": {o.domain or "ai.onnx": o.version for o in model.proto.opset_import},
        "bindings": model.bindings,
    }


def _port(port: Port) -> Document:
    return {"name": port.name, "dtype": port.dtype.name, "dims": list(port.dims)}


def _cost(cost: Cost) -> Document:
    return {"macs": cost.macs, "params": cost.params, "bytes": cost.bytes}


def _summary(values: Floats) -> Document:
    if not len(values):
        return {"min": None, "mean": None, "max": None}
    return {"min": values.min(), "mean": values.mean(), "max": values.max()}


def _skipped(coupling: Coupling) -> list[Document]:
    return [{"tensor": p.tensor, "axis": p.axis, "channels": p.count, "reason": p.reason} for p in coupling.pinned]


def _consumers(coupling: Coupling) -> list[list[str]]:
    """Names of the nodes that sum over each group's channels, in graph order."""
    found: list[dict[str, None]] = [{} for _ in coupling.groups]
    for consumer in coupling.consumers:
        units = coupling.axes[consumer.data, consumer.axis]
        for group in np.unique(coupling.unit_group[units[units >= 0]]).tolist():
            found[group].setdefault(consumer.node)
    return [list(names) for names in found]


def _verification(verification: Verification) -> Document:
    return {
        "masked_equivalence": verification.masked_equivalence,
        "output_relative_error": verification.output_relative_error,
        "agreement": verification.agreement,
        "accuracy_before": verification.accuracy_before,
        "accuracy_after": verification.accuracy_after,
        "batches": verification.batches,
        "samples": verification.samples,
        "failures": verification.failures,
    }


def _distinct(notes: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(notes))


def _document(value: Mapping[str, Any]) -> Document:
    return {name: _plain(item) for name, item in value.items()}


def _plain(value: Any) -> Any:
    """The same value in JSON's own types; numbers that JSON has no word for become null."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (Sequence, AbstractSet)):
        return [_plain(v) for v in value]
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no place in a report")


# --------------------------------------------------------------------------------------------------------- tables


def show(value: Document, console: Console) -> None:
    """Draw a document of any command on a console, readable at 80 columns."""
    draw = _prune if "groups" in value and "after" in value else _inspect if "groups" in value else _rest
    first = True
    for part in draw(value, console):
        if not first:
            console.print()
        console.print(part, soft_wrap=isinstance(part, Text))
        first = False


def _prune(value: Document, console: Console) -> Iterator[RenderableType]:
    output = value["output"]["path"] or "(not written)"
    yield Text.assemble((value["model"]["path"], "bold"), " -> ", (output, "bold"))
    yield _costs(value["before"], value["after"], value["budget"])
    table = _table("group", ">units", ">kept", "share kept", ">mean score")
    for group in value["groups"][:_ROWS]:
        table.add_row(
            _cell(group["name"]),
            f"{group['units']:,}",
            f"{group['kept']:,}",
            _bar(group["level"], console),
            _number(group["score"]["mean"]),
        )
    yield from _limited(table, value["groups"], "groups")
    yield from _reasons(value["skipped"])
    yield _checks(value["verification"])
    if value["notes"]:
        yield Text("\n".join(f"note: {note}" for note in value["notes"]))


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


def _rest(value: Document, _: Console) -> Iterator[RenderableType]:
    if "operators" in value:
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
            f"{len(value['operators'])} entries. Counted: their multiply-accumulates are MACs. Repaired: attributes or\n"
            "constants follow the cut. Channels that meet any other operator stay, with the reason."
        )
        return
    before, after = value["original"], value["pruned"]
    yield Text.assemble((before["path"], "bold"), " and ", (after["path"], "bold"))
    yield _costs(before["cost"], after["cost"])
    yield _checks(value["verification"])


def _operator(op: Document) -> str:
    name = f"{op['domain']}::{op['name']}" if op["domain"] else op["name"]
    if op["until"] is not None:
        return f"{name} (opset {op['since']}-{op['until']})"
    return name if op["since"] == 1 else f"{name} (opset {op['since']}+)"


def _costs(before: Document, after: Document | None = None, budget: Document | None = None) -> Table:
    if after is None:
        table = _table(">MACs", ">parameters", ">bytes")
        table.add_row(*(f"{before[k]:,}" for k in ("macs", "params", "bytes")))
        return table
    table = _table("", ">before", ">after", ">kept", *([">budget"] if budget else []))
    for key, name, wanted in (("macs", "MACs", "macs"), ("params", "parameters", "params"), ("bytes", "bytes", "size")):
        row = [name, f"{before[key]:,}", f"{after[key]:,}", _percent(after[key] / before[key] if before[key] else None)]
        table.add_row(*row, *([_percent(budget[wanted], "")] if budget else []))
    return table


def _checks(verification: Document) -> Table:
    table = _table("check", ">result", header=False)
    if verification["masked_equivalence"] is not None:
        table.add_row("differs from the masked original by", _number(verification["masked_equivalence"]))
    table.add_row("relative error of the outputs", _number(verification["output_relative_error"]))
    if verification["agreement"] is not None:
        table.add_row("same top class as the original", _percent(verification["agreement"], digits=2))
    if verification["accuracy_after"] is not None:
        before = _percent(verification["accuracy_before"], digits=2)
        table.add_row("accuracy", f"{before} -> {_percent(verification['accuracy_after'], digits=2)}")
    table.add_row("measured on", f"{verification['samples']:,} samples")
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


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _some(names: Sequence[str], limit: int = 2) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


__all__ = ["Document", "comparison", "document", "dumps", "inspection", "operators", "show", "versions"]
