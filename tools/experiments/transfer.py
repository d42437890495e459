"""Masks trained on: from the initialisation on the other data set, and from what was trained on the same (torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from . import networks
from .data import Dataset
from .protocol import NETWORKS, Bools


def run(
    network: str,
    target: Dataset,
    seed: int,
    kept: Mapping[str, Mapping[str, Sequence[int]]],
    epochs: int,
) -> dict[str, float]:
    """Accuracy on the target of what masks leave of the initialisation, and of as many random units a layer.

    Removed units are cut out of the initialisation; what their biases would add is one constant a unit behind them,
    which that unit's own bias learns.

    Args:
        network: Name of the network.
        target: Data to train on.
        seed: Seed of the initialisation, of the training and of the random mask.
        kept: Kept rows of every weight, by method; as many rows by every method.
        epochs: Epochs of training.

    Returns:
        Accuracy in percent by method.
    """
    rng = np.random.default_rng(seed)
    widths = NETWORKS[network].widths
    masks = {
        method: {
            name: np.isin(np.arange(width), rows)
            for (name, rows), width in zip(of_method.items(), widths, strict=True)
        }
        for method, of_method in kept.items()
    }
    masks["random"] = {name: rng.permutation(keep) for name, keep in masks["paper"].items()}
    result = {}
    for key, keep in masks.items():
        model = networks.part(network, networks.build(network, seed).state_dict(), keep)
        networks.fit(model, target, seed, epochs)
        result[key] = networks.accuracy(model, target)
    return result


def fine_tune(
    network: str,
    data: Dataset,
    seed: int,
    masks: Mapping[str, Mapping[str, Bools]],
    path: Path,
    epochs: int,
) -> dict[str, float]:
    """Accuracy of what each mask leaves of a trained network (``path``), trained further at the full rate as published.

    Key ``all``: the unpruned network, trained further in the same way.
    """
    state = networks.read(path)
    result = {}
    whole = {name: np.ones(len(rows), bool) for name, rows in next(iter(masks.values())).items()}
    for key, keep in {"all": whole, **masks}.items():
        model = networks.part(network, state, keep)
        if key == "all":
            result["before"] = networks.accuracy(model, data)
        networks.fit(model, data, seed, epochs)
        result[key] = networks.accuracy(model, data)
    return result
