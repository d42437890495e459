"""Options that several commands share and that are no settings, and checks of the paths that are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from onnx_oamip.cli.help import option
from onnx_oamip.core.errors import OutputError, SettingsError
from onnx_oamip.core.regular_files import same_file


class FilePath(click.Path):
    """A path. A dash, by which other programs mean stdin or stdout, is refused."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        """Check a path.

        Args:
            value: Text of the command line.
            param: Option that it was given for.
            ctx: Context of the command.

        Returns:
            The path.

        Raises:
            BadParameter: The path is a dash.
        """
        if value == "-":
            self.fail(DASH, param, ctx)
        return super().convert(value, param, ctx)


DASH = "stdin and stdout hold no files here; give the path of a file, or ./- for one of that name."
MODEL = FilePath()
DATA = "FILE|FOLDER|MODULE:FUNCTION"


def data_option(purpose: str, *, required: bool = False) -> Callable[..., Any]:
    """Create the option ``--data``.

    Args:
        purpose: Sentence about the samples.
        required: The command does not do without.

    Returns:
        A decorator, as ``click.option`` returns it.
    """
    return option("--data", heading="Data", required=required, metavar=DATA, help=purpose)


eval_option = option(
    "--eval-data",
    heading="Data",
    metavar=DATA,
    help="Samples to measure the result on, in the same form. Default: the keys of --data that start with 'eval.', "
    "or else a fifth of --data, held out from calibration.",
)
scores_option = option(
    "--scores",
    heading="What to remove",
    type=MODEL,
    metavar="S.npz",
    help="Take the scores that the score command wrote for this model, in place of --importance.",
)


def samples_options(purpose: str, *, required: bool = False) -> Callable[..., Any]:
    """Create the options ``--data`` and ``--eval-data``.

    Args:
        purpose: Sentence about the samples.
        required: The command does not do without samples.

    Returns:
        A decorator that adds both.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        with_both: Callable[..., Any] = data_option(purpose, required=required)(
            eval_option(function)
        )
        return with_both

    return add


report_option = option(
    "--report",
    "report_file",
    heading="Output",
    type=MODEL,
    metavar="R.html",
    help="Write a page with tables and charts too: one file, to read offline or to print.",
)
json_option = option(
    "--json",
    "as_json",
    heading="Output",
    is_flag=True,
    help="Print one JSON document on stdout, no tables.",
)
quiet_option = option(
    "-q",
    "--quiet",
    heading="Output",
    is_flag=True,
    help="Print no tables and no progress; errors still go to stderr.",
)


def check_paths(output: Path, inputs: Mapping[str, Path | str | None]) -> None:
    """Refuse to write over a file that is read.

    Args:
        output: File to write.
        inputs: Files that are read, by how each was given.

    Raises:
        OutputError: The output is one of the inputs.
    """
    for name, source in inputs.items():
        if source is not None and same_file(output, source):
            raise OutputError(f"{output} is {name} itself; give -o another path.")


def check_scores(ctx: click.Context, scores: Path | None) -> None:
    """Refuse scores together with a method to score by.

    Args:
        ctx: Context of the command.
        scores: File of scores, if one was given.

    Raises:
        SettingsError: An importance was given besides.
    """
    source = ctx.get_parameter_source("importance")
    if scores is not None and source is click.core.ParameterSource.COMMANDLINE:
        raise SettingsError("--scores says already how units are scored; leave out --importance.")
