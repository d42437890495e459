"""A seeded random order: what any method must beat."""

from __future__ import annotations

import numpy as np

from onnx_oamip.core.records import (
    Coupling,
    Model,
    Scores,
    Statistics,
)
from onnx_oamip.core.settings import Settings


def score(
    model: Model, coupling: Coupling, statistics: Statistics | None, settings: Settings
) -> Scores:
    """Uniform in (0, 1), the same for the same seed."""
    return Scores("random", np.random.default_rng(settings.seed).random(coupling.n_units))
