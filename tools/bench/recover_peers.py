"""Comparisons for the recovery: onnxsim's block finetune, Torch-Pruning with labels, and a step of plain torch.

Torch-Pruning's L2 cuts the network to the MACs of our pruned one, which is then trained with the labels of the same
images, for about as many steps of as many samples as the recovery takes. It augments them as the network's own recipe
does, and takes the best learning rate by the accuracy on a fifth of the images, which are held out as in the recovery.

onnxsim's ``apply_pruning_finetune`` solves a layer's weights by ridge regression where it finds, by their values, the
rows or columns that were kept; it gets the pruned model without a refit, and the same images.

A step of the recovery is compared with one of the same network as a torch module: answers, divergence from those of the
original, gradients, Adam. That of the recovery compares features as well, and makes its steps in coordinates of the
weights, which it averages. Both take their batches from memory; times are of the processor, and medians of steps in
turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx

from onnx_oamip.api import pipeline
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.data.feeds import run_size
from onnx_oamip.data.sources import samples_of
from onnx_oamip.graph import loading as models
from onnx_oamip.objective import find_objective, scale
from onnx_oamip.recovery import features
from onnx_oamip.recovery.judge import Judge, split

from .studies import Row, paths, save

BATCH = 64
LABELLED_BATCH = 32
"""Samples of a step of the labelled fine-tune: those of a step of the recovery."""
STEPS, WARM = 15, 3
FINETUNE = ("model", "weights", "accuracy", "agreement", "divergence", "weights changed")
LABELLED = (
    "model",
    "pruned by",
    "MACs kept",
    "trained with",
    "steps",
    "pruned",
    "trained",
    "learning rate",
)
STEP = ("model", "batch", "by hand ms", "recovery ms", "ratio")
CLOCKED = STEP[2:]
MODULES = {
    "resnet20-fashion": "ResNet20",
    "mobilenet-fashion": "MobileNet",
    "vit-fashion": "VisionTransformer",
}


def finetunes(out: Path, seed: int, name: str, plan: Path, rows: list[Row]) -> str:
    """Save the study ``recover-onnxsim``: the weights of one pruned model as they were, and by every repair.

    Args:
        out: Folder of studies.
        seed: Seed of the runs.
        name: A network.
        plan: Its plan.
        rows: Rows of the study of recoveries, of which that of the network is shown again.

    Returns:
        The table.

    """
    from onnxsim import apply_pruning_finetune

    from .recover import judged

    model, data = paths(name)
    changes = {"refit": "none", "force": True, "device": "cpu", "seed": seed}
    sliced = plan.with_name(f"{name}.sliced.onnx")
    pipeline.apply(model, plan, data, sliced, changes)
    original, bare = onnx.load(model), onnx.load(sliced)
    with np.load(data) as held:
        offset = held.get("input.offset", np.float32(0))
        images = held["input"].astype(np.float32) * held["input.scale"] + offset
    port = original.graph.input[0].name
    feeds = [{port: images[i : i + BATCH]} for i in range(0, len(images), BATCH)]
    tuned = apply_pruning_finetune(original, bare, feeds)
    found = judged(data, [original, bare, tuned])
    shown = next(row for row in rows if row["model"] == name)
    table = [
        {**_part(found, "pruned"), "weights": "of the original", "weights changed": 0},
        {
            **_part(found, "recovered"),
            "weights": "finetune of onnxsim",
            "weights changed": _changed(bare, tuned),
        },
        {**_part(shown, "pruned"), "weights": "refit"},
        {**_part(shown, "recovered"), "weights": "refit and recovery"},
    ]
    return save(out, "recover-onnxsim", [{"model": name, **row} for row in table], FINETUNE, seed)


def with_labels(out: Path, seed: int, row: Row) -> str:
    """Save the study ``recover-labelled``: Torch-Pruning with a labelled fine-tune beside a recovery.

    Args:
        out: Folder of studies.
        seed: Seed of the split, of the order of images and of their changes.
        row: Row of the study of recoveries, from the images that are shipped.

    Returns:
        The table.
    """
    from ..train_models import RECIPES
    from . import finetune, rebuilt
    from .rivals import Bench

    name, macs, steps = row["model"], row["MACs kept"], row["steps"]
    bench = Bench(name)
    cut = finetune.theirs(bench, macs)
    with np.load(bench.data) as held:
        images, labels = held["input"], held["labels"].astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(images))
    judging, training = np.split(order, [len(order) // 5])
    recipe = replace(RECIPES[name], batch=LABELLED_BATCH)
    epochs = round(steps * recipe.batch / len(training))
    found: list[tuple[float, float, onnx.ModelProto]] = []
    with TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        for share in finetune.SHARES_OF_RATE:
            rate = share * recipe.lr
            onnx.save(cut, file)
            net = rebuilt.rebuild(name, file)
            finetune.train(net, recipe, images[training], labels[training], epochs, rate, seed)
            right = finetune.torch_accuracy(net, images[judging], labels[judging])
            found.append((right, rate, rebuilt.export(net, file)))
    _, rate, best = max(found, key=lambda entry: entry[0])
    table = [
        {
            "model": name,
            "pruned by": finetune.RIVAL,
            "MACs kept": round(bench.share(cut), 4),
            "trained with": "labels",
            "steps": epochs * -(-len(training) // recipe.batch),
            "pruned": round(bench.accuracy(cut), 2),
            "trained": round(bench.accuracy(best), 2),
            "learning rate": f"{rate:g}",
        },
        {
            "model": name,
            "pruned by": "onnx-oamip",
            "MACs kept": macs,
            "trained with": "the original as the teacher",
            "steps": steps,
            "pruned": row["pruned"],
            "trained": row["recovered"],
        },
    ]
    return save(out, "recover-labelled", table, LABELLED, seed)


def _part(found: Row, state: str) -> Row:
    return {
        "accuracy": found[state],
        "agreement": found[f"agreement {state}"],
        "divergence": found[f"divergence {state}"],
    }


def _changed(before: onnx.ModelProto, after: onnx.ModelProto) -> int:
    """Number of initialisers with other values."""
    values = {held.name: onnx.numpy_helper.to_array(held) for held in after.graph.initializer}
    return sum(
        held.name in values
        and not np.array_equal(onnx.numpy_helper.to_array(held), values[held.name])
        for held in before.graph.initializer
    )


def steps(out: Path, seed: int) -> str:
    """Save the study ``recover-step``: one row per network.

    Args:
        out: Folder of studies.
        seed: Seed of the batches.

    Returns:
        The table.
    """
    rows = [_step_row(name, seed) for name in MODULES]
    return save(out, "recover-step", rows, STEP, seed, CLOCKED)


def _step_row(name: str, seed: int) -> Row:
    ours, by_hand, batch = _both_steps(name, seed)
    times: dict[Callable[[], Any], list[float]] = {ours: [], by_hand: []}
    for count in range(WARM + STEPS):
        for step, found in times.items():
            started = time.process_time()
            step()
            if count >= WARM:
                found.append(1000 * (time.process_time() - started))
    mine, theirs = median(times[ours]), median(times[by_hand])
    return {
        "model": name,
        "batch": batch,
        "by hand ms": round(theirs, 1),
        "recovery ms": round(mine, 1),
        "ratio": round(mine / theirs, 2),
    }


def _both_steps(name: str, seed: int) -> tuple[Callable[[], None], Callable[[], None], int]:
    """A step of the recovery, one by hand, and the samples of a batch, all of the unpruned network."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    from onnx_oamip.recovery.steps import Run

    from .. import train_models

    run = _run(name, seed)
    batches = [next(run.batches) for _ in range(WARM)]
    turn = iter(range(10**9))

    def ours() -> None:
        run.batches = iter([batches[next(turn) % WARM]])
        run.step(0.5)

    network = getattr(train_models, MODULES[name])().eval()
    optimiser = torch.optim.Adam(network.parameters(), 1e-4)

    def by_hand() -> None:
        batch = batches[next(turn) % WARM]
        (images,) = batch.fed.values()
        truth = torch.log_softmax(batch.truth[run._terms[0].tensor], 1)
        found = torch.log_softmax(network(images), 1)
        loss = F.kl_div(found, truth, reduction="batchmean", log_target=True)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    assert isinstance(run, Run)
    return ours, by_hand, run.batch


def _run(name: str, seed: int) -> Any:
    """The training of a network by itself."""
    from onnx_oamip.recovery.selection import trained_part
    from onnx_oamip.recovery.steps import Run
    from onnx_oamip.recovery.task import Task

    path, data = paths(name)
    settings = Settings.create(device="cpu", seed=seed, recover=100)
    model = models.load(path)
    samples, held = samples_of(model, data, None, settings)
    model = dataset.at_data(model, samples)
    samples, judged = split(samples, held, seed)
    size = run_size(model, settings.activation_memory_limit)
    objective = find_objective(model, settings, samples, held)
    objective = scale(model, objective, samples, "cpu", batch_size=size)
    task = Task(
        original=model,
        pruned=model,
        objective=objective,
        features=features.features(model, model),
        samples=samples,
        judge=Judge(model, objective, judged, device="cpu", batch_size=size),
        device="cpu",
        runtime_device="cpu",
        memory=settings.activation_memory_limit,
        seed=seed,
    )
    part, _ = trained_part(task)
    return Run(task, part)
