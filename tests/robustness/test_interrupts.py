"""Ctrl-C, SIGTERM and SIGHUP wherever a run may stand: it ends soon, with its children, and leaves nothing.

Every case is a process of its own, stuck for minutes in what does not listen: a solver's search, a kernel, a cluster.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from graphs import build
from network_texts import RESIDUAL_CNN as TEXT

from onnx_oamip.programs import solvers

if not Path("/proc/self/stat").exists():
    pytest.skip("processes are looked for as Linux lists them", allow_module_level=True)

PLACES = {
    "gurobi": ["--solver", "gurobi"],
    "highs": ["--solver", "highs"],
    "gurobi in threads": ["--solver", "gurobi", "--importance", "oamip", "--mode", "decoupled"],
    "highs in threads": ["--solver", "highs", "--importance", "oamip", "--mode", "decoupled"],
    "runtime": [],
    "runtime in threads": [],
    "latency": [],
    "process": [],
    "cluster": ["--scheduler"],
}
SIGNALS = {
    "SIGINT": (130, "interrupted"),
    "SIGTERM": (143, "terminated"),
    "SIGHUP": (129, "terminated, as its terminal was closed"),
}
HUNG_UP = ("highs in threads", "runtime", "latency", "process")
"""Places where SIGHUP is tried: it takes the way of SIGTERM."""
CASES = [
    (place, name) for place in PLACES for name in SIGNALS if name != "SIGHUP" or place in HUNG_UP
]
DRIVER = """
import json, os, signal, sys, tempfile, time
from dataclasses import replace
from pathlib import Path

import gurobipy, highspy, numpy as np, onnx, onnxruntime, scipy.optimize
from onnx_oamip.api import proof
from onnx_oamip.cli import main
from onnx_oamip.graph import runtime
from onnx_oamip.planning import sensitivity
from onnx_oamip.programs import solvers
from onnx_oamip.programs.program import Builder
from onnx_oamip.statistics import calibration
from onnx_oamip.verification import latency

folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])

def knapsack():
    rng = np.random.default_rng(0)
    weight = rng.integers(5, 100, (40, 200)).astype(float)
    builder = Builder()
    take = builder.variables(200, 0, 1, objective=-weight.sum(axis=0), integer=True)
    builder.rows(40, (np.arange(40)[:, None], take, weight), upper=np.floor(0.5 * weight.sum(axis=1)))
    return builder.build()

LOOP = '''<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) {
  n = Constant<value = int64 {9000000000}>()
  on = Constant<value = bool {1}>()
  y = Loop(n, on, x)<body = b (int64 i, bool c, float[1] a) => (bool d, float[1] e) { d = Identity(c) e = Sin(a) }>
}'''

def stick(place, started):
    def slow(name):
        real = solvers.BACKENDS[name].solve
        def solve(program, limits):
            started.touch()
            return real(knapsack(), solvers.SolverLimits(gap=0.0))
        return replace(solvers.BACKENDS[name], solve=solve)

    def loop(*_, **__):
        session = runtime.Session(onnx.parser.parse_model(LOOP), "cpu")
        started.touch()
        session.run({"x": np.ones(1, np.float32)})

    def timed(*args, seconds, **options):
        started.touch()
        return latency.compare_latency(*args, seconds=600.0, **options)

    def weighed(arguments, **options):
        started.touch()
        return run([sys.executable, "-c", "import time; time.sleep(600)"], **options)

    def sent(self, threads):
        send(self, threads)
        if self.running:
            started.touch()

    if place.split()[0] in solvers.BACKENDS:
        solvers.BACKENDS = {name: slow(name) for name in solvers.BACKENDS}
    elif place == "runtime":
        calibration.collect = loop
    elif place == "runtime in threads":
        sensitivity._Part.losses = loop
    elif place == "latency":
        proof.compare_latency = timed
    elif place == "process":
        run = latency.subprocess.run
        latency.subprocess.run = weighed
    else:
        import executor_tasks
        from onnx_oamip.executors import cluster
        sensitivity._measure = executor_tasks.stay
        send = cluster._Run._send
        cluster._Run._send = sent

def alive(group):
    # One that has ended is there until somebody asks how.
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = path.read_text().rpartition(") ")[2].split()[:3]
        except OSError:
            continue
        if int(of) == group and state not in "ZX":
            found.append(path.parent.name)
    return found

waiting = {}
for case in cases:
    home = Path(case["home"])
    pid = os.fork()  # before any session: nothing here has threads yet
    if not pid:
        os.setpgrp()
        errors = os.open(home / "errors", os.O_CREAT | os.O_WRONLY)
        os.dup2(errors, 2)
        os.dup2(errors, 1)
        os.environ["TMPDIR"], tempfile.tempdir = str(home / "tmp"), None
        stick(case["place"], home / "started")
        status = main(case["arguments"])
        sys.stderr.flush()
        os._exit(status)  # what libraries tidy up when a process ends is not made for one that was forked
    waiting[pid] = home
# Each is told as soon as it is stuck, and has half a minute to go.
number = {name: getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")}
told, ends = {}, {}
until = time.monotonic() + 240
while waiting and time.monotonic() < until:
    for pid, home in list(waiting.items()):
        if pid not in told and (home / "started").exists():
            time.sleep(0.2)  # so that it is in there
            told[pid] = time.monotonic()
            os.kill(pid, number[home.name.split()[-1]])
        done, status = os.waitpid(pid, os.WNOHANG)
        late = pid in told and time.monotonic() - told[pid] > 30
        if done or late:
            if not done:
                os.killpg(pid, signal.SIGKILL)
                status = os.waitpid(pid, 0)[1]
            group = alive(pid)
            seconds = time.monotonic() - told.get(pid, time.monotonic())
            ends[home.name] = {"end": os.waitstatus_to_exitcode(status), "seconds": seconds, "left": group}
            del waiting[pid]
    time.sleep(0.02)
for pid in waiting:
    os.killpg(pid, signal.SIGKILL)
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """End of every case by its name: all run at the same time, each in a folder of its name."""
    distributed = pytest.importorskip(
        "distributed", reason="the package distributed is not installed"
    )
    for backend in solvers.BACKENDS.values():
        if not backend.licence().usable:
            pytest.skip(f"{backend.name} is not usable here")
    folder = tmp_path_factory.mktemp("cases")
    (folder / "model.onnx").write_bytes(build(TEXT).SerializeToString())
    images = np.random.default_rng(0).normal(size=(60, 3, 8, 8)).astype(np.float32)
    np.savez(folder / "data.npz", image=images, labels=np.arange(60) % 5)
    places = (ROOT, ROOT / "tests", ROOT / "tests" / "support")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}
    with distributed.LocalCluster(
        processes=True, n_workers=1, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        cases = []
        for place, options in PLACES.items():
            for name in (name for at, name in CASES if at == place):
                home = folder / f"{place} {name}"
                (home / "tmp").mkdir(parents=True)
                (home / "out.onnx").write_bytes(b"old")
                more = [*options, cluster.scheduler_address] if place == "cluster" else options
                model, source = str(folder / "model.onnx"), str(folder / "data.npz")
                arguments = (
                    ["bench", model, "--data", source, "--seconds", "0.1"]
                    if place == "process"
                    else [
                        "prune",
                        model,
                        "--data",
                        source,
                        "--macs",
                        "0.5",
                        "--align",
                        "1",
                        "--device",
                        "cpu",
                        "-q",
                        "--workers",
                        "2",
                        "--cache",
                        str(home / "cache"),
                        "-o",
                        str(home / "out.onnx"),
                        *more,
                    ]
                )
                cases.append({"home": str(home), "place": place, "arguments": arguments})
        found = subprocess.run(
            [sys.executable, "-c", DRIVER, str(folder), json.dumps(cases)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
    assert found.returncode == 0, found.stderr
    return {"folder": folder, **json.loads(found.stdout)}


@pytest.mark.parametrize(("place", "name"), CASES)
def test_signal_ends_a_run(
    place: str, name: str, ends: Mapping[str, Any], record_property: Callable[[str, object], None]
) -> None:
    status, word = SIGNALS[name]
    home: Path = ends["folder"] / f"{place} {name}"
    text = (home / "errors").read_text()
    assert f"{place} {name}" in ends, f"it never came so far: {text}"
    end = ends[f"{place} {name}"]
    record_property("seconds", round(end["seconds"], 1))
    assert end["end"] == status, text
    assert not end["left"], "no child outlives it"
    assert text.strip().splitlines()[-1] == f"Error: {word}."
    assert "Traceback" not in text
    assert not list((home / "tmp").iterdir())
    assert {p.name for p in home.iterdir()} <= {"out.onnx", "errors", "started", "tmp", "cache"}
    assert (home / "out.onnx").read_bytes() == b"old"
    assert all(p.suffix == ".npz" for p in (home / "cache").glob("*"))
