"""OAMIP layer by layer: one program a group, whose size does not grow with the number of images.

The published decoupling (ElAraby, Wolf, Carvalho, CPAIOR 2023) fixes the inputs of a layer and puts an auxiliary head
on its outputs. Here the head is the group's own consumers: their outputs on all calibration samples, by second moments,
so that hundreds of samples speak and the program has one keep variable a unit and one more. The loss is what the
consumers lose when units go *together* (see ``milp.subset``), in the form in which the model will be mended:

- ``--refit least-squares``: after the best repair of the consumers by the units that stay;
- ``--refit bias``: with the mean of what went folded into the biases (covariances);
- ``--refit none``: as it is (second moments).

Per group the program is solved for a falling number of units, each set within the last one, so that a score orders all
units: it is the consumers' relative loss at which a unit goes, in [0, 1].
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_oamip.core.errors import memory_for
from onnx_oamip.core.records import (
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
from onnx_oamip.importance import activation, magnitude, obs
from onnx_oamip.programs.solvers import (
    Limits,
    Solution,
    Termination,
    relative_gap,
    solve,
)
from onnx_oamip.programs.subset import (
    Fit,
    Loss,
    Quadratic,
    Repaired,
    Subset,
    loss_at,
)
from onnx_oamip.statistics.covariances import (
    TINY,
    Job,
    Problem,
    jobs,
    problems,
)
from onnx_oamip.statistics.requests import COVARIANCE

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Shares of a group's units at which its program is solved."""
ROUNDS, TURNS = 6, 64
"""At most, for one share: solves of the program, and steps of the search for its first point."""
WORK = 1e11
"""Floating-point operations for the losses of one group, about: wide groups get fewer rounds and turns, the same ones
on every machine."""
GAP = 0.01
NODES = 1_000


def score(
    model: Model, coupling: Coupling, statistics: Statistics | None, settings: Settings
) -> Scores:
    """Scores in [0, 1], a record for every group's programs, and other orders worth a measurement.

    A group whose consumers have no second moments (attention scores, very wide inputs) takes its activation scores,
    with a note. Groups are solved side by side.
    """
    assert statistics is not None
    simple = activation.score(model, coupling, statistics, settings).values
    values = np.zeros(coupling.n_units)
    records: list[Mapping[str, Any]] = []
    without: list[str] = []
    repaired, other = simple.copy(), simple.copy()
    place = executor(settings.workers, settings.scheduler)
    every = place.map(_one, (model, coupling, settings), jobs(coupling, statistics[COVARIANCE]))
    for group, found in zip(coupling.groups, every, strict=True):
        if found is None:
            top = max(float(simple[group.units].max()), 1e-30)
            values[group.units] = simple[group.units] / top
            without.append(group.name)
            continue
        values[group.units] = found.values
        repaired[group.units] = found.repaired
        other[group.units] = found.other
        records.append(found.record)
    notes = []
    if without:
        listed = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
        notes.append(
            f"{len(without)} groups have no consumer with second moments, so activation scores stand in ({listed})"
        )
    # Repaired consumers hide how an order was found; without repair the rest of the network decides, which no moment
    # of one layer knows.
    others = {}
    if settings.refit != "least-squares":
        l2 = magnitude.l2(model, coupling, statistics, settings).values
        others = {"activation": simple, "obs": repaired, "l2": l2, "other moments": other}
    return Scores("oamip", values, tuple(records), tuple(notes), others)


@dataclass(frozen=True, eq=False)
class _Walk:
    """What a group's programs said: scores (units,) and their record; other orders of removal as scores.

    ``repaired``: by optimal brain surgeon; ``other``: by the quadratic loss that ``--refit`` does not ask for.
    """

    values: Floats
    repaired: Floats
    other: Floats
    record: Mapping[str, Any]


def _one(whole: tuple[Model, Coupling, Settings], job: Job) -> _Walk | None:
    model, coupling, settings = whole
    group = coupling.groups[job[0]]
    with memory_for(f"the programs of the group '{group.name}'"):
        found = problems(model, coupling, job[1], job[0])
        return _walk(found, len(group.units), group.name, settings) if found else None


def _walk(found: Sequence[Problem], count: int, name: str, settings: Settings) -> _Walk:
    began = time.perf_counter()
    order, _ = obs.eliminate(found, count)
    loss = _loss(found, settings.refit, order)
    afford = WORK / (len(SHARES) * loss.work)
    subset = Subset(loss, count)
    keep = np.ones(count, bool)
    least = loss_at(loss, keep)
    values = np.zeros(count)
    height = 0.0
    removed: list[Ints] = []
    steps: list[_Step] = []
    for share in (*SHARES, 0.0):
        wanted = max(1, round(share * count)) if share else 0
        if wanted >= keep.sum():
            continue
        if wanted == 0:
            stays = np.zeros(count, bool)
        else:
            stays = loss.narrow(keep, wanted, TURNS)
            step = _improve(subset, keep, stays, settings, afford, began + settings.time_limit)
            steps.append(step)
            stays = step.keep
        gone = np.flatnonzero(keep & ~stays)
        top = max(height, min(1.0, (loss_at(loss, stays) - least) / len(found)))
        ranked = gone[np.argsort(loss.costs(keep)[gone], kind="stable")]
        values[ranked] = height + (top - height) * np.arange(1, len(gone) + 1) / len(gone)
        removed.append(ranked)
        keep, height = stays, top
    # Equal ones, where a smaller set loses no more or all is lost, by when they went: the sets must stay nested.
    going = np.concatenate(removed)
    values[going] = _rising(values[going])
    rank = np.empty(count)
    rank[order] = np.arange(count)
    other = (
        values
        if settings.refit == "least-squares"
        else _path(_quadratic(found, settings.refit == "none"))
    )
    return _Walk(values, rank, other, _record(name, subset, steps, time.perf_counter() - began))


def _path(loss: Quadratic) -> Floats:
    """An order of removal as scores, by exchanges alone."""
    keep = np.ones(len(loss.matrix), bool)
    values = np.full(len(keep), float(len(SHARES)))
    for i, share in enumerate(SHARES):
        stays = loss.narrow(keep, min(int(keep.sum()), max(1, round(share * len(keep)))), TURNS)
        values[keep & ~stays] = i
        keep = stays
    own = loss.costs(np.ones(len(keep), bool))
    return values + own / (2 * max(float(own.max()), 1e-30))


def _rising(values: Floats) -> Floats:
    """Ascending scores with ties told apart, still in [0, 1]: an order must survive the sorting of scores."""
    steps = np.arange(1, len(values) + 1) * 1e-9
    return np.asarray(np.minimum(values, 1.0) * (1 - 1e-9 * len(values)) + steps, np.float64)


def _loss(found: Sequence[Problem], refit: str, order: Ints) -> Loss:
    if refit == "least-squares":
        fits = []
        for p in found:
            covariance = p.gram.copy()
            covariance[np.diag_indices_from(covariance)] -= p.ridge
            fits.append(Fit(p.weight, covariance, p.ridge, p.columns, p.scale))
        return Repaired(fits, order)
    return _quadratic(found, refit == "bias")


def _quadratic(found: Sequence[Problem], centred: bool) -> Quadratic:
    return Quadratic(np.sum([quadratic(p, centred) for p in found], axis=0))


def quadratic(problem: Problem, centred: bool) -> Floats:
    """Q (units, units) of one consumer, relative: ``Q_ij = tr(W_i C_ij W_j')``, C second moments or covariances."""
    moments = problem.gram if centred else problem.gram + np.outer(problem.mean, problem.mean)
    columns = problem.columns
    flat = columns.reshape(-1)
    weight = problem.weight[:, flat]
    each = (weight.T @ weight) * moments[np.ix_(flat, flat)]
    units, held = columns.shape
    scale = max(float(np.einsum("od,od->", problem.weight @ moments, problem.weight)), TINY)
    result: Floats = each.reshape(units, held, units, held).sum(axis=(1, 3)) / scale
    return result


@dataclass(frozen=True, eq=False)
class _Step:
    """One count of units: the best set, the last solve, and what is proven about the loss."""

    keep: Bools
    value: float
    bound: float
    solution: Solution | None
    improved: bool


def _improve(
    subset: Subset, free: Bools, start: Bools, settings: Settings, afford: float, deadline: float
) -> _Step:
    """Tangent planes at the relaxation's optimum and at the first set, then at what the solver finds; every solution is
    rounded and judged by its true loss. ``afford``: evaluations of the loss that may be spent."""
    loss, count = subset.loss, int(start.sum())
    best, value = start, loss_at(loss, start)
    bound = 0.0
    last: Solution | None = None

    def offer(keep: Floats) -> None:
        nonlocal best, value
        trial = np.zeros(len(keep), bool)
        trial[np.argsort(-np.where(free, keep, -1.0), kind="stable")[:count]] = True
        reached = loss_at(loss, trial)
        if reached < value:
            best, value = trial, reached

    relaxed = loss.relax(free, count, int(min(TURNS / 4, max(2, afford / 3))))
    offer(relaxed)
    subset.tangent(relaxed)
    subset.tangent(best.astype(np.float64))
    for _ in range(int(min(ROUNDS, max(1, afford / 6)))):
        left = deadline - time.perf_counter()
        if left <= 0:
            break
        limits = Limits(time_s=left, gap=GAP / 4, seed=settings.seed, nodes=NODES)
        last = solve(subset.program(free, count, best), limits, settings.solver)
        if last.bound is not None:
            bound = max(bound, last.bound)
        if last.values is None:
            break
        keep = last.values[:-1]
        offer(keep)
        if value - bound <= GAP * value:
            break
        subset.tangent(keep)
        subset.tangent(
            (keep + relaxed) / 2
        )  # between the two: deeper than a plane at the far end alone
    return _Step(best, value, min(bound, value), last, best is not start)


def _record(name: str, subset: Subset, steps: Sequence[_Step], seconds: float) -> Mapping[str, Any]:
    """One record for a group's programs: ``gap`` is that of the sum of their losses."""
    solved = [s.solution for s in steps if s.solution is not None]
    value, bound = sum(s.value for s in steps), sum(s.bound for s in steps)
    gap = relative_gap(value, bound)
    limit = next((s.limit for s in solved if s.limit is not None), None)
    return {
        "purpose": "importance",
        "group": name,
        "solver": ", ".join(dict.fromkeys(s.solver for s in solved)) or None,
        "reason": solved[-1].reason if solved else "nothing to choose",
        "status": (Termination.OPTIMAL if gap <= GAP else Termination.FEASIBLE).value,
        "limit": limit.value if limit else None,
        "gap": gap,
        "objective": value,
        "bound": bound,
        "seconds": seconds,
        "variables": subset.units + 1,
        "rows": subset.rows,
        "programs": len(steps),
        "improved": sum(s.improved for s in steps),
    }
