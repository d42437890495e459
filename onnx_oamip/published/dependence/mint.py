"""MINT: conditional mutual information between groups of filters of adjacent layers, by minimum spanning trees.

Ganesh, Corso and Sekeh (arXiv 2003.08472): the Friedman-Rafsky estimate of ``I(X; Y | Z)`` in Henze-Penrose form, for a
group X of children, a group Y of parents and all other parents Z. Samples are split in three parts. Every sample of the
first takes over the Y of its nearest neighbour in Z in the second, which makes it a sample of P(X|Z) P(Y|Z) P(Z); with
R the edges of the minimum spanning tree over it and the third part that join the two, ``I = 1 - R / (n / 3)``.

Different from the authors' code, whose estimates of independent and dependent data hardly differ: rows of X, Y and Z
are of the same samples; edges are counted by both their ends; neighbours of the first part are searched in the second;
no distance of zero is lost. X, Y and Z count equally: each block's squared distance is divided by its dimension, or Z
would decide all distances. Experimental: a tree a block is slow, and filters of a group share their score.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_oamip.core.records import (
    Array,
    Bools,
    Coupling,
    Floats,
    Ints,
    Model,
    Scores,
    Statistics,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.executors import executor
from onnx_oamip.published.dependence.correlation import partial
from onnx_oamip.published.dependence.pooled_activations import Pair, pairs, standardise
from onnx_oamip.published.dependence.propagation import propagate
from onnx_oamip.published.dependence.requests import POOLED_ACTIVATIONS

GROUPS = 16
"""Most groups of filters on either side of a pair of layers."""
SPLITS = 3
"""Random splits of the samples in three, averaged."""


def score(
    model: Model, coupling: Coupling, statistics: Statistics | None, settings: Settings
) -> Scores:
    """Importance of every unit, the mean of its group 1, propagated as SNACS does.

    Layers are first looked at with one split each, then with a second, ... Where ``settings.score_time`` seconds have
    passed, the splits made so far count, and layers without one take their partial correlations; a note says so.
    """
    assert statistics is not None
    every = list(pairs(model, coupling, statistics[POOLED_ACTIVATIONS]))
    found: list[list[Floats]] = [[] for _ in every]
    end = _Deadline(time.monotonic() + settings.score_time)
    jobs = [(i, settings.seed + split, end) for split in range(SPLITS) for i in range(len(every))]
    made = executor(settings.workers, settings.scheduler).map(_one, every, jobs)
    for (i, _, _), values in zip(jobs, made, strict=True):
        if values is not None:
            found[i].append(values)
    rho = [
        np.maximum(np.mean(estimates, axis=0), 0.0)
        if estimates
        else partial(pair.parents, pair.children)
        for pair, estimates in zip(every, found, strict=True)
    ]
    values = propagate(model, coupling, statistics, zip(every, rho, strict=True))
    return Scores("mint", values, notes=_notes(every, found, settings.score_time))


@dataclass(frozen=True)
class _Deadline:
    """A time on the monotonic clock; it reaches another machine, whose clock differs, as the seconds left."""

    at: float

    def __reduce__(self) -> tuple[Callable[[float], _Deadline], tuple[float]]:
        return _Deadline.after, (self.at - time.monotonic(),)

    @staticmethod
    def after(seconds: float) -> _Deadline:
        return _Deadline(time.monotonic() + seconds)


def _one(every: Sequence[Pair], job: tuple[int, int, _Deadline]) -> Floats | None:
    pair, seed, end = every[job[0]], job[1], job[2]
    return dependence(pair.parents, pair.children, seed, end.at)


def _notes(
    every: Sequence[Pair], found: Sequence[Sequence[Floats]], seconds: float
) -> tuple[str, ...]:
    none = sum(not estimates for estimates in found)
    fewer = sum(0 < len(estimates) < SPLITS for estimates in found)
    if not none and not fewer:
        return ()
    note = (
        f"`score_time={seconds:g}` ran out: of {len(every)} pairs of layers {none} were not reached and are scored by "
        f"partial correlation, {fewer} have fewer than {SPLITS} estimates; the result depends on the machine's speed"
    )
    return (note,)


def dependence(
    parents: Array, children: Array, seed: int = 0, ends: float = np.inf
) -> Floats | None:
    """Estimate (c, p) of I(X; Y | Z) from one random split, filters in at most GROUPS groups of neighbours a side.

    Rows of ``parents`` (samples, p) and ``children`` (samples, c) are of the same samples. Not clipped: independent
    data gives values around 0 of both signs. None where the monotonic clock passed ``ends`` before it was done.
    """
    x, y = _grouped(children), _grouped(parents)
    order = np.random.default_rng(seed).permutation(len(parents))
    third = len(order) // 3
    first, second, last = order[:third], order[third : 2 * third], order[2 * third : 3 * third]
    both = np.concatenate([last, first])
    apart = np.repeat([False, True], third)
    near_x = [_distances(part[both], part[both]) / part.shape[1] for part in x]
    # Squared distances in Z are those of all parents less those in Y.
    total = _distances(standardise(parents)[both], standardise(parents)[both])
    across = _distances(standardise(parents)[first], standardise(parents)[second])
    values = np.zeros((len(x), len(y)))
    for j, part in enumerate(y):
        here = part.shape[1]
        others = max(parents.shape[1] - here, 1)
        nearest = second[np.argmin(across - _distances(part[first], part[second]), axis=1)]
        taken = part[np.concatenate([last, nearest])]
        rest = (total - _distances(part[both], part[both])) / others + _distances(
            taken, taken
        ) / here
        for i, near in enumerate(near_x):
            if time.monotonic() > ends:
                return None
            values[i, j] = 1 - crossings(rest + near, apart) / third
    sizes = [[part.shape[1] for part in side] for side in (x, y)]
    return np.repeat(np.repeat(values, sizes[0], axis=0), sizes[1], axis=1)


def _grouped(values: Array) -> list[Floats]:
    size = -(-values.shape[1] // GROUPS)
    whole = standardise(values)
    return [whole[:, start : start + size] for start in range(0, values.shape[1], size)]


def _distances(a: Floats, b: Floats) -> Floats:
    """Squared Euclidean distances between rows."""
    squares = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)
    return np.asarray(np.maximum(squares - 2 * (a @ b.T), 0.0))


def crossings(distance: Floats, side: Bools) -> int:
    """Edges of the minimum spanning tree over a dense ``distance`` (n, n) whose ends lie on different sides (n,).

    Prim's algorithm; squared distances have the same tree as distances.
    """
    count = len(distance)
    nearest = distance[0].copy()
    source: Ints = np.zeros(count, np.int64)
    nearest[0] = np.inf
    open_ = np.ones(count, bool)
    open_[0] = False
    crossed = 0
    for _ in range(count - 1):
        point = int(np.argmin(nearest))
        crossed += int(side[point] != side[source[point]])
        open_[point] = False
        nearest[point] = np.inf
        closer = open_ & (distance[point] < nearest)
        nearest[closer] = distance[point][closer]
        source[closer] = point
    return crossed
