"""Other pruners of a shipped network, each as a function from its ratio (0 to 1) to a pruned ONNX model.

onnxsim gets the simplified file (it needs batch normalisation folded) and prunes channels and heads. Torch-Pruning gets
the network rebuilt in torch; what its own README asks users to patch by hand after pruning (widths that the forward
pass spells out) is patched. Both get the calibration images, Taylor and Hessian their labels too.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxsim
import torch
import torch_pruning as tp
from onnxsim import pruning
from torch import nn

from ..train_models import Attention, VisionTransformer
from . import rebuilt
from .studies import paths

BATCH = 64
MOST = 0.98
RANKINGS = ("one ratio", "global")
"""Units compared within each layer, or over all of them.

Torch-Pruning's isomorphic ranking is left out: on lenet5 it is that of one ratio, and on resnet20 it led the other two
only where all of them were below 20 % accuracy.
"""


@dataclass(frozen=True)
class Peer:
    """``cut`` prunes at a ratio; what ``refit`` does afterwards changes weights alone."""

    cut: Callable[[float], onnx.ModelProto]
    refit: Callable[[onnx.ModelProto], onnx.ModelProto] = lambda proto: proto


def of_onnxsim(name: str, images: np.ndarray[Any, Any]) -> dict[str, Peer]:
    """Channels by weight norm or by Wanda, one ratio a layer or one threshold; as cut, and after its ridge refit."""
    simple, _ = onnxsim.simplify(onnx.load(paths(name)[0]))
    feeds = [{"input": images[i : i + BATCH]} for i in range(0, len(images), BATCH)]

    def cut(wanda: bool, together: bool, ratio: float) -> onnx.ModelProto:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            if wanda:
                proto = pruning.apply_structured_wanda_pruning(
                    simple, feeds, sparsity=ratio, global_sparsity=together
                )
                return pruning.apply_attention_head_wanda_pruning(proto, feeds, sparsity=ratio)
            proto = pruning.apply_structured_pruning(simple, ratio, global_sparsity=together)
            return pruning.apply_attention_head_pruning(proto, ratio)

    def refit(proto: onnx.ModelProto) -> onnx.ModelProto:
        return onnxsim.apply_pruning_finetune(simple, proto, feeds)

    found: dict[str, Peer] = {}
    for wanda in (False, True):
        for together in (False, True):
            title = f"onnxsim {('L2', 'Wanda')[wanda]}, {RANKINGS[together]}"
            once = cache(partial(cut, wanda, together))
            found[title] = Peer(once)
            # A layer that loses inputs and outputs is not refitted: nothing else is left here.
            if not together:
                found[f"{title}, ridge refit"] = Peer(once, refit)
    return found


def of_torch_pruning(
    name: str, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]
) -> dict[str, Peer]:
    """Its importances where the network has what they need, with one ratio a layer and ranked over all layers.

    What an importance needs is computed when the first cut asks for it.
    """
    net = rebuilt.rebuild(name)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    kinds: dict[str, Callable[[], tuple[Any, nn.Module]]] = {
        "L2": lambda: (tp.importance.GroupMagnitudeImportance(p=2), net),
        "LAMP": lambda: (tp.importance.LAMPImportance(p=2), net),
        "Taylor": lambda: (tp.importance.GroupTaylorImportance(), _taylor(net, x, y)),
        "Hessian": lambda: (tp.importance.GroupHessianImportance(), _hessian(net, x, y)),
        "activation": lambda: _activation(net, x),
    }
    if any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
        kinds["BN scale"] = lambda: (tp.importance.BNScaleImportance(), net)
    prepared = {kind: cache(prepare) for kind, prepare in kinds.items()}
    return {
        f"Torch-Pruning {kind}, {ranking}": Peer(partial(_cut, prepare, ranking))
        for kind, prepare in prepared.items()
        for ranking in RANKINGS
    }


def _cut(
    prepare: Callable[[], tuple[Any, nn.Module]], ranking: str, ratio: float
) -> onnx.ModelProto:
    importance, net = prepare()
    small = copy.deepcopy(net)
    for old, new in zip(net.parameters(), small.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    attention = [m for m in small.modules() if isinstance(m, Attention)]
    heads = {getattr(m, n): m.heads for m in attention for n in ("query", "key", "value")}
    last = [m for m in small.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1:]
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        tp.pruner.BasePruner(
            small,
            torch.zeros(1, *rebuilt.SHAPE),
            importance=importance,
            pruning_ratio=ratio,
            ignored_layers=last,
            global_pruning=ranking == "global",
            num_heads=heads,
            max_pruning_ratio=MOST,
        ).step()
    for m in attention:
        width = m.query.out_features
        with torch.no_grad():  # the scale that the network was trained with
            for value in m.query.parameters():
                value *= (width / m.dim) ** 0.5
        m.dim = width
    if isinstance(small, VisionTransformer):
        small.DIM = small.patch.out_channels
    with tempfile.TemporaryDirectory() as folder:
        return rebuilt.export(small, Path(folder) / "pruned.onnx")


def _taylor(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """With the gradient of the loss over all calibration images."""
    net = copy.deepcopy(net)
    nn.functional.cross_entropy(net(x), y).backward()
    return net


def _hessian(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """With the mean of the squared gradients of single images in place of the gradient, as its importance reads them.

    Computed here: ``accumulate_grad`` of Torch-Pruning 1.6.1 keeps the last image alone.
    """
    net = copy.deepcopy(net)
    names = [n for n, _ in net.named_parameters()]
    weights = {n: p.detach() for n, p in net.named_parameters()}

    def loss(
        values: dict[str, torch.Tensor], image: torch.Tensor, label: torch.Tensor
    ) -> torch.Tensor:
        return nn.functional.cross_entropy(
            torch.func.functional_call(net, values, (image[None],)), label[None]
        )

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    total = {n: torch.zeros_like(weights[n]) for n in names}
    for i in range(0, len(x), 16):
        for n, g in each(weights, x[i : i + 16], y[i : i + 16]).items():
            total[n] += g.square().sum(0)
    for n, p in net.named_parameters():
        p.grad = total[n] / len(x)
    return net


def _activation(net: nn.Module, x: torch.Tensor) -> tuple[Any, nn.Module]:
    """With what every layer was fed over all calibration images."""
    net = copy.deepcopy(net)
    importance = tp.importance.ActivationImportance()
    with importance.compute_importance(net), torch.no_grad():
        net(x)
    return importance, net
