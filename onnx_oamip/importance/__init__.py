"""Importance methods: one file each, one signature, an explicit ordered table.

A method is ``score(model, coupling, statistics, settings) -> Scores``; it never sees an operator's type beyond the
``linear`` facet, and larger means more important. To add one here, write its file and add a line to the table. Other
packages add theirs by :func:`register`, or by an entry point of the group ``onnx_oamip.importance`` whose name is the
method's and whose object is a :class:`Method` or the rule itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from types import MappingProxyType

from ..errors import EnvironmentMissing, SettingsError
from ..records import Coupling, Model, Scores, Statistics
from ..settings import Settings

ScoreRule = Callable[[Model, Coupling, Statistics | None, Settings], Scores]


@dataclass(frozen=True, slots=True)
class Method:
    """``needs_data``: the method reads statistics of a calibration pass; ``needs_grams``: second moments too;
    ``needs_images``: a few chosen samples with their activations; ``needs_signal``: absolute signal; ``needs_pooled``:
    activations of many samples pooled over positions.

    ``keeps_bias``: the method takes a removed unit to lose its weights and to keep its bias, so that the constant it
    then emits is folded into its consumers where nothing else is refitted.
    """

    score: ScoreRule
    needs_data: bool
    summary: str
    needs_grams: bool = False
    needs_images: bool = False
    needs_pooled: bool = False
    keeps_bias: bool = False
    needs_signal: bool = False


def _rule(file: str, name: str = "score") -> ScoreRule:
    """The rule in a file of this folder, which is imported when the rule is first used: names cost nothing."""

    def score(model: Model, coupling: Coupling, statistics: Statistics | None, settings: Settings) -> Scores:
        rule: ScoreRule = getattr(import_module(f"{__name__}.{file}"), name)
        return rule(model, coupling, statistics, settings)

    return score


_METHODS: dict[str, Method] = {
    "obs": Method(_rule("obs"), True, "optimal brain surgeon order: loss after the best repair by the others", True),
    "activation": Method(_rule("activation"), True, "mean square of what consumers receive, times their weights"),
    "nnrelief": Method(
        _rule("nnrelief"), True, "share of the absolute signal of what follows (see --alpha)", needs_signal=True
    ),
    "l2": Method(_rule("magnitude", "l2"), False, "L2 norm of all weights of a unit, producers and consumers"),
    "l1": Method(_rule("magnitude", "l1"), False, "L1 norm of all weights of a unit, producers and consumers"),
    "oamip": Method(
        _rule("oamip"),
        True,
        "keep variables of a mixed-integer program over the network on a few images (see --mode)",
        needs_grams=True,
        needs_images=True,
        keeps_bias=True,
    ),
    "snacs": Method(
        _rule("snacs"),
        True,
        "conditional mutual information between layers by hashing, times weights (see --phi)",
        needs_pooled=True,
    ),
    "mint": Method(
        _rule("mint"),
        True,
        "experimental, mutual information between groups of filters by spanning trees (see --score-time)",
        needs_pooled=True,
    ),
    "correlation": Method(
        _rule("correlation"), True, "partial correlation of what a layer gives with what it reads", needs_pooled=True
    ),
    "random": Method(_rule("random"), False, "a seeded random order, the baseline"),
}
METHODS: Mapping[str, Method] = MappingProxyType(_METHODS)
"""All methods by name, those registered meanwhile too."""
ENTRY_POINTS = "onnx_oamip.importance"


def register(name: str, method: Method | ScoreRule) -> None:
    """Add a method; a bare rule reads moments of the calibration data. Raises SettingsError for a name that is taken.

    >>> import numpy as np
    >>> from onnx_oamip import Scores, register
    >>> def first(model, coupling, statistics, settings):
    ...     return Scores("first", -np.arange(coupling.n_units, dtype=float))
    >>> register("first", first)
    """
    if name in _METHODS:
        raise SettingsError(f"an importance method '{name}' is there already; choose another name.")
    if not isinstance(method, Method):
        text = (method.__doc__ or "").strip()
        method = Method(method, True, text.splitlines()[0].rstrip(".") if text else f"a rule of {method.__module__}")
    _METHODS[name] = method


def find(name: str) -> Method:
    """The method of that name, from the table or an installed package. Raises SettingsError where there is none."""
    if name not in _METHODS:
        for point in metadata.entry_points(group=ENTRY_POINTS):
            if point.name == name:
                try:
                    register(name, point.load())
                except Exception as error:  # another package's code: whatever it raises is told as it is
                    raise EnvironmentMissing(
                        f"the importance method '{name}' of {point.value} cannot be loaded: {error}."
                    ) from error
    if name not in _METHODS:
        raise SettingsError(f"--importance '{name}' is unknown; choose one of {', '.join(names())}.")
    return _METHODS[name]


def names() -> list[str]:
    """Names of all methods, those of installed packages too; nothing is loaded for that."""
    return list(dict.fromkeys([*_METHODS, *(p.name for p in metadata.entry_points(group=ENTRY_POINTS))]))
