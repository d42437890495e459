"""Latency on the target provider: models side by side, and the step of widths that it likes.

Times on a shared machine drift and jump. So models are never timed one after the other but in rounds, in random order
within a round, and what compares them is a median over rounds of a ratio within a round. Where absolute times are
needed, the mean of the lowest quarter stands for an unloaded machine. Latency is what a caller waits for: host arrays
in, host arrays out.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_oamip.core import atomic_files
from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import Array, Floats
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph import external_data
from onnx_oamip.graph.runtime import Session, resolve_device

Source = onnx.ModelProto | str | os.PathLike[str]
Feed = Mapping[str, Array]
Call = Callable[[int], object]
QUIET = 0.25
"""Share of the shortest times whose mean stands for an unloaded machine: load from outside only ever adds."""
WARM_RUNS = 3
FEWEST_ROUNDS = 5
BLOCK_SECONDS = 0.002
"""A model runs at least about this long within a round (at most 32 times), so that the clock's grain is small."""
FEEDS = 4
MEMORY_RUNS = 3
MEMORY_TIMEOUT = 600.0


# -------------------------------------------------------------------------------------------------- side by side


@dataclass(frozen=True, slots=True)
class Ratio:
    """A median over rounds of latency over the first model's, with the 95 % interval of that median."""

    median: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Timing:
    """One model of a bench: latencies of one run in milliseconds, ``throughput`` in samples a second at the median,
    ``peak_bytes`` that loading and running added to a fresh process (None where that cannot be told), and the latency
    over the first model's."""

    name: str
    p50_ms: float
    p95_ms: float
    mean_ms: float
    throughput: float
    runs: int
    peak_bytes: int | None
    ratio: Ratio


def bench(
    sources: Sequence[Source],
    feeds: Sequence[Feed],
    device: str,
    threads: int | None = None,
    seconds: float = 10.0,
    rounds: int | None = None,
    names: Sequence[str] | None = None,
    memory: bool = True,
    seed: int = 0,
) -> tuple[Timing, ...]:
    """Models (protos or paths) run side by side on the same feeds, in random order within each round.

    Ends after ``rounds`` rounds or about ``seconds`` seconds, whichever is first, but not before five rounds (or
    ``rounds``, if fewer). Throughput counts axis 0 of a feed's first array as samples. Peak memory is measured in one
    fresh process per model and costs a process start each.
    """
    device = resolve_device(device)
    if names is None:
        names = [
            f"model {i}" if isinstance(s, onnx.ModelProto) else Path(s).name
            for i, s in enumerate(sources)
        ]
    if not feeds:
        raise DataError("there is no feed to time the models on; give at least one sample.")
    sessions = [
        Session(s, device, threads, what=name, spin=True)
        for s, name in zip(sources, names, strict=True)
    ]
    runs, medians = interleave([caller(s, feeds) for s in sessions], seconds, rounds, seed)
    del sessions
    first = next(iter(feeds[0].values()))
    samples = len(first) if np.ndim(first) else 1
    result = []
    for i, name in enumerate(names):
        times = np.asarray(runs[i])
        p50, p95 = (float(q) for q in np.quantile(times, [0.5, 0.95]))
        peak = peak_memory(sources[i], feeds[0], device, threads) if memory else None
        ratio = paired(medians[:, 0], medians[:, i])
        result.append(
            Timing(
                name,
                p50 * 1e3,
                p95 * 1e3,
                float(times.mean()) * 1e3,
                samples / p50,
                len(times),
                peak,
                ratio,
            )
        )
    return tuple(result)


def interleave(
    calls: Sequence[Call], seconds: float, rounds: int | None = None, seed: int = 0
) -> tuple[list[list[float]], Floats]:
    """Time calls in rounds: every call in each round, in random order, a few times in a row if it is fast.

    A call gets the number of the feed to use, the same for all calls. Returns the seconds of every run per call, and
    the medians (rounds, calls) within each round.
    """
    slowest = 0.0
    for call in calls:
        warm = [_seconds(call, i) for i in range(WARM_RUNS)]
        slowest = max(slowest, min(warm))
    inner = min(32, max(1, math.ceil(BLOCK_SECONDS / max(slowest, 1e-9))))
    rng = np.random.default_rng(seed)
    runs: list[list[float]] = [[] for _ in calls]
    medians: list[Floats] = []
    end = time.perf_counter() + seconds
    least = min(FEWEST_ROUNDS, rounds or FEWEST_ROUNDS)
    while len(medians) < least or (
        time.perf_counter() < end and (rounds is None or len(medians) < rounds)
    ):
        row = np.zeros(len(calls))
        for c in rng.permutation(len(calls)):
            if inner > 1:
                calls[c](len(medians))  # pays for the caches that another model filled
            block = [_seconds(calls[c], len(medians)) for _ in range(inner)]
            runs[c].extend(block)
            row[c] = np.median(block)
        medians.append(row)
    return runs, np.asarray(medians)


def _seconds(call: Call, feed: int) -> float:
    start = time.perf_counter()
    call(feed)
    return time.perf_counter() - start


def quiet(times: Floats | Sequence[float]) -> Floats:
    """Mean of the lowest quarter along the first axis."""
    ordered = np.sort(np.asarray(times, float), axis=0)
    calm: Floats = ordered[: max(1, int(len(ordered) * QUIET))].mean(axis=0)
    return calm


def paired(first: Floats, other: Floats) -> Ratio:
    """Median of ``other / first`` round by round; its interval from order statistics (all of them under 6 rounds)."""
    ratios = np.sort(other / first)
    n = len(ratios)
    k = max(0, math.floor((n - 1.96 * math.sqrt(n)) / 2))
    return Ratio(float(np.median(ratios)), float(ratios[k]), float(ratios[n - 1 - k]), n)


def compare_latency(
    first: Source,
    other: Source,
    samples: Samples,
    device: str,
    batch: int = 1,
    threads: int | None = None,
    seconds: float = 3.0,
) -> Ratio:
    """Latency of ``other`` over that of ``first`` on feeds of ``batch`` samples, in about ``seconds`` seconds."""
    device = resolve_device(device)
    feeds = feeds_of(samples, batch)
    sessions = [Session(s, device, threads, spin=True) for s in (first, other)]
    _, medians = interleave([caller(s, feeds) for s in sessions], seconds)
    return paired(medians[:, 0], medians[:, 1])


def measure_ratio(
    first: Source,
    other: Source,
    samples: Samples,
    device: str,
    batch: int = 1,
    threads: int | None = None,
    seconds: float = 3.0,
) -> float:
    """Median paired ratio of latencies, ``other / first``: under 1 where ``other`` is faster."""
    return compare_latency(first, other, samples, device, batch, threads, seconds).median


def feeds_of(samples: Samples, batch: int, count: int = FEEDS) -> list[dict[str, Array]]:
    """The first few feeds of exactly ``batch`` samples (fewer only where there are no more)."""
    found: list[dict[str, Array]] = []
    for index, feed in samples.batches(batch):
        if found and (len(found) == count or (not samples.whole and len(index) < batch)):
            break
        found.append(feed)
    return found


def caller(session: Session, feeds: Sequence[Feed]) -> Call:
    """Runs a session on the feed of a number, without what else the feed may hold."""
    known = [
        {k: np.ascontiguousarray(v) for k, v in f.items() if k in session.inputs} for f in feeds
    ]
    return lambda i: session.run(known[i % len(known)])


# -------------------------------------------------------------------------------------------------------- memory


def peak_memory(source: Source, feed: Feed, device: str, threads: int | None = None) -> int | None:
    """Bytes by which resident memory grew at its peak while a fresh process loaded a model and ran it three times.

    The runtime itself is not counted, nor is memory on a GPU. None where the system does not tell (Windows).
    """
    with atomic_files.scratch() as folder:
        job = folder / "job"
        path = (
            _on_disk(source, folder)
            if isinstance(source, onnx.ModelProto)
            else os.fspath(Path(source).absolute())
        )
        job.write_bytes(pickle.dumps((path, dict(feed), device, threads)))
        home = str(Path(__file__).parents[1])
        paths = os.pathsep.join(p for p in (home, os.environ.get("PYTHONPATH", "")) if p)
        code = f"import sys; from {__name__} import weigh; weigh(sys.argv[1])"
        try:
            done = subprocess.run(
                [sys.executable, "-c", code, str(job)],
                capture_output=True,
                text=True,
                timeout=MEMORY_TIMEOUT,
                check=True,
                env={**os.environ, "PYTHONPATH": paths},
            )
            return int(done.stdout.split()[-1])
        except (subprocess.SubprocessError, OSError, ValueError, IndexError):
            return None


def weigh(job: str) -> None:
    """The fresh process of ``peak_memory``: prints the growth in bytes."""
    path, feed, device, threads = pickle.loads(Path(job).read_bytes())
    resolve_device(device)  # imports the runtime, so that it is not counted
    _forget_peak()
    before = _resident("VmRSS")
    session = Session(path, device, threads, spin=True)
    for _ in range(MEMORY_RUNS):
        session.run({k: v for k, v in feed.items() if k in session.inputs})
    sys.stdout.write(f"{max(_resident('VmHWM') - before, 0)}\n")


def _forget_peak() -> None:
    """Linux only: the peak so far (imports) no longer counts."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _resident(what: str) -> int:
    """Resident bytes now (VmRSS) or at their peak (VmHWM); where only the peak is known, that for both."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(rf"{what}:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    import resource  # not on Windows: the process fails and the caller says None

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _on_disk(proto: onnx.ModelProto, folder: Path) -> str:
    path = folder / "model.onnx"
    external_data.save(proto, path, "model.data")
    return str(path)


# ------------------------------------------------------------------------------------------------ step of widths

CANDIDATES = (32, 16, 8, 4, 2, 1)
NARROW, WIDE = 64, 128
STEP_WIDTHS = (NARROW, *(NARROW + s for s in reversed(CANDIDATES)), WIDE)
STEP_SECONDS = 0.8
DEFAULT_STEP = {"cpu": 8, "cuda": 16}


@dataclass(frozen=True, slots=True)
class Step:
    """The step of widths on a provider, in channels; ``measured`` is False where the device's default is taken."""

    value: int
    measured: bool
    note: str


def step(device: str) -> int:
    """The step of widths, in channels, that the provider likes: see ``find_step``."""
    return find_step(device).value


@cache
def find_step(device: str) -> Step:
    """Time stacks of 3x3 convolutions at 64 to 128 channels and judge which widths pay; once a process, in about 1 s.

    On the CPU with one thread: the blocking of channels does not depend on threads, and the noise does.
    """
    device = resolve_device(device)
    batch, size, threads = (64, 28, None) if device == "cuda" else (1, 14, 1)
    sessions = [Session(_stack(w, batch, size), device, threads, spin=True) for w in STEP_WIDTHS]
    feed = [{"x": np.ones(1, np.float32)}]
    _, medians = interleave([caller(s, feed) for s in sessions], STEP_SECONDS)
    return judge_step(medians, device)


def judge_step(times: Floats, device: str) -> Step:
    """The step from times (rounds, len(STEP_WIDTHS)) at 64, 64 + 1, 64 + 2, 64 + 4, ..., 64 + 32 and 128 channels.

    A step s pays if going down from 64 + 2s channels to 64 + s saves at least half of what a smooth curve through 64
    and 128 channels says. The answer is the smallest s such that it and all larger ones pay. Even and odd rounds must
    agree, or differ by a factor of two (then the larger one counts); otherwise the default of the device is taken.
    """
    found = [_judge_half(times[start::2]) for start in (0, 1)]
    known = [f for f in found if f]
    if len(known) == 2 and max(known) <= 2 * min(known):
        value = max(known)
        return Step(
            value, True, f"measured on this {device}: widths that are multiples of {value} pay"
        )
    value = DEFAULT_STEP[device]
    return Step(
        value,
        False,
        f"the measurement on this {device} was inconclusive; {value} is the default there",
    )


def _judge_half(times: Floats) -> int | None:
    if len(times) < 2:
        return None
    calm = quiet(times)
    power = math.log(calm[-1] / calm[0]) / math.log(WIDE / NARROW)
    if not 1 < power < 3:
        return None  # overhead or noise hides the arithmetic
    value = None
    for s in CANDIDATES:
        i = STEP_WIDTHS.index(NARROW + s)
        smooth = calm[i + 1] * (1 - ((NARROW + s) / STEP_WIDTHS[i + 1]) ** power)
        if calm[i + 1] - calm[i] < smooth / 2:
            break
        value = s
    return value


def _stack(width: int, batch: int, size: int, depth: int = 3) -> onnx.ModelProto:
    """Convolutions of one width on a constant image that is made inside the graph, so that nothing large is copied."""
    rng = np.random.default_rng(0)
    constants = [numpy_helper.from_array(np.asarray([batch, width, size, size], np.int64), "shape")]
    nodes = [helper.make_node("Expand", ["x", "shape"], ["y0"])]
    for i in range(depth):
        weight = rng.normal(0, 0.1, (width, width, 3, 3)).astype(np.float32)
        constants.append(numpy_helper.from_array(weight, f"w{i}"))
        nodes.append(helper.make_node("Conv", [f"y{i}", f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"y{i + 1}"]))
    nodes.append(helper.make_node("GlobalAveragePool", [f"y{depth}"], ["z"]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, [batch, width, 1, 1])
    graph = helper.make_graph(nodes, "stack", [x], [z], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
