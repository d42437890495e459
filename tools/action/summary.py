"""Puts the report of a run into a job's summary and outputs: ``python summary.py report.json``.

The files are those that GitHub names in GITHUB_STEP_SUMMARY and GITHUB_OUTPUT.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from pathlib import Path
from typing import Any

SIDES = {"macs": "multiply-accumulates", "params": "parameters", "bytes": "bytes"}
ROWS = 40
"""Groups shown; the rest is in the report."""


def main() -> None:
    """Read the report that the command line names, and append to both files."""
    report = Path(sys.argv[1])
    document = json.loads(report.read_text(encoding="utf-8"))
    with Path(os.environ["GITHUB_STEP_SUMMARY"]).open("a", encoding="utf-8") as stream:
        stream.write(summary(document))
    with Path(os.environ["GITHUB_OUTPUT"]).open("a", encoding="utf-8") as stream:
        for name, value in {**outputs(document), "report": str(report)}.items():
            end = uuid.uuid4().hex  # a value cannot end itself and go on as another output
            stream.write(f"{name}<<{end}\n{value}\n{end}\n")


def outputs(document: dict[str, Any]) -> dict[str, str]:
    """Outputs of the action for later steps, as text; empty where a value was not measured."""
    before, after, found = document["before"], document["after"], document["verification"]
    values = {
        "model": document["output"]["path"],
        "macs-kept": _share(before["macs"], after["macs"]),
        "params-kept": _share(before["params"], after["params"]),
        "accuracy-before": found["accuracy_before"],
        "accuracy-after": found["accuracy_after"],
        "agreement": found["agreement"],
    }
    return {name: "" if value is None else str(value) for name, value in values.items()}


def summary(document: dict[str, Any]) -> str:
    """The report in Markdown: costs, what was measured, the width of every group, what cannot be removed."""
    before, after, found = document["before"], document["after"], document["verification"]
    costs = [
        (
            words,
            f"{before[name]:,}",
            f"{after[name]:,}",
            _percent(_share(before[name], after[name])),
        )
        for name, words in SIDES.items()
    ]
    distance = found["masked_equivalence"]
    measured = [
        ("accuracy before", _percent(found["accuracy_before"])),
        ("accuracy after", _percent(found["accuracy_after"])),
        ("agreement", _percent(found["agreement"])),
        ("latency, of the original's", _percent(found["latency_ratio"])),
        ("cut against masked original", "-" if distance is None else f"{distance:.1e}"),
        ("samples", f"{found['samples']:,}"),
    ]
    groups = [
        (g["name"], f"{g['units']:,}", f"{g['kept']:,}", _percent(g["level"]))
        for g in document["groups"]
    ]
    skipped = [
        (f"{s['tensor']}, axis {s['axis']}", f"{s['channels']:,}", s["reason"])
        for s in document["skipped"]
    ]
    parts = [
        f"### {_cell(document['model']['path'])} → {_cell(document['output']['path'])}",
        _table(("", "before", "after", "kept"), costs),
        _table(("measured", ""), measured),
        _folded(
            "Groups", _table(("group", "units", "kept", "share kept"), groups[:ROWS]), len(groups)
        ),
        _folded(
            "What cannot be removed",
            _table(("tensor", "channels", "reason"), skipped[:ROWS]),
            len(skipped),
        ),
        "\n".join(f"- {_cell(note)}" for note in document["notes"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(_cell(c) for c in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _folded(title: str, content: str, count: int) -> str:
    if not count:
        return ""
    some = f", the first {ROWS}" if count > ROWS else ""
    return f"<details><summary>{title} ({count}{some})</summary>\n\n{content}\n\n</details>"


def _cell(text: str) -> str:
    """Names come from the model's file: they are text, and never markup."""
    marks = {ord(c): f"&#{ord(c)};" for c in "|<>`*_[]\\"} | {
        ord("&"): "&amp;",
        ord("\n"): " ",
        ord("\r"): " ",
    }
    return text.translate(marks)


def _share(before: int, after: int) -> float | None:
    return after / before if before else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


if __name__ == "__main__":
    main()
