"""Networks with published weights at less MACs or latency by the command line, with quality, time and memory.

Every row is one run of ``prune`` in a process of its own; one with a budget of latency has one processor. The runs of
one network share a cache, as those of a user do: only the first one has all the costs. Rows that are in the saved study
are not made again.

``--larger DIR`` names the folder that ``tools/make_larger_models.py`` fills. A pruned network is judged by how often
its first answer is that of the original on images that it has not seen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from .larger import Bench, absent
from .studies import ROOT, Resumable, Row

STUDY = "real"
NETWORKS = ("efficientnet-lite0", "efficientnet-lite1")
RUNS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "efficientnet-lite0": (
        ("--macs", "0.5", "--align", "1"),
        ("--macs", "0.5"),
        ("--macs", "0.65"),
        ("--macs", "0.8"),
        ("--macs", "0.65", "--align", "1"),
        ("--macs", "0.8", "--align", "1"),
        ("--latency", "0.5"),
    ),
    "efficientnet-lite1": (("--macs", "0.5"),),
}
"""Options of every run, by the name of the network."""
COLUMNS = (
    "model",
    "options",
    "MACs kept",
    "latency",
    "agreement",
    "first five kept %",
    "divergence",
    "cached",
    "processor s",
    "passes",
    "peak MiB",
)
CLOCKED = ("latency", "processor s", "passes")


def run(out: Path, seed: int, names: tuple[str, ...] = (), larger: Path | None = None) -> str:
    """One row per network and choice of options."""
    study = Resumable(out, STUDY, COLUMNS, seed, CLOCKED)
    for name in names or NETWORKS:
        if missing := absent(name, larger):
            print(missing, flush=True)
            continue
        assert larger is not None
        wanted = [
            options
            for options in RUNS[name]
            if not study.holds({"model": name, "options": " ".join(options)})
        ]
        if not wanted:
            continue
        bench, one_pass = _timed(name, larger)
        with TemporaryDirectory() as cache:
            for options in wanted:
                study.add(_row(bench, options, Path(cache), seed, one_pass))
    return study.save()


def _timed(name: str, larger: Path) -> tuple[Bench, float]:
    """A network with its data, and the processor seconds of one pass over the calibration images."""
    bench = Bench(name, larger)
    start = time.process_time()
    bench.answers(bench.original, bench.images)
    return bench, time.process_time() - start


def _row(bench: Bench, options: tuple[str, ...], cache: Path, seed: int, one_pass: float) -> Row:
    with TemporaryDirectory() as folder:
        pruned, report = Path(folder) / "out.onnx", Path(folder) / "report.json"
        command = [sys.executable, "-m", "onnx_oamip", "prune", bench.model, "--data", bench.data]
        where = ["--cache", cache, "--force", "--json", "-o", pruned]
        if "--latency" in options:
            command = ["taskset", "--cpu-list", "0", *command]
        is_cached = any(cache.iterdir())
        with report.open("wb") as stream:
            process = subprocess.Popen(
                [*command, *options, "--seed", str(seed), *where], stdout=stream, cwd=ROOT
            )
            _, status, used = os.wait4(process.pid, 0)
        row: Row = {
            "model": bench.name,
            "options": " ".join(options),
            "cached": "yes" if is_cached else "no",
            "processor s": round(used.ru_utime + used.ru_stime),
            "passes": None if is_cached else round((used.ru_utime + used.ru_stime) / one_pass),
            "peak MiB": used.ru_maxrss // 1024,
        }
        if status:
            return {**row, "MACs kept": f"ended with {os.waitstatus_to_exitcode(status)}"}
        judged = bench.row(0.0, "", onnx.load(pruned))
        latency = json.loads(report.read_text())["verification"]["latency"]
    if "--latency" not in options:
        latency = None  # other runs need no quiet machine, so that theirs would say little
    kept = ("MACs kept", "first five kept %", "divergence")
    return {
        **row,
        **{column: judged[column] for column in kept},
        "agreement": judged["after"],
        "latency": None if latency is None else round(latency["median"], 3),
    }
