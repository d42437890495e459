"""The published decoupling: every convolution of a VGG is scored by a program over its own module and auxiliary head.

The modules are trained by decoupled greedy learning. The published joint program is solved for each of them, on the
samples that the module's own head is least sure of; the scores of the heads are left out, and those of all modules are
compared with one threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from .protocol import AUXILIARY, Protocol

DATA = "fashion"
"""Data set that the VGG is trained on."""
TRAINED = 20_000
"""Training images, the first ones: a module trains on them as often as the other networks on all."""
JUDGED = 2_000
"""Test images, the first ones, that judge."""
SECONDS = 60.0
"""Time limit of the program of one module."""
METHODS = ("random", "l1", "auxiliary", "decoupled")
THRESHOLD = "published threshold"
HALF = "half of every layer"
SHOWN = ("fold", "refit")
"""Treatments of the consumers of removed units."""


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
    def of(cls, folder: Path, seed: int, epochs: int) -> Files:
        """Name the files.

        Args:
            folder: Folder of trained networks.
            seed: Seed of the training.
            epochs: Epochs of the training.

        Returns:
            The paths.
        """
        name = f"vgg-{DATA}-seed{seed}-epochs{epochs}-images{TRAINED}"
        count = len(AUXILIARY.widths) - 1
        parts = tuple(folder / f"{name}-module{number}.onnx" for number in range(1, count + 1))
        return cls(folder / f"{name}.onnx", parts)


def train(files: Files, data: Dataset, seed: int, epochs: int) -> None:
    """Train the modules on the first images, and write them and the network.

    Args:
        files: Files to write.
        data: Data set with all of its images.
        seed: Seed of the training.
        epochs: Epochs of the training.
    """
    from . import greedy  # torch: only where something is trained

    few = replace(
        data, train_images=data.train_images[:TRAINED], train_labels=data.train_labels[:TRAINED]
    )
    greedy.make(few, seed, epochs, files.whole, files.parts)


def run(files: Files, data: Dataset, seed: int, protocol: Protocol) -> dict[str, Any]:
    """Score a trained VGG module by module, and compare methods at equal counts.

    Args:
        files: Files of the training.
        data: Data set with all of its images.
        seed: Seed of the pool and of random orders.
        protocol: The run.

    Returns:
        The record: scores and program of every module, and shares removed and accuracies by counts and method.
    """
    judged = replace(
        data, test_images=data.test_images[:JUDGED], test_labels=data.test_labels[:JUDGED]
    )
    case = open_case(files.whole, "vgg", judged, seed)
    inputs = module_inputs(files.whole, data.train_images[data.pool(seed)])
    values = np.full(case.coupling.n_units, np.nan)
    modules = []
    for path, images in zip(files.parts, inputs, strict=True):
        module = open_case(path, "vgg", judged, seed, images)
        asked = settings(seed=seed, time_limit=SECONDS)
        scores, seconds = score(module, asked, choose(module, module.samples))
        layers = {}
        for weight in module.weights():
            if weight in case.weights():
                own = scores.values[units_of(module, weight)]
                values[units_of(case, weight)] = own
                layers[weight] = own.round(6).tolist()
        about = {"layers": layers, "right": _right(module), "wall": seconds}
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
        "auxiliary": measured(case, keep, SHOWN),
        "l1": main_table.of_method(case, "l1", widths, SHOWN),
    }
    results["random"], spread = main_table.at_random(case, widths, protocol.random_draws, SHOWN)
    results["decoupled"], about, _ = main_table.decoupled(case, widths, SHOWN)
    return {
        "removed": main_table.removed(case, widths),
        "gone": gone(case, keep),
        "accuracy": results,
        "random_spread": spread,
        "programs": about,
    }


def units_of(case: Case, weight: str) -> Ints:
    """Find the unit of every row of a weight.

    Args:
        case: A trained network.
        weight: Name of a weight whose first axis holds units.

    Returns:
        The units (rows,).
    """
    return case.coupling.axes[weight, 0]


def module_inputs(whole: Path, images: Array) -> list[Array]:
    """Compute the inputs of all modules: what the network feeds its convolutions.

    Args:
        whole: File of the network.
        images: Images as bytes.

    Returns:
        One array per convolution, in the order of the network; the first one holds the images in [0, 1].
    """
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
