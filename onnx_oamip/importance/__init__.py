"""Importance methods: one file each, one signature, an explicit ordered table.

A method is ``score(model, coupling, statistics, settings) -> Scores``; it never sees an operator's type beyond the
``linear`` facet, and larger means more important. To add one here, write its file and add a line to the table. Other
packages add theirs by ``register``, or by an entry point of the group ``onnx_oamip.importance`` whose name is the
method's and whose object is a ``Method`` or the rule itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from types import MappingProxyType

from onnx_oamip.core.errors import EnvironmentMissing, SettingsError
from onnx_oamip.core.records import (
    Coupling,
    Model,
    Request,
    Scores,
    Statistics,
)
from onnx_oamip.core.settings import Settings

ScoreRule = Callable[[Model, Coupling, Statistics | None, Settings], Scores]
Requests = frozenset[Request]
WEIGHTS_ONLY: Requests = frozenset()
MOMENTS: Requests = frozenset({Request.MOMENTS})


@dataclass(frozen=True, slots=True)
class Method:
    """An importance method: its rule, one line about it, and the statistics that the rule reads.

    Attributes:
        score: The rule. Its statistics are None where it requests none.
        summary: One line without a full stop.
        requires: The statistics that the rule reads, or a function of the settings that returns them. Empty: the rule
            reads weights alone and needs no calibration data.
        keeps_bias: The method takes a removed unit to lose its weights and to keep its bias, so that the constant it
            then emits is folded into its consumers where nothing else is refitted.
    """

    score: ScoreRule
    summary: str
    requires: Requests | Callable[[Settings], Requests] = MOMENTS
    keeps_bias: bool = False

    def requests(self, settings: Settings) -> Requests:
        """The statistics that the rule reads under these settings."""
        return self.requires(settings) if callable(self.requires) else self.requires


def _rule(module: str, name: str = "score") -> ScoreRule:
    """Rule of a module of this package, imported when the rule is first used: names cost nothing."""

    def score(
        model: Model, coupling: Coupling, statistics: Statistics | None, settings: Settings
    ) -> Scores:
        rule: ScoreRule = getattr(import_module(f"onnx_oamip.{module}"), name)
        return rule(model, coupling, statistics, settings)

    return score


def _oamip_requests(settings: Settings) -> Requests:
    """Programs over the whole network need samples of every class; the layer-wise programs do not."""
    layer_wise = MOMENTS | {Request.COVARIANCE}
    return layer_wise if settings.mode == "decoupled" else layer_wise | {Request.CLASS_SAMPLES}


_DEPENDENCE = MOMENTS | {Request.POOLED_ACTIVATIONS}
_METHODS: dict[str, Method] = {
    "obs": Method(
        _rule("importance.obs"),
        "optimal brain surgeon order: loss after the best repair by the others",
        MOMENTS | {Request.COVARIANCE},
    ),
    "activation": Method(
        _rule("importance.activation"), "mean square of what consumers receive, times their weights"
    ),
    "nnrelief": Method(
        _rule("published.nnrelief.score"),
        "share of the absolute signal of what follows (see --alpha)",
        frozenset({Request.ABSOLUTE_ACTIVATIONS}),
    ),
    "l2": Method(
        _rule("importance.magnitude", "l2"),
        "L2 norm of all weights of a unit, producers and consumers",
        WEIGHTS_ONLY,
    ),
    "l1": Method(
        _rule("importance.magnitude", "l1"),
        "L1 norm of all weights of a unit, producers and consumers",
        WEIGHTS_ONLY,
    ),
    "oamip": Method(
        _rule("importance.oamip.select"),
        "keep variables of a mixed-integer program over the network on a few images (see --mode)",
        _oamip_requests,
        keeps_bias=True,
    ),
    "snacs": Method(
        _rule("published.dependence.snacs"),
        "conditional mutual information between layers by hashing, times weights (see --phi)",
        _DEPENDENCE,
    ),
    "mint": Method(
        _rule("published.dependence.mint"),
        "experimental, mutual information between groups of filters by spanning trees (see --score-time)",
        _DEPENDENCE,
    ),
    "correlation": Method(
        _rule("published.dependence.correlation"),
        "partial correlation of what a layer gives with what it reads",
        _DEPENDENCE,
    ),
    "random": Method(
        _rule("importance.random"), "a seeded random order, the baseline", WEIGHTS_ONLY
    ),
}
METHODS: Mapping[str, Method] = MappingProxyType(_METHODS)
"""All methods by name, those registered meanwhile too."""
ENTRY_POINTS = "onnx_oamip.importance"


def register(name: str, method: Method | ScoreRule) -> None:
    """Register an importance method, usable like a built-in one.

    Args:
        name: Value for ``Settings.importance`` and ``--importance``.
        method: The method, or its rule alone, which then gets the moments of the calibration samples.

    Raises:
        SettingsError: The name is taken.

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
        method = Method(
            method, text.splitlines()[0].rstrip(".") if text else f"a rule of {method.__module__}"
        )
    _METHODS[name] = method


def find(name: str) -> Method:
    """The method of that name, from the table or an installed package. Raises SettingsError where there is none."""
    if name not in _METHODS:
        for point in metadata.entry_points(group=ENTRY_POINTS):
            if point.name == name:
                try:
                    register(name, point.load())
                except (
                    Exception
                ) as error:  # another package's code: whatever it raises is told as it is
                    raise EnvironmentMissing(
                        f"the importance method '{name}' of {point.value} cannot be loaded: {error}."
                    ) from error
    if name not in _METHODS:
        raise SettingsError(
            f"--importance '{name}' is unknown; choose one of {', '.join(names())}."
        )
    return _METHODS[name]


def names() -> list[str]:
    """Names of all methods, those of installed packages too; nothing is loaded for that."""
    return list(
        dict.fromkeys([*_METHODS, *(p.name for p in metadata.entry_points(group=ENTRY_POINTS))])
    )
