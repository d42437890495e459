"""Sources of samples: files, functions and arrays in memory; calibration and held-out samples from them."""

from __future__ import annotations

import os
from collections.abc import Mapping

from onnx_oamip.core.records import (
    Array,
    Model,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.data.dataset import Samples

File = str | os.PathLike[str]
Source = File | Mapping[str, Array]
ARRAYS = "(arrays)"


def called(source: Source | None) -> str | None:
    """What a source is called in reports: its path, or ``ARRAYS`` for arrays in memory."""
    return (
        source if source is None else ARRAYS if isinstance(source, Mapping) else os.fspath(source)
    )


def samples_of(
    model: Model, source: Source | None, eval_data: Source | None, settings: Settings
) -> tuple[Samples, Samples | None]:
    """(calibration, evaluation). Without data: a few random feeds for the exactness proof and nothing else."""
    reading = settings.reading
    held = dataset.load(eval_data, model, reading=reading) if eval_data is not None else None
    if source is None:
        return held or dataset.placeholder(model, settings.seed), held
    samples = dataset.load(source, model, reading=reading)
    assert samples is not None
    if held is None:
        held = dataset.load(source, model, dataset.EVALUATION, reading)
    if held is None:
        return dataset.hold_out(samples, settings.seed)
    return samples, held
