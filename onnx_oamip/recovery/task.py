"""The record of what a recovery trains: models, objective, samples and judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import Model
from onnx_oamip.core.records.objective import Objective
from onnx_oamip.data.augmentation import Augment
from onnx_oamip.data.dataset import Samples
from onnx_oamip.recovery.features import Feature
from onnx_oamip.recovery.judge import Judge


@dataclass(frozen=True)
class Task:
    """Model to train, with its teacher, data and judge.

    Attributes:
        original: The teacher.
        pruned: The model to train.
        objective: Terms with scales.
        features: Tensors besides the objective's that are compared.
        samples: Samples to train on.
        judge: Loss on held-out samples.
        device: ``cpu`` or ``cuda``, of torch.
        runtime_device: Device of ONNX Runtime.
        memory: Bytes of activations.
        seed: Seed of the order of samples and of their changes.
        augment: Changes of feeds, or None.
        progress: Callback ``(stage, done, total)``.
        stop: Asked after every step; True ends training with the best so far.
    """

    original: Model
    pruned: Model
    objective: Objective
    features: tuple[Feature, ...]
    samples: Samples
    judge: Judge
    device: str
    runtime_device: str
    memory: int
    seed: int
    augment: Augment | None = None
    progress: Progress | None = None
    stop: Callable[[], bool] | None = None
