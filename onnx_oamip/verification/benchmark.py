"""Model files timed side by side, on given samples or on random numbers: what the ``bench`` command shows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx_oamip.core.errors import DataError, ModelError
from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import Array, Model
from onnx_oamip.data import dataset
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.runtime import resolve_device
from onnx_oamip.graph.shape_inference import symbol
from onnx_oamip.verification import latency
from onnx_oamip.verification.latency import Timing

Feeds = list[dict[str, Array]]


@dataclass(frozen=True)
class Benchmark:
    """Timings of ``models`` by batch size, in the models' order. ``source`` is None where random numbers were fed."""

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
    device: str = "auto",
    threads: int | None = None,
    seconds: float = 10.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Benchmark:
    """Time models that take the same inputs, at each batch size for about ``seconds`` seconds.

    Times do not depend on values, so that without ``source`` random numbers at the first model's shapes do. Without
    ``batches`` one sample is run at a time, or as many as the model is fixed to.
    """
    device = resolve_device(device)
    dataset.check_extras(source)
    loaded = tuple(models.load(path) for path in paths)
    _same_inputs(loaded)
    samples = (
        None
        if source is None
        else dataset.load(source, loaded[0], dataset.EVALUATION) or dataset.load(source, loaded[0])
    )
    timings: dict[int, tuple[Timing, ...]] = {}
    wanted: list[int | None] = [*dict.fromkeys(batches)] or [None]
    for done, batch in enumerate(wanted):
        if progress:
            progress("bench", done, len(wanted))
        feeds, size = _feeds(loaded[0], samples, batch, seed)
        names = [m.path for m in loaded]
        timings[size] = latency.bench(
            names, feeds, device, threads, seconds, names=names, seed=seed
        )
    return Benchmark(
        loaded, timings, device, threads, seconds, None if samples is None else samples.source
    )


def _same_inputs(loaded: Sequence[Model]) -> None:
    first = loaded[0]
    for other in loaded[1:]:
        ours, theirs = (
            {(p.name, p.dtype.name, len(p.dims)) for p in m.inputs} for m in (first, other)
        )
        if ours != theirs:
            names = [
                ", ".join(f"{n} ({kind}, rank {rank})" for n, kind, rank in sorted(s))
                for s in (ours, theirs)
            ]
            raise ModelError(
                f"{first.path} takes {names[0]} but {other.path} takes {names[1]}; models timed side by side need the "
                "same inputs."
            )


def _feeds(
    model: Model, samples: Samples | None, batch: int | None, seed: int
) -> tuple[Feeds, int]:
    """Feeds of ``batch`` samples, and how many one really holds. Raises DataError where that is another number."""
    where = model.path
    if samples is None:
        free = {symbol(p, 0) for p in model.inputs if len(p.dims) > 1}
        bound = {name: batch for name in free if name is not None and batch is not None}
        samples = dataset.placeholder(models.rebind(model, bound), seed, latency.FEEDS)
    elif samples.fixed_batch is None:
        where = samples.source
    feeds = latency.feeds_of(samples, batch or 1)
    first = next(iter(feeds[0].values()))
    size = len(first) if first.ndim else 1
    if batch is not None and size != batch:
        raise DataError(
            f"`batch={batch}` cannot be timed: {where} gives {size} samples at a time; leave `batch` out."
        )
    return feeds, size
