"""Timing side by side: order, pairing, memory and the step of widths. No test here judges how fast anything is."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from graphs import build, load

from onnx_oamip.core.errors import DataError, EnvironmentMissing
from onnx_oamip.core.records import Floats
from onnx_oamip.data import dataset
from onnx_oamip.graph.runtime import Session, resolve_device
from onnx_oamip.verification import latency
from onnx_oamip.verification.latency import CANDIDATES, STEP_WIDTHS, Ratio

LENET = ROOT / "models" / "lenet5-mnist.onnx"
SMALL = """(float[n, 3, 8, 8] x) => (float[] y) <float[8, 3, 3, 3] w1, float[4, 8, 3, 3] w2>
{ a = Conv <pads = [1, 1, 1, 1]> (x, w1)  b = Relu(a)  y = Conv (b, w2) }"""
IMAGES = {"x": np.random.default_rng(0).standard_normal((10, 3, 8, 8)).astype(np.float32)}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until a test moves it: [seconds]."""
    now = [0.0]
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_interleave_takes_every_call_once_a_round_in_random_order(clock: list[float]) -> None:
    order: list[tuple[int, int]] = []

    def spend(which: int, feed: int) -> None:
        order.append((which, feed))
        clock[0] += 1.0 + which

    runs, medians = latency.interleave(
        [lambda i: spend(0, i), lambda i: spend(1, i)], 1e9, rounds=40, seed=3
    )
    assert medians.shape == (40, 2)
    assert np.array_equal(medians, np.tile([1.0, 2.0], (40, 1)))
    assert [len(r) for r in runs] == [40, 40]
    timed = order[2 * latency.WARM_RUNS :]
    pairs = [(timed[i], timed[i + 1]) for i in range(0, len(timed), 2)]
    assert all({a[0], b[0]} == {0, 1} for a, b in pairs)
    assert {a[0] for a, _ in pairs} == {0, 1}, "the first of a round is not always the same"
    assert [a[1] for a, _ in pairs] == [b[1] for _, b in pairs] == list(range(40)), (
        "a round has one feed"
    )


def test_interleave_stops_in_time_but_not_before_a_few_rounds(clock: list[float]) -> None:
    def second(_: int) -> None:
        clock[0] += 1.0

    assert len(latency.interleave([second], seconds=20.0)[1]) == 20
    assert len(latency.interleave([second], seconds=0.0)[1]) == latency.FEWEST_ROUNDS
    assert len(latency.interleave([second], seconds=0.0, rounds=2)[1]) == 2


def test_interleave_repeats_fast_calls_and_drops_the_first(clock: list[float]) -> None:
    calls = [0]

    def fast(_: int) -> None:
        calls[0] += 1
        clock[0] += latency.BLOCK_SECONDS / 4

    runs, medians = latency.interleave([fast], seconds=1e9, rounds=5)
    assert medians.shape == (5, 1)
    assert len(runs[0]) == 5 * 4
    assert calls[0] == latency.WARM_RUNS + 5 * (1 + 4)


def test_paired_ratio_ignores_drift_and_outliers() -> None:
    rng = np.random.default_rng(0)
    first = np.linspace(1, 5, 101) * rng.uniform(0.99, 1.01, 101)
    other = 0.5 * np.linspace(1, 5, 101) * rng.uniform(0.99, 1.01, 101)
    other[::10] *= 20
    ratio = latency.paired(first, other)
    assert ratio.median == pytest.approx(0.5, rel=0.02)
    assert ratio.low <= ratio.median <= ratio.high
    assert ratio.high < 0.52
    assert ratio.rounds == 101


def test_paired_ratio_of_few_rounds_spans_all_of_them() -> None:
    ratio = latency.paired(np.ones(3), np.asarray([2.0, 1.0, 3.0]))
    assert ratio == latency.Ratio(2.0, 1.0, 3.0, 3, added=1.0)


@pytest.mark.parametrize(
    ("ratio", "share", "is_doubted"),
    [
        # 11 x as fast at half the work, measured under load.
        (
            Ratio(0.09, 0.05, 1.10, 40),
            0.5,
            True,
        ),
        (Ratio(0.09, 0.08, 0.10, 40), 0.5, False),  # far above the saved work, but sure
        (Ratio(0.48, 0.20, 1.20, 40), 0.5, False),  # an unsure figure that the saved work explains
        (Ratio(0.30, 0.20, 0.45, 40), 0.5, True),
        (Ratio(0.09, 0.05, 1.10, 40), None, False),  # nothing to compare with: not all is counted
    ],
)
def test_speed_up_that_the_work_does_not_explain_is_in_doubt(
    ratio: Ratio, share: float | None, is_doubted: bool
) -> None:
    found = latency.described(ratio, share=share, threads=3)
    assert bool(found.doubt) == is_doubted
    measured = (found.median, found.low, found.high, found.rounds)
    assert measured == (ratio.median, ratio.low, ratio.high, ratio.rounds)
    assert found.threads == 3
    assert latency.described(ratio, share=share).threads >= 1


@pytest.mark.parametrize(
    ("measured", "load", "is_settled"),
    [(True, 0.4, True), (True, None, True), (True, 4.0, False), (False, 0.4, False)],
)
def test_step_measured_under_load_is_not_settled(
    measured: bool, load: float | None, is_settled: bool
) -> None:
    assert latency.Step(8, measured, "", load).is_settled == is_settled


def test_quiet_time_is_the_mean_of_the_lowest_quarter() -> None:
    assert float(latency.quiet([9.0, 2.0, 4.0, 8.0, 7.0, 6.0, 5.0, 100.0])) == 3.0
    assert float(latency.quiet([7.0])) == 7.0
    assert latency.quiet(np.asarray([[1.0, 8.0], [5.0, 2.0]])).tolist() == [1.0, 2.0]


def test_bench_accepts_protos_and_paths(tmp_path: Path) -> None:
    model = load(build(SMALL), tmp_path)
    found = latency.bench(
        [model.proto, tmp_path / "case.onnx"], [IMAGES], "cpu", threads=1, seconds=0.1
    )
    assert [t.name for t in found] == ["model 0", "case.onnx"]
    for timing in found:
        assert 0 < timing.p50_ms <= timing.p95_ms
        assert timing.mean_ms > 0
        assert timing.throughput == pytest.approx(10 / timing.p50_ms * 1e3)
        assert timing.runs >= latency.FEWEST_ROUNDS
        assert timing.peak_bytes is None or timing.peak_bytes > 0
        assert 0 < timing.ratio.low <= timing.ratio.median <= timing.ratio.high
    assert found[0].ratio.median == 1.0
    json.dumps([asdict(t) for t in found])


def test_bench_needs_a_feed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no feed"):
        latency.bench([load(build(SMALL), tmp_path).proto], [], "cpu")


def test_peak_memory_is_measured_per_model(tmp_path: Path) -> None:
    wide = "(float[1, 4096] x) => (float[] y) <float[4096, 4096] w> { y = MatMul(x, w) }"
    narrow = "(float[1, 4096] x) => (float[] y) <float[4096, 8] w> { y = MatMul(x, w) }"
    feed = {"x": np.zeros((1, 4096), np.float32)}
    found = [latency.peak_memory(build(text), feed, "cpu", 1) for text in (wide, narrow)]
    if found[0] is None or found[1] is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert found[0] > 4096 * 4096 * 4, "64 MiB of weights"
    assert found[1] < found[0] / 2


def test_peak_memory_of_a_model_that_does_not_load_is_unknown(tmp_path: Path) -> None:
    assert latency.peak_memory(tmp_path / "missing.onnx", IMAGES, "cpu") is None


def test_ratio_of_a_model_to_itself_is_finite(tmp_path: Path) -> None:
    model = load(build(SMALL), tmp_path)
    samples = dataset.load(IMAGES, model)
    assert samples is not None
    ratio = latency.measure_ratio(
        model.proto, model.proto, samples, "cpu", batch=4, threads=1, seconds=0.1
    )
    assert ratio > 0
    assert np.isfinite(ratio)


@pytest.mark.parametrize(
    ("batch", "sizes"), [(4, [4, 4]), (10, [10]), (64, [10]), (1, [1, 1, 1, 1])]
)
def test_feeds_are_full_batches(batch: int, sizes: list[int], tmp_path: Path) -> None:
    samples = dataset.load(IMAGES, load(build(SMALL), tmp_path))
    assert samples is not None
    assert [len(f["x"]) for f in latency.feeds_of(samples, batch)] == sizes


# ------------------------------------------------------------------------------------------------ step of widths


def _times(block: int, rng: np.random.Generator, cliff: int = 1, noise: float = 0.02) -> Floats:
    """Synthetic times of a provider that pads channels to ``block``; widths off ``cliff`` take a slow path."""
    widths = np.asarray(STEP_WIDTHS)
    padded = -(-widths // block) * block
    ideal = (padded / 64) ** 1.9 * np.where(widths % cliff, 1.3, 1.0)
    return ideal * (1 + noise * rng.random((200, len(widths))))


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("cliff", [1, 4])
def test_step_is_the_block_of_a_provider(block: int, cliff: int) -> None:
    found = latency.judge_step(_times(block, np.random.default_rng(0), cliff, 0.005), "cpu")
    assert found.measured
    assert found.value == max(block, cliff)


def test_step_survives_bursts_of_load() -> None:
    rng = np.random.default_rng(0)
    times = _times(16, rng)
    times *= np.where(rng.random(times.shape) < 0.4, rng.uniform(2, 20, times.shape), 1)
    assert latency.judge_step(times, "cpu").value == 16


@pytest.mark.parametrize(("device", "default"), [("cpu", 8), ("cuda", 16)])
def test_step_falls_back_for_uninformative_times(device: str, default: int) -> None:
    rng = np.random.default_rng(0)
    for times in (
        np.ones((50, len(STEP_WIDTHS))),
        rng.uniform(1, 1.2, (50, len(STEP_WIDTHS))),
        _times(8, rng)[:2],
    ):
        found = latency.judge_step(times, device)
        assert (found.value, found.measured) == (default, False)
        assert "inconclusive" in found.note


def test_step_falls_back_if_halves_disagree() -> None:
    rng = np.random.default_rng(0)
    times = _times(4, rng, noise=0.001)
    times[1::2] = _times(32, rng, noise=0.001)[1::2]
    assert not latency.judge_step(times, "cpu").measured


def test_step_of_this_machine_is_plausible() -> None:
    found = latency.find_step("cpu")
    assert found.value in CANDIDATES
    assert latency.find_step("cpu") is found, "measured once a process"
    assert latency.step("cpu") == found.value


@pytest.mark.gpu
def test_cuda_latency_is_measured(tmp_path: Path) -> None:
    try:
        device = resolve_device("cuda")
    except EnvironmentMissing:
        pytest.skip("ONNX Runtime offers no CUDA here")
    assert latency.step(device) in CANDIDATES
    model = load(build(SMALL), tmp_path)
    found = latency.bench([model.proto, model.proto], [IMAGES], device, seconds=0.2)
    assert all(t.p50_ms > 0 for t in found)


def test_missing_cuda_is_refused() -> None:
    try:
        resolve_device("cuda")
    except EnvironmentMissing:
        with pytest.raises(EnvironmentMissing, match="`device=cuda`"):
            latency.bench([LENET], [{}], "cuda")
    else:
        pytest.skip("there is CUDA here")


def test_session_without_profile_records_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Session(build(SMALL), "cpu").run({"x": IMAGES["x"][:1]})
    assert not list(tmp_path.iterdir())
