"""Critical units: found without a budget and judged on held-out samples, also for a threshold of decoupled scores."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import build
from onnx import numpy_helper

from onnx_oamip.api import pipeline
from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.records import Array, Budget, Report, Scores
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph.runtime import Session
from onnx_oamip.planning import critical_search, critical_units
from onnx_oamip.planning.attempts import Prepared
from onnx_oamip.planning.critical_units import is_asked_for, is_possible, next_bound
from onnx_oamip.planning.drop_search import Drop
from onnx_oamip.planning.execution import Attempt
from onnx_oamip.verification.equivalence import Answers

UNITS, IMPORTANT = 12, 5
TEXT = f"""(float[batch,6] x) => (float[batch,4] scores)
<float[6,{UNITS}] w1, float[{UNITS}] b1, float[{UNITS},{UNITS}] w2, float[{UNITS}] b2, float[{UNITS},4] w3> {{
    a = Gemm(x, w1, b1)  r = Relu(a)  b = Gemm(r, w2, b2)  s = Relu(b)  scores = Gemm(s, w3)
}}"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A dense network whose outputs depend on the first ``IMPORTANT`` units of both layers and hardly on the others."""
    proto = build(TEXT)
    for tensor in proto.graph.initializer:
        value = numpy_helper.to_array(tensor).copy()
        if tensor.name in ("w2", "w3"):
            value[IMPORTANT:] *= 1e-4
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def _source(model: Path, count: int = 200) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    source: dict[str, Array] = {}
    for part in ("", "eval."):
        x = rng.standard_normal((count, 6)).astype(np.float32)
        source[f"{part}x"] = x
        source[f"{part}labels"] = Session(onnx.load(model), "cpu").run({"x": x})[0].argmax(1)
    return source


def _settings(**values: object) -> Settings:
    quick = {"importance": "oamip", "mode": "decoupled", "align": 1, "device": "cpu", "workers": 1}
    return Settings.create(**{**quick, "cache": "off", "force": True, **values})


def _prune(model: Path, **values: object) -> Report:
    return pipeline.prune(model, _source(model), None, _settings(**values))


@pytest.mark.parametrize("refit", ["least-squares", "none"])
def test_critical_units_keep_the_accuracy(model: Path, refit: str) -> None:
    """All that matters is kept, most of the rest is not, and the record has the trade."""
    report = _prune(model, refit=refit)
    important = np.tile(np.arange(UNITS) < IMPORTANT, 2)
    assert report.plan.keep.sum() <= important.sum() + 2
    lost = [
        m.lost for m in (*report.verification.outputs, *report.verification.outputs_before_refit)
    ]
    assert len(lost) == (2 if refit == "least-squares" else 1)
    assert max(lost) <= critical_units.POINTS
    record = report.plan.programs[-1]
    assert record["units"] == report.plan.keep.sum() >= record["least_units"] - 1e-9
    assert record["loss"] <= record["max_loss"]
    assert record["lambda"] > 0
    assert report.budget == Budget()
    (note,) = [n for n in report.plan.notes if n.startswith("critical units")]
    assert note.startswith(f"critical units: {record['units']} of {2 * UNITS} (w1 ")


@pytest.mark.parametrize("refit", ["least-squares", "none"])
def test_all_units_are_kept_where_every_plan_loses_accuracy(
    model: Path, refit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(ready: Prepared, original: Answers, found: Attempt) -> Drop:
        return Drop(3.0, "accuracy")

    monkeypatch.setattr(critical_search, "measured_drop", lose)
    report = _prune(model, refit=refit)
    assert report.plan.keep.all()
    (note,) = [n for n in report.plan.notes if n.startswith("critical units")]
    assert note.startswith(f"critical units: all {2 * UNITS}, as every plan")
    assert {m.lost for m in report.verification.outputs} == {0.0}


def test_threshold_of_decoupled_scores_finds_the_critical_units(model: Path) -> None:
    """Decoupled scores are losses of layers, which bound no loss of the network."""
    source = _source(model)
    plans = [
        pipeline.plan(model, source, None, _settings(**values)).plan
        for values in ({"threshold": 0.3}, {})
    ]
    assert not plans[0].keep.all()
    np.testing.assert_array_equal(plans[0].keep, plans[1].keep)


def test_threshold_of_joint_scores_is_that_of_the_keep_variables() -> None:
    settings = _settings(threshold=0.3)
    joint = Scores("oamip", np.zeros(1), ({"mode": "joint"},))
    decoupled = Scores("oamip", np.zeros(1), ({"group": "w1"},))
    assert is_asked_for(settings, decoupled)
    assert not is_asked_for(settings, joint)
    assert is_asked_for(_settings(), joint)


def test_other_budgets_and_methods_find_no_critical_units() -> None:
    assert is_possible(_settings())
    for values in (
        {"macs": 0.5},
        {"threshold": 0.1, "macs": 0.5},
        {"threshold": 2.0},
        {"max_loss": 0.1},
        {"importance": "obs"},
        {"allocate": "uniform"},
    ):
        assert not is_possible(_settings(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"iterations": 2}, "`iterations` approaches a counted budget"),
        ({"effort": "high"}, "`effort=high` chooses widths under a fixed budget"),
        ({"metric": "module:function"}, "`metric` is in units of its own"),
        ({"allocate": "uniform"}, "nothing says how much to keep"),
        ({"allocate": "global", "max_loss": 0.1}, "`max_loss` needs `allocate=mip`"),
    ],
)
def test_contradicting_settings_are_refused(
    model: Path, values: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        _prune(model, **values)


def test_max_loss_keeps_fewer_units_for_a_larger_loss(model: Path) -> None:
    units = []
    for most in (1e-6, 0.05, 0.5):
        report = _prune(model, max_loss=most, importance="obs")
        assert report.plan.programs[-1]["loss"] <= most
        units.append(int(report.plan.keep.sum()))
    assert units[0] > units[1] > units[2]


def test_large_loss_of_a_threshold_is_warned_of(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="onnx_oamip"):
        report = _prune(model, threshold=1e9, importance="l2", refit="none")
    assert report.verification.outputs[0].lost > pipeline.MAX_SILENT_DROP
    assert "give `max_drop` to bound the loss" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="onnx_oamip"):
        _prune(model, macs=0.1, threshold=1e9, importance="l2", refit="none")
    assert "give `max_drop`" not in caplog.text


def test_bounds_are_bracketed_and_halved_geometrically() -> None:
    inf = float("inf")
    first = next_bound(0.0, inf)
    assert next_bound(first, inf) == critical_units.FACTOR * first
    assert next_bound(0.0, first) == first / critical_units.FACTOR
    assert next_bound(0.01, 0.04) == pytest.approx(0.02)


def test_max_drop_finds_a_plan_below_the_largest_loss(model: Path) -> None:
    """The fewest units within the largest loss lose more than the drop; plans of smaller losses do not."""
    kept = {"importance": "obs", "refit": "none"}
    alone = _prune(model, max_loss=0.5, **kept)
    assert max(m.lost for m in alone.verification.outputs) > 1
    both = _prune(model, max_loss=0.5, max_drop=1.0, **kept)
    assert max(m.lost for m in both.verification.outputs) <= 1
    assert not both.plan.keep.all()
    assert both.plan.programs[-1]["loss"] <= 0.5
    drop = _prune(model, max_drop=1.0, **kept)
    assert both.after.macs == drop.after.macs
    tight = _prune(model, max_loss=1e-5, max_drop=1.0, **kept)
    assert tight.plan.programs[-1]["loss"] <= 1e-5
    assert tight.after.macs > both.after.macs
