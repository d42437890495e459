"""PaddlePaddle, by paddle2onnx.

paddle2onnx lets Polygraphy install what it misses while it runs; that is switched off here.
"""

from __future__ import annotations

from pathlib import Path

import paddle
from paddle import nn
from polygraphy import config

from . import digits

PACKAGES = ("paddle", "paddle2onnx")
MADE_BY = {"paddle-paddle2onnx": "paddle.onnx.export"}


def write(folder: Path) -> None:
    """Train a network and export it."""
    paddle.seed(0)
    network = nn.Sequential(
        nn.Conv2D(1, 16, 3, padding=1, bias_attr=False),
        nn.BatchNorm2D(16),
        nn.ReLU(),
        nn.MaxPool2D(2),
        nn.Conv2D(16, 24, 3, padding=1),
        nn.ReLU(),
        nn.BatchNorm2D(24),
        nn.MaxPool2D(2),
        nn.Flatten(),
        nn.Linear(96, 40),
        nn.ReLU(),
        nn.Linear(40, 10),
    )
    images, labels = (paddle.to_tensor(a) for a in digits.training(folder, 1, 8, 8))
    optimizer = paddle.optimizer.Adam(3e-3, parameters=network.parameters())
    for _ in range(20):
        order = paddle.randperm(len(images))
        for start in range(0, len(images), 64):
            index = order[start : start + 64]
            nn.functional.cross_entropy(network(images[index]), labels[index]).backward()
            optimizer.step()
            optimizer.clear_grad()
    network.eval()
    config.AUTOINSTALL_DEPS = False
    image = paddle.static.InputSpec([None, 1, 8, 8], "float32", "image")
    paddle.onnx.export(
        network, str(folder / "paddle-paddle2onnx"), input_spec=[image], opset_version=17
    )
