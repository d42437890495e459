"""Work on a Dask cluster: the same results as here, whatever happens to its workers."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import executor_tasks
import numpy as np
import pytest
from graphs import NETS, RESIDUAL, build, load, samples

from onnx_oamip import cli
from onnx_oamip.api import pipeline
from onnx_oamip.core.errors import EnvironmentMissing, ModelError, SettingsError
from onnx_oamip.core.records import Array
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.executors import (
    Executor,
    Threads,
    cluster,
    executor,
    parcel,
)
from onnx_oamip.graph import external_data
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple
from onnx_oamip.importance.oamip import decoupled
from onnx_oamip.published.dependence import mint

pytest.importorskip(
    "distributed", reason="the package distributed is not installed (the extra 'cluster')"
)
NOWHERE = "tcp://127.0.0.1:9"


@pytest.fixture(scope="module")
def local() -> Iterator[Any]:
    import dask
    from distributed import LocalCluster

    # Dask may drop the second copy of shared data, which then is fetched and opened again.
    keep_copies = {"distributed.scheduler.active-memory-manager.start": False}
    with (
        dask.config.set(keep_copies),
        LocalCluster(
            processes=True, n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as found,
    ):
        yield found


@pytest.fixture
def address(local: Any) -> str:
    """The scheduler, with both workers there, and with the limits of the tests."""
    from distributed import Client

    local.scale(2)  # a test may have left none
    _wait(local, 2)
    with Client(local, set_as_default=False) as client:
        client.run(executor_tasks.limit_programs, decoupled.FLOPS_PER_GROUP)
    return str(local.scheduler_address)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and data, from which the command line is called."""
    model = load(build(RESIDUAL), tmp_path)
    np.savez(tmp_path / "data.npz", **samples(model, 120))  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _wait(local: Any, count: int) -> None:
    for _ in range(4):
        until = time.monotonic() + 60  # on a busy machine workers take their time
        while time.monotonic() < until:
            if len(local.scheduler.workers) == count:
                return
            time.sleep(0.05)
        # A process that starts a worker gives up if that takes too long; others take its place.
        local.scale(0)
        local.scale(count)
    raise AssertionError("the workers do not come")


def _kill(local: Any, count: int) -> None:
    """End worker processes; their nannies start others."""
    for nanny in list(local.workers.values())[:count]:
        os.kill(nanny.pid, signal.SIGKILL)


def _plan(place: Path, scheduler: str | None, progress: Any = None, **values: Any) -> str:
    """The text of a plan file: what stays, with losses and programs, but for times."""
    asked = {
        "macs": 0.5,
        "align": 1,
        "device": "cpu",
        "solver": "highs",
        "workers": 2,
        "scheduler": scheduler,
    }
    settings = Settings.create(**{**asked, **values})
    output = place / "plan.json"
    pipeline.plan(place / "case.onnx", str(place / "data.npz"), output, settings, progress=progress)
    return output.read_text()


# ------------------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize(
    "values",
    [
        {},
        pytest.param({"importance": "oamip", "mode": "decoupled"}, marks=pytest.mark.slow),
        {"importance": "oamip", "mode": "decoupled", "refit": "bias"},
        {"importance": "snacs", "limits": "snacs"},
        {"importance": "mint"},
    ],
    ids=str,
)
def test_cluster_plans_equal_local_plans(
    place: Path, address: str, values: Mapping[str, Any]
) -> None:
    """Every loss, score and program of the plan, to the last bit; progress counts groups as they come."""
    steps: list[tuple[str, int, int]] = []
    there = _plan(place, address, lambda *step: steps.append(step), **values)
    assert there == _plan(place, None, **values)
    measured = [step[1:] for step in steps if step[0] == "sensitivity"]
    assert measured == [(i + 1, len(measured)) for i in range(measured[0][1])]


def test_commands_accept_a_scheduler_address(
    place: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["case.onnx", "--data", "data.npz", "--device", "cpu", "-q", "--scheduler", address]
    few = ["--align", "1", "--solver", "highs"]
    assert cli.main(["score", *common, "-o", "there.npz"]) == 0
    assert cli.main(["score", *common[:-2], "-o", "here.npz"]) == 0
    with np.load("there.npz") as there, np.load("here.npz") as here:
        assert there.files == here.files
        for name in set(here.files) - {"settings", "programs"}:
            np.testing.assert_array_equal(there[name], here[name])
    assert cli.main(["prune", *common, *few, "--macs", "0.5", "--force", "-o", "out.onnx"]) == 0
    assert (
        cli.main(["prune", *common[:-2], *few, "--macs", "0.5", "--force", "-o", "own.onnx"]) == 0
    )
    assert Path("out.onnx").read_bytes() == Path("own.onnx").read_bytes()
    assert cli.main(["frontier", *common, *few, "--levels", "0.5", "-o", "f.json"]) == 0
    assert address in Path("f.json").read_text()
    assert capsys.readouterr().err == ""


def test_cache_is_shared_by_local_and_cluster_runs(place: Path, address: str) -> None:
    """Results of a cluster are taken from the cache here: the place of computation decides nothing."""
    settings = Settings.create(
        macs=0.5, align=1, device="cpu", cache=str(place / "cache"), scheduler=address
    )
    first = pipeline.plan(place / "case.onnx", str(place / "data.npz"), None, settings)
    own = settings.model_copy(update={"scheduler": None})
    second = pipeline.plan(place / "case.onnx", str(place / "data.npz"), None, own)
    assert not any("cache" in note for note in first.notes)
    assert any("scores" in note and "losses" in note for note in second.notes)
    np.testing.assert_array_equal(first.plan.keep, second.plan.keep)


def test_large_weights_stay_in_their_file(
    place: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers map the file that they see."""
    monkeypatch.setattr(external_data, "MAPPED_MODEL_BYTES", 1)
    monkeypatch.setattr(external_data, "MAPPED_TENSOR_BYTES", 64)
    assert external_data.references(models.load(place / "case.onnx").proto)
    assert _plan(place, address) == _plan(place, None)


# ------------------------------------------------------------------------------------------------------------ executors


@pytest.fixture(params=["threads", "cluster"])
def either(request: pytest.FixtureRequest) -> Executor:
    if request.param == "threads":
        return executor(2)
    return executor(2, request.getfixturevalue("address"))


def test_results_come_in_order(either: Executor) -> None:
    reported: list[tuple[int, int]] = []
    found = either.map(
        executor_tasks.add, 10, list(range(30)), lambda done, total: reported.append((done, total))
    )
    assert found == list(range(10, 40))
    assert reported == [(i + 1, 30) for i in range(30)]
    assert either.map(executor_tasks.add, 10, []) == []


@pytest.mark.parametrize(
    ("task", "kind"), [(executor_tasks.refuse, ModelError), (executor_tasks.overrun, TimeoutError)]
)
def test_task_errors_reach_the_caller(
    either: Executor, task: Callable[[Any, int], int], kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=r"^(piece 3 cannot be done; leave it out\.|the piece's own)$"):
        either.map(task, None, list(range(6)))


def test_tasks_are_spread_with_one_thread_each(address: str) -> None:
    there = executor(scheduler=address)
    assert len({*there.map(executor_tasks.process, None, list(range(12)))}) == 2
    assert os.getpid() not in there.map(executor_tasks.process, None, [0])
    # Opened once a process.
    assert len({*there.map(executor_tasks.identity, list(range(9)), list(range(12)))}) <= 2
    assert set(there.map(executor_tasks.threads, None, list(range(4)))) == {1}


def test_thread_executor_shares_the_object_between_tasks() -> None:
    shared = [1, 2]
    assert set(Threads(2).map(executor_tasks.identity, shared, [0, 1, 2])) == {id(shared)}


# --------------------------------------------------------------------------------------------------- workers that go


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2], ids=["one", "all"])
def test_losing_workers_does_not_change_the_plan(
    place: Path, local: Any, address: str, count: int
) -> None:
    """The pieces of lost workers run elsewhere; where all go, what they held is sent to those that come after."""
    killed: list[str] = []

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "sensitivity" and not killed:
            killed.append(stage)
            _kill(local, count)

    assert _plan(place, address, kill) == _plan(place, None)
    assert killed


def test_tasks_of_lost_workers_run_again(local: Any, address: str) -> None:
    """All workers are lost, so that those that come after are sent the shared object again."""
    killed: list[int] = []

    def kill(done: int, total: int) -> None:
        if done == 3:
            killed.append(done)
            _kill(local, 2)

    assert executor(scheduler=address).map(
        executor_tasks.rest, 0.05, list(range(30)), kill
    ) == list(range(30))
    assert killed == [3]


def test_task_that_kills_its_workers_is_reported(
    local: Any, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local.scheduler, "allowed_failures", 0)
    with pytest.raises(EnvironmentMissing, match="workers died at the same piece of work"):
        executor(scheduler=address).map(executor_tasks.leave, None, [0])


def test_interrupted_tasks_are_cancelled(local: Any, address: str) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        executor(scheduler=address).map(executor_tasks.rest, 0.2, list(range(20)), interrupt)
    until = time.monotonic() + 10
    while local.scheduler.tasks and time.monotonic() < until:
        time.sleep(0.05)
    assert not local.scheduler.tasks


# ---------------------------------------------------------------------------------------------- clusters of no use


def _refused(place: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """One sentence on stderr, status 2, nothing written."""
    before = sorted(os.listdir(place))
    common = [
        "case.onnx",
        "--data",
        "data.npz",
        "--macs",
        "0.5",
        "--device",
        "cpu",
        "-o",
        "out.onnx",
    ]
    assert cli.main(["prune", *common, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert sorted(os.listdir(place)) == before
    return err


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(dataset, "load", load)
    monkeypatch.setattr(models, "load", load)


@pytest.mark.parametrize("where", [NOWHERE, "nonsense", "tcp://", "foo://host:1"])
def test_unreachable_scheduler_is_reported(
    place: Path,
    where: str,
    no_work: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    assert f"--scheduler {where}: no Dask scheduler answers there" in _refused(
        place, capsys, "--scheduler", where
    )


def test_address_of_a_worker_is_refused(
    place: Path, local: Any, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = next(iter(local.scheduler.workers))
    assert "no Dask scheduler answers there" in _refused(place, capsys, "--scheduler", worker)


def test_workers_with_other_versions_are_refused(
    place: Path,
    address: str,
    no_work: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = cluster.environment()
    monkeypatch.setattr(
        cluster, "environment", lambda: tuple((n, "1.0" if n == "numpy" else v) for n, v in known)
    )
    reported = _refused(place, capsys, "--scheduler", address)
    assert "the worker tcp://" in reported
    assert f"has numpy {np.__version__}, and here is 1.0; install the same on both." in reported


def test_scheduler_of_another_version_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "mismatch", executor_tasks.mismatch)
    with pytest.raises(
        EnvironmentMissing, match=r"the scheduler tcp://\S+ has python 1\.0, and here"
    ):
        cluster.Cluster(address).check()


def test_late_worker_with_other_versions_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "environment", lambda: (("numpy", "1.0"), ("distributed", "1.0")))
    monkeypatch.setattr(cluster.Cluster, "_check_environments", lambda *_: None)
    with pytest.raises(EnvironmentMissing, match=r"the worker tcp://\S+ has numpy"):
        executor(scheduler=address).map(executor_tasks.add, 1, [1])


def test_workers_without_the_device_are_refused(address: str) -> None:
    with pytest.raises(
        EnvironmentMissing, match=r"the worker tcp://\S+ does not fit: `device=cuda`"
    ):
        cluster.Cluster(address, "cuda").check()


def test_missing_distributed_package_is_named(
    place: Path, no_work: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert "pip install 'onnx-oamip[cluster]'" in _refused(place, capsys, "--scheduler", NOWHERE)


def test_connection_pruning_refuses_a_cluster() -> None:
    settings = Settings.create(
        alpha=0.9, importance="nnrelief", granularity="connection", scheduler=NOWHERE
    )
    with pytest.raises(SettingsError, match="leave out `scheduler`"):
        pipeline.prune("model.onnx", "data.npz", None, settings)


# ------------------------------------------------------------------------------------------------------------ travel


def _equal(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("net", NETS)
def test_models_arrive_unchanged(net: str, tmp_path: Path) -> None:
    model = load(build(NETS[net]), tmp_path)
    content = parcel.pack((model, couple(model)))
    there, coupling = pickle.loads(pickle.dumps(parcel.Parcel(content))).open()
    assert there.proto.SerializeToString(deterministic=True) == model.proto.SerializeToString(
        deterministic=True
    )
    assert there.shapes == model.shapes
    assert [str(n) for n in there.every] == [str(n) for n in model.every]
    assert list(there.constants) == list(model.constants)
    assert all(_equal(there.constants[n], v) for n, v in model.constants.items())
    assert [g.name for g in coupling.groups] == [g.name for g in couple(model).groups]
    assert len(content) < 1.5 * len(pickle.dumps(model.proto)) + 20_000  # weights travel once


def test_differing_files_on_a_worker_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_data, "MAPPED_MODEL_BYTES", 1)
    monkeypatch.setattr(external_data, "MAPPED_TENSOR_BYTES", 64)
    model = load(build(RESIDUAL), tmp_path)
    content = parcel.pack(model)
    assert _equal(parcel.Parcel(content).open().constants["w1"], model.constants["w1"])
    os.utime(tmp_path / "case.onnx", ns=(1, 1))
    for _ in range(2):
        with pytest.raises(ModelError, match=r"does not see the file .*case\.onnx as it is here"):
            parcel.Parcel(content).open()
        (tmp_path / "case.onnx").unlink(missing_ok=True)


def test_models_that_cannot_be_sent_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(build(RESIDUAL), tmp_path)
    monkeypatch.setattr(external_data, "PROTOBUF_LIMIT", 10)
    with pytest.raises(ModelError, match="cannot be sent to a cluster"):
        parcel.pack(model)


def test_deadline_is_sent_as_the_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    content = pickle.dumps(mint._Deadline(time.monotonic() + 50))
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 10_000)
    assert pickle.loads(content).at == pytest.approx(now + 10_050, abs=5)


def test_losing_every_worker_is_reported(
    local: Any, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test, behind which no other waits for new workers."""
    monkeypatch.setattr(cluster, "MAX_SECONDS_WITHOUT_WORKERS", 0.5)
    with pytest.raises(
        EnvironmentMissing, match=r"no worker is left at `scheduler=tcp://.*, with [1-9] of 40"
    ):
        executor(scheduler=address).map(
            executor_tasks.rest, 0.05, list(range(40)), lambda *_: local.scale(0)
        )
    _wait(local, 0)
    with pytest.raises(
        EnvironmentMissing, match="has no worker; start some with 'dask worker tcp://"
    ):
        cluster.Cluster(address).check()
