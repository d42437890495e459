"""Study of resumed runs: processor time of the rerun of a killed run over that of a run from an empty cache.

Runs are processes of their own, as a shell starts them, so that importing counts. A run is killed in the middle of a
stage, by a signal that ends it like SIGKILL, and so is never asked to put anything in order. What the killed run and
its rerun need together beyond a whole run is the work that is done again, the start-up among it. What the killed run
had not done no cache can save: behind a kill early in a run that is most of it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from .studies import Resumable, Row, paths

COLUMNS = (
    "model",
    "killed at",
    "runs",
    "stage's share",
    "done before",
    "of processor time",
    "done again",
)
CLOCKED = COLUMNS[3:]
STAGES = {
    "calibrate": "statistics.calibration.collect",
    "score": "planning.scoring.apply_method",
    "sensitivity": "planning.sensitivity.measure",
    "plan": "planning.allocation.allocate",
    "refit": "repair.least_squares.front",
    "verify": "verification.equivalence.prove",
}
"""Stages in which a run is killed, in their order, with the function that begins each."""
END = "end"
"""Mark behind the last stage."""
RUNS = 3
"""Runs whose median counts."""
WATCHED = """
import json, signal, sys, time
from importlib import import_module
from pathlib import Path

stages, killed, delay, target, arguments = json.loads(sys.argv[1])
marks = {}

def watch(stage, place):
    module, name = place.rsplit(".", 1)
    home = import_module(f"onnx_oamip.{module}")
    real = getattr(home, name)

    def begin(*given, **named):
        if stage not in marks:
            marks[stage] = time.process_time()
            if stage == killed:
                signal.setitimer(signal.ITIMER_PROF, delay)
        return real(*given, **named)

    setattr(home, name, begin)

for stage, place in stages.items():
    watch(stage, place)
from onnx_oamip.cli import main
status = main(arguments)
marks["end"] = time.process_time()
Path(target).write_text(json.dumps(marks))
sys.exit(status)
"""
"""A run that writes down the processor time at which each stage began, and is killed (SIGPROF) so many seconds of
processor time behind the beginning of one."""


@dataclass(frozen=True)
class Run:
    """Processor time of a run that came to its end, and that at which each stage began."""

    seconds: float
    marks: dict[str, float]

    def length(self, stage: str) -> float:
        """Seconds of a stage: up to the beginning of the next one."""
        following = dict(pairwise([*STAGES, END]))
        return self.marks[following[stage]] - self.marks[stage]


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """Medians over ``RUNS`` runs at half the MACs; every rerun must write the very file of the whole run."""
    study = Resumable(out, "resume", COLUMNS, seed, CLOCKED)
    for name in names or ("vgg-fashion", "mobilenet-fashion"):
        with tempfile.TemporaryDirectory() as folder:
            study.measure({"model": name}, len(STAGES), _rows(name, Path(folder), seed))
    return study.save()


def _rows(name: str, folder: Path, seed: int) -> Iterator[Row]:
    model, source = paths(name)
    output = folder / "out.onnx"

    def arguments(cache: Path) -> list[str]:
        return [
            "prune",
            str(model),
            "--data",
            str(source),
            "--macs",
            "0.5",
            "--align",
            "8",
            "--seed",
            str(seed),
            "--device",
            "cpu",
            "--force",
            "-q",
            "--cache",
            str(cache),
            "-o",
            str(output),
        ]

    full = [whole(arguments(folder / f"whole {i}")) for i in range(RUNS)]
    written = output.read_bytes()
    total = median(found.seconds for found in full)
    for stage in STAGES:
        length = median(found.length(stage) for found in full)
        before, again = [], []
        for i in range(RUNS):
            given = arguments(folder / f"{stage} {i}")
            output.unlink()
            before.append(killed(given, stage, length / 2))
            if output.exists():
                raise RuntimeError(f"{name}: the run killed in {stage} wrote a model")
            again.append(whole(given).seconds)
            if output.read_bytes() != written:
                raise RuntimeError(f"{name}: the rerun after {stage} wrote another model")
        yield {"model": name, "killed at": f"middle of {stage}", "runs": RUNS} | shares(
            total, length, median(before), median(again)
        )


def shares(total: float, length: float, before: float, again: float) -> Row:
    """Columns of a row that a clock fills.

    Args:
        total: Seconds of a whole run.
        length: Seconds of the stage.
        before: Seconds of the killed run.
        again: Seconds of its rerun.

    Returns:
        All as shares of a whole run. No two runs take the same time, so that what is done again is known to a few
        hundredths, and may be negative.
    """
    return {
        "stage's share": round(length / total, 2),
        "done before": round(before / total, 2),
        "of processor time": round(again / total, 2),
        "done again": round((before + again) / total - 1, 2),
    }


def whole(arguments: list[str]) -> Run:
    """Run a command to its end.

    Args:
        arguments: The command line.

    Returns:
        Its processor time, and that at which each stage began.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "marks.json"
        status, seconds = _watched(arguments, None, 0.0, target)
        if status != 0:
            raise RuntimeError(f"{' '.join(arguments)} ended with {status}")
        marks = json.loads(target.read_text(encoding="utf-8"))
    return Run(seconds, marks)


def killed(arguments: list[str], stage: str, delay: float) -> float:
    """Run a command, and kill it in a stage.

    Args:
        arguments: The command line.
        stage: The stage.
        delay: Seconds of processor time from the beginning of the stage on.

    Returns:
        Seconds of processor time up to its end.
    """
    with tempfile.TemporaryDirectory() as folder:
        status, seconds = _watched(arguments, stage, delay, Path(folder) / "marks.json")
    if status != -signal.SIGPROF:
        raise RuntimeError(f"the run was not killed in {stage} but ended with {status}")
    return seconds


def _watched(
    arguments: list[str], stage: str | None, delay: float, target: Path
) -> tuple[int, float]:
    """(status, seconds of processor time): what else runs on the machine adds none."""
    asked = json.dumps([STAGES, stage, delay, str(target), arguments])
    before = _processor()
    done = subprocess.run([sys.executable, "-c", WATCHED, asked], env=_environment(), check=False)
    return done.returncode, _processor() - before


def _processor() -> float:
    """Seconds that all processes started from here have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _environment() -> dict[str, str]:
    """The cache is where the command line says, and modules are compiled once, as those of an installed package."""
    others = ("ONNX_OAMIP_CACHE", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if name not in others}
