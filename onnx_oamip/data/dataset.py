"""Calibration and evaluation data as samples, checked against the model and split into feeds.

Format of ``.npz`` (``.npy`` for a model with one input): arrays by input name, optional ``labels``, optional ``groups``
that say what each sample is a part of. Axis 0 counts samples; ``layouts`` has all layouts of an array. An integer array
for a floating input needs the meaning of its codes: ``NAME.scale`` and optional ``NAME.offset`` give
``value * scale + offset``. Keys that start with ``eval.`` hold evaluation data in the same way. A key that is the name
of an input is that input, whatever it starts or ends with. ``formats`` lists the other sources.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.foreign_code import described, foreign_code
from onnx_oamip.core.records import (
    Array,
    Floats,
    Ints,
    Model,
    Port,
    Reading,
)
from onnx_oamip.core.regular_files import refuse_special
from onnx_oamip.data import (
    array_checks,
    division,
    feed_functions,
    formats,
    in_memory,
    layouts,
    out_of_core,
    unequal,
)
from onnx_oamip.data.array_checks import GROUPS, LABELS, OFFSET, SCALE, Scaling
from onnx_oamip.data.layouts import Layout
from onnx_oamip.data.loaded import Loaded
from onnx_oamip.data.unequal import FeedCollector, Stored, UnequalArrays, as_text
from onnx_oamip.graph import batch_symbols
from onnx_oamip.graph.loading import rebind
from onnx_oamip.graph.shape_inference import symbol

EVALUATION = "eval."
"""Prefix of the keys that hold evaluation data."""
MAX_RANDOM_BYTES = 1 << 26
"""Size of random feeds for one input: large inputs get fewer."""
EVALUATION_PARTS = 5
"""One of this many parts of the samples is held out."""
DOMINANT = 0.8
"""Share of all labels, or of all decisions, above which a class is the background and the others are rare."""


class Items(Protocol):
    """Samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> Any: ...


FeedIterable = Iterable[Any] | Items
"""Samples in memory, see ``in_memory``."""


@dataclass(frozen=True)
class Samples:
    """Samples that were checked against a model.

    Attributes:
        arrays: Stored arrays by input name. Large ones may stay in a file, from which a feed reads its part. One that
            all feeds share has length 1 on axis 0.
        labels: Whole numbers or floats, samples along axis 0; None if unknown.
        groups: Group of each sample, such as the recording that it is a part of (count,); None if the data name none.
        count: Number of samples.
        layouts: Layout of each array.
        scales: Scale and offset by input. They are applied when a feed is made, so that compact arrays stay compact.
        dtypes: Type of each input.
        fixed_batch: Batch that the model is fixed to, None if it is free.
        source: Name of the source.
        origin: Indices of the samples in the source, None if these are all of them in order.
        reading: How images were read, for the report; None without images.
        notes: Remarks for the report.
        in_source: Number of samples in the source; None without one.
    """

    arrays: Mapping[str, Stored]
    labels: Array | None
    count: int
    layouts: Mapping[str, Layout]
    scales: Mapping[str, Scaling]
    dtypes: Mapping[str, np.dtype[Any]]
    fixed_batch: int | None
    source: str
    origin: Ints | None = None
    reading: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    groups: Array | None = None
    in_source: int | None = None

    @property
    def whole(self) -> bool:
        """True if every sample is a feed of its own: whole feeds, or arrays of unequal shapes."""
        return self.unequal or any(layout.kind == "feed" for layout in self.layouts.values())

    @property
    def unequal(self) -> bool:
        """True if arrays of one input have unequal shapes."""
        return any(isinstance(stored, UnequalArrays) for stored in self.arrays.values())

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
            value = layouts.feed_of(stored, self.layouts[name], index)
            if name in self.scales:
                scale, offset = self.scales[name]
                value = value.astype(np.float32) * scale + offset
            feed[name] = np.asarray(value, self.dtypes[name], order="C")
        return feed

    def feed_size(self, feed: Mapping[str, Array]) -> int:
        """Count the samples in a feed by the batch axes of its inputs.

        Args:
            feed: A feed of these samples.

        Returns:
            Number of samples; 1 for inputs without a batch.
        """
        for name, (kind, axis, _) in self.layouts.items():
            if kind != "shared" and axis is not None and feed[name].ndim > axis:
                return int(feed[name].shape[axis])
        return 1

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
        arrays = {name: self._take(name, index) for name in self.arrays}
        return replace(
            self,
            arrays=arrays,
            labels=None if self.labels is None else self.labels[index],
            groups=None if self.groups is None else self.groups[index],
            count=len(index),
            origin=index if self.origin is None else self.origin[index],
        )

    def first(self, count: int) -> Samples:
        """Select the first samples.

        Args:
            count: Number of samples; a fixed batch gets at least one whole feed.

        Returns:
            At most that many samples.
        """
        wanted = max(count, self.fixed_batch or 1)
        return self if wanted >= self.count else self.take(np.arange(wanted))

    def _take(self, name: str, index: Ints) -> Stored:
        stored = self.arrays[name]
        if self.layouts[name].kind == "shared":
            return stored
        return (
            stored.take(index)
            if isinstance(stored, UnequalArrays)
            else out_of_core.take(stored, index)
        )

    def bindings(self, model: Model) -> dict[str, int]:
        """Determine the sizes of symbolic dimensions.

        Args:
            model: Model whose inputs have symbols.

        Returns:
            Size by symbol, for one sample per feed; for one feed if these are whole feeds, and for the one of median
            size if their shapes are unequal.
        """
        sizes: dict[str, int] = {}
        place = self._median()
        for port in model.inputs:
            shape = layouts.feed_shape(self.arrays[port.name], self.layouts[port.name], place)
            for axis in range(len(port.dims)):
                name = symbol(port, axis)
                if name is not None:
                    sizes.setdefault(name, int(shape[axis]))
        return sizes

    def largest(self) -> int:
        """Find the feed with the most values where shapes are unequal.

        Returns:
            Its index; 0 if all shapes are equal.
        """
        return int(self._by_size()[-1])

    def _median(self) -> int:
        """Index of the feed of median size."""
        order = self._by_size()
        return int(order[len(order) // 2])

    def _by_size(self) -> Ints:
        """Indices of the feeds of unequal shapes by rising number of values; 0 alone if all shapes are equal."""
        sizes = [a.sizes for a in self.arrays.values() if isinstance(a, UnequalArrays)]
        if not sizes:
            return np.zeros(1, np.int64)
        return np.argsort(np.sum(sizes, axis=0), kind="stable")


def check_extras(
    *sources: str | os.PathLike[str] | Mapping[str, Array] | FeedIterable | None,
) -> None:
    """Check that the optional packages for reading sources are installed.

    Args:
        sources: Sources that will be read.

    Raises:
        EnvironmentMissing: An extra is not installed.
    """
    for source in sources:
        if not isinstance(source, (str, os.PathLike)):
            continue
        entry = formats.matching(os.fspath(source))
        if entry is not None and entry.check_extra is not None:
            entry.check_extra(os.fspath(source))


def load(
    source: str | os.PathLike[str] | Mapping[str, Array] | FeedIterable,
    model: Model,
    prefix: str = "",
    reading: Reading | None = None,
) -> Samples | None:
    """Load data and check them against the model's inputs.

    Args:
        source: Path, ``module:function``, or samples in memory (``in_memory``).
        model: Model that reads the data.
        prefix: ``EVALUATION`` for the evaluation part of the source, empty for the rest.
        reading: Reading of images and tables.

    Returns:
        The samples, or None if the source has no evaluation part.

    Raises:
        DataError: The data cannot be read or do not fit the model.
        EnvironmentMissing: An optional package is not installed.
    """
    if prefix == EVALUATION and not _has_parts(source):
        return None
    reading = reading or Reading()
    has_columns = False
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        refuse_special(Path(name), "the data", DataError)
        entry = formats.find(name)
        loaded = entry.read(name, model, reading)
        has_columns = entry.has_columns
    else:
        with foreign_code("the data", DataError, feed_functions.ADVICE):
            named = in_memory.by_name(source, model, reading.most)
        if isinstance(named.samples, Mapping):
            loaded = Loaded(_native(named.samples), "the data")
        else:
            loaded = feed_functions.collect(named.samples, "the data", named.most)
    if note := _unused_options(reading, loaded, has_columns):
        loaded = replace(loaded, notes=(*loaded.notes, note))
    inputs = {port.name for port in model.inputs}
    held_out = {k for k in loaded.arrays if k.startswith(EVALUATION) and k not in inputs}
    if prefix == EVALUATION:
        evaluation = _evaluation_part(loaded.arrays, held_out)
        if not held_out:
            return None
        array_checks.check_names(evaluation, model, loaded.where, prefix=EVALUATION)
        return _samples(replace(loaded, arrays=evaluation), model)
    calibration = {key: v for key, v in loaded.arrays.items() if key not in held_out}
    array_checks.check_names(calibration, model, loaded.where, held_out=held_out)
    return _samples(replace(loaded, arrays=calibration), model)


def _unused_options(reading: Reading, loaded: Loaded, has_columns: bool) -> str:
    """Note on options that were given and that the source has no use for, empty without any."""
    usual = Reading()
    of_images = {
        f"image_{field}": getattr(reading, field) != getattr(usual, field)
        for field in ("size", "fit", "scale", "mean", "std", "layout", "color")
    }
    unused = [name for name, is_given in of_images.items() if is_given and loaded.reading is None]
    if reading.column is not None and not has_columns:
        unused.append("column")
    if not unused:
        return ""
    named = ", ".join(f"`{name}`" for name in unused)
    verb = "has" if len(unused) == 1 else "have"
    is_of_arrays = loaded.reading is None
    why = "its arrays are fed as they are" if is_of_arrays else "it has no columns"
    return f"{named} {verb} no effect on {loaded.where}: {why}"


def _has_parts(source: object) -> bool:
    """True if a source may hold evaluation data under names of their own."""
    if isinstance(source, (str, os.PathLike)):
        return formats.find(os.fspath(source)).has_parts
    return isinstance(source, Mapping)


def _evaluation_part(arrays: Mapping[str, Stored], held_out: set[str]) -> dict[str, Stored]:
    """Arrays of the evaluation part by input name. Scales hold for both parts."""
    scales = {key: v for key, v in arrays.items() if key.endswith((SCALE, OFFSET))}
    part = {key.removeprefix(EVALUATION): arrays[key] for key in held_out}
    return {**{key: v for key, v in scales.items() if key not in held_out}, **part}


def _native(source: Mapping[str, Any]) -> dict[str, Stored]:
    """A caller's own arrays, by name and in this machine's byte order."""
    for name in source:
        if not isinstance(name, str):
            raise DataError(
                f"the data has the key {name!r}, which is no name of an input; keys are names."
            )
    return {name: _stored(name, value) for name, value in source.items()}


def _stored(name: str, value: Any) -> Stored:
    """One array of a caller, or one per sample where their shapes are unequal."""
    try:
        array = as_text(np.asarray(value))
    except ValueError:
        # numpy refuses lists of unequal lengths.
        array = np.empty(0, object)
    if array.dtype != object or (isinstance(value, np.ndarray) and array.ndim != 1):
        return out_of_core.native(array)
    if array.ndim == 0 and array.size:
        raise DataError(
            f"the data: '{name}' is a {type(value).__name__}; expected an array of numbers, samples along axis 0."
        )
    collector = FeedCollector("the data")
    for sample in value:
        if sample is None or isinstance(sample, (dict, set)):
            raise DataError(
                f"the data: array '{name}' holds Python objects; expected numbers, or a list of arrays."
            )
        try:
            array = np.asarray(sample)
        except ValueError as error:  # a list of unequal lengths within one sample
            raise DataError(
                f"the data: sample {collector.count} of '{name}' is no array of numbers: {described(error)}; give "
                "one array per sample."
            ) from error
        collector.append({name: array})
    if not collector.count:
        raise DataError(f"the data holds no samples for '{name}'; at least one is needed.")
    return collector.finish()[name]


def _samples(loaded: Loaded, model: Model) -> Samples:
    """Check arrays and make samples of them."""
    given, where = loaded.arrays, loaded.where
    scales: dict[str, Scaling] = {}
    given = _rebatched(given, model)
    inputs = {port.name: _as_column(given[port.name], port) for port in model.inputs}
    for port in model.inputs:
        array = inputs[port.name]
        scaling = array_checks.check_scaling(given, array, port, model, where)
        array_checks.check_type(array, port, scaled=scaling is not None, where=where)
        if scaling is not None:
            scales[port.name] = scaling
    # An input may be called "labels"; then its array is data.
    is_labelled = LABELS in given and LABELS not in inputs
    labelled = array_checks.length(given[LABELS]) if is_labelled else None
    found, count = array_checks.find_layouts(inputs, model, where, labelled)
    doubt = layouts.doubt(inputs, found, model) if count != labelled else ""
    arrays = {name: layouts.arranged(array, found[name]) for name, array in inputs.items()}
    for port in model.inputs:
        array_checks.check_finite(arrays[port.name], port, where)
    labels = None
    if is_labelled:
        labels = array_checks.check_labels(given[LABELS], count, where)
    groups = None
    if GROUPS in given and GROUPS not in arrays:
        groups = array_checks.check_groups(given[GROUPS], count, where)
    samples = Samples(
        arrays=arrays,
        labels=labels,
        count=count,
        layouts=found,
        scales=scales,
        dtypes={port.name: port.dtype for port in model.inputs},
        fixed_batch=None,
        source=where,
        reading=loaded.reading,
        notes=(*loaded.notes, doubt) if doubt else loaded.notes,
        groups=groups,
        in_source=count,
    )
    if samples.whole:
        return samples
    fixed_batch = next(iter(layouts.batch_sizes(found, model)), None)
    if fixed_batch and count < fixed_batch:
        raise DataError(
            f"{where} holds {count} samples but the model takes {fixed_batch} at a time; give at least {fixed_batch}."
        )
    return replace(samples, fixed_batch=fixed_batch)


def at_data(model: Model, samples: Samples) -> Model:
    """Give a model the sizes of its data.

    Args:
        model: The model, at the sizes that settings state.
        samples: The data.

    Returns:
        The model with the shapes of one sample.

    Raises:
        DataError: A stated size is not that of the data. The dimension that counts samples may differ, and every one
            of unequal samples.
    """
    sizes = samples.bindings(model)
    if samples.unequal:
        kept = {name: model.bindings[name] for name in sizes if name not in model.assumed}
        return _at_sizes(model, {**sizes, **kept}, samples)
    counting = {
        symbol(port, _sample_axis(samples.layouts[port.name])) for port in model.inputs if port.dims
    }
    for name, size in sizes.items():
        stated = model.bindings[name]
        if name not in model.assumed and name not in counting and stated != size:
            raise DataError(
                f"`shape` states the length {stated} for '{name}', but {samples.source} has {size}; leave it out, or "
                "give samples of that length."
            )
    return _at_sizes(model, sizes, samples)


def _sample_axis(layout: Layout) -> int:
    """Axis that counts samples in batches; axis 0 of whole feeds and of shared values, whose length is free as well."""
    return (layout.axis or 0) if layout.kind == "batch" else 0


def _at_sizes(model: Model, sizes: Mapping[str, int], samples: Samples) -> Model:
    """The model at the sizes of its smallest feed, with the number of samples in it."""
    bound = rebind(model, sizes)
    axes = ((port.name, _counting_axis(port, model, samples)) for port in model.inputs)
    lengths = (bound.shapes[name][axis] for name, axis in axes if axis is not None)
    return replace(bound, batch=next(lengths, 1))


def _counting_axis(port: Port, model: Model, samples: Samples) -> int | None:
    """Axis of an input that counts samples; None where it has none, and where it may be another one of a whole feed."""
    layout, stored = samples.layouts[port.name], samples.arrays[port.name]
    if layout.kind == "batch":
        return layout.axis
    if layout.kind == "shared":
        return None
    axis = batch_symbols.shown_batch_axis(port, model.inputs, model.outputs)
    if axis is not None and isinstance(stored, UnequalArrays):
        is_varied = len(np.unique(stored.shapes[:, axis])) > 1  # as the nodes of graphs
        return None if is_varied else axis
    return axis


def _rebatched(arrays: Mapping[str, Stored], model: Model) -> Mapping[str, Stored]:
    """Batches of a loader, whose last one is smaller, as samples along axis 0; other arrays as they are."""
    names = {port.name for port in model.inputs} | ({LABELS, GROUPS} & set(arrays))
    batches = {
        name: array
        for name, array in arrays.items()
        if name in names and isinstance(array, UnequalArrays) and unequal.differ_in_length(array)
    }
    if set(batches) != names or not all(
        layouts.is_batched_freely(port, model) and batches[port.name].rank == len(port.dims)
        for port in model.inputs
    ):
        return arrays
    lengths = {tuple(array.shapes[:, 0].tolist()) for array in batches.values()}
    *full, last = min(lengths)
    # Two samples of different lengths look like two batches, unless labels are as long.
    is_loader = len(set(full)) == 1 and last < full[0] and (len(full) > 1 or LABELS in batches)
    if len(lengths) > 1 or not is_loader:
        return arrays
    return {**arrays, **{name: unequal.joined(array) for name, array in batches.items()}}


def _as_column(array: Stored, port: Port) -> Stored:
    """One value per sample as a column, for inputs such as the ``[N, 1]`` of a table's columns."""
    if not isinstance(array, UnequalArrays) and array.ndim == 1 and port.dims[1:] == (1,):
        return np.asarray(array)[:, None]
    return array


def hold_out(samples: Samples, seed: int) -> tuple[Samples, Samples]:
    """Hold out a part of the samples for evaluation.

    Args:
        samples: Samples to split.
        seed: Seed of the random choice.

    Returns:
        Calibration samples (four fifths) in random order, as :func:`shuffle` does, and evaluation samples (one fifth)
        in their original order, each with its share of rare labels. Where the samples have groups, whole ones are held
        out, and the shares may differ. Too few samples to split are returned as both.

    Raises:
        DataError: The groups cannot be divided.
    """
    if samples.count < 2:
        return samples, samples
    order = _random_order(samples, seed)
    if samples.groups is not None:
        return _hold_out_groups(samples, samples.groups, order, seed)
    rare = _rare_labels(samples)
    if rare is not None:
        # The first part gets the first of the rare samples.
        order = order[evenly(rare[order])[::-1]]
    held_out = max(1, samples.count // EVALUATION_PARTS)
    if samples.fixed_batch:
        held_out = max(samples.fixed_batch, held_out - held_out % samples.fixed_batch)
        if samples.count - held_out < samples.fixed_batch:
            return samples, samples
    evaluation = np.sort(order[:held_out])
    return samples.take(order[held_out:]), samples.take(evaluation)


def _hold_out_groups(
    samples: Samples, groups: Array, order: Ints, seed: int
) -> tuple[Samples, Samples]:
    """Calibration samples in an order, and evaluation samples of other groups in their original order."""
    batch = samples.fixed_batch or 1
    wanted = max(batch, samples.count // EVALUATION_PARTS)
    chosen = division.held_out_groups(groups, wanted, seed, samples.classes)
    kept, held_out = order[~chosen[order]], np.flatnonzero(chosen)
    if min(len(kept), len(held_out)) < batch:
        raise DataError(
            f"{samples.source}: no choice of whole groups leaves the {batch} samples of a batch on both sides; give "
            "smaller groups, or held-out samples."
        )
    return samples.take(kept), samples.take(held_out)


def _rare_labels(samples: Samples) -> Floats | None:
    """Marks samples of all classes but the most frequent one, where that has nearly all; None where it has not."""
    if samples.classes is None:
        return None
    found, counts = np.unique(samples.classes, return_counts=True)
    most = counts.argmax()
    if not DOMINANT * samples.count < counts[most] < samples.count:
        return None
    marks: Floats = (samples.classes != found[most]).astype(np.float64)
    return marks


def evenly(rareness: Floats) -> Ints:
    """Order samples so that rare ones are spread evenly: each run of consecutive ones has its share of them.

    Args:
        rareness: A number per sample, larger for rarer ones.

    Returns:
        Indices of the samples. The rarest is the last, the next ones divide the rest in halves, quarters and so on (van
        der Corput's sequence). Samples that are equally rare stay in their order.
    """
    count = len(rareness)
    rarest_first = np.argsort(-rareness, kind="stable")
    place = np.arange(count)
    fraction = np.zeros(count)
    step = 0.5
    while place.any():
        fraction += step * (place % 2)
        place //= 2
        step /= 2
    result: Ints = rarest_first[np.argsort(-fraction, kind="stable")]
    return result


def shuffle(samples: Samples, seed: int) -> Samples:
    """Put samples into random order, so that any run of consecutive ones represents all.

    Stages use the first or the last samples only, as many as they need or as fit in memory; data are often sorted, by
    class for example.

    Args:
        samples: Samples in any order.
        seed: Seed of the order.

    Returns:
        The same samples.
    """
    return samples.take(_random_order(samples, seed))


def _random_order(samples: Samples, seed: int) -> Ints:
    return np.random.default_rng(seed).permutation(samples.count)


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
    arrays: dict[str, Stored] = {}
    for port in model.inputs:
        arrays[port.name] = _random_values((count, *model.shapes[port.name]), port.dtype, rng)
    return Samples(
        arrays=arrays,
        labels=None,
        count=count,
        layouts={p.name: Layout("feed", layouts.batch_axis(p, model)) for p in model.inputs},
        scales={},
        dtypes={port.name: port.dtype for port in model.inputs},
        fixed_batch=None,
        source="random feeds",
    )


def _random_values(
    shape: tuple[int, ...], dtype: np.dtype[Any], rng: np.random.Generator
) -> Stored:
    """Zeros and ones for integers, truth values and texts, normal values for all others."""
    if dtype.kind == "O":
        texts: Array = rng.integers(0, 2, shape).astype(np.str_).astype(object)
        return texts
    if dtype.kind in "iub":
        return rng.integers(0, 2, shape, dtype=np.int8).astype(dtype, copy=False)
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype, copy=False)
