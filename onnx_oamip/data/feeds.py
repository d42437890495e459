"""Feeds of samples in batches whose activations fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from onnx_oamip.core.options.run import ACTIVATION_MEMORY
from onnx_oamip.core.records import Array, Ints, Model
from onnx_oamip.data.dataset import Samples

FRONTIER_BYTES = ACTIVATION_MEMORY
"""Bound of the activations that a walk holds for all its feeds."""
RUN = 32
"""Samples in one run of the model, at most, wherever something is learnt."""


def run_size(model: Model, room: int = FRONTIER_BYTES) -> int:
    """Samples in one run wherever something is learnt: ``RUN``, or as many as keep the widest frontier in ``room``.

    It follows from the model alone: kernels round another way at another batch, and what is learnt, and with it the
    pruned file, should not depend on the batch size that someone compares models at.
    """
    return min(RUN, _most(model, room))


def side_by_side(model: Model, room: int) -> int:
    """Runs of :func:`run_size` samples whose widest frontiers fit in ``room`` bytes together; at least one."""
    return max(1, _most(model, room) // run_size(model, room))


def _most(model: Model, room: int) -> int:
    """Samples whose widest frontier, about three of the largest tensors, takes ``room`` bytes; at least one."""
    sizes = sorted(
        (int(np.prod(s)) for n, s in model.shapes.items() if n not in model.constants), reverse=True
    )
    return max(1, room // max(4 * sum(sizes[:3]) // max(model.batch, 1), 1))


class Feeds(Sequence[dict[str, Array]]):
    """Feeds of the samples at each of ``index``, made when they are asked for."""

    def __init__(self, samples: Samples, index: Sequence[Ints]) -> None:
        self._samples, self._index = samples, index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, place: int) -> dict[str, Array]: ...
    @overload
    def __getitem__(self, place: slice) -> Feeds: ...
    def __getitem__(self, place: int | slice) -> dict[str, Array] | Feeds:
        if isinstance(place, slice):
            return Feeds(self._samples, self._index[place])
        return self._samples.feed(self._index[place])


def affordable(
    model: Model, samples: Samples, batch_size: int, room: int | None = None
) -> tuple[Feeds, int]:
    """(feeds, samples used): as many as keep the widest frontier within ``room`` bytes (``FRONTIER_BYTES``)."""
    most = _most(model, FRONTIER_BYTES if room is None else room)
    chosen: list[Ints] = []
    used = 0
    for index in samples.divided(min(batch_size, most)):
        if used and used + len(index) > most:
            break
        chosen.append(index)
        used += len(index)
    return Feeds(samples, chosen), used
