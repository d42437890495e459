"""Feeds of samples in batches whose activations fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, overload

import numpy as np

from onnx_oamip.core.options.run import ACTIVATION_MEMORY
from onnx_oamip.core.records import Array, Ints, Model
from onnx_oamip.data.dataset import Samples

DEFAULT_MEMORY_LIMIT = ACTIVATION_MEMORY
"""Bytes of activations that one pass over the data keeps for all its feeds."""
MAX_RUN_SAMPLES = 32
"""Samples in one run of the model while statistics are collected."""
RUNS_IN_MEMORY = 4
"""Runs whose activations the limit holds: open sessions keep their memory, and groups are measured in parallel."""
FRONTIER_TENSORS = 3
"""Number of the largest tensors that estimate the activations that are alive at the same time."""
ELEMENT_BYTES = 4


def run_size(model: Model, memory_limit: int = DEFAULT_MEMORY_LIMIT) -> int:
    """Choose the number of samples in one run of the model while statistics are collected.

    It depends on the model alone: kernels round differently at another batch size, and statistics, and with them the
    pruned file, must not depend on the batch size at which models are compared.

    Args:
        model: Model to run.
        memory_limit: Bytes of activations, for ``RUNS_IN_MEMORY`` runs.

    Returns:
        ``MAX_RUN_SAMPLES``, or as many as keep the activations within the limit; at least one.
    """
    return comparison_size(model, MAX_RUN_SAMPLES, memory_limit)


def comparison_size(model: Model, most: int, memory_limit: int = DEFAULT_MEMORY_LIMIT) -> int:
    """Choose the number of samples in one run of models that are compared.

    Args:
        model: Model to run.
        most: Number asked for.
        memory_limit: Bytes of activations, for ``RUNS_IN_MEMORY`` runs.

    Returns:
        ``most``, or as many as keep the activations within the limit; at least one.
    """
    return min(most, _samples_within(model, memory_limit // RUNS_IN_MEMORY))


def parallel_runs(model: Model, memory_limit: int) -> int:
    """Compute the number of runs of :func:`run_size` samples whose activations fit into memory together.

    Args:
        model: Model to run.
        memory_limit: Bytes of activations.

    Returns:
        Number of runs, at least one.
    """
    return max(1, _samples_within(model, memory_limit) // run_size(model, memory_limit))


def _samples_within(model: Model, memory_limit: int) -> int:
    """Number of samples whose activations, about three of the largest tensors, fit into a limit; at least one."""
    sizes = [int(np.prod(s)) for n, s in model.shapes.items() if n not in model.constants]
    largest = sorted(sizes, reverse=True)[:FRONTIER_TENSORS]
    bytes_per_sample = ELEMENT_BYTES * sum(largest) // max(model.batch, 1)
    return max(1, memory_limit // max(bytes_per_sample, 1))


class Feeds(Sequence[dict[str, Array]]):
    """A sequence of feeds that are made on access."""

    def __init__(self, samples: Samples, index: Sequence[Ints]) -> None:
        """Refer to samples without reading them.

        Args:
            samples: Samples to read.
            index: Indices of the samples of each feed.
        """
        self._samples = samples
        self.indices = index

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, place: int) -> dict[str, Array]: ...
    @overload
    def __getitem__(self, place: slice) -> Feeds: ...
    def __getitem__(self, place: int | slice) -> dict[str, Array] | Feeds:
        if isinstance(place, slice):
            return Feeds(self._samples, self.indices[place])
        return self._samples.feed(self.indices[place])


class FeedSelection(NamedTuple):
    """The first feeds of the samples.

    Attributes:
        feeds: The feeds.
        samples: Number of samples in them.
    """

    feeds: Feeds
    samples: int


def feeds_within_memory(
    model: Model,
    samples: Samples,
    batch_size: int,
    memory_limit: int | None = None,
) -> FeedSelection:
    """Take as many feeds as keep the activations of all of them within a limit.

    Args:
        model: Model to run.
        samples: Samples to read.
        batch_size: Largest number of samples in a feed.
        memory_limit: Bytes of activations, ``DEFAULT_MEMORY_LIMIT`` if not given.

    Returns:
        At least one feed, with the number of samples used.
    """
    if memory_limit is None:
        limit = DEFAULT_MEMORY_LIMIT
    else:
        limit = memory_limit
    max_samples = _samples_within(model, limit)
    chosen: list[Ints] = []
    used = 0
    for index in samples.feed_indices(min(batch_size, max_samples)):
        if used and used + len(index) > max_samples:
            break
        chosen.append(index)
        used += len(index)
    return FeedSelection(Feeds(samples, chosen), used)


def all_feeds(model: Model, samples: Samples, batch_size: int, memory_limit: int) -> Feeds:
    """Divide all samples into feeds, each of which keeps its activations within a limit.

    Args:
        model: Model to run.
        samples: Samples to read.
        batch_size: Largest number of samples in a feed.
        memory_limit: Bytes of activations of one feed.

    Returns:
        The feeds.
    """
    size = min(batch_size, _samples_within(model, memory_limit))
    return Feeds(samples, list(samples.feed_indices(size)))
