"""Covariance matrices of the inputs of linear consumers, in one streaming pass over the calibration samples.

Both the order of removal (``importance.obs``) and the measured sensitivities need the covariances of the original model
only, so that they are collected once. ``layer_problems`` makes least-squares problems of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from onnx_oamip.core.errors import memory_for
from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import (
    Array,
    Coupling,
    Floats,
    Gram,
    Ints,
    Model,
)
from onnx_oamip.graph.im2col import data_rows, pick, pick_weighted
from onnx_oamip.graph.linear_layers import matrix_shape, site
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.partial_execution import element_types, stream
from onnx_oamip.graph.weight_sharing import Sharing
from onnx_oamip.objective.position_weights import PositionWeights

CAP = 2304
"""Unknowns above which only the channels x channels form is kept (taps folded into the outputs)."""
MOST_COLUMNS = 4096
"""Columns above which a factor is kept in place of the matrix, whose work is cubic in the columns."""
MOST_VALUES = 1 << 25
"""Most values of such a factor, where no option bounds memory."""
MOST_FLOPS = 2e11
"""Floating-point operations of an elimination of all columns of such a factor, about 64 * columns * rows^2."""
FLOPS_PER_VALUE = 64
LEAST_FACTOR_ROWS = 32
ROWS_PER_UNKNOWN = 2
LEAST_ROWS, MOST_ROWS = 4096, 8192
MORE_ROWS = 16_384
MATRIX_WORK = 1e10
"""Multiply-accumulates of a matrix up to which ``MORE_ROWS`` are sampled."""


def collect(
    model: Model,
    coupling: Coupling,
    feeds: Sequence[Mapping[str, Array]],
    device: str,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    cap: int = CAP,
    limit: int | None = None,
    weights: Sequence[PositionWeights] | None = None,
) -> dict[str, Gram]:
    """Collect the covariance of the input of every linear consumer, over sampled rows of all feeds.

    One feed is in memory at a time. Sums are float64. Values that are not finite make the covariance NaN.

    Args:
        model: The model.
        coupling: Its consumers.
        feeds: Calibration samples.
        device: Device that the model runs on.
        seed: Seed of the choice of rows.
        progress: Callback ``(stage, done, total)``.
        cap: Unknowns up to which a matrix has a column for each.
        limit: Most values of a matrix or a factor; None for ``MOST_COLUMNS`` and ``MOST_VALUES``.
        weights: Weights of positions by feed: rows are sampled in proportion to them. None to sample all rows alike.

    Returns:
        Covariances by consumer node; nodes that share a weight have the same one, of the rows of all of them.
    """
    families = _families(model, coupling, cap)
    sums: dict[str, _Sum | _Factor] = {}
    uses: list[_Rows] = []
    for family in families:
        first = family.layers[0]
        most = None if _has_matrix(family.columns, limit) else _most_values(limit)
        uses += [_Rows(model, layer, family, most) for layer in family.layers]
        with memory_for(_purpose(first)):
            sums |= dict.fromkeys(family.names, _empty(model, family, most))
    order = {node.name: i for i, node in enumerate(model.nodes)}
    uses.sort(key=lambda use: order[use.layer.node.name])
    rows = _Chosen(model, uses, feeds, seed, weights)
    types = element_types(model.proto, model.dtypes)
    targets = [use.layer.data for use in uses]
    for b, i, value in stream(model.proto, feeds, targets, types, device):
        use = uses[i]
        # The caller refuses sums that are not finite; a warning would only repeat it.
        with memory_for(_purpose(use.layer)), np.errstate(over="ignore", invalid="ignore"):
            chosen = rows.of(i, b, value)
            sums[use.layer.node.name].add(use.equations(value, chosen), chosen)
        if progress and i + 1 == len(uses):
            progress("gram", b + 1, len(feeds))
    with np.errstate(over="ignore", invalid="ignore"):
        found = {family.names: sums[family.names[0]].gram(family) for family in families}
    by_node = {name: gram for names, gram in found.items() for name in names}
    return {use.layer.node.name: by_node[use.layer.node.name] for use in uses}


def fits(
    grams: Mapping[str, Gram],
    model: Model,
    coupling: Coupling,
    cap: int = CAP,
    limit: int | None = None,
) -> bool:
    """Validate a cache entry: one matrix or factor per consumer, of its size, with finite values.

    Args:
        grams: The entry.
        model: The model.
        coupling: Its consumers.
        cap: Unknowns up to which a matrix has a column for each.
        limit: Most values of a matrix or a factor.

    Returns:
        True if the entry can hold the covariances of the model.
    """
    families = _families(model, coupling, cap)
    if set(grams) != {name for family in families for name in family.names}:
        return False
    for family in families:
        gram = grams[family.names[0]]
        if gram.uses != family.uses or any(grams[name] is not gram for name in family.names):
            return False
        layer, columns = family.layers[0], family.columns
        groups = matrix_shape(layer, model.constants[layer.weight])[0]
        size = len(columns)
        if type(gram.rows) is not int or type(gram.taps) is not int:
            return False
        has_matrix = _has_matrix(columns, limit)
        if has_matrix != (gram.factor is None):
            return False
        rank = size if has_matrix else gram.rows
        if gram.values.shape != (groups, rank, size) or gram.mean.shape != (groups, size):
            return False
        for values in (gram.values, gram.mean):
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
    return min(CAP, math.isqrt(share(coupling, memory_limit)))


def estimated_bytes(model: Model, coupling: Coupling) -> int:
    """Estimate the memory of all covariances where no option bounds it.

    Args:
        model: The model.
        coupling: Its consumers.

    Returns:
        Bytes of the matrices and factors.
    """
    total = 0
    for family in _families(model, coupling, CAP):
        first = family.layers[0]
        groups = matrix_shape(first, model.constants[first.weight])[0]
        size, folded = family.columns.shape
        if _has_matrix(family.columns, None):
            rank = size
        else:
            rank = folded * _Rows(model, first, family, MOST_VALUES).wanted(feeds=1)
        total += 8 * groups * rank * size
    return total


def share(coupling: Coupling, memory_limit: int) -> int:
    """Divide memory by the consumers of a model.

    Args:
        coupling: The consumers of the model.
        memory_limit: Upper bound in bytes on the matrices of all consumers.

    Returns:
        Most values of a matrix of one consumer.
    """
    consumers = len({consumer.node for consumer in coupling.consumers})
    return memory_limit // (8 * max(1, consumers))


def _has_matrix(columns: Ints, limit: int | None) -> bool:
    """Test for a consumer that keeps a matrix of its columns, not a factor."""
    return len(columns) <= MOST_COLUMNS and (limit is None or len(columns) ** 2 <= limit)


def _purpose(layer: Site) -> str:
    return f"the second moments of what {layer.node} reads"


def _batch(model: Model, feed: Mapping[str, Array]) -> Fraction:
    """Size of a feed as a multiple of the batch in the model's shapes."""
    name = model.inputs[0].name
    shape = model.shapes.get(name, ())
    if not shape or not shape[0]:
        return Fraction(1)
    return Fraction(len(feed[name]), shape[0])


@dataclass(frozen=True)
class _Family:
    """Linear consumers that share a weight and read the same units.

    Attributes:
        layers: The consumers in graph order; one for a weight that is not shared.
        columns: Inputs of the columns (d, fold).
    """

    layers: tuple[Site, ...]
    columns: Ints

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the nodes."""
        return tuple(layer.node.name for layer in self.layers)

    @property
    def uses(self) -> tuple[str, ...]:
        """Names of the nodes if there are several, as :class:`Gram` has them."""
        return self.names if len(self.layers) > 1 else ()


def _families(
    model: Model,
    coupling: Coupling,
    cap: int,
) -> list[_Family]:
    """Linear consumers in the order of the first one that shares their weight."""
    axes = {c.node: coupling.axes[c.data, c.axis] for c in coupling.consumers}
    sharing = Sharing(model)
    result: list[_Family] = []
    done: set[str] = set()
    for node in model.nodes:
        is_due = node.name in axes and node.name not in done
        layer = site(node, model.constants) if is_due else None
        if layer is None:
            continue
        labels = axes[node.name]
        layers = sharing.family(layer)
        # A weight that is read in several forms, or through several factors, is not one set of unknowns here.
        is_one_problem = len(layers) > 1 and not sharing.obstacle(layer)
        is_one_problem = is_one_problem and all(
            other.factor == layer.factor
            and other.node.name in axes
            and np.array_equal(axes[other.node.name], labels)
            for other in layers
        )
        layers = layers if is_one_problem else (layer,)
        family = _Family(layers, _columns(layer, model.constants[layer.weight], labels, cap))
        result.append(family)
        done.update(family.names)
    return result


def _columns(
    layer: Site,
    weight: Array,
    labels: Ints,
    cap: int,
) -> Ints:
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


class _Rows:
    """Rows that one consumer reads: how many there are, how many to sample, and their equations."""

    def __init__(self, model: Model, layer: Site, family: _Family, most: int | None) -> None:
        """Describe the rows.

        Args:
            model: The model.
            layer: The consumer.
            family: The consumers that share its weight, which share the number of rows.
            most: Most values of a factor; None for a matrix.
        """
        self.layer, self.columns = layer, family.columns
        self.sharers, self.most = len(family.layers), most
        self.groups, _, _, self.taps = matrix_shape(layer, model.constants[layer.weight])
        self.data_shape = model.shapes[layer.data]
        self.output_shape = model.shapes[layer.node.outputs[0]]

    def wanted(self, feeds: int) -> int:
        """Compute the rows to sample from each feed.

        Args:
            feeds: Number of feeds.

        Returns:
            Number of rows; those of a factor do not exceed the limits of memory and time.
        """
        size, folded = self.columns.shape
        parts = feeds * self.sharers
        if self.most is None:
            enough = min(max(ROWS_PER_UNKNOWN * size, LEAST_ROWS), MOST_ROWS)
            cheap = min(int(MATRIX_WORK / size**2), MORE_ROWS)
            whole: int = max(64, max(enough, cheap) // folded)
            return -(-whole // parts)
        in_memory = self.most // (self.groups * size)
        in_time = math.isqrt(int(MOST_FLOPS / (FLOPS_PER_VALUE * self.groups * size)))
        equations = max(LEAST_FACTOR_ROWS, min(in_memory, in_time, MOST_ROWS))
        rows: int = max(1, equations // (folded * parts))
        return rows

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

    def axes(self, value: Array) -> tuple[int, ...]:
        """Return the lengths of the axes that the rows of a value of the consumer's input run over.

        Args:
            value: The value for one feed.

        Returns:
            Lengths, samples first.
        """
        if self.layer.spatial:
            return (len(value), *self.output_shape[2:])
        axis = self.layer.data_axis % value.ndim
        return value.shape[:axis] + value.shape[axis + 1 :]

    def equations(self, value: Array, rows: Ints) -> Floats:
        """Cut out rows of one feed.

        Args:
            value: Value of the consumer's input for the feed.
            rows: Indices of the rows.

        Returns:
            Values of the columns (groups, equations, d).
        """
        output = (len(value), *self.output_shape[1:])
        inputs = data_rows(self.layer, value, rows, output).transpose(1, 0, 2)
        # Equal places of all columns make one equation each.
        by_place: Floats = inputs[:, :, self.columns.T]
        return by_place.reshape(self.groups, -1, len(self.columns))

    def _positions(self) -> int:
        return int(np.prod(self.output_shape[2:]))


class _Chosen:
    """Rows that are sampled, by consumer and feed."""

    def __init__(
        self,
        model: Model,
        consumers: Sequence[_Rows],
        feeds: Sequence[Mapping[str, Array]],
        seed: int,
        weights: Sequence[PositionWeights] | None,
    ) -> None:
        self.consumers, self.feeds, self.seed, self.weights = consumers, len(feeds), seed, weights
        rng = np.random.default_rng(seed)
        batches = [_batch(model, feed) for feed in feeds] if weights is None else []
        self.counts = [[rows.rows(batch) for batch in batches] for rows in consumers]
        self.chosen = [
            [pick(count, rows.wanted(self.feeds), rng) for count in counts]
            for rows, counts in zip(consumers, self.counts, strict=True)
        ]

    def of(self, consumer: int, feed: int, value: Array) -> Ints:
        """Indices of the rows of a value of a consumer's input."""
        rows = self.consumers[consumer]
        wanted = rows.wanted(self.feeds)
        axes = rows.axes(value)
        count = int(np.prod(axes))
        if self.weights is None and count == self.counts[consumer][feed]:
            return self.chosen[consumer][feed]
        # The size of this tensor depends on the data, or weights choose its rows.
        rng = np.random.default_rng((self.seed, consumer, feed))
        if self.weights is None:
            return pick(count, wanted, rng)
        return pick_weighted(self.weights[feed].rows(axes), wanted, rng)


def _most_values(limit: int | None) -> int:
    """Most values of a factor."""
    return MOST_VALUES if limit is None else min(MOST_VALUES, limit)


def _empty(model: Model, family: _Family, most: int | None) -> _Sum | _Factor:
    """Sums over the rows of consumers that share a weight, or the rows themselves where a factor is kept."""
    first = family.layers[0]
    groups, _, _, taps = matrix_shape(first, model.constants[first.weight])
    if most is None:
        return _Sum(groups, len(family.columns), taps)
    return _Factor(taps)


class _Sum:
    """Sums over rows: of the columns (groups, d), and of their products (groups, d, d).

    They are relative to the first row: sums of squares of large values lose the digits of a small variance, and a
    constant column has the variance 0 to the last digit.
    """

    def __init__(self, groups: int, size: int, taps: int) -> None:
        self.taps = taps
        self.total = np.zeros((groups, size))
        self.square = np.zeros((groups, size, size))
        self.seen = 0
        self.squared_counts = 0
        self.origin: Floats | None = None

    def add(self, equations: Floats, rows: Ints) -> None:
        """Add rows of one consumer and feed to the sums.

        Args:
            equations: Values of the columns (groups, equations, d), changed in place.
            rows: Indices of the rows that the equations belong to.
        """
        if not equations.shape[1]:
            return
        if self.origin is None:
            self.origin = equations[:, 0].copy()
        equations -= self.origin[:, None]
        self.total += equations.sum(axis=1)
        self.square += equations.transpose(0, 2, 1) @ equations
        self.seen += equations.shape[1]
        of_row = equations.shape[1] // len(rows)
        self.squared_counts += of_row * int(np.square(np.unique(rows, return_counts=True)[1]).sum())

    def gram(self, family: _Family) -> Gram:
        """Compute the covariance in place: the sums are not valid afterwards.

        Args:
            family: The consumers.

        Returns:
            The covariance of the columns; zeros if there were no rows.
        """
        count = max(self.seen, 1)
        mean = self.total / count
        self.square /= count
        self.square -= mean[:, :, None] * mean[:, None, :]
        if self.origin is not None:
            mean += self.origin
        # Rows that were chosen repeatedly say less than as many different ones (Kish's effective sample size).
        distinct = round(self.seen**2 / max(self.squared_counts, 1))
        return Gram(self.square, mean, family.columns, self.taps, distinct, uses=family.uses)


class _Factor:
    """Rows of a consumer with too many columns for a matrix: as many as its share of memory and of time allows."""

    def __init__(self, taps: int) -> None:
        self.taps = taps
        self.parts: list[Floats] = []

    def add(self, equations: Floats, _rows: Ints) -> None:
        """Keep rows of one consumer and feed.

        Args:
            equations: Values of the columns (groups, equations, d).
            _rows: Indices of the rows that the equations belong to.
        """
        self.parts.append(equations)

    def gram(self, family: _Family) -> Gram:
        """Compute the factor of the covariance.

        Args:
            family: The consumers.

        Returns:
            The covariance of the columns.
        """
        factor = np.concatenate(self.parts, axis=1)
        self.parts.clear()
        rows = factor.shape[1]
        count = max(rows, 1)
        origin = factor[:, :1].copy()
        factor -= origin
        mean = factor.sum(axis=1, keepdims=True) / count
        factor -= mean
        factor /= math.sqrt(count)
        if rows:
            mean += origin
        return Gram(None, mean[:, 0], family.columns, self.taps, rows, factor, family.uses)
