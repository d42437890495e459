"""The stronger rivals of ``larger``, each as a function from its ratio (0 to 1) to a pruned ONNX model.

onnxsim gets the file; Torch-Pruning gets the network in torch, which ``tools/make_larger_models.py`` builds again from
the state kept beside the file, or from its package. Taylor gets the labels of the calibration images, or where there
are none the original's own answers to them. Variants that were behind these on the shipped networks are left out.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import onnx
import onnxsim
import torch
import torch_pruning as tp
from onnxsim import pruning
from torch import nn

from .. import make_larger_models as making
from .larger import Bench
from .peers import MOST, Peer


def peers(bench: Bench) -> dict[str, Peer]:
    """The rivals by name."""
    return {**of_onnxsim(bench), **of_torch_pruning(bench)}


def of_onnxsim(bench: Bench) -> dict[str, Peer]:
    """Channels by Wanda: one ratio a layer followed by its ridge refit, and one threshold for all layers."""
    simple, _ = onnxsim.simplify(bench.original)
    feeds = list(bench.feeds(bench.images))

    def cut(together: bool, ratio: float) -> onnx.ModelProto:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            return pruning.apply_structured_wanda_pruning(
                simple, feeds, sparsity=ratio, global_sparsity=together
            )

    def refit(proto: onnx.ModelProto) -> onnx.ModelProto:
        return onnxsim.apply_pruning_finetune(simple, proto, feeds)

    return {
        "onnxsim Wanda, one ratio, ridge refit": Peer(partial(cut, False), refit),
        "onnxsim Wanda, global": Peer(partial(cut, True)),
    }


def of_torch_pruning(bench: Bench) -> dict[str, Peer]:
    """Weight norms with one ratio a layer, and Taylor ranked over all layers."""
    net = making.rebuild(bench.name, bench.folder)
    return {
        "Torch-Pruning L2, one ratio": Peer(
            partial(_cut, bench, tp.importance.GroupMagnitudeImportance(p=2), net, False)
        ),
        "Torch-Pruning Taylor, global": Peer(
            partial(_cut, bench, tp.importance.GroupTaylorImportance(), _taylor(bench, net), True)
        ),
    }


def _taylor(bench: Bench, net: nn.Module) -> nn.Module:
    """With the gradient of the loss over all calibration images."""
    net = copy.deepcopy(net)
    start = 0
    for feed in bench.feeds(bench.images):
        x = torch.from_numpy(feed["input"])
        y = torch.from_numpy(bench.labels[start : start + len(x)])
        nn.functional.cross_entropy(net(x), y, reduction="sum").backward()
        start += len(x)
    return net


def _cut(
    bench: Bench, importance: Any, net: nn.Module, together: bool, ratio: float
) -> onnx.ModelProto:
    small = copy.deepcopy(net)
    for old, new in zip(net.parameters(), small.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    shape = bench.images.shape[1:]
    last = [m for m in small.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1:]
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        tp.pruner.BasePruner(
            small,
            torch.zeros(1, *shape),
            importance=importance,
            pruning_ratio=ratio,
            ignored_layers=last,
            global_pruning=together,
            max_pruning_ratio=MOST,
        ).step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned.onnx"
        making.export(small, path, shape)
        return onnx.load(path)
