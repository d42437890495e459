"""``python -m tools.bench.agree DIR DIR [STUDY ...]``: do two runs of the studies say the same?

Compares the JSON files of two folders row by row and value by value, to the last digit. Left out is what a clock or a
memory gauge read, which every study names itself (``clocked`` in its file). Shows what differs and exits 1 then, or
where nothing could be compared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from .studies import Row

MISSING = "nothing"


def differences(first: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """One line for every row of two records of a study that is not the same."""
    clocked = {*first.get("clocked", ()), *other.get("clocked", ())}
    found = []
    for number, (a, b) in enumerate(zip_longest(first["rows"], other["rows"]), 1):
        if a is None or b is None:
            found.append(
                f"row {number} is in the {'second' if a is None else 'first'} folder alone: {_called(a or b)}"
            )
            continue
        apart = [
            f"{key} is {a.get(key, MISSING)} and {b.get(key, MISSING)}"
            for key in dict.fromkeys([*a, *b])
            if key not in clocked and a.get(key, MISSING) != b.get(key, MISSING)
        ]
        if apart:
            found.append(f"row {number} ({_called(a)}): {'; '.join(apart)}")
    return found


def _called(row: Row) -> str:
    """Name of a row in messages: the first few of its values."""
    return ", ".join(str(value) for value in list(row.values())[:4])


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the folders of the command line; the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.agree", description=__doc__, formatter_class=raw
    )
    parser.add_argument("folders", nargs=2, type=Path, metavar="DIR")
    parser.add_argument(
        "studies", nargs="*", metavar="STUDY", help="names of the JSON files; default: all of them"
    )
    chosen = parser.parse_args(arguments)
    held = [{p.stem for p in folder.glob("*.json")} for folder in chosen.folders]
    wanted = set(chosen.studies) or held[0] | held[1]
    compared, bad = 0, 0
    for study in sorted(wanted):
        lacking = [
            str(f) for f, names in zip(chosen.folders, held, strict=True) if study not in names
        ]
        if lacking:
            print(f"{study}: not compared, it is not in {' nor in '.join(lacking)}")
            bad += bool(chosen.studies)
            continue
        first, other = (
            json.loads((f / f"{study}.json").read_text(encoding="utf-8")) for f in chosen.folders
        )
        found = differences(first, other)
        compared, bad = compared + 1, bad + bool(found)
        clocked = ", ".join(dict.fromkeys([*first.get("clocked", ()), *other.get("clocked", ())]))
        reported = (
            f"{len(found)} of {len(first['rows'])} rows differ"
            if found
            else f"{len(first['rows'])} rows agree"
        )
        print(f"{study}: {reported}{f' (not compared: {clocked})' if clocked else ''}")
        here, there = first["environment"], other["environment"]
        if here != there:
            keys = [k for k in dict.fromkeys([*here, *there]) if here.get(k) != there.get(k)]
            changed = ", ".join(
                f"{k} {here.get(k, MISSING)} and {there.get(k, MISSING)}" for k in keys
            )
            print(f"  measured in different environments: {changed}")
        print("".join(f"  {line}\n" for line in found), end="")
    if not compared:
        print("nothing was compared: there is no study in both folders.")
    return 0 if compared and not bad else 1


if __name__ == "__main__":
    raise SystemExit(main())
