"""Decoupled greedy learning of a VGG: every convolution trains with its own auxiliary head on a detached input (torch).

Source: Belilovsky, Eickenberg, Oyallon, "Decoupled Greedy Learning of CNNs", ICML 2020. The layers of a head are those
of OAMIP's published code.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from . import networks
from .data import CLASSES, Dataset
from .protocol import AUXILIARY, BATCH, POOLED, SIDE

RATE = 0.1
"""Rate of stochastic gradient descent, as in the published runs of a VGG."""
HEAD_POOL = 4
"""Factor by which the first pool of a head divides the side of its input."""
HEAD_SIDE = 2
"""Side of the maps that the dense layers of a head read."""
MARGIN = 2
"""Zeros on each side of an image, which give the published 32 pixels."""


def build(widths: Sequence[int] = AUXILIARY.widths) -> nn.ModuleList:
    """Build the modules at their initialisation; the random state is the caller's.

    Args:
        widths: Channels of the convolutions, and the width of the dense layer behind them.

    Returns:
        One module per convolution. Each has a ``body``, which the network is made of, and a ``head`` of its own; the
        head of the last one is the classifier of the network.
    """
    *maps, dense = widths
    modules = nn.ModuleList()
    width, side = 1, SIDE
    for number, out in enumerate(maps, 1):
        conv = nn.Conv2d(width, out, 3, padding=1 + MARGIN * (number == 1), bias=False)
        body = named(
            (f"conv{number}", conv),
            (f"norm{number}", nn.BatchNorm2d(out, affine=False)),
            (f"relu{number}", nn.ReLU()),
        )
        if number == len(maps):
            head = _classifier(out, side // 2, dense, number)
        else:
            head = _auxiliary(out, side)
        modules.append(named(("body", body), ("head", head)))
        width = out
        side //= 2 if number in POOLED else 1
    return modules


def named(*parts: tuple[str, nn.Module]) -> nn.Sequential:
    """Chain layers under names.

    Args:
        parts: Name and layer, in order.

    Returns:
        The chain.
    """
    chain = nn.Sequential()
    for name, layer in parts:
        chain.add_module(name, layer)
    return chain


def _auxiliary(width: int, side: int) -> nn.Sequential:
    """A head: pool, 1x1 convolution, pool, two dense layers."""
    pooled = side // HEAD_POOL
    flat = width * HEAD_SIDE**2
    return named(
        ("pool", nn.AvgPool2d(HEAD_POOL)),
        ("point", nn.Conv2d(width, width, 1, bias=False)),
        ("point_norm", nn.BatchNorm2d(width, affine=False)),
        ("point_relu", nn.ReLU()),
        ("point_pool", nn.AvgPool2d(pooled // HEAD_SIDE)),
        ("flatten", nn.Flatten()),
        ("hidden", nn.Linear(flat, flat)),
        ("hidden_norm", nn.BatchNorm1d(flat, affine=False)),
        ("hidden_relu", nn.ReLU()),
        ("answer", nn.Linear(flat, CLASSES)),
    )


def _classifier(width: int, side: int, dense: int, number: int) -> nn.Sequential:
    """The pool and the dense layers behind the last convolution."""
    return named(
        (f"pool{number}", nn.AvgPool2d(2)),
        ("flatten", nn.Flatten()),
        (f"fc{number + 1}", nn.Linear(width * side**2, dense)),
        (f"relu{number + 1}", nn.ReLU()),
        ("logits", nn.Linear(dense, CLASSES)),
    )


def network(modules: nn.ModuleList) -> list[tuple[str, nn.Module]]:
    """List the layers of the whole network: the bodies, the pools between them, and the last head.

    Args:
        modules: Modules in the order of the network.

    Returns:
        Name and layer, in order.
    """
    layers: list[tuple[str, nn.Module]] = []
    for number, module in enumerate(modules, 1):
        layers += module.body.named_children()
        if number < len(modules) and number in POOLED:
            layers.append((f"pool{number}", nn.AvgPool2d(2)))
    return layers + list(modules[-1].head.named_children())


def step(
    modules: nn.ModuleList,
    optimisers: Sequence[torch.optim.Optimizer],
    images: Tensor,
    labels: Tensor,
) -> None:
    """Train every module on one batch; no gradient passes from a module to the one in front of it.

    Args:
        modules: Modules in the order of the network.
        optimisers: Optimiser of each module.
        images: Images in [0, 1].
        labels: Classes.
    """
    x = images
    for number, (module, optimiser) in enumerate(zip(modules, optimisers, strict=True), 1):
        made = module.body(x)
        loss = nn.functional.cross_entropy(module.head(made), labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        x = made.detach()
        if number in POOLED:
            x = nn.functional.avg_pool2d(x, 2)


def fit(modules: nn.ModuleList, data: Dataset, seed: int, epochs: int) -> None:
    """Train all modules side by side by stochastic gradient descent at a constant rate.

    Args:
        modules: Modules in the order of the network.
        data: Data whose training images are used.
        seed: Seed of the order of the images.
        epochs: Passes over the training images.
    """
    torch.set_num_threads(1)
    modules.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    images, labels = torch.from_numpy(data.train_images.copy()), torch.from_numpy(data.train_labels)
    optimisers = [torch.optim.SGD(module.parameters(), lr=RATE) for module in modules]
    order = torch.Generator().manual_seed(seed)
    modules.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=order).split(BATCH):
            step(modules, optimisers, networks.scaled(images[rows]), labels[rows])
    modules.to(memory_format=torch.contiguous_format)
    modules.eval()


def folded(layers: Sequence[tuple[str, nn.Module]]) -> nn.Sequential:
    """Chain layers with every batch normalisation folded into the linear layer in front of it.

    Args:
        layers: Name and layer, in order, for inference.

    Returns:
        The chain without batch normalisations, under the names of the layers that remain.
    """
    kept: list[tuple[str, nn.Module]] = []
    for name, layer in layers:
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            before, linear = kept[-1]
            kept[-1] = before, _normalised(linear, layer)
        else:
            kept.append((name, layer))
    return named(*kept).eval()


def _normalised(linear: nn.Module, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module:
    """A copy of a linear layer whose outputs are normalised by the running statistics."""
    result = copy.deepcopy(linear)
    scale = torch.rsqrt(norm.running_var + norm.eps)
    shift = -norm.running_mean if linear.bias is None else linear.bias - norm.running_mean
    with torch.no_grad():
        result.weight.mul_(scale.reshape(-1, *[1] * (linear.weight.dim() - 1)))
    result.bias = nn.Parameter(shift.detach() * scale)
    return result


def make(data: Dataset, seed: int, epochs: int, whole: Path, parts: Sequence[Path]) -> None:
    """Train the modules, and write the network and every module with its head.

    Args:
        data: Data to train on.
        seed: Seed of the initialisation and of the order of the images.
        epochs: Passes over the training images.
        whole: File of the network.
        parts: File of each module.
    """
    torch.manual_seed(seed)
    modules = build()
    fit(modules, data, seed, epochs)
    side = SIDE - 2 * MARGIN
    image = x = torch.zeros(2, 1, side, side)
    for number, (module, path) in enumerate(zip(modules, parts, strict=True), 1):
        layers = [*module.body.named_children(), *module.head.named_children()]
        networks.export(folded(layers), path, x)
        x = torch.zeros_like(module.body(x))
        if number in POOLED:
            x = nn.functional.avg_pool2d(x, 2)
    networks.export(folded(network(modules)), whole, image)
