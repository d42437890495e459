"""The commands ``prune``, ``plan`` and ``apply``: all at once, or what to remove and its removal one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnx_oamip.cli.config import config_option
from onnx_oamip.cli.files import Page
from onnx_oamip.cli.memory import max_memory_option
from onnx_oamip.cli.options import (
    DATA,
    MODEL,
    batch_size_option,
    budget_options,
    cache_option,
    check_paths,
    check_scores,
    device_option,
    eval_option,
    importance_options,
    json_option,
    quiet_option,
    report_option,
    scheduler_option,
    seed_option,
    solver_option,
    time_limit_option,
    workers_option,
)
from onnx_oamip.cli.reading import reading_options
from onnx_oamip.cli.terminal import Progress, show

data_option = click.option(
    "--data",
    metavar=DATA,
    help="Calibration samples: an .npz or .npy file with arrays by input name, a .parquet file, a folder of images (a "
    "folder a class gives labels), or a function that yields feeds. "
    "Only --importance l1, l2 or random with --allocate uniform or global and --refit none does without.",
)
force_option = click.option(
    "--force",
    is_flag=True,
    help="Write the model even where it was measured slower than the original.",
)
strict_option = click.option(
    "--strict",
    is_flag=True,
    help="Fail where channels of a layer cannot be removed for another reason than the model's inputs and outputs.",
)
no_provenance_option = click.option(
    "--no-provenance",
    is_flag=True,
    help="Leave out of the model's metadata which file it was made from, by which plan and version.",
)
keep_map_option = click.option(
    "--keep-map",
    type=MODEL,
    metavar="K.safetensors",
    help="Write there which indices of every weight stayed, for the checkpoint command.",
)
mlflow_option = click.option(
    "--mlflow",
    "tracking_uri",
    is_flag=False,
    flag_value="",
    metavar="[URI]",
    help="Log settings, measurements and files as an MLflow run, at this tracking URI or at the one MLflow is set to; "
    "its environment variables say the rest.",
)


@click.command()
@click.argument("model", type=MODEL)
@data_option
@eval_option
@click.option(
    "-o",
    "--output",
    type=MODEL,
    metavar="OUT.onnx",
    help="Where the pruned model goes; only --dry-run does without.",
)
@keep_map_option
@report_option
@budget_options
@importance_options
@click.option(
    "--granularity",
    type=click.Choice(["unit", "connection"]),
    default="unit",
    show_default=True,
    help="What goes: whole units, so that the model shrinks, or single connections, whose weights become zero in a "
    "model of the same shape. Connections need --importance nnrelief, and take --alpha, or --params or --max-drop, "
    "which rank all connections together, but with --allocate uniform find one alpha.",
)
@click.option(
    "--iterations",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Score, prune and refit N times, a counted budget reached in equal factors.",
)
@click.option(
    "--sparse",
    is_flag=True,
    help="Of connections: store constants that are mostly zero as sparse tensors.",
)
@solver_option
@time_limit_option
@workers_option
@scheduler_option
@click.option(
    "--dry-run", is_flag=True, help="Only show what would be removed; write nothing but the cache."
)
@force_option
@strict_option
@no_provenance_option
@device_option
@seed_option
@batch_size_option
@max_memory_option
@reading_options
@cache_option
@mlflow_option
@config_option
@json_option
@quiet_option
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


@click.command()
@click.argument("model", type=MODEL)
@data_option
@eval_option
@click.option(
    "-o", "--output", type=MODEL, required=True, metavar="P.json", help="Where the plan goes."
)
@budget_options
@importance_options
@solver_option
@time_limit_option
@strict_option
@workers_option
@scheduler_option
@device_option
@seed_option
@batch_size_option
@max_memory_option
@reading_options
@cache_option
@config_option
@json_option
@quiet_option
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


@click.command()
@click.argument("model", type=MODEL)
@click.option(
    "--plan",
    "plan_file",
    type=MODEL,
    required=True,
    metavar="P.json",
    help="What stays, as plan wrote it.",
)
@click.option(
    "--data",
    metavar=DATA,
    help="Calibration samples, as for prune. Only a plan made with --refit none does without.",
)
@eval_option
@click.option(
    "-o",
    "--output",
    type=MODEL,
    required=True,
    metavar="OUT.onnx",
    help="Where the pruned model goes.",
)
@keep_map_option
@report_option
@click.option(
    "--refit",
    type=click.Choice(["least-squares", "bias", "none"]),
    help="As for prune. Default: as the plan was made with.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    metavar="N",
    help="As for prune. Default: that of the plan.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="As for prune. Default: that of the plan.",
)
@max_memory_option
@no_provenance_option
@force_option
@strict_option
@device_option
@reading_options
@cache_option
@mlflow_option
@config_option
@json_option
@quiet_option
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
