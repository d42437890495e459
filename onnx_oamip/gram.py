"""Second moments of what linear consumers read, and the least-squares problem that each consumer poses to a group.

Removing channels from a consumer ``y = W x`` costs, after the best linear repair by the channels that stay, a quadratic
in the covariance G of x. Both the order of removal (``importance.obs``) and the measured sensitivities need G for the
original model only: it is collected once, in one walk over the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from .affine import Site, matrix, matrix_shape, site
from .calibrate import Progress
from .patches import data_rows, pick
from .records import Array, Consumer, Coupling, Floats, Gram, Ints, Model
from .subgraph import Frontier, element_types

CAP = 2304
"""Unknowns above which only the channels x channels form is kept (taps folded into the outputs)."""
ROWS_PER_UNKNOWN = 3
LEAST_ROWS, MOST_ROWS = 2048, 8192
RIDGE = 1e-3
"""Relative to the mean diagonal: keeps a Gram matrix of few rows from promising a perfect repair."""


def collect(
    model: Model,
    coupling: Coupling,
    feeds: Sequence[Mapping[str, Array]],
    device: str,
    seed: int = 0,
    progress: Progress | None = None,
    cap: int = CAP,
) -> dict[str, Gram]:
    """Centred Gram matrices by consumer node, float64, over sampled rows of all feeds."""
    rng = np.random.default_rng(seed)
    frontier = Frontier(model.proto, feeds, element_types(model.proto, model.dtypes), device)
    names = {c.node for c in coupling.consumers}
    places = [p for n in model.nodes if n.name in names and (p := site(n, model.constants)) is not None]
    result = {}
    for i, place in enumerate(places):
        result[place.node.name] = _one(model, place, frontier.reach([place.data])[place.data], rng, cap)
        if progress:
            progress("gram", i + 1, len(places))
    return result


def _one(model: Model, place: Site, inputs: Sequence[Array], rng: np.random.Generator, cap: int) -> Gram:
    groups, _, ins, taps = matrix_shape(place, model.constants[place.weight])
    channel = ins * taps > cap
    unknowns = ins if channel else ins * taps
    wanted = int(np.clip(ROWS_PER_UNKNOWN * unknowns, LEAST_ROWS, MOST_ROWS))
    if channel:  # every row gives one equation per tap
        wanted = max(64, wanted // taps)
    total = np.zeros((groups, unknowns))
    gram = np.zeros((groups, unknowns, unknowns))
    count = 0
    per_feed = -(-wanted // len(inputs))
    for x in inputs:
        shape = (len(x), *model.shapes[place.node.outputs[0]][1:])
        rows = int(np.prod((len(x), *shape[2:]))) if place.spatial else x.size // x.shape[place.data_axis]
        found = data_rows(place, x, pick(rows, per_feed, rng), shape).transpose(1, 0, 2)
        if channel:
            found = found.reshape(groups, -1, ins, taps).transpose(0, 1, 3, 2).reshape(groups, -1, ins)
        total += found.sum(axis=1)
        gram += found.transpose(0, 2, 1) @ found
        count += found.shape[1]
    mean = total / count
    gram = gram / count - mean[:, :, None] * mean[:, None, :]
    return Gram(gram, mean, 1 if channel else taps, taps if channel else 1, count)


@dataclass(frozen=True)
class Problem:
    """One consumer (one block of it) seen by one group: ``y = W x`` with the covariance of x.

    ``weight`` (outputs, d), ``gram`` (d, d) with the ridge on its diagonal, ``mean`` (d,), ``columns`` (units, k): the
    columns that each unit of the group holds; ``scale``: variance of y, so that consumers can be added up.
    """

    consumer: Consumer
    block: int
    weight: Floats
    gram: Floats
    mean: Floats
    columns: Ints
    scale: float


def problems(model: Model, coupling: Coupling, grams: Mapping[str, Gram], group: int) -> list[Problem]:
    """The problems of all linear consumers of a group, in graph order."""
    units = coupling.groups[group].units
    nodes = {n.name: n for n in model.nodes}
    result = []
    for consumer in coupling.consumers:
        labels = coupling.axes[consumer.data, consumer.axis]
        found = grams.get(consumer.node)
        member = np.isin(labels, units)
        if found is None or not member.any():
            continue
        place = site(nodes[consumer.node], model.constants)
        assert place is not None
        weight = place.factor * matrix(place, model.constants[place.weight])
        groups, outs, ins, taps = weight.shape
        per_channel = found.taps
        if found.folded > 1:
            weight = weight.transpose(0, 1, 3, 2).reshape(groups, outs * taps, ins)
        else:
            weight = weight.reshape(groups, outs, ins * taps)
        for block in range(groups):
            local = labels[block * ins : (block + 1) * ins]
            here = np.flatnonzero(np.isin(local, units))
            order = here[np.argsort(local[here], kind="stable")]
            channels = order.reshape(len(units), -1)
            columns = (channels[:, :, None] * per_channel + np.arange(per_channel)).reshape(len(units), -1)
            gram = found.matrix[block].copy()
            gram[np.diag_indices_from(gram)] += shrinkage(gram, found.rows) * np.trace(gram) / len(gram) + 1e-30
            # The variance of y, without the ridge: trace(W G W').
            scale = float(np.einsum("od,od->", weight[block] @ found.matrix[block], weight[block]))
            result.append(
                Problem(consumer, block, weight[block], gram, found.mean[block], columns, max(scale, 1e-30))
            )
    return result


def shrinkage(gram: Floats, rows: int) -> float:
    """Relative ridge for a covariance of few rows: oracle-approximating shrinkage, never below RIDGE.

    Source: Chen, Wiesel, Eldar and Hero, "Shrinkage algorithms for MMSE covariance estimation", IEEE TSP 58 (2010),
    eq. 23, as a ratio of the target's weight to the sample's.
    """
    p = len(gram)
    trace, square = float(np.trace(gram)), float(np.square(gram).sum())
    below = (rows + 1 - 2 / p) * (square - trace**2 / p)
    weight = min(1.0, ((1 - 2 / p) * square + trace**2) / below) if below > 0 else 1.0
    return max(RIDGE, weight / max(1 - weight, 1e-3))


def compensate(problem: Problem, removed: Ints) -> tuple[Floats, Floats]:
    """(weight (outputs, d) with zeros at the removed units' columns, bias shift (outputs,)) of least squared error."""
    gone = problem.columns[removed].reshape(-1)
    stays = np.ones(problem.weight.shape[1], bool)
    stays[gone] = False
    weight = np.zeros_like(problem.weight)
    if stays.any():
        cross = problem.gram[np.ix_(stays, gone)] @ problem.weight[:, gone].T
        factor = cho_factor(problem.gram[np.ix_(stays, stays)], overwrite_a=True, check_finite=False)
        weight[:, stays] = problem.weight[:, stays] + np.asarray(cho_solve(factor, cross)).T
    return weight, (problem.weight - weight) @ problem.mean
