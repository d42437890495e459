"""The ``pack`` and ``unpack`` commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnx_oamip.cli.config import config_option
from onnx_oamip.cli.help import option
from onnx_oamip.cli.options import DATA, MODEL, json_option, quiet_option
from onnx_oamip.cli.settings import SettingsCommand, SettingType
from onnx_oamip.cli.terminal import Progress, show
from onnx_oamip.core.command_settings import CommandSettings
from onnx_oamip.core.errors import SettingsError


@click.command(
    cls=SettingsCommand,
    settings=CommandSettings(("DataOptions",), ("device", "op_library", "seed", "batch_size")),
)
@click.argument("model", type=MODEL)
@option(
    "--clusters",
    heading="Budget",
    type=click.IntRange(2, 256),
    metavar="K",
    help="Distinct values that each weight matrix may hold, found by k-means. Default with --data: chosen for each, so "
    "that --max-drop holds.",
)
@option(
    "--bits",
    heading="Budget",
    type=click.IntRange(1, 8),
    metavar="B",
    help="The same, as 2 to the power of B values.",
)
@option(
    "--lossless",
    heading="Budget",
    is_flag=True,
    help="Keep every bit; the default without --data, --clusters and --bits.",
)
@option(
    "--max-drop",
    heading="Budget",
    type=SettingType("max_drop"),
    metavar="P",
    default_text="0.5",
    help="Most points to lose: of accuracy, or without labels of agreement with the original.",
)
@option(
    "--data",
    heading="Data",
    metavar=DATA,
    help="Samples, as for prune: the smallest file that loses at most --max-drop points on them is searched for.",
)
@option(
    "--eval-data",
    heading="Data",
    metavar=DATA,
    help="Samples to measure the drop on. Default: the keys of --data that start with 'eval.', or else a fifth of "
    "--data.",
)
@option(
    "-o",
    "--output",
    heading="Output",
    type=MODEL,
    required=True,
    metavar="MODEL.oamip",
    help="Where the packed model goes.",
)
@option(
    "--report",
    "rivals",
    heading="Output",
    is_flag=True,
    help="Also show the sizes of zip, half precision and both.",
)
@json_option
@quiet_option
@config_option
def pack(
    *,
    model: Path,
    output: Path,
    bits: int | None,
    rivals: bool,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Write MODEL in fewer bytes to MODEL.oamip, to store or to ship.

    Packing is lossless without --data, --clusters and --bits. The unpacked model is as large and as fast as MODEL.
    """
    from onnx_oamip.published import packing
    from onnx_oamip.published.packing import document

    if bits is not None:
        if choices["clusters"] is not None:
            raise SettingsError(
                "--bits and --clusters are mutually exclusive; leave out one of them."
            )
        choices["clusters"] = 2**bits
    with Progress(quiet) as progress:
        packed = packing.pack(model, output, progress=progress, **choices)
    if as_json or not quiet:
        show(document.packing(packed, rivals), as_json)


@click.command()
@click.argument("packed", type=MODEL, metavar="MODEL.oamip")
@click.option(
    "-o",
    "--output",
    type=MODEL,
    required=True,
    metavar="MODEL.onnx",
    help="Where the model goes.",
)
@json_option
@quiet_option
def unpack(
    packed: Path,
    output: Path,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the model that MODEL.oamip holds, as an ONNX file that any runtime loads.

    Files that keep weights beside the model go beside MODEL.onnx under their own names.
    """
    from onnx_oamip.published import packing
    from onnx_oamip.published.packing import document

    unpacked = packing.unpack(packed, output)
    if as_json or not quiet:
        show(document.unpacking(unpacked), as_json)
