"""Covariance matrices of the inputs of linear consumers, in one streaming pass over the calibration samples.

Both the order of removal (``importance.obs``) and the measured sensitivities need the covariances of the original model
only, so that they are collected once. ``layer_problems`` makes least-squares problems of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from onnx_oamip.core.errors import memory_for
from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import (
    Array,
    Coupling,
    Gram,
    Ints,
    Model,
)
from onnx_oamip.graph.im2col import data_rows, pick
from onnx_oamip.graph.linear_layers import matrix_shape, site
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.partial_execution import element_types, stream

CAP = 2304
"""Unknowns above which only the channels x channels form is kept (taps folded into the outputs)."""
MOST_COLUMNS = 8192
"""Columns above which a consumer has no matrix (half a gigabyte): its units are scored by their activations alone."""
ROWS_PER_UNKNOWN = 2
LEAST_ROWS, MOST_ROWS = 4096, 8192


def collect(
    model: Model,
    coupling: Coupling,
    feeds: Sequence[Mapping[str, Array]],
    device: str,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    cap: int = CAP,
) -> dict[str, Gram]:
    """Collect the covariance of the input of every linear consumer, over sampled rows of all feeds.

    One feed is in memory at a time. Sums are float64.

    Args:
        model: The model.
        coupling: Its consumers.
        feeds: Calibration samples.
        device: Device that the model runs on.
        seed: Seed of the choice of rows.
        progress: Callback ``(stage, done, total)``.
        cap: Unknowns up to which a matrix has a column for each.

    Returns:
        Covariances by consumer node.
    """
    sums = []
    for layer, columns in _layers(model, coupling, cap):
        if len(columns) <= MOST_COLUMNS:
            with memory_for(_purpose(layer)):
                sums.append(_Sum(model, layer, columns))
    batches = [_batch(model, feed) for feed in feeds]
    rng = np.random.default_rng(seed)
    rows = []
    for total in sums:
        wanted = total.wanted(len(feeds))
        rows.append([pick(total.rows(batch), wanted, rng) for batch in batches])

    types = element_types(model.proto, model.dtypes)
    targets = [total.layer.data for total in sums]
    for b, i, value in stream(model.proto, feeds, targets, types, device):
        total = sums[i]
        count = total.count(value)
        if count != total.rows(batches[b]):
            # The size of this tensor depends on the data, so that its rows are chosen now.
            own_rng = np.random.default_rng((seed, i, b))
            rows[i][b] = pick(count, total.wanted(len(feeds)), own_rng)
        with memory_for(_purpose(total.layer)):
            total.add(value, rows[i][b])
        if progress and i + 1 == len(sums):
            progress("gram", b + 1, len(feeds))
    return {total.layer.node.name: total.gram() for total in sums}


def fits(grams: Mapping[str, Gram], model: Model, coupling: Coupling, cap: int = CAP) -> bool:
    """Validate a cache entry: one matrix per consumer, of its size, with finite values.

    Args:
        grams: The entry.
        model: The model.
        coupling: Its consumers.
        cap: Unknowns up to which a matrix has a column for each.

    Returns:
        True if the entry can hold the covariances of the model.
    """
    every = _layers(model, coupling, cap)
    expected = [(layer, columns) for layer, columns in every if len(columns) <= MOST_COLUMNS]
    if list(grams) != [layer.node.name for layer, _ in expected]:
        return False
    for (layer, columns), gram in zip(expected, grams.values(), strict=True):
        groups = matrix_shape(layer, model.constants[layer.weight])[0]
        size = len(columns)
        if gram.matrix.shape != (groups, size, size) or gram.mean.shape != (groups, size):
            return False
        if type(gram.rows) is not int or type(gram.taps) is not int:
            return False
        for values in (gram.matrix, gram.mean):
            if values.dtype != np.float64 or not np.isfinite(values).all():
                return False
        if not np.array_equal(gram.columns, columns):
            return False
    return True


def cap(coupling: Coupling, memory_limit: int) -> int:
    """Compute the unknowns up to which a matrix has a column for each.

    Wider consumers keep the channels x channels form, as above ``CAP``.

    Args:
        coupling: The consumers of the model.
        memory_limit: Upper bound in bytes on the matrices of all consumers, if all had that size.

    Returns:
        The number of unknowns, at most ``CAP``.
    """
    consumers = len({consumer.node for consumer in coupling.consumers})
    values_per_matrix = memory_limit // (8 * max(1, consumers))
    return min(CAP, math.isqrt(values_per_matrix))


def _purpose(layer: Site) -> str:
    return f"the second moments of what {layer.node} reads"


def _batch(model: Model, feed: Mapping[str, Array]) -> Fraction:
    """Size of a feed as a multiple of the batch in the model's shapes."""
    name = model.inputs[0].name
    shape = model.shapes.get(name, ())
    if not shape or not shape[0]:
        return Fraction(1)
    return Fraction(len(feed[name]), shape[0])


def _layers(model: Model, coupling: Coupling, cap: int) -> list[tuple[Site, Ints]]:
    """Linear consumers in graph order, each with the inputs (d, fold) of its columns."""
    axes = {c.node: coupling.axes[c.data, c.axis] for c in coupling.consumers}
    result = []
    for node in model.nodes:
        layer = site(node, model.constants) if node.name in axes else None
        if layer is not None:
            weight = model.constants[layer.weight]
            result.append((layer, _columns(layer, weight, axes[node.name], cap)))
    return result


def _columns(layer: Site, weight: Array, labels: Ints, cap: int) -> Ints:
    """(d, fold) inputs by column: one by one up to ``cap``, else the taps of a channel, or the inputs of a unit."""
    groups, _, ins, taps = matrix_shape(layer, weight)
    every = np.arange(ins * taps)
    if ins * taps <= cap:
        return every[:, None]
    if taps > 1:
        return every.reshape(ins, taps)
    counts = np.unique(labels, return_counts=True)[1]
    equal_units = (labels >= 0).all() and (counts == counts[0]).all()
    if groups == 1 and equal_units:
        return np.argsort(labels, kind="stable").reshape(len(counts), -1)
    return every[:, None]


class _Sum:
    """Sums over the rows that one consumer reads: of the columns (groups, d), and of their products (groups, d, d)."""

    def __init__(self, model: Model, layer: Site, columns: Ints) -> None:
        self.layer, self.columns = layer, columns
        self.groups, _, _, self.taps = matrix_shape(layer, model.constants[layer.weight])
        self.data_shape = model.shapes[layer.data]
        self.output_shape = model.shapes[layer.node.outputs[0]]
        size = len(columns)
        self.total = np.zeros((self.groups, size))
        self.square = np.zeros((self.groups, size, size))
        self.seen = 0

    def wanted(self, feeds: int) -> int:
        """Compute the rows to sample from each feed.

        Args:
            feeds: Number of feeds.

        Returns:
            Number of rows.
        """
        size, folded = self.columns.shape
        enough = max(ROWS_PER_UNKNOWN * size, LEAST_ROWS)
        whole: int = max(64, min(enough, MOST_ROWS) // folded)
        return -(-whole // feeds)

    def rows(self, batch: Fraction) -> int:
        """Compute the rows of a feed from the shapes of the model.

        Args:
            batch: Size of the feed as a multiple of the batch in the model's shapes.

        Returns:
            Number of rows.
        """
        if self.layer.spatial:
            return int(batch * self.data_shape[0]) * self._positions()
        values = int(batch * int(np.prod(self.data_shape)))
        return values // self.data_shape[self.layer.data_axis]

    def count(self, value: Array) -> int:
        """Count the rows of a value of the consumer's input.

        Args:
            value: The value for one feed.

        Returns:
            Number of rows.
        """
        if self.layer.spatial:
            return len(value) * self._positions()
        return int(value.size) // int(value.shape[self.layer.data_axis])

    def add(self, value: Array, rows: Ints) -> None:
        """Add rows of one feed to the sums.

        Args:
            value: Value of the consumer's input for the feed.
            rows: Indices of the rows.
        """
        output = (len(value), *self.output_shape[1:])
        inputs = data_rows(self.layer, value, rows, output).transpose(1, 0, 2)
        # Equal places of all columns make one equation each.
        by_place = inputs[:, :, self.columns.T]
        equations = by_place.reshape(self.groups, -1, len(self.columns))
        self.total += equations.sum(axis=1)
        self.square += equations.transpose(0, 2, 1) @ equations
        self.seen += equations.shape[1]

    def gram(self) -> Gram:
        """Compute the covariance in place: the sums are not valid afterwards.

        Returns:
            The covariance of the columns.
        """
        mean = self.total / self.seen
        self.square /= self.seen
        self.square -= mean[:, :, None] * mean[:, None, :]
        return Gram(self.square, mean, self.columns, self.taps, self.seen)

    def _positions(self) -> int:
        return int(np.prod(self.output_shape[2:]))
