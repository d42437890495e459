"""MINT: conditional mutual information between groups of filters of adjacent layers, by minimum spanning trees.

Ganesh, Corso and Sekeh (arXiv 2003.08472): the Friedman-Rafsky estimate of ``I(X; Y | Z)`` in Henze-Penrose form, for a
group X of children, a group Y of parents and all other parents Z. Samples are split in three parts. Every sample of the
first takes over the Y of its nearest neighbour in Z in the second, which makes it a sample of P(X|Z) P(Y|Z) P(Z); with
R the edges of the minimum spanning tree over it and the third part that join the two, ``I = 1 - R / (n / 3)``.

Different from the authors' code, whose estimates of independent and dependent data hardly differ: rows of X, Y and Z
are of the same samples; edges are counted by both their ends; neighbours of the first part are searched in the second;
no distance of zero is lost. X, Y and Z count equally: each block's squared distance is divided by its dimension, or Z
would decide all distances. Experimental: a tree per block is slow, and filters of a group share their score.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_oamip.core.errors import DataError
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
from onnx_oamip.published.dependence.layer_pairs import Pair, pairs, standardise
from onnx_oamip.published.dependence.propagation import propagate
from onnx_oamip.published.dependence.requests import POOLED_ACTIVATIONS

GROUPS = 16
"""Most groups of filters on either side of a pair of layers."""
SPLITS = 3
"""Random splits of the samples in ``PARTS``, averaged."""
PARTS = 3


@dataclass(frozen=True)
class _Deadline:
    """A time on the monotonic clock; it reaches another machine, whose clock differs, as the seconds left."""

    at: float

    def __reduce__(self) -> tuple[Callable[[float], _Deadline], tuple[float]]:
        return _Deadline.after, (self.at - time.monotonic(),)

    @staticmethod
    def after(seconds: float) -> _Deadline:
        """Make a deadline on the clock of this machine.

        Args:
            seconds: Seconds from now.

        Returns:
            The deadline.
        """
        return _Deadline(time.monotonic() + seconds)


@dataclass(frozen=True)
class _Job:
    """One estimate: index of the pair of layers, seed of the split, and the time after which it is not worth having."""

    pair: int
    seed: int
    deadline: _Deadline


def score(
    model: Model,
    coupling: Coupling,
    statistics: Statistics | None,
    settings: Settings,
) -> Scores:
    """Score units by conditional mutual information, propagated as SNACS does.

    All layers are estimated from one split first, then from a second, and so on. After ``settings.score_time`` seconds
    the splits made so far count, and layers without one take their partial correlations; a note reports it.

    Args:
        model: The model.
        coupling: Its units and consumers.
        statistics: Moments and pooled activations.
        settings: Settings of the run.

    Returns:
        One score per unit; the mean of each group is 1.

    Raises:
        DataError: There are fewer samples than parts of a split.
    """
    assert statistics is not None
    every_pair = list(pairs(model, coupling, statistics[POOLED_ACTIVATIONS]))
    count = min((len(pair.parents) for pair in every_pair), default=PARTS)
    if count < PARTS:
        raise DataError(
            f"`importance=mint` splits the calibration samples in {PARTS}, and has {count} at a time; give more in "
            "`data`, or use another `importance`."
        )
    deadline = _Deadline.after(settings.score_time)
    jobs = [
        _Job(i, settings.seed + split, deadline)
        for split in range(SPLITS)
        for i in range(len(every_pair))
    ]
    results = executor(settings.workers, settings.scheduler).map(_estimate, every_pair, jobs)
    estimates: list[list[Floats]] = [[] for _ in every_pair]
    for job, result in zip(jobs, results, strict=True):
        if result is not None:
            estimates[job.pair].append(result)

    scored = [
        (pair, _combine(pair, of_pair)) for pair, of_pair in zip(every_pair, estimates, strict=True)
    ]
    values = propagate(model, coupling, statistics, scored)
    counts = [len(of_pair) for of_pair in estimates]
    return Scores("mint", values, notes=_notes(counts, settings.score_time))


def dependence(
    parents: Array,
    children: Array,
    seed: int = 0,
    ends: float = np.inf,
) -> Floats | None:
    """Estimate I(X; Y | Z) from one random split, for at most GROUPS groups of neighbouring filters on each side.

    Args:
        parents: Samples of the parents (samples, p).
        children: Samples of the children (samples, c), in the same order.
        seed: Seed of the split.
        ends: Time on the monotonic clock at which the estimation is abandoned.

    Returns:
        Estimates (c, p), not clipped: independent data gives values around 0 of both signs. None if abandoned.
    """
    x = _grouped(children)
    y = _grouped(parents)
    order = np.random.default_rng(seed).permutation(len(parents))
    third = len(order) // PARTS
    first = order[:third]
    second = order[third : 2 * third]
    last = order[2 * third : 3 * third]
    both = np.concatenate([last, first])
    side = np.repeat([False, True], third)
    in_x = [_distances(part[both], part[both]) / part.shape[1] for part in x]
    # Squared distances in Z are those of all parents less those in Y.
    every = standardise(parents)
    of_parents = _distances(every[both], every[both])
    across = _distances(every[first], every[second])

    values = np.zeros((len(x), len(y)))
    for j, part in enumerate(y):
        own = part.shape[1]
        others = max(parents.shape[1] - own, 1)
        across_in_z = across - _distances(part[first], part[second])
        nearest = second[np.argmin(across_in_z, axis=1)]
        exchanged = part[np.concatenate([last, nearest])]
        in_z = (of_parents - _distances(part[both], part[both])) / others
        in_y_and_z = in_z + _distances(exchanged, exchanged) / own
        for i, distances in enumerate(in_x):
            if time.monotonic() > ends:
                return None
            values[i, j] = 1 - crossings(in_y_and_z + distances, side) / third
    x_sizes = [part.shape[1] for part in x]
    y_sizes = [part.shape[1] for part in y]
    return np.repeat(np.repeat(values, x_sizes, axis=0), y_sizes, axis=1)


def crossings(distance: Floats, side: Bools) -> int:
    """Count the edges of a minimum spanning tree that join the two sides, by Prim's algorithm.

    Args:
        distance: Distances (n, n) between all points. Squared distances have the same tree.
        side: The side of every point (n,).

    Returns:
        Number of edges whose ends lie on different sides.
    """
    count = len(distance)
    nearest = distance[0].copy()
    source: Ints = np.zeros(count, np.int64)
    nearest[0] = np.inf
    outside = np.ones(count, bool)
    outside[0] = False
    crossed = 0
    for _ in range(count - 1):
        point = int(np.argmin(nearest))
        crossed += int(side[point] != side[source[point]])
        outside[point] = False
        nearest[point] = np.inf
        closer = outside & (distance[point] < nearest)
        nearest[closer] = distance[point][closer]
        source[closer] = point
    return crossed


def _estimate(every_pair: Sequence[Pair], job: _Job) -> Floats | None:
    pair = every_pair[job.pair]
    return dependence(pair.parents, pair.children, job.seed, job.deadline.at)


def _combine(pair: Pair, estimates: Sequence[Floats]) -> Floats:
    """The mean of the estimates, or the partial correlation if there are none."""
    if not estimates:
        return partial(pair.parents, pair.children)
    mean: Floats = np.mean(estimates, axis=0)
    return np.maximum(mean, 0.0)


def _notes(estimates: Sequence[int], seconds: float) -> tuple[str, ...]:
    """A remark if some pairs have fewer ``estimates`` than splits."""
    none = sum(count == 0 for count in estimates)
    fewer = sum(0 < count < SPLITS for count in estimates)
    if not none and not fewer:
        return ()
    note = (
        f"`score_time={seconds:g}` ran out: of {len(estimates)} pairs of layers {none} were not reached and are scored "
        f"by partial correlation, {fewer} have fewer than {SPLITS} estimates; the result depends on the machine's speed"
    )
    return (note,)


def _grouped(values: Array) -> list[Floats]:
    """Standardised columns in at most GROUPS groups of neighbours."""
    size = -(-values.shape[1] // GROUPS)
    whole = standardise(values)
    return [whole[:, start : start + size] for start in range(0, values.shape[1], size)]


def _distances(a: Floats, b: Floats) -> Floats:
    """Squared Euclidean distances between rows."""
    squares = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)
    return np.asarray(np.maximum(squares - 2 * (a @ b.T), 0.0))
