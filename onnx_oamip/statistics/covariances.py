"""Second moments of what linear consumers read, and the least-squares problem that each consumer poses to a group.

Removing channels from a consumer ``y = W x`` costs, after the best linear repair by the channels that stay, a quadratic
in the covariance G of x. Both the order of removal (``importance.obs``) and the measured sensitivities need G for the
original model only: it is collected once, in one walk over the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from onnx_oamip.core.errors import memory_for
from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import (
    Array,
    Consumer,
    Coupling,
    Floats,
    Gram,
    Ints,
    Model,
)
from onnx_oamip.graph.im2col import data_rows, pick
from onnx_oamip.graph.linear_layers import matrix, matrix_shape, site
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.partial_execution import element_types, stream

Job = tuple[int, Mapping[str, Gram]]
"""A group, and second moments by the nodes that read it."""
CAP = 2304
"""Unknowns above which only the channels x channels form is kept (taps folded into the outputs)."""
MOST_COLUMNS = 8192
"""Above this a consumer has no Gram matrix (half a gigabyte): its units are judged by their activations alone."""
ROWS_PER_UNKNOWN = 2
LEAST_ROWS, MOST_ROWS = 4096, 8192
TINY = 1e-150
"""Stands for a variance of 0. Far below the squares of any activation in float32, so that scales do not matter."""
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
    """Centred Gram matrices by consumer node, float64, over sampled rows of all feeds; one feed is held at a time."""
    sums = []
    for place, columns in _places(model, coupling, cap):
        if len(columns) <= MOST_COLUMNS:
            with memory_for(_reading(place)):
                sums.append(_Sum(model, place, columns))
    batches = [_batch(model, feed) for feed in feeds]
    rng = np.random.default_rng(seed)
    rows = [
        [pick(total.rows(batch), total.wanted(len(feeds)), rng) for batch in batches]
        for total in sums
    ]
    types = element_types(model.proto, model.dtypes)
    for b, i, value in stream(
        model.proto, feeds, [total.place.data for total in sums], types, device
    ):
        count = sums[i].count(value)
        if count != sums[i].rows(batches[b]):  # a size that only a run tells
            rows[i][b] = pick(
                count, sums[i].wanted(len(feeds)), np.random.default_rng((seed, i, b))
            )
        with memory_for(_reading(sums[i].place)):
            sums[i].add(value, rows[i][b])
        if progress and i + 1 == len(sums):
            progress("gram", b + 1, len(feeds))
    return {total.place.node.name: total.gram() for total in sums}


def _reading(place: Site) -> str:
    return f"the second moments of what {place.node} reads"


def _batch(model: Model, feed: Mapping[str, Array]) -> Fraction:
    """How many times the batch that the model's shapes are of a feed holds."""
    name = model.inputs[0].name
    shape = model.shapes.get(name, ())
    return Fraction(len(feed[name]), shape[0]) if shape and shape[0] else Fraction(1)


def _places(model: Model, coupling: Coupling, cap: int) -> list[tuple[Site, Ints]]:
    """Consumers, each with the inputs (d, fold) of its columns."""
    axes = {c.node: coupling.axes[c.data, c.axis] for c in coupling.consumers}
    places = [
        p for n in model.nodes if n.name in axes and (p := site(n, model.constants)) is not None
    ]
    return [(p, _columns(p, model.constants[p.weight], axes[p.node.name], cap)) for p in places]


def fits(grams: Mapping[str, Gram], model: Model, coupling: Coupling, cap: int = CAP) -> bool:
    """Whether these may be the matrices of a model: one for each consumer, of its size, finite."""
    held = [
        (p, columns) for p, columns in _places(model, coupling, cap) if len(columns) <= MOST_COLUMNS
    ]
    if list(grams) != [p.node.name for p, _ in held]:
        return False
    for (place, columns), g in zip(held, grams.values(), strict=True):
        groups, d = matrix_shape(place, model.constants[place.weight])[0], len(columns)
        whole = (
            g.matrix.shape == (groups, d, d) and g.mean.shape == (groups, d) and type(g.rows) is int
        )
        finite = all(v.dtype == np.float64 and np.isfinite(v).all() for v in (g.matrix, g.mean))
        if not (whole and finite and type(g.taps) is int and np.array_equal(g.columns, columns)):
            return False
    return True


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


class _Sum:
    """Sums of what one consumer reads: over rows (groups, d), and of their products (groups, d, d)."""

    def __init__(self, model: Model, place: Site, columns: Ints) -> None:
        self.place, self.columns = place, columns
        self.groups, _, _, self.taps = matrix_shape(place, model.constants[place.weight])
        self.data, self.output = model.shapes[place.data], model.shapes[place.node.outputs[0]]
        d = len(columns)
        self.total = np.zeros((self.groups, d))
        self.square = np.zeros((self.groups, d, d))
        self.seen = 0

    def wanted(self, feeds: int) -> int:
        """Rows to be sampled from each of so many feeds."""
        d, folded = self.columns.shape
        whole: int = max(64, min(max(ROWS_PER_UNKNOWN * d, LEAST_ROWS), MOST_ROWS) // folded)
        return -(-whole // feeds)

    def rows(self, batch: Fraction) -> int:
        """Rows that a feed of ``batch`` times the model's own batch should have."""
        place = self.place
        if place.spatial:
            return int(batch * self.data[0]) * int(np.prod(self.output[2:]))
        return int(batch * int(np.prod(self.data))) // self.data[place.data_axis]

    def count(self, x: Array) -> int:
        """Rows that there are in what the consumer reads of a feed."""
        place = self.place
        return (
            len(x) * int(np.prod(self.output[2:]))
            if place.spatial
            else x.size // x.shape[place.data_axis]
        )

    def add(self, x: Array, rows: Ints) -> None:
        """Take up the rows of a feed."""
        found = data_rows(self.place, x, rows, (len(x), *self.output[1:])).transpose(1, 0, 2)
        # Equal places of all columns make one equation each.
        found = found[:, :, self.columns.T].reshape(self.groups, -1, len(self.columns))
        self.total += found.sum(axis=1)
        self.square += found.transpose(0, 2, 1) @ found
        self.seen += found.shape[1]

    def gram(self) -> Gram:
        """The centred matrix; the sums are used up."""
        mean = self.total / self.seen
        self.square /= self.seen
        self.square -= mean[:, :, None] * mean[:, None, :]
        return Gram(self.square, mean, self.columns, self.taps, self.seen)


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


def problems(
    model: Model, coupling: Coupling, grams: Mapping[str, Gram], group: int
) -> list[Problem]:
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
            gram = covariance / (
                1 + ridge
            )  # the trace stays: a strong ridge must not make a consumer louder
            load = float(ridge * np.trace(gram) / len(gram) + TINY)
            gram[np.diag_indices_from(gram)] += load
            # The variance of y, without the ridge: trace(W G W').
            scale = max(float(np.einsum("od,od->", part @ covariance, part)), TINY)
            result.append(
                Problem(
                    consumer,
                    block,
                    part,
                    gram,
                    found.mean[block],
                    columns,
                    found.columns,
                    scale,
                    load,
                )
            )
    return result


def jobs(coupling: Coupling, grams: Mapping[str, Gram]) -> list[Job]:
    """Every group with the second moments that its problems are made from, to be worked on wherever there is room."""
    result: list[Job] = []
    for g, group in enumerate(coupling.groups):
        readers = (
            c.node
            for c in coupling.consumers
            if np.isin(coupling.axes[c.data, c.axis], group.units).any()
        )
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


def compensate(
    problem: Problem, removed: Ints, repair: str = "least-squares"
) -> tuple[Floats, Floats]:
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
        factor = cho_factor(
            problem.gram[np.ix_(stays, stays)], overwrite_a=True, check_finite=False
        )
        weight[:, stays] += np.asarray(cho_solve(factor, cross)).T
    return weight, (problem.weight - weight) @ problem.mean
