"""What a pruned model must keep: its terms, how they are found, and how they are measured."""

from __future__ import annotations

from .detection import detect
from .losses import Loss, compare, loss, sums
from .measures import Measure, Measures
from .normaliser import Normaliser
from .terms import CHOICES, Kind, Objective, Part, Scale, Term, document

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
