"""Second moments of what linear consumers read, and the least-squares problem that each consumer poses to a group.

Removing channels from a consumer ``y = W x`` costs, after the best linear repair by the channels that stay, a quadratic
in the covariance G of x. Both the order of removal (``importance.obs``) and the measured sensitivities need G for the
original model only: it is collected once, in one walk over the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from .affine import Site, matrix, matrix_shape, site
from .calibrate import Progress
from .errors import memory_for
from .patches import data_rows, pick
from .records import Array, Consumer, Coupling, Floats, Gram, Ints, Model
from .subgraph import Frontier, element_types

Job = tuple[int, Mapping[str, Gram]]
"""A group, and second moments by the nodes that read it."""
CAP = 2304
"""Unknowns above which only the channels x channels form is kept (taps folded into the outputs)."""
MOST_COLUMNS = 8192
"""Above this a consumer has no Gram matrix (half a gigabyte): its units are judged by their activations alone."""
ROWS_PER_UNKNOWN = 2
LEAST_ROWS, MOST_ROWS = 4096, 8192
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
    axes = {c.node: coupling.axes[c.data, c.axis] for c in coupling.consumers}
    places = [p for n in model.nodes if n.name in axes and (p := site(n, model.constants)) is not None]
    result = {}
    for i, place in enumerate(places):
        columns = _columns(place, model.constants[place.weight], axes[place.node.name], cap)
        if len(columns) <= MOST_COLUMNS:
            with memory_for(f"the second moments of what {place.node} reads"):
                inputs = frontier.reach([place.data])[place.data]
                result[place.node.name] = _one(model, place, inputs, columns, rng)
        if progress:
            progress("gram", i + 1, len(places))
    return result


def cap(coupling: Coupling, room: int) -> int:
    """Unknowns up to which a matrix holds every one, such that all matrices of that size take at most ``room`` bytes.

    Wider ones are kept in the channels x channels form, as above ``CAP``.
    """
    return min(CAP, math.isqrt(room // (8 * max(1, len({c.node for c in coupling.consumers})))))


def _columns(place: Site, weight: Array, labels: Ints, cap: int) -> Ints:
    """(d, fold) inputs by column: one by one up to ``cap``, else the taps of a channel, or the inputs of a unit."""
    groups, _, ins, taps = matrix_shape(place, weight)
    every = np.arange(ins * taps)
    if ins * taps <= cap:
        return every[:, None]
    if taps > 1:
        return every.reshape(ins, taps)
    counts = np.unique(labels, return_counts=True)[1]
    if groups == 1 and (labels >= 0).all() and (counts == counts[0]).all():
        return np.argsort(labels, kind="stable").reshape(len(counts), -1)
    return every[:, None]


def _one(model: Model, place: Site, inputs: Sequence[Array], columns: Ints, rng: np.random.Generator) -> Gram:
    groups, _, _, taps = matrix_shape(place, model.constants[place.weight])
    d, folded = columns.shape
    wanted = max(64, int(np.clip(ROWS_PER_UNKNOWN * d, LEAST_ROWS, MOST_ROWS)) // folded)
    total = np.zeros((groups, d))
    gram = np.zeros((groups, d, d))
    count = 0
    per_feed = -(-wanted // len(inputs))
    for x in inputs:
        shape = (len(x), *model.shapes[place.node.outputs[0]][1:])
        rows = int(np.prod((len(x), *shape[2:]))) if place.spatial else x.size // x.shape[place.data_axis]
        found = data_rows(place, x, pick(rows, per_feed, rng), shape).transpose(1, 0, 2)
        # Equal places of all columns make one equation each.
        found = found[:, :, columns.T].reshape(groups, -1, d)
        total += found.sum(axis=1)
        gram += found.transpose(0, 2, 1) @ found
        count += found.shape[1]
    mean = total / count
    gram = gram / count - mean[:, :, None] * mean[:, None, :]
    return Gram(gram, mean, columns, taps, count)


@dataclass(frozen=True)
class Problem:
    """One consumer (one block of it) seen by one group: ``y = W x`` with the covariance of x.

    ``weight`` (outputs * fold, d), ``gram`` (d, d) with the ridge on its diagonal, ``mean`` (d,), ``columns`` (units,
    k): the columns that each unit of the group holds; ``spread`` (d, fold): the node's own inputs behind each column;
    ``scale``: variance of y, so that consumers can be added up; ``ridge``: what stands on the diagonal of ``gram``.
    """

    consumer: Consumer
    block: int
    weight: Floats
    gram: Floats
    mean: Floats
    columns: Ints
    spread: Ints
    scale: float
    ridge: float = 0.0

    def unfold(self, weight: Floats, shift: Floats) -> tuple[Floats, Floats]:
        """(weight (outputs, inputs), shift (outputs,)) of the node's block from folded ones."""
        d, fold = self.spread.shape
        full = np.empty((len(weight) // fold, d * fold))
        full[:, self.spread] = weight.reshape(-1, fold, d).transpose(0, 2, 1)
        return full, shift.reshape(-1, fold).sum(axis=1)


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
        groups, outs, ins, _ = weight.shape
        flat = weight.reshape(groups, outs, -1)
        d, folded = found.columns.shape
        for block in range(groups):
            local = labels[block * ins : (block + 1) * ins][found.columns[:, 0] // found.taps]
            here = np.flatnonzero(np.isin(local, units))
            columns = here[np.argsort(local[here], kind="stable")].reshape(len(units), -1)
            part = flat[block][:, found.columns].transpose(0, 2, 1).reshape(outs * folded, d)
            covariance = found.matrix[block]
            ridge = shrinkage(covariance, found.rows)
            gram = covariance / (1 + ridge)  # the trace stays: a strong ridge must not make a consumer louder
            load = float(ridge * np.trace(gram) / len(gram) + 1e-30)
            gram[np.diag_indices_from(gram)] += load
            # The variance of y, without the ridge: trace(W G W').
            scale = max(float(np.einsum("od,od->", part @ covariance, part)), 1e-30)
            result.append(Problem(consumer, block, part, gram, found.mean[block], columns, found.columns, scale, load))
    return result


def jobs(coupling: Coupling, grams: Mapping[str, Gram]) -> list[Job]:
    """Every group with the second moments that its problems are made from, to be worked on wherever there is room."""
    result: list[Job] = []
    for g, group in enumerate(coupling.groups):
        readers = (c.node for c in coupling.consumers if np.isin(coupling.axes[c.data, c.axis], group.units).any())
        result.append((g, {name: grams[name] for name in readers if name in grams}))
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


def compensate(problem: Problem, removed: Ints, repair: str = "least-squares") -> tuple[Floats, Floats]:
    """(weight (outputs, d) with zeros at the removed units' columns, bias shift (outputs,)).

    ``repair``: the rest is fitted for the least squared error, or only the means are folded (``bias``), or nothing is
    done (``none``).
    """
    gone = problem.columns[removed].reshape(-1)
    stays = np.ones(problem.weight.shape[1], bool)
    stays[gone] = False
    weight = np.where(stays, problem.weight, 0.0)
    if repair == "none":
        return weight, np.zeros(len(weight))
    if repair == "least-squares" and stays.any():
        cross = problem.gram[np.ix_(stays, gone)] @ problem.weight[:, gone].T
        factor = cho_factor(problem.gram[np.ix_(stays, stays)], overwrite_a=True, check_finite=False)
        weight[:, stays] += np.asarray(cho_solve(factor, cross)).T
    return weight, (problem.weight - weight) @ problem.mean
