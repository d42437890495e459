"""Pruning, then a few epochs of training: ours against Torch-Pruning's L2, the same epochs and the same MACs.

Both start from the pruned ONNX file, whose weights are put back into the torch network (``rebuilt``), and train by the
network's own recipe with a twentieth of its learning rate, one cosine cycle without warm-up. Needs the ``experiments``
extra, and ``--mnist DIR`` and ``--fashion DIR`` with the IDX files; a network without them is left out.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import torch
from torch import nn

from onnx_oamip import pipeline
from onnx_oamip.settings import Settings

from ..train_models import RECIPES, SCALE, Bytes, Labels, augment, load_dataset, make_optimiser
from . import peers, rebuilt
from .rivals import Bench, bisect
from .studies import MODELS, Row, save, store

NAMES = ("lenet5-mnist", "resnet20-fashion")
SHARES = (0.5, 0.25)
EPOCHS = (1, 2)
RIVAL = "Torch-Pruning L2, one ratio"
SLOWER = 0.05
COLUMNS = ("model", "MACs asked", "method", "MACs kept", "before", "pruned", *(f"{k} epochs" for k in EPOCHS))


def run(
    out: Path, seed: int, names: tuple[str, ...] = (), mnist: Path | None = None, fashion: Path | None = None
) -> str:
    """One row per model, budget and method; accuracy in percent in ONNX Runtime on the 2,000 evaluation images."""
    rows: list[Row] = []
    folders = {"mnist": mnist, "fashion-mnist": fashion}
    for name in names or NAMES:
        folder = folders[MODELS[name]]
        if folder is None:
            print(f"{name}: left out; say where its training images are with --{MODELS[name].split('-')[0]} DIR")
            continue
        data = load_dataset(folder)
        bench = Bench(name)
        for share in SHARES:
            for method in ("ours", RIVAL):
                proto = _ours(bench, share, seed) if method == "ours" else _theirs(bench, share)
                row: Row = {"model": name, "MACs asked": share, "method": method, "before": round(bench.before, 2)}
                row |= {"MACs kept": round(bench.share(proto), 4), "pruned": round(bench.accuracy(proto), 2)}
                for epochs in EPOCHS:
                    tuned = _tuned(name, proto, data.train_images, data.train_labels, epochs, seed)
                    row[f"{epochs} epochs"] = round(bench.accuracy(tuned), 2)
                rows.append(row)
                print(row, flush=True)
                store(out, "finetune", rows, COLUMNS, seed)
    return save(out, "finetune", rows, COLUMNS, seed) if rows else ""


def _ours(bench: Bench, share: float, seed: int) -> onnx.ModelProto:
    with TemporaryDirectory() as folder:
        target = Path(folder) / "pruned.onnx"
        pipeline.prune(bench.model, bench.data, target, Settings.create(macs=share, seed=seed, force=True))
        return onnx.load(target)


def _theirs(bench: Bench, share: float) -> onnx.ModelProto:
    peer = peers.of_torch_pruning(bench.name, bench.images, bench.labels)[RIVAL]
    ratio = bisect(cache(lambda ratio: bench.share(peer.cut(ratio))), share)
    if ratio is None:
        raise RuntimeError(f"{RIVAL} does not reach {share} of the MACs of {bench.name}.")
    return peer.cut(ratio)


def _tuned(
    name: str, proto: onnx.ModelProto, images: Bytes, labels: Labels, epochs: int, seed: int
) -> onnx.ModelProto:
    """The pruned network after so many epochs."""
    recipe = RECIPES[name]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        onnx.save(proto, file)
        net = rebuilt.rebuild(name, file)
        optimiser = make_optimiser(net, recipe)
        for group in optimiser.param_groups:
            group["lr"] = SLOWER * recipe.lr
        steps = epochs * math.ceil(len(images) / recipe.batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        loss_of = nn.CrossEntropyLoss(label_smoothing=recipe.smoothing)
        net.train()
        for epoch in range(epochs):
            generator = torch.Generator().manual_seed(1000 * seed + epoch)
            for rows in torch.randperm(len(images), generator=generator).split(recipe.batch):
                x = augment(torch.from_numpy(images[rows.numpy()]), recipe, generator).float() * float(SCALE)
                loss = loss_of(net(x), torch.from_numpy(labels[rows.numpy()]))
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
        return rebuilt.export(net, file)
