"""NNrelief: a connection matters by its share of the absolute signal that enters a unit.

Source: Dekhovich, Tax, Sluiter and Bessa, "Neural network relief: a pruning algorithm based on neural activity",
Machine Learning 113 (2024), section 3 and its algorithms 1 and 2. Per unit the connections with the largest shares that
sum to ``alpha`` are kept, the bias competing with the weights (the alpha rule); ``connection_shares`` has the formulas.

``signal = paper`` takes r as published. ``mean``, the default, takes ``sum |K_ij| E|x_i| sqrt(positions)``: one number
per channel in place of a Gram matrix, equal for dense layers and where a channel is the same everywhere, and it treats
a border as inside.

The paper and the authors' code differ; here it is as in the paper:

* their rule also drops the smallest entry where all are needed, so that every unit loses one each time; ours does not,
  and never takes a unit's last weight (a bias may outweigh all of them);
* their code drops all entries as small as the smallest that is kept; the paper, and ours, keeps ties;
* their networks' convolutional scores are three formulas, none of which is the printed one;
* their residual rule leaves the shift of a normalisation behind a filter that was cut; see ``connections``;
* their first layer of a residual network is never pruned, by a wrong name.

A bias that a normalisation adds is no connection, as in their residual networks. Depthwise kernels are left alone: a
filter has no other.
"""

from __future__ import annotations

import numpy as np

from onnx_oamip.core.records import (
    Coupling,
    Model,
    Scores,
    Statistics,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.published.nnrelief.connection_shares import layers
from onnx_oamip.published.nnrelief.requests import ABSOLUTE_ACTIVATIONS
from onnx_oamip.published.nnrelief.selection import Rules, dead
from onnx_oamip.published.nnrelief.unit_worth import worth


def score(
    model: Model,
    coupling: Coupling,
    statistics: Statistics | None,
    settings: Settings,
) -> Scores:
    """Score units by their share of the signal that later layers receive.

    Args:
        model: The model.
        coupling: Its units and consumers.
        statistics: Absolute activations.
        settings: Settings of the run.

    Returns:
        One score per unit; with ``settings.alpha``, 0 for units that the rules leave without a connection.
    """
    assert statistics is not None
    signal = statistics[ABSOLUTE_ACTIVATIONS]
    every_layer = layers(model, coupling, signal)
    values, _ = worth(model, coupling, signal, every_layer)
    if settings.alpha is None:
        return Scores("nnrelief", values)
    selection = Rules(model, coupling, signal, every_layer).select(settings.alpha)
    kept = selection.units & ~dead(coupling, signal)
    values = np.where(kept, np.maximum(values, np.finfo(np.float64).tiny), 0.0)
    removed = int((~kept).sum())
    note = f"{removed} of {len(kept)} units have no connection at alpha {settings.alpha:g}"
    return Scores("nnrelief", values, notes=(note,))
