"""The ``prune`` command and its options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from ..errors import OutputError, SettingsError
from .options import (
    DATA,
    MODEL,
    MethodOption,
    alignment,
    batch_size_option,
    device_option,
    floor,
    importance_options,
    json_option,
    method,
    refit_option,
    seed_option,
    share,
    solver_option,
    time_limit_option,
    workers_option,
)
from .terminal import Progress, show

POINTS = click.FloatRange(0, 100, max_open=True)


@click.command()
@click.argument("model", type=MODEL)
@click.option(
    "--data",
    metavar=DATA,
    help="Calibration samples: an .npz or .npy file with arrays by input name, or a function that yields feeds. "
    "Only --importance l1, l2 or random with --allocate uniform or global and --refit none does without.",
)
@click.option(
    "--eval-data",
    metavar=DATA,
    help="Samples to measure the result on, in the same form. Default: the keys of --data that start with 'eval.', "
    "or else a fifth of --data, held out from calibration.",
)
@click.option("-o", "--output", type=MODEL, required=True, metavar="OUT.onnx", help="Where the pruned model goes.")
@click.option("--macs", callback=share, metavar="R", help="Share of the multiply-accumulates to keep, as 0.5 or 50%.")
@click.option("--params", callback=share, metavar="R", help="Share of the parameters to keep, as 0.5 or 50%.")
@click.option("--size", callback=share, metavar="R", help="Share of the file's bytes to keep, as 0.5 or 50%.")
@click.option(
    "--latency",
    callback=share,
    metavar="R",
    help="Share of the latency to keep, as 0.5 or 50%: measured on the device, one sample at a time. Needs "
    "--allocate mip.",
)
@click.option(
    "--max-drop",
    type=POINTS,
    metavar="P",
    help="Find the fewest multiply-accumulates that lose at most P points on the evaluation samples: of accuracy, or "
    "without labels of agreement with the original.",
)
@click.option(
    "--threshold",
    type=float,
    metavar="T",
    help="Remove every unit whose score is below T, in the units of the chosen importance.",
)
@click.option("--importance", cls=MethodOption, callback=method, default="obs", show_default=True, metavar="NAME")
@click.option(
    "--scores",
    type=MODEL,
    metavar="S.npz",
    help="Take the scores that the score command wrote for this model, in place of --importance.",
)
@click.option(
    "--allocate",
    type=click.Choice(["mip", "global", "uniform"]),
    default="mip",
    show_default=True,
    help="How a budget is spread: by a mixed-integer program over measured losses, by the lowest scores wherever they "
    "are, or as the same share of every group.",
)
@refit_option
@click.option(
    "--align",
    callback=alignment,
    default="auto",
    show_default=True,
    metavar="auto|N",
    help="Keep channels in multiples of N where a group has that many; auto takes the step that was measured to pay on "
    "the device, for convolutions.",
)
@click.option(
    "--floor",
    callback=floor,
    default="0",
    show_default=True,
    metavar="R",
    help="Least share to keep of every group, as 0.1 or 10%.",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Leave alone what matches this shell pattern, such as 'conv1*'; may be given more than once.",
)
@importance_options
@solver_option
@time_limit_option
@workers_option
@click.option("--force", is_flag=True, help="Write the model even where it was measured slower than the original.")
@device_option
@seed_option
@batch_size_option
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Print no tables and no progress; errors still go to stderr.")
def prune(
    model: Path,
    data: str | None,
    eval_data: str | None,
    output: Path,
    scores: Path | None,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Write a smaller MODEL to OUT.onnx that meets the budgets, and report what was done.

    At least one of --macs, --params, --size, --latency, --max-drop and --threshold says how much goes. With more than
    one, all are met. Nothing is written unless every check holds.
    """
    from .. import pipeline, report
    from ..settings import Settings

    inputs = {"the model": model, "--data": data, "--eval-data": eval_data, "--scores": scores}
    for name, source in inputs.items():
        if source is not None and _same_file(output, source):
            raise OutputError(f"{output} is {name} itself; give -o another path.")
    asked = click.get_current_context().get_parameter_source("importance")
    if scores is not None and asked is click.core.ParameterSource.COMMANDLINE:
        raise SettingsError("--scores says already how units are scored; leave out --importance.")
    settings = Settings.create(**choices)
    with Progress(quiet) as progress:
        result = pipeline.prune(model, data, output, settings, eval_data, progress, scores)
    if as_json or not quiet:
        show(report.document(result), as_json)


def _same_file(a: Path, b: Path | str) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return os.path.abspath(a) == os.path.abspath(b)
