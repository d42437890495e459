"""Equal samples in two sets: a judge that has seen the samples of the training is too kind."""

from __future__ import annotations

import numpy as np

from onnx_oamip.core.records import Array
from onnx_oamip.data.dataset import Samples

BATCH_BYTES = 1 << 25
"""Bytes of the samples that are read at a time."""
SEED = 0
"""Seed of the factors of a digest."""


def repeated(samples: Samples, others: Samples) -> int:
    """Count the samples that occur among others as well.

    Args:
        samples: Samples.
        others: Other samples of the same inputs.

    Returns:
        Number of samples whose arrays all equal those of one of the others.
    """
    return int(np.isin(_digests(samples), _digests(others)).sum())


def _digests(samples: Samples) -> Array:
    """A number for every sample, which is equal for equal samples and hardly ever for others."""
    if not samples.count:
        return np.zeros(0, np.uint64)
    size = sum(array.nbytes for array in samples.feed(np.arange(1)).values())
    found = []
    for index, feed in samples.batches(max(1, BATCH_BYTES // max(size, 1))):
        digest = np.zeros(len(index), np.uint64)
        for place, (name, array) in enumerate(feed.items()):
            kind, axis, _ = samples.layouts[name]
            if kind == "shared":
                continue
            by_sample = array if samples.whole or axis is None else np.moveaxis(array, axis, 0)
            digest += _digest(by_sample.reshape(len(index), -1), SEED + place)
        found.append(digest)
    return np.concatenate(found) if found else np.zeros(0, np.uint64)


def _digest(rows: Array, seed: int) -> Array:
    """A sum of the bytes of every row (rows,), eight at a time, by random odd factors, modulo 2 ** 64."""
    flat = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)
    length = flat.shape[1]
    if length % 8:
        flat = np.pad(flat, ((0, 0), (0, -length % 8)))
    words = flat.view(np.uint64)
    rng = np.random.default_rng(seed)
    factors = 2 * rng.integers(1 << 63, size=words.shape[1], dtype=np.uint64) + 1
    # Zeros add nothing, so that the length tells longer rows apart.
    return np.asarray(words @ factors + np.uint64(length))
