"""The command ``recover``: trains a pruned model with its original as the teacher."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from onnx_oamip.cli.config import config_option
from onnx_oamip.cli.help import option
from onnx_oamip.cli.interrupt import first_interrupt_stops
from onnx_oamip.cli.options import (
    MODEL,
    check_paths,
    json_option,
    quiet_option,
    samples_options,
)
from onnx_oamip.cli.settings import SettingsCommand
from onnx_oamip.cli.statements import output_option
from onnx_oamip.cli.terminal import Progress, show
from onnx_oamip.core.command_settings import RECOVER


@click.command(cls=SettingsCommand, settings=RECOVER)
@click.argument("pruned", type=MODEL)
@option(
    "--original",
    heading="Data",
    type=MODEL,
    required=True,
    metavar="MODEL",
    help="The model that PRUNED was made from: the teacher.",
)
@samples_options(
    "Samples to train on, as for prune; labels are not needed. A fifth is held out and judges.",
    required=True,
)
@option(
    "--plan",
    "plan_file",
    heading="Recovery",
    type=MODEL,
    metavar="P.json",
    help="The plan that PRUNED was made by: narrower tensors are then compared by the channels that are kept.",
)
@option(
    "--keep-best",
    heading="Recovery",
    is_flag=True,
    help="On the first Ctrl-C, end the training and write the best model so far; a second one ends the command.",
)
@output_option("OUT.onnx", "Where the recovered model goes.", required=True)
@json_option
@quiet_option
@config_option
def recover(
    *,
    pruned: Path,
    original: Path,
    data: str,
    eval_data: str | None,
    plan_file: Path | None,
    keep_best: bool,
    output: Path,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Train PRUNED, without labels, to answer as its original, and write OUT.onnx.

    The graph and the shapes of its weights stay as they are. If the objective does not fall on held-out samples,
    OUT.onnx is PRUNED as it was, and this is reported. Needs the extra 'recover', which brings torch.
    """
    from onnx_oamip.api import recovery
    from onnx_oamip.core.settings import Settings
    from onnx_oamip.reporting import documents

    check_paths(
        output,
        {
            "PRUNED": pruned,
            "--original": original,
            "--data": data,
            "--eval-data": eval_data,
            "--plan": plan_file,
        },
    )
    settings = Settings.create(**choices)
    stopping = first_interrupt_stops() if keep_best else nullcontext(None)
    with Progress(quiet) as progress, stopping as stop:
        found = recovery.recover(
            pruned,
            original,
            data,
            settings,
            output,
            plan_file=plan_file,
            eval_data=eval_data,
            progress=progress,
            stop=stop,
        )
    if as_json or not quiet:
        show(documents.recovered(found), as_json)
