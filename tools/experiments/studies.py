"""Studies of the published program: dependence on images, lambda, programs per class and images per class."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr

from onnx_oamip.core.records import Floats, Images, Scores

from .case import Case, below, choose, choose_any, gone, mask, measured, program, score, settings
from .protocol import Protocol

SHOWN = ("fold", "refit")
FIRST_POOL = 1000
"""Seed of the first pool for draws of images, apart from those of calibration pools."""
RULES = ("least sure", "any correct")


def judged(case: Case, scores: Scores) -> dict[str, Any]:
    """Shares removed at the network's threshold by a set of scores, and the accuracy after each treatment."""
    widths = below(case, scores.values, case.about.threshold)
    keep = mask(case, scores.values, widths)
    found: dict[str, Any] = {"gone": gone(case, keep), "accuracy": measured(case, keep, SHOWN)}
    found["scores"] = scores.values.round(6).tolist()
    if scores.programs:
        found["program"] = program(scores.programs)
    return found


def _solved(case: Case, few: Images, protocol: Protocol, **values: Any) -> dict[str, Any]:
    scores, seconds = score(
        case, settings(seed=case.seed, time_limit=protocol.seconds, **values), few
    )
    return {**judged(case, scores), "wall": seconds}


def images(case: Case, protocol: Protocol) -> dict[str, Any]:
    """Fresh pools of training images by seed; from each ten images by two rules."""
    found: dict[str, Any] = {}
    for rule in RULES:
        rows = []
        for draw in range(protocol.image_draws):
            pool = case.pool(FIRST_POOL + draw)
            few = choose(case, pool) if rule == RULES[0] else choose_any(case, pool, draw)
            rows.append(_solved(case, few, protocol))
        found[rule] = {"draws": rows, "agreement": _pairwise([r["scores"] for r in rows])}
        for row in rows:
            del row["scores"]  # large, and its agreement is kept
    return found


def weights(case: Case, protocol: Protocol) -> dict[str, Any]:
    """The sweep of lambda."""
    few = choose(case, case.samples)
    found = {}
    for weight in protocol.weights:
        found[f"{weight:g}"] = _solved(case, few, protocol, loss_weight=weight)
        del found[f"{weight:g}"]["scores"]
    return found


def modes(case: Case, protocol: Protocol, joint: Floats) -> dict[str, Any]:
    """One program a class against the one for all (its scores: ``joint``): at the threshold, and at its counts."""
    found = _solved(case, choose(case, case.samples), protocol, mode="per-class")
    apart = np.array(found.pop("scores"))
    keep = mask(case, apart, below(case, joint, case.about.threshold))
    return {
        "per-class": found,
        "same counts": {"accuracy": measured(case, keep, SHOWN)},
        "pearson": float(pearsonr(joint, apart).statistic),
        "spearman": float(spearmanr(joint, apart).statistic),
    }


def per_class(case: Case, protocol: Protocol) -> dict[str, Any]:
    """One, two or five images a class in one program."""
    found = {}
    for count in protocol.per_class:
        found[str(count)] = _solved(
            case, choose(case, case.samples, count), protocol, images_per_class=count
        )
        del found[str(count)]["scores"]
    return found


def _pairwise(scores: Sequence[Sequence[float]]) -> float | None:
    """Mean rank correlation of all pairs of draws."""
    values: list[Floats] = [np.array(s) for s in scores]
    pairs = [float(spearmanr(a, b).statistic) for a, b in combinations(values, 2)]
    return float(np.mean(pairs)) if pairs else None
