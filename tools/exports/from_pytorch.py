"""PyTorch, by both of its exporters."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from . import digits

PACKAGES = ("torch", "onnxscript")
EXPORTERS = {"pytorch-torchscript": False, "pytorch-dynamo": True}
MADE_BY = {name: f"torch.onnx.export(dynamo={dynamo})" for name, dynamo in EXPORTERS.items()}


def write(folder: Path) -> None:
    """Train one network and export it both ways."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.ReLU(),
        nn.BatchNorm2d(24),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 40),
        nn.ReLU(),
        nn.Linear(40, 10),
    )
    images, labels = (torch.from_numpy(a) for a in digits.training(folder, 1, 8, 8))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(20):
        for index in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[index]), labels[index]).backward()
            optimizer.step()
    network.eval()
    for name, dynamo in EXPORTERS.items():
        dynamic = (
            {"dynamic_shapes": {"input": {0: torch.export.Dim("batch")}}}
            if dynamo
            else {"dynamic_axes": {"image": {0: "batch"}, "logits": {0: "batch"}}}
        )
        torch.onnx.export(
            network,
            (images[:2],),
            str(folder / f"{name}.onnx"),
            input_names=["image"],
            output_names=["logits"],
            dynamo=dynamo,
            external_data=False,
            verbose=False,
            **dynamic,
        )
