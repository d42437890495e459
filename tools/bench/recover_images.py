"""Recovery of networks for a thousand classes: by budget, by the number of different images, and by steps.

Every network is pruned to a budget and refitted to four fifths of its calibration images. The trainings of a budget
start from this model and are judged by the last fifth. They take the first images of the four fifths, all of them, or
with them N images that ``tools.composed_images`` makes, from ``composed-N.npz`` in the folder of the larger networks.
Figures come from the crops of other photographs, which no step has seen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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

NAMES = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
FEW = 128


class Case(NamedTuple):
    """A training.

    Attributes:
        macs: Budget of the pruned model.
        count: First images of the training part, None for all.
        composed: Number of composed images to train on as well.
    """

    name: str
    macs: float
    count: int | None
    composed: int
    steps: int


COMPOSED = (1024, 4096, 16384)
"""Numbers of composed images: every stamp about three, twelve and fifty times."""
CASES = (
    Case(NAMES[0], 0.5, None, 0, 400),
    Case(NAMES[0], 0.5, FEW, 0, 400),
    *(Case(NAMES[0], 0.5, None, count, 1200) for count in COMPOSED[:2]),
    *(Case(NAMES[0], 0.5, None, count, 3000) for count in COMPOSED),
    Case(NAMES[0], 0.5, None, COMPOSED[1], 6000),
    *(Case(NAMES[0], macs, None, 0, 400) for macs in (0.8, 0.65, 0.35)),
    *(Case(name, 0.5, None, 0, 400) for name in NAMES[1:]),
)
COLUMNS = (
    "model",
    "MACs asked",
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
    """A network with its samples and the judge, for all of its trainings.

    Attributes:
        training: Four fifths of the calibration images, to which pruned models are refitted.
        judged: The last fifth.
    """

    def __init__(self, model: Path, data: Path, seed: int) -> None:
        self.model, self.data = model, data
        self.settings = Settings.create(device="cpu", seed=seed)
        original = models.load(model)
        samples, held = samples_of(original, data, None, self.settings)
        self.original = dataset.at_data(original, samples)
        self.training, self.judged = split(samples, held, seed)

    def objective(self) -> Objective:
        """The objective of the original, scaled by the images to which pruned models are refitted."""
        found = find_objective(self.original, self.settings, self.training, self.judged)
        size = run_size(self.original, self.settings.activation_memory_limit)
        return scale(self.original, found, self.training, "cpu", batch_size=size)

    def refit_images(self) -> dict[str, Array]:
        """The training part, to all of which a model is refitted, and the last fifth to measure it on."""
        origin = self.judged.origin
        assert origin is not None
        with np.load(self.data) as held:
            judged = held["input"][origin]
        return {**self.images(self.training.count, None), f"{dataset.EVALUATION}input": judged}

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
        self, pair: Pair, objective: Objective, samples: Samples, steps: int
    ) -> tuple[onnx.ModelProto, Recovery]:
        """The model that is recovered on some samples, and how it was trained."""
        settings = Settings.create(device="cpu", seed=self.settings.seed, recover=steps)
        return recovery.run(pair, objective, samples, self.judged, settings, device="cpu")


def run(out: Path, seed: int, larger: Path | None, kept: Path, names: Sequence[str] = NAMES) -> str:
    """One row per training.

    Args:
        out: Folder of studies.
        seed: Seed of the split and of the trainings.
        larger: Folder with the networks, their images and the composed ones.
        kept: Folder of plans and pruned models, which are made unless they are there.
        names: Networks of which the cases are run.

    Returns:
        The table; empty where no network is in the folder.
    """
    study = Resumable(out, "recover-images", COLUMNS, seed, CLOCKED)
    for name in names:
        if missing := absent(name, larger):
            print(missing, flush=True)
            continue
        assert larger is not None
        setting = Setting(larger / f"{name}.onnx", larger / f"{name}.npz", seed)
        for case in CASES:
            if case.name != name:
                continue
            more = larger / f"composed-{case.composed}.npz" if case.composed else None
            if more is not None and not more.exists():
                print(f"{case} needs {more} of `python -m tools.composed_images`; left out")
                continue
            count = case.count or setting.training.count
            samples = dataset.load(setting.images(count, more), setting.original)
            key: Row = {"model": name, "MACs asked": case.macs, "steps asked": case.steps}
            key |= {"images": samples.count, "composed": samples.count - count}
            if not study.holds(key):
                study.add({**key, **_row(setting, case, samples, kept)})
    return study.save()


def _made(setting: Setting, case: Case, kept: Path) -> tuple[Path, Path]:
    """The plan, and the pruned model that is refitted to the training part."""
    stem = f"{case.name}.{case.macs}"
    plan, pruned = kept / f"{stem}.plan.json", kept / f"{stem}.start.onnx"
    kept.mkdir(parents=True, exist_ok=True)
    shared = {"device": "cpu", "seed": setting.settings.seed, "cache": str(kept)}
    if not plan.exists():
        settings = Settings.create(macs=case.macs, align=1, **shared)
        pipeline.plan(setting.model, setting.data, plan, settings)
    if not pruned.exists():
        changes = {**shared, "force": True}
        pipeline.apply(setting.model, plan, setting.refit_images(), pruned, changes)
    return plan, pruned


def _row(setting: Setting, case: Case, samples: Samples, kept: Path) -> Row:
    from .recover import judged

    plan, pruned = _made(setting, case, kept)
    pair, objective = setting.pair(pruned, plan), setting.objective()
    started = time.process_time()
    proto, found = setting.trained(pair, objective, samples, case.steps)
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
