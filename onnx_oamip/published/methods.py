"""Plug-ins of the published systems, found by the entry points of this distribution in ``pyproject.toml``.

Rules and collectors are imported when they run: help and lists of methods load this module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx_oamip.core.records import Scores
from onnx_oamip.importance.registry import Method, Requests, lazy_rule
from onnx_oamip.planning.limits import LimitMethod, UpperLimits
from onnx_oamip.published.dependence.requests import POOLED_ACTIVATIONS
from onnx_oamip.published.nnrelief.requests import ABSOLUTE_ACTIVATIONS
from onnx_oamip.statistics.requests import MOMENTS

if TYPE_CHECKING:
    from onnx_oamip.statistics.context import Context

_DEPENDENCE: Requests = frozenset({MOMENTS, POOLED_ACTIVATIONS})

NNRELIEF = Method(
    lazy_rule("onnx_oamip.published.nnrelief.score"),
    "share of the absolute signal of what follows (see `alpha`)",
    frozenset({ABSOLUTE_ACTIVATIONS}),
)
SNACS = Method(
    lazy_rule("onnx_oamip.published.dependence.snacs"),
    "conditional mutual information between layers by hashing, times weights (see `phi`)",
    _DEPENDENCE,
)
MINT = Method(
    lazy_rule("onnx_oamip.published.dependence.mint"),
    "experimental, mutual information between groups of filters by spanning trees (see `score_time`)",
    _DEPENDENCE,
)
CORRELATION = Method(
    lazy_rule("onnx_oamip.published.dependence.correlation"),
    "partial correlation of what a layer gives with what it reads",
    _DEPENDENCE,
)


def _operating_limits(context: Context, scores: Scores) -> UpperLimits:
    from onnx_oamip.published.dependence import operating_limits

    return operating_limits.upper_limits(context, scores)


def _check_operating_limits() -> None:
    from onnx_oamip.published.dependence import operating_limits

    operating_limits.check()


SNACS_LIMITS = LimitMethod(
    _operating_limits,
    "finds for every layer how many of its inputs can go before what it says about the classes (without labels: its "
    "output) has lost 70 % of what it loses at all",
    _check_operating_limits,
)
