"""The commands ``prune``, ``plan`` and ``apply``: all stages at once, or the plan and its application separately."""

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
from onnx_oamip.cli.settings import SettingsCommand
from onnx_oamip.cli.statements import output_option
from onnx_oamip.cli.terminal import Progress, explain_drop, show
from onnx_oamip.core.command_settings import PLANNING, PRUNE, CommandSettings

calibration_options = samples_options(
    "Calibration samples: an .npz or .npy file with arrays by input name, a .parquet file, a folder of images (a "
    "folder a class gives labels) or with one .npz a sample, or a function that yields feeds. "
    "Only --importance l1, l2 or random with --allocate uniform or global and --refit none does without."
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
    settings=PRUNE,
    examples=(
        "model.onnx --data samples.npz --macs 50% -o half.onnx",
        "model.onnx --data samples.npz --max-drop 1 --report small.html -o small.onnx",
        "model.onnx --data images/ --image-size 224 --latency 0.6 -o fast.onnx",
        "model.onnx --macs 0.7 --importance l2 --allocate uniform --refit none -o no-data.onnx",
    ),
)
@click.argument("model", type=MODEL)
@calibration_options
@scores_option
@output_option("OUT.onnx", "Where the pruned model goes; only --dry-run does without.")
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
    *,
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

    At least one of --macs, --params, --size, --latency, --max-drop, --max-loss, --threshold and --alpha is required,
    but with --importance oamip, which finds the critical units without one. If several are given, all are met. Nothing
    is written unless every check holds.
    """
    from onnx_oamip.core.settings import Settings
    from onnx_oamip.integrations import mlflow_tracking

    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output'.")
    if output is not None:
        check_paths(
            output,
            {"the model": model, "--data": data, "--eval-data": eval_data, "--scores": scores},
        )
    if report_file is not None and dry_run:
        raise click.UsageError(
            "--report and --dry-run are mutually exclusive: a dry run has no result; leave out one."
        )
    check_scores(ctx, scores)
    settings = Settings.create(**choices)
    page = Page.if_given(report_file, model, data, eval_data, scores, output, keep_map)
    parameters = {
        **settings.model_dump(mode="json", exclude={"device"}),
        "model": model,
        "data": data,
    }
    flags = Flags.of_context(ctx)
    logging = mlflow_tracking.run(tracking_uri, parameters, flags.in_text)
    with logging as log, Progress(quiet) as progress:
        from onnx_oamip.api import pipeline
        from onnx_oamip.reporting import documents

        if dry_run:
            planned = pipeline.plan(
                model,
                data,
                None,
                settings,
                eval_data,
                progress=progress,
                scores=scores,
            )
            document = flags.in_document(documents.planning(planned))
            log(document, ())
        else:
            report = pipeline.prune(
                model,
                data,
                output,
                settings,
                eval_data,
                progress=progress,
                scores=scores,
                keep_map=keep_map,
                page=page,
            )
            document = flags.in_document(documents.document(report))
            log(document, (keep_map, report_file))
            if not quiet:
                explain_drop(document)
    if as_json or not quiet:
        show(document, as_json)


@click.command(
    cls=SettingsCommand,
    settings=CommandSettings(
        ("BudgetOptions", "ObjectiveOptions", *PLANNING, "DataOptions", "RunOptions"),
        without=("force", "no_provenance"),
    ),
    examples=("model.onnx --data samples.npz --macs 50% -o plan.json",),
)
@click.argument("model", type=MODEL)
@calibration_options
@scores_option
@output_option("P.json", "Where the plan goes.", required=True)
@json_option
@quiet_option
@config_option
@click.pass_context
def plan(
    ctx: click.Context,
    /,
    *,
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

    The file can be read and edited: it lists the units to keep of every group, and the channels that cannot be
    removed with the reason.
    """
    from onnx_oamip.core.settings import Settings

    check_paths(
        output, {"the model": model, "--data": data, "--eval-data": eval_data, "--scores": scores}
    )
    check_scores(ctx, scores)
    settings = Settings.create(**choices)
    with Progress(quiet) as progress:
        from onnx_oamip.api import pipeline
        from onnx_oamip.reporting import documents

        planned = pipeline.plan(
            model,
            data,
            output,
            settings,
            eval_data,
            progress=progress,
            scores=scores,
        )
    if as_json or not quiet:
        show(documents.planning(planned), as_json)


@click.command(
    cls=SettingsCommand,
    settings=CommandSettings(
        ("ObjectiveOptions", "RepairOptions", "RecoveryOptions", "DataOptions", "RunOptions"),
        without=("solver", "time_limit", "workers", "scheduler"),
    ),
    unset=("refit", "seed", "batch_size", "shape", "augment"),
    examples=("model.onnx --plan plan.json --data samples.npz -o half.onnx",),
)
@click.argument("model", type=MODEL)
@option(
    "--plan",
    "plan_file",
    heading="What to remove",
    type=MODEL,
    required=True,
    metavar="P.json",
    help="The plan to carry out, as plan wrote it.",
)
@samples_options(
    "Calibration samples, as for prune. Only a plan made with --refit none does without."
)
@output_option("OUT.onnx", "Where the pruned model goes.", required=True)
@keep_map_option
@report_option
@mlflow_option
@json_option
@quiet_option
@config_option
def apply(
    *,
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
    """Carry out a plan on MODEL, refit the remaining weights, and write OUT.onnx if every check holds.

    With the data of the plan, the result is the model that prune writes. An edited plan is carried out as it stands; a
    plan for another model with the same names or the same graph can be applied too.
    """
    from onnx_oamip.integrations import mlflow_tracking

    check_paths(
        output, {"the model": model, "--data": data, "--eval-data": eval_data, "--plan": plan_file}
    )
    page = Page.if_given(report_file, model, data, eval_data, plan_file, output, keep_map)
    # A setting that is not given is that of the plan.
    changes = {name: value for name, value in choices.items() if value not in (None, ())}
    parameters = {"model": model, "data": data, "plan": plan_file}
    flags = Flags.of_context()
    logging = mlflow_tracking.run(tracking_uri, parameters, flags.in_text)
    with logging as log, Progress(quiet) as progress:
        from onnx_oamip.api import pipeline
        from onnx_oamip.reporting import documents

        report = pipeline.apply(
            model,
            plan_file,
            data,
            output,
            changes,
            eval_data=eval_data,
            progress=progress,
            keep_map=keep_map,
            page=page,
        )
        document = flags.in_document(documents.document(report))
        log(document, (keep_map, report_file))
    if as_json or not quiet:
        show(document, as_json)
