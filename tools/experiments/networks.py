"""The networks, how they are trained and exported, and how a part of one is trained from its initialisation (torch)."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from .data import CLASSES, Dataset
from .protocol import BATCH, NETWORKS, RATE, Bools

OPSET = 17


def build(name: str, seed: int, widths: Sequence[int] | None = None) -> nn.Sequential:
    """A network at its initialisation by seed; ``widths`` of its hidden layers where not the published ones."""
    torch.manual_seed(seed)
    wide = list(widths or NETWORKS[name].widths)
    parts: dict[str, nn.Module] = {}
    if NETWORKS[name].convolutional:
        first, second, *dense = wide
        parts |= {"conv1": nn.Conv2d(1, first, 5), "relu1": nn.ReLU(), "pool1": nn.AvgPool2d(2)}
        parts |= {
            "conv2": nn.Conv2d(first, second, 5),
            "relu2": nn.ReLU(),
            "pool2": nn.AvgPool2d(2),
        }
        width, start = second * 16, 3
    else:
        dense, width, start = wide, 784, 1
    parts["flatten"] = nn.Flatten()
    for i, out in enumerate(dense, start):
        parts |= {f"fc{i}": nn.Linear(width, out), f"relu{i}": nn.ReLU()}
        width = out
    parts["logits"] = nn.Linear(width, CLASSES)
    model = nn.Sequential()
    for key, part in parts.items():
        model.add_module(key, part)
    return model


def part(name: str, whole: Mapping[str, Tensor], keep: Mapping[str, Bools]) -> nn.Sequential:
    """The units of a network (its state) that ``keep`` leaves, by weight name, as a network of their own."""
    chosen = {key.removesuffix(".weight"): np.flatnonzero(rows) for key, rows in keep.items()}
    model = build(name, 0, [len(rows) for rows in chosen.values()])
    before: np.ndarray | None = None
    for key, layer in model.named_children():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        weight, bias = whole[f"{key}.weight"], whole[f"{key}.bias"]
        rows = chosen.get(key, np.arange(len(weight)))
        if before is not None:
            inside = weight.shape[1] // _full(name, key)
            columns = (before[:, None] * inside + np.arange(inside)).reshape(-1)
            weight = weight[:, columns]
        with torch.no_grad():
            layer.weight.copy_(weight[rows])
            layer.bias.copy_(bias[rows])
        before = rows
    return model


def _full(name: str, key: str) -> int:
    """Units of the layer before ``key``, unpruned."""
    layers = [k for k, m in build(name, 0).named_children() if isinstance(m, nn.Linear | nn.Conv2d)]
    return int(NETWORKS[name].widths[layers.index(key) - 1])


def fit(model: nn.Module, data: Dataset, seed: int, epochs: int) -> None:
    """Train by the published recipe, but for the number of epochs: RMSprop, constant rate, cross-entropy."""
    torch.set_num_threads(1)
    images, labels = torch.from_numpy(data.train_images.copy()), torch.from_numpy(data.train_labels)
    optimiser = torch.optim.RMSprop(model.parameters(), lr=RATE, foreach=True)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        shuffled = torch.randperm(len(labels), generator=order)
        for rows in shuffled.split(BATCH):
            loss = nn.functional.cross_entropy(model(scaled(images[rows])), labels[rows])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
    model.eval()


def scaled(images: Tensor) -> Tensor:
    """Bytes as values in [0, 1]."""
    return images.float() / 255


def accuracy(model: nn.Module, data: Dataset) -> float:
    """Share of the test images that are right, in percent."""
    model.eval()
    with torch.no_grad():
        guess = [
            model(scaled(rows)).argmax(1)
            for rows in torch.from_numpy(data.test_images.copy()).split(1000)
        ]
    return 100 * float((torch.cat(guess).numpy() == data.test_labels).mean())


def export(model: nn.Module, path: Path, example: Tensor | None = None) -> None:
    """Write the network as ONNX, with a free batch axis; ``example``: an input of it where it reads no images."""
    held = io.BytesIO()
    with warnings.catch_warnings():
        # This exporter is the older one: it needs no further package.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.zeros(2, 1, 28, 28) if example is None else example,),
            held,
            dynamo=False,
            opset_version=OPSET,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
        )
    path.write_bytes(held.getvalue())


def read(path: Path) -> dict[str, Tensor]:
    """The state of an exported network."""
    held = onnx.load(path).graph.initializer
    return {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in held}


def make(name: str, data: Dataset, seed: int, epochs: int, path: Path) -> None:
    """Train one network and write it."""
    model = build(name, seed)
    fit(model, data, seed, epochs)
    export(model, path)
