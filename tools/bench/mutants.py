"""Study of the tests: small faults (mutants) of a module that some test notices, out of a seeded sample.

Needs ``pip install mutmut``. Every run adds a round of the modules that are named with ``--model``, or of all of them,
so that the table shows what tests written between two rounds notice.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from .studies import ROOT, Resumable, Row

MODULES = (
    "objective.detection",
    "objective.losses",
    "objective.measures",
    "planning.sensitivity",
    "planning.allocation",
    "planning.budget_program",
    "repair.ridge",
    "repair.least_squares",
)
SAMPLE = 30
SECONDS = 4
"""Processor time of the tests that a mutant is shown to; the limit leaves some tests out."""
COLUMNS = ("module", "round", "mutants", "drawn", "noticed", "no test", "survived")
CLOCKED = COLUMNS[2:]
COUNTS = re.compile(
    r"^(?P<module>[\w.]+): (?P<drawn>\d+) of (?P<mutants>\d+) mutants: (?P<ends>.*)$"
)


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """Add one round of each module."""
    study = Resumable(out, "mutants", COLUMNS, seed, CLOCKED)
    for module in names or MODULES:
        with TemporaryDirectory() as folder:
            file = Path(folder) / "mutants.txt"
            command = [sys.executable, "-m", "tools.mutate", module, "--seed", str(seed)]
            limits = ["--sample", str(SAMPLE), "--seconds", str(SECONDS), "--out", str(file)]
            subprocess.run([*command, *limits], check=True, cwd=ROOT)
            add(study, file.read_text(encoding="utf-8"))
    study.rows.sort(key=lambda row: (row["module"], row["round"]))
    return study.save()


def add(study: Resumable, text: str) -> None:
    """Add a round of every module that the output of ``tools.mutate`` counts."""
    for line in text.splitlines():
        found = COUNTS.match(line)
        if found is None:
            continue
        ends = {name: int(count) for name, count in re.findall(r"([a-z ]+?) (\d+)", found["ends"])}
        ends = {name.strip(): count for name, count in ends.items()}
        rounds = sum(row["module"] == found["module"] for row in study.rows)
        row: Row = {
            "module": found["module"],
            "round": rounds + 1,
            "mutants": int(found["mutants"]),
            "drawn": int(found["drawn"]),
            # Tests that fail, crash or do not end notice a mutant.
            "noticed": sum(ends.get(name, 0) for name in ("killed", "crash", "time")),
            "no test": ends.get("no test", 0),
            "survived": ends.get("survived", 0),
        }
        study.add(row)
