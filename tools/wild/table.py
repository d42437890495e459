"""The table of all runs, as a study that docs/results.md shows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bench import studies
from .draw import SEED
from .manifest import Entry, Manifest
from .run import BUDGETS

USABLE = 0.95
MOST_MIB, MOST_SECONDS = 4096, 600
COLUMNS = (
    "file",
    "package",
    "task",
    "measure",
    "kept at 0.7",
    "kept at 0.5",
    "least budget",
    "bytes at 0.5",
    "processor s",
    "peak MiB",
    "onnxsim bytes",
    "onnxsim apart",
    "remark",
)
CLOCKED = ("processor s", "peak MiB")
"""Processor time bounds the seconds on an idle machine, and does not depend on what else runs."""
Record = Mapping[str, Any]


def rows(manifest: Manifest, out: Path) -> list[studies.Row]:
    """One row for every file with a record; a cell says what happened where nothing was pruned."""
    found = []
    for entry in manifest.entries:
        inspected = _read(out, f"{entry.name}-inspect")
        runs = [_read(out, f"{entry.name}-{budget}") for budget in BUDGETS]
        if inspected or any(runs):
            simplified = _read(out, f"{entry.name}-onnxsim") or {}
            beside = {f"onnxsim {key}": simplified.get(key) for key in ("bytes", "apart")}
            found.append(_row(entry, inspected, runs) | beside)
    return found


def _with_earlier(
    found: Sequence[studies.Row], manifest: Manifest, saved: Path
) -> list[studies.Row]:
    """Rows in the order of the manifest, those of a saved study where there is no new one."""
    earlier = json.loads(saved.read_text(encoding="utf-8"))["rows"] if saved.exists() else []
    by_name = {row["file"]: row for row in (*earlier, *found)}
    return [by_name[entry.name] for entry in manifest.entries if entry.name in by_name]


def _read(out: Path, stem: str) -> Record | None:
    path = out / f"{stem}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _row(entry: Entry, inspected: Record | None, runs: Sequence[Record | None]) -> studies.Row:
    made = [run for run in (inspected, *runs) if run]
    judged = [run for run in runs if run and "kept" in run]
    last = judged[-1] if judged else None
    task = [entry.task]
    if entry.budget == "params":
        task.append("budget in parameters")
    if entry.options:
        task.append(" ".join(entry.options))
    remarks = [entry.reason] if entry.reason else []
    remarks += [_brief(run["error"]) for run in made if run.get("error")]
    least = max((run["least"] for run in made if "least" in run), default=None)
    if least is not None:
        counted = "MACs" if entry.budget == "macs" else "parameters"
        remarks.append(
            f"unreachable: {least:.1%} of the {counted} is the smallest budget, and is judged in its place"
        )
    return {
        "file": entry.name,
        "package": f"{entry.package.name} {entry.package.version}",
        "task": ", ".join(task),
        "measure": last["measure"] if last else None,
        "kept at 0.7": _kept(runs[0]),
        "kept at 0.5": _kept(runs[1]),
        "least budget": least,
        "bytes at 0.5": _bytes(runs[1]),
        "processor s": max(run.get("processor", 0) for run in made),
        "peak MiB": max(run.get("peak_mib", 0) for run in made),
        "remark": ". ".join(dict.fromkeys(remarks)).replace("|", "/") or None,
    }


def _brief(error: str) -> str:
    """The first clause of an error, with file names in place of paths."""
    clause = error.removeprefix("Error: ").split(";")[0].split(", for example")[0]
    return re.sub(r"/\S+/(\S+)", r"\1", clause)


def _kept(run: Record | None) -> float | str | None:
    """The share of the task that is kept, or what happened instead."""
    if run is None:
        return None
    return round(run["kept"], 3) if "kept" in run else str(run["status"])


def _bytes(run: Record | None) -> float | None:
    """Size of the pruned file over that of the original."""
    if run is None or "kept" not in run:
        return None
    return round(run["after"]["bytes"] / run["before"]["bytes"], 2)


def summary(found: Sequence[studies.Row]) -> list[str]:
    """Counts over all files, as sentences."""

    def usable(budget: float) -> int:
        column = f"kept at {budget}"
        return sum(
            isinstance(row[column], float) and row[column] >= USABLE
            for row in found
            if (row.get("least budget") or 0) <= budget
        )

    refused = [
        r["file"]
        for r in found
        if any(isinstance(r[c], str) for c in ("kept at 0.7", "kept at 0.5"))
    ]
    unreachable = [r["file"] for r in found if r.get("least budget")]
    larger = [r["file"] for r in found if (r["bytes at 0.5"] or 0) > 1]
    over = [r["file"] for r in found if r["processor s"] > MOST_SECONDS or r["peak MiB"] > MOST_MIB]
    share = f"{len(found)} files; usable (at least {USABLE:.0%} of the task)"
    return [
        f"{share} at 0.7: {usable(0.7)}, at 0.5: {usable(0.5)}",
        f"a budget is unreachable, and the least is judged: {', '.join(unreachable) or 'none'}",
        f"without a result: {', '.join(refused) or 'none'}",
        f"larger than the original: {', '.join(larger) or 'none'}",
        f"over {MOST_SECONDS} s of processor time or {MOST_MIB} MiB: {', '.join(over) or 'none'}",
    ]


def write(manifest: Manifest, out: Path, study: Path | None = None) -> str:
    """Make the table of all runs.

    Args:
        manifest: The files.
        out: Folder of records.
        study: Folder of studies, to save the rows in as the study ``wild``. Files without a record in ``out`` keep
            the row that they have there.

    Returns:
        The table and its counts, as Markdown.
    """
    found = rows(manifest, out)
    if study is not None:
        found = _with_earlier(found, manifest, study / "wild.json")
        studies.store(study, "wild", found, COLUMNS, SEED, CLOCKED)
    lines = "\n".join(f"- {line}" for line in summary(found))
    return f"{studies.table(found, COLUMNS)}\n\n{lines}"


RECOVERED = (
    "file",
    "task",
    "measure",
    "kept",
    "kept recovered",
    "held-out loss",
    "held-out loss recovered",
    "steps",
    "augmentation",
    "processor s",
    "peak MiB",
)


def write_recovered(
    manifest: Manifest, out: Path, recovered: Path, study: Path | None = None
) -> str:
    """Table of files that were pruned to half without and with a recovery, as Markdown.

    Args:
        manifest: The files.
        out: Folder of records without a recovery.
        recovered: Folder of records with one.
        study: Folder to save the study ``wild-recovered`` to.

    Returns:
        The table.
    """
    found = []
    for entry in manifest.entries:
        before, after = (_read(folder, f"{entry.name}-0.5") for folder in (out, recovered))
        if before and after and "recovery" in after:
            found.append(_recovered_row(entry, before, after))
    if study is not None:
        studies.store(study, "wild-recovered", found, RECOVERED, SEED, CLOCKED)
    return studies.table(found, RECOVERED)


def _recovered_row(entry: Entry, before: Record, after: Record) -> studies.Row:
    recovery = after["recovery"]
    return {
        "file": entry.name,
        "task": entry.task,
        "measure": after.get("measure"),
        "kept": _kept(before),
        "kept recovered": _kept(after),
        "held-out loss": f"{recovery['before']:.4f}",
        "held-out loss recovered": f"{recovery['after']:.4f}"
        if recovery["accepted"]
        else "refused",
        "steps": recovery["steps"],
        "augmentation": recovery["augment"],
        "processor s": after["processor"],
        "peak MiB": after["peak_mib"],
    }
