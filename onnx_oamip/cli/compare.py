"""The command ``compare``: pruned models of one original, by their reports."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_oamip.cli.help import Command, option
from onnx_oamip.cli.options import MODEL, check_paths, json_option, quiet_option
from onnx_oamip.cli.terminal import show


@click.command(
    cls=Command,
    examples=("half.json small.json -o compare.html", "stages.json small.json --json"),
)
@click.argument("reports", type=MODEL, nargs=-1, required=True, metavar="REPORT.json ...")
@option(
    "-o",
    "--output",
    heading="Output",
    type=MODEL,
    metavar="C.html",
    help="Write a page with charts and tables: one file, to read offline or to print. Needs the extra 'report'.",
)
@json_option
@quiet_option
def compare(
    *,
    reports: tuple[Path, ...],
    output: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show models of one original side by side, by the documents that prune, apply and run print with --json.

    Sizes, MACs, latency with its interval, losses of every output, widths of every layer, and settings that differ.
    """
    from onnx_oamip.artifacts.output import check_output
    from onnx_oamip.core.atomic_files import write_bytes
    from onnx_oamip.reporting.side_by_side import side_by_side

    if output is not None:
        from onnx_oamip.reporting import html

        check_paths(output, {str(path): path for path in reports})
        check_output(reports[0], output, reports[1:])
    found = side_by_side(reports)
    if output is not None:
        write_bytes(html.compare_page(found), output)
    if as_json or not quiet:
        show(found, as_json)
