"""The benchmarks' own arithmetic: bisection, rivals, speed-ups, exponents, two runs compared; and their driver."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from graphs import MLP, build, load, samples

from onnx_oamip.api import pipeline, prepare
from onnx_oamip.core.errors import EnvironmentMissing
from onnx_oamip.core.records import Moments
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph.runtime import Session
from onnx_oamip.importance.oamip import decoupled
from onnx_oamip.planning import allocation, search
from onnx_oamip.verification.latency import DEFAULT_STEP
from tools.bench import (
    agree,
    calibration,
    cost,
    critical,
    cuda,
    determinism,
    driver,
    effort,
    gaps,
    latency,
    latency_figure,
    mechanisms,
    mutants,
    picture,
    resume,
    rivals,
    rivals_figure,
    studies,
)


@pytest.mark.parametrize("target", [0.8, 0.5, 0.15])
@pytest.mark.parametrize("steps", [1000, 16])
def test_bisection_approaches_the_budget_from_below(target: float, steps: int) -> None:
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


def test_bisection_reports_unreachable_budgets() -> None:
    assert rivals.bisect(lambda ratio: 1 - 0.2 * ratio, 0.5) is None
    assert rivals.bisect(lambda _: float("nan"), 0.5) is None


def test_bisection_skips_ratios_at_which_a_tool_fails() -> None:
    found = rivals.bisect(lambda ratio: float("nan") if ratio > 0.85 else 1 - ratio, 0.3)
    assert found is not None
    assert 0.7 <= found <= 0.8


IMAGES = 2000


def rows(
    model: str, accuracy: dict[str, float | tuple[float, ...] | None], budget: float = 0.5
) -> list[studies.Row]:
    """Rows of one model, 90 % before; the first images are right. A tuple: one row a seed; None: not reached."""
    found = []
    for method, values in accuracy.items():
        for seed, value in enumerate(values if isinstance(values, tuple) else (values,)):
            row = {
                "model": model,
                "MACs asked": budget,
                "method": method,
                "seed": seed,
                "before": 90.0,
            }
            if value is not None:
                right = np.arange(IMAGES) < round(value * IMAGES / 100)
                row |= {
                    "accuracy": value,
                    "MACs kept": budget,
                    "images": IMAGES,
                    "right": rivals.packed(right),
                }
            found.append(row)
    return found


def test_summary_compares_with_the_best_rival_and_averages_points() -> None:
    made = rows(
        "a", {"ours": (88.0, 90.0), "random": 20.0, "onnxsim L2": 80.0, "Torch-Pruning L2": 86.0}
    )
    made += rows("b", {"ours": 87.0, "random": 10.0, "onnxsim L2": 84.0, "Torch-Pruning L2": None})
    first, second, mean = rivals.summary(made)
    assert (first["lost by ours"], first["lost by best rival"], first["ratio"]) == (1.0, 4.0, 0.25)
    assert first["best rival"] == "Torch-Pruning L2"
    assert (second["lost by best rival"], second["ratio"], second["best rival"]) == (
        6.0,
        0.5,
        "onnxsim L2",
    )
    assert (mean["lost by ours"], mean["lost by best rival"], mean["ratio"]) == (2.0, 5.0, 0.4)


def test_best_row_omits_unreached_methods_and_names_the_leader() -> None:
    made = rows("a", {"ours": 80.0, "random": None, "onnxsim L2": 81.5, "onnxsim Wanda": 81.0})
    (row,) = rivals.best(made)
    assert "random" not in row
    assert "Torch-Pruning" not in row
    assert (row["best rival"], row["ours ahead by"]) == ("onnxsim L2", -1.5)


def test_best_has_the_range_over_seeds_and_a_paired_error() -> None:
    made = rows("a", {"ours": (88.0, 90.0), "ours (l2)": 99.0, "onnxsim L2": 86.0})
    (row,) = rivals.best(made)
    assert (row["lowest"], row["ours"], row["highest"], row["ours MACs"]) == (88.0, 89.0, 90.0, 0.5)
    assert row["best rival"] == "onnxsim L2"  # another importance of ours is none
    # Of 2,000 images 40 are right by both seeds and not by the rival, 40 by one seed.
    apart = np.repeat([1.0, 0.5, 0.0], [40, 40, 1920])
    assert row["standard error"] == pytest.approx(
        100 * apart.std(ddof=1) / np.sqrt(IMAGES), abs=5e-3
    )
    assert (row["only ours right"], row["only rival right"]) == (40, 0)


def test_packed_correct_images_are_restored() -> None:
    right = np.random.default_rng(0).random(2001) < 0.7
    assert (rivals.unpacked({"images": 2001, "right": rivals.packed(right)}) == right).all()


def test_stopped_study_measures_only_incomplete_methods(tmp_path: Path) -> None:
    measured: list[tuple[str, int]] = []

    def rows(method: str, count: int) -> Iterator[studies.Row]:
        for i in range(count):
            measured.append((method, i))
            yield {"method": method, "value": i}

    columns = ("method", "value")
    stopped = studies.Resumable(tmp_path, "study", columns, seed=0)
    stopped.measure({"method": "a"}, 2, rows("a", 2))
    stopped.measure({"method": "b"}, 2, rows("b", 1))
    measured.clear()
    continued = studies.Resumable(tmp_path, "study", columns, seed=0)
    continued.measure({"method": "a"}, 2, rows("a", 2))
    continued.measure({"method": "b"}, 2, rows("b", 2))
    assert measured == [("b", 0), ("b", 1)]
    stored = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    assert [tuple(row.values()) for row in stored["rows"]] == [
        ("a", 0),
        ("a", 1),
        ("b", 0),
        ("b", 1),
    ]
    assert stored["environment"] == studies.environment()


@pytest.mark.parametrize(("rival", "noise"), [(88.1, True), (90.0, False)])
def test_remarks_name_leading_rivals_and_their_significance(rival: float, noise: bool) -> None:
    made = [
        *rows("a", {"ours": 88.0, "onnxsim L2": rival}),
        *rows("b", {"ours": 88.0, "onnxsim L2": 80.0}),
    ]
    found = rivals.best(made)
    first, second = rivals.remarks(found)
    assert "in 1 of 2 rows" in first
    assert second.startswith(
        f"a at 50% of the MACs: onnxsim L2 is ahead by {rival - 88:.2f} points"
    )
    assert f"{round((rival - 88) * 20)} are right by it alone and 0 by ours alone" in second
    assert ("within the noise" in second) == noise


def test_importances_use_the_first_seed() -> None:
    made = rows(
        "a",
        {
            "ours": (88.0, 80.0),
            "ours (l2)": 70.0,
            "ours (mint)": None,
            "random": 1.0,
            "onnxsim L2": 2.0,
        },
    )
    (row,) = rivals.importances(made)
    assert row == {
        "model": "a",
        "MACs asked": 0.5,
        "before": 90.0,
        "obs": 88.0,
        "l2": 70.0,
        "mint": None,
    }


def test_models_run_separately_are_summarised_together(tmp_path: Path) -> None:
    for name, version in (("lenet300-mnist", "1"), ("lenet5-mnist", "2")):
        made = rows(name, {"ours": (88.0, 89.0), "ours (l2)": 70.0, "onnxsim L2": 80.0})
        environment = {"machine": "made", "torch": version}
        studies.store(tmp_path, f"rivals-rows-{name}", made, rivals.ROWS, 0, measured=environment)
    rivals.conclude(tmp_path, 0)
    record = json.loads((tmp_path / "rivals.json").read_text())
    assert [row["model"] for row in record["rows"]] == ["lenet300-mnist", "lenet5-mnist"]
    assert record["environment"] == {"machine": "made", "torch": "1 and 2"}
    assert {p.suffix for p in tmp_path.iterdir()} == {".json"}


def test_seed_shuffles_images_with_their_labels(tmp_path: Path) -> None:
    bench = rivals.Bench("lenet300-mnist")
    assert bench.shuffled(0, tmp_path) == bench.data
    with np.load(bench.data) as before, np.load(bench.shuffled(3, tmp_path)) as after:
        assert not np.array_equal(before["input"], after["input"])
        pairs = [
            {
                image.tobytes() + bytes([label])
                for image, label in zip(held["input"], held["labels"], strict=True)
            }
            for held in (before, after)
        ]
        assert pairs[0] == pairs[1]
        assert np.array_equal(before["eval.input"], after["eval.input"])


def test_ratio_to_a_rival_without_loss_is_left_out() -> None:
    (row, _) = rivals.summary(rows("a", {"ours": 89.0, "onnxsim L2": 90.0}))
    assert row["ratio"] is None


def test_exponents_of_synthetic_data_are_recovered() -> None:
    sizes = (8, 16, 32)
    still = {"varied": "width", "calibrate": 0.0, "peak MiB added": 7}
    made = [{**still, "width": s, "seconds": 3 * s**2.5} for s in sizes]
    (found,) = cost.exponents(made)
    assert found["seconds"] == 2.5
    assert found["peak MiB added"] == 0.0
    assert found["calibrate"] is None


def test_exponents_exclude_the_constant_time() -> None:
    """Seconds that are a constant plus a power; small sizes, which other work dominates, do not count."""
    made = [
        {"varied": "depth", "depth": s, "seconds": 2.0 + 0.1 * s**1.5 + (s < 8)}
        for s in (2, 4, 8, 16)
    ]
    (plain,) = cost.exponents(made)
    (found,) = cost.exponents(made, {"seconds": 2.0})
    assert plain["seconds"] is not None
    assert plain["seconds"] < 1.3
    assert found["seconds"] == 1.5


def test_cost_study_is_left_out_with_named_models(tmp_path: Path) -> None:
    """With --model NAME every study runs, and this one is left out."""
    assert cost.run(tmp_path, 0, ("lenet5-mnist",)) == ""
    assert not list(tmp_path.iterdir())


def test_cost_is_counted_in_forward_passes() -> None:
    row = cost._measured({"width": 4, "depth": 2, "samples": 40, "resolution": 4}, 0)
    assert row["passes"] > 1
    assert set(cost.COLUMNS) - set(row) == {"varied"}


def test_gpu_study_can_compare_the_cpu_with_itself(tmp_path: Path) -> None:
    cost.stack(tmp_path / "stack.onnx", 6, 3, 8, np.random.default_rng(0))
    np.savez(
        tmp_path / "noise.npz",
        x=np.random.default_rng(1).standard_normal((40, 3, 8, 8), np.float32),
    )
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


def test_copy_kernels_are_distinguished_from_others() -> None:
    def node(op: str, micros: int, name: str = "n_kernel_time") -> dict[str, object]:
        return {"cat": "Node", "name": name, "dur": micros, "args": {"op_name": op}}

    events = [
        node("Conv", 60),
        node("MemcpyToHost", 30),
        node("MemcpyFromHost", 10),
        node("Conv", 9, "n_fence_before"),
    ]
    assert cuda.copied([*events, {"cat": "Session", "name": "model_run", "dur": 500}]) == (
        40.0,
        100.0,
    )
    assert cuda.copied([]) == (0.0, 0.0)


def test_gpu_study_reports_a_missing_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(_: str) -> str:
        raise EnvironmentMissing("there is no GPU.")

    monkeypatch.setattr(cuda, "resolve_device", missing)
    assert cuda.run(tmp_path / "out", 0) == ""
    assert capsys.readouterr().out == "cuda: left out; there is no GPU.\n"
    assert not (tmp_path / "out").exists()


def test_stack_has_the_requested_size(tmp_path: Path) -> None:
    cost.stack(tmp_path / "stack.onnx", 6, 3, 8, np.random.default_rng(0))
    x = np.zeros((2, 3, 8, 8), np.float32)
    assert Session(tmp_path / "stack.onnx", "cpu").run({"x": x})[0].shape == (2, 10)


def test_calibration_subsets_are_nested_and_noise_is_random() -> None:
    with np.load(studies.paths("lenet5-mnist")[1]) as held:
        own = held["input"]
    found = list(calibration.kinds("mnist", own, {"mnist": None, "fashion-mnist": None}, seed=0))
    counts = [len(images) for kind, images in found if kind == "own domain"]
    assert counts == [16, 64, 256, 512]
    assert all(np.array_equal(found[i][1], found[i + 1][1][: counts[i]]) for i in range(3))
    assert found[-1][0] == "uniform noise"
    assert abs(found[-1][1].mean() - 127.5) < 1


def test_curves_are_reproducible(tmp_path: Path) -> None:
    accuracy = {"ours": (88.0, 89.0), "random": 20.0, "onnxsim L2": 80.0, "Torch-Pruning L2": 86.0}
    made = rivals.best(
        [*rows("a", accuracy, 0.8), *rows("a", accuracy), *rows("b", {"ours": 70.0})]
    )
    timed = [speedups("a", batch, budget) for batch in (1, 32) for budget in (0.5, 0.25)]
    for name in ("one", "two"):
        rivals_figure.draw(made, tmp_path / name / "r.svg")
        latency_figure.draw(timed, tmp_path / name / "l.svg")
        picture.write(made, tmp_path / name / "p.svg")
    for file, drawn in {"r.svg": made, "l.svg": timed, "p.svg": made}.items():
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
        assert studies.digest(drawn) in (tmp_path / "one" / file).read_text()


def speedups(model: str, batch: int, budget: float, **more: float) -> studies.Row:
    row: studies.Row = {
        "model": model,
        "device": "cpu",
        "threads": 1,
        "batch": batch,
        "MACs asked": budget,
    }
    row |= {
        "ideal": 1 / budget,
        "ideal, align 1": 1 / budget,
        "predicted": 1.5,
        "ours": 1.6,
        "align 1": 1.2,
        **more,
    }
    return row | {f"{m}, {end}": row[m] for m in ("ours", "align 1") for end in ("low", "high")}


def test_means_cover_networks_pruned_by_every_method() -> None:
    theirs = {"onnxsim": 3.0, "ideal, onnxsim": 2.0}
    made = [
        speedups("a", 1, 0.5, ours=1.0, **theirs),
        speedups("b", 1, 0.5, ours=4.0, **theirs),
        speedups("c", 1, 0.5),
    ]
    still = [{"before": 90.0, "ours": 89.0, "align 1": 89.5, "onnxsim": x} for x in (80.0, 60.0)]
    known = [
        {"model": model, "MACs asked": 0.5, **row} for model, row in zip("ab", still, strict=True)
    ]
    (row,) = latency.means(made, known)
    assert (row["threads"], row["batch"], row["networks"]) == (1, 1, 2)
    assert (row["ours"], row["ideal"], row["onnxsim"]) == (2.0, 2.0, 3.0)
    assert (row["lost, ours"], row["lost, align 1"], row["lost, onnxsim"]) == (1.0, 0.5, 20.0)


def test_speedups_are_ratios_to_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = rivals.Bench("lenet300-mnist")
    settings = Settings.create(
        macs=0.5, importance="l2", allocate="uniform", refit="none", align=1, cache="off"
    )
    made = latency._Made(prepare.prepare(bench.model, bench.data, settings))
    found = search.search(made.ready)
    made.protos["ours", 0.5], made.widths["ours", 0.5] = found.pruned.proto, found.plan.widths
    times = np.array([[4.0, 2.0], [8.0, 4.0], [4.0, 1.0], [4.0, 4.0], [6.0, 3.0]])
    monkeypatch.setattr(latency, "interleave", lambda *_, **__: ([], times))
    monkeypatch.setattr(latency, "PROFILE_SECONDS", 0.01)
    half, quarter = latency._timed(bench, made, "cpu", 1, 32, seed=0)
    assert (half["ours"], half["ours, low"], half["ours, high"]) == (2.0, 1.0, 4.0)
    assert half["ideal"] == pytest.approx(1 / bench.share(found.pruned.proto), abs=1e-3)
    assert half["predicted"] >= 1
    assert "onnxsim" not in half
    assert "ours" not in quarter
    assert set(half) <= {*latency.COLUMNS, *latency.CLOCKED}


def test_slow_models_are_listed_with_their_inserted_nodes() -> None:
    made = [speedups("a", 1, 0.5, ours=0.8), speedups("a", 32, 0.5), speedups("b", 1, 0.5)]
    (line,) = latency.remarks(
        made, [{"model": "a", "MACs asked": 0.5, "nodes added": "9 Pad, 18 Gather"}]
    )
    assert line.startswith(
        "a at 50% of the MACs is slower than the original (cpu, threads 1, batch 1: 0.80 times"
    )
    assert "9 Pad, 18 Gather" in line


def test_accuracy_studies_use_no_measured_step(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = allocation.find_step
    with studies.known_step():
        assert allocation.find_step("cpu").value == DEFAULT_STEP["cpu"]
    assert allocation.find_step is measured
    with studies.known_step(False):
        assert allocation.find_step is measured


def test_rows_are_stored_while_a_study_runs(tmp_path: Path) -> None:
    studies.store(tmp_path, "made", [{"a": 1}], ("a",), 3)
    record = json.loads((tmp_path / "made.json").read_text())
    assert (record["rows"], record["columns"], record["seed"]) == ([{"a": 1}], ["a"], 3)


def records(tmp_path: Path, *others: dict[str, object]) -> list[str]:
    """Folders, each with the study ``made`` of one row more; ``others``: what is different in the second one."""
    for name in ("first", "second"):
        made: list[studies.Row] = [
            {"model": "a", "accuracy": 98.45, "seconds": 1.0},
            {"model": "b", "accuracy": 90.0},
        ]
        for row, change in zip(made, others if name == "second" else (), strict=False):
            row.update(change)
        studies.store(tmp_path / name, "made", made, ("model", "accuracy"), 0, ("seconds",))
    return [str(tmp_path / name) for name in ("first", "second")]


def test_comparison_of_two_runs_ignores_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert agree.main(records(tmp_path, {"seconds": 2.0})) == 0
    assert capsys.readouterr().out == "made: 2 rows agree (not compared: seconds)\n"


def test_comparison_detects_a_differing_last_digit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert agree.main(records(tmp_path, {}, {"accuracy": 90.05})) == 1
    reported = capsys.readouterr().out
    assert "made: 1 of 2 rows differ" in reported
    assert "row 2 (b, 90.0): accuracy is 90.0 and 90.05" in reported


def test_comparison_reports_missing_rows_and_studies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = records(tmp_path)
    studies.store(
        tmp_path / "second", "made", [{"model": "a", "accuracy": 98.45}], (), 0, ("seconds",)
    )
    studies.store(tmp_path / "first", "other", [], (), 0)
    assert agree.main([first, second]) == 1
    reported = capsys.readouterr().out
    assert "row 2 is in the first folder alone: b, 90.0" in reported
    assert f"other: not compared, it is not in {second}" in reported
    assert agree.main([second, second]) == 0
    assert agree.main([first, second, "other"]) == 1
    assert agree.main([str(tmp_path), str(tmp_path)]) == 1
    assert "nothing was compared" in capsys.readouterr().out


class Ended:
    """A study: what its ``run`` was given, and how it ends."""

    def __init__(self, end: Exception | str) -> None:
        self.end, self.given = end, ()

    def run(self, out: Path, seed: int, names: tuple[str, ...] = (), seeds: int = 1) -> str:
        self.given = (out, seed, names, seeds)
        if isinstance(self.end, Exception):
            raise self.end
        return self.end


def test_failing_study_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = {
        "first": Ended(ZeroDivisionError("by nothing")),
        "folder": Ended(studies.LeftOut("give --mnist DIR.")),
        "torch": Ended(ModuleNotFoundError("No module named 'torch'", name="torch")),
        "gpu": Ended(EnvironmentMissing("there is no CUDA here.")),
        "own": Ended(ModuleNotFoundError("No module named 'tools.gone'", name="tools.gone")),
        "empty": Ended(""),
        "last": Ended("a table"),
    }
    monkeypatch.setattr(driver, "import_module", lambda name: ends[name.rpartition(".")[2]])
    options = (tmp_path, 7, ("a",), {"seeds": 3, "mnist": None})
    assert driver.drive(list(ends), *options, one=driver.study) == 1
    assert ends["last"].given == (tmp_path, 7, ("a",), 3)
    reported = capsys.readouterr().out.rpartition("\ndone: ")[2].splitlines()
    assert reported[0] == "last"
    assert reported[1:6] == [
        "failed: first: ZeroDivisionError: by nothing",
        "left out: folder: give --mnist DIR.",
        "left out: torch: torch is not installed; pip install -e '.[experiments]' brings it.",
        "left out: gpu: there is no CUDA here.",
        "failed: own: ModuleNotFoundError: No module named 'tools.gone'",
    ]
    assert reported[6].startswith("left out: empty: nothing could be measured")
    assert driver.drive(["torch", "last"], *options, one=driver.study) == 0
    assert driver.drive(["torch"], *options, one=driver.study) == 1  # nothing was done


def test_study_runs_in_its_own_process(tmp_path: Path) -> None:
    found = driver.apart("coupling", tmp_path, 0, ("light_zfnet512",), {})
    assert found == driver.Outcome("coupling", "done")
    assert json.loads((tmp_path / "coupling.json").read_text())["rows"]


def test_study_without_rows_is_no_result(tmp_path: Path) -> None:
    """Nothing is stored that would take the place of the results there are."""
    assert studies.save(tmp_path, "coupling", [], ("model",), 0) == ""
    assert not list(tmp_path.iterdir())


def test_mechanisms_are_left_out_and_alone() -> None:
    found = mechanisms.choices()
    assert len(found) == 2 + 2 * len(mechanisms.OFF) - len(mechanisms.NEEDS)
    settings = {name: Settings.create(macs=0.5, **values) for name, values in found.items()}
    assert settings["all"].effort == "high"
    assert settings["all but copies"].augment == "none"
    assert settings["all but copies"].refit == settings["all"].refit == "least-squares"
    assert settings["refit alone"].importance == "l2"
    assert settings["refit alone"].refit == "least-squares"
    assert settings["none"].refit == "none"


def test_slow_mechanism_is_measured_once() -> None:
    found = mechanisms.choices("second looks")
    assert found["all"] == mechanisms.choices()["all"]
    assert found["all but second looks"] == mechanisms.choices()["all but second looks"]
    settings = {name: Settings.create(macs=0.5, **values) for name, values in found.items()}
    assert [name for name, one in settings.items() if one.effort == "high"] == ["all"]
    assert settings["all but second looks and copies"].augment == "none"
    assert len(found) == 1 + 2 * len(mechanisms.OFF) + 1 - len(mechanisms.NEEDS)


def test_every_level_of_effort_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float | None, str]] = []

    class Bench:
        name, model, data = "m", Path("m.onnx"), Path("m.npz")

        def row(self, *_: object) -> studies.Row:
            return {"judged by": "accuracy", "before": 90.0, "after": 89.0, "divergence": 0.0123}

    def prepare(model: Path, data: Path, settings: Settings) -> None:
        assert settings.cache == "off"
        asked.append((settings.macs, settings.effort))

    monkeypatch.setattr(effort.prepare, "prepare", prepare)
    pruned = SimpleNamespace(pruned=SimpleNamespace(proto=None))
    monkeypatch.setattr(effort.search, "search", lambda _: pruned)
    study = studies.Resumable(tmp_path, effort.STUDY, effort.COLUMNS, 0)
    study.rows.append({"model": "m", "MACs asked": 0.5, "effort": "normal"})
    rows = list(effort._rows(Bench(), 0, study))  # type: ignore[arg-type]
    rest = [(0.5, "low"), (0.5, "high"), (0.25, "low"), (0.25, "normal"), (0.25, "high")]
    assert asked == rest
    assert [row["effort"] for row in rows] == [level for _, level in rest]
    assert set(rows[0]) == set(effort.COLUMNS)
    assert rows[0][effort.SCALED] == 12.3


def test_saved_rows_are_those_of_the_seed(tmp_path: Path) -> None:
    row = {"model": "m", "MACs asked": 0.5}
    studies.store(tmp_path, mechanisms.STUDY, [row], mechanisms.COLUMNS, 3)
    columns = mechanisms.COLUMNS
    assert studies.Resumable(tmp_path, mechanisms.STUDY, columns, 3).rows == [row]
    assert studies.Resumable(tmp_path, mechanisms.STUDY, columns, 4).rows == []
    assert studies.Resumable(tmp_path, "lottery", columns, 3).rows == []


def test_study_of_critical_units_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are saved one by one, kept for the same seed only, and end in the order of the table."""
    made: list[tuple[str, str]] = []

    def row(network: critical.Network, program: str, seed: int) -> studies.Row:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((network.title, program))
        return {"model": network.title, "program": program, "seconds": float(seed)}

    monkeypatch.setattr(critical, "_row", row)
    names = (critical.JOINT, "lenet5-mnist")
    with pytest.raises(KeyboardInterrupt):
        critical.run(tmp_path, 0, names)
    assert [path.name for path in tmp_path.iterdir()] == ["critical-unfinished.json"]
    first = made.copy()
    made.clear()
    text = critical.run(tmp_path, 0, names)
    assert made == [(critical.JOINT, "exact, ten minutes"), ("lenet5-mnist", "decoupled")]
    assert [path.name for path in tmp_path.iterdir()] == ["critical.json"]
    record = json.loads((tmp_path / "critical.json").read_text())
    keys = [(r["model"], r["program"]) for r in record["rows"]]
    assert keys == [*first, *made]
    assert text.count("\n| ") == 5


def test_warnings_are_kept_within_the_block_only() -> None:
    log = logging.getLogger("onnx_oamip")
    with critical._Warnings() as warnings:
        log.warning("%s by %d points", critical.LOSS, 3)
        log.info("nothing")
    log.warning("later")
    assert warnings.texts == [f"{critical.LOSS} by 3 points"]


def test_gaps_of_single_groups_are_those_of_the_whole_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoupled, "FLOPS_PER_GROUP", 1e8)
    name = "lenet5-mnist"
    gaps.run(tmp_path, 0, (name,))
    rows = json.loads((tmp_path / "gaps.json").read_text())["rows"]
    settings = Settings.create(
        importance="oamip", mode="decoupled", refit="least-squares", cache="off"
    )
    model, data = studies.paths(name)
    found = pipeline.score(model, str(data), str(tmp_path / "scores.npz"), settings)
    assert [(row["group"], row["loss"], row["gap"]) for row in rows] == [
        (record["group"], f"{record['objective']:.4f}", f"{record['gap']:.1%}")
        for record in found.scores.programs
    ]
    assert [row["units"] for row in rows] == [20, 50, 500]


# --------------------------------------------------------------------------------------------------------- determinism


def test_determinism_is_studied_once_per_model_and_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file with its samples beside it: one file and one report over all divisions of the work."""
    model = tmp_path / "small.onnx"
    model.write_bytes(build(MLP).SerializeToString())
    found = load(build(MLP), tmp_path)
    np.savez(tmp_path / "small.npz", **samples(found, 40))  # type: ignore[arg-type]
    out = tmp_path / "results"
    determinism.run(out, 0, (str(model),))
    rows = json.loads((out / "determinism.json").read_text(encoding="utf-8"))["rows"]
    assert [(r["model"], r["runs"], r["files"], r["reports"]) for r in rows] == [("small", 4, 1, 1)]
    monkeypatch.setattr(determinism, "prune", lambda *_: pytest.fail("studied again"))
    determinism.run(out, 0, (str(model),))
    capsys.readouterr()


def test_rounds_of_mutants_are_counted(tmp_path: Path) -> None:
    study = studies.Resumable(tmp_path, "mutants", mutants.COLUMNS, 0)
    text = """survived (3 of 9 tests) planning.allocation.py:512 -x = a: 1 +x = a: 2
planning.allocation: 30 of 880 mutants: crash 1, killed 20, no test 2, survived 6, time 1
"""
    mutants.add(study, text)
    mutants.add(study, "repair.ridge: 30 of 427 mutants: killed 30\n")
    mutants.add(study, text)
    keys = ("module", "round", "mutants", "drawn", "noticed", "no test", "survived")
    assert [tuple(row[key] for key in keys) for row in study.rows] == [
        ("planning.allocation", 1, 880, 30, 22, 2, 6),
        ("repair.ridge", 1, 427, 30, 30, 0, 0),
        ("planning.allocation", 2, 880, 30, 22, 2, 6),
    ]


def test_rerun_is_compared_with_what_the_killed_run_had_not_done() -> None:
    row = resume.shares(total=10.0, length=2.0, before=4.0, again=7.5)
    assert row == {
        "stage's share": 0.2,
        "done before": 0.4,
        "of processor time": 0.75,
        "done again": 0.15,
    }
    assert set(row) == set(resume.CLOCKED)


def test_stage_lasts_up_to_the_beginning_of_the_next_one() -> None:
    marks = {stage: float(i**2) for i, stage in enumerate([*resume.STAGES, resume.END])}
    found = resume.Run(40.0, marks)
    assert [found.length(stage) for stage in resume.STAGES] == [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]
