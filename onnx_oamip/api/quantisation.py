"""Quantisation of a model to int8, on the samples that ``prune`` calibrates on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_oamip.api.in_memory import Feeds
from onnx_oamip.artifacts import output as outputs
from onnx_oamip.artifacts.shipped_sizes import zipped_file, zipped_model
from onnx_oamip.core.atomic_files import scratch
from onnx_oamip.core.clock import Clock
from onnx_oamip.core.errors import DataError
from onnx_oamip.core.json_values import plain_document
from onnx_oamip.core.notebook import tables
from onnx_oamip.core.options import QuantisationOptions
from onnx_oamip.core.progress import INT8, Progress
from onnx_oamip.core.records import Array, Model
from onnx_oamip.core.settings import Settings
from onnx_oamip.core.versions import versions
from onnx_oamip.data import batching, dataset
from onnx_oamip.data.dataset import Samples
from onnx_oamip.data.sources import File, Source, samples_of, source_name
from onnx_oamip.graph import external_data
from onnx_oamip.graph.loading import IN_MEMORY, ModelSource, load
from onnx_oamip.graph.quantisation import Int8Model, quantise
from onnx_oamip.graph.runtime import Session

SATURATED = 0.02
"""Relative difference of outputs from which on saturated sums are noted."""
MOVED = 0.25
"""Relative difference from the outputs of the float model from which on it is noted."""
TRIED = 8
"""Samples that show it."""


@dataclass(frozen=True, eq=False, repr=False)
class Quantised:
    """Result of ``int8``.

    Attributes:
        original: The model that was quantised.
        found: The quantised model, with the number of its weights that are int8.
        options: How it was quantised.
        samples: Calibration samples; 0 for dynamic ranges.
        data: Where they come from.
        timings: Seconds by stage.
        saturation: Difference that sums of 16 bits make to the outputs on this processor, relative; 0 if unknown.
        moved: Difference of the outputs from those of the float model, relative; 0 if unknown.
        output: File that was written, None for none.
        sha256: Its digest.
        bytes: Size of the quantised model.
    """

    original: Model
    found: Int8Model
    options: QuantisationOptions
    samples: int
    data: str | None
    timings: Mapping[str, float]
    bytes: int
    saturation: float = 0.0
    moved: float = 0.0
    output: str | None = None
    sha256: str | None = None

    @property
    def model(self) -> onnx.ModelProto:
        """The quantised model."""
        return self.found.proto

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for a reader."""
        notes = list(self.original.notes)
        if not self.found.per_channel and not self.options.per_tensor:
            notes.append(
                "every weight has one scale: scales by channel need opset 13, and the model has an older one"
            )
        if self.saturation > SATURATED:
            notes.append(
                f"sums of 16 bits saturate in the int8 kernels of this processor, which moves the outputs by "
                f"{self.saturation:.1%}; give `reduce_range`, or deploy on a processor with VNNI or of arm64"
            )
        elif self.moved > MOVED:
            notes.append(
                f"int8 moves the outputs of the first samples by {self.moved:.1%}; try `ranges=dynamic`, "
                "`calibration=percentile` or `keep_float`, and see what it loses with 'onnx-oamip verify'"
            )
        return tuple(notes)

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document of the command ``int8``."""
        path = self.original.path
        found = {
            "schema_version": 1,
            "float_model": {
                "path": path,
                "sha256": self.original.sha256,
                "bytes": self.original.file_bytes,
                "zip_bytes": None if path == IN_MEMORY else zipped_file(path),
            },
            "output": {
                "path": self.output,
                "sha256": self.sha256,
                "bytes": self.bytes,
                "zip_bytes": zipped_model(self.model)
                if self.output is None
                else zipped_file(self.output),
            },
            "ranges": self.options.ranges,
            "per_channel": self.found.per_channel,
            "calibration": self.options.calibration if self.samples else None,
            "samples": self.samples,
            "weights": {"int8": self.found.weights, "float": self.found.float_weights},
            "kept_float": list(self.found.kept),
            "notes": list(dict.fromkeys(self.notes)),
            "timings": dict(self.timings),
            "settings": {**self.options.model_dump(mode="json"), "data": self.data},
            "versions": versions(),
        }
        return plain_document(found)

    def save(self, path: File) -> Quantised:
        """Write the quantised model.

        Args:
            path: File to write, completely or not at all.

        Returns:
            The same result, with the file and its digest.

        Raises:
            OutputError: The file cannot be written, or is the model that was quantised.
        """
        target = outputs.check_output(self.original.path, path)
        sha256, size = outputs.write(self.model, target)
        return replace(self, output=str(target), sha256=sha256, bytes=size)

    def __repr__(self) -> str:
        weights = self.found.weights
        return (
            f"<Quantised {self.original.path}: {weights} weights int8, {self.original.file_bytes:,} -> {self.bytes:,} "
            "bytes>"
        )

    def _repr_html_(self) -> str:
        found = self.found
        rows = [
            ("bytes", f"{self.original.file_bytes:,}", f"{self.bytes:,}"),
            ("weights int8", "0", f"{found.weights:,}"),
            (
                "weights left as they are",
                f"{found.weights + found.float_weights:,}",
                found.float_weights,
            ),
        ]
        notes = [(note,) for note in self.notes]
        return tables(repr(self).strip("<>"), (rows, ("", "before", "after")), (notes, ("note",)))


def int8(
    path: ModelSource,
    data: Source | None,
    output: File | None,
    settings: Settings,
    options: QuantisationOptions,
    *,
    eval_data: Source | None = None,
    progress: Progress | None = None,
) -> Quantised:
    """Quantise a model to int8 by ONNX Runtime.

    Args:
        path: Model, pruned or not: a file or in memory.
        data: Calibration samples, as for ``prune``; only dynamic ranges do without. What ``prune`` holds out is left
            out here too.
        output: File to write, None to write none.
        settings: Reading of the data, batch size and seed.
        options: How the model is quantised.
        eval_data: Held-out samples; with them, all of ``data`` calibrate.
        progress: Callback of the run.

    Returns:
        The result. What it loses is measured by ``verify``.

    Raises:
        OamipError: Bad input, or a model that ONNX Runtime cannot quantise. No file is written.
    """
    clock = Clock(progress, INT8)
    target = None if output is None else outputs.check_output(path, output, (data, eval_data))
    dataset.check_extras(data, eval_data)
    with clock("load"):
        model = load(path, stated=settings.shapes)
        samples = _calibration(model, data, eval_data, settings, options)
    with clock("quantise"):
        reader = None if samples is None else Feeds(samples, settings.batch_size)
        with _file(path) as file:
            found = quantise(file, options, reader, name=model.path)
        saturation, moved = _differences(model, found.proto, samples)
    result = Quantised(
        original=model,
        found=found,
        options=options,
        samples=0 if samples is None else samples.usable(),
        data=source_name(data),
        timings=clock.seconds,
        bytes=external_data.size(found.proto),
        saturation=saturation,
        moved=moved,
    )
    if target is None:
        return result
    with clock("write"):
        written = result.save(target)
    return replace(written, timings=clock.seconds)


@contextmanager
def _file(model: ModelSource) -> Iterator[Path]:
    """Path of a model; one in memory is written to a temporary file, as the quantiser reads files."""
    if not isinstance(model, onnx.ModelProto):
        yield Path(model)
        return
    with scratch() as folder:
        external_data.save(model, folder / "model.onnx", "model.onnx.data")
        yield folder / "model.onnx"


def _differences(
    model: Model,
    proto: onnx.ModelProto,
    samples: Samples | None,
) -> tuple[float, float]:
    """Relative differences on the first samples: of the fused int8 kernels from exact sums, and from the float model.

    Loads the quantised model in any case. Without samples, both are 0.
    """
    fused = Session(proto, "cpu", what="the quantised model")
    if samples is None:
        return 0.0, 0.0
    feed = samples.feed(next(samples.feed_indices(TRIED)))
    exact = Session(proto, "cpu", what="the quantised model", exact=True)
    before = Session(model.proto, "cpu", what=model.path)
    found = fused.run(feed)
    return _largest(found, exact.run(feed)), _largest(found, before.run(feed))


def _largest(outputs: Sequence[Array], references: Sequence[Array]) -> float:
    """Largest relative difference of an output."""
    differences = [0.0]
    for one, other in zip(outputs, references, strict=True):
        size = np.linalg.norm(other.astype(np.float64)) if other.dtype.kind == "f" else 0.0
        if size:
            differences.append(float(np.linalg.norm((one - other).astype(np.float64)) / size))
    return max(differences)


def _calibration(
    model: Model,
    data: Source | None,
    eval_data: Source | None,
    settings: Settings,
    options: QuantisationOptions,
) -> Samples | None:
    """Samples for static ranges. Raises DataError where there are none."""
    if options.ranges == "dynamic":
        return None
    if data is None:
        raise DataError(
            "static ranges need calibration samples; give `data`, or take `ranges=dynamic`."
        )
    samples = samples_of(model, data, eval_data, settings).calibration
    model = dataset.at_data(model, samples)
    session = Session(model.proto, "cpu", what=model.path)
    return batching.tried(session, samples, settings.batch_size)
