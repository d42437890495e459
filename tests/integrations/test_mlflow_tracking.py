"""Runs logged to MLflow, read back from a store in a folder."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MODELS

from onnx_oamip.api import pipeline, proof
from onnx_oamip.cli import main
from onnx_oamip.integrations import mlflow_tracking
from onnx_oamip.verification.latency import Ratio

MODEL = MODELS / "lenet300-mnist.onnx"
ASKED = ("--importance", "l2", "--allocate", "global", "--align", "1", "--seed", "3")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A few samples; latency is not what is tested."""
    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))
    monkeypatch.chdir(tmp_path)
    whole = np.load(MODELS / "mnist.npz")
    np.savez("data.npz", **{k: whole[k][:64] if whole[k].ndim else whole[k] for k in whole.files})
    return tmp_path / "data.npz"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[Any]]]:
    """All runs that MLflow knows, the last one first."""
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    for name in (
        "MLFLOW_TRACKING_URI",
        "MLFLOW_RUN_ID",
        "MLFLOW_EXPERIMENT_NAME",
        "MLFLOW_EXPERIMENT_ID",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    before = mlflow.get_tracking_uri()
    yield lambda: mlflow.search_runs(output_format="list", search_all_experiments=True)
    assert mlflow.active_run() is None
    mlflow.set_tracking_uri(before)


def files(run: Any) -> dict[str, Path]:
    return {p.name: p for p in Path(run.info.artifact_uri.removeprefix("file://")).iterdir()}


def prune(data: Path, *more: object) -> int:
    return main([str(a) for a in ("prune", MODEL, "--data", data, "-o", "out.onnx", *ASKED, *more)])


def test_prune_is_logged(
    data: Path, runs: Callable[[], list[Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = (tmp_path / "runs").as_uri()
    assert (
        prune(data, "--macs", "0.5", "--keep-map", "keep.safetensors", "--json", "--mlflow", store)
        == 0
    )
    document = json.loads(capfd.readouterr().out)
    (run,) = runs()
    assert run.info.status == "FINISHED"
    parameters, metrics = run.data.params, run.data.metrics
    for name in ("macs", "seed", "align"):
        assert json.loads(parameters[name]) == document["settings"][name]
    assert (parameters["importance"], parameters["device"]) == (
        "l2",
        document["settings"]["device"],
    )
    assert (parameters["model"], parameters["data"]) == (str(MODEL), str(data))
    assert parameters["model_sha256"] == document["model"]["sha256"]
    assert "params" not in parameters, "what was not asked for is not there"
    for name in ("macs", "params", "bytes"):
        before, after = document["before"][name], document["after"][name]
        assert (metrics[f"{name}_before"], metrics[f"{name}_after"]) == (before, after)
        assert metrics[f"{name}_kept"] == pytest.approx(after / before)
    for name in (
        "accuracy_before",
        "accuracy_after",
        "agreement",
        "masked_equivalence",
        "latency_ratio",
    ):
        assert metrics[name] == pytest.approx(document["verification"][name])
    assert (metrics["latency_ratio_low"], metrics["latency_ratio_high"]) == (0.4, 0.6)
    assert metrics["seconds.plan_and_refit"] == pytest.approx(document["timings"]["plan and refit"])
    assert run.data.tags["version.onnx_oamip"] == document["versions"]["onnx_oamip"]
    kept = files(run)
    assert set(kept) == {"out.onnx", "keep.safetensors", "report.json"}
    assert json.loads(kept["report.json"].read_text()) == document
    assert kept["out.onnx"].read_bytes() == Path("out.onnx").read_bytes()


def test_logged_model_is_loaded_back_and_predicts(
    data: Path, runs: Callable[[], list[Any]], tmp_path: Path
) -> None:
    import mlflow
    from onnxruntime import InferenceSession

    assert prune(data, "--macs", "0.5", "-q", "--mlflow", f"sqlite:///{tmp_path}/runs.db") == 0
    (run,) = runs()
    uri = f"runs:/{run.info.run_id}/out.onnx"
    loaded = mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "back"))
    whole = np.load(MODELS / "mnist.npz")
    images = (whole["eval.input"][:500] * whole["input.scale"]).astype(np.float32)
    (scores,) = InferenceSession(loaded).run(None, {"input": images})
    assert np.mean(scores.argmax(-1) == whole["eval.labels"][:500]) > 0.8
    assert run.data.metrics["macs_kept"] <= 0.5


def test_apply_is_logged_to_the_configured_tracking_store(
    data: Path, runs: Callable[[], list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    mlflow.set_tracking_uri((tmp_path / "set").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "half of it")
    arguments = ("--data", data, *ASKED, "--macs", "0.5", "-o", "plan.json", "-q")
    assert main([str(a) for a in ("plan", MODEL, *arguments)]) == 0
    apply = (
        "apply",
        MODEL,
        "--plan",
        "plan.json",
        "--data",
        data,
        "--mlflow",
        "-o",
        "out.onnx",
        "-q",
    )
    assert main([str(a) for a in apply]) == 0
    (run,) = runs()
    assert mlflow.get_experiment(run.info.experiment_id).name == "half of it"
    assert run.data.params["plan"] == "plan.json"
    assert run.data.params["importance"] == "l2"
    assert run.data.metrics["macs_kept"] <= 0.5
    assert set(files(run)) == {"out.onnx", "report.json"}


def test_dry_run_logs_the_prediction(
    data: Path, runs: Callable[[], list[Any]], tmp_path: Path
) -> None:
    arguments = (
        "prune",
        MODEL,
        "--data",
        data,
        *ASKED,
        "--macs",
        "0.5",
        "--dry-run",
        "-q",
        "--mlflow",
    )
    assert main([str(a) for a in (*arguments, (tmp_path / "runs").as_uri())]) == 0
    (run,) = runs()
    assert run.data.metrics["macs_predicted"] <= 0.5 * run.data.metrics["macs_before"]
    assert "macs_after" not in run.data.metrics
    assert set(files(run)) == {"report.json"}


def test_failed_run_is_logged_as_failed(
    data: Path, runs: Callable[[], list[Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert prune(data, "--macs", "0.0001", "--mlflow", (tmp_path / "runs").as_uri()) == 1
    (run,) = runs()
    assert run.info.status == "FAILED"
    assert run.data.params["macs"] == "0.0001"
    assert capfd.readouterr().err.strip().endswith(run.data.tags["error"])
    assert not run.data.metrics
    assert not files(run)


def test_interruption_is_logged_as_killed(runs: Callable[[], list[Any]], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), mlflow_tracking.run((tmp_path / "runs").as_uri(), {}):
        raise KeyboardInterrupt
    assert runs()[0].info.status == "KILLED"


@pytest.mark.parametrize(
    ("uri", "allowed", "what"),
    [
        ("nonsense://somewhere", "true", "nonsense://"),
        ("runs", "false", "MLFLOW_ALLOW_FILE_STORE=true"),
    ],
)
def test_unusable_tracking_store_is_refused_before_any_work(
    data: Path,
    runs: Callable[[], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    uri: str,
    allowed: str,
    what: str,
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", allowed)
    monkeypatch.setattr(
        pipeline, "prune", lambda *_: pytest.fail("no work without a place for the log")
    )
    assert prune(data, "--macs", "0.5", "--mlflow", uri) == 2
    error = capfd.readouterr().err
    assert what in error
    assert error.startswith("Error: MLflow at ")
    assert len(error.splitlines()) == 1


def test_failed_logging_names_the_written_model(
    data: Path,
    runs: Callable[[], list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import mlflow

    def refuse(path: str) -> None:
        raise ConnectionError("the store went away")

    monkeypatch.setattr(mlflow, "log_artifact", refuse)
    assert prune(data, "--macs", "0.5", "-q", "--mlflow", (tmp_path / "runs").as_uri()) == 2
    error = capfd.readouterr().err
    assert "the store went away" in error
    assert "written to out.onnx" in error
    assert Path("out.onnx").exists()
    assert runs()[0].info.status == "FAILED"


def test_nothing_is_logged_without_mlflow(
    data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    original = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "mlflow":
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr(pipeline, "prune", lambda *_: pytest.fail("no work without the package"))
    assert prune(data, "--macs", "0.5", "--mlflow") == 2
    assert capfd.readouterr().err == (
        "Error: --mlflow needs the packages of the extra 'mlflow' (mlflow); install them with pip install "
        "'onnx-oamip[mlflow]'.\n"
    )
    assert not Path("out.onnx").exists()


def test_metrics_omit_unmeasured_values() -> None:
    cost = {"macs": 0, "params": 10, "bytes": 100}
    document = {
        "before": cost,
        "after": {**cost, "params": 5},
        "verification": {
            "agreement": None,
            "masked_equivalence": 0.0,
            "samples": 0,
            "batches": [1, 2],
        },
        "recovery": {"before": 0.5, "after": None, "steps": 40, "accepted": False},
        "groups": [{}, {}],
        "skipped": [],
        "timings": {"plan and refit": 1.5},
    }
    assert mlflow_tracking.metrics(document) == {
        "macs_before": 0,
        "macs_after": 0,
        "params_before": 10,
        "params_after": 5,
        "params_kept": 0.5,
        "bytes_before": 100,
        "bytes_after": 100,
        "bytes_kept": 1,
        "masked_equivalence": 0,
        "samples": 0,
        "recovery_before": 0.5,
        "recovery_steps": 40,
        "recovery_accepted": 0,
        "groups": 2,
        "skipped": 0,
        "seconds.plan_and_refit": 1.5,
    }
