"""Recovery from few and from many images: one pruned network, trained for as many steps on each set of images.

EfficientNet-Lite0 is pruned to half its MACs and refitted to four fifths of its calibration images. All trainings start
from this model and are judged by the last fifth. They take the first images of the four fifths, all of them, and with
them the images that ``tools.composed_images`` makes, from ``efficientnet-lite0.composed.npz`` in the folder of the
larger networks. Figures come from the crops of other photographs, which no step has seen.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx

from onnx_oamip.api import pipeline
from onnx_oamip.api.recovery import planned_units
from onnx_oamip.core.records import Array, Objective, Recovery
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.data.dataset import Samples
from onnx_oamip.data.feeds import run_size
from onnx_oamip.data.sources import samples_of
from onnx_oamip.graph import loading as models
from onnx_oamip.objective import find_objective, scale
from onnx_oamip.recovery import recover as recovery
from onnx_oamip.recovery.judge import split
from onnx_oamip.recovery.recover import Pair

from .larger import absent
from .studies import Resumable, Row

NAME = "efficientnet-lite0"
MACS = 0.5
STEPS = 400
FEW = 128
COLUMNS = (
    "model",
    "images",
    "composed",
    "agreement pruned",
    "agreement recovered",
    "divergence pruned",
    "divergence recovered",
    "held-out loss",
    "held-out loss recovered",
    "steps",
    "best step",
    "processor s",
)
CLOCKED = ("processor s",)


class Setting:
    """The models of all trainings, with their samples and the judge.

    Attributes:
        training: Four fifths of the calibration images, to which the pruned model is refitted.
        judged: The last fifth.
    """

    def __init__(self, model: Path, data: Path, seed: int) -> None:
        self.data = data
        self.settings = Settings.create(device="cpu", seed=seed, recover=STEPS)
        original = models.load(model)
        samples, held = samples_of(original, data, None, self.settings)
        self.original = dataset.at_data(original, samples)
        self.training, self.judged = split(samples, held, seed)

    def objective(self) -> Objective:
        """The objective of the original, scaled by the images to which the pruned model was refitted."""
        found = find_objective(self.original, self.settings, self.training, self.judged)
        size = run_size(self.original, self.settings.activation_memory_limit)
        return scale(self.original, found, self.training, "cpu", batch_size=size)

    def images(self, count: int, more: Path | None) -> dict[str, Array]:
        """The first images of the training part, and those of another file."""
        with np.load(self.data) as held:
            codes = {key: held[key] for key in ("input.scale", "input.offset")}
            origin = self.training.origin
            assert origin is not None
            parts = [held["input"][np.sort(origin)[:count]]]
        if more is not None:
            with np.load(more) as held:
                parts.append(held["input"])
        return {"input": np.concatenate(parts), **codes}

    def pair(self, pruned: Path, plan: Path) -> Pair:
        """The original and the pruned model, with the units of the plan."""
        student = dataset.at_data(models.load(pruned), self.training)
        return Pair(self.original, student, *planned_units(plan, self.original, student))

    def trained(
        self, pair: Pair, objective: Objective, samples: Samples
    ) -> tuple[onnx.ModelProto, Recovery]:
        """The recovered model on some samples, and how it was trained."""
        return recovery.run(pair, objective, samples, self.judged, self.settings, device="cpu")


def run(out: Path, seed: int, larger: Path | None, kept: Path) -> str:
    """One row per set of images.

    Args:
        out: Folder of studies.
        seed: Seed of the split and of the trainings.
        larger: Folder with the network, its images and the composed ones.
        kept: Folder of the plan and of the pruned model, which are made unless they are there.

    Returns:
        The table; empty where the network is not in the folder.
    """
    if missing := absent(NAME, larger):
        print(missing, flush=True)
        return ""
    assert larger is not None
    model, data = (larger / f"{NAME}.{kind}" for kind in ("onnx", "npz"))
    composed = larger / f"{NAME}.composed.npz"
    setting = Setting(model, data, seed)
    plan, pruned = _made(setting, model, data, kept)
    study = Resumable(out, "recover-images", COLUMNS, seed, CLOCKED)
    pair, objective = setting.pair(pruned, plan), setting.objective()
    every = setting.training.count
    for count, more in ((every, None), (every, composed), (FEW, None)):
        if more is not None and not more.exists():
            print(f"{more} is left out; make it with `python -m tools.composed_images`", flush=True)
            continue
        samples = dataset.load(setting.images(count, more), setting.original)
        key: Row = {"model": NAME, "images": samples.count, "composed": samples.count - count}
        if not study.holds(key):
            study.add({**key, **_row(setting, pair, objective, samples)})
    return study.save()


def _made(setting: Setting, model: Path, data: Path, kept: Path) -> tuple[Path, Path]:
    """The plan, and the pruned model that is refitted to the training part."""
    plan, pruned = kept / f"{NAME}.plan.json", kept / f"{NAME}.start.onnx"
    kept.mkdir(parents=True, exist_ok=True)
    shared = {"device": "cpu", "seed": setting.settings.seed}
    if not plan.exists():
        pipeline.plan(model, data, plan, Settings.create(macs=MACS, align=1, **shared))
    if not pruned.exists():
        training = setting.images(setting.training.count, None)
        pipeline.apply(model, plan, training, pruned, {**shared, "force": True})
    return plan, pruned


def _row(setting: Setting, pair: Pair, objective: Objective, samples: Samples) -> Row:
    from .recover import judged

    started = time.process_time()
    proto, found = setting.trained(pair, objective, samples)
    seconds = time.process_time() - started
    figures = judged(setting.data, [pair.original.proto, pair.pruned.proto, proto])
    return {
        **figures,
        "held-out loss": f"{found.before:.4f}",
        "held-out loss recovered": f"{found.after:.4f}" if found.accepted else "not lower",
        "steps": found.steps,
        "best step": found.best_step,
        "processor s": round(seconds),
    }
