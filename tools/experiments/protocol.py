"""Parameters of the experiments: the published protocol and the additions to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Row = dict[str, object]


@dataclass(frozen=True)
class Network:
    """A published network: widths of its hidden layers and the threshold below which a score prunes."""

    title: str
    widths: tuple[int, ...]
    threshold: float
    convolutional: bool = False


PUBLISHED: Mapping[str, Network] = {
    "fc3": Network("FC-3", (300, 100), 0.1),
    "fc4": Network("FC-4", (200, 100, 100), 0.1),
    "lenet5": Network("LeNet-5", (6, 16, 120, 84), 0.2, True),
}
AUXILIARY = Network("VGG", (12, 16, 32, 32, 64, 64, 64), 0.3, True)
"""Six convolutions and a dense layer; each convolution is trained and scored with an auxiliary head."""
POOLED = (2, 4, 6)
"""Convolutions behind which its maps are halved by average pooling."""
SIDE = 32
"""Side of its first maps."""
NETWORKS: Mapping[str, Network] = {**PUBLISHED, "vgg": AUXILIARY}
DATA = ("mnist", "fashion")
BATCH, RATE = 128, 1e-3
FINE_TUNE = 1
"""Epochs of training after pruning (the published runs take two for LeNet-5 on MNIST)."""
WEIGHT = 5.0
"""Lambda of the published runs: the weight of the loss against the reward for pruning."""


@dataclass(frozen=True)
class Protocol:
    """One run. ``seconds``: time limit of one published program; ``exact_seconds``: of one exact joint program.

    ``networks_apart``: those for draws of images and transfer.
    """

    networks: tuple[str, ...] = tuple(PUBLISHED)
    data: tuple[str, ...] = DATA
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 5
    seconds: float = 20.0
    exact_seconds: float = 10.0
    networks_apart: tuple[str, ...] = ("fc3", "lenet5")
    random_draws: int = 3
    image_draws: int = 10
    weights: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0, 20.0)
    per_class: tuple[int, ...] = (1, 2, 5)


QUICK = Protocol(
    networks=("fc3", "lenet5"),
    seeds=(0,),
    epochs=1,
    seconds=5.0,
    exact_seconds=2.0,
    random_draws=2,
    image_draws=2,
    weights=(1.0, 5.0),
    per_class=(1, 2),
)
"""A look at whether everything runs; its numbers mean little."""
