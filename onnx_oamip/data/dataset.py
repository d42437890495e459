"""Calibration and evaluation data: what a file holds, checked against the model, cut into feeds.

Format of ``.npz`` (``.npy`` for a model with one input): arrays by input name, optional ``labels``. Axis 0 counts
samples: an array of the input's rank is batched along axis 0, one of rank + 1 holds one whole feed per index. An
integer array for a floating input must say what its codes mean: ``NAME.scale`` and optional ``NAME.offset`` give
``value * scale + offset``. Keys that start with ``eval.`` hold evaluation data in the same way.
``module:function`` names a callable that yields feeds (dicts by input name), or an object with ``get_next()`` as ONNX
Runtime's CalibrationDataReader has it. A folder of images and a Parquet file are read as ``Reading`` says
(``pictures``, ``parquet``).
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import (
    Array,
    Ints,
    Model,
    Port,
    Reading,
)
from onnx_oamip.data import (
    images,
    numpy_files,
    out_of_core,
    parquet,
)
from onnx_oamip.data.out_of_core import Spool, Values
from onnx_oamip.graph.shape_inference import symbol

EVALUATION = "eval."
LABELS = "labels"
FEW_BYTES = 1 << 28
"""Of random feeds: large inputs get fewer."""


@dataclass(frozen=True)
class Samples:
    """Checked arrays by input name, ``count`` samples along axis 0.

    ``whole``: every index is one whole feed (arrays have rank + 1). ``scales`` turns stored codes into values when a
    batch is cut, so that compact arrays stay compact; large arrays may stay in a file (``rows``), from which a feed
    reads its part. ``origin``: numbers of the samples in the source, where these are some of them.
    """

    arrays: Mapping[str, Values]
    labels: Ints | None
    count: int
    whole: bool
    scales: Mapping[str, tuple[Array, Array]]
    dtypes: Mapping[str, np.dtype[Any]]
    fixed_batch: int | None
    source: str
    origin: Ints | None = None

    def feed(self, index: Ints) -> dict[str, Array]:
        """One feed of the samples at ``index`` (a single one for whole feeds)."""
        feed = {}
        for name, stored in self.arrays.items():
            value = stored[int(index[0])] if self.whole else stored[index]
            if name in self.scales:
                scale, offset = self.scales[name]
                value = value.astype(np.float32) * scale + offset
            feed[name] = np.asarray(value, self.dtypes[name], order="C")
        return feed

    def divided(self, size: int) -> Iterator[Ints]:
        """Sample indices by feed. A model with a fixed batch gets exactly that many, the rest is left out."""
        step = 1 if self.whole else self.fixed_batch or size
        stop = self.usable()
        for start in range(0, stop, step):
            yield np.arange(start, min(start + step, stop), dtype=np.int64)

    def batches(self, size: int) -> Iterator[tuple[Ints, dict[str, Array]]]:
        """(sample indices, feed) in order, as :meth:`divided`."""
        for index in self.divided(size):
            yield index, self.feed(index)

    def usable(self) -> int:
        """Samples that batches() will give."""
        return (
            self.count - self.count % self.fixed_batch
            if self.fixed_batch and not self.whole
            else self.count
        )

    def take(self, index: Ints) -> Samples:
        """The samples at ``index``."""
        return replace(
            self,
            arrays={k: out_of_core.take(v, index) for k, v in self.arrays.items()},
            labels=None if self.labels is None else self.labels[index],
            count=len(index),
            origin=index if self.origin is None else self.origin[index],
        )

    def bindings(self, model: Model) -> dict[str, int]:
        """Sizes of symbolic dimensions under this data, for one sample a feed (whole feeds: for one feed)."""
        bound: dict[str, int] = {}
        for port in model.inputs:
            shape = (
                self.arrays[port.name].shape[1:]
                if self.whole
                else (1, *self.arrays[port.name].shape[1:])
            )
            for axis in range(len(port.dims)):
                name = symbol(port, axis)
                if name is not None:
                    bound.setdefault(name, int(shape[axis]))
        return bound


def check(*sources: str | os.PathLike[str] | Mapping[str, Array] | None) -> None:
    """Raise EnvironmentMissing where reading one of the sources needs an extra that is not installed."""
    for source in sources:
        if isinstance(source, (str, os.PathLike)):
            if Path(source).is_dir():
                images.check(os.fspath(source))
            elif Path(source).suffix == ".parquet":
                parquet.check(Path(source))


def load(
    source: str | os.PathLike[str] | Mapping[str, Array],
    model: Model,
    prefix: str = "",
    reading: Reading | None = None,
) -> Samples | None:
    """Read data and check it against the model's inputs.

    ``prefix`` picks the keys of a part (``eval.``); None is returned where the source has no such part. ``reading``
    says how images and tables are read. Raises DataError with one sentence: what was found, where, what was expected.
    """
    found: dict[str, Values]
    if isinstance(source, Mapping):
        found, where = _plain(source), "the data"
    else:
        path = Path(source)
        if prefix == EVALUATION and (path.is_dir() or path.suffix == ".parquet"):
            return None
        found, where = _read(os.fspath(source), model, reading or Reading())
    part = {k.removeprefix(EVALUATION): v for k, v in found.items() if k.startswith(EVALUATION)}
    if prefix == EVALUATION:
        if not part:
            return None
        # Scales are said once and hold for both parts.
        shared = {k: v for k, v in found.items() if k.endswith((".scale", ".offset"))}
        found = {**shared, **part}
    else:
        found = {k: v for k, v in found.items() if not k.startswith(EVALUATION)}
    return _check(found, model, where)


def _plain(source: Mapping[str, Array]) -> dict[str, Values]:
    """A caller's own arrays, by name and in this machine's byte order."""
    for name in source:
        if not isinstance(name, str):
            raise DataError(
                f"the data has the key {name!r}, which is no name of an input; keys are names."
            )
    try:
        return {name: numpy_files.native(np.asarray(value)) for name, value in source.items()}
    except ValueError as error:
        raise DataError(
            f"the data holds something that is no array of numbers: {error}."
        ) from error


_FORMS = "an .npz, .npy or .parquet file, a folder of images, or module:function"


def _read(source: str, model: Model, reading: Reading) -> tuple[dict[str, Values], str]:
    path = Path(source)
    if path.is_dir():
        if len(model.inputs) != 1:
            names = ", ".join(p.name for p in model.inputs)
            raise DataError(
                f"{source} is a folder of images, but the model has the inputs {names}; give an .npz."
            )
        port = model.inputs[0]
        codes, labels, where = images.folder(path, port, reading)
        scale, offset = images.affine(port, reading, where)
        found: dict[str, Values] = {
            port.name: codes,
            f"{port.name}.scale": scale,
            f"{port.name}.offset": offset,
        }
        return {**found, **({} if labels is None else {LABELS: labels})}, where
    if ":" in source and not path.exists() and path.suffix not in {".npz", ".npy", ".parquet"}:
        return _read_callable(source), source
    if not path.exists():
        raise DataError(f"{source}: no such data file; give {_FORMS}.")
    if path.suffix == ".parquet":
        return parquet.load(path, model, reading), source
    return _read_numpy(path, model), str(path)


def _read_numpy(path: Path, model: Model) -> dict[str, Values]:
    loaded = numpy_files.load(path)
    if isinstance(loaded, dict):
        return loaded
    if len(model.inputs) != 1:
        names = ", ".join(p.name for p in model.inputs)
        raise DataError(
            f"{path} holds one array but the model has the inputs {names}; use an .npz with those names."
        )
    return {model.inputs[0].name: loaded}


def _read_callable(source: str) -> dict[str, Values]:
    module_name, _, function = source.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module_name), function)()
        feeds = iter(made.get_next, None) if hasattr(made, "get_next") else iter(made)
        first = next(feeds, None)
    except Exception as error:  # the user's own code ran: whatever it raised is told as it is
        raise _raised(source, error) from error
    if not isinstance(first, Mapping) or not first:
        raise _no_feeds(source)
    # One index is one whole feed: feeds of a fixed shape stack, whatever their own batch is.
    wanted = {name: _shape_of(value) for name, value in first.items()}
    spools = {name: Spool(f"`data={source}`: what it yields for '{name}'") for name in first}
    count = 0
    feed: Any = first
    while feed is not None:
        if not isinstance(feed, Mapping):
            raise _no_feeds(source)
        for name, spool in spools.items():
            if name not in feed or _shape_of(feed[name]) != wanted[name]:
                what = (
                    f"'{name}' is {_told(_shape_of(feed[name]))}"
                    if name in feed
                    else f"there is no '{name}'"
                )
                raise DataError(
                    f"`data={source}` yields feeds of unequal names or shapes, or types (in the first '{name}' is "
                    f"{_told(wanted[name])}, in feed {count} {what}); make them equal."
                )
            spool.append(np.asarray(feed[name]))
        count += 1
        try:
            feed = next(feeds, None)
        except Exception as error:
            raise _raised(source, error) from error
    return {
        name: spools[name].finish((count, *shape), kind) for name, (shape, kind) in wanted.items()
    }


def _shape_of(value: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    found = np.asarray(value)
    return found.shape, found.dtype


def _told(about: tuple[tuple[int, ...], np.dtype[Any]]) -> str:
    return f"{about[1]} of shape {about[0]}"


def _raised(source: str, error: Exception) -> DataError:
    return DataError(
        f"`data={source}`: {type(error).__name__}: {error}; expected an importable module:function that yields feeds."
    )


def _no_feeds(source: str) -> DataError:
    return DataError(f"`data={source}` yielded no feeds; expected dicts of arrays by input name.")


def _check(found: dict[str, Values], model: Model, where: str) -> Samples:
    names = [p.name for p in model.inputs]
    if not names:
        raise DataError("the model has no inputs, so there is nothing to calibrate it with.")
    missing = [n for n in names if n not in found]
    if missing:
        have = (
            ", ".join(sorted(k for k in found if not k.endswith((".scale", ".offset"))))
            or "nothing"
        )
        raise DataError(
            f"{where} has arrays for {have} but the model's input is '{missing[0]}' "
            f"({_expected(model.port(missing[0]))}); name the array after the input."
        )
    known = {*names, LABELS, *(f"{n}.{s}" for n in names for s in ("scale", "offset"))}
    extra = sorted(set(found) - known)
    if extra:
        raise DataError(
            f"{where} has an array '{extra[0]}' that is no input of the model; inputs are {', '.join(names)}, "
            "and 'labels' is optional."
        )
    arrays, scales, dtypes, ranks = {}, {}, {}, set()
    for port in model.inputs:
        array = found[port.name]
        scale = _factor(found, f"{port.name}.scale", array, port, where)
        offset = _factor(found, f"{port.name}.offset", array, port, where)
        arrays[port.name] = _check_array(
            array, port, scale is not None or offset is not None, where
        )
        if scale is not None or offset is not None:
            one, nothing = np.ones((), np.float32), np.zeros((), np.float32)
            scales[port.name] = (
                one if scale is None else scale,
                nothing if offset is None else offset,
            )
        dtypes[port.name] = port.dtype
        ranks.add(array.ndim - len(port.dims))
    if len(ranks) > 1:
        raise DataError(
            f"{where} mixes batched arrays and whole feeds; give every input the same kind."
        )
    counts = {name: len(a) for name, a in arrays.items()}
    count = min(counts.values())
    if count == 0:
        raise DataError(
            f"{where} holds no samples; at least one is needed, a few hundred are better."
        )
    if len(set(counts.values())) > 1:
        raise DataError(
            f"{where} holds unequal numbers of samples ({counts}); axis 0 of every array counts samples."
        )
    whole = ranks == {1}
    first = model.inputs[0].dims[0] if model.inputs[0].dims else None
    fixed = first if isinstance(first, int) and first > 0 and not whole else None
    if fixed and count < fixed:
        raise DataError(
            f"{where} holds {count} samples but the model takes {fixed} at a time; give at least {fixed}."
        )
    given = None if LABELS in names else found.get(LABELS)
    labels = None if given is None else _check_labels(given, count, whole, where)
    return Samples(arrays, labels, count, whole, scales, dtypes, fixed, where)


def _factor(
    found: Mapping[str, Values], key: str, array: Values, port: Port, where: str
) -> Array | None:
    """A scale or an offset: one number, or numbers that meet a sample's channels as numpy broadcasts them."""
    if key not in found:
        return None
    given = found[key]
    if not np.issubdtype(given.dtype, np.number) or given.dtype.kind == "c":
        raise DataError(f"{where}: '{key}' must hold finite numbers.")
    sample = array.shape[array.ndim - len(port.dims) + 1 :]
    meets = all(a in (1, b) for a, b in zip(given.shape[::-1], sample[::-1], strict=False))
    if given.size != 1 and (given.ndim > len(sample) or not meets):
        raise DataError(
            f"{where}: '{key}' has shape {given.shape}, which does not broadcast to a sample's {sample}; give one "
            "number, or one for every channel as (C, 1, 1)."
        )
    value = np.asarray(given)  # only now: a small file may say that it holds much
    if not np.isfinite(value).all():
        raise DataError(f"{where}: '{key}' must hold finite numbers.")
    value = value.astype(np.float32)
    return np.asarray(value.reshape(()), np.float32) if value.size == 1 else value


_LAYOUTS = ((0, 3, 1, 2), (0, 2, 3, 1), (0, 2, 1), (0, 4, 1, 2, 3), (0, 2, 3, 4, 1))
"""Channels last to channels first and back."""


def _fits(shape: tuple[int, ...], dims: tuple[int | str | None, ...]) -> bool:
    """The shape has every length that is fixed."""
    pairs = zip(shape, dims, strict=True)
    return all(not isinstance(want, int) or want <= 0 or have == want for have, want in pairs)


def _expected(port: Port) -> str:
    dims = ", ".join("?" if d is None else str(d) for d in port.dims)
    return f"{port.dtype} [{dims}]"


def _check_array(array: Values, port: Port, scaled: bool, where: str) -> Values:
    label = f"{where}: array '{port.name}'"
    if array.dtype == object:
        raise DataError(f"{label} holds Python objects; expected {_expected(port)}.")
    ok = np.issubdtype(array.dtype, np.number) if scaled else array.dtype == port.dtype
    if not ok:
        hint = f"; convert it with array.astype('{port.dtype}')"
        if array.dtype.kind in "iu":
            hint += f", or say what its codes mean with '{port.name}.scale'"
        raise DataError(f"{label} is {array.dtype} but the model expects {_expected(port)}{hint}.")
    rank = len(port.dims)
    if array.ndim not in (rank, rank + 1) or array.ndim == 0:
        one = array.ndim == rank - 1 and _fits(array.shape, port.dims[1:])
        hint = "; for one sample write array[None]" if one else ""
        raise DataError(
            f"{label} has shape {array.shape} but the model expects {_expected(port)}: axis 0 counts samples{hint}."
        )
    shape = array.shape[1:] if array.ndim == rank + 1 else array.shape
    for axis, (have, want) in enumerate(zip(shape, port.dims, strict=True)):
        if (
            isinstance(want, int)
            and want > 0
            and have != want
            and not (axis == 0 and array.ndim == rank)
        ):
            orders = [t for t in _LAYOUTS if len(t) == array.ndim == rank]
            turned = next(
                (t for t in orders if _fits(tuple(array.shape[a] for a in t[1:]), port.dims[1:])),
                None,
            )
            hint = (
                f"; the layout fits after array.transpose({', '.join(map(str, turned))})"
                if turned
                else ""
            )
            raise DataError(
                f"{label} has shape {array.shape} but the model expects {_expected(port)}{hint}."
            )
    if array.dtype.kind in "fc" or array.dtype.kind == "V":
        wrong = out_of_core.first_not_finite(array)
        if wrong is not None:
            hint = (
                ", and where -inf masks something, write the type's lowest number"
                if wrong.masks
                else ""
            )
            raise DataError(
                f"{label} has NaN or infinite values, first in sample {wrong.row}; clean the data{hint}."
            )
    return array


def _check_labels(given: Values, count: int, whole: bool, where: str) -> Ints:
    if not np.issubdtype(given.dtype, np.integer):
        raise DataError(
            f"{where}: 'labels' is {given.dtype}; expected integers, one class per sample."
        )
    if given.ndim == 0 or len(given) != count or (given.ndim != 1 and not whole):
        raise DataError(
            f"{where}: 'labels' has shape {given.shape}; expected ({count},), one class per sample."
        )
    labels = np.asarray(given)  # only now: a small file may say that it holds many
    if labels.size and labels.max() > np.iinfo(np.int64).max:
        raise DataError(f"{where}: 'labels' has the class {int(labels.max())}, which is none.")
    if labels.size and labels.min() < 0:
        raise DataError(
            f"{where}: 'labels' has the negative class {int(labels.min())}; classes count from 0."
        )
    return labels.astype(np.int64)


def hold_out(samples: Samples, seed: int) -> tuple[Samples, Samples]:
    """Four fifths for calibration, one fifth for evaluation (at least one sample each where there are two)."""
    if samples.count < 2:
        return samples, samples
    order = np.random.default_rng(seed).permutation(samples.count)
    cut = max(1, samples.count // 5)
    if samples.fixed_batch:
        cut = max(samples.fixed_batch, cut - cut % samples.fixed_batch)
        if samples.count - cut < samples.fixed_batch:
            return samples, samples
    return samples.take(np.sort(order[cut:])), samples.take(np.sort(order[:cut]))


def placeholder(model: Model, seed: int, count: int = 8) -> Samples:
    """Random feeds at the model's shapes, only to compare two graphs that must agree on any input; never statistics."""
    rng = np.random.default_rng(seed)
    arrays = {}
    largest = max(
        (math.prod(model.shapes[p.name]) * p.dtype.itemsize for p in model.inputs), default=0
    )
    count = min(count, max(1, FEW_BYTES // max(largest, 1)))
    for port in model.inputs:
        shape = (count, *model.shapes[port.name])
        floating = port.dtype.kind not in "iub"
        values = rng.standard_normal(shape) if floating else rng.integers(0, 2, shape)
        arrays[port.name] = values.astype(port.dtype)
    dtypes = {p.name: p.dtype for p in model.inputs}
    return Samples(arrays, None, count, True, {}, dtypes, None, "random feeds")
