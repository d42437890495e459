"""The user's own metric: loaded by name, of outputs or of a model file, and as what ``max_drop`` bounds."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import build

from onnx_oamip import prune
from onnx_oamip.core.errors import DataError, SettingsError
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph.runtime import Session
from onnx_oamip.objective.metric import Metric, load

PLAIN = """(float[N,8] x) => (float[N,4] y) <float[8,24] w1, float[24] b1, float[24,4] w2> {
    a = Gemm(x, w1, b1) h = Relu(a) y = MatMul(h, w2) }"""
X = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
MODULE = """
import numpy as np
import onnx
import onnxruntime

X = np.load("held.npy")
LABELS = np.load("labels.npy")
CALLS = []


def of_outputs(outputs, labels):
    CALLS.append((sorted(outputs), outputs["y"].shape, None if labels is None else labels.shape))
    return 10 * float((outputs["y"].argmax(1) == labels).mean())


def of_model(path):
    CALLS.append(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return 10 * float((session.run(None, {"x": X})[0].argmax(1) == LABELS).mean())


def fails(outputs, labels):
    raise KeyError("boxes")


def nothing(outputs, labels):
    return float("nan")


NUMBER = 3
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, data and a module of metrics, as working directory."""
    proto = build(PLAIN)
    onnx.save(proto, tmp_path / "model.onnx")
    labels = Session(proto, "cpu").run({"x": X}, ["y"])[0].argmax(1)
    np.save(tmp_path / "held.npy", X[200:])
    np.save(tmp_path / "labels.npy", labels[200:])
    np.savez(
        tmp_path / "data.npz",
        **{"x": X[:200], "labels": labels[:200], "eval.x": X[200:], "eval.labels": labels[200:]},
    )
    (tmp_path / f"metrics_of_{tmp_path.name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _named(place: Path, function: str) -> str:
    return f"metrics_of_{place.name}:{function}"


@pytest.mark.parametrize("function", ["of_outputs", "of_model"])
def test_max_drop_is_in_units_of_the_metric(
    function: str, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = _named(place, function)
    settings = Settings.create(
        max_drop=0.8, metric=name, align=1, device="cpu", workers=1, force=True
    )
    with caplog.at_level(logging.WARNING, logger="onnx_oamip"):
        report = prune("model.onnx", "data.npz", "out.onnx", settings)
    expected = f"`max_drop` bounds the metric {name}, in its own units"
    assert expected in [record.getMessage() for record in caplog.records]
    assert expected in report.objective.notes
    metric = report.verification.metric
    assert metric is not None
    assert (metric.name, metric.before) == (name, 10.0)
    assert metric.lost <= 0.8
    outputs = Session(onnx.load("out.onnx"), "cpu").run({"x": X[200:]}, ["y"])[0]
    right = float((outputs.argmax(1) == np.load("labels.npy")).mean())
    assert metric.after == pytest.approx(10 * right)
    assert report.after.macs < report.before.macs
    assert all(t.measure in (None, name) for t in report.tried)
    lost = [t.lost for t in report.tried if t.lost is not None]
    assert min(lost) <= 0.8
    assert max(lost) > 0.8


def test_metric_reads_all_outputs_and_labels(place: Path) -> None:
    metric = load(_named(place, "of_outputs"))
    assert not metric.reads_model
    assert load(_named(place, "of_model")).reads_model
    outputs = {"y": np.eye(4, dtype=np.float32)}
    assert metric.of_outputs(outputs, np.asarray([0, 1, 2, 0])) == 7.5


@pytest.mark.parametrize(
    ("function", "words"), [("fails", "KeyError: 'boxes'"), ("nothing", "returned nan")]
)
def test_metric_without_a_number_is_refused(function: str, words: str, place: Path) -> None:
    with pytest.raises(DataError, match=words):
        load(_named(place, function)).of_outputs({}, None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{}", "expected module:function"),
        ("{}:", "expected module:function"),
        ("{}:NUMBER", "is int, no function"),
        ("{}:missing", "cannot be imported: AttributeError"),
        ("{}_more:of_outputs", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_name_of_no_function_is_refused(name: str, words: str, place: Path) -> None:
    with pytest.raises(SettingsError, match=words):
        load(name.format(f"metrics_of_{place.name}"))


def test_callable_without_a_signature_reads_outputs() -> None:
    assert not Metric("m:f", dict.fromkeys).reads_model


def test_metric_may_change_its_arguments() -> None:
    labels = np.arange(4)

    def metric(outputs: dict[str, np.ndarray], given: np.ndarray) -> float:
        given[:] = 0
        outputs.clear()
        return 1.0

    outputs = {"y": np.eye(4)}
    assert Metric("m:f", metric).of_outputs(outputs, labels) == 1
    assert labels.tolist() == [0, 1, 2, 3]
    assert list(outputs) == ["y"]
