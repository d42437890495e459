"""Ctrl-C, SIGTERM and SIGHUP wherever a run may stand: it ends soon, with its children, and leaves nothing.

Every case is a process of its own, stuck for minutes in what does not listen: a solver's search, a kernel, a cluster,
a factorisation, or compiled code at the beginning of a stage.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from graphs import build
from network_texts import RESIDUAL_CNN as TEXT
from stages import STAGES

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
"""Places where SIGHUP is tried in the default tier: it takes the way of SIGTERM."""
CASES = [
    (place, name) for place in PLACES for name in SIGNALS if name != "SIGHUP" or place in HUNG_UP
]
MORE_PLACES = {
    "lapack": [],
    "lapack in threads": [],
    **{
        f"stage {name}": [f"--{key}={value}" for key, value in stage.values.items()]
        for name, stage in STAGES.items()
    },
}
SLOW_CASES = [
    *[(place, name) for place in MORE_PLACES for name in ("SIGTERM", "SIGHUP")],
    *[(place, "SIGHUP") for place in PLACES if place not in HUNG_UP],
]
SECONDS = 2.5
"""Within which a run ends: two for the work to unwind, and what the end of a process takes."""
AT_ONCE = {"default": 6, "slow": 2}
"""Cases that run side by side: few, so that a busy machine starts them in time, and seconds are their own."""
DRIVER = """
import gc, hashlib, json, os, signal, sys, tempfile, time
from dataclasses import replace
from importlib import import_module
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
from stages import STAGES, is_cache_entry

folder, cases, at_once = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])

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

    def factorise(*_, **__):
        matrix = np.random.default_rng(0).normal(size=(6000, 6000))
        started.touch()
        np.linalg.svd(matrix)

    def begin(*args, **options):
        if is_cache_entry(args):
            return real(*args, **options)
        started.touch()
        hashlib.pbkdf2_hmac("sha256", b"x" * 8, b"x" * 8, 2**31 - 1)

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
    elif place == "lapack":
        calibration.collect = factorise
    elif place == "lapack in threads":
        sensitivity._Part.losses = factorise
    elif place.startswith("stage "):
        module, _, name = STAGES[place.removeprefix("stage ")].place.rpartition(".")
        home = import_module(f"onnx_oamip.{module}")
        real = getattr(home, name)
        setattr(home, name, begin)
    elif place == "latency":
        proof.compare_latency = timed
    elif place == "process":
        run = latency.child_processes.run
        latency.child_processes.run = weighed
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

def start(case):
    home = Path(case["home"])
    pid = os.fork()  # before any session: nothing here has threads yet
    if pid:
        return pid, home
    os.setpgrp()
    errors = os.open(home / "errors", os.O_CREAT | os.O_WRONLY)
    os.dup2(errors, 2)
    os.dup2(errors, 1)
    os.environ["TMPDIR"], tempfile.tempdir = str(home / "tmp"), None
    stick(case["place"], home / "started")
    status = main(case["arguments"])
    sys.stderr.flush()
    os._exit(status)  # what libraries tidy up when a process ends is not made for one that was forked

# Each gets its signal as soon as it is stuck, and has half a minute to end.
number = {name: getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")}
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which ignores it
gc.freeze()  # no process searches what all of them share for cycles
waiting, told, ends, coming = {}, {}, {}, iter(cases)
until = time.monotonic() + 240 + 10 * len(cases)
while time.monotonic() < until:
    while len(waiting) < at_once and (case := next(coming, None)):
        waiting.update([start(case)])
    if not waiting:
        break
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
            seconds = time.monotonic() - told.get(pid, time.monotonic())
            patience = time.monotonic() + 5  # a child that was killed is there until the system has seen to it
            while (group := alive(pid)) and time.monotonic() < patience:
                time.sleep(0.05)
            ends[home.name] = {"end": os.waitstatus_to_exitcode(status), "seconds": seconds, "left": group}
            del waiting[pid]
    time.sleep(0.02)
for pid in waiting:
    os.killpg(pid, signal.SIGKILL)
print(json.dumps(ends))
"""


Run = Callable[[list[tuple[str, str]], int], Mapping[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run cases, so many at once, each in a folder of its name; the end of each by its name."""
    for name in ("gurobi", "highs"):
        if not solvers.BACKENDS[name].licence().usable:
            pytest.skip(f"{name} is not usable here")

    def ends(listed: list[tuple[str, str]], at_once: int) -> Mapping[str, Any]:
        folder = tmp_path_factory.mktemp("cases")
        (folder / "model.onnx").write_bytes(build(TEXT).SerializeToString())
        images = np.random.default_rng(0).normal(size=(60, 3, 8, 8)).astype(np.float32)
        np.savez(folder / "data.npz", image=images, labels=np.arange(60) % 5)
        places = (ROOT, ROOT / "tests", ROOT / "tests" / "support")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}
        with _scheduler() as address:
            cases = [_case(folder, place, name, address) for place, name in listed]
            found = subprocess.run(
                [sys.executable, "-c", DRIVER, str(folder), json.dumps(cases), str(at_once)],
                capture_output=True,
                text=True,
                check=False,
                env=environment,
            )
        assert found.returncode == 0, found.stderr
        return {"folder": folder, **json.loads(found.stdout)}

    return ends


@contextmanager
def _scheduler() -> Iterator[str]:
    distributed = pytest.importorskip(
        "distributed", reason="the package distributed is not installed"
    )
    with distributed.LocalCluster(
        processes=True, n_workers=1, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        yield cluster.scheduler_address


def _case(folder: Path, place: str, name: str, address: str) -> dict[str, Any]:
    """A folder with an old file, and the command that is to be stuck."""
    home = folder / f"{place} {name}"
    (home / "tmp").mkdir(parents=True)
    (home / "out.onnx").write_bytes(b"old")
    options = {**PLACES, **MORE_PLACES}[place]
    given = [str(folder / "model.onnx"), "--data", str(folder / "data.npz")]
    if place == "process":
        return {
            "home": str(home),
            "place": place,
            "arguments": ["bench", *given, "--seconds", "0.1"],
        }
    plan = ["--macs", "0.5", "--align", "1", "--device", "cpu", "-q", "--workers", "2"]
    files = ["--cache", str(home / "cache"), "-o", str(home / "out.onnx")]
    more = [*options, address] if place == "cluster" else options
    return {
        "home": str(home),
        "place": place,
        "arguments": ["prune", *given, *plan, *files, *more],
    }


@pytest.fixture(scope="module")
def ends(run: Run) -> Mapping[str, Any]:
    """End of every case by its name."""
    return run(CASES, AT_ONCE["default"])


@pytest.fixture(scope="module")
def slow_ends(run: Run) -> Mapping[str, Any]:
    """End of every slow case by its name."""
    return run(SLOW_CASES, AT_ONCE["slow"])


@pytest.mark.parametrize(("place", "name"), CASES)
def test_signal_ends_a_run(
    place: str, name: str, ends: Mapping[str, Any], record_property: Callable[[str, object], None]
) -> None:
    record_property("seconds", round(_ended(place, name, ends), 1))


@pytest.mark.slow
@pytest.mark.parametrize(("place", "name"), SLOW_CASES)
def test_signal_ends_a_run_at_every_stage(
    place: str,
    name: str,
    slow_ends: Mapping[str, Any],
    record_property: Callable[[str, object], None],
) -> None:
    seconds = _ended(place, name, slow_ends)
    record_property("seconds", round(seconds, 1))
    busy = os.getloadavg()[0] > AT_ONCE["slow"] + (os.cpu_count() or 1)
    assert seconds < SECONDS or busy


def _ended(place: str, name: str, ends: Mapping[str, Any]) -> float:
    """Check the end of a case; its seconds after the signal."""
    status, word = SIGNALS[name]
    home: Path = ends["folder"] / f"{place} {name}"
    text = (home / "errors").read_text()
    assert f"{place} {name}" in ends, f"it never came so far: {text}"
    end = ends[f"{place} {name}"]
    assert end["end"] == status, text
    assert not end["left"], "no child outlives it"
    assert text.strip().splitlines()[-1] == f"Error: {word}."
    assert "Traceback" not in text
    assert not list((home / "tmp").iterdir())
    assert {p.name for p in home.iterdir()} <= {"out.onnx", "errors", "started", "tmp", "cache"}
    assert (home / "out.onnx").read_bytes() == b"old"
    assert all(p.suffix == ".npz" for p in (home / "cache").glob("*"))
    seconds: float = end["seconds"]
    return seconds
