"""Quantisation of a model to int8, on the samples that ``prune`` calibrates on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_oamip.api.in_memory import Feeds
from onnx_oamip.artifacts import output as outputs
from onnx_oamip.artifacts.shipped_sizes import zipped_file
from onnx_oamip.core.clock import Clock
from onnx_oamip.core.errors import DataError
from onnx_oamip.core.json_values import plain_document
from onnx_oamip.core.progress import INT8, Progress
from onnx_oamip.core.records import Model
from onnx_oamip.core.settings import Settings
from onnx_oamip.core.versions import versions
from onnx_oamip.data import batching, dataset
from onnx_oamip.data.dataset import Samples
from onnx_oamip.data.sources import File, Source, samples_of, source_name
from onnx_oamip.graph.loading import load
from onnx_oamip.graph.quantisation import Int8Model, Int8Options, quantise
from onnx_oamip.graph.runtime import Session

SATURATED = 0.02
"""Relative difference of outputs from which on saturated sums are noted."""
TRIED = 8
"""Samples that show it."""


@dataclass(frozen=True, eq=False)
class Quantised:
    """Result of ``int8``.

    Attributes:
        model: The model that was quantised.
        output: File that was written.
        sha256: Its digest.
        bytes: Its size.
        found: The quantised model.
        options: How it was quantised.
        samples: Calibration samples; 0 for dynamic ranges.
        data: Where they come from.
        timings: Seconds by stage.
        saturation: Difference that sums of 16 bits make to the outputs on this processor, relative; 0 if unknown.
    """

    model: Model
    output: str
    sha256: str
    bytes: int
    found: Int8Model
    options: Int8Options
    samples: int
    data: str | None
    timings: Mapping[str, float]
    saturation: float = 0.0

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for a reader."""
        notes = list(self.model.notes)
        if not self.found.per_channel and not self.options.per_tensor:
            notes.append(
                "every weight has one scale: scales by channel need opset 13, and the model has an older one"
            )
        if self.saturation > SATURATED:
            notes.append(
                f"sums of 16 bits saturate in the int8 kernels of this processor, which moves the outputs by "
                f"{self.saturation:.1%}; give `reduce_range`, or deploy on a processor with VNNI or of arm64"
            )
        return tuple(notes)

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document of the command ``int8``."""
        found = {
            "schema_version": 1,
            "float_model": {
                "path": self.model.path,
                "sha256": self.model.sha256,
                "bytes": self.model.file_bytes,
                "zip_bytes": zipped_file(self.model.path),
            },
            "output": {
                "path": self.output,
                "sha256": self.sha256,
                "bytes": self.bytes,
                "zip_bytes": zipped_file(self.output),
            },
            "ranges": self.options.ranges,
            "per_channel": self.found.per_channel,
            "calibration": self.options.calibration if self.samples else None,
            "samples": self.samples,
            "weights": {"int8": self.found.weights, "float": self.found.float_weights},
            "kept_float": list(self.found.kept),
            "notes": list(dict.fromkeys(self.notes)),
            "timings": dict(self.timings),
            "settings": {**asdict(self.options), "data": self.data},
            "versions": versions(),
        }
        return plain_document(found)


def int8(
    path: File,
    data: Source | None,
    output: File,
    settings: Settings,
    options: Int8Options,
    *,
    eval_data: Source | None = None,
    progress: Progress | None = None,
) -> Quantised:
    """Quantise a model to int8 by ONNX Runtime, and write it.

    Args:
        path: Model file, pruned or not.
        data: Calibration samples, as for ``prune``; only dynamic ranges do without. What ``prune`` holds out is left
            out here too.
        output: File to write.
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
    target = outputs.check_output(path, output, (data, eval_data))
    dataset.check_extras(data, eval_data)
    with clock("load"):
        model = load(path, stated=settings.shapes)
        samples = _calibration(model, data, eval_data, settings, options)
    with clock("quantise"):
        reader = None if samples is None else Feeds(samples, settings.batch_size)
        found = quantise(Path(path), options, reader)
        saturation = _saturation(found.proto, samples)
    with clock("write"):
        sha256, size = outputs.write(found.proto, target)
    return Quantised(
        model=model,
        output=str(target),
        sha256=sha256,
        bytes=size,
        found=found,
        options=options,
        samples=0 if samples is None else samples.usable(),
        data=source_name(data),
        timings=clock.seconds,
        saturation=saturation,
    )


def _saturation(proto: onnx.ModelProto, samples: Samples | None) -> float:
    """Difference between the fused int8 kernels and exact sums on the first samples; loads the model in any case."""
    fused = Session(proto, "cpu", what="the quantised model")
    if samples is None:
        return 0.0
    feed = samples.feed(next(samples.feed_indices(TRIED)))
    exact = Session(proto, "cpu", what="the quantised model", exact=True)
    differences = [0.0]
    for one, other in zip(fused.run(feed), exact.run(feed), strict=True):
        size = np.linalg.norm(other.astype(np.float64)) if other.dtype.kind == "f" else 0.0
        if size:
            differences.append(float(np.linalg.norm((one - other).astype(np.float64)) / size))
    return max(differences)


def _calibration(
    model: Model,
    data: Source | None,
    eval_data: Source | None,
    settings: Settings,
    options: Int8Options,
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
