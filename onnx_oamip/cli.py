"""The command line: parse, call, render. Nothing here knows how pruning works.

Everything heavy is imported inside the commands, so that help and usage errors answer at once.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .errors import OamipError, OutputError

if TYPE_CHECKING:
    from .report import Document

INTERRUPTED = 130


def _share(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """A share to keep: above 0 and at most 1, or a percentage with its sign."""
    if value is None:
        return None
    text = value.strip()
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= 1:
        message = f"{text!r} is not a share to keep; give a number above 0 and at most 1, or a percentage such as 50%."
        raise click.BadParameter(message, ctx, param)
    return number


def _method(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """The name of an importance method, looked up in the registry."""
    from .importance import METHODS

    if value not in METHODS:
        raise click.BadParameter(f"{value!r} is not one of {', '.join(METHODS)}.", ctx, param)
    return value


class _MethodOption(click.Option):
    """Its help names every method of the registry, with what it measures."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        from .importance import METHODS

        self.help = "How units are scored: " + "; ".join(f"{n}, {m.summary}" for n, m in METHODS.items()) + "."
        return super().get_help_record(ctx)


class _Commands(click.Group):
    """Lists the commands in the order of a user's work, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.commands)


_MODEL = click.Path(path_type=Path)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout instead of tables.")
_DEVICE = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the model runs; auto takes CUDA where it works, and asking for cuda where it does not is an error.",
)
_BATCH = click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    metavar="N",
    help="Samples that the model is run on at a time; a model with a fixed batch keeps its own.",
)


@click.group(
    cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, package_name="onnx-oamip", prog_name="onnx-oamip")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Prune a trained ONNX model to a budget, without retraining.

    Exit status: 0 done; 1 a budget or a check was not met; 2 wrong usage, bad input or a missing environment.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


@cli.command()
@click.argument("model", type=_MODEL)
@_JSON
def inspect(model: Path, as_json: bool) -> None:
    """Show what of MODEL can go, what cannot, and why."""
    from . import report
    from .coupling import couple
    from .model import load

    loaded = load(model)
    _print(report.inspection(loaded, couple(loaded)), as_json)


@cli.command()
@click.argument("model", type=_MODEL)
@click.option(
    "--data",
    metavar="FILE|MODULE:FUNCTION",
    help="Calibration samples: an .npz or .npy file with arrays by input name, or a function that yields feeds. "
    "Methods that look at activations need it, and so do --refit bias and the checks of accuracy.",
)
@click.option(
    "--eval-data",
    metavar="FILE|MODULE:FUNCTION",
    help="Samples to measure the result on, in the same form. Default: the keys of --data that start with 'eval.', "
    "or else a fifth of --data, held out from calibration.",
)
@click.option("-o", "--output", type=_MODEL, required=True, metavar="OUT.onnx", help="Where the pruned model goes.")
@click.option("--macs", callback=_share, metavar="R", help="Share of the multiply-accumulates to keep, as 0.5 or 50%.")
@click.option("--params", callback=_share, metavar="R", help="Share of the parameters to keep, as 0.5 or 50%.")
@click.option("--size", callback=_share, metavar="R", help="Share of the file's bytes to keep, as 0.5 or 50%.")
@click.option(
    "--threshold",
    type=float,
    metavar="T",
    help="Remove every unit whose score is below T, in the units of the chosen importance.",
)
@click.option(
    "--importance",
    cls=_MethodOption,
    callback=_method,
    default="activation",
    show_default=True,
    metavar="NAME",
)
@click.option(
    "--allocate",
    type=click.Choice(["uniform", "global"]),
    default="uniform",
    show_default=True,
    help="How a budget is spread: the same share of every group, or the lowest scores wherever they are.",
)
@click.option(
    "--refit",
    type=click.Choice(["none", "bias"]),
    default="bias",
    show_default=True,
    help="How the rest makes up for what went: not at all, or by its mean folded into the biases of what follows.",
)
@click.option(
    "--align",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Keep channels in multiples of N where a group has that many.",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Leave alone what matches this shell pattern, such as 'conv1*'; may be given more than once.",
)
@_DEVICE
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Seed of everything random; the same seed gives the same model.",
)
@_BATCH
@_JSON
@click.option("-q", "--quiet", is_flag=True, help="Print no tables and no progress; errors still go to stderr.")
def prune(
    model: Path, data: str | None, eval_data: str | None, output: Path, as_json: bool, quiet: bool, **choices: Any
) -> None:
    """Write a smaller MODEL to OUT.onnx that meets the budgets, and report what was done.

    At least one of --macs, --params, --size and --threshold says how much goes. With more than one, all are met.
    Nothing is written unless every check holds.
    """
    from . import pipeline, report
    from .settings import Settings

    for name, source in (("the model", model), ("--data", data), ("--eval-data", eval_data)):
        if source is not None and _same_file(output, source):
            raise OutputError(f"{output} is {name} itself; give -o another path.")
    settings = Settings.create(**choices)
    with _Progress(quiet) as progress:
        result = pipeline.prune(model, data, output, settings, eval_data=eval_data, progress=progress)
    if as_json or not quiet:
        _print(report.document(result), as_json)


@cli.command()
@click.argument("original", type=_MODEL)
@click.argument("pruned", type=_MODEL)
@click.option(
    "--data",
    required=True,
    metavar="FILE|MODULE:FUNCTION",
    help="Samples to compare on: as for prune; where a file has keys that start with 'eval.', those are used.",
)
@_DEVICE
@_BATCH
@_JSON
@click.pass_context
def verify(
    ctx: click.Context, original: Path, pruned: Path, data: str, as_json: bool, device: str, batch_size: int
) -> None:
    """Run ORIGINAL and PRUNED side by side on the same samples.

    The exit status is 1 where a check of the pruned model does not hold.
    """
    from . import pipeline, report
    from .model import load
    from .settings import Settings

    settings = Settings.create(device=device, batch_size=batch_size)
    with _Progress() as progress:
        verification = pipeline.compare(original, pruned, data, settings, progress=progress)
    _print(report.comparison(load(original), load(pruned), verification), as_json)
    if verification.failures:
        ctx.exit(1)


@cli.command()
@_JSON
def ops(as_json: bool) -> None:
    """List the operators whose channels can be followed."""
    from . import report

    _print(report.operators(), as_json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; every failure is one sentence on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = cli.main(arguments, prog_name="onnx-oamip", standalone_mode=False)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except OamipError as error:
        return _fail(str(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted.", INTERRUPTED)
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int) -> int:
    text = " ".join(message.split())
    click.echo(f"Error: {text}{'' if text.endswith(('.', '?')) else '.'}", err=True)
    return status


def _print(document: Document, as_json: bool) -> None:
    from . import report

    if as_json:
        click.echo(report.dumps(document))
        return
    from rich.console import Console

    from . import tables

    tables.show(document, Console(highlight=False, markup=False, emoji=False))


def _same_file(a: Path, b: Path | str) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return os.path.abspath(a) == os.path.abspath(b)


class _Progress:
    """A line on stderr for work that takes over a second; nothing where stderr is not a terminal."""

    DELAY = 1.0

    def __init__(self, quiet: bool = False) -> None:
        self._wanted = not quiet and sys.stderr.isatty()
        self._lock = threading.Lock()
        self._tasks: dict[str, Any] = {}
        self._display: Any = None
        self._timer: threading.Timer | None = None

    def __enter__(self) -> _Progress:
        if self._wanted:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._display = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._timer = threading.Timer(self.DELAY, self._start)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._display is None:
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._display.add_task(stage, total=total)
        self._display.update(self._tasks[stage], completed=done, total=total)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            if self._display is not None:
                self._display.stop()
            self._wanted = False

    def _start(self) -> None:
        with self._lock:
            if self._wanted:
                self._display.start()
