"""The command ``run``: the stages prune, recover and int8, and checks, as a file describes them (``api.run_file``)."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_oamip.cli.help import Command, option
from onnx_oamip.cli.options import MODEL, json_option, quiet_option, report_option
from onnx_oamip.cli.terminal import Progress, show


@click.command(
    cls=Command,
    examples=("pipeline.toml", "pipeline.toml --report stages.html"),
)
@click.argument("file", type=MODEL, metavar="PIPELINE.toml")
@option(
    "--again",
    heading="Speed and resources",
    is_flag=True,
    help="Run every stage, also those whose inputs and settings are unchanged.",
)
@report_option
@json_option
@quiet_option
@click.pass_context
def run(
    ctx: click.Context,
    /,
    *,
    file: Path,
    again: bool,
    report_file: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run the stages that PIPELINE.toml describes, and compare their models with the original.

    The file names model and data, and has a table [prune], [recover] or [int8] for every stage, with the options of
    that command; [check] has the limits for the last model. A stage whose inputs and settings are unchanged since the
    last run in the same folder is not run again. The exit status is 1 where a limit is broken.
    """
    with Progress(quiet) as progress:
        from onnx_oamip.api import run_file, staged_run

        given = run_file.describe(file)
        if report_file is not None:
            from onnx_oamip.artifacts.output import check_output
            from onnx_oamip.reporting import html

            check_output(given.model, report_file, (file, given.data), "--report")
        found = staged_run.run(given, again=again, progress=progress)
    if report_file is not None:
        from onnx_oamip.core.atomic_files import write_bytes
        from onnx_oamip.reporting.side_by_side import stages

        write_bytes(html.compare_page(stages(found.document)), report_file)
    if as_json or not quiet:
        show(found.document, as_json)
    if found.broken:
        ctx.exit(1)
