"""The ``score`` command and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnx_oamip.cli.config import config_option
from onnx_oamip.cli.memory import max_memory_option
from onnx_oamip.cli.options import (
    DATA,
    MODEL,
    cache_option,
    device_option,
    importance_option,
    importance_options,
    json_option,
    quiet_option,
    refit_option,
    scheduler_option,
    seed_option,
    solver_option,
    time_limit_option,
    workers_option,
)
from onnx_oamip.cli.reading import reading_options
from onnx_oamip.cli.terminal import Progress, show


@click.command()
@click.argument("model", type=MODEL)
@click.option(
    "--data",
    metavar=DATA,
    help="Calibration samples, as for prune. Only --importance l1, l2 or random does without.",
)
@click.option(
    "-o", "--output", type=MODEL, required=True, metavar="S.npz", help="Where the scores go."
)
@importance_option
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Score nothing that matches this shell pattern, such as 'conv1*'; may be given more than once.",
)
@importance_options
@refit_option
@solver_option
@time_limit_option
@workers_option
@scheduler_option
@device_option
@seed_option
@max_memory_option
@reading_options
@cache_option
@config_option
@json_option
@quiet_option
def score(
    model: Path, data: str | None, output: Path, as_json: bool, quiet: bool, **choices: Any
) -> None:
    """Write the importance of every unit of MODEL to S.npz, for prune --scores.

    They are the scores that prune would find on the same data. The file says which model it belongs to and which
    channels a unit stands for; numpy.load reads it.
    """
    from onnx_oamip.api import pipeline
    from onnx_oamip.core.settings import Settings
    from onnx_oamip.reporting import documents

    settings = Settings.create(**choices)
    with Progress(quiet) as progress:
        found = pipeline.score(model, data, output, settings, progress)
    if as_json or not quiet:
        show(documents.scoring(found), as_json)
