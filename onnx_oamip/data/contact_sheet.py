"""Contact sheet: the first samples of an input that takes images, as the model saw them, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnx_oamip.core.records import Array, ContactSheet, Model
from onnx_oamip.data.augmentation import weighted_inputs
from onnx_oamip.data.dataset import Samples

SHOWN = 16
"""Largest number of samples."""
COLUMNS = 8
"""Samples in one row."""
SIDE = 96
"""Longest side of a shown sample in pixels. Smaller ones are enlarged to half of it."""
CHANNELS = (1, 3, 4)
"""Channels of an image; the fourth is its transparency, which is not shown."""
MARGIN = 2
"""Pixels between samples."""


def contact_sheet(samples: Samples, model: Model) -> ContactSheet | None:
    """Draw evenly spaced samples of the first input that takes images, after scale, mean and deviation.

    Args:
        samples: Samples of the model.
        model: The model.

    Returns:
        The sheet; None if a layer reads no input with four axes and 1, 3 or 4 channels, or if all of it is empty.
    """
    weighted = weighted_inputs(model)
    for port in model.inputs:
        if port.name in weighted and len(port.dims) == 4 and port.dtype.kind in "fiu":
            shown = _shown(samples, port.name)
            if shown:
                return _sheet(port.name, shown)
    return None


def _shown(samples: Samples, name: str) -> list[Array]:
    """Images (height, width, channels) of one input; empty if it takes none."""
    count = min(SHOWN, samples.count)
    places = np.linspace(0, samples.count - 1, count).round().astype(np.int64)
    images = []
    for place in places:
        # The first sample of a feed that holds several.
        value = samples.feed(place[None])[name][0].astype(np.float64)
        if value.shape[0] in CHANNELS:
            value = value.transpose(1, 2, 0)
        elif value.shape[2] not in CHANNELS:
            return []
        if value.size:
            images.append(value[..., :3])
    reading = samples.reading
    if reading is not None and reading["input"] == name and reading["color"] == "bgr":
        images = [image[..., ::-1] for image in images]
    return images


def _sheet(name: str, images: Sequence[Array]) -> ContactSheet:
    low = min(float(image.min()) for image in images)
    high = max(float(image.max()) for image in images)
    span = (high - low) or 1.0
    drawn = [_resized(255 * (image - low) / span).round().astype(np.uint8) for image in images]
    height = max(image.shape[0] for image in drawn) + MARGIN
    width = max(image.shape[1] for image in drawn) + MARGIN
    columns = min(COLUMNS, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    pixels = np.full((rows * height - MARGIN, columns * width - MARGIN, 3), 255, np.uint8)
    for i, image in enumerate(drawn):
        top = (i // columns) * height
        left = (i % columns) * width
        pixels[top : top + image.shape[0], left : left + image.shape[1]] = image
    return ContactSheet(name, pixels, len(drawn), low, high)


def _resized(image: Array) -> Array:
    """An image whose longest side is about ``SIDE`` pixels: means of blocks, or repeated pixels."""
    height, width, channels = image.shape
    longest = max(height, width)
    step = min(-(-longest // SIDE), height, width)
    rows = height // step
    columns = width // step
    blocks = image[: rows * step, : columns * step].reshape(rows, step, columns, step, channels)
    small = blocks.mean(axis=(1, 3))
    times = max(1, SIDE // 2 // longest)
    return np.asarray(small.repeat(times, axis=0).repeat(times, axis=1))
