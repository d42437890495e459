"""What is checked about the values of options, and the options that commands share."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from onnx_oamip.cli.flags import Flags
from onnx_oamip.core.errors import EnvironmentMissing, OutputError, SettingsError

MODEL = click.Path(path_type=Path)
DATA = "FILE|FOLDER|MODULE:FUNCTION"
POINTS = click.FloatRange(0, 100, max_open=True)


def share(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """A share to keep, above 0 and at most 1, from a number or a percentage with its sign."""
    number = None if value is None else fraction(value)
    if number is not None and not 0 < number <= 1:
        message = f"{value!r} is not a share to keep; give a number above 0 and at most 1, or a percentage such as 50%."
        raise click.BadParameter(message, ctx, param)
    return number


def shares(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
    """Several shares to keep, with commas between them."""
    found = tuple(fraction(part) for part in value.split(","))
    if not all(0 < number <= 1 for number in found):
        message = f"{value!r} is not a list of shares to keep; give numbers above 0 and at most 1, as 0.8,0.5,25%."
        raise click.BadParameter(message, ctx, param)
    return found


def floor(ctx: click.Context, param: click.Parameter, value: str) -> float:
    """A share that may be 0."""
    number = fraction(value)
    if not 0 <= number <= 1:
        message = (
            f"{value!r} is not a share; give a number from 0 to 1, or a percentage such as 10%."
        )
        raise click.BadParameter(message, ctx, param)
    return number


def protected(ctx: click.Context, param: click.Parameter, value: str) -> float:
    """A share that may be 0 but not 1."""
    number = fraction(value)
    if not 0 <= number < 1:
        message = f"{value!r} is not a share; give a number from 0 and below 1, or a percentage such as 10%."
        raise click.BadParameter(message, ctx, param)
    return number


def seconds(ctx: click.Context, param: click.Parameter, value: float) -> float:
    """A time: above 0, and finite."""
    if not 0 < value < math.inf:
        raise click.BadParameter(f"{value} is not a number of seconds above 0.", ctx, param)
    return value


def alignment(ctx: click.Context, param: click.Parameter, value: str) -> int | str:
    """``auto`` as it is, or a number of channels."""
    text = value.strip()
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        message = f"{text!r} is no alignment; give auto or a whole number of channels from 1."
        raise click.BadParameter(message, ctx, param)
    return int(text)


def fraction(value: str) -> float:
    text = value.strip()
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return math.nan


class PlugInOption(click.Option):
    """An option that takes the name of a plug-in; its help lists all plug-ins with their summaries.

    The registry is imported when the help is printed or a value is checked: it is heavy, and other packages extend it.
    """

    def __init__(self, *declarations: Any, registry: str, purpose: str, **attributes: Any) -> None:
        """Create the option.

        Args:
            declarations: Flags, as for ``click.Option``.
            registry: Module of this package with ``find`` and ``names``.
            purpose: First words of the help.
            attributes: Further arguments of ``click.Option``.
        """
        super().__init__(*declarations, **attributes)
        self._registry = registry
        self._purpose = purpose

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Check that a plug-in of this name exists. Raises BadParameter if not."""
        known = import_module(self._registry).names()
        if value not in known:
            raise click.BadParameter(f"{value!r} is not one of {', '.join(known)}.", ctx, self)
        return value

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the flags and the help text with all plug-ins."""
        registry = import_module(self._registry)
        entries = [self._entry(name, registry.find) for name in registry.names()]
        text = f"{self._purpose}: {'; '.join(entry for entry in entries if entry)}."
        self.help = Flags.of_context(ctx).in_text(text)
        return super().get_help_record(ctx)

    @staticmethod
    def _entry(name: str, find: Callable[[str], Any]) -> str:
        try:
            plugin = find(name)
        except EnvironmentMissing as error:
            return f"{name}, {str(error).rstrip('.')}"
        return f"{name}, {plugin.summary}" if plugin is not None else ""


importance_option = click.option(
    "--importance",
    cls=PlugInOption,
    registry="onnx_oamip.importance",
    purpose="How units are scored",
    default="obs",
    show_default=True,
    metavar="NAME",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout, no tables."
)
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the model runs; auto takes CUDA where it works, and asking for cuda where it does not is an error.",
)
batch_size_option = click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    metavar="N",
    help="Samples that models are run on at a time to be compared; a model with a fixed batch keeps its own. What is "
    "written does not depend on it.",
)
seed_option = click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Seed of everything random; with the same seed a budget that is counted gives the same model.",
)
refit_option = click.option(
    "--refit",
    type=click.Choice(["least-squares", "bias", "none"]),
    default="least-squares",
    show_default=True,
    help="How the rest makes up for what went: by weights fitted anew to the original outputs, by the mean folded into "
    "the biases of what follows, or not at all. The scores of oamip and measured losses count on it.",
)
cache_option = click.option(
    "--cache",
    default="auto",
    show_default=True,
    metavar="DIR|auto|off",
    help="Where to keep what was found out about a model and its data, so that another budget starts from it; auto is "
    "$ONNX_OAMIP_CACHE, or else the user's cache folder.",
)
report_option = click.option(
    "--report",
    "report_file",
    type=MODEL,
    metavar="R.html",
    help="Write a page with tables and charts too: one file, to read offline or to print.",
)
quiet_option = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    help="Print no tables and no progress; errors still go to stderr.",
)
workers_option = click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Groups that are scored or measured at the same time. Default: one for every core.",
)
scheduler_option = click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Score and measure groups on the workers of the Dask scheduler at this address, such as tcp://host:8786, in "
    "place of --workers here. The result is the same. Needs the extra 'cluster'.",
)
solver_option = click.option(
    "--solver",
    type=click.Choice(["auto", "gurobi", "highs"]),
    default="auto",
    show_default=True,
    help="What solves the programs; auto takes Gurobi where its licence allows the program's size, else HiGHS.",
)
time_limit_option = click.option(
    "--time-limit",
    type=float,
    callback=seconds,
    default=60.0,
    show_default=True,
    metavar="S",
    help="Most seconds for one solve of a program; the best found by then is taken and its gap reported.",
)


def importance_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of single importance methods, for every command that scores."""
    options = (
        click.option(
            "--mode",
            type=click.Choice(["auto", "joint", "per-class", "decoupled"]),
            default="auto",
            show_default=True,
            help="Of oamip: one program over the network, one for every class with the scores averaged, or one for "
            "every layer; auto is joint where the program is small.",
        ),
        click.option(
            "--formulation",
            type=click.Choice(["paper", "exact"]),
            default="exact",
            show_default=True,
            help="Of oamip, joint and per-class: whole keep variables with bounds that hold for all of them, or the "
            "program as published, with continuous scores, bounds of the unpruned network and its k x k quirk.",
        ),
        click.option(
            "--loss-weight",
            type=click.FloatRange(0, min_open=True),
            default=5.0,
            show_default=True,
            metavar="W",
            help="Of oamip: weight of the loss against sparsity; more keeps more.",
        ),
        click.option(
            "--score-budget",
            callback=share,
            metavar="R",
            help="Of oamip, exact: the share of the units' multiply-accumulates that the program may keep, in place "
            "of its reward for sparsity.",
        ),
        click.option(
            "--relax",
            is_flag=True,
            help="Of oamip: no whole variables; faster, and no longer exact.",
        ),
        click.option(
            "--images-per-class",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            metavar="N",
            help="Of oamip: calibration samples of every class that the program is over, the least certain of those "
            "that the model gets right.",
        ),
        click.option(
            "--alpha",
            callback=share,
            metavar="A",
            help="Of nnrelief: the share of absolute signal that the connections kept must carry into every unit, as "
            "0.95; units left without a connection go. Says how much goes where no budget does.",
        ),
        click.option(
            "--signal",
            type=click.Choice(["mean", "paper"]),
            default="mean",
            show_default=True,
            help="Of nnrelief, for convolutions: signal from the mean of every channel, or as published from every "
            "kernel's own map, which takes longer.",
        ),
        click.option(
            "--phi",
            type=click.Choice(["weight", "weight_sq", "exp_weight", "none"]),
            default="weight",
            show_default=True,
            help="Of snacs: what information is multiplied with: the mean absolute weight w between two channels over "
            "the largest of the layer, its square, exp(-w^2 / 2), or nothing.",
        ),
        click.option(
            "--score-time",
            type=float,
            callback=seconds,
            default=300.0,
            show_default=True,
            metavar="S",
            help="Of mint: most seconds for its estimates; layers not reached by then are scored by correlation.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


eval_option = click.option(
    "--eval-data",
    metavar=DATA,
    help="Samples to measure the result on, in the same form. Default: the keys of --data that start with 'eval.', "
    "or else a fifth of --data, held out from calibration.",
)


def budget_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What to keep, how units are judged and how a budget is spread, for every command that plans."""
    options = (
        click.option(
            "--macs",
            callback=share,
            metavar="R",
            help="Share of the multiply-accumulates to keep, as 0.5 or 50%.",
        ),
        click.option(
            "--params",
            callback=share,
            metavar="R",
            help="Share of the parameters to keep, as 0.5 or 50%.",
        ),
        click.option(
            "--size",
            callback=share,
            metavar="R",
            help="Share of the file's bytes to keep, as 0.5 or 50%.",
        ),
        click.option(
            "--latency",
            callback=share,
            metavar="R",
            help="Share of the latency to keep, as 0.5 or 50%: measured on the device, one sample at a time. Needs "
            "--allocate mip.",
        ),
        click.option(
            "--max-drop",
            type=POINTS,
            metavar="P",
            help="Find the fewest multiply-accumulates that lose at most P points on the evaluation samples: of "
            "accuracy, or without labels of agreement with the original.",
        ),
        click.option(
            "--threshold",
            type=float,
            metavar="T",
            help="Remove every unit whose score is below T, in the units of the chosen importance.",
        ),
    )
    command = planning_options(command)
    for option in reversed(options):
        command = option(command)
    return command


def planning_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How units are judged and how a budget is spread."""
    options = (
        importance_option,
        click.option(
            "--scores",
            type=MODEL,
            metavar="S.npz",
            help="Take the scores that the score command wrote for this model, in place of --importance.",
        ),
        click.option(
            "--allocate",
            type=click.Choice(["mip", "global", "uniform"]),
            default="mip",
            show_default=True,
            help="How a budget is spread: by a mixed-integer program over measured losses, by the lowest scores "
            "wherever they are, or as the same share of every group.",
        ),
        refit_option,
        click.option(
            "--align",
            callback=alignment,
            default="auto",
            show_default=True,
            metavar="auto|N",
            help="Keep channels in multiples of N where a group has that many; auto takes the step that was measured "
            "to pay on the device, for convolutions.",
        ),
        click.option(
            "--floor",
            callback=floor,
            default="0",
            show_default=True,
            metavar="R",
            help="Least share to keep of every group, as 0.1 or 10%.",
        ),
        click.option(
            "--limits",
            cls=PlugInOption,
            registry="onnx_oamip.planning.limits",
            purpose="Most that any plan may take from a group",
            default="none",
            show_default=True,
            metavar="NAME",
        ),
        click.option(
            "--protect",
            callback=protected,
            default="0",
            show_default=True,
            metavar="R",
            help="Share of every group that no plan may touch, as 0.1 or 10%: the units that following layers weigh "
            "most.",
        ),
        click.option(
            "--exclude",
            multiple=True,
            metavar="PATTERN",
            help="Leave alone what matches this shell pattern, such as 'conv1*'; may be given more than once.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def check_paths(output: Path, inputs: Mapping[str, Path | str | None]) -> None:
    """Raises OutputError where the output is one of the files that are read; names say how each was given."""
    for name, source in inputs.items():
        if source is not None and same_file(output, source):
            raise OutputError(f"{output} is {name} itself; give -o another path.")


def same_file(a: Path | str, b: Path | str) -> bool:
    """Both name one file, whether it exists or not."""
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):  # a configuration can name what no file is called
        return os.path.abspath(a) == os.path.abspath(b)


def check_scores(ctx: click.Context, scores: Path | None) -> None:
    """Raises SettingsError where scores are given and an importance is asked for."""
    asked = ctx.get_parameter_source("importance")
    if scores is not None and asked is click.core.ParameterSource.COMMANDLINE:
        raise SettingsError("--scores says already how units are scored; leave out --importance.")
