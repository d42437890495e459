"""Study of resumed runs: processor time of the rerun of a killed run over that of a run from an empty cache.

The whole run, the killed one and the rerun are processes of their own, as a shell starts them, so that importing
counts. A run is killed (SIGKILL) at the first call of a stage, and so is never asked to put anything in order.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from .studies import Resumable, Row, paths

COLUMNS = ("model", "killed at", "runs", "of processor time")
CLOCKED = COLUMNS[3:]
STAGES = {
    "calibrate": "statistics.calibration.collect",
    "score": "planning.scoring.apply_method",
    "sensitivity": "planning.sensitivity.measure",
    "plan": "planning.allocation.allocate",
    "refit": "repair.least_squares.front",
    "verify": "verification.equivalence.prove",
}
"""Stages at which a run is killed, in their order, with the function that begins each."""
RUNS = 3
"""Runs whose median counts."""
KILLED = """
import os, signal, sys
from importlib import import_module

module, name = sys.argv[1].rsplit(".", 1)
setattr(import_module(f"onnx_oamip.{module}"), name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
from onnx_oamip.cli import main
sys.exit(main(sys.argv[2:]))
"""


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """Medians over ``RUNS`` runs at half the MACs; every rerun must write the very file of the whole run."""
    study = Resumable(out, "resume", COLUMNS, seed, CLOCKED)
    for name in names or ("vgg-fashion", "resnet20-fashion"):
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

    def whole(cache: Path) -> float:
        before = _processor()
        subprocess.run(
            [sys.executable, "-m", "onnx_oamip", *arguments(cache)], check=True, env=_environment()
        )
        return _processor() - before

    full = [whole(folder / f"whole {i}") for i in range(RUNS)]
    written = output.read_bytes()
    for stage, place in STAGES.items():
        again = []
        for i in range(RUNS):
            cache = folder / f"{stage} {i}"
            output.unlink()
            killed = [sys.executable, "-c", KILLED, place, *arguments(cache)]
            end = subprocess.run(killed, env=_environment(), check=False).returncode
            if end != -signal.SIGKILL or output.exists():
                raise RuntimeError(
                    f"{name}: the run was not killed at {stage} but ended with {end}"
                )
            again.append(whole(cache))
            if output.read_bytes() != written:
                raise RuntimeError(f"{name}: the rerun after {stage} wrote another model")
        yield {
            "model": name,
            "killed at": stage,
            "runs": RUNS,
            "of processor time": round(median(again) / median(full), 2),
        }


def _processor() -> float:
    """Seconds that all processes started from here have computed: what else runs on the machine adds none."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _environment() -> dict[str, str]:
    """The cache is where the command line says, and modules are compiled once, as those of an installed package."""
    others = ("ONNX_OAMIP_CACHE", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if name not in others}
