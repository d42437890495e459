"""Calibration and evaluation data as samples, checked against the model and split into feeds.

Format of ``.npz`` (``.npy`` for a model with one input): arrays by input name, optional ``labels``. Axis 0 counts
samples: an array of the input's rank is batched along axis 0, one of rank + 1 holds one whole feed per index. An
integer array for a floating input needs the meaning of its codes: ``NAME.scale`` and optional ``NAME.offset`` give
``value * scale + offset``. Keys that start with ``eval.`` hold evaluation data in the same way. Other sources are
``module:function`` (``feed_functions``), folders of images (``images``) and Parquet files (``parquet``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import (
    Array,
    Ints,
    Model,
    Reading,
)
from onnx_oamip.data import (
    array_checks,
    feed_functions,
    images,
    numpy_files,
    out_of_core,
    parquet,
)
from onnx_oamip.data.array_checks import LABELS, OFFSET, SCALE, Scaling
from onnx_oamip.data.out_of_core import Values
from onnx_oamip.graph.shape_inference import symbol

EVALUATION = "eval."
"""Prefix of the keys that hold evaluation data."""
MAX_RANDOM_BYTES = 1 << 28
"""Size of random feeds for one input: large inputs get fewer."""
EVALUATION_PARTS = 5
"""One of this many parts of the samples is held out."""
_FORMATS = "an .npz, .npy or .parquet file, a folder of images, or module:function"


@dataclass(frozen=True)
class Samples:
    """Samples that were checked against a model.

    Attributes:
        arrays: Stored arrays by input name. Large ones may stay in a file, from which a feed reads its part.
        labels: Whole numbers or floats, samples along axis 0; None if unknown.
        count: Number of samples along axis 0.
        whole: True if every index is one whole feed (arrays have rank + 1).
        scales: Scale and offset by input. They are applied when a feed is made, so that compact arrays stay compact.
        dtypes: Type of each input.
        fixed_batch: Batch that the model is fixed to, None if it is free.
        source: Name of the source.
        origin: Indices of the samples in the source, None if these are all of them in order.
    """

    arrays: Mapping[str, Values]
    labels: Array | None
    count: int
    whole: bool
    scales: Mapping[str, Scaling]
    dtypes: Mapping[str, np.dtype[Any]]
    fixed_batch: int | None
    source: str
    origin: Ints | None = None

    @property
    def classes(self) -> Ints | None:
        """Labels that are one whole number per sample; None without such labels."""
        if self.labels is None or self.labels.ndim != 1 or self.labels.dtype.kind != "i":
            return None
        return self.labels

    def feed(self, index: Ints) -> dict[str, Array]:
        """Make one feed.

        Args:
            index: Indices of the samples, a single one for whole feeds.

        Returns:
            Arrays by input name.
        """
        feed = {}
        for name, stored in self.arrays.items():
            value = stored[int(index[0])] if self.whole else stored[index]
            if name in self.scales:
                scale, offset = self.scales[name]
                value = value.astype(np.float32) * scale + offset
            feed[name] = np.asarray(value, self.dtypes[name], order="C")
        return feed

    def feed_indices(self, size: int) -> Iterator[Ints]:
        """Split the samples into feeds.

        Args:
            size: Largest number of samples in a feed. A model with a fixed batch gets exactly that many.

        Yields:
            Indices of the samples of each feed, in order; samples that do not fill a fixed batch are left out.
        """
        step = 1 if self.whole else self.fixed_batch or size
        stop = self.usable()
        for start in range(0, stop, step):
            yield np.arange(start, min(start + step, stop), dtype=np.int64)

    def batches(self, size: int) -> Iterator[tuple[Ints, dict[str, Array]]]:
        """Make all feeds in order.

        Args:
            size: Largest number of samples in a feed, as in :meth:`feed_indices`.

        Yields:
            Indices of the samples, and their feed.
        """
        for index in self.feed_indices(size):
            yield index, self.feed(index)

    def usable(self) -> int:
        """Count the samples in the feeds.

        Returns:
            Number of samples that :meth:`batches` yields.
        """
        if self.fixed_batch and not self.whole:
            return self.count - self.count % self.fixed_batch
        return self.count

    def take(self, index: Ints) -> Samples:
        """Select samples.

        Args:
            index: Indices of the samples.

        Returns:
            The samples in that order.
        """
        arrays = {name: out_of_core.take(value, index) for name, value in self.arrays.items()}
        return replace(
            self,
            arrays=arrays,
            labels=None if self.labels is None else self.labels[index],
            count=len(index),
            origin=index if self.origin is None else self.origin[index],
        )

    def bindings(self, model: Model) -> dict[str, int]:
        """Determine the sizes of symbolic dimensions.

        Args:
            model: Model whose inputs have symbols.

        Returns:
            Size by symbol, for one sample per feed; for one feed if these are whole feeds.
        """
        sizes: dict[str, int] = {}
        for port in model.inputs:
            shape = self.arrays[port.name].shape[1:]
            if not self.whole:
                shape = (1, *shape)
            for axis in range(len(port.dims)):
                name = symbol(port, axis)
                if name is not None:
                    sizes.setdefault(name, int(shape[axis]))
        return sizes


def check_extras(*sources: str | os.PathLike[str] | Mapping[str, Array] | None) -> None:
    """Check that the optional packages for reading sources are installed.

    Args:
        sources: Sources that will be read.

    Raises:
        EnvironmentMissing: An extra is not installed.
    """
    for source in sources:
        if not isinstance(source, (str, os.PathLike)):
            continue
        path = Path(source)
        if path.is_dir():
            images.check_extra(os.fspath(source))
        elif path.suffix == ".parquet":
            parquet.check_extra(path)


class _Loaded(NamedTuple):
    """Arrays of a source by name, and the name of the source in messages."""

    arrays: dict[str, Values]
    where: str


def load(
    source: str | os.PathLike[str] | Mapping[str, Array],
    model: Model,
    prefix: str = "",
    reading: Reading | None = None,
) -> Samples | None:
    """Load data and check them against the model's inputs.

    Args:
        source: Path, ``module:function``, or arrays by name.
        model: Model that reads the data.
        prefix: ``EVALUATION`` for the evaluation part of the source, empty for the rest.
        reading: Reading of images and tables.

    Returns:
        The samples, or None if the source has no evaluation part.

    Raises:
        DataError: The data cannot be read or do not fit the model.
        EnvironmentMissing: An optional package is not installed.
    """
    if isinstance(source, Mapping):
        arrays, where = _native(source), "the data"
    else:
        path = Path(source)
        has_no_parts = path.is_dir() or path.suffix == ".parquet"
        if prefix == EVALUATION and has_no_parts:
            return None
        arrays, where = _read(os.fspath(source), model, reading or Reading())
    if prefix == EVALUATION:
        evaluation = _evaluation_part(arrays)
        if not evaluation:
            return None
        return _samples(evaluation, model, where)
    calibration = {key: v for key, v in arrays.items() if not key.startswith(EVALUATION)}
    return _samples(calibration, model, where)


def _evaluation_part(arrays: Mapping[str, Values]) -> dict[str, Values]:
    """Arrays of the evaluation part, empty if there are none. Scales hold for both parts."""
    scales = {}
    part = {}
    for key, value in arrays.items():
        if key.startswith(EVALUATION):
            part[key.removeprefix(EVALUATION)] = value
        if key.endswith((SCALE, OFFSET)):
            scales[key] = value
    return {**scales, **part} if part else {}


def _native(source: Mapping[str, Array]) -> dict[str, Values]:
    """A caller's own arrays, by name and in this machine's byte order."""
    for name in source:
        if not isinstance(name, str):
            raise DataError(
                f"the data has the key {name!r}, which is no name of an input; keys are names."
            )
    try:
        return {name: out_of_core.native(np.asarray(value)) for name, value in source.items()}
    except ValueError as error:
        raise DataError(
            f"the data holds something that is no array of numbers: {error}."
        ) from error


def _read(source: str, model: Model, reading: Reading) -> _Loaded:
    path = Path(source)
    if path.is_dir():
        return _read_images(path, source, model, reading)
    is_file_name = path.suffix in {".npz", ".npy", ".parquet"}
    if ":" in source and not path.exists() and not is_file_name:
        return _Loaded(feed_functions.load(source), source)
    if not path.exists():
        raise DataError(f"{source}: no such data file; give {_FORMATS}.")
    if path.suffix == ".parquet":
        return _Loaded(parquet.load(path, model, reading), source)
    return _Loaded(_read_numpy(path, model), str(path))


def _read_images(path: Path, source: str, model: Model, reading: Reading) -> _Loaded:
    if len(model.inputs) != 1:
        names = ", ".join(port.name for port in model.inputs)
        raise DataError(
            f"{source} is a folder of images, but the model has the inputs {names}; give an .npz."
        )
    port = model.inputs[0]
    folder = images.load_folder(path, port, reading)
    scale, offset = images.scaling(port, reading, folder.where)
    arrays: dict[str, Values] = {
        port.name: folder.codes,
        port.name + SCALE: scale,
        port.name + OFFSET: offset,
    }
    if folder.labels is not None:
        arrays[LABELS] = folder.labels
    return _Loaded(arrays, folder.where)


def _read_numpy(path: Path, model: Model) -> dict[str, Values]:
    loaded = numpy_files.load(path)
    if isinstance(loaded, dict):
        return loaded
    if len(model.inputs) != 1:
        names = ", ".join(port.name for port in model.inputs)
        raise DataError(
            f"{path} holds one array but the model has the inputs {names}; use an .npz with those names."
        )
    return {model.inputs[0].name: loaded}


def _samples(loaded: dict[str, Values], model: Model, where: str) -> Samples:
    """Check arrays and make samples of them."""
    array_checks.check_names(loaded, model, where)
    arrays: dict[str, Values] = {}
    scales: dict[str, Scaling] = {}
    extra_ranks = set()
    for port in model.inputs:
        array = loaded[port.name]
        scaling = array_checks.check_scaling(loaded, array, port, where)
        array_checks.check_array(array, port, scaled=scaling is not None, where=where)
        arrays[port.name] = array
        if scaling is not None:
            scales[port.name] = scaling
        extra_ranks.add(array.ndim - len(port.dims))
    if len(extra_ranks) > 1:
        raise DataError(
            f"{where} mixes batched arrays and whole feeds; give every input the same kind."
        )
    count = array_checks.check_count(arrays, where)
    whole = extra_ranks == {1}
    fixed_batch = None if whole else _fixed_batch(model)
    if fixed_batch and count < fixed_batch:
        raise DataError(
            f"{where} holds {count} samples but the model takes {fixed_batch} at a time; give at least {fixed_batch}."
        )
    labels = None
    # An input may be called "labels"; then its array is data.
    if LABELS in loaded and LABELS not in arrays:
        labels = array_checks.check_labels(loaded[LABELS], count, where)
    return Samples(
        arrays=arrays,
        labels=labels,
        count=count,
        whole=whole,
        scales=scales,
        dtypes={port.name: port.dtype for port in model.inputs},
        fixed_batch=fixed_batch,
        source=where,
    )


def _fixed_batch(model: Model) -> int | None:
    """Batch that the first input is fixed to, None if it is free."""
    dims = model.inputs[0].dims
    if dims and isinstance(dims[0], int) and dims[0] > 0:
        return dims[0]
    return None


def hold_out(samples: Samples, seed: int) -> tuple[Samples, Samples]:
    """Hold out a part of the samples for evaluation.

    Args:
        samples: Samples to split.
        seed: Seed of the random choice.

    Returns:
        Calibration samples (four fifths) and evaluation samples (one fifth), in their original order. Too few samples
        to split are returned as both.
    """
    if samples.count < 2:
        return samples, samples
    order = np.random.default_rng(seed).permutation(samples.count)
    held_out = max(1, samples.count // EVALUATION_PARTS)
    if samples.fixed_batch:
        held_out = max(samples.fixed_batch, held_out - held_out % samples.fixed_batch)
        if samples.count - held_out < samples.fixed_batch:
            return samples, samples
    calibration = np.sort(order[held_out:])
    evaluation = np.sort(order[:held_out])
    return samples.take(calibration), samples.take(evaluation)


def placeholder(model: Model, seed: int, count: int = 8) -> Samples:
    """Make random feeds. They only serve to compare graphs that must agree on any input, never for statistics.

    Args:
        model: Model that reads the feeds.
        seed: Seed of the values.
        count: Largest number of feeds.

    Returns:
        Whole feeds, as many as ``MAX_RANDOM_BYTES`` allow, at least one.
    """
    rng = np.random.default_rng(seed)
    sizes = [math.prod(model.shapes[p.name]) * p.dtype.itemsize for p in model.inputs]
    largest = max(sizes, default=0)
    count = min(count, max(1, MAX_RANDOM_BYTES // max(largest, 1)))
    arrays: dict[str, Values] = {}
    for port in model.inputs:
        shape = (count, *model.shapes[port.name])
        floating = port.dtype.kind not in "iub"
        values = rng.standard_normal(shape) if floating else rng.integers(0, 2, shape)
        arrays[port.name] = values.astype(port.dtype)
    return Samples(
        arrays=arrays,
        labels=None,
        count=count,
        whole=True,
        scales={},
        dtypes={port.name: port.dtype for port in model.inputs},
        fixed_batch=None,
        source="random feeds",
    )
