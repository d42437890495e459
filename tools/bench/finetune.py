"""Pruning, then a few epochs of training: ours against Torch-Pruning's L2, the same epochs and the same MACs.

Both start from the pruned ONNX file, whose weights are put back into the torch network (``rebuilt``), and train as the
network itself was trained, but for the learning rate: one cosine from a share of the recipe's, without warm-up. An
epoch is ``IMAGES`` training images, the same ones for all: a third of them, so that the study ends within the hour.
Every row takes its own best of ``SHARES_OF_RATE``, chosen after one epoch on the 8,000 test images that no table shows,
so that neither method trains at a rate that suits the other; ``finetune-rates`` has what each of them gave. Needs the
``experiments`` extra, and ``--mnist DIR`` and ``--fashion DIR`` with the IDX files; a network without them is left out.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import torch
from torch import nn

from onnx_oamip.api import pipeline
from onnx_oamip.core.settings import Settings

from ..train_models import (
    EVAL_IMAGES,
    RECIPES,
    Bytes,
    Dataset,
    Labels,
    Recipe,
    load_dataset,
    loss_on,
    make_optimiser,
    torch_accuracy,
)
from . import peers, rebuilt
from .rivals import Bench, bisect
from .studies import MODELS, Row, save, store

NAMES = ("lenet5-mnist", "resnet20-fashion")
SHARES = (0.5, 0.25)
EPOCHS = (1, 2)
IMAGES = 20_000
RIVAL = "Torch-Pruning L2, one ratio"
SHARES_OF_RATE = (0.02, 0.1, 0.5)
COLUMNS = (
    "model",
    "MACs asked",
    "method",
    "MACs kept",
    "before",
    "pruned",
    *(f"{k} epochs" for k in EPOCHS),
    "learning rate",
    "images an epoch",
)
RATES = ("model", "MACs asked", "method", *(f"{share} of the rate" for share in SHARES_OF_RATE))


def run(
    out: Path,
    seed: int,
    names: tuple[str, ...] = (),
    mnist: Path | None = None,
    fashion: Path | None = None,
) -> str:
    """One row per model, budget and method; accuracy in percent in ONNX Runtime on the 2,000 evaluation images."""
    rows: list[Row] = []
    rates: list[Row] = []
    folders = {"mnist": mnist, "fashion-mnist": fashion}
    for name in names or NAMES:
        folder = folders[MODELS[name]]
        if folder is None:
            print(
                f"{name}: left out; say where its training images are with --{MODELS[name].split('-')[0]} DIR"
            )
            continue
        data = load_dataset(folder)
        bench = Bench(name)
        for share in SHARES:
            for method in ("ours", RIVAL):
                proto = _ours(bench, share, seed) if method == "ours" else theirs(bench, share)
                row: Row = {
                    "model": name,
                    "MACs asked": share,
                    "method": method,
                    "before": round(bench.before, 2),
                }
                row |= {
                    "MACs kept": round(bench.share(proto), 4),
                    "pruned": round(bench.accuracy(proto), 2),
                }
                tried = {
                    k: tuned(name, proto, data, 1, k * RECIPES[name].lr, seed)
                    for k in SHARES_OF_RATE
                }
                best = max(tried, key=lambda k: tried[k][1])
                rates.append(
                    {
                        **{k: row[k] for k in RATES[:3]},
                        **{
                            f"{k} of the rate": round(unseen, 2) for k, (_, unseen) in tried.items()
                        },
                    }
                )
                row |= {"learning rate": f"{best * RECIPES[name].lr:g}", "images an epoch": IMAGES}
                for epochs in EPOCHS:
                    again = epochs > 1
                    found = (
                        tuned(name, proto, data, epochs, best * RECIPES[name].lr, seed)
                        if again
                        else tried[best]
                    )
                    row[f"{epochs} epochs"] = round(bench.accuracy(found[0]), 2)
                rows.append(row)
                print(rates[-1], row, flush=True)
                store(out, "finetune-rates", rates, RATES, seed)
                store(out, "finetune", rows, COLUMNS, seed)
    if not rows:
        return ""
    save(out, "finetune-rates", rates, RATES, seed)
    return save(out, "finetune", rows, COLUMNS, seed)


def _ours(bench: Bench, share: float, seed: int) -> onnx.ModelProto:
    with TemporaryDirectory() as folder:
        target = Path(folder) / "pruned.onnx"
        pipeline.prune(
            bench.model, bench.data, target, Settings.create(macs=share, seed=seed, force=True)
        )
        return onnx.load(target)


def theirs(bench: Bench, share: float) -> onnx.ModelProto:
    peer = peers.of_torch_pruning(bench.name, bench.images, bench.labels)[RIVAL]
    ratio = bisect(cache(lambda ratio: bench.share(peer.cut(ratio))), share)
    if ratio is None:
        raise RuntimeError(f"{RIVAL} does not reach {share} of the MACs of {bench.name}.")
    return peer.cut(ratio)


def tuned(
    name: str, proto: onnx.ModelProto, data: Dataset, epochs: int, rate: float, seed: int
) -> tuple[onnx.ModelProto, float]:
    """(the network after so many epochs from this learning rate on, its accuracy on the test images no table shows)."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        onnx.save(proto, file)
        net = rebuilt.rebuild(name, file)
        train(
            net,
            RECIPES[name],
            data.train_images[:IMAGES],
            data.train_labels[:IMAGES],
            epochs,
            rate,
            seed,
        )
        unseen = torch_accuracy(net, data.test_images[EVAL_IMAGES:], data.test_labels[EVAL_IMAGES:])
        return rebuilt.export(net, file), unseen


def train(
    net: nn.Module,
    recipe: Recipe,
    images: Bytes,
    labels: Labels,
    epochs: int,
    rate: float,
    seed: int,
) -> None:
    """Train a network with labels for so many epochs, from this learning rate on by one cosine."""
    if recipe.channels_last:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, y = torch.from_numpy(images.copy()), torch.from_numpy(labels)
    optimiser = make_optimiser(net, recipe)
    for group in optimiser.param_groups:
        group["lr"] = rate
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimiser, epochs * math.ceil(len(x) / recipe.batch)
    )
    net.train()
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        for rows in torch.randperm(len(x), generator=generator).split(recipe.batch):
            loss = loss_on(net, x[rows], y[rows], recipe, generator)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
