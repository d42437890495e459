"""The stages of a run: where each begins, and what the cache holds by then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCALES = ("scales",)
MOMENTS = (*SCALES, "moments")
GRAMS = (*MOMENTS, "grams")
SCORES = (*GRAMS, "scores")
STEPS = (*SCORES, "steps")
LOSSES = (*STEPS, "losses")
OUTPUTS = (*LOSSES, "outputs")
REFIT = (*OUTPUTS, "refit")


@dataclass(frozen=True)
class Stage:
    """``place``: the function that begins it; ``kept``: entries that are in the cache by then, by kind; ``values``:
    settings of a run that has this stage; ``solves``: programs; ``spreads``: its work over workers."""

    place: str
    kept: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    solves: bool = False
    spreads: bool = False


def oamip(mode: str, **values: Any) -> dict[str, Any]:
    return {"importance": "oamip", "mode": mode, **values}


STAGES = {
    "load": Stage("graph.loading.load"),
    "couple": Stage("planning.idle_branches.couple", SCALES),
    "calibrate": Stage("statistics.calibration.collect", SCALES),
    "gram": Stage("statistics.covariances.collect", MOMENTS),
    "pool": Stage(
        "published.dependence.pooled_activations.collect", MOMENTS, {"importance": "mint"}
    ),
    "score": Stage("planning.scoring.apply_method", GRAMS, spreads=True),
    "joint": Stage(
        "importance.oamip.select.program", GRAMS, oamip("joint", formulation="paper"), solves=True
    ),
    "per-class": Stage(
        "importance.oamip.select.program",
        GRAMS,
        oamip("per-class", formulation="paper"),
        solves=True,
    ),
    "decoupled": Stage(
        "importance.oamip.decoupled.score", GRAMS, oamip("decoupled"), solves=True, spreads=True
    ),
    "orders": Stage(
        "planning.sensitivity.choose", GRAMS, oamip("decoupled", refit="bias"), spreads=True
    ),
    "mint": Stage(
        "published.dependence.mint.executor", MOMENTS, {"importance": "mint"}, spreads=True
    ),
    "limits": Stage(
        "published.dependence.operating_limits.executor", SCORES, {"limits": "snacs"}, spreads=True
    ),
    "sensitivity": Stage("planning.sensitivity.measure", STEPS, spreads=True),
    "answers": Stage("planning.recorded_answers.answers", LOSSES),
    "plan": Stage("planning.allocation.allocate", OUTPUTS, solves=True),
    "refit": Stage("repair.least_squares.front", OUTPUTS),
    "verify": Stage("verification.equivalence.prove", REFIT),
    "latency": Stage("api.proof.compare_latency", REFIT),
    "write": Stage("api.pipeline.write", REFIT),
    "rename": Stage("core.atomic_files._backup", REFIT),
}


def is_cache_entry(arguments: tuple[Any, ...]) -> bool:
    """True for a call about a file of the cache, which is written at many stages."""
    paths = [a for a in arguments if isinstance(a, Path)]
    return any(path.suffix == ".npz" and path.parent.name == "cache" for path in paths)
