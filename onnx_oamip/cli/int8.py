"""The command ``int8``: quantisation by ONNX Runtime on the samples of ``prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnx_oamip.cli.config import config_option
from onnx_oamip.cli.help import option
from onnx_oamip.cli.options import (
    DATA,
    MODEL,
    check_paths,
    eval_option,
    json_option,
    quiet_option,
)
from onnx_oamip.cli.settings import SettingsCommand
from onnx_oamip.cli.terminal import Progress, show


@click.command(
    cls=SettingsCommand,
    owners=("DataOptions",),
    names=("batch_size", "seed"),
    examples=(
        "half.onnx --data samples.npz -o half-int8.onnx",
        "half.onnx --ranges dynamic -o half-int8.onnx",
    ),
)
@click.argument("model", type=MODEL)
@option(
    "--data",
    heading="Data",
    metavar=DATA,
    help="Calibration samples, as for prune; what prune holds out is left out here too. Only --ranges dynamic does "
    "without.",
)
@eval_option
@option(
    "--ranges",
    heading="Quantisation",
    type=click.Choice(("static", "dynamic")),
    default="static",
    show_default=True,
    help="Ranges of activations: static, from the samples; dynamic, computed in every run.",
)
@option(
    "--calibration",
    heading="Quantisation",
    type=click.Choice(("minmax", "entropy", "percentile")),
    default="minmax",
    show_default=True,
    help="How static ranges are chosen from the samples.",
)
@option(
    "--per-tensor",
    heading="Quantisation",
    is_flag=True,
    help="One scale for every weight, instead of one for every output channel.",
)
@option(
    "--keep-float",
    heading="Quantisation",
    multiple=True,
    metavar="PATTERN",
    help="Leave nodes as they are whose name matches, such as 'head*'; may be given more than once.",
)
@option(
    "--reduce-range",
    heading="Quantisation",
    is_flag=True,
    help="Weights of 7 bits: sums do not saturate on x86 processors without VNNI.",
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
    ranges: str,
    calibration: str,
    per_tensor: bool,
    keep_float: tuple[str, ...],
    reduce_range: bool,
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
        from onnx_oamip.api.quantisation import int8 as run
        from onnx_oamip.core.settings import Settings
        from onnx_oamip.graph.quantisation import Int8Options

        found = run(
            model,
            data,
            output,
            Settings.create(**choices),
            Int8Options(ranges, per_tensor, calibration, keep_float, reduce_range),
            eval_data=eval_data,
            progress=progress,
        )
    if as_json or not quiet:
        show(found.document, as_json)
