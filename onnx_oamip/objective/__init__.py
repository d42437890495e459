"""Objective of a pruned model: its terms, how they are found, and how they are measured."""

from __future__ import annotations

from onnx_oamip.core.records.objective import (
    CHOICES,
    Kind,
    Measure,
    Objective,
    Part,
    Scale,
    Term,
    document,
)
from onnx_oamip.objective.detection import at_outputs, detect
from onnx_oamip.objective.losses import (
    Loss,
    compare,
    loss,
    sums,
)
from onnx_oamip.objective.measures import Measures
from onnx_oamip.objective.normaliser import Normaliser
from onnx_oamip.objective.preparation import find_objective, scale, spread_rare

__all__ = [
    "CHOICES",
    "Kind",
    "Loss",
    "Measure",
    "Measures",
    "Normaliser",
    "Objective",
    "Part",
    "Scale",
    "Term",
    "at_outputs",
    "compare",
    "detect",
    "document",
    "find_objective",
    "loss",
    "scale",
    "spread_rare",
    "sums",
]
