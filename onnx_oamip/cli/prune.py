"""The commands ``prune``, ``plan`` and ``apply``: all at once, or what to remove and its removal one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnx_oamip.cli.config import config_option
from onnx_oamip.cli.files import Page
from onnx_oamip.cli.help import option
from onnx_oamip.cli.options import (
    DATA,
    MODEL,
    check_paths,
    check_scores,
    eval_option,
    json_option,
    quiet_option,
    report_option,
    scores_option,
)
from onnx_oamip.cli.settings import PLANNING, SettingsCommand
from onnx_oamip.cli.terminal import Progress, show

data_option = option(
    "--data",
    heading="Data",
    metavar=DATA,
    help="Calibration samples: an .npz or .npy file with arrays by input name, a .parquet file, a folder of images (a "
    "folder a class gives labels), or a function that yields feeds. "
    "Only --importance l1, l2 or random with --allocate uniform or global and --refit none does without.",
)
keep_map_option = option(
    "--keep-map",
    heading="Output",
    type=MODEL,
    metavar="K.safetensors",
    help="Write there which indices of every weight stayed, for the checkpoint command.",
)
mlflow_option = option(
    "--mlflow",
    "tracking_uri",
    heading="Output",
    is_flag=False,
    flag_value="",
    metavar="[URI]",
    help="Log settings, measurements and files as an MLflow run, at this tracking URI or at the one MLflow is set to; "
    "its environment variables say the rest.",
)


@click.command(
    cls=SettingsCommand,
    owners=("BudgetOptions", *PLANNING, "RemovalOptions", "DataOptions", "RunOptions"),
)
@click.argument("model", type=MODEL)
@data_option
@eval_option
@scores_option
@option(
    "-o",
    "--output",
    heading="Output",
    type=MODEL,
    metavar="OUT.onnx",
    help="Where the pruned model goes; only --dry-run does without.",
)
@keep_map_option
@report_option
@mlflow_option
@option(
    "--dry-run",
    heading="Output",
    is_flag=True,
    help="Only show what would be removed; write nothing but the cache.",
)
@json_option
@quiet_option
@config_option
@click.pass_context
def prune(
    ctx: click.Context,
    /,
    model: Path,
    data: str | None,
    eval_data: str | None,
    output: Path | None,
    keep_map: Path | None,
    scores: Path | None,
    report_file: Path | None,
    tracking_uri: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Write a smaller MODEL to OUT.onnx that meets the budgets, and report what was done.

    At least one of --macs, --params, --size, --latency, --max-drop, --threshold and --alpha says how much goes. With
    more than one, all are met. Nothing is written unless every check holds.
    """
    from onnx_oamip.api import pipeline
    from onnx_oamip.core.settings import Settings
    from onnx_oamip.integrations import mlflow_tracking
    from onnx_oamip.reporting import documents

    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output'.")
    if output is not None:
        check_paths(
            output,
            {"the model": model, "--data": data, "--eval-data": eval_data, "--scores": scores},
        )
    if report_file is not None and dry_run:
        raise click.UsageError(
            "--report tells what was done, and --dry-run does nothing; leave out one of them."
        )
    check_scores(ctx, scores)
    settings = Settings.create(**choices)
    page = (
        None
        if report_file is None
        else Page(report_file, model, data, eval_data, scores, output, keep_map)
    )
    asked = {**settings.model_dump(mode="json", exclude={"device"}), "model": model, "data": data}
    with mlflow_tracking.run(tracking_uri, asked) as log, Progress(quiet) as progress:
        if dry_run:
            document = documents.planning(
                pipeline.plan(model, data, None, settings, eval_data, progress, scores)
            )
            log(document, ())
        else:
            found = pipeline.prune(
                model, data, output, settings, eval_data, progress, scores, keep_map, page
            )
            document = documents.document(found)
            log(document, (keep_map, report_file))
    if as_json or not quiet:
        show(document, as_json)


@click.command(
    cls=SettingsCommand,
    owners=("BudgetOptions", *PLANNING, "DataOptions", "RunOptions"),
    without=("force", "no_provenance"),
)
@click.argument("model", type=MODEL)
@data_option
@eval_option
@scores_option
@option(
    "-o",
    "--output",
    heading="Output",
    type=MODEL,
    required=True,
    metavar="P.json",
    help="Where the plan goes.",
)
@json_option
@quiet_option
@config_option
@click.pass_context
def plan(
    ctx: click.Context,
    /,
    model: Path,
    data: str | None,
    eval_data: str | None,
    output: Path,
    scores: Path | None,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Write to P.json which units of MODEL prune would remove, for apply.

    The file is made to be read and edited: every group with the units that stay, and what could not be removed with
    the reason.
    """
    from onnx_oamip.api import pipeline
    from onnx_oamip.core.settings import Settings
    from onnx_oamip.reporting import documents

    check_paths(
        output, {"the model": model, "--data": data, "--eval-data": eval_data, "--scores": scores}
    )
    check_scores(ctx, scores)
    settings = Settings.create(**choices)
    with Progress(quiet) as progress:
        found = pipeline.plan(model, data, output, settings, eval_data, progress, scores)
    if as_json or not quiet:
        show(documents.planning(found), as_json)


@click.command(
    cls=SettingsCommand,
    owners=("RepairOptions", "DataOptions", "RunOptions"),
    without=("solver", "time_limit", "workers", "scheduler"),
    unset=("refit", "seed", "batch_size"),
)
@click.argument("model", type=MODEL)
@option(
    "--plan",
    "plan_file",
    heading="What to remove",
    type=MODEL,
    required=True,
    metavar="P.json",
    help="What stays, as plan wrote it.",
)
@option(
    "--data",
    heading="Data",
    metavar=DATA,
    help="Calibration samples, as for prune. Only a plan made with --refit none does without.",
)
@eval_option
@option(
    "-o",
    "--output",
    heading="Output",
    type=MODEL,
    required=True,
    metavar="OUT.onnx",
    help="Where the pruned model goes.",
)
@keep_map_option
@report_option
@mlflow_option
@json_option
@quiet_option
@config_option
def apply(
    model: Path,
    plan_file: Path,
    data: str | None,
    eval_data: str | None,
    output: Path,
    keep_map: Path | None,
    report_file: Path | None,
    tracking_uri: str | None,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Remove from MODEL what a plan says, refit what stays, and write OUT.onnx if every check holds.

    With the data that the plan was made with this gives the very model that prune writes. A plan that was edited is
    carried out as it stands; one made for another model of the same names or the same graph can be applied too.
    """
    from onnx_oamip.api import pipeline
    from onnx_oamip.integrations import mlflow_tracking
    from onnx_oamip.reporting import documents

    check_paths(
        output, {"the model": model, "--data": data, "--eval-data": eval_data, "--plan": plan_file}
    )
    page = (
        None
        if report_file is None
        else Page(report_file, model, data, eval_data, plan_file, output, keep_map)
    )
    changes = {name: value for name, value in choices.items() if value is not None}
    asked = {"model": model, "data": data, "plan": plan_file}
    with mlflow_tracking.run(tracking_uri, asked) as log, Progress(quiet) as progress:
        found = pipeline.apply(
            model, plan_file, data, output, changes, eval_data, progress, keep_map, page
        )
        document = documents.document(found)
        log(document, (keep_map, report_file))
    if as_json or not quiet:
        show(document, as_json)
