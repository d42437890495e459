"""The published decoupling: every convolution of a VGG is scored by a program over its own module and auxiliary head.

The modules are trained by decoupled greedy learning. The published joint program is solved for each of them, on the
samples that the module's own head is least sure of; the scores of the heads are left out, and those of all modules are
compared with one threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_oamip.core.records import Array, Floats, Ints
from onnx_oamip.graph.runtime import Session

from . import main_table
from .case import (
    DEVICE,
    Case,
    accuracy,
    below,
    choose,
    gone,
    mask,
    measured,
    open_case,
    program,
    score,
    settings,
)
from .data import Dataset
from .protocol import Protocol

DATA = "fashion"
"""Data set that the VGG is trained on."""
TRAINED = 6_000
"""Training images, the first ones: a module trains on them as often as the other networks on all."""
SECONDS = 120.0
"""Time limit of the program of one module."""
METHODS = ("random", "critical", "l1", "activation", "auxiliary", "decoupled")
HALF = "half of every layer"
THRESHOLD = "published threshold"
WIDTHS = (THRESHOLD, HALF)
"""Counts of units at which the methods are compared."""


@dataclass(frozen=True)
class Files:
    """Files of one training.

    Attributes:
        whole: The network.
        parts: Each module with its head, in the order of the network.
    """

    whole: Path
    parts: tuple[Path, ...]

    @classmethod
    def of(cls, folder: Path, seed: int, epochs: int, count: int) -> Files:
        """Name the files.

        Args:
            folder: Folder of trained networks.
            seed: Seed of the training.
            epochs: Epochs of the training.
            count: Number of modules.

        Returns:
            The paths.
        """
        name = f"vgg-{DATA}-seed{seed}-epochs{epochs}-images{TRAINED}"
        parts = tuple(folder / f"{name}-module{number}.onnx" for number in range(1, count + 1))
        return cls(folder / f"{name}.onnx", parts)


def run(files: Files, data: Dataset, seed: int, protocol: Protocol) -> dict[str, Any]:
    """Score a trained VGG module by module, and compare methods at equal counts.

    Args:
        files: Files of the training.
        data: Data set with all of its images.
        seed: Seed of the pool and of random orders.
        protocol: The run.

    Returns:
        The record: programs, shares removed and accuracies by counts and method.
    """
    case = open_case(files.whole, "vgg", data, seed)
    inputs = _module_inputs(files.whole, data.train_images[data.pool(seed)])
    values = np.full(case.coupling.n_units, np.nan)
    modules = []
    for path, images in zip(files.parts, inputs, strict=True):
        module = open_case(path, "vgg", data, seed, images)
        asked = settings(seed=seed, time_limit=SECONDS)
        scores, seconds = score(module, asked, choose(module, module.samples))
        own = {name: scores.values[_units(module, name)] for name in module.weights()}
        shared = {name: v for name, v in own.items() if name in case.weights()}
        for name, found in shared.items():
            values[_units(case, name)] = found
        about = {"weights": list(shared), "reference": _right(module), "wall": seconds}
        modules.append({**program(scores.programs), **about})
    if np.isnan(values).any():
        raise RuntimeError(f"{files.whole.name}: units without a score from any module")
    counts = {
        THRESHOLD: below(case, values, case.about.threshold),
        HALF: np.array([len(group.units) // 2 for group in case.coupling.groups], np.int64),
    }
    return {
        "reference": accuracy(case, case.model.proto),
        "modules": modules,
        "compared": {
            name: _compared(case, values, widths, protocol) for name, widths in counts.items()
        },
    }


def _compared(case: Case, values: Floats, widths: Ints, protocol: Protocol) -> dict[str, Any]:
    """Shares that go at given widths, and the accuracy of every method by treatment."""
    keep = mask(case, values, widths)
    results = {
        "auxiliary": measured(case, keep),
        "critical": measured(case, mask(case, -values, widths)),
        **main_table.by_weights(case, widths),
    }
    results["random"], spread = main_table.at_random(case, widths, protocol.random_draws)
    results["decoupled"], about, _ = main_table.decoupled(case, widths)
    return {
        "removed": main_table.removed(case, widths),
        "gone": gone(case, keep),
        "accuracy": results,
        "random_spread": spread,
        "decoupled": about,
    }


def _units(case: Case, weight: str) -> Ints:
    """Unit of every row of a weight."""
    return case.coupling.axes[weight, 0]


def _module_inputs(whole: Path, images: Array) -> list[Array]:
    """Inputs of all modules for images: what the network feeds its convolutions."""
    proto = onnx.load(whole)
    names = [node.input[0] for node in proto.graph.node if node.op_type == "Conv"]
    del proto.graph.output[:]
    for name in names[1:]:
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        proto.graph.output.append(value)
    pixels = images.astype(np.float32) / np.float32(255)
    return [pixels, *Session(proto, DEVICE, threads=1).run({"input": pixels})]


def _right(module: Case) -> float:
    """Share of the pool that a module's own head answers rightly, in percent."""
    session = Session(module.model.proto, DEVICE, threads=1)
    assert module.samples.labels is not None
    guess: Sequence[Array] = [
        session.run(feed)[0].argmax(axis=1) for _, feed in module.samples.batches(256)
    ]
    return 100 * float((np.concatenate(guess) == module.samples.labels).mean())
