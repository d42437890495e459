"""Prunes trained ONNX models to a budget, without retraining, and verifies the result.

The main functions are ``prune`` and its stages ``score``, ``plan`` and ``apply``; ``frontier`` for several budgets;
``compare`` for two models; ``pack`` and ``unpack`` for storage. They return frozen records, and every intended error is
an ``OamipError``. Names are imported when first used, so ``import onnx_oamip`` is fast.

All stages at once, with a callback ``progress(stage, done, total)``:

>>> import onnx_oamip
>>> stages = set()
>>> report = onnx_oamip.prune(
...     "models/lenet300-mnist.onnx", "models/mnist.npz", "half.onnx",
...     onnx_oamip.Settings(macs=0.5, importance="activation", force=True),
...     progress=lambda stage, done, total: stages.add(stage),
... )
>>> report.after.macs <= 0.5 * report.before.macs, report.verification.accuracy_after > 0.97
(True, True)
>>> sorted(stages)
['calibrate', 'gram', 'refit', 'sensitivity', 'verify']
>>> [(group.name, width) for group, width in zip(report.coupling.groups, report.plan.widths.tolist())]
... # doctest: +ELLIPSIS
[('fc1.weight', ...), ('fc2.weight', ...)]

Or stage by stage, with files in between that can be kept, read and edited:

>>> settings = onnx_oamip.Settings(macs=0.3, force=True)
>>> scored = onnx_oamip.score("models/lenet300-mnist.onnx", "models/mnist.npz", "scores.npz", settings)
>>> planned = onnx_oamip.plan(
...     "models/lenet300-mnist.onnx", "models/mnist.npz", "plan.json", settings, scores="scores.npz"
... )
>>> report = onnx_oamip.apply(
...     "models/lenet300-mnist.onnx", "plan.json", "models/mnist.npz", "small.onnx", {"force": True}
... )
>>> report.after.macs == planned.plan.predicted.macs
True

Errors are one sentence:

>>> onnx_oamip.prune("models/lenet300-mnist.onnx", None, None, onnx_oamip.Settings(macs=0.5))
Traceback (most recent call last):
onnx_oamip.core.errors.DataError: `importance=obs` needs calibration data; give `data`, or use `importance=l2`,
`allocate=uniform` and `refit=none`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onnx_oamip.core.version import __version__

if TYPE_CHECKING:
    from onnx_oamip.api.frontier import frontier
    from onnx_oamip.api.pipeline import (
        apply,
        compare,
        plan,
        prune,
        score,
    )
    from onnx_oamip.artifacts.plan_files import PlanFile, Planned
    from onnx_oamip.artifacts.score_files import Scored, load_scores
    from onnx_oamip.core.errors import (
        BudgetNotMet,
        DataError,
        EnvironmentMissing,
        GateFailed,
        ModelError,
        OamipError,
        OutputError,
        SettingsError,
    )
    from onnx_oamip.core.records import (
        Budget,
        Cost,
        Coupling,
        Group,
        Model,
        Pinned,
        Plan,
        Pruned,
        Report,
        Request,
        Scores,
        Statistics,
        Verification,
    )
    from onnx_oamip.core.settings import Settings
    from onnx_oamip.graph.coupling import couple
    from onnx_oamip.graph.loading import load
    from onnx_oamip.importance import Method, register
    from onnx_oamip.published.packing import (
        Packed,
        Unpacked,
        pack,
        unpack,
    )
    from onnx_oamip.reporting.documents import document
    from onnx_oamip.statistics.requests import CLASS_SAMPLES, COVARIANCE, MOMENTS

_HOMES = {
    "artifacts.score_files": ("Scored", "load_scores"),
    "graph.coupling": ("couple",),
    "api.frontier": ("frontier",),
    "core.errors": (
        "BudgetNotMet",
        "DataError",
        "EnvironmentMissing",
        "GateFailed",
        "ModelError",
        "OamipError",
        "OutputError",
        "SettingsError",
    ),
    "importance": ("Method", "register"),
    "graph.loading": ("load",),
    "api.pipeline": ("apply", "compare", "plan", "prune", "score"),
    "artifacts.plan_files": ("PlanFile", "Planned"),
    "core.records": (
        "Budget",
        "Cost",
        "Coupling",
        "Group",
        "Model",
        "Pinned",
        "Plan",
        "Pruned",
        "Report",
        "Request",
        "Scores",
        "Statistics",
        "Verification",
    ),
    "reporting.documents": ("document",),
    "core.settings": ("Settings",),
    "published.packing": ("Packed", "Unpacked", "pack", "unpack"),
    "statistics.requests": ("CLASS_SAMPLES", "COVARIANCE", "MOMENTS"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CLASS_SAMPLES",
    "COVARIANCE",
    "MOMENTS",
    "Budget",
    "BudgetNotMet",
    "Cost",
    "Coupling",
    "DataError",
    "EnvironmentMissing",
    "GateFailed",
    "Group",
    "Method",
    "Model",
    "ModelError",
    "OamipError",
    "OutputError",
    "Packed",
    "Pinned",
    "Plan",
    "PlanFile",
    "Planned",
    "Pruned",
    "Report",
    "Request",
    "Scored",
    "Scores",
    "Settings",
    "SettingsError",
    "Statistics",
    "Unpacked",
    "Verification",
    "__version__",
    "apply",
    "compare",
    "couple",
    "document",
    "frontier",
    "load",
    "load_scores",
    "pack",
    "plan",
    "prune",
    "register",
    "score",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
