"""Latency on the target provider: models timed side by side, and the multiple of widths that kernels prefer.

Times on a shared machine drift and jump. Models are therefore timed in rounds, in random order within a round, and
compared by the median over rounds of a ratio within a round. Where absolute times are needed, the mean of the lowest
quarter stands for an unloaded machine. Latency is the time that a caller waits: from host arrays to host arrays.
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
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_oamip.core import atomic_files, child_processes
from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import Array, Floats, Latency
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph import external_data, op_libraries
from onnx_oamip.graph.runtime import Session, resolve_device

Source = onnx.ModelProto | str | os.PathLike[str]
Feed = Mapping[str, Array]
Call = Callable[[int], object]
QUIET = 0.25
"""Share of the shortest times whose mean stands for an unloaded machine: load from outside only ever adds."""
WARM_RUNS = 3
"""Runs of every model before the first round, which are not timed."""
FEWEST_ROUNDS = 5
BLOCK_SECONDS = 0.002
"""A model runs at least about this long within a round (at most 32 times), so that the clock's grain is small."""
FEEDS = 4
"""Number of different feeds that the runs cycle through."""
TOO_FAST = 1.5
"""Speed-up over the saved work beyond which a ratio with a wide interval is in doubt."""
SLOWER = 1.02
"""A model is slower where even the optimistic end of its latency ratio is above this."""
OVERHEAD_MS = 0.05
"""Milliseconds per run that decide nothing: a call and the scheduling of a few nodes take as long."""
BUSY = 1.5
"""Load per processor above which a measured step of widths is not stored."""
MEMORY_RUNS = 3
MEMORY_TIMEOUT = 600.0


# -------------------------------------------------------------------------------------------------- side by side


@dataclass(frozen=True, slots=True)
class Ratio:
    """Latency relative to another model.

    Attributes:
        median: Median over rounds of the ratio within a round.
        low: Lower end of the 95 % interval of that median.
        high: Upper end of the interval.
        rounds: Number of rounds.
        added: Median over rounds of the seconds that a run takes longer; below 0 if it is faster.
    """

    median: float
    low: float
    high: float
    rounds: int
    added: float = 0.0


@dataclass(frozen=True, slots=True)
class Timing:
    """Measurements of one model.

    Attributes:
        name: Name of the model.
        p50_ms: Median latency of a run in milliseconds.
        p95_ms: 95th percentile of the latency.
        mean_ms: Mean latency.
        throughput: Samples per second at the median.
        runs: Number of timed runs.
        peak_bytes: Memory that loading and running added to a fresh process; None if the system does not report it.
        ratio: Latency relative to the first model.
    """

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
    *,
    seconds: float = 10.0,
    rounds: int | None = None,
    names: Sequence[str] | None = None,
    memory: bool = True,
    seed: int = 0,
) -> tuple[Timing, ...]:
    """Times models side by side on the same feeds, in random order within each round.

    Args:
        sources: Models or paths of model files.
        feeds: Values of the graph inputs; axis 0 of the first array counts the samples.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: Threads within an operator. Default: the choice of ONNX Runtime.
        seconds: Approximate time after which the last round ends.
        rounds: Upper bound on the rounds. There are at least five, or as many as the bound allows.
        names: Names of the models. Default: their file names.
        memory: Measure the peak memory, in one fresh process per model.
        seed: Seed of the order.

    Returns:
        One record per model.

    Raises:
        DataError: There is no feed.
    """
    device = resolve_device(device)
    if names is None:
        names = [_default_name(source, i) for i, source in enumerate(sources)]
    if not feeds:
        raise DataError("there is no feed to time the models on; give at least one sample.")
    sessions = [
        Session(source, device, threads, what=name, spin=True)
        for source, name in zip(sources, names, strict=True)
    ]
    runs, medians = interleave([caller(s, feeds) for s in sessions], seconds, rounds, seed)
    del sessions
    first = next(iter(feeds[0].values()))
    samples = len(first) if np.ndim(first) else 1
    result = []
    for i, name in enumerate(names):
        times = np.asarray(runs[i])
        p50, p95 = (float(quantile) for quantile in np.quantile(times, [0.5, 0.95]))
        if memory:
            peak = peak_memory(sources[i], feeds[0], device, threads)
        else:
            peak = None
        timing = Timing(
            name=name,
            p50_ms=p50 * 1e3,
            p95_ms=p95 * 1e3,
            mean_ms=float(times.mean()) * 1e3,
            throughput=samples / p50,
            runs=len(times),
            peak_bytes=peak,
            ratio=paired(medians[:, 0], medians[:, i]),
        )
        result.append(timing)
    return tuple(result)


def _default_name(source: Source, i: int) -> str:
    if isinstance(source, onnx.ModelProto):
        return f"model {i}"
    return Path(source).name


def interleave(
    calls: Sequence[Call],
    seconds: float,
    rounds: int | None = None,
    seed: int = 0,
) -> tuple[list[list[float]], Floats]:
    """Times calls in rounds: every call in each round, in random order, a few times in a row if it is fast.

    Args:
        calls: Functions of the number of the feed to use, which is the same for all calls of a round.
        seconds: Approximate time after which the last round ends.
        rounds: Upper bound on the rounds.
        seed: Seed of the order.

    Returns:
        The seconds of every run per call, and the medians (rounds, calls) within each round.
    """
    slowest = 0.0
    for call in calls:
        warm = [_seconds(call, i) for i in range(WARM_RUNS)]
        slowest = max(slowest, min(warm))
    runs_per_block = min(32, max(1, math.ceil(BLOCK_SECONDS / max(slowest, 1e-9))))
    rng = np.random.default_rng(seed)
    runs: list[list[float]] = [[] for _ in calls]
    medians: list[Floats] = []
    end = time.perf_counter() + seconds
    fewest = min(FEWEST_ROUNDS, rounds or FEWEST_ROUNDS)
    most = math.inf if rounds is None else rounds
    while len(medians) < fewest or (time.perf_counter() < end and len(medians) < most):
        row = np.zeros(len(calls))
        for c in rng.permutation(len(calls)):
            if runs_per_block > 1:
                calls[c](len(medians))  # refills the caches that another model has used
            block = [_seconds(calls[c], len(medians)) for _ in range(runs_per_block)]
            runs[c].extend(block)
            row[c] = np.median(block)
        medians.append(row)
    return runs, np.asarray(medians)


def _seconds(call: Call, feed: int) -> float:
    start = time.perf_counter()
    call(feed)
    return time.perf_counter() - start


def quiet(times: Floats | Sequence[float]) -> Floats:
    """Estimates the time on an unloaded machine: the mean of the lowest quarter along the first axis.

    Args:
        times: Measured times (runs, ...).

    Returns:
        The means (...).
    """
    ordered = np.sort(np.asarray(times, float), axis=0)
    lowest = ordered[: max(1, int(len(ordered) * QUIET))]
    mean: Floats = lowest.mean(axis=0)
    return mean


def paired(first: Floats, other: Floats) -> Ratio:
    """Ratio of two models' times, round by round.

    Args:
        first: Times of the first model (rounds,).
        other: Times of the other one (rounds,).

    Returns:
        The median of ``other / first``, with an interval from order statistics; under six rounds it spans all ratios.
    """
    ratios = np.sort(other / first)
    n = len(ratios)
    k = max(0, math.floor((n - 1.96 * math.sqrt(n)) / 2))
    added = float(np.median(other - first))
    return Ratio(float(np.median(ratios)), float(ratios[k]), float(ratios[n - 1 - k]), n, added)


def compare_latency(
    first: Source,
    other: Source,
    samples: Samples,
    device: str,
    *,
    batch: int = 1,
    threads: int | None = None,
    seconds: float = 3.0,
) -> Ratio:
    """Measures the latency of a model relative to another one.

    Args:
        first: Model to compare with.
        other: Model to compare.
        samples: Samples to run on.
        device: ``cpu``, ``cuda`` or ``auto``.
        batch: Samples per run.
        threads: Threads within an operator. Default: the choice of ONNX Runtime.
        seconds: Approximate time of the measurement.

    Returns:
        The ratio, under 1 if ``other`` is faster.
    """
    device = resolve_device(device)
    feeds = feeds_of(samples, batch)
    sessions = [Session(s, device, threads, spin=True) for s in (first, other)]
    _, medians = interleave([caller(s, feeds) for s in sessions], seconds)
    return paired(medians[:, 0], medians[:, 1])


def described(
    found: Ratio,
    *,
    share: float | None,
    threads: int | None = None,
) -> Latency:
    """Makes the record of a measured ratio.

    Args:
        found: The ratio.
        share: Share of the work that the other model keeps; None if not all of it is counted.
        threads: Threads within an operator. Default: the choice of ONNX Runtime.

    Returns:
        The record, with the load of the machine. A speed-up far above the saved work whose interval is wider than the
        difference is in doubt: another process took the processor from one of the two models.
    """
    load = machine_load()
    doubt = ""
    if share is not None:
        is_too_fast = found.median < share / TOO_FAST
        is_unsure = found.high - found.low > share - found.median
        if is_too_fast and is_unsure:
            doubt = (
                f"the interval from {found.low:.2f} to {found.high:.2f} is too wide for a speed-up that the saved "
                f"work does not explain"
            )
    return Latency(
        median=found.median,
        low=found.low,
        high=found.high,
        rounds=found.rounds,
        threads=threads or _processors(),
        load=load,
        doubt=doubt,
        added_ms=found.added * 1e3,
    )


def is_slower(found: Latency) -> bool:
    """Checks whether a model is slower beyond the noise of the measurement.

    Args:
        found: The measured latency.

    Returns:
        True if the whole interval of the ratio is above ``SLOWER``.
    """
    return found.low > SLOWER


def is_overhead(found: Latency) -> bool:
    """Checks whether a slowdown is no more than calls and the scheduling of a few nodes take.

    Args:
        found: The measured latency.

    Returns:
        True if a run takes at most ``OVERHEAD_MS`` longer, as in networks of microseconds.
    """
    return found.added_ms <= OVERHEAD_MS


def machine_load() -> float | None:
    """Load of the machine over the last minute.

    Returns:
        Processes that were ready to run per processor; None where the system does not say (Windows).
    """
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return None


def _processors() -> int:
    """Processors that this process may use: the number of threads that ONNX Runtime chooses."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measure_ratio(
    first: Source,
    other: Source,
    samples: Samples,
    device: str,
    *,
    batch: int = 1,
    threads: int | None = None,
    seconds: float = 3.0,
) -> float:
    """Measure the median latency of a model relative to another one.

    Args:
        first: Model to compare with.
        other: Model to compare.
        samples: Samples to run on.
        device: ``cpu``, ``cuda`` or ``auto``.
        batch: Samples per run.
        threads: Threads within an operator. Default: the choice of ONNX Runtime.
        seconds: Approximate time of the measurement.

    Returns:
        The median ratio of :func:`compare_latency`, under 1 if ``other`` is faster.
    """
    ratio = compare_latency(
        first,
        other,
        samples,
        device,
        batch=batch,
        threads=threads,
        seconds=seconds,
    )
    return ratio.median


def feeds_of(
    samples: Samples,
    batch: int,
    count: int = FEEDS,
) -> list[dict[str, Array]]:
    """Takes the first few feeds of equal size.

    Args:
        samples: Where the feeds come from.
        batch: Samples per feed.
        count: Largest number of feeds.

    Returns:
        Feeds of exactly ``batch`` samples; a single smaller one if there are not so many samples.
    """
    feeds: list[dict[str, Array]] = []
    for index, feed in samples.batches(batch):
        is_short = not samples.whole and len(index) < batch
        if feeds and (len(feeds) == count or is_short):
            break
        feeds.append(feed)
    return feeds


def caller(session: Session, feeds: Sequence[Feed]) -> Call:
    """Makes a function that runs a session on the feed of a number.

    Args:
        session: The session.
        feeds: Feeds, which may hold more than the inputs of the session.

    Returns:
        The function; numbers beyond the feeds start again with the first.
    """
    inputs = [
        {
            name: np.ascontiguousarray(value)
            for name, value in feed.items()
            if name in session.inputs
        }
        for feed in feeds
    ]
    return lambda i: session.run(inputs[i % len(inputs)])


# -------------------------------------------------------------------------------------------------------- memory


def peak_memory(
    source: Source,
    feed: Feed,
    device: str,
    threads: int | None = None,
) -> int | None:
    """Measures the memory that a model needs, in a fresh process.

    Args:
        source: Model or path of a model file.
        feed: Values of the graph inputs.
        device: ``cpu`` or ``cuda``; memory on a GPU is not counted.
        threads: Threads within an operator.

    Returns:
        Bytes by which the resident memory grew at its peak while the model was loaded and run three times, without
        that of the runtime itself. None if the system does not report it (Windows).
    """
    with atomic_files.scratch() as folder:
        job = folder / "job"
        path = _path_of(source, folder)
        libraries = [library.path for library in op_libraries.in_use()]
        job.write_bytes(pickle.dumps((path, dict(feed), device, threads, libraries)))
        home = str(Path(__file__).parents[2])  # the folder that holds the package
        paths = os.pathsep.join(p for p in (home, os.environ.get("PYTHONPATH", "")) if p)
        code = f"import sys; from {__name__} import weigh; weigh(sys.argv[1])"
        try:
            printed = child_processes.run(
                [sys.executable, "-c", code, str(job)],
                timeout=MEMORY_TIMEOUT,
                env={**os.environ, "PYTHONPATH": paths},
            )
            return int(printed.split()[-1])
        except (subprocess.SubprocessError, OSError, ValueError, IndexError):
            return None


def weigh(job: str) -> None:
    """Body of the fresh process of :func:`peak_memory`; prints the growth in bytes.

    Args:
        job: Path of a file with the pickled model path, feed, device, threads and libraries of custom operators.
    """
    path, feed, device, threads, libraries = pickle.loads(Path(job).read_bytes())
    op_libraries.use(libraries)
    resolve_device(device)  # imports the runtime, so that it is not counted
    _forget_peak()
    before = _resident("VmRSS")
    session = Session(path, device, threads, spin=True)
    for _ in range(MEMORY_RUNS):
        session.run({k: v for k, v in feed.items() if k in session.inputs})
    sys.stdout.write(f"{max(_resident('VmHWM') - before, 0)}\n")


def _forget_peak() -> None:
    """Resets the recorded peak on Linux, so that imports do not count."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _resident(field: str) -> int:
    """Resident bytes now (VmRSS) or at their peak (VmHWM). Systems other than Linux report the peak for both."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(rf"{field}:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    import resource  # not on Windows: the process fails there, and its caller returns None

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak
    return peak * 1024


def _path_of(source: Source, folder: Path) -> str:
    """Absolute path of a model file; a model in memory is written to the folder first."""
    if not isinstance(source, onnx.ModelProto):
        return os.fspath(Path(source).absolute())
    path = folder / "model.onnx"
    external_data.save(source, path, "model.data")
    return str(path)


# ------------------------------------------------------------------------------------------------ step of widths

CANDIDATES = (32, 16, 8, 4, 2, 1)
"""Candidate steps, in channels."""
NARROW, WIDE = 64, 128
STEP_WIDTHS = (NARROW, *(NARROW + s for s in reversed(CANDIDATES)), WIDE)
STEP_SECONDS = 0.8
DEFAULT_STEP = {"cpu": 8, "cuda": 16}


@dataclass(frozen=True, slots=True)
class Step:
    """Multiple of channels that the kernels of a provider prefer.

    Attributes:
        value: The multiple.
        measured: False if it is the default of the device.
        note: How it was found, for the report.
        load: Load per processor during the measurement; None where the system does not say.
    """

    value: int
    measured: bool
    note: str
    load: float | None = None

    @property
    def is_settled(self) -> bool:
        """True if the step was measured on a machine that had time for it, so that it may be stored."""
        return self.measured and (self.load is None or self.load <= BUSY)


def step(device: str) -> int:
    """Multiple of channels that the kernels of a provider prefer.

    Args:
        device: ``cpu``, ``cuda`` or ``auto``.

    Returns:
        The value of :func:`find_step`.
    """
    return find_step(device).value


@cache
def find_step(device: str) -> Step:
    """Measures which widths are fast, on stacks of 3x3 convolutions of 64 to 128 channels.

    The measurement takes about one second, once per process. On the CPU it uses one thread: the blocking of channels
    does not depend on threads, but the noise does.

    Args:
        device: ``cpu``, ``cuda`` or ``auto``.

    Returns:
        The multiple of channels.
    """
    device = resolve_device(device)
    batch, size, threads = (64, 28, None) if device == "cuda" else (1, 14, 1)
    sessions = [Session(_stack(w, batch, size), device, threads, spin=True) for w in STEP_WIDTHS]
    feed = [{"x": np.ones(1, np.float32)}]
    _, medians = interleave([caller(s, feed) for s in sessions], STEP_SECONDS)
    return replace(judge_step(medians, device), load=machine_load())


def judge_step(times: Floats, device: str) -> Step:
    """Chooses the step from times at 64, 64 + 1, 64 + 2, 64 + 4, ..., 64 + 32 and 128 channels.

    A step s pays if narrowing from 64 + 2s channels to 64 + s saves at least half of the time that a smooth curve
    through 64 and 128 channels predicts. The result is the smallest s such that it and all larger ones pay. Even and
    odd rounds must agree, or differ by a factor of two (then the larger one counts); otherwise the default of the
    device is used.

    Args:
        times: Measured times (rounds, len(STEP_WIDTHS)).
        device: ``cpu`` or ``cuda``.

    Returns:
        The step.
    """
    halves = [_judge_half(times[start::2]) for start in (0, 1)]
    steps = [step for step in halves if step]
    if len(steps) == 2 and max(steps) <= 2 * min(steps):
        value = max(steps)
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
    """Smallest step that pays by the times of some rounds; None if they are inconclusive."""
    if len(times) < 2:
        return None
    calm = quiet(times)
    power = math.log(calm[-1] / calm[0]) / math.log(WIDE / NARROW)
    if not 1 < power < 3:
        return None  # overhead or noise hides the arithmetic
    value = None
    for s in CANDIDATES:
        i = STEP_WIDTHS.index(NARROW + s)
        width_ratio = (NARROW + s) / STEP_WIDTHS[i + 1]
        predicted_saving = calm[i + 1] * (1 - width_ratio**power)
        if calm[i + 1] - calm[i] < predicted_saving / 2:
            break
        value = s
    return value


def _stack(
    width: int,
    batch: int,
    size: int,
    depth: int = 3,
) -> onnx.ModelProto:
    """Convolutions of one width on a constant image, which the graph makes itself so that no large input is copied."""
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
