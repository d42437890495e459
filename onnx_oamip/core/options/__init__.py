"""Options of a run, in groups by owner; :class:`onnx_oamip.core.settings.Settings` has all of them."""

from __future__ import annotations

from onnx_oamip.core.options.budget import BudgetOptions
from onnx_oamip.core.options.data import DataOptions
from onnx_oamip.core.options.importance import ImportanceOptions, RemovalOptions
from onnx_oamip.core.options.methods import (
    MintOptions,
    NNReliefOptions,
    OamipOptions,
    SnacsOptions,
)
from onnx_oamip.core.options.objective import ObjectiveOptions
from onnx_oamip.core.options.plan import AllocationOptions, ConstraintOptions, RepairOptions
from onnx_oamip.core.options.recovery import RecoveryOptions
from onnx_oamip.core.options.run import RunOptions
from onnx_oamip.core.options.validation import Options

__all__ = [
    "AllocationOptions",
    "BudgetOptions",
    "ConstraintOptions",
    "DataOptions",
    "ImportanceOptions",
    "MintOptions",
    "NNReliefOptions",
    "OamipOptions",
    "ObjectiveOptions",
    "Options",
    "RecoveryOptions",
    "RemovalOptions",
    "RepairOptions",
    "RunOptions",
    "SnacsOptions",
]
