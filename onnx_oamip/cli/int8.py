"""The command ``int8``: quantisation by ONNX Runtime on the samples of ``prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnx_oamip.cli.config import config_option
from onnx_oamip.cli.help import option
from onnx_oamip.cli.options import (
    MODEL,
    check_paths,
    json_option,
    quiet_option,
    samples_options,
)
from onnx_oamip.cli.settings import SettingsCommand
from onnx_oamip.cli.terminal import Progress, show
from onnx_oamip.core.command_settings import INT8


@click.command(
    cls=SettingsCommand,
    settings=INT8,
    examples=(
        "half.onnx --data samples.npz -o half-int8.onnx",
        "half.onnx --ranges dynamic -o half-int8.onnx",
    ),
)
@click.argument("model", type=MODEL)
@samples_options(
    "Calibration samples, as for prune; what prune holds out is left out here too. Only --ranges dynamic does without."
)
@option(
    "-o",
    "--output",
    heading="Output",
    type=MODEL,
    required=True,
    metavar="OUT.onnx",
    help="Where the quantised model goes.",
)
@json_option
@quiet_option
@config_option
def int8(
    *,
    model: Path,
    data: str | None,
    eval_data: str | None,
    output: Path,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Quantise MODEL to int8 by ONNX Runtime, and write OUT.onnx.

    What it loses is measured by verify, and its speed by bench.
    """
    check_paths(output, {"the model": model, "--data": data, "--eval-data": eval_data})
    with Progress(quiet) as progress:
        from onnx_oamip.api import stages

        found = stages.int8(model, data, output, eval_data=eval_data, progress=progress, **choices)
    if as_json or not quiet:
        show(found.document, as_json)
