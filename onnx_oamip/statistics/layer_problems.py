"""The least-squares problem that each linear consumer poses to a group of units.

Removing inputs from a consumer ``y = W x`` costs, after the best linear repair by the inputs that are kept, a quadratic
in the covariance G of x.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from onnx_oamip.core.cholesky import Cholesky
from onnx_oamip.core.records import (
    Bools,
    Consumer,
    Coupling,
    Floats,
    Gram,
    Ints,
    Model,
)
from onnx_oamip.graph.linear_layers import matrix, site

Job = tuple[int, Mapping[str, Gram]]
"""A group, and the covariances of the nodes that read it."""
TINY = 1e-150
"""Stands for a variance of 0. Far below the squares of any activation in float32, so that scales do not matter."""
RIDGE = 1e-3
"""Relative to the mean diagonal: keeps a covariance of few rows from promising a perfect repair."""
MAX_SPREAD = 1 / RIDGE
"""Variance over the median variance from which an input would make ridges larger than the median; it is scaled down."""

HELD = 3
"""Arrays of the size of a consumer's covariance or weight that are held while a group is solved, for each consumer."""
PASSING = 3
"""Further arrays of that size for one consumer at a time."""
MODEL_COPIES = 6
"""Copies of all constants: the file, their values, and models in the runtime."""
LIBRARY_BYTES = 200 << 20
"""Memory of Python, the libraries and ONNX Runtime, before a model is read."""
VALUE_BYTES = 8
"""Bytes of a value in double precision."""


@dataclass(frozen=True)
class Problem:
    """One consumer (one block of it) as seen by one group: ``y = W x`` with the covariance of x.

    Attributes:
        consumer: The consumer; the first of those that share its weight.
        block: Index of the block of a grouped convolution.
        weight: W (outputs * fold, d).
        gram: Covariance G (d, d) with the ridge on its diagonal; None if ``factor`` stands for it.
        mean: Mean of x (d,).
        columns: Columns (units, k) that each unit of the group holds.
        spread: The node's own inputs (d, fold) behind each column.
        scale: Variance of y, in which losses of several consumers are comparable.
        ridge: The number on the diagonal of ``gram``.
        share: Weight of this consumer beside those of the group's other consumers, 1 on average.
        factor: F (rows, d) with ``G = F' F + ridge I``, of a consumer with many columns; else None.
        units: Unit of each column (d,), of this group or another one; -1 where there is none.
        divisors: Numbers (d,) that x was divided by, and W multiplied with, to be of similar size; None for ones.
        uses: Names of the nodes that share the weight: their problems are one, over the rows of all of them.
    """

    consumer: Consumer
    block: int
    weight: Floats
    gram: Floats | None
    mean: Floats
    columns: Ints
    spread: Ints
    scale: float
    ridge: float = 0.0
    share: float = 1.0
    factor: Floats | None = None
    units: Ints | None = None
    divisors: Floats | None = None
    uses: tuple[str, ...] = ()

    @property
    def constant(self) -> Bools:
        """Units (units,) whose columns are all constant: a bias makes up for them."""
        if self.factor is None:
            assert self.gram is not None
            ridged = np.diagonal(self.gram)
        else:
            ridged = np.square(self.factor).sum(axis=0) + self.ridge
        varies = ridged > self.ridge
        return np.asarray(~varies[self.columns].any(axis=1))

    def variance(self, weight: Floats) -> float:
        """Compute the variance of ``weight x``, summed over the outputs.

        Args:
            weight: Weights (outputs * fold, d).

        Returns:
            The trace of ``weight (G - ridge I) weight'``.
        """
        if self.factor is not None:
            return float(np.square(self.factor @ weight.T).sum())
        assert self.gram is not None
        covariance = self.gram - self.ridge * np.eye(len(self.gram))
        return float(np.einsum("od,od->", weight @ covariance, weight))

    def unfold(self, weight: Floats, shift: Floats) -> tuple[Floats, Floats]:
        """Turn folded weights into those of the node's block.

        Args:
            weight: Weights (outputs * fold, d).
            shift: Bias (outputs * fold,).

        Returns:
            Weights (outputs, inputs) and bias (outputs,).
        """
        if self.divisors is not None:
            weight = weight / self.divisors
        size, fold = self.spread.shape
        if np.array_equal(self.spread, np.arange(size)[:, None]):
            return weight, shift
        full = np.empty((len(weight) // fold, size * fold))
        full[:, self.spread] = weight.reshape(-1, fold, size).transpose(0, 2, 1)
        return full, shift.reshape(-1, fold).sum(axis=1)


def problems(
    model: Model,
    coupling: Coupling,
    grams: Mapping[str, Gram],
    group: int,
) -> list[Problem]:
    """Make the problems of all linear consumers of a group.

    Args:
        model: The model.
        coupling: Its groups and consumers.
        grams: Covariances by consumer node.
        group: Index of the group.

    Returns:
        One problem per weight and block, in the order of the first consumer of the weight.
    """
    units = coupling.groups[group].units
    nodes = {node.name: node for node in model.nodes}
    result = []
    for consumer in coupling.consumers:
        labels = coupling.axes[consumer.data, consumer.axis]
        gram = grams.get(consumer.node)
        if gram is None or not np.isin(labels, units).any():
            continue
        if gram.uses and consumer.node != gram.uses[0]:
            continue
        layer = site(nodes[consumer.node], model.constants)
        assert layer is not None
        weight = layer.factor * matrix(layer, model.constants[layer.weight])
        groups, _, ins, _ = weight.shape
        for block in range(groups):
            block_labels = labels[block * ins : (block + 1) * ins]
            problem = _problem(
                consumer,
                block,
                weight=weight[block],
                gram=gram,
                labels=block_labels,
                units=units,
            )
            result.append(problem)
    return _in_proportion(result)


def _in_proportion(found: list[Problem]) -> list[Problem]:
    """Problems that weigh as much as they have uses, 1 on average."""
    counts = [len(problem.uses) for problem in found]
    if not found or max(counts) == 1:
        return found
    mean = sum(counts) / len(counts)
    return [
        replace(problem, share=count / mean) for problem, count in zip(found, counts, strict=True)
    ]


def _problem(
    consumer: Consumer,
    block: int,
    *,
    weight: Floats,
    gram: Gram,
    labels: Ints,
    units: Ints,
) -> Problem:
    """The problem of one block: ``weight`` (outputs, inputs, taps), ``labels`` (inputs,) the units of its inputs."""
    column_units = labels[gram.columns[:, 0] // gram.taps]
    of_group = np.flatnonzero(np.isin(column_units, units))
    by_unit = of_group[np.argsort(column_units[of_group], kind="stable")]
    columns = by_unit.reshape(len(units), -1)

    outs = len(weight)
    size, folded = gram.columns.shape
    by_column = weight.reshape(outs, -1)[:, gram.columns]
    folded_weight = by_column.transpose(0, 2, 1).reshape(outs * folded, size)

    has_matrix = gram.factor is None
    values = gram.values[block]
    mean = gram.mean[block]
    divisors = similar_scale(_variances(gram, values))
    if divisors is not None:
        values = values / divisors
        if has_matrix:
            values = values / divisors[:, None]
        mean = mean / divisors
        folded_weight = folded_weight * divisors
    # Products of columns by columns, or of rows by rows, which have the same trace and the same norm.
    products = values if has_matrix else values @ values.T
    shrunk = shrinkage(products, gram.rows, size)
    # The trace is kept: a strong ridge must not raise the loss of a consumer.
    ridge = float(shrunk * (np.trace(products) / (1 + shrunk)) / size + TINY)
    ridged: Floats | None = None
    factor: Floats | None = None
    # The variance of y, without the ridge: trace(W G W').
    if has_matrix:
        variance = float(np.einsum("od,od->", folded_weight @ values, folded_weight))
        ridged = values / (1 + shrunk)
        ridged[np.diag_indices_from(ridged)] += ridge
    else:
        variance = float(np.square(values @ folded_weight.T).sum())
        factor = values / np.sqrt(1 + shrunk)
    return Problem(
        consumer=consumer,
        block=block,
        weight=folded_weight,
        gram=ridged,
        mean=mean,
        columns=columns,
        units=column_units,
        spread=gram.columns,
        scale=max(variance, TINY),
        ridge=ridge,
        factor=factor,
        divisors=divisors,
        uses=gram.uses or (consumer.node,),
    )


def _variances(gram: Gram, values: Floats) -> Floats:
    """Variance of each column (d,), from the covariance or its factor."""
    if gram.factor is None:
        return np.diagonal(values)
    return np.asarray(np.einsum("rd,rd->d", values, values))


def similar_scale(variances: Floats) -> Floats | None:
    """Find divisors that bring the inputs of a layer to a similar scale.

    A ridge is one number for all inputs. A few of huge variance, whose weights are as small in turn, would make it
    larger than all the others.

    Args:
        variances: Variance of each input (..., d).

    Returns:
        Divisors of the inputs (..., d): those of more than ``MAX_SPREAD`` times the median variance get that median,
        all others have the divisor 1. None if there are none of those. The median is over variances that are not 0.
    """
    varies = variances > TINY
    # Rows without a variance get a median of 0 over their zeros, and no outlier.
    counted = varies | ~varies.any(axis=-1, keepdims=True)
    typical = np.nanmedian(np.where(counted, variances, np.nan), axis=-1, keepdims=True)
    ratios = variances / np.maximum(typical, TINY)
    is_outlier = ratios > MAX_SPREAD
    if not is_outlier.any():
        return None
    return np.sqrt(np.where(is_outlier, ratios, 1.0))


def jobs(coupling: Coupling, grams: Mapping[str, Gram]) -> list[Job]:
    """Split the work by group, so that an executor sends each group its own covariances only.

    Args:
        coupling: The groups and consumers.
        grams: Covariances by consumer node.

    Returns:
        Every group with the covariances of its consumers.
    """
    result: list[Job] = []
    for g, group in enumerate(coupling.groups):
        own: dict[str, Gram] = {}
        for consumer in coupling.consumers:
            labels = coupling.axes[consumer.data, consumer.axis]
            if consumer.node in grams and np.isin(labels, group.units).any():
                own[consumer.node] = grams[consumer.node]
        result.append((g, own))
    return result


def parallel_groups(
    requested: int | None,
    model: Model,
    coupling: Coupling,
    grams: Mapping[str, Gram],
    max_memory: int | None,
) -> int | None:
    """Bound the number of groups whose problems are solved at the same time by their memory.

    Args:
        requested: Number of threads asked for; None for one per processor.
        model: The model.
        coupling: Its groups and consumers.
        grams: Covariances by consumer node.
        max_memory: Target for memory in bytes; None for no bound.

    Returns:
        The number of threads, at least 1: those whose arrays take half of the memory, or what the libraries and the
        copies of the model leave of it, if every group were as large as the largest. ``requested`` without a bound.
    """
    if max_memory is None:
        return requested
    largest = max((_group_bytes(model, own) for _, own in jobs(coupling, grams)), default=0)
    constants = sum(value.nbytes for value in model.constants.values())
    left = max_memory - LIBRARY_BYTES - MODEL_COPIES * constants
    within = min(max_memory // 2, left) // max(1, largest)
    return max(1, min(requested or os.cpu_count() or 1, within))


def _group_bytes(model: Model, grams: Mapping[str, Gram]) -> int:
    """Estimate the memory of a group's problems from the covariances and weights of its consumers.

    A covariance that several nodes share counts once. Weights count in double precision.
    """
    nodes = {node.name: node for node in model.nodes}
    sizes: dict[int, int] = {}
    for name, gram in grams.items():
        layer = site(nodes[name], model.constants)
        weight = 0 if layer is None else VALUE_BYTES * model.constants[layer.weight].size
        sizes[id(gram)] = max(gram.values.nbytes, weight)
    return HELD * sum(sizes.values()) + PASSING * max(sizes.values(), default=0)


def shrinkage(gram: Floats, rows: int, columns: int | None = None) -> float:
    """Compute the relative ridge for a covariance of few rows by oracle-approximating shrinkage.

    Source: Chen, Wiesel, Eldar and Hero, "Shrinkage algorithms for MMSE covariance estimation", IEEE TSP 58 (2010),
    eq. 23, as a ratio of the target's weight to the sample's.

    Args:
        gram: The covariance, or a matrix with the same trace and norm.
        rows: Number of rows that it was computed from.
        columns: Columns of the covariance; None for those of ``gram``.

    Returns:
        The ridge relative to the mean diagonal, at least ``RIDGE``.
    """
    size = len(gram) if columns is None else columns
    trace = float(np.trace(gram))
    square = float(np.square(gram).sum())
    denominator = (rows + 1 - 2 / size) * (square - trace**2 / size)
    weight = 1.0
    if denominator > 0:
        weight = min(1.0, ((1 - 2 / size) * square + trace**2) / denominator)
    return max(RIDGE, weight / max(1 - weight, 1e-3))


def compensate(
    problem: Problem,
    removed: Ints,
    repair: str = "least-squares",
    others: Ints | None = None,
) -> tuple[Floats, Floats]:
    """Compute the weights of a consumer after the removal of units.

    Args:
        problem: The consumer.
        removed: Indices of the removed units in their group.
        repair: ``least-squares`` fits the kept weights to the original output, ``bias`` folds the means of the removed
            inputs, ``none`` does nothing.
        others: Units of other groups that are removed as well.

    Returns:
        Weights (outputs, d) with zeros at the columns of removed units, and the shift of the bias (outputs,).
    """
    removed_columns = problem.columns[removed].reshape(-1)
    if others is not None:
        assert problem.units is not None
        of_others = np.flatnonzero(np.isin(problem.units, others))
        removed_columns = np.union1d(removed_columns, of_others)
    kept = np.ones(problem.weight.shape[1], bool)
    kept[removed_columns] = False
    if repair == "none":
        return np.where(kept, problem.weight, 0.0), np.zeros(len(problem.weight))
    if repair == "least-squares" and kept.any():
        weight = _repaired(problem, kept, removed_columns)
    else:
        weight = np.where(kept, problem.weight, 0.0)
    return weight, (problem.weight - weight) @ problem.mean


def _repaired(problem: Problem, kept: Bools, removed_columns: Ints) -> Floats:
    """Weights (outputs, d) that repair the removal of columns, with zeros there.

    Beside the problem's own weight, two arrays of its size are held at a time.
    """
    if problem.factor is not None:
        change = _repair_by_rows(problem, problem.factor, kept)
    else:
        assert problem.gram is not None
        cross = problem.gram[np.ix_(kept, removed_columns)] @ problem.weight[:, removed_columns].T
        kept_gram = problem.gram[np.ix_(kept, kept)]
        factor = Cholesky.of(kept_gram, overwrite=True)
        change = factor.solve(cross).T
        del kept_gram, factor
    change += problem.weight[:, kept]
    weight = np.zeros_like(problem.weight)
    weight[:, kept] = change
    return weight


def _repair_by_rows(problem: Problem, factor: Floats, kept: Bools) -> Floats:
    """Change of the kept weights that repairs the removal of the other columns, by a system of rows by rows.

    With F_S and F_R the kept and the removed columns, ``W_R F_R' (F_S F_S' + ridge I)^-1 F_S`` is the same as
    ``W_R G_RS G_SS^-1``.
    """
    kept_factor = factor[:, kept]
    lost = problem.weight[:, ~kept] @ factor[:, ~kept].T
    products = kept_factor @ kept_factor.T
    products[np.diag_indices_from(products)] += problem.ridge
    return Cholesky.of(products, overwrite=True).solve(lost.T).T @ kept_factor
