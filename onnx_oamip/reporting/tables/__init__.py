"""Terminal tables of the JSON documents, readable at 80 columns.

They are made from the documents alone, so that tables and JSON always agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath

from rich.console import Console, RenderableType
from rich.text import Text

from onnx_oamip.core.printable import shortened, visible
from onnx_oamip.reporting.command_lines import knee_command
from onnx_oamip.reporting.documents import Document
from onnx_oamip.reporting.side_by_side import lost
from onnx_oamip.reporting.tables.parts import (
    NAME,
    ROWS,
    WIDE,
    assumption_rows,
    bar,
    cell,
    checks,
    connection_rows,
    costs,
    fit_rows,
    grid,
    latency_rows,
    limited,
    number,
    objective_rows,
    operator_name,
    output_rows,
    percent,
    plural,
    point_table,
    points,
    program_rows,
    reason_rows,
    recovery_lines,
    some,
    stage_quality,
    stage_sizes,
    time_cell,
    times,
)


def show(value: Document, console: Console) -> None:
    """Prints the tables of a document.

    Args:
        value: The document of any command.
        console: Where to print.
    """
    draw = next(draw for key, draw in _DRAW.items() if key in value)
    first = True
    for part in draw(value, console):
        if not first:
            console.print()
        if isinstance(part, Text):
            part = _visible(part)
        console.print(part, soft_wrap=isinstance(part, Text))
        first = False


def _visible(lines: Text) -> Text:
    """Spells out invisible characters in lines of text."""
    if lines.plain.replace("\n", "").isprintable():
        return lines
    return Text("\n".join(visible(line) for line in lines.plain.split("\n")))


def _prune(value: Document, console: Console) -> Iterator[RenderableType]:
    output = value["output"]["path"] or "(not written)"
    yield Text.assemble((value["model"]["path"], "bold"), " -> ", (output, "bold"))
    latency = value["verification"]["latency"]
    yield costs(value["before"], value["after"], value["budget"], latency)
    if latency:
        yield from latency_rows(latency)
    yield from _groups(value["groups"], console)
    if value["connections"]:
        yield from connection_rows(value["connections"], console)
    yield from reason_rows(value["skipped"])
    yield from program_rows(value["programs"], console)
    yield from fit_rows(value["fits"])
    if value["recovery"]:
        yield recovery_lines(value["recovery"])
    yield from output_rows(value["verification"])
    yield checks(value["verification"], value["budget"]["max_drop"])
    if value["notes"]:
        yield Text("\n".join(f"note: {note}" for note in value["notes"]))


def _recover(value: Document, _: Console) -> Iterator[RenderableType]:
    output = value["output"]["path"] or "(not written)"
    yield Text.assemble((value["unrecovered"]["path"], "bold"), " -> ", (output, "bold"))
    yield recovery_lines(value["recovery"])
    table = grid("output", "measure", ">lost before", ">lost after")
    for measure in value["recovery"]["outputs"][:ROWS]:
        before = measure["before_recovery"]
        table.add_row(
            cell(shortened(measure["output"])),
            cell(measure["measure"]),
            points(before["lost"]),
            points(measure["lost"]),
        )
    yield table
    if value["notes"]:
        yield Text("\n".join(f"note: {note}" for note in value["notes"]))


def _plan(value: Document, console: Console) -> Iterator[RenderableType]:
    output = value["output"]["path"] or "(a dry run: nothing is written)"
    yield Text.assemble((value["model"]["path"], "bold"), " -> ", (output, "bold"))
    yield costs(value["before"], value["predicted"], value["budget"])
    yield from _groups(value["groups"], console)
    yield from reason_rows(value["skipped"])
    yield from program_rows(value["programs"], console)
    if value["notes"]:
        yield Text("\n".join(f"note: {note}" for note in value["notes"]))


def _groups(groups: Sequence[Document], console: Console) -> Iterator[RenderableType]:
    table = grid("group", ">units", ">kept", "share kept", ">scores")
    for group in groups[:ROWS]:
        scores = group["score"]
        table.add_row(
            cell(shortened(group["name"])),
            f"{group['units']:,}",
            f"{group['kept']:,}",
            bar(group["level"], console),
            "-" if scores["min"] is None else f"{number(scores['min'])} .. {number(scores['max'])}",
        )
    yield from limited(table, groups, "groups")


def _frontier(value: Document, _: Console) -> Iterator[RenderableType]:
    before = value["before"]
    accuracy = percent(before["accuracy"], "not measured", 2)
    yield Text.assemble(
        (value["model"]["path"], "bold"), f"  {value['importance']} scores, accuracy {accuracy}"
    )
    yield costs(before)
    yield point_table(value["points"])
    lines = ["shares, and latency, of the original's; error: of the outputs, relative."]
    lines += [f"at {percent(p['asked'])}: {p['reason']}" for p in value["points"] if p["reason"]]
    lines += [f"wrote {p['output']}" for p in value["points"] if p["output"]]
    if value["knee"] is not None:
        lines.append(
            f"knee: {percent(value['knee'])}, below which quality falls faster; for that model:"
        )
        lines.append(f"  {knee_command(value)}")
    yield Text("\n".join([*lines, *(f"note: {note}" for note in value["notes"])]))


def _score(value: Document, console: Console) -> Iterator[RenderableType]:
    yield Text.assemble((value["model"]["path"], "bold"), " -> ", (value["output"]["path"], "bold"))
    table = grid("group", ">units", ">least", ">median", ">largest", f">below {value['low']:g}")
    for group in value["groups"][:ROWS]:
        scores = group["score"]
        spread = (number(scores[key]) for key in ("min", "median", "max"))
        table.add_row(
            cell(shortened(group["name"])), f"{group['units']:,}", *spread, percent(scores["below"])
        )
    yield from limited(table, value["groups"], "groups")
    yield from program_rows(value["programs"], console)
    lines = [f"scored by {value['method']}"]
    mask = value["mask"]
    if mask is not None:
        units = sum(group["units"] for group in value["groups"])
        reached = f"{mask['kept']:,} of {units:,} units reach {mask['threshold']:g}"
        lines.append(f"mask: {reached} -> {mask['path']}")
    yield Text("\n".join([*lines, *(f"note: {note}" for note in value["notes"])]))


def _inspect(value: Document, _: Console) -> Iterator[RenderableType]:
    model = value["model"]
    opset = ", ".join(f"{domain} {version}" for domain, version in model["opset"].items())
    yield Text.assemble((model["path"], "bold"), f"  opset {opset}")
    table = grid("", "name", "type", "shape", header=False)
    for kind in ("inputs", "outputs"):
        for port in model[kind]:
            dims = ", ".join("?" if d is None else str(d) for d in port["dims"])
            table.add_row(
                kind[:-1], cell(shortened(port["name"])), port["dtype"], cell(f"[{dims}]")
            )
    yield table
    yield costs(value["cost"])
    yield from assumption_rows(model)
    in_file = {name: of[0] for name, of in value["folded"].items()}
    table = grid("group", ">units", ">weights", "summed over by")
    for group in value["groups"][:ROWS]:
        weights = len({a["tensor"] for a in group["axes"] if a["constant"]})
        table.add_row(
            cell(_with_name_in_file(group["name"], in_file)),
            f"{group['units']:,}",
            str(weights),
            cell(some(group["consumers"])),
        )
    yield from limited(table, value["groups"], "groups")
    yield from objective_rows(value["objective"])
    skipped = [
        {**entry, "tensor": _with_name_in_file(entry["tensor"], in_file)}
        for entry in value["skipped"]
    ]
    yield from reason_rows(skipped)
    if value["notes"]:
        yield Text("\n".join(f"note: {note}" for note in value["notes"]))


def _with_name_in_file(name: str, in_file: Mapping[str, str]) -> str:
    """Name of a weight, or of a group that is named after one, with that of the initialiser in brackets."""
    weight = name if name in in_file else name.rpartition("#")[0]
    stored = in_file.get(weight)
    return shortened(name) if stored is None else f"{shortened(name)} ({shortened(stored)})"


def _verify(value: Document, _: Console) -> Iterator[RenderableType]:
    before = value["original"]
    after = value["pruned"]
    yield Text.assemble((before["path"], "bold"), " and ", (after["path"], "bold"))
    yield costs(before["cost"], after["cost"])
    yield from assumption_rows(before)
    yield from output_rows(value["verification"])
    yield checks(value["verification"])


def _bench(value: Document, _: Console) -> Iterator[RenderableType]:
    paths = [PurePath(model["path"]) for model in value["models"]]
    names = [path.name for path in paths]
    if len(set(names)) != len(set(paths)):  # file names are not enough to tell the models apart
        names = [str(path) for path in paths]
    threads = f", {plural(value['threads'], 'thread')}" if value["threads"] else ""
    for place, batch in enumerate(value["batch"]):
        yield Text(f"{plural(batch, 'sample')} a run on {value['device']}{threads}")
        table = grid("model", ">p50 ms", ">p95 ms", ">samples/s", ">peak MiB", ">time, 95 %")
        for model, name in zip(value["models"], names, strict=True):
            timing = model["timings"][place]
            ratio = timing["ratio"]
            peak = timing["peak_bytes"]
            table.add_row(
                cell(name),
                f"{timing['p50_ms']:,.3f}",
                f"{timing['p95_ms']:,.3f}",
                f"{timing['throughput']:,.0f}",
                "-" if peak is None else f"{peak / 2**20:,.1f}",
                f"{times(ratio['median'])} ({times(ratio['low'])}-{times(ratio['high'])})",
            )
        yield table
    yield Text(
        "time: of the first model's, the median over rounds and its 95 % interval;\n"
        "peak: memory that loading and running added to a fresh process."
    )


def _checkpoint(value: Document, _: Console) -> Iterator[RenderableType]:
    yield Text(f"-> {value['output']['path']}", "bold")
    cut = [t for t in value["tensors"] if t["weight"] is not None]
    table = grid("tensor", "before", "after")
    for tensor in cut[:ROWS]:
        table.add_row(
            cell(shortened(tensor["name"])),
            *(" x ".join(map(str, tensor[k])) for k in ("before", "after")),
        )
    yield from limited(table, cut, "tensors")
    yield Text(f"{len(value['tensors']) - len(cut)} tensors stay as they are.")
    if value["unmatched"]:
        yield Text(f"in no tensor, by name or by content: {', '.join(value['unmatched'])}")


def _operators(value: Document, _: Console) -> Iterator[RenderableType]:
    kinds: dict[str, list[str]] = {
        "counted and refitted": [],
        "counted": [],
        "repaired": [],
        "followed": [],
    }
    for op in value["operators"]:
        kinds[_support(op)].append(operator_name(op))
    table = grid("", "operators", header=False)
    for kind, names in kinds.items():
        if names:
            table.add_row(kind, cell(", ".join(names)))
    yield table
    yield Text(
        f"{len(value['operators'])} entries. Counted: their multiply-accumulates are MACs. Repaired:\n"
        "attributes or constants follow the cut. Channels that meet any other operator\n"
        "stay, with the reason."
    )


def _support(op: Document) -> str:
    """Kind of support of an operator, a key of the table of operators."""
    if op["macs"]:
        if op["refit"]:
            return "counted and refitted"
        return "counted"
    if op["repair"]:
        return "repaired"
    return "followed"


def _profile(value: Document, _: Console) -> Iterator[RenderableType]:
    yield Text.assemble((value["model"]["path"], "bold"), " -> ", (value["output"]["path"], "bold"))
    table = grid(">widths", ">measured ms", ">fitted ms")
    for place, level in enumerate(value["levels"]):
        name = "all units" if place == 0 else f"narrower {place}"
        table.add_row(name, f"{level['milliseconds']:.3f}", f"{level['fitted']:.3f}")
    yield table
    form = (
        "by layer" if value["by_node"] else "for the whole network, as layers were not recognised"
    )
    yield Text(
        f"{value['device']}, channels in multiples of {value['step']}; fitted {form}, off by at most "
        f"{percent(value['largest_error'])}"
    )


def _doctor(value: Document, console: Console) -> Iterator[RenderableType]:
    system = value["system"]
    cache = value["cache"]
    table = grid("", "finding", header=False)
    table.add_row("system", cell(system["platform"]))
    free = f"{system['free_memory'] / 2**30:.1f} GiB free"
    table.add_row("hardware", f"{plural(system['processors'], 'processor')}, {free}")
    for package, version in value["versions"].items():
        table.add_row(package, version or "not installed")
    table.add_row("providers", cell(", ".join(value["providers"])))
    stored = f"{cache['folder']}, {cache['bytes'] / 2**20:.1f} MiB"
    table.add_row("cache", cell(stored if cache["folder"] else "off"))
    yield table
    table = grid("device", "trial", ">seconds", "problem")
    for device in value["devices"]:
        trial = "passed" if device["seconds"] is not None else "failed"
        seconds = "-" if device["seconds"] is None else f"{device['seconds']:.1f}"
        row = (trial if device["usable"] else "not available", seconds, cell(device["problem"]))
        table.add_row(device["name"], *row)
    yield table
    yield from _solvers(value, console)
    table = grid("extra", "missing packages")
    for extra, missing in value["extras"].items():
        table.add_row(extra, cell(", ".join(missing) or "none"))
    yield table
    problems = [f"problem: {problem}" for problem in value["problems"]]
    yield Text("\n".join(problems) or "no problem found")


def _solvers(value: Document, _: Console) -> Iterator[RenderableType]:
    table = grid("solver", "version", "usable", ">variables", ">rows", "licence")
    for solver in value["solvers"]:
        unlimited = "any" if solver["usable"] else "-"
        sizes = [f"{solver[k]:,}" if solver[k] else unlimited for k in ("variables", "rows")]
        usable = "yes" if solver["usable"] else "no"
        table.add_row(
            solver["name"], solver["version"] or "-", usable, *sizes, cell(solver["licence"])
        )
    yield table
    yield Text("--solver auto takes the first that is usable and whose licence allows the size.")


def _pack(value: Document, _: Console) -> Iterator[RenderableType]:
    yield Text.assemble((value["model"]["path"], "bold"), " -> ", (value["output"]["path"], "bold"))
    before = value["before"]["bytes"]
    rivals = value["rivals"]
    table = grid("", ">bytes", ">of the model")
    sizes = {"model": before, "packed": value["after"]["bytes"]}
    if rivals:
        sizes |= {"zip": rivals["zip"], "fp16": rivals["fp16"], "fp16, zip": rivals["fp16_zip"]}
    for name, size in sizes.items():
        table.add_row(name, f"{size:,}", percent(size / before))
    yield table
    columns = (">psi", ">zip", ">fp16, zip") if rivals else (">packed", ">psi")
    table = grid("tensor", "method", ">values", ">bytes", *columns)
    largest = sorted(value["tensors"], key=lambda t: -t["before"])
    for tensor in largest[:ROWS]:
        psi = percent(tensor["psi"])
        others = [
            percent(tensor["rivals"][key] / tensor["before"])
            for key in ("zip", "fp16_zip")
            if rivals
        ]
        table.add_row(
            cell(tensor["name"] or "(no name)"),
            tensor["method"],
            "-" if tensor["clusters"] is None else str(tensor["clusters"]),
            f"{tensor['before']:,}",
            *([psi, *others] if rivals else [f"{tensor['after']:,}", psi]),
        )
    yield from limited(table, largest, "tensors")
    if value["verification"]:
        yield checks(value["verification"], value["settings"]["max_drop"])
    if value["unpacked"]["lossless"]:
        yield Text("every bit comes back")
    elif not value["verification"]:
        yield Text("note: what the shared values cost was not measured; --data measures it.")


def _unpack(value: Document, _: Console) -> Iterator[RenderableType]:
    yield Text.assemble(
        (value["packed"]["path"], "bold"), " -> ", (value["output"]["path"], "bold")
    )
    lines = [f"{value['packed']['bytes']:,} bytes -> {value['output']['bytes']:,} bytes"]
    lines += [f"and beside it {name}" for name in value["beside"]]
    if value["lossless"]:
        lines.append("bit by bit the original")
    else:
        lines.append("weights share values: not the original bits")
    yield Text("\n".join(lines))


def _int8(value: Document, _: Console) -> Iterator[RenderableType]:
    before, after = value["float_model"], value["output"]
    yield Text.assemble((before["path"], "bold"), " -> ", (after["path"], "bold"))
    table = grid("", ">before", ">after", ">kept")
    for name, key in (("bytes", "bytes"), ("zip", "zip_bytes")):
        share = percent(after[key] / before[key])
        table.add_row(name, f"{before[key]:,}", f"{after[key]:,}", share)
    yield table
    weights = value["weights"]
    samples = f" from {plural(value['samples'], 'sample')}" if value["samples"] else ""
    yield Text(
        f"{plural(weights['int8'], 'weight')} int8, {weights['float']:,} left as they are; ranges {value['ranges']}"
        f"{samples}"
    )
    if value["notes"]:
        yield Text("\n".join(f"note: {note}" for note in value["notes"]))


def _run(value: Document, console: Console) -> Iterator[RenderableType]:
    yield Text.assemble((value["model"]["path"], "bold"), " -> ", (value["folder"], "bold"))
    is_wide = console.width >= WIDE
    yield stage_sizes(value["stages"], is_wide=is_wide)
    yield stage_quality(value["stages"], value["reused"], is_wide=is_wide)
    lines = [
        "zip: deflated, as it ships; time: of the original's, the median and its 95 % interval;",
        "lost: points of the worst output against the original on held-out samples.",
    ]
    lines += [f"wrote {row['path']}" for row in value["stages"][1:]]
    lines += [f"note: {note}" for note in value["notes"]]
    yield Text("\n".join(lines))
    if value["broken"]:
        yield Text(
            "\n".join(f"limit broken: {sentence}" for sentence in value["broken"]), "bold red"
        )


def _compare(value: Document, console: Console) -> Iterator[RenderableType]:
    yield Text(value["original"]["path"], "bold")
    names = ["MACs", "bytes", "zip", "time (95 %)", "accuracy", "lost"]
    if console.width < WIDE:
        names = ["bytes", "time (95 %)", "lost"]
    table = grid("model", *(f">{name}" for name in names))
    for model in value["compared_models"]:
        found = model["verification"]
        shares = model["shares"]
        cells = {
            "MACs": percent(shares["macs"]),
            "bytes": percent(shares["bytes"]),
            "zip": percent(shares["zip_bytes"]),
            "time (95 %)": time_cell(found),
            "accuracy": percent(found and found["accuracy_after"], digits=2),
            "lost": points(lost(found)),
        }
        table.add_row(cell(shortened(model["name"], NAME)), *(cells[name] for name in names))
    yield table
    yield Text("shares of the original's; lost: points of the worst output.")
    if value["differences"]:
        settings = ", ".join(row["setting"] for row in value["differences"])
        yield Text(f"settings that differ: {settings}")


_DRAW = {
    "compared_models": _compare,
    "stages": _run,
    "float_model": _int8,
    "unrecovered": _recover,
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
    "levels": _profile,
    "operators": _operators,
    "devices": _doctor,
    "solvers": _solvers,
}
"""Function that makes the tables of a document, by a key that only the documents of one command have.

The order matters: a key is looked for only if none of those before it occurs.
"""
