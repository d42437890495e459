"""What a pruned model must keep: its terms, how they are found, and how they are measured."""

from __future__ import annotations

from onnx_oamip.objective.detection import detect
from onnx_oamip.objective.losses import (
    Loss,
    compare,
    loss,
    sums,
)
from onnx_oamip.objective.measures import Measure, Measures
from onnx_oamip.objective.normaliser import Normaliser
from onnx_oamip.objective.terms import (
    CHOICES,
    Kind,
    Objective,
    Part,
    Scale,
    Term,
    document,
)

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
    "compare",
    "detect",
    "document",
    "loss",
    "sums",
]
