"""Sources of samples: files, functions and arrays in memory; calibration and held-out samples from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from onnx_oamip.core.records import (
    Array,
    Model,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.data.dataset import FeedIterable, Samples

File = str | os.PathLike[str]
Source = File | Mapping[str, Array] | FeedIterable
ARRAYS = "(arrays)"
"""Name of arrays in memory in reports."""


class SampleSets(NamedTuple):
    """Samples of a run.

    Attributes:
        calibration: Samples for statistics, scores, losses and refits, in random order.
        held_out: Samples on which the result is measured, None if there are no data.
    """

    calibration: Samples
    held_out: Samples | None


def source_name(source: Source | None) -> str | None:
    """Name a source in reports.

    Args:
        source: Path, arrays or feeds in memory, or None.

    Returns:
        The path, ``ARRAYS``, or None.
    """
    if source is None:
        return None
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return ARRAYS


def samples_of(
    model: Model,
    source: Source | None,
    eval_data: Source | None,
    settings: Settings,
) -> SampleSets:
    """Load the samples of a run.

    Args:
        model: Model that reads the samples.
        source: Calibration data. Without any, a few random feeds serve to compare graphs, and nothing else.
        eval_data: Held-out data. Without any, a part of the source is held out.
        settings: Reading of images and tables, and the seed.

    Returns:
        Calibration and held-out samples.

    Raises:
        DataError: The data do not fit the model.
    """
    reading = settings.reading
    held_out = None
    if eval_data is not None:
        held_out = dataset.load(eval_data, model, reading=reading)
    if source is None:
        calibration = held_out or dataset.placeholder(model, settings.seed)
        return SampleSets(calibration, held_out)
    samples = dataset.load(source, model, reading=reading)
    assert samples is not None
    if held_out is None:
        held_out = dataset.load(source, model, dataset.EVALUATION, reading)
    if held_out is None:
        return SampleSets(*dataset.hold_out(samples, settings.seed))
    return SampleSets(dataset.shuffle(samples, settings.seed), held_out)
