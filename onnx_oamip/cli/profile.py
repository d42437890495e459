"""The command ``profile``: a latency table of this device."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_oamip.cli.help import option
from onnx_oamip.cli.options import MODEL, json_option, quiet_option
from onnx_oamip.cli.settings import SettingsCommand, timing_options
from onnx_oamip.cli.terminal import Progress, show
from onnx_oamip.core.command_settings import CommandSettings


@click.command(
    cls=SettingsCommand,
    settings=CommandSettings(names=("device", "op_library", "seed", "shape", "exclude")),
    examples=("model.onnx -o table.json", "model.onnx --device cuda --batch 8 -o table.json"),
)
@click.argument("model", type=MODEL)
@option(
    "-o",
    "--output",
    heading="Output",
    type=MODEL,
    required=True,
    metavar="TABLE.json",
    help="Where the table goes.",
)
@timing_options(model="the model", measured=", all widths together")
@json_option
@quiet_option
def profile(
    *,
    model: Path,
    data: str | None,
    output: Path,
    batch: int,
    threads: int | None,
    seconds: float,
    device: str,
    op_library: tuple[str, ...],
    seed: int,
    shape: tuple[str, ...],
    exclude: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Time MODEL on this device at several widths, for prune --latency-table on another machine.

    The table holds the time of every layer, so that --latency can be planned for a device that is not there.
    """
    with Progress(quiet):
        from onnx_oamip.api.profiling import profile as run
        from onnx_oamip.core.settings import Settings

        settings = Settings.create(
            device=device, op_library=op_library, seed=seed, shape=shape, exclude=exclude
        )
        found = run(model, output, settings, data, batch=batch, threads=threads, seconds=seconds)
    if as_json or not quiet:
        show(found.document, as_json)
