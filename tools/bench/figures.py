"""The studies that have a picture: what draws it from their rows, and what it shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from . import (
    calibration_figure,
    cost_figure,
    finetune_figure,
    latency_figure,
    memory_figure,
    programs_figure,
    rivals_figure,
)
from .studies import Row


class Drawn(NamedTuple):
    """Figure of a study.

    ``draw`` takes rows and a file, ``alt`` is the text for readers without pictures, ``caption`` the legend.
    """

    draw: Callable[[Sequence[Row], Path], None]
    alt: str
    caption: str


FIGURES: Mapping[str, Drawn] = {
    "programs": Drawn(
        programs_figure.draw,
        (
            "Size, processor seconds and objective of the published program, a line for each formulation and solver: "
            "ours is tens of times smaller and faster than the form in CVXPY."
        ),
        (
            "Each line is a program and a solver. The gap is that of the objective to the bound that the solver "
            "proved; Clarabel's bound was not saved, and its status stands instead."
        ),
    ),
    "rivals": Drawn(
        rivals_figure.draw,
        "Accuracy over MACs kept, a panel a network: ours stays near the original where the best of each rival falls.",
        "Bands reach from the lowest to the highest of the seeds; the dotted line is the original.",
    ),
    "larger": Drawn(
        rivals_figure.draw_larger,
        (
            "Accuracy, or agreement with the original, over MACs kept for larger networks: ours falls least on each "
            "of them, rivals and random choice fall to chance."
        ),
        (
            "Of each rival the best of its variants at every budget, by the figure shown; the dotted line is the "
            "original. A rival without a line did not come down to the budgets. One seed, hence no "
            "bands."
        ),
    ),
    "latency": Drawn(
        latency_figure.draw,
        "Measured speed-up over the ideal one, a panel for each of threads and batch.",
        "Whiskers are 95 % intervals of the median; the axis is logarithmic.",
    ),
    "finetune": Drawn(
        finetune_figure.draw,
        (
            "Accuracy after no, one and two epochs of fine-tuning, a panel a budget: ours starts near the original, "
            "Torch-Pruning far below it, and ours is still ahead after two epochs."
        ),
        "No epochs: as pruned. The axis is spaced by the logarithm of the error. One seed.",
    ),
    "calibration": Drawn(
        calibration_figure.draw,
        (
            "Accuracy by number of calibration images, a panel a network: it rises little past 256 images; images of "
            "another domain do worse, noise much worse."
        ),
        (
            "Open marks: 512 images of another domain, and of noise. The axis is spaced by the logarithm of the error. "
            "One seed."
        ),
    ),
    "cost": Drawn(
        cost_figure.draw,
        (
            "Seconds by stage against width, depth, samples and resolution, peak memory, and seconds in plain passes, "
            "on logarithmic axes with the exponent beside each line."
        ),
        (
            "Beside each line how it grows between the two largest sizes, above the start-up (dotted: all stages of a "
            "stack of almost no work). The latency check is left out, because it measures for a fixed time. One "
            "run each."
        ),
    ),
    "memory": Drawn(
        memory_figure.draw,
        "Peak memory by number of samples, a line a stage: only that of the refit grows.",
        "The process's own memory (no file behind it), by stage; the axis of samples is logarithmic.",
    ),
}


def draw(study: str, results: Path, folder: Path) -> None:
    """Draw a study found in ``results`` as ``folder/study.svg``; nothing where it has no picture, or was not saved."""
    saved = results / f"{study}.json"
    if study in FIGURES and saved.exists():
        FIGURES[study].draw(
            json.loads(saved.read_text(encoding="utf-8"))["rows"], folder / f"{study}.svg"
        )
