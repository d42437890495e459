"""Whatever fails, wherever: old files stay, nothing is left behind, the next run starts from what was learnt."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from graphs import build
from test_stages import TEXT

from onnx_oamip import aside, pipeline, prune, solvers
from onnx_oamip.cli import main
from onnx_oamip.errors import OutputError, SolverError
from onnx_oamip.latency import Ratio
from onnx_oamip.milp import Program
from onnx_oamip.settings import Settings
from onnx_oamip.solvers import Limit, Limits, Termination

LEARNT = {
    "calibrate": "calibrate.collect",
    "gram": "gram.collect",
    "score": "scoring.scores",
    "sensitivity": "sensitivity.measure",
}
"""Stages whose results a next run finds in the cache, in order."""
STAGES = {
    "load": "model.load",
    **LEARNT,
    "plan": "allocation.allocate",
    "refit": "refit.least_squares",
    "verify": "verify.prove",
}
OLD = b"what was there before"


@pytest.fixture(autouse=True)
def fast_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with model.onnx, data.npz, and files of an earlier run."""
    (tmp_path / "model.onnx").write_bytes(build(TEXT).SerializeToString())
    images = np.random.default_rng(0).normal(size=(60, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", image=images, labels=np.arange(60) % 5)
    for name in WRITTEN:
        (tmp_path / name).write_bytes(OLD)
    return tmp_path


WRITTEN = ("out.onnx", "keep.safetensors", "page.html")


def go(task: Path, **values: Any) -> Any:
    settings = Settings.create(**{
        "macs": 0.5, "align": 1, "device": "cpu", "workers": 2, "cache": str(task / "cache"), **values,
    })  # fmt: skip
    return prune(task / "model.onnx", task / "data.npz", task / "out.onnx", settings)


def command(task: Path, *more: str) -> list[str]:
    return [
        "prune", str(task / "model.onnx"), "--data", str(task / "data.npz"), "--macs", "0.5", "--align", "1",
        "--device", "cpu", "--cache", str(task / "cache"), "-o", str(task / "out.onnx"), "-q", "--force",
        "--keep-map", str(task / "keep.safetensors"), "--report", str(task / "page.html"), *more,
    ]  # fmt: skip


def names(task: Path) -> set[str]:
    return {p.name for p in task.iterdir()} - {"cache"}


def nothing_happened(task: Path) -> bool:
    """The files of the earlier run are there, and nothing else is new."""
    assert names(task) == {"model.onnx", "data.npz", *WRITTEN}
    assert not [p for p in (task / "cache").glob("*") if p.suffix != ".npz"]
    return all((task / name).read_bytes() == OLD for name in WRITTEN)


@pytest.fixture
def once_more(task: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Run again: what stages in front of the given one found is not found out again."""

    def check(stage: str) -> None:
        done = [*LEARNT, *(s for s in STAGES if s not in LEARNT and s != "load")]
        for name in [] if stage == "load" else done[: done.index(stage)]:
            if name in LEARNT:
                monkeypatch.setattr(f"onnx_oamip.{LEARNT[name]}", lambda *_, s=name, **__: pytest.fail(f"{s} again"))
        report = go(task)
        assert (task / "out.onnx").read_bytes() != OLD
        assert report.output_sha256

    return check


# ------------------------------------------------------------------------------------------------------- SIGKILL

DRIVER = """
import json, os, signal, sys
from importlib import import_module
from pathlib import Path

import onnx_oamip
from onnx_oamip import aside, pipeline
from onnx_oamip.latency import Ratio
for name in ("allocation", "calibrate", "gram", "scoring", "sensitivity", "refit", "verify", "html", "solvers"):
    import_module(f"onnx_oamip.{name}")
import gurobipy, highspy, onnxruntime, scipy.optimize

task, stages, learnt = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
pipeline.compare_latency = lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9)
ends = {}

def put(place, make):
    module, name = place.rsplit(".", 1)
    module = import_module(f"onnx_oamip.{module}") if module != "os" else os
    setattr(module, name, make(getattr(module, name)))

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def renamed(real):
    def replace(source, target):
        if Path(target).name == "out.onnx":
            die()
        return real(source, target)
    return replace

def run(folder, cache):
    settings = onnx_oamip.Settings(macs=0.5, align=1, device="cpu", workers=2, cache=str(cache))
    onnx_oamip.prune(task / "model.onnx", task / "data.npz", folder / "out.onnx", settings)

def child(work):
    pid = os.fork()  # before any session: nothing here has threads yet
    if not pid:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(9)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def again(folder, cache):
    seen = []
    for stage, place in learnt.items():
        put(place, lambda real, stage=stage: lambda *a, **k: (seen.append(stage), real(*a, **k))[1])
    run(folder, cache)
    (folder / "computed.json").write_text(json.dumps(seen))

for stage, place in stages.items():
    folder, cache = task / stage, task / stage / "cache"
    folder.mkdir()
    (folder / "out.onnx").write_bytes(b"old")

    def killed():
        put(place, renamed) if stage == "write" else put(place, lambda real: die)
        run(folder, cache)

    end = child(killed)
    left = sorted(p.name for p in folder.iterdir() if p.name != "cache")
    for path in folder.glob(".out.onnx.*"):
        os.utime(path, (1, 1))
    intact = (folder / "out.onnx").read_bytes() == b"old"
    ends[stage] = {"killed": end, "left": left, "intact": intact, "again": child(lambda: again(folder, cache))}
    ends[stage]["computed"] = json.loads((folder / "computed.json").read_text())
    ends[stage]["after"] = sorted(p.name for p in folder.iterdir())
print(json.dumps(ends))
"""


@pytest.mark.skipif(os.name != "posix", reason="a process is forked and killed")
def test_a_kill_at_any_stage_costs_that_stage_alone(task: Path) -> None:
    stages = {**STAGES, "write": "os.replace"}
    arguments = [str(task), json.dumps(stages), json.dumps(LEARNT)]
    found = subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments], capture_output=True, text=True, env={**os.environ}, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    ends = json.loads(found.stdout)
    go(task)
    reference = (task / "out.onnx").read_bytes()
    order = list(LEARNT)
    for stage in stages:
        end = ends[stage]
        assert end["killed"] == -signal.SIGKILL, (stage, found.stderr)
        assert end["intact"], stage
        assert len(end["left"]) == (2 if stage == "write" else 1), "only a write leaves its folder behind"
        assert end["again"] == 0, (stage, found.stderr)
        expected = order[order.index(stage) :] if stage in order else order if stage == "load" else []
        assert end["computed"] == expected, stage
        assert end["after"] == ["cache", "computed.json", "out.onnx"], "what the killed run left is gone"
        assert (task / stage / "out.onnx").read_bytes() == reference, stage


# --------------------------------------------------------------------------------------------------- full disks


def _full(name: str, real: Callable[..., Any], when: Callable[[str], bool]) -> Callable[..., Any]:
    def refuse(first: Any, *rest: Any, **options: Any) -> Any:
        where = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
        if when(where):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(first, *rest, **options)

    return refuse


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="files are told apart by their descriptors")
@pytest.mark.parametrize("which", WRITTEN)
@pytest.mark.parametrize("point", ["write_bytes", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_files(
    task: Path, point: str, which: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    owner = Path if point == "write_bytes" else os
    with monkeypatch.context() as patch:
        patch.setattr(owner, point, _full(point, getattr(owner, point), lambda where: where.endswith(f"/{which}")))
        patch.setattr("onnx_oamip.html.prune_page", lambda _: b"page")
        assert main(command(task, "--importance", "l2", "--allocate", "uniform", "--refit", "none")) == 2
    text = capsys.readouterr().err
    assert text == f"Error: {task / which} cannot be written: No space left on device.\n"
    assert nothing_happened(task)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="files are told apart by their descriptors")
@pytest.mark.parametrize("point", ["write_bytes", "fsync", "replace"])
def test_a_full_disk_under_the_cache_costs_time_alone(task: Path, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go(task, cache="off")
    reference = (task / "out.onnx").read_bytes()
    owner = Path if point == "write_bytes" else os
    with monkeypatch.context() as patch:
        patch.setattr(owner, point, _full(point, getattr(owner, point), lambda where: "/cache/" in where))
        go(task)
    assert (task / "out.onnx").read_bytes() == reference
    assert not list((task / "cache").iterdir())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_refused_before_any_work(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx_oamip.model.load", lambda *_: pytest.fail("work was done"))
    task.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="not writable"):
            go(task)
    finally:
        task.chmod(0o700)


def test_old_weights_and_a_model_that_points_at_them_stay_together(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx_oamip.weights.LARGE", 1000)
    monkeypatch.setattr("onnx_oamip.weights.LEAST", 100)
    target = task / "out.onnx"
    go(task)
    first = {p.name: p.read_bytes() for p in task.glob("out.onnx*")}
    assert set(first) == {"out.onnx", "out.onnx.data"}
    real = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _full("replace", real, lambda where: where.endswith("/out.onnx")))
        with pytest.raises(OutputError):
            go(task, macs=0.4)
    assert {p.name: p.read_bytes() for p in task.glob("out.onnx*")} == first
    go(task, macs=0.4)
    assert {p.name for p in task.glob("out.onnx*")} == {"out.onnx", "out.onnx.1.data"}
    assert target.read_bytes() != first["out.onnx"]


# ------------------------------------------------------------------------------------------- files that belong together


def test_files_are_renamed_in_order_and_together(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(Path(b).name), real(a, b))[1])
    assert main(command(task, "--importance", "l2", "--allocate", "uniform", "--refit", "none", "--cache", "off")) == 0
    assert seen == ["page.html", "keep.safetensors", "out.onnx"]
    assert names(task) == {"model.onnx", "data.npz", *WRITTEN}


def test_a_new_file_goes_again_where_a_later_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").write_bytes(OLD)
    real = os.replace
    with aside.Batch() as batch:
        for name in "abc":
            batch.add(tmp_path / name, b"new")
        monkeypatch.setattr(os, "replace", _full("replace", real, lambda where: where.endswith("/c")))
        with pytest.raises(OutputError, match=r"c cannot be written"):
            batch.commit()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"b": OLD}


def test_folders_aside_of_others_are_left_alone(tmp_path: Path) -> None:
    """One that a running process holds stays, one that nobody holds goes; names that only look alike stay."""
    held = aside.make(tmp_path, ".x.")
    left, other = tmp_path / ".x.abcdefgh", tmp_path / ".x.y"
    young = tmp_path / ".x.ijklmnop"
    for path in (left, other, young):
        path.mkdir()
    for path in (held, left, other):
        os.utime(path, (1, 1))
    aside._open.pop(held)  # as if another process had made it: only the lock tells
    second = aside.make(tmp_path, ".x.")
    if aside.locks is not None:
        assert held.exists()
    assert second.exists()
    assert not left.exists()
    assert other.exists()
    assert young.exists()
    aside.remove(second)
    assert not second.exists()


def test_temporary_weights_go_with_the_process(tmp_path: Path) -> None:
    code = (
        "import numpy as np\nfrom onnx_oamip import weights\n"
        "weights.tensor(np.zeros(1 << 19), 'w', True)\nimport os, sys\n"
        "print(len(os.listdir(os.environ['TMPDIR'])))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
        check=True,
    )  # fmt: skip
    assert found.stdout == "1\n"
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ solvers and workers


def _failing(program: Program, limits: Limits) -> Any:
    raise SolverError("the licence server cannot be reached.")


def _late(program: Program, limits: Limits) -> Any:
    return solvers.Solution(Termination.NO_SOLUTION, Limit.TIME, None, None, None, None, 1.0, "gurobi")


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def put(**by_name: Any) -> None:
        changed = {n: replace(b, solve=by_name[n]) if n in by_name else b for n, b in solvers.BACKENDS.items()}
        monkeypatch.setattr(solvers, "BACKENDS", changed)

    return put


def test_a_licence_lost_midway_is_made_up_for_by_the_next_solver(task: Path, backends: Callable[..., None]) -> None:
    backends(gurobi=_failing)
    report = go(task)
    budget = [p for p in report.plan.programs if p["purpose"] == "budget"]
    assert {p["solver"] for p in budget} == {"highs"}


def test_solvers_that_all_fail_leave_the_old_files(
    task: Path, backends: Callable[..., None], once_more: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = dict(solvers.BACKENDS)
    backends(gurobi=_failing, highs=_failing)
    with pytest.raises(SolverError, match=r"gurobi failed .*licence server.*highs failed"):
        go(task)
    with pytest.raises(SolverError, match="licence server"):
        go(task, solver="gurobi")
    assert nothing_happened(task)
    monkeypatch.setattr(solvers, "BACKENDS", real)
    once_more("plan")


def test_a_solver_out_of_time_leaves_the_best_plan_known(task: Path, backends: Callable[..., None]) -> None:
    backends(gurobi=_late, highs=_late)
    report = go(task)
    found = [p for p in report.plan.programs if p["purpose"] == "budget"]
    assert found
    assert {(p["status"], p["limit"], p["gap"]) for p in found} == {("feasible", "time", None)}
    assert report.after.macs <= 0.5 * report.before.macs


@pytest.mark.parametrize("error", [MemoryError, RuntimeError], ids=["memory", "death"])
def test_a_worker_that_fails_leaves_the_old_files(
    task: Path, error: type[Exception], once_more: Callable[[str], None], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from onnx_oamip import sensitivity

    real = sensitivity._Part.losses
    seen: list[int] = []

    def losses(part: Any, removed: Any) -> Any:
        seen.append(1)
        if len(seen) == 2:
            raise error("no more")
        return real(part, removed)

    with monkeypatch.context() as patch:
        patch.setattr(sensitivity._Part, "losses", losses)
        assert main(command(task)) == 2
    text = capsys.readouterr().err
    assert ("not enough memory" in text) == (error is MemoryError)
    assert text.splitlines()[-1].startswith("Error: ")
    assert nothing_happened(task)
    once_more("sensitivity")


def test_a_stage_that_fails_leaves_the_old_files(
    task: Path, once_more: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One folder for all: every failure comes a stage later, and finds what the one before it kept."""
    for stage, place in STAGES.items():
        with monkeypatch.context() as patch:
            patch.setattr(f"onnx_oamip.{place}", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
            with pytest.raises(MemoryError):
                go(task)
        assert nothing_happened(task), stage
    once_more("verify")


# ------------------------------------------------------------------------------------------------------- signals

STUCK = """
import hashlib, sys, threading
from pathlib import Path
from onnx_oamip import calibrate, sensitivity
from onnx_oamip.cli import main

def stuck(*_, **__):
    Path(sys.argv[2]).touch()
    hashlib.pbkdf2_hmac("sha256", b"x" * 8, b"x" * 8, 2**31 - 1)  # minutes in C, as a solver or a kernel has them

if sys.argv[1] == "thread":
    sensitivity._Part.losses = stuck
else:
    calibrate.collect = stuck
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
@pytest.mark.parametrize(
    ("place", "number", "status", "word"),
    [("thread", signal.SIGINT, 130, "interrupted"), ("main", signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_ends_work_that_does_not_listen(
    task: Path, place: str, number: int, status: int, word: str
) -> None:
    started = task / "cache" / "started.npz"
    started.parent.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, place, str(started), *command(task)], stderr=subprocess.PIPE, text=True,
        cwd=ROOT,
    )  # fmt: skip
    while not started.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, text = process.communicate(timeout=30)
    assert process.returncode == status, text
    assert text.strip().splitlines()[-1] == f"Error: {word}."
    assert nothing_happened(task)
