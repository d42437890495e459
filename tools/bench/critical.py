"""Critical units: units kept and points lost where oamip decides how many units stay, without a budget.

The default finds them with decoupled scores, one program over all groups, and held-out samples. The published program
and the exact one, over ten images, decide by their keep variables at the published threshold 0.1; only LeNet-300-100 is
small enough for them. With ``--mnist DIR`` (and torch), LeNet-300-100 is trained from further seeds, into the folder of
the results. A row states whether the run warned, on stderr, of the points that the pruned model loses. Rows are saved
as they are found, and a stopped study continues after the last one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnx_oamip.api import pipeline
from onnx_oamip.core.records import Measure
from onnx_oamip.core.settings import Settings

from .studies import MODELS, Resumable, Row, known_step, paths, save

THRESHOLD = 0.1
"""Threshold of the published experiments on MNIST."""
JOINT = "lenet300-mnist"
"""The network that the programs over the network are solved for."""
FURTHER_SEEDS = (2, 3)
"""Seeds from which that network is trained again; the shipped one has seed 1."""
ENOUGH_SECONDS = 1800
"""Time limit of the programs that close: more than any needs, so that other work on the machine changes no gap."""
PROGRAMS: dict[str, dict[str, Any]] = {
    "decoupled": {"time_limit": ENOUGH_SECONDS},
    "paper": {
        "mode": "joint",
        "formulation": "paper",
        "threshold": THRESHOLD,
        "time_limit": ENOUGH_SECONDS,
    },
    "exact": {"mode": "joint", "formulation": "exact", "threshold": THRESHOLD, "time_limit": 120},
    "exact, ten minutes": {
        "mode": "joint",
        "formulation": "exact",
        "threshold": THRESHOLD,
        "time_limit": 600,
    },
}
FURTHER_PROGRAMS = ("decoupled", "paper", "exact")
"""Programs of the networks that are trained from further seeds."""
COLUMNS = (
    "model",
    "program",
    "units",
    "kept",
    "accuracy",
    "lost without refit",
    "lost with refit",
    "warned",
    "lambda",
    "loss bound",
    "gap",
    "seconds",
    "processor s",
)
CLOCKED = ("seconds", "processor s", "gap")
UNFINISHED = "critical-unfinished"
"""Name of the file of a study that was stopped."""
LOSS = "the pruned model loses"
"""Text of the warning about points lost."""


@dataclass(frozen=True)
class Network:
    """A network of the study.

    Attributes:
        title: Name in the table.
        model: ONNX file.
        data: Samples.
        programs: Programs that are solved for it.
    """

    title: str
    model: Path
    data: Path
    programs: tuple[str, ...]


def run(
    out: Path,
    seed: int,
    names: tuple[str, ...] = (),
    mnist: Path | None = None,
) -> str:
    """A row per network and program."""
    study = Resumable(out, UNFINISHED, COLUMNS, seed, CLOCKED)
    order = []
    for network in _networks(out, names, mnist):
        for program in network.programs:
            key = (network.title, program)
            order.append(key)
            if not study.holds({"model": network.title, "program": program}):
                study.add(_row(network, program, seed))
    found = {(row["model"], row["program"]): row for row in study.rows}
    rows = [found[key] for key in order]
    text = save(out, "critical", rows, COLUMNS, seed, CLOCKED, study.environment)
    (out / f"{UNFINISHED}.json").unlink(missing_ok=True)
    return text


def _networks(out: Path, names: tuple[str, ...], mnist: Path | None) -> Iterator[Network]:
    """The shipped networks, each followed by those trained from further seeds."""
    for name in names or tuple(MODELS):
        model, data = paths(name)
        yield Network(name, model, data, tuple(PROGRAMS) if name == JOINT else ("decoupled",))
        if name == JOINT and mnist is not None:
            for seed in FURTHER_SEEDS:
                model = _trained(out, seed, mnist)
                yield Network(f"{name}, seed {seed}", model, data, FURTHER_PROGRAMS)


def _trained(out: Path, seed: int, mnist: Path) -> Path:
    """LeNet-300-100 trained as the shipped one, but from another seed; trained only once."""
    path = out / f"{JOINT}-seed{seed}.onnx"
    if path.exists():
        return path
    import torch  # only where something is trained

    from ..train_models import RECIPES, Options, check_export, export, load_dataset, train

    torch.set_num_threads(1)
    images = load_dataset(mnist)
    recipe = replace(RECIPES[JOINT], seed=seed)
    model, _, _ = train(JOINT, recipe, images, Options(None, None, None, False))
    part = path.with_suffix(".part")
    export(model, recipe, part)
    check_export(model, recipe, part, images.test_images)
    part.replace(path)
    return path


def _row(network: Network, program: str, seed: int) -> Row:
    settings = Settings.create(importance="oamip", seed=seed, **PROGRAMS[program])
    began, used = time.perf_counter(), time.process_time()
    warnings = _Warnings()
    with known_step(), warnings:
        report = pipeline.prune(network.model, network.data, None, settings)
    found = report.verification
    assert found.accuracy_before is not None
    plan = report.plan
    chosen = plan.programs[-1]
    # The gap of the program that decides: over widths for decoupled scores, over the network for the others.
    gap = chosen["gap"] if program == "decoupled" else report.scores.programs[0]["gap"]
    return {
        "model": network.title,
        "program": program,
        "units": len(plan.keep),
        "kept": int(plan.keep.sum()),
        "accuracy": round(100 * found.accuracy_before, 2),
        "lost without refit": _lost(found.outputs_before_refit or found.outputs),
        "lost with refit": _lost(found.outputs),
        "warned": "yes" if any(LOSS in text for text in warnings.texts) else "no",
        "lambda": f"{chosen['lambda']:.3g}" if "lambda" in chosen else None,
        "loss bound": f"{chosen['max_loss']:.3g}" if "max_loss" in chosen else None,
        "gap": f"{gap:.1%}",
        "seconds": round(time.perf_counter() - began, 1),
        "processor s": round(time.process_time() - used, 1),
    }


class _Warnings(logging.Handler):
    """Warnings that the package logs within a ``with`` block; the command writes them to stderr.

    Attributes:
        texts: Messages so far.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        self._logger = logging.getLogger("onnx_oamip")

    def __enter__(self) -> _Warnings:
        self._logger.addHandler(self)
        return self

    def __exit__(self, *about: object) -> None:
        self._logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message of a warning.

        Args:
            record: The warning.
        """
        self.texts.append(record.getMessage())


def _lost(measures: tuple[Measure, ...]) -> float:
    return round(max(measure.lost for measure in measures), 2)
