"""Importance methods: one file each, one signature, an explicit ordered table.

A method is ``score(model, coupling, statistics, settings) -> Scores``; it never sees an operator's type beyond the
``linear`` facet, and larger means more important. To add one, write its file and add a line to METHODS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..records import Coupling, Model, Scores, Statistics
from ..settings import Settings
from . import activation, magnitude, oamip, obs, random

ScoreRule = Callable[[Model, Coupling, Statistics | None, Settings], Scores]


@dataclass(frozen=True, slots=True)
class Method:
    """``needs_data``: the method reads statistics of a calibration pass; ``needs_grams``: second moments too;
    ``needs_images``: a few chosen samples with their activations.

    ``keeps_bias``: the method takes a removed unit to lose its weights and to keep its bias, so that the constant it
    then emits is folded into its consumers where nothing else is refitted.
    """

    score: ScoreRule
    needs_data: bool
    summary: str
    needs_grams: bool = False
    needs_images: bool = False
    keeps_bias: bool = False


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "obs": Method(obs.score, True, "optimal brain surgeon order: loss after the best repair by the others", True),
        "activation": Method(activation.score, True, "mean square of what consumers receive, times their weights"),
        "l2": Method(magnitude.l2, False, "L2 norm of all weights of a unit, producers and consumers"),
        "l1": Method(magnitude.l1, False, "L1 norm of all weights of a unit, producers and consumers"),
        "oamip": Method(
            oamip.score,
            True,
            "keep variables of a mixed-integer program over the network on a few images (see --mode)",
            needs_grams=True,
            needs_images=True,
            keeps_bias=True,
        ),
        "random": Method(random.score, False, "a seeded random order, the baseline"),
    }
)
