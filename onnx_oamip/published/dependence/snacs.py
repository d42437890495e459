"""SNACS: adaptive conditional mutual information between adjacent layers, by hashing, propagated to the units.

Ganesh, Blanchard, Corso and Sekeh (arXiv 2006.12463); hashing after Noshad, Zeng and Hero (EDGE, arXiv 1801.09125).
For a child X, a parent Y and other parents Z, with ``q = P(X|Z) P(Y|Z) P(Z)``, ``g(t) = (t - 1)^2 / (2 (t + 1))``::

    I(X; Y | Z) = phi E_q[g(dP / dq)] = phi (1 - 2 E_P[1 / (1 + t)]),    t = N_ijk N_k / (N_ik N_jk)

with N counting samples by hash cell (i of X, j of Y, k of Z). The second form, used here, is complete: a sum of g over
cells that were seen leaves out the mass of q in the others, where g is 1/2. Further differences to the authors' code:

- Z is not all other parents, of which every sample has its own cell and the estimate is 0 for everything, but the few
  that correlate most with the child.
- A null is subtracted: the same estimate with X shuffled among the samples of equal Z, which keeps N_ik, N_jk and N_k
  and with them the bias of few samples.
- phi comes from absolute weights over the largest of their layer; signed weights, scaled over all tensors of a file,
  would make a strong negative weight count as none.
- Variables are standardised, so that neither the scale of a layer nor a batch normalisation behind it matters.
- Whole filters go, so that a filter's importance decides, not the single connection's.
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
from onnx_oamip.published.dependence.pooled_activations import Pair, pairs, standardise
from onnx_oamip.published.dependence.propagation import propagate
from onnx_oamip.published.dependence.requests import POOLED_ACTIVATIONS

CONDITIONS = 2
"""Parents that are conditioned on, besides the one looked at."""
WIDTHS = (0.8, 1.0, 1.2, 1.4, 1.6)
"""Widths of a hash cell, in standard deviations; the estimate is the mean over all, each with shifts of its own."""
REACH = 4.0
"""Values further out than this share the last cell."""
TABLE = 1 << 18
"""Most cells of a table of counts; more parents are taken block by block."""


@dataclass(frozen=True)
class Draw:
    """One hashing: ``parents`` (samples, p) and ``children`` (samples, c) hold cells from 0 to ``cells`` - 1, as bytes.

    ``order`` (samples,): the random order by which samples of equal Z change places for the null.
    """

    parents: Array
    children: Array
    cells: int
    order: Ints


def score(
    model: Model, coupling: Coupling, statistics: Statistics | None, settings: Settings
) -> Scores:
    """Importance of every unit, the mean of its group 1."""
    assert statistics is not None
    every = list(pairs(model, coupling, statistics[POOLED_ACTIVATIONS]))
    found = executor(settings.workers, settings.scheduler).map(_one, settings, every)
    values = propagate(model, coupling, statistics, zip(every, found, strict=True))
    return Scores("snacs", values, notes=_notes(statistics[POOLED_ACTIVATIONS].samples))


def _one(settings: Settings, pair: Pair) -> Floats:
    return weigh(pair.weight, settings.phi) * dependence(pair.parents, pair.children, settings.seed)


def _notes(samples: int) -> tuple[str, ...]:
    if samples >= FEW:
        return ()
    return (
        f"dependence between layers was estimated from {samples} samples; below {FEW} it is mostly noise",
    )


FEW = 500
"""Samples below which a report says that estimates are noise."""


def weigh(weight: Floats, phi: str) -> Floats:
    """phi (c, p) from mean absolute weights, scaled to at most 1 over the layer."""
    scaled = weight / (weight.max(initial=0.0) or 1.0)
    if phi == "weight":
        return np.asarray(scaled)
    if phi == "weight_sq":
        return np.square(scaled)
    return np.exp(-np.square(scaled) / 2) if phi == "exp_weight" else np.ones_like(scaled)


def dependence(
    parents: Array, children: Array, seed: int = 0, conditions: int = CONDITIONS
) -> Floats:
    """ACMI (c, p) with phi = 1 of every child and parent, given the others that correlate most with the child.

    ``parents`` (samples, p) and ``children`` (samples, c) are paired by row. The null is subtracted and what then is
    below 0 is 0. Does not depend on the order of channels.
    """
    x, y = standardise(children), standardise(parents)
    given = chosen(y, x, conditions)
    total = np.zeros((x.shape[1], y.shape[1]))
    hashed = draws(y, x, seed)
    for draw in hashed:
        for c in range(x.shape[1]):
            total[c] += _child(draw, c, given[c])
    return np.maximum(total / len(hashed), 0.0)


def chosen(parents: Floats, children: Floats, conditions: int) -> Ints:
    """(c, at most conditions + 1) parents by falling |correlation| with each child; the last stands in for a parent
    that is one of the others."""
    strength = np.abs(children.T @ parents)
    most = min(conditions + 1, parents.shape[1])
    return np.argsort(-strength, axis=1, kind="stable")[:, :most].astype(np.int64)


def draws(parents: Floats, children: Floats, seed: int) -> Sequence[Draw]:
    """Every variable hashed once for every width: ``floor((v + b) / eps)`` with b uniform in [0, eps)."""
    rng = np.random.default_rng(seed)
    result = []
    for width in WIDTHS:
        shift = rng.uniform(0, width)
        cells = int(np.floor((REACH + shift) / width) - np.floor((shift - REACH) / width)) + 1
        codes = [_hash(v, width, shift) for v in (parents, children)]
        result.append(
            Draw(codes[0], codes[1], cells, rng.permutation(len(parents)).astype(np.int64))
        )
    return result


def _hash(values: Floats, width: float, shift: float) -> Array:
    lowest = np.floor((shift - REACH) / width)
    return np.asarray(np.floor((np.clip(values, -REACH, REACH) + shift) / width) - lowest).astype(
        np.uint8
    )


def shuffled(z: Ints, order: Ints) -> Ints:
    """(samples,) a permutation that moves samples only among those of equal ``z``."""
    place = np.empty(len(z), np.int64)
    place[np.argsort(z, kind="stable")] = order[np.argsort(z[order], kind="stable")]
    return place


def _child(draw: Draw, c: int, given: Ints) -> Floats:
    """Estimate less null (p,) of one child with all parents under one hashing."""
    x = draw.children[:, c].astype(np.int64)
    count = draw.parents.shape[1]
    inside = given[:-1]
    result = np.zeros(count)
    _fill(draw, x, inside, np.setdiff1d(np.arange(count), inside), result)
    for p in inside.tolist():  # a parent does not condition on itself: the next one takes its place
        _fill(draw, x, given[given != p], np.asarray([p], np.int64), result)
    return result


def _fill(draw: Draw, x: Ints, given: Ints, wanted: Ints, result: Floats) -> None:
    """Estimates for the ``wanted`` parents, all given the same others."""
    z = np.zeros(len(x), np.int64)
    for p in given.tolist():
        z = np.unique(z * draw.cells + draw.parents[:, p], return_inverse=True)[1].reshape(-1)
    joint, xz = np.unique(z * draw.cells + x, return_inverse=True)
    xz = xz.reshape(-1)
    of_z = joint // draw.cells
    null = xz[shuffled(z, draw.order)]
    step = max(1, TABLE // (len(joint) * draw.cells))
    for first in range(0, len(wanted), step):
        part = wanted[first : first + step]
        y = draw.parents[:, part] + np.arange(len(part)) * draw.cells
        result[part] = _estimates(
            x=(xz, null), z=z, of_z=of_z, y=y, parents=len(part), cells=draw.cells
        )


def _estimates(
    x: tuple[Ints, Ints], z: Ints, of_z: Ints, y: Ints, parents: int, cells: int
) -> Floats:
    """Estimate less null (parents,): from tables of counts by (cell of X and Z, parent, cell of Y)."""
    width = parents * cells
    n_k, n_ik = np.bincount(z), np.bincount(x[0])
    n_jk = _table(z, y, len(n_k), width)[of_z]
    expected = n_jk * (n_ik / n_k[of_z])[:, None]  # N_ik N_jk / N_k
    seen = [_table(code, y, len(n_ik), width) for code in x]
    # mean 1/(1+t) over samples = sum over cells of N_ijk / (1 + N_ijk / expected) / N
    floor = np.where(expected > 0, expected, 1.0)
    inverse = [
        (n * floor / (n + floor)).sum(axis=0).reshape(parents, cells).sum(axis=1) for n in seen
    ]
    return np.asarray(2 * (inverse[1] - inverse[0]) / len(z))


def _table(rows: Ints, columns: Ints, count: int, width: int) -> Array:
    code = rows[:, None] * width + columns
    return np.bincount(code.reshape(-1), minlength=count * width).reshape(count, width)
