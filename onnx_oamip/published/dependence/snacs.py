"""SNACS: adaptive conditional mutual information between adjacent layers, by hashing, propagated to the units.

Ganesh, Blanchard, Corso and Sekeh (arXiv 2006.12463); hashing after Noshad, Zeng and Hero (EDGE, arXiv 1801.09125).
For a child X, a parent Y and other parents Z, with ``q = P(X|Z) P(Y|Z) P(Z)``, ``g(t) = (t - 1)^2 / (2 (t + 1))``::

    I(X; Y | Z) = phi E_q[g(dP / dq)] = phi (1 - 2 E_P[1 / (1 + t)]),    t = N_ijk N_k / (N_ik N_jk)

with N counting samples by hash cell (i of X, j of Y, k of Z). The second form, used here, is complete: a sum of g over
cells that were seen leaves out the mass of q in the others, where g is 1/2. Further differences to the authors' code:

- Z is not all other parents, with which every sample would have a cell of its own and every estimate would be 0, but
  the few that correlate most with the child.
- A null is subtracted: the same estimate with X shuffled among the samples of equal Z, which keeps N_ik, N_jk and N_k
  and with them the bias of few samples.
- phi comes from absolute weights over the largest of their layer; signed weights, scaled over all tensors of a file,
  would make a strong negative weight count as none.
- Variables are standardised, so that neither the scale of a layer nor a batch normalisation behind it matters.
- Whole filters are removed, so that a filter's importance decides, not that of a single connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_oamip.core.records import (
    Array,
    Coupling,
    Floats,
    Ints,
    Model,
    Scores,
    Statistics,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.executors import executor
from onnx_oamip.published.dependence.layer_pairs import Pair, pairs, standardise
from onnx_oamip.published.dependence.propagation import propagate
from onnx_oamip.published.dependence.requests import POOLED_ACTIVATIONS

CONDITIONS = 2
"""Parents that are conditioned on, besides the one whose dependence is estimated."""
WIDTHS = (0.8, 1.0, 1.2, 1.4, 1.6)
"""Widths of a hash cell, in standard deviations; the estimate is the mean over all, each with shifts of its own."""
REACH = 4.0
"""Values beyond this share the last cell."""
TABLE = 1 << 18
"""Most cells of a table of counts; more parents are counted block by block."""
FEW = 500
"""Samples below which a report says that estimates are noise."""


@dataclass(frozen=True)
class Draw:
    """One hashing of all variables.

    Attributes:
        parents: Cells of the parents (samples, p), from 0 to ``cells`` - 1, as bytes.
        children: Cells of the children (samples, c).
        cells: Number of cells.
        order: Random order (samples,) by which samples of equal Z are exchanged for the null.
    """

    parents: Array
    children: Array
    cells: int
    order: Ints


def score(
    model: Model,
    coupling: Coupling,
    statistics: Statistics | None,
    settings: Settings,
) -> Scores:
    """Score units by adaptive conditional mutual information.

    Args:
        model: The model.
        coupling: Its units and consumers.
        statistics: Moments and pooled activations.
        settings: Settings of the run.

    Returns:
        One score per unit; the mean of each group is 1.
    """
    assert statistics is not None
    pooled = statistics[POOLED_ACTIVATIONS]
    every_pair = list(pairs(model, coupling, pooled))
    pool = executor(settings.workers, settings.scheduler)
    rho = pool.map(_weighted_dependence, settings, every_pair)
    scored = zip(every_pair, rho, strict=True)
    values = propagate(model, coupling, statistics, scored)
    return Scores("snacs", values, notes=_notes(pooled.samples))


def weigh(weight: Floats, phi: str) -> Floats:
    """Compute the factors of the information between channels.

    Args:
        weight: Mean absolute weights (c, p).
        phi: ``weight`` scaled to at most 1 over the layer, ``weight_sq`` for its square, ``exp_weight`` for
            ``exp(-w^2 / 2)``, or ``none``.

    Returns:
        Factors (c, p).
    """
    scaled = weight / (weight.max(initial=0.0) or 1.0)
    if phi == "weight":
        return np.asarray(scaled)
    if phi == "weight_sq":
        return np.square(scaled)
    if phi == "exp_weight":
        return np.exp(-np.square(scaled) / 2)
    return np.ones_like(scaled)


def dependence(
    parents: Array,
    children: Array,
    seed: int = 0,
    conditions: int = CONDITIONS,
) -> Floats:
    """Estimate the information (ACMI with phi = 1) between every child and parent, given a few other parents.

    The condition is on the parents that correlate most with the child. The null is subtracted, and a negative
    difference becomes 0. The order of channels does not matter.

    Args:
        parents: Samples of the parents (samples, p).
        children: Samples of the children (samples, c), in the same order.
        seed: Seed of the hashing.
        conditions: Number of parents in the condition.

    Returns:
        Estimates (c, p).
    """
    x = standardise(children)
    y = standardise(parents)
    given = chosen(y, x, conditions)
    total = np.zeros((x.shape[1], y.shape[1]))
    hashed = draws(y, x, seed)
    for draw in hashed:
        for child in range(x.shape[1]):
            total[child] += _child(draw, child, given[child])
    return np.maximum(total / len(hashed), 0.0)


def chosen(parents: Floats, children: Floats, conditions: int) -> Ints:
    """Choose the parents in the condition of each child.

    Args:
        parents: Standardised samples of the parents (samples, p).
        children: Standardised samples of the children (samples, c).
        conditions: Number of parents in the condition.

    Returns:
        Indices of parents (c, at most conditions + 1) by falling absolute correlation. The last one replaces a parent
        that is in the condition while its own dependence is estimated.
    """
    strength = np.abs(children.T @ parents)
    count = min(conditions + 1, parents.shape[1])
    strongest = np.argsort(-strength, axis=1, kind="stable")
    return strongest[:, :count].astype(np.int64)


def draws(parents: Floats, children: Floats, seed: int) -> Sequence[Draw]:
    """Hash every variable once for every width: ``floor((v + b) / eps)`` with b uniform in [0, eps).

    Args:
        parents: Standardised samples of the parents (samples, p).
        children: Standardised samples of the children (samples, c).
        seed: Seed of the shifts b and of the orders.

    Returns:
        One hashing per width.
    """
    rng = np.random.default_rng(seed)
    result = []
    for width in WIDTHS:
        shift = rng.uniform(0, width)
        highest = np.floor((REACH + shift) / width)
        lowest = np.floor((shift - REACH) / width)
        hashed_parents, hashed_children = (
            _hash(values, width, shift) for values in (parents, children)
        )
        order = rng.permutation(len(parents)).astype(np.int64)
        result.append(Draw(hashed_parents, hashed_children, int(highest - lowest) + 1, order))
    return result


def shuffled(z: Ints, order: Ints) -> Ints:
    """Make a permutation that moves samples only among those of equal ``z``.

    Args:
        z: Cell of every sample (samples,).
        order: Random order of all samples (samples,).

    Returns:
        The permutation (samples,).
    """
    place = np.empty(len(z), np.int64)
    place[np.argsort(z, kind="stable")] = order[np.argsort(z[order], kind="stable")]
    return place


def _weighted_dependence(settings: Settings, pair: Pair) -> Floats:
    estimate = dependence(pair.parents, pair.children, settings.seed)
    return weigh(pair.weight, settings.phi) * estimate


def _notes(samples: int) -> tuple[str, ...]:
    if samples >= FEW:
        return ()
    note = f"dependence between layers was estimated from {samples} samples; below {FEW} it is mostly noise"
    return (note,)


def _hash(values: Floats, width: float, shift: float) -> Array:
    lowest = np.floor((shift - REACH) / width)
    cells = np.floor((np.clip(values, -REACH, REACH) + shift) / width)
    return np.asarray(cells - lowest).astype(np.uint8)


def _child(draw: Draw, child: int, given: Ints) -> Floats:
    """Estimate less null (p,) of one child with all parents under one hashing."""
    x = draw.children[:, child].astype(np.int64)
    parents = np.arange(draw.parents.shape[1])
    condition = given[:-1]
    result = np.zeros(len(parents))
    others = np.setdiff1d(parents, condition)
    result[others] = _given(draw, x, condition, others)
    for parent in condition.tolist():
        # A parent does not condition on itself: the next one takes its place.
        replaced = given[given != parent]
        alone = np.asarray([parent], np.int64)
        result[alone] = _given(draw, x, replaced, alone)
    return result


def _given(
    draw: Draw,
    x: Ints,
    given: Ints,
    parents: Ints,
) -> Floats:
    """Estimates less null of some ``parents`` with one child, all under the same condition."""
    z = np.zeros(len(x), np.int64)
    for parent in given.tolist():
        code = z * draw.cells + draw.parents[:, parent]
        z = np.unique(code, return_inverse=True)[1].reshape(-1)
    joint, xz = np.unique(z * draw.cells + x, return_inverse=True)
    xz = xz.reshape(-1)
    counts = _Counts(
        xz=xz,
        null=xz[shuffled(z, draw.order)],
        z=z,
        z_of_joint=joint // draw.cells,
        cells=draw.cells,
    )
    step = max(1, TABLE // (len(joint) * draw.cells))
    blocks = [parents[first : first + step] for first in range(0, len(parents), step)]
    estimates = [counts.estimates(draw.parents[:, block]) for block in blocks]
    return np.concatenate([np.zeros(0), *estimates])


@dataclass(frozen=True)
class _Counts:
    """Cells of the child X and of the condition Z, to be counted with the cells of parents Y.

    Attributes:
        xz: Joint cell of X and Z of every sample (samples,), numbered from 0 without gaps.
        null: The same with X shuffled among samples of equal Z.
        z: Cell of Z of every sample (samples,).
        z_of_joint: Cell of Z by joint cell.
        cells: Number of cells of one variable.
    """

    xz: Ints
    null: Ints
    z: Ints
    z_of_joint: Ints
    cells: int

    def estimates(self, y: Array) -> Floats:
        """Estimate the information less its null.

        Args:
            y: Cells of the parents (samples, p).

        Returns:
            Estimates (p,), from tables of counts by (joint cell, parent, cell of Y).
        """
        parents = y.shape[1]
        width = parents * self.cells
        columns = y + np.arange(parents) * self.cells
        n_k = np.bincount(self.z)
        n_ik = np.bincount(self.xz)
        n_jk = _table(self.z, columns, len(n_k), width)[self.z_of_joint]
        expected = n_jk * (n_ik / n_k[self.z_of_joint])[:, None]  # N_ik N_jk / N_k
        positive = np.where(expected > 0, expected, 1.0)
        # The mean of 1 / (1 + t) over samples is the sum over cells of N_ijk / (1 + N_ijk / expected) / N.
        means = []
        for joint in (self.xz, self.null):
            n_ijk = _table(joint, columns, len(n_ik), width)
            by_cell = (n_ijk * positive / (n_ijk + positive)).sum(axis=0)
            means.append(by_cell.reshape(parents, self.cells).sum(axis=1))
        measured, null = means
        return np.asarray(2 * (null - measured) / len(self.z))


def _table(
    rows: Ints,
    columns: Ints,
    count: int,
    width: int,
) -> Array:
    code = rows[:, None] * width + columns
    return np.bincount(code.reshape(-1), minlength=count * width).reshape(count, width)
