"""The benchmarks' own arithmetic: bisection to a budget, the summary of rivals, fitted exponents, tables midway."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from onnx_oamip.errors import EnvironmentMissing
from onnx_oamip.records import Moments
from onnx_oamip.runtime import Session
from tools.bench import calibration, cost, cuda, rivals, rivals_figure, studies


@pytest.mark.parametrize("target", [0.8, 0.5, 0.15])
@pytest.mark.parametrize("steps", [1000, 16])
def test_bisection_comes_close_and_never_above(target: float, steps: int) -> None:
    asked = []

    @cache
    def share(ratio: float) -> float:
        asked.append(ratio)
        return float(1 - np.floor(ratio * steps) / steps) ** 2

    found = rivals.bisect(share, target)
    assert found is not None
    assert share(found) <= target
    # One step of the tool wider is above the target, or what was found is near enough.
    assert target - share(found) <= rivals.NEAR or share(max(found - 1 / steps, 0.0)) > target
    assert len(asked) <= len(rivals.HIGHEST) + rivals.TRIES + 1


def test_bisection_says_where_a_budget_is_out_of_reach() -> None:
    assert rivals.bisect(lambda ratio: 1 - 0.2 * ratio, 0.5) is None
    assert rivals.bisect(lambda _: float("nan"), 0.5) is None


def test_bisection_passes_over_ratios_at_which_a_tool_breaks() -> None:
    found = rivals.bisect(lambda ratio: float("nan") if ratio > 0.85 else 1 - ratio, 0.3)
    assert found is not None
    assert 0.7 <= found <= 0.8


def rows(model: str, accuracy: dict[str, float | tuple[float, ...] | None]) -> list[studies.Row]:
    """Rows of one model at half the MACs, 90 % before; a tuple: one row a seed; None: not reached."""
    found = []
    for method, values in accuracy.items():
        for seed, value in enumerate(values if isinstance(values, tuple) else (values,)):
            row = {"model": model, "MACs asked": 0.5, "method": method, "seed": seed, "before": 90.0}
            found.append(row if value is None else {**row, "accuracy": value, "MACs kept": 0.5})
    return found


def test_summary_is_against_the_best_rival_and_averages_points() -> None:
    made = rows("a", {"ours": (88.0, 90.0), "random": 20.0, "onnxsim L2": 80.0, "Torch-Pruning L2": 86.0})
    made += rows("b", {"ours": 87.0, "random": 10.0, "onnxsim L2": 84.0, "Torch-Pruning L2": None})
    first, second, mean = rivals.summary(made)
    assert (first["lost by ours"], first["lost by best rival"], first["ratio"]) == (1.0, 4.0, 0.25)
    assert first["best rival"] == "Torch-Pruning L2"
    assert (second["lost by best rival"], second["ratio"], second["best rival"]) == (6.0, 0.5, "onnxsim L2")
    assert (mean["lost by ours"], mean["lost by best rival"], mean["ratio"]) == (2.0, 5.0, 0.4)


def test_best_shows_what_was_not_reached_and_who_is_ahead() -> None:
    made = rows("a", {"ours": 80.0, "random": None, "onnxsim L2": 81.5, "onnxsim Wanda": 81.0})
    (row,) = rivals.best(made)
    assert row["random"] is None
    assert row["Torch-Pruning"] is None
    assert (row["best rival"], row["ours ahead by"]) == ("onnxsim L2", -1.5)


def test_no_ratio_to_a_rival_that_loses_nothing() -> None:
    (row, _) = rivals.summary(rows("a", {"ours": 89.0, "onnxsim L2": 90.0}))
    assert row["ratio"] is None


def test_exponents_of_made_data() -> None:
    sizes = (8, 16, 32)
    still = {"varied": "width", "calibrate": 0.0, "peak MiB added": 7}
    made = [{**still, "width": s, "seconds": 3 * s**2.5} for s in sizes]
    (found,) = cost.exponents(made)
    assert found["seconds"] == 2.5
    assert found["peak MiB added"] == 0.0
    assert found["calibrate"] is None


def test_exponents_leave_the_start_up_out() -> None:
    """Seconds that are a constant plus a power; small sizes, which other work dominates, do not count."""
    made = [{"varied": "depth", "depth": s, "seconds": 2.0 + 0.1 * s**1.5 + (s < 8)} for s in (2, 4, 8, 16)]
    (plain,) = cost.exponents(made)
    (found,) = cost.exponents(made, {"seconds": 2.0})
    assert plain["seconds"] is not None
    assert plain["seconds"] < 1.3
    assert found["seconds"] == 1.5


def test_cost_counts_in_plain_passes() -> None:
    row = cost._measured({"width": 4, "depth": 2, "samples": 40, "resolution": 4}, 0)
    assert row["passes"] > 1
    assert set(cost.COLUMNS) - set(row) == {"varied"}


def test_the_gpu_study_measures_the_cpu_against_itself(tmp_path: Path) -> None:
    cost.stack(tmp_path / "stack.onnx", 6, 3, 8, np.random.default_rng(0))
    np.savez(tmp_path / "noise.npz", x=np.random.default_rng(1).standard_normal((40, 3, 8, 8), np.float32))
    row = cuda.measured(tmp_path / "stack.onnx", tmp_path / "noise.npz", "cpu")
    assert set(cuda.COLUMNS) - set(row) == {"model"}
    assert (row["samples"], row["apart"], row["copies %"]) == (40, 0.0, 0.0)
    assert row["CPU s"] == row["GPU s"] > 0
    assert 0 <= row["transfers %"] <= 100


def test_moments_are_compared_by_their_scale() -> None:
    one = {("x", 1): Moments(np.asarray([0.0, 1.0]), np.asarray([4.0, 100.0]), 8)}
    other = {("x", 1): Moments(np.asarray([0.5, 1.0]), np.asarray([4.0, 101.0]), 8)}
    assert cuda.apart(one, one) == 0
    assert cuda.apart(one, other) == pytest.approx(0.05)
    assert cuda.apart(one, {}) == np.inf


def test_copies_are_told_from_other_kernels() -> None:
    def node(op: str, micros: int, name: str = "n_kernel_time") -> dict[str, object]:
        return {"cat": "Node", "name": name, "dur": micros, "args": {"op_name": op}}

    events = [node("Conv", 60), node("MemcpyToHost", 30), node("MemcpyFromHost", 10), node("Conv", 9, "n_fence_before")]
    assert cuda.copied([*events, {"cat": "Session", "name": "model_run", "dur": 500}]) == (40.0, 100.0)
    assert cuda.copied([]) == (0.0, 0.0)


def test_the_gpu_study_says_where_it_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(_: str) -> str:
        raise EnvironmentMissing("there is no GPU.")

    monkeypatch.setattr(cuda, "resolve_device", missing)
    assert cuda.run(tmp_path / "out", 0) == ""
    assert capsys.readouterr().out == "cuda: left out; there is no GPU.\n"
    assert not (tmp_path / "out").exists()


def test_stack_is_the_network_that_was_asked_for(tmp_path: Path) -> None:
    cost.stack(tmp_path / "stack.onnx", 6, 3, 8, np.random.default_rng(0))
    x = np.zeros((2, 3, 8, 8), np.float32)
    assert Session(tmp_path / "stack.onnx", "cpu").run({"x": x})[0].shape == (2, 10)


def test_calibration_counts_are_nested_and_noise_is_noise() -> None:
    with np.load(studies.paths("lenet5-mnist")[1]) as held:
        own = held["input"]
    found = list(calibration.kinds("mnist", own, {"mnist": None, "fashion-mnist": None}, seed=0))
    counts = [len(images) for kind, images in found if kind == "own domain"]
    assert counts == [16, 64, 256, 512]
    assert all(np.array_equal(found[i][1], found[i + 1][1][: counts[i]]) for i in range(3))
    assert found[-1][0] == "uniform noise"
    assert abs(found[-1][1].mean() - 127.5) < 1


def test_curves_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    made = rows("a", {"ours": 88.0, "random": 20.0, "onnxsim L2": 80.0, "Torch-Pruning L2": 86.0})
    for name in ("one.svg", "two.svg"):
        rivals_figure.draw(made, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_rows_are_stored_before_a_study_is_done(tmp_path: Path) -> None:
    studies.store(tmp_path, "made", [{"a": 1}], ("a",), 3)
    record = json.loads((tmp_path / "made.json").read_text())
    assert (record["rows"], record["columns"], record["seed"]) == ([{"a": 1}], ["a"], 3)
