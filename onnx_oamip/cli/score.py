"""The ``score`` command and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnx_oamip.cli.config import config_option
from onnx_oamip.cli.help import option
from onnx_oamip.cli.options import MODEL, data_option, json_option, quiet_option
from onnx_oamip.cli.settings import SettingsCommand
from onnx_oamip.cli.statements import output_option
from onnx_oamip.cli.terminal import Progress, show
from onnx_oamip.core.command_settings import SCORING, CommandSettings


@click.command(
    cls=SettingsCommand,
    settings=CommandSettings(
        ("ObjectiveOptions", *SCORING, "DataOptions", "RunOptions"),
        ("exclude",),
        without=("force", "strict", "batch_size", "no_provenance", "metric"),
    ),
)
@click.argument("model", type=MODEL)
@data_option("Calibration samples, as for prune. Only --importance l1, l2 or random does without.")
@output_option("S.npz", "Where the scores go.", required=True)
@option(
    "--save-mask",
    heading="Output",
    type=MODEL,
    metavar="K.safetensors",
    help="Write there which indices of every weight the programs over the network keep, for the checkpoint command.",
)
@option(
    "--mask-threshold",
    heading="Output",
    type=float,
    default=0.1,
    show_default=True,
    metavar="T",
    help="Of --save-mask: the least keep variable of a unit that is kept, as published.",
)
@json_option
@quiet_option
@config_option
def score(
    *,
    model: Path,
    data: str | None,
    output: Path,
    save_mask: Path | None,
    mask_threshold: float,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Write the importance of every unit of MODEL to S.npz, for prune --scores.

    These are the scores that prune computes on the same data. The file names its model and the channels of every
    unit; numpy.load reads it.
    """
    from onnx_oamip.api import pipeline
    from onnx_oamip.core.settings import Settings
    from onnx_oamip.reporting import documents

    settings = Settings.create(**choices)
    with Progress(quiet) as progress:
        scored = pipeline.score(
            model,
            data,
            output,
            settings,
            progress,
            save_mask=save_mask,
            mask_threshold=mask_threshold,
        )
    if as_json or not quiet:
        show(documents.scoring(scored), as_json)
