"""Options in groups by owner; :class:`onnx_oamip.core.settings.Settings` has those of ``prune`` and its stages."""

from __future__ import annotations

from onnx_oamip.core.options.budget import BudgetOptions
from onnx_oamip.core.options.data import DataOptions
from onnx_oamip.core.options.importance import ImportanceOptions, RemovalOptions
from onnx_oamip.core.options.limits import LimitOptions
from onnx_oamip.core.options.methods import (
    MintOptions,
    NNReliefOptions,
    OamipOptions,
    SnacsOptions,
)
from onnx_oamip.core.options.objective import ObjectiveOptions
from onnx_oamip.core.options.plan import AllocationOptions, ConstraintOptions, RepairOptions
from onnx_oamip.core.options.quantisation import QuantisationOptions
from onnx_oamip.core.options.recovery import RecoveryOptions
from onnx_oamip.core.options.run import RunOptions
from onnx_oamip.core.options.validation import Options

__all__ = [
    "AllocationOptions",
    "BudgetOptions",
    "ConstraintOptions",
    "DataOptions",
    "ImportanceOptions",
    "LimitOptions",
    "MintOptions",
    "NNReliefOptions",
    "OamipOptions",
    "ObjectiveOptions",
    "Options",
    "QuantisationOptions",
    "RecoveryOptions",
    "RemovalOptions",
    "RepairOptions",
    "RunOptions",
    "SnacsOptions",
]
