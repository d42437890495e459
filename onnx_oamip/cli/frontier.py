"""The ``frontier`` command and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnx_oamip.cli.config import config_option
from onnx_oamip.cli.files import Page
from onnx_oamip.cli.flags import Flags
from onnx_oamip.cli.help import option
from onnx_oamip.cli.options import (
    MODEL,
    check_paths,
    check_scores,
    json_option,
    quiet_option,
    report_option,
    samples_options,
    scores_option,
)
from onnx_oamip.cli.settings import SeparatedType, SettingsCommand
from onnx_oamip.cli.statements import output_option
from onnx_oamip.cli.terminal import Progress, show
from onnx_oamip.core.command_settings import PLANNING, CommandSettings


@click.command(
    cls=SettingsCommand,
    settings=CommandSettings(
        ("ObjectiveOptions", *PLANNING, "DataOptions", "RunOptions"),
        without=("force", "strict", "no_provenance"),
    ),
    examples=(
        "model.onnx --data samples.npz --report frontier.html",
        "model.onnx --data samples.npz --levels 0.7,0.5,30% --save-dir models",
    ),
)
@click.argument("model", type=MODEL)
@samples_options("Calibration samples, as for prune.", required=True)
@option(
    "--levels",
    heading="Budget",
    type=SeparatedType("macs"),
    metavar="R,R,...",
    default="0.8,0.65,0.5,0.35,0.25,0.15",
    show_default=True,
    help="Shares of the multiply-accumulates to keep, as 0.8,0.5,25%.",
)
@scores_option
@output_option("F.json", "Write the JSON document to a file too.")
@report_option
@option(
    "--save-dir",
    heading="Output",
    type=MODEL,
    metavar="DIR",
    help="Write the model of every level to this folder, which is made if it does not exist.",
)
@json_option
@quiet_option
@config_option
@click.pass_context
def frontier(
    ctx: click.Context,
    /,
    *,
    model: Path,
    data: str,
    eval_data: str | None,
    levels: tuple[float, ...],
    output: Path | None,
    report_file: Path | None,
    save_dir: Path | None,
    scores: Path | None,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Prune MODEL to several budgets in one run, and show cost and accuracy of each result.

    Statistics, scores and losses are computed once. Every model passes the checks of prune, except that its speed is
    only measured and shown. A level that cannot be met is shown with the reason.
    """
    from onnx_oamip.api.frontier import frontier as run
    from onnx_oamip.artifacts.output import check_output
    from onnx_oamip.core.atomic_files import write_bytes
    from onnx_oamip.core.settings import Settings
    from onnx_oamip.reporting import documents

    check_scores(ctx, scores)
    settings = Settings.create(**choices)
    page = Page.if_given(report_file, model, data, eval_data, scores, output)
    if output is None:
        target = None
    else:
        target = check_output(model, output, (data, eval_data, scores))
    if output is not None:
        check_paths(
            output,
            {"the model": model, "--data": data, "--eval-data": eval_data, "--scores": scores},
        )
    with Progress(quiet) as progress:
        result = run(
            model,
            data,
            settings,
            levels,
            eval_data,
            progress=progress,
            scores=scores,
            save_dir=save_dir,
        )
    document = Flags.of_context(ctx).in_document(documents.frontier(result))
    if target is not None:
        write_bytes(f"{documents.dumps(document)}\n".encode(), target)
    if page is not None:
        page.write(result)
    if as_json or not quiet:
        show(document, as_json)
