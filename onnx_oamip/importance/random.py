"""A seeded random order: the baseline that every importance method must beat."""

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
    model: Model,
    coupling: Coupling,
    statistics: Statistics | None,
    settings: Settings,
) -> Scores:
    """Draw one score per unit.

    Args:
        model: The model, whose weights are not read.
        coupling: Its units.
        statistics: Not read.
        settings: Settings of the run, for the seed.

    Returns:
        Scores uniform in (0, 1), the same for the same seed.
    """
    rng = np.random.default_rng(settings.seed)
    return Scores("random", rng.random(coupling.n_units))
