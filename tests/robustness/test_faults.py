"""Failures anywhere: old files are unchanged, no new ones are left, and the next run starts from the cache.

Every stage meets every fault: ``CELLS``. A cell is left out by a rule alone, ``possible``, which is held against what
the stages do. A worker is a process of a cluster: a thread cannot die by itself, what kills it kills the process.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from graphs import build
from knapsack_programs import knapsack
from network_texts import RESIDUAL_CNN as TEXT
from stages import STAGES, Stage, is_cache_entry, oamip

from onnx_oamip import importance, prune, published
from onnx_oamip.api import proof
from onnx_oamip.cli import main
from onnx_oamip.core import atomic_files
from onnx_oamip.core.errors import OutOfMemory, OutputError, SolverError
from onnx_oamip.core.settings import Settings
from onnx_oamip.programs import Program, solvers
from onnx_oamip.programs.solvers import Limit, SolverLimits, Termination
from onnx_oamip.verification.latency import Ratio

FAULTS = ("kill", "disk", "memory", "timeout", "licence", "worker")


def possible(stage: Stage, fault: str) -> bool:
    """Only programs run out of time or lose a licence, and only what is spread over workers loses one."""
    if fault in ("timeout", "licence"):
        return stage.solves
    return stage.spreads if fault == "worker" else True


CELLS = [
    (name, fault) for name, stage in STAGES.items() for fault in FAULTS if possible(stage, fault)
]
LOSE_WORKERS = ("score", "sensitivity")
"""Stages that lose a worker in the default tier: the others are spread by the same executor."""
ALWAYS = ("load", "calibrate", "decoupled", "plan", "refit", "write")
"""Stages that meet a lack of memory in the default tier: it is the same exception at all."""
FILLED = (*ALWAYS, "rename")
"""Stages that meet a full disk in the default tier; what each leaves in the cache, the killed runs show."""


def in_default_tier(name: str, fault: str) -> bool:
    stages = {"memory": ALWAYS, "disk": FILLED, "worker": LOSE_WORKERS}.get(fault, tuple(STAGES))
    return name in stages


PARAMETERS = [
    pytest.param(
        name,
        fault,
        id=f"{name}-{fault}",
        marks=[] if in_default_tier(name, fault) else [pytest.mark.slow],
    )
    for name, fault in CELLS
]
OLD = b"what was there before"
WRITTEN = ("out.onnx", "keep.safetensors", "page.html")


def _given(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(build(TEXT).SerializeToString())
    images = np.random.default_rng(0).normal(size=(60, 3, 8, 8)).astype(np.float32)
    np.savez(folder / "data.npz", image=images, labels=np.arange(60) % 5)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with model.onnx, data.npz, and files of an earlier run."""
    _given(tmp_path)
    for name in WRITTEN:
        (tmp_path / name).write_bytes(OLD)
    return tmp_path


def go(task: Path, **values: Any) -> Any:
    settings = Settings.create(
        **{
            "macs": 0.5,
            "align": 1,
            "device": "cpu",
            "workers": 2,
            "cache": str(task / "cache"),
            **values,
        }
    )
    return prune(task / "model.onnx", task / "data.npz", task / "out.onnx", settings)


def command(task: Path, *more: str) -> list[str]:
    return [
        "prune",
        str(task / "model.onnx"),
        "--data",
        str(task / "data.npz"),
        "--macs",
        "0.5",
        "--align",
        "1",
        "--device",
        "cpu",
        "--cache",
        str(task / "cache"),
        "-o",
        str(task / "out.onnx"),
        "-q",
        "--force",
        "--keep-map",
        str(task / "keep.safetensors"),
        "--report",
        str(task / "page.html"),
        *more,
    ]


def names(task: Path) -> set[str]:
    return {p.name for p in task.iterdir()} - {"cache"}


def nothing_happened(task: Path) -> bool:
    """The files of the earlier run are there, and nothing else is new."""
    assert names(task) == {"model.onnx", "data.npz", *WRITTEN}
    assert not [p for p in (task / "cache").glob("*") if p.suffix != ".npz"]
    return all((task / name).read_bytes() == OLD for name in WRITTEN)


def kinds(folder: Path) -> dict[str, int]:
    """Entries of a cache by kind, with the number of the file: one that is made again has another."""
    return {p.name.partition("-")[0]: p.stat().st_ino for p in folder.glob("*")}


# -------------------------------------------------------------------------------------------------------- the matrix


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Mapping[str, Any]], tuple[bytes, Path]]:
    """Files and cache of a run from an empty cache; one run for all stages of the same settings."""
    found: dict[str, tuple[bytes, Path]] = {}

    def run(values: Mapping[str, Any]) -> tuple[bytes, Path]:
        key = repr(values)
        if key not in found:
            folder = tmp_path_factory.mktemp("whole")
            _given(folder)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))
                go(folder, **values)
            found[key] = (folder / "out.onnx").read_bytes(), folder / "cache"
        return found[key]

    return run


def _begun(
    patch: pytest.MonkeyPatch,
    stage: Stage,
    then: Callable[[], object],
    after: Callable[[], object] = lambda: None,
) -> None:
    """Call ``then`` whenever a stage begins, and ``after`` when it is done."""
    module, name = stage.place.rsplit(".", 1)
    home = import_module(f"onnx_oamip.{module}")
    real = getattr(home, name)

    def begin(*args: Any, **options: Any) -> Any:
        if is_cache_entry(args):
            return real(*args, **options)
        then()
        try:
            return real(*args, **options)
        finally:
            after()

    patch.setattr(home, name, begin)


def _fail(error: BaseException) -> Callable[[], object]:
    def fail() -> None:
        raise error

    return fail


@contextlib.contextmanager
def _killed(task: Path, name: str, ends: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """The run was killed in another process: its folder takes the place of this one's."""
    end = ends()[name]
    assert end["end"] == -signal.SIGKILL, end
    shutil.rmtree(task / "cache", ignore_errors=True)
    for path in Path(end["folder"]).iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy2)(path, task / path.name)
    left = [path for path in task.iterdir() if path.name.startswith(".")]
    assert len(left) == (1 if name == "rename" else 0), "only a write leaves its folder behind"
    yield
    assert not [path for path in task.iterdir() if path.name.startswith(".")], (
        "and the next run removes it"
    )


def _full_disk(task: Path, stage: Stage) -> None:
    """From the beginning of the stage on nothing can be written any more, be it the cache or the model."""
    with pytest.MonkeyPatch.context() as patch:

        def fill() -> None:
            for owner, name in (
                (Path, "write_bytes"),
                (os, "fsync"),
                (os, "replace"),
                (atomic_files.tempfile, "mkdtemp"),
            ):
                patch.setattr(
                    owner,
                    name,
                    lambda *_, **__: _fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))(),
                )

        _begun(patch, stage, fill)
        with pytest.raises(
            OutputError, match=r"out\.onnx cannot be written: No space left on device\."
        ):
            go(task, **stage.values)


def _no_memory(task: Path, stage: Stage) -> None:
    with pytest.MonkeyPatch.context() as patch:
        _begun(patch, stage, _fail(MemoryError()))
        with pytest.raises(MemoryError):
            go(task, **stage.values)


def _no_time(task: Path, stage: Stage) -> None:
    """No solver finds a thing in time: the run goes on with the best that is known, and says so."""
    with pytest.MonkeyPatch.context() as patch:
        real = dict(solvers.BACKENDS)
        late = {n: replace(b, solve=_late) for n, b in real.items()}

        def put(backends: dict[str, Any]) -> Callable[[], object]:
            return lambda: patch.setattr(solvers, "BACKENDS", backends)

        _begun(patch, stage, put(late), put(real))
        report = go(task, **stage.values)
    ends = {(p["status"], p["limit"]) for p in _records(report, stage)}
    late_end = ("feasible", "time")
    # The search on the relaxation of a decoupled program needs no solver, and may prove what it finds for a group.
    proven = {("optimal", None)} if "oamip" in stage.values.values() else set()
    assert ends
    assert ends <= {late_end, *proven}
    assert (task / "out.onnx").read_bytes() != OLD
    assert report.after.macs <= 0.5 * report.before.macs


def _no_licence(task: Path, stage: Stage) -> None:
    """Gurobi's licence goes after its first program of the stage: HiGHS goes on, or Gurobi was asked for alone."""
    gurobipy = pytest.importorskip("gurobipy")
    if not solvers.BACKENDS["gurobi"].licence().usable:
        pytest.skip("Gurobi has no licence here")
    answered: list[int] = []

    class Model(gurobipy.Model):  # type: ignore[misc, name-defined]
        def optimizeAsync(self) -> None:  # noqa: N802  (gurobipy's name)
            if answered:
                raise gurobipy.GurobiError(gurobipy.GRB.Error.NO_LICENSE, "No Gurobi license found")
            super().optimizeAsync()
            answered.append(1)

    class Module:
        def __getattr__(self, name: str) -> Any:
            return Model if name == "Model" else getattr(gurobipy, name)

    gurobi = import_module("onnx_oamip.programs.solvers.gurobi")
    for solver in ("gurobi", "auto"):
        answered.clear()
        with pytest.MonkeyPatch.context() as patch:
            # Few widths at a time, so that a second budget program follows the first.
            patch.setattr("onnx_oamip.planning.allocation.RUNGS", 3)
            _begun(patch, stage, lambda: patch.setattr(gurobi, "_gurobipy", Module))
            try:
                if solver == "gurobi":
                    with pytest.raises(
                        SolverError, match=r"No Gurobi license found.*`solver=highs`"
                    ):
                        go(task, solver=solver, **stage.values)
                    assert nothing_happened(task)
                else:
                    report = go(task, **stage.values)
            finally:
                gurobi.licence.cache_clear()
    reported = [p["solver"] for p in _records(report, stage)]
    assert reported[0].startswith(("gurobi", "highs"))
    assert reported[-1].endswith("highs")
    assert any("No Gurobi license found" in p["reason"] for p in _records(report, stage))


def _records(report: Any, stage: Stage) -> list[Mapping[str, Any]]:
    """Records of the programs of a stage."""
    return list(
        report.plan.programs
        if stage.place == "planning.allocation.allocate"
        else report.scores.programs
    )


def _lost_worker(task: Path, stage: Stage, scheduler: str, kill: Callable[[], None]) -> None:
    """A worker process dies while it holds work of the stage: the others finish it, and the result is the same."""
    from onnx_oamip.executors.cluster import Cluster

    real, inside, killed = Cluster.map, [0], []

    def watched(
        self: Any, work: Any, shared: Any, items: Any, progress: Any = None, receive: Any = None
    ) -> Any:
        def reported(done: int, total: int) -> None:
            if inside[0] and not killed:
                killed.append(stage.place)
                kill()
            if progress:
                progress(done, total)

        return real(self, work, shared, items, reported, receive)

    def count(by: int) -> Callable[[], object]:
        return lambda: inside.__setitem__(0, inside[0] + by)

    with pytest.MonkeyPatch.context() as patch:
        # A busy machine is slow to start another.
        patch.setattr("onnx_oamip.executors.cluster.MAX_SECONDS_WITHOUT_WORKERS", 300.0)
        patch.setattr(Cluster, "map", watched)
        # The stage of mint begins where it asks for a place to work, and ends with the run.
        _begun(patch, stage, count(1), count(0 if stage.place.endswith("executor") else -1))
        go(task, scheduler=scheduler, **stage.values)
    assert killed
    assert (task / "out.onnx").read_bytes() != OLD


@pytest.mark.skipif(os.name != "posix", reason="processes are forked and killed")
@pytest.mark.parametrize(("name", "fault"), PARAMETERS)
def test_fault_at_a_stage_leaves_the_old_files(
    name: str,
    fault: str,
    task: Path,
    whole: Callable[[Mapping[str, Any]], tuple[bytes, Path]],
    request: pytest.FixtureRequest,
) -> None:
    """The old files stay or the new ones are complete; the next run writes the right model, and does nothing twice."""
    stage = STAGES[name]
    reference, cache = whole(stage.values)
    (task / "cache").mkdir()
    for kind in stage.kept:
        for path in cache.glob(f"{kind}-*"):
            shutil.copy2(path, task / "cache")
    with contextlib.ExitStack() as stack:
        if fault == "kill":
            stack.enter_context(_killed(task, name, request.getfixturevalue("killed")))
        elif fault == "disk":
            _full_disk(task, stage)
        elif fault == "memory":
            _no_memory(task, stage)
        elif fault == "timeout":
            _no_time(task, stage)
        elif fault == "licence":
            _no_licence(task, stage)
        else:
            local = request.getfixturevalue("cluster")
            until = time.monotonic() + 120
            # The last case killed one.
            while len(local.scheduler.workers) < 2 and time.monotonic() < until:
                time.sleep(0.05)
            _lost_worker(task, stage, local.scheduler_address, lambda: _kill_one(local))
            assert (task / "out.onnx").read_bytes() == reference
        before = kinds(task / "cache")
        if fault in ("kill", "disk", "memory"):
            assert set(before) == set(stage.kept) & set(kinds(cache))
            assert (task / "out.onnx").read_bytes() == OLD
            if fault != "kill":
                assert nothing_happened(task)
        go(task, **stage.values)
        after = kinds(task / "cache")
    assert {kind: after[kind] for kind in before} == before, "what was learnt is not learnt again"
    assert set(after) == set(kinds(cache))
    # Then scores or widths may be others, as the records say.
    if fault not in (
        "timeout",
        "licence",
    ):
        assert (task / "out.onnx").read_bytes() == reference
    assert names(task) == {"model.onnx", "data.npz", *WRITTEN}


def test_fault_matrix_matches_what_stages_do(task: Path) -> None:
    """Programs are solved, and work is spread, by the stages that say so, and by no others."""
    executors = import_module("onnx_oamip.executors")
    for room in (importance, published):
        for found in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
            import_module(found.name)  # methods are imported when they are first used
    homes = [
        m for m in list(sys.modules.values()) if getattr(m, "executor", None) is executors.executor
    ]
    seen: dict[str, set[str]] = {"solves": set(), "spreads": set()}
    inside: list[str] = []

    def note(what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            seen[what].add(inside[-1] if inside else "nowhere")
            return real(*args, **options)

        return noted

    def enter(name: str) -> Callable[[], object]:
        return lambda: inside.append(name)

    for values in {repr(s.values): s.values for s in STAGES.values()}.values():
        shutil.rmtree(task / "cache", ignore_errors=True)
        # Of two at the same place the one of these settings.
        named = {s.place: n for n, s in STAGES.items()}
        named.update({s.place: n for n, s in STAGES.items() if s.values == values})
        with pytest.MonkeyPatch.context() as patch:
            for home in homes:
                if home is not executors:
                    patch.setattr(home, "executor", note("spreads", home.executor))
            backends = {
                n: replace(b, solve=note("solves", b.solve)) for n, b in solvers.BACKENDS.items()
            }
            patch.setattr(solvers, "BACKENDS", backends)
            for name in named.values():
                _begun(patch, STAGES[name], enter(name), inside.pop)
            go(task, **values)
    assert seen["solves"] == {n for n, s in STAGES.items() if s.solves}
    assert seen["spreads"] == {n for n, s in STAGES.items() if s.spreads}


# ------------------------------------------------------------------------------------- processes that are killed


DRIVER = """
import gc, json, os, signal, sys
from importlib import import_module
from pathlib import Path

import onnx_oamip
from onnx_oamip.api import pipeline, proof
from onnx_oamip.verification.latency import Ratio
for name in (
    "planning.allocation", "planning.scoring", "planning.sensitivity", "programs.solvers", "reporting.html",
    "repair.least_squares", "statistics.calibration", "statistics.covariances", "verification.equivalence",
):
    import_module(f"onnx_oamip.{name}")
import gurobipy, highspy, onnxruntime, scipy.optimize
from stages import is_cache_entry

task, stages = Path(sys.argv[1]), json.loads(sys.argv[2])
proof.compare_latency = lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9)
ends = {}
gc.freeze()  # no process searches what all of them share for cycles

def strike(place):
    module, name = place.rsplit(".", 1)
    module = import_module(f"onnx_oamip.{module}")
    real = getattr(module, name)
    def die(*args, **options):
        if is_cache_entry(args):
            return real(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(module, name, die)

for name, stage in stages.items():
    folder = task / name
    folder.mkdir()
    (folder / "out.onnx").write_bytes(sys.argv[3].encode())
    pid = os.fork()  # before any session: nothing here has threads yet
    if not pid:
        strike(stage["place"])
        given = {"macs": 0.5, "align": 1, "device": "cpu", "workers": 2, "cache": str(folder / "cache")}
        settings = onnx_oamip.Settings(**given, **stage["values"])
        try:
            onnx_oamip.prune(task / "model.onnx", task / "data.npz", folder / "out.onnx", settings)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        os._exit(9)
    ends[name] = {"end": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), "folder": str(folder)}
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Mapping[str, Any]]:
    """Every stage's run from nothing, killed where the stage begins: the end of the process, and its folder."""
    ends: dict[str, Any] = {}

    def run() -> Mapping[str, Any]:
        if not ends:
            folder = tmp_path_factory.mktemp("killed")
            _given(folder)
            stages = json.dumps({name: asdict(stage) for name, stage in STAGES.items()})
            arguments = [sys.executable, "-c", DRIVER, str(folder), stages, OLD.decode()]
            paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support")))
            found = subprocess.run(
                arguments,
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": paths},
                check=False,
            )
            assert found.returncode == 0, found.stderr
            ends.update(json.loads(found.stdout))
        return ends

    return run


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pytest.importorskip(
        "distributed", reason="the package distributed is not installed (the extra 'cluster')"
    )
    from distributed import LocalCluster

    with LocalCluster(
        processes=True, n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as found:
        yield found


def _kill_one(local: Any) -> None:
    """End a worker process; its nanny starts another."""
    os.kill(next(iter(local.workers.values())).pid, signal.SIGKILL)


# --------------------------------------------------------------------------------------------------- full disks


def _full(name: str, real: Callable[..., Any], when: Callable[[str], bool]) -> Callable[..., Any]:
    def refuse(first: Any, *rest: Any, **options: Any) -> Any:
        where = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
        if when(where):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(first, *rest, **options)

    return refuse


@pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="files are told apart by their descriptors"
)
@pytest.mark.parametrize("which", WRITTEN)
@pytest.mark.parametrize("point", ["write_bytes", "fsync", "replace"])
def test_full_disk_leaves_the_old_files(
    task: Path,
    point: str,
    which: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    owner = Path if point == "write_bytes" else os
    with monkeypatch.context() as patch:
        patch.setattr(
            owner,
            point,
            _full(point, getattr(owner, point), lambda where: where.endswith(f"/{which}")),
        )
        patch.setattr("onnx_oamip.reporting.html.prune_page", lambda _: b"page")
        assert (
            main(command(task, "--importance", "l2", "--allocate", "uniform", "--refit", "none"))
            == 2
        )
    text = capsys.readouterr().err
    assert text == f"Error: {task / which} cannot be written: No space left on device.\n"
    assert nothing_happened(task)


@pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="files are told apart by their descriptors"
)
@pytest.mark.parametrize("point", ["write_bytes", "fsync", "replace"])
def test_full_cache_disk_does_not_change_the_result(
    task: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(task, cache="off")
    reference = (task / "out.onnx").read_bytes()
    owner = Path if point == "write_bytes" else os
    with monkeypatch.context() as patch:
        patch.setattr(
            owner, point, _full(point, getattr(owner, point), lambda where: "/cache/" in where)
        )
        notes = go(task).notes
    reported = [
        n for n in notes if n.startswith("not all of what was learnt is kept for the next run: ")
    ]
    assert len(reported) == 1
    assert reported[0].endswith(".npz cannot be written: No space left on device")
    assert (task / "out.onnx").read_bytes() == reference
    assert not list((task / "cache").iterdir())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_refused_before_any_work(
    task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnx_oamip.graph.loading.load", lambda *_: pytest.fail("work was done"))
    task.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="not writable"):
            go(task)
    finally:
        task.chmod(0o700)


def test_unusable_output_path_is_refused_before_any_work(
    task: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("onnx_oamip.graph.loading.load", lambda *_: pytest.fail("work was done"))
    (task / "out.onnx").unlink()
    (task / "out.onnx").mkdir()
    assert main(command(task)) == 2
    assert (
        capsys.readouterr().err
        == f"Error: the output {task / 'out.onnx'} is a folder; give a file name.\n"
    )
    (task / "out.onnx").rmdir()
    with monkeypatch.context() as patch:  # what a system says about a folder that is read-only
        patch.setattr(os, "access", lambda path, _: Path(path) != task)
        assert main(command(task)) == 2
    assert f"the output folder {task} is not writable" in capsys.readouterr().err
    (task / "cache").write_bytes(OLD)
    assert main(command(task)) == 2
    text = capsys.readouterr().err
    assert text == (
        f"Error: the cache folder {task / 'cache'} cannot be made or written to; choose another --cache, or off.\n"
    )
    assert names(task) == {"model.onnx", "data.npz", *WRITTEN[1:]}


def test_unwritable_cache_folder_is_noted_once(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONNX_OAMIP_CACHE")
    (task / "cache").write_bytes(OLD)
    monkeypatch.setattr(
        "onnx_oamip.artifacts.cache.user_cache_path", lambda _: task / "cache" / "onnx-oamip"
    )
    report = go(task, cache="auto")
    reported = [note for note in report.notes if "nothing is kept for the next run" in note]
    assert len(reported) == 1
    assert str(task / "cache") in reported[0]
    assert report.output_sha256


def test_old_model_and_its_external_weights_stay_together(
    task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnx_oamip.graph.external_data.PROTOBUF_LIMIT", 1000)
    monkeypatch.setattr("onnx_oamip.graph.external_data.MAPPED_TENSOR_BYTES", 100)
    target = task / "out.onnx"
    go(task, force=True)  # a data file keeps every weight on a page of its own
    first = {p.name: p.read_bytes() for p in task.glob("out.onnx*")}
    assert set(first) == {"out.onnx", "out.onnx.data"}
    real = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(
            os, "replace", _full("replace", real, lambda where: where.endswith("/out.onnx"))
        )
        with pytest.raises(OutputError):
            go(task, macs=0.4, force=True)
    assert {p.name: p.read_bytes() for p in task.glob("out.onnx*")} == first
    go(task, macs=0.4, force=True)
    assert {p.name for p in task.glob("out.onnx*")} == {"out.onnx", "out.onnx.1.data"}
    assert target.read_bytes() != first["out.onnx"]


# ------------------------------------------------------------------------------------------- files that belong together


def test_files_are_renamed_in_order_and_together(
    task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(Path(b).name), real(a, b))[1])
    assert (
        main(
            command(
                task,
                "--importance",
                "l2",
                "--allocate",
                "uniform",
                "--refit",
                "none",
                "--cache",
                "off",
            )
        )
        == 0
    )
    assert seen == ["page.html", "keep.safetensors", "out.onnx"]
    assert names(task) == {"model.onnx", "data.npz", *WRITTEN}


def test_new_file_is_removed_if_a_later_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").write_bytes(OLD)
    real = os.replace
    with atomic_files.Batch() as batch:
        for name in "abc":
            batch.add(tmp_path / name, b"new")
        monkeypatch.setattr(
            os, "replace", _full("replace", real, lambda where: where.endswith("/c"))
        )
        with pytest.raises(OutputError, match=r"c cannot be written"):
            batch.commit()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"b": OLD}


def test_temporary_folders_of_other_processes_are_kept(tmp_path: Path) -> None:
    """A folder that a running process holds stays, one that no process holds goes; similar names stay."""
    held = atomic_files.create_folder(tmp_path, ".x-")
    left, other = tmp_path / ".x-abcdefgh", tmp_path / ".x-y"
    unlocked, young = tmp_path / ".x-new-abcdefgh", tmp_path / ".x-new-ijklmnop"
    for path in (left, other, unlocked, young):
        path.mkdir()
    for path in (held, unlocked, *([left] if atomic_files.locks is None else [])):
        os.utime(path, (1, 1))
    atomic_files._open.pop(held)  # as if another process had made it: only the lock tells
    second = atomic_files.create_folder(tmp_path, ".x-")
    if atomic_files.locks is not None:
        assert held.exists()
    assert second.exists()
    assert not left.exists()
    assert other.exists()
    assert not unlocked.exists()
    assert young.exists()
    atomic_files.remove_folder(second)
    assert not second.exists()


def test_temporary_weights_are_removed_at_exit(tmp_path: Path) -> None:
    code = (
        "import numpy as np\nfrom onnx_oamip.graph import external_data\n"
        "external_data.tensor(np.zeros(1 << 19), 'w', True)\nimport os, sys\n"
        "print(len(os.listdir(os.environ['TMPDIR'])))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        check=True,
    )
    assert found.stdout == "1\n"
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ solvers and workers


def _failing(program: Program, limits: SolverLimits) -> Any:
    raise SolverError("the licence server cannot be reached.")


def _late(program: Program, limits: SolverLimits) -> Any:
    return solvers.Solution(
        Termination.NO_SOLUTION, Limit.TIME, None, None, None, None, 1.0, "gurobi"
    )


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def put(**by_name: Any) -> None:
        changed = {
            n: replace(b, solve=by_name[n]) if n in by_name else b
            for n, b in solvers.BACKENDS.items()
        }
        monkeypatch.setattr(solvers, "BACKENDS", changed)

    return put


def test_failure_of_all_solvers_leaves_the_old_files(
    task: Path, backends: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = dict(solvers.BACKENDS)
    backends(gurobi=_failing, highs=_failing)
    with pytest.raises(SolverError, match=r"gurobi failed .*licence server.*highs failed"):
        go(task)
    with pytest.raises(SolverError, match="licence server"):
        go(task, solver="gurobi")
    assert nothing_happened(task)
    monkeypatch.setattr(solvers, "BACKENDS", real)
    learnt = kinds(task / "cache")
    assert go(task).output_sha256
    assert kinds(task / "cache").items() >= learnt.items()


@pytest.mark.parametrize("error", [MemoryError, RuntimeError], ids=["memory", "death"])
def test_failure_of_a_worker_leaves_the_old_files(
    task: Path,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from onnx_oamip.planning import sensitivity

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
    learnt = kinds(task / "cache")
    assert go(task).output_sha256
    assert kinds(task / "cache").items() >= learnt.items()


@pytest.mark.parametrize(
    ("place", "values", "what"),
    [
        ("planning.sensitivity._Part.losses", {}, r"the losses of the group 'w\d'"),
        ("statistics.covariances._Sum", {}, r"the second moments of what Conv '.*' reads"),
        ("repair.least_squares.refit_family", {}, r"the refit of Conv '.*'"),
        (
            "importance.oamip.decoupled._solve_group",
            oamip("decoupled"),
            r"the programs of the group 'w\d'",
        ),
        (
            "importance.oamip.select.formulate",
            oamip("joint", formulation="paper"),
            "the joint importance program",
        ),
    ],
)
def test_out_of_memory_error_names_the_group(
    task: Path,
    place: str,
    values: Mapping[str, Any],
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At its second piece of work, and in a thread where there are several."""
    module, name = place.rsplit(".", 1)
    home: Any = import_module("onnx_oamip")
    for part in module.split("."):
        with contextlib.suppress(ImportError):
            import_module(f"{home.__name__}.{part}")
        home = getattr(home, part)
    real, seen = getattr(home, name), []

    def starved(*args: Any, **named: Any) -> Any:
        seen.append(1)
        if len(seen) == (1 if name == "formulate" else 2):
            raise MemoryError
        return real(*args, **named)

    monkeypatch.setattr(home, name, starved)
    options = [f"--{key}={value}" for key, value in values.items()]
    assert main(command(task, *options)) == 2
    said = "use --mode decoupled" if name == "formulate" else "give a smaller --max-memory"
    assert re.fullmatch(
        f"Error: there is not enough memory for {what}; {said}.*\\.\n", capsys.readouterr().err
    )
    assert nothing_happened(task)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        RuntimeError("Exception during initialization: std::bad_alloc"),
        RuntimeError("Failed to allocate memory for requested buffer of size 17179869184"),
    ],
    ids=["python", "load", "run"],
)
def test_out_of_memory_in_the_runtime_is_reported(
    task: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own errors are about memory, not about a model that is no good."""
    from onnx_oamip.graph.runtime import runtime

    rt = runtime()
    real, seen = rt.InferenceSession, []

    class Starved(real):  # type: ignore[misc, valid-type]
        def run(self, *args: Any) -> Any:
            seen.append(1)
            if len(seen) == 12:
                raise error
            return super().run(*args)

    monkeypatch.setattr(rt, "InferenceSession", Starved)
    with pytest.raises(OutOfMemory, match="there is not enough memory"):
        go(task)
    assert nothing_happened(task)


def test_exception_in_highs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import highspy

    class Thrown(highspy.Highs):  # type: ignore[misc]
        def run(self) -> None:
            raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(highspy, "Highs", Thrown)
    program = knapsack(5)
    with pytest.raises(SolverError, match=r"HiGHS failed: std::bad_alloc; try `solver=gurobi`\."):
        solvers.solve(program, SolverLimits(), "highs")


# ------------------------------------------------------------------------------------------------------- signals

STUCK = """
import hashlib, sys, threading
from pathlib import Path
from onnx_oamip.cli import main
from onnx_oamip.planning import sensitivity
from onnx_oamip.statistics import calibration

def stuck(*_, **__):
    Path(sys.argv[2]).touch()
    hashlib.pbkdf2_hmac("sha256", b"x" * 8, b"x" * 8, 2**31 - 1)  # minutes in C, as a solver or a kernel has them

if sys.argv[1] == "thread":
    sensitivity._Part.losses = stuck
else:
    calibration.collect = stuck
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.slow  # test_interrupts.py has both among its cases, wherever processes can be listed
@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
@pytest.mark.parametrize(
    ("place", "number", "status", "word"),
    [("thread", signal.SIGINT, 130, "interrupted"), ("main", signal.SIGTERM, 143, "terminated")],
)
def test_signal_ends_unresponsive_work(
    task: Path, place: str, number: int, status: int, word: str
) -> None:
    started = task / "cache" / "started.npz"
    started.parent.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, place, str(started), *command(task)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    while not started.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, text = process.communicate(timeout=30)
    assert process.returncode == status, text
    assert text.strip().splitlines()[-1] == f"Error: {word}."
    assert nothing_happened(task)
