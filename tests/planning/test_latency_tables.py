"""Latency tables of other devices: read in every form, and plans that follow them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import build, load

import onnx_oamip
from onnx_oamip import BudgetNotMet, DataError
from onnx_oamip.api import profiling, proof
from onnx_oamip.cli import main
from onnx_oamip.core.records import Coupling, Model
from onnx_oamip.graph.cost import full_widths, ledger
from onnx_oamip.graph.coupling import couple
from onnx_oamip.planning import latency_search, latency_tables
from onnx_oamip.planning.latency_model import Measurement
from onnx_oamip.verification.latency import Ratio, Step

TEXT = """(float[N,1,6,6] image) => (float[N,3] scores)
<float[16,1,3,3] w1, float[16] b1, float[24,16,3,3] w2, float[3,24] w3> {
    [first] a = Conv(image, w1, b1)
    h = Relu(a)
    [second] b = Conv(h, w2)
    r = Relu(b)
    g = GlobalAveragePool(r)
    f = Flatten(g)
    [last] scores = Gemm<transB = 1>(f, w3)
}"""
FULL = {"w1": 16, "w2": 24}
OPTIONS: dict[str, Any] = {
    "importance": "activation",
    "refit": "bias",
    "device": "cpu",
    "cache": "off",
    "align": 1,
    "task": "values",
}


@pytest.fixture
def proto() -> onnx.ModelProto:
    return build(TEXT)


@pytest.fixture
def model(proto: onnx.ModelProto, tmp_path: Path) -> Model:
    return load(proto, tmp_path)


@pytest.fixture
def coupling(model: Model) -> Coupling:
    return couple(model)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[object], str]:
    def call(content: object) -> str:
        path = tmp_path / "table"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return call


def table(*runs: tuple[dict[str, int], float, dict[str, float]], step: int = 4) -> dict[str, Any]:
    return {
        "kind": "onnx-oamip latency table",
        "schema_version": 1,
        "device": "elsewhere",
        "step": step,
        "runs": [{"widths": w, "milliseconds": t, "nodes": n} for w, t, n in runs],
    }


def test_written_table_gives_the_fitted_model_back(
    model: Model, coupling: Coupling, write: Callable[[object], str]
) -> None:
    widths = np.asarray([[16, 24], [8, 12], [4, 24], [16, 6]])
    nodes = np.asarray([[4, 8, 0.2], [2, 2.4, 0.1], [1, 2.2, 0.2], [4, 2.1, 0.05]]) * 1e-3
    measured = Measurement(widths, nodes.sum(axis=1) * 1.1, nodes)
    text = latency_tables.dumps(
        model, coupling, measured, device="cpu", step=16, threads=None, batch=1
    )
    path = write(text)
    found = latency_tables.load(path, model, coupling)
    assert found.by_node
    assert np.allclose(found.measured, measured.walls)
    assert latency_tables.step(path) == 16
    assert latency_tables.predicted(path, model, coupling, full_widths(coupling)) == 1


CSV = "operator,shapes,milliseconds\nConv,1x1x6x6;16x1x3x3,1\nConv,1x16x4x4;24x16x3x3,6\nRelu,1x16x4x4,2\n"
FOREIGN = {
    "csv by shapes": CSV,
    "csv by names": "name;milliseconds\nfirst;1\nsecond;6\nother;2\n",
    "trtexec": [
        {"count": 10},
        {"name": "first + Relu_1", "timeMs": 10, "averageMs": 1},
        {"name": "second", "averageMs": 6},
        {"name": "copy", "averageMs": 2},
    ],
    "benchmark_app": "layerName;execStatus;layerType;execType;realTime (ms);cpuTime (ms)\n"
    "first;EXECUTED;Convolution;jit;1;1\nsecond;EXECUTED;Convolution;jit;6;6\nr;EXECUTED;Relu;jit;2;2\n",
}


@pytest.mark.parametrize("form", FOREIGN)
def test_foreign_table_is_proportional_to_the_work_of_every_node(
    form: str, model: Model, coupling: Coupling, write: Callable[[object], str]
) -> None:
    path = write(FOREIGN[form])
    found = latency_tables.load(path, model, coupling)
    costs = ledger(model, coupling)
    assert found.seconds(costs.lengths(full_widths(coupling))) == pytest.approx(9e-3)
    half = found.seconds(costs.lengths(np.asarray([8, 24])))
    # Half of the first convolution, half of the second, and what goes with the activations.
    assert 3.5e-3 < half < 3.5e-3 + 2e-3
    assert latency_tables.step(path) == latency_tables.UNKNOWN_STEP


def test_profile_of_onnx_runtime_is_read(
    model: Model, coupling: Coupling, write: Callable[[object], str]
) -> None:
    run = [
        {"cat": "Node", "name": "first_kernel_time", "dur": 1000, "args": {"op_name": "Conv"}},
        {"cat": "Node", "name": "second_kernel_time", "dur": 6000, "args": {"op_name": "Conv"}},
        {"cat": "Session", "name": "model_run", "dur": 7000},
    ]
    found = latency_tables.load(write(run * 8), model, coupling)
    assert found.measured[0] == pytest.approx(7e-3)


SLOW_FIRST = table((FULL, 10.0, {"first": 9.0, "second": 0.5, "last": 0.01}))
SLOW_LAST = table((FULL, 10.0, {"first": 0.01, "second": 0.01, "last": 9.5}))


def test_plan_follows_the_device_of_the_table(
    proto: onnx.ModelProto, write: Callable[[object], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        latency_search, "profile", lambda *_, **__: pytest.fail("it was timed here")
    )
    images = np.random.default_rng(0).standard_normal((40, 1, 6, 6)).astype(np.float32)
    kept = {}
    for name, content in (("first", SLOW_FIRST), ("last", SLOW_LAST)):
        planned = onnx_oamip.plan(
            proto, images, latency=0.5, latency_table=write(content), **OPTIONS
        )
        kept[name] = planned.plan.widths.tolist()
    assert kept["first"][0] <= 9
    assert kept["first"][1] > 12
    assert kept["last"][1] <= 12
    assert kept["last"][0] > 9


def test_slower_result_here_is_no_failure_for_another_device(
    proto: onnx.ModelProto, write: Callable[[object], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Ratio(1.5, 1.4, 1.6, 9, added=2e-4)
    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: slow)
    images = np.random.default_rng(0).standard_normal((40, 1, 6, 6)).astype(np.float32)
    path = write(SLOW_FIRST)
    result = onnx_oamip.prune(proto, images, latency=0.5, latency_table=path, **OPTIONS)
    assert any(note.startswith(f"by {path}, one sample takes 0.") for note in result.report.notes)


def test_step_of_the_table_aligns_the_widths(
    proto: onnx.ModelProto, write: Callable[[object], str]
) -> None:
    images = np.random.default_rng(0).standard_normal((40, 1, 6, 6)).astype(np.float32)
    path = write(SLOW_FIRST)
    options = {**OPTIONS, "align": "auto"}
    planned = onnx_oamip.plan(proto, images, latency=0.6, latency_table=path, **options)
    assert planned.settings["steps"] == [4]


def test_time_that_does_not_depend_on_widths_can_exceed_the_budget(
    model: Model, coupling: Coupling, write: Callable[[object], str]
) -> None:
    nodes = {"first": 0.1, "second": 0.1, "last": 0.1}
    runs = [
        (FULL, 10.0, nodes),
        ({"w1": 4, "w2": 4}, 9.9, {"first": 0.05, "second": 0.01, "last": 0.1}),
    ]
    row = latency_tables.limit(write(table(*runs)), model, coupling, 0.3)
    with pytest.raises(BudgetNotMet, match="does not depend on widths"):
        latency_tables.refuse_constant("table", row, 0.3)
    latency_tables.refuse_constant("table", replace(row, constant=0.0), 0.3)


WRONG = {
    "nothing": ("", "no row with a time"),
    "another object": ({"kind": "plan"}, "an object of another kind"),
    "no runs": ({**table(), "runs": []}, "runs"),
    "text": ("hello", "no row with a time"),
    "another model": (table(({"w9": 4}, 1.0, {})), "has 4 units in the group 'w9'"),
    "no known node": ("name,milliseconds\nx,1\n", "no row for a convolution"),
    "a word for a time": ("name,milliseconds\nfirst,soon\n", "soon"),
    "a time that is not finite": (table((FULL, float("inf"), {})), "milliseconds"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_table_is_refused_in_one_sentence(
    mistake: str, model: Model, coupling: Coupling, write: Callable[[object], str]
) -> None:
    content, message = WRONG[mistake]
    with pytest.raises(DataError, match=message) as error:
        latency_tables.load(write(content), model, coupling)
    assert "\n" not in str(error.value)


def test_missing_table_is_refused_before_any_work(
    proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnx_oamip.graph.loading.load", lambda *_, **__: pytest.fail("work"))
    with pytest.raises(DataError, match="no such latency table"):
        onnx_oamip.plan(proto, None, macs=0.5, latency_table="no.json", **OPTIONS)


def test_profile_command_writes_a_table_that_prune_reads(
    proto: onnx.ModelProto,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(profiling, "find_step", lambda _: Step(4, True, "known"))
    onnx.save(proto, tmp_path / "m.onnx")
    path = str(tmp_path / "t.json")
    arguments = ["profile", str(tmp_path / "m.onnx"), "-o", path, "--seconds", "0.05"]
    assert main([*arguments, "--device", "cpu", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["levels"][0]["milliseconds"] > 0
    model = load(proto, tmp_path)
    found = latency_tables.load(path, model, couple(model))
    assert len(found.measured) == len(document["levels"])
    assert main([*arguments, "--device", "cpu"]) == 0
    assert "all units" in capfd.readouterr().out
