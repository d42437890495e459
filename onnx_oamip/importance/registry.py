"""Registry of importance methods.

The rule of a method is ``score(model, coupling, statistics, settings) -> Scores``. It never sees an operator's type
beyond the ``linear`` facet, and a larger score means that a unit is more important. Methods of the default path are in
the table below. All others, those of ``onnx_oamip.published`` among them, come from packages: by ``register``, or
by an entry point of the group ``onnx_oamip.importance`` whose name is the method's and whose object is a
``Method`` or the rule itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from onnx_oamip.core.records import (
    Coupling,
    Model,
    Request,
    Scores,
    Statistics,
)
from onnx_oamip.core.registry import Registry
from onnx_oamip.core.settings import Settings
from onnx_oamip.statistics.requests import CLASS_SAMPLES, COVARIANCE, MOMENTS, RELEVANCE

ScoreRule = Callable[[Model, Coupling, Statistics | None, Settings], Scores]
Requests = frozenset[Request[Any]]

WEIGHTS_ONLY: Requests = frozenset()
MOMENTS_ONLY: Requests = frozenset({MOMENTS})
LAYER_WISE: Requests = frozenset({MOMENTS, COVARIANCE, RELEVANCE})


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
    requires: Requests | Callable[[Settings], Requests] = MOMENTS_ONLY
    keeps_bias: bool = False

    def requests(self, settings: Settings) -> Requests:
        """List the statistics that the rule reads.

        Args:
            settings: Settings of the run.

        Returns:
            The requests under these settings.
        """
        if callable(self.requires):
            return self.requires(settings)
        return self.requires


def lazy_rule(module: str, name: str = "score") -> ScoreRule:
    """Make a rule that imports its module when it is first used, so that a table of methods imports nothing.

    Args:
        module: Full name of the module that holds the rule.
        name: Name of the rule in the module.

    Returns:
        A rule that calls the one in the module.
    """

    def score(
        model: Model,
        coupling: Coupling,
        statistics: Statistics | None,
        settings: Settings,
    ) -> Scores:
        rule: ScoreRule = getattr(import_module(module), name)
        return rule(model, coupling, statistics, settings)

    # Scores are cached only for rules of this package: the rule belongs to the module that it imports.
    score.__module__ = module
    return score


def _oamip_requests(settings: Settings) -> Requests:
    """Statistics that OAMIP reads; samples of every class only for programs over the whole network."""
    if settings.mode == "decoupled":
        return LAYER_WISE
    return LAYER_WISE | {CLASS_SAMPLES}


_BUILT_IN = {
    "obs": Method(
        lazy_rule("onnx_oamip.importance.obs"),
        "optimal brain surgeon order: loss after the best repair by the others",
        LAYER_WISE,
    ),
    "activation": Method(
        lazy_rule("onnx_oamip.importance.activation"),
        "mean square of what consumers receive, times their weights",
        frozenset({MOMENTS, RELEVANCE}),
    ),
    "l2": Method(
        lazy_rule("onnx_oamip.importance.magnitude", "l2"),
        "L2 norm of all weights of a unit, producers and consumers",
        WEIGHTS_ONLY,
    ),
    "l1": Method(
        lazy_rule("onnx_oamip.importance.magnitude", "l1"),
        "L1 norm of all weights of a unit, producers and consumers",
        WEIGHTS_ONLY,
    ),
    "oamip": Method(
        lazy_rule("onnx_oamip.importance.oamip.select"),
        "keep variables of a mixed-integer program over the network on a few images (see `mode`)",
        _oamip_requests,
        keeps_bias=True,
    ),
    "random": Method(
        lazy_rule("onnx_oamip.importance.random"),
        "a seeded random order, the baseline",
        WEIGHTS_ONLY,
    ),
}


def _as_method(plugin: Method | ScoreRule) -> Method:
    """Wrap a bare rule as a method that reads moments and is described by its docstring."""
    if isinstance(plugin, Method):
        return plugin
    text = (plugin.__doc__ or "").strip()
    if text:
        summary = text.splitlines()[0].rstrip(".")
    else:
        summary = f"a rule of {plugin.__module__}"
    return Method(plugin, summary)


REGISTRY: Registry[Method] = Registry(
    _BUILT_IN,
    kind="importance method",
    parameter="importance",
    group="onnx_oamip.importance",
    convert=_as_method,
)


def register(name: str, method: Method | ScoreRule) -> None:
    """Register an importance method in this process, usable like a built-in one.

    Args:
        name: Name of the method, for ``Settings.importance`` and ``--importance``.
        method: The method, or a bare rule, which reads the moments of the calibration data.

    Raises:
        SettingsError: The name is taken.

    >>> import numpy as np
    >>> from onnx_oamip import Scores, register
    >>> def first(model, coupling, statistics, settings):
    ...     return Scores("first", -np.arange(coupling.n_units, dtype=float))
    >>> register("first", first)
    """
    REGISTRY.register(name, method)


def find(name: str) -> Method:
    """Look up an importance method, and load it if an installed package provides it.

    Args:
        name: Name of the method.

    Returns:
        The method.

    Raises:
        SettingsError: No method has this name.
        EnvironmentMissing: The package that provides the method cannot be imported.
    """
    return REGISTRY.find(name)


def names() -> list[str]:
    """List the names of all importance methods without loading any.

    Returns:
        Built-in and registered names, then those of installed packages in alphabetical order.
    """
    return REGISTRY.names()
