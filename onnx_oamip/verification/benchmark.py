"""Benchmark: times model files side by side on given samples or on random numbers, for the ``bench`` command."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx_oamip.core.errors import DataError, ModelError
from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import Array, Model
from onnx_oamip.data import dataset, layouts
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph import loading as models
from onnx_oamip.graph import op_libraries
from onnx_oamip.graph.runtime import resolve_device
from onnx_oamip.graph.shape_inference import symbol
from onnx_oamip.verification import latency
from onnx_oamip.verification.latency import Timing

Feeds = list[dict[str, Array]]


@dataclass(frozen=True)
class Benchmark:
    """Result of a benchmark.

    Attributes:
        models: The models.
        timings: Measurements in the order of the models, by batch size.
        device: ``cpu`` or ``cuda``.
        threads: Threads within an operator; None for the choice of ONNX Runtime.
        seconds: Time per batch size.
        source: Where the samples come from; None for random numbers.
    """

    models: tuple[Model, ...]
    timings: Mapping[int, tuple[Timing, ...]]
    device: str
    threads: int | None
    seconds: float
    source: str | None


def run(
    paths: Sequence[str | os.PathLike[str]],
    source: str | os.PathLike[str] | Mapping[str, Array] | None = None,
    batches: Sequence[int] = (),
    *,
    device: str = "auto",
    threads: int | None = None,
    seconds: float = 10.0,
    seed: int = 0,
    progress: Progress | None = None,
    stated: Mapping[str, tuple[int, ...]] | None = None,
    op_library: Sequence[str] = (),
) -> Benchmark:
    """Times models that take the same inputs.

    Args:
        paths: Model files.
        source: Samples to run on. Default: random numbers in the shapes of the first model, as times do not depend on
            values.
        batches: Batch sizes. Default: one sample, or as many as the model is fixed to.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: Threads within an operator. Default: the choice of ONNX Runtime.
        seconds: Approximate time per batch size.
        seed: Seed of the order and of random numbers.
        progress: Receives the number of batch sizes done.
        stated: Lengths by name of an input or of a symbolic dimension, for random numbers.
        op_library: Shared libraries of custom operators.

    Returns:
        The measurements.

    Raises:
        ModelError: A model cannot be loaded, or its inputs differ from those of the first.
        DataError: The samples do not fit the model or a batch size.
    """
    op_libraries.use(op_library)
    device = resolve_device(device)
    dataset.check_extras(source)
    loaded = tuple(models.load(path, stated=stated) for path in paths)
    _same_inputs(loaded)
    samples = None
    if source is not None:
        held_out = dataset.load(source, loaded[0], dataset.EVALUATION)
        samples = held_out or dataset.load(source, loaded[0])
    timings: dict[int, tuple[Timing, ...]] = {}
    wanted: list[int | None] = [*dict.fromkeys(batches)] or [None]
    for done, batch in enumerate(wanted):
        if progress:
            progress("bench", done, len(wanted))
        feeds, size = _feeds(loaded[0], samples, batch, seed)
        names = [m.path for m in loaded]
        timings[size] = latency.bench(
            names,
            feeds,
            device,
            threads,
            seconds=seconds,
            names=names,
            seed=seed,
        )
    origin = None if samples is None else samples.source
    return Benchmark(loaded, timings, device, threads, seconds, origin)


def _same_inputs(loaded: Sequence[Model]) -> None:
    """Raises ModelError if the models do not have the same inputs."""
    first = loaded[0]
    for other in loaded[1:]:
        if _inputs(first) != _inputs(other):
            raise ModelError(
                f"{first.path} takes {_described(_inputs(first))} but {other.path} takes {_described(_inputs(other))}; "
                "models timed side by side need the same inputs."
            )


def _inputs(model: Model) -> set[tuple[str, str, int]]:
    """Name, element type and rank of every input."""
    return {(port.name, port.dtype.name, len(port.dims)) for port in model.inputs}


def _described(inputs: set[tuple[str, str, int]]) -> str:
    return ", ".join(f"{name} ({dtype}, rank {rank})" for name, dtype, rank in sorted(inputs))


def _feeds(
    model: Model,
    samples: Samples | None,
    batch: int | None,
    seed: int,
) -> tuple[Feeds, int]:
    """Feeds of ``batch`` samples, and the number that each one has. Raises DataError if the two differ."""
    where = model.path
    if samples is None:
        axes = (
            (port, layouts.batch_axis(port, model)) for port in model.inputs if len(port.dims) > 1
        )
        free = {symbol(port, axis) for port, axis in axes if axis is not None}
        bound = {name: batch for name in free if name is not None and batch is not None}
        samples = dataset.placeholder(models.rebind(model, bound), seed, latency.FEEDS)
    elif samples.fixed_batch is None:
        where = samples.source
    feeds = latency.feeds_of(samples, batch or 1)
    size = samples.feed_size(feeds[0])
    if batch is not None and size != batch:
        raise DataError(
            f"`batch={batch}` cannot be timed: {where} gives {size} samples at a time; leave `batch` out."
        )
    return feeds, size
