"""The main comparison: every method at the published program's own counts a layer, three treatments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnx_oamip.core.records import Floats, Ints

from .case import (
    TREATMENTS,
    Case,
    accuracy,
    below,
    choose,
    gone,
    mask,
    measured,
    program,
    score,
    settings,
)
from .protocol import Bools, Protocol

METHODS = ("random", "critical", "l1", "activation", "paper", "exact", "decoupled")
HALF = 0.5
"""Exact keep variables are whole: below this a unit is removed by the program."""
PER_CLASS_SHARE = 0.1
"""Of an exact joint program's time limit, what one class's program is given."""


MODES = ("joint", "per-class")


def run(case: Case, protocol: Protocol, exact: Sequence[str] = MODES) -> dict[str, Any]:
    """One trained network. ``exact``: the modes in which the exact program is tried, in turn."""
    few = choose(case, case.samples)
    asked = settings(seed=case.seed, time_limit=protocol.seconds)
    paper, seconds = score(case, asked, few)
    widths = below(case, paper.values, case.about.threshold)
    keep = mask(case, paper.values, widths)
    found: dict[str, Any] = {
        "reference": accuracy(case, case.model.proto),
        "images": int((few.labels >= 0).sum()),
        "removed": removed(case, widths),
        "gone": gone(case, keep),
        "paper": {**program(paper.programs), "wall": seconds},
        "scores": paper.values.round(6).tolist(),
        "keep": {"paper": _rows(case, keep)},
    }
    results: dict[str, dict[str, float]] = {"paper": measured(case, keep)}
    results["critical"] = measured(case, mask(case, -paper.values, widths))
    for name in ("l1", "activation"):
        results[name] = of_method(case, name, widths)
    results["random"], found["random_spread"] = at_random(case, widths, protocol.random_draws)
    found["exact"], values = _exact(case, protocol, exact)
    if values is not None:
        results["exact"] = measured(case, mask(case, values, widths))
    results["decoupled"], found["decoupled"], refitted = decoupled(case, widths)
    found["keep"]["decoupled"] = _rows(case, refitted)
    found["accuracy"] = results
    return found


def of_method(
    case: Case, importance: str, widths: Ints, treatments: tuple[str, ...] = TREATMENTS
) -> dict[str, float]:
    """Accuracy by treatment of the units of largest score by a method of the package."""
    return measured(case, mask(case, _values(case, importance), widths), treatments)


def at_random(
    case: Case, widths: Ints, draws: int, treatments: tuple[str, ...] = TREATMENTS
) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and spread by treatment of the accuracy of random masks."""
    masks = [mask(case, _values(case, "random", seed), widths) for seed in _seeds(case, draws)]
    each = [measured(case, keep, treatments) for keep in masks]
    mean = {t: float(np.mean([e[t] for e in each])) for t in treatments}
    spread = {t: float(np.std([e[t] for e in each])) for t in treatments}
    return mean, spread


def _exact(
    case: Case, protocol: Protocol, modes: Sequence[str]
) -> tuple[dict[str, Any], Floats | None]:
    """The first mode whose incumbent removes a unit; no scores where none does."""
    few = choose(case, case.samples)
    limits = {
        "joint": protocol.exact_seconds,
        "per-class": PER_CLASS_SHARE * protocol.exact_seconds,
    }
    tries: dict[str, Any] = {}
    for mode in modes:
        asked = settings(mode=mode, formulation="exact", seed=case.seed, time_limit=limits[mode])
        scores, seconds = score(case, asked, few)
        own = below(case, scores.values, HALF)
        about = {"wall": seconds, "limit": limits[mode], "removed": removed(case, own)}
        tries[mode] = {**program(scores.programs), **about}
        if (scores.values < HALF).any():
            return {"which": mode, "tries": tries}, scores.values
    return {"which": None, "tries": tries}, None


def _rows(case: Case, keep: Bools) -> dict[str, list[int]]:
    """Kept rows of every weight."""
    return {name: np.flatnonzero(rows).tolist() for name, rows in case.by_weight(keep).items()}


def decoupled(
    case: Case, widths: Ints, treatments: tuple[str, ...] = TREATMENTS
) -> tuple[dict[str, float], dict[str, Any], Bools]:
    """Scores for the refit that the model gets, as in the package; the mask is that for least squares."""
    results: dict[str, float] = {}
    about: dict[str, Any] = {}
    keep = np.ones(case.coupling.n_units, bool)
    for refit, treated in (("none", ("fold", "cut")), ("least-squares", ("refit",))):
        asked = settings(mode="decoupled", formulation="exact", refit=refit, seed=case.seed)
        scores, seconds = score(case, asked)
        keep = mask(case, scores.values, widths)
        results |= measured(case, keep, tuple(t for t in treated if t in treatments))
        about[refit] = {**program(scores.programs), "wall": seconds}
    return results, about, keep


def _values(case: Case, importance: str, seed: int | None = None) -> Floats:
    asked = settings(importance=importance, seed=case.seed if seed is None else seed)
    return score(case, asked)[0].values


def _seeds(case: Case, count: int) -> list[int]:
    """Seeds of random orders: others for every training of a network."""
    return [100 * case.seed + i for i in range(count)]


def removed(case: Case, widths: Ints) -> list[int]:
    """Units that go from every layer."""
    return [len(g.units) - int(w) for g, w in zip(case.coupling.groups, widths, strict=True)]


def to_tune(case: Case, record: Mapping[str, Any]) -> dict[str, dict[str, Bools]]:
    """Masks that are trained further, at the counts of the published scores: kept rows by weight, by method."""
    widths = below(case, np.array(record["scores"]), case.about.threshold)
    found = {
        "random": _values(case, "random", _seeds(case, 1)[0]),
        "l1": _values(case, "l1"),
    }
    masks = {name: case.by_weight(mask(case, values, widths)) for name, values in found.items()}
    lengths = {name: len(rows) for name, rows in masks["l1"].items()}
    for method, kept in record["keep"].items():
        masks[method] = {
            name: np.isin(np.arange(lengths[name]), rows) for name, rows in kept.items()
        }
    return masks
