"""The option ``--output``: the path of the file to write, and statements about the outputs of the model.

A value of the form ``NAME=KIND`` or ``NAME=KIND:WEIGHT`` with a known kind is a statement; any other value is the path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from onnx_oamip.cli.help import Option, option
from onnx_oamip.cli.options import DASH

HEADING = "What must be kept"
IN_FILE = "onnx_oamip.outputs"
"""Key of a context's ``meta``: the statements of a configuration file."""
_STATEMENT = re.compile(
    r"(?P<name>.+)=(?P<kind>(?:classes|binary|values|embedding|ignore)(?::[^:=/\\]*)?)", re.DOTALL
)
_KINDS = "classes, binary, values, embedding or ignore"
_HELP = (
    f"NAME=KIND[:WEIGHT] says what an output of the model holds ({_KINDS}) and how much it counts; may be given more "
    "than once."
)


class OutputOption(Option):
    """An option that takes at most one path, and any number of statements, which set the parameter ``outputs``."""

    sets = ("outputs",)

    def __init__(
        self,
        *arguments: Any,
        path: bool = True,
        **attributes: Any,
    ) -> None:
        """Create the option.

        Args:
            arguments: As for ``click.Option``.
            path: The option takes a path besides statements.
            attributes: Further arguments of ``click.Option``.
        """
        super().__init__(*arguments, multiple=True, callback=_sort, **attributes)
        self.takes_path = path


def output_option(
    metavar: str,
    purpose: str,
    *,
    required: bool = False,
) -> Callable[..., Any]:
    """Create the option ``--output`` of a command that writes a file.

    Args:
        metavar: Placeholder of the path.
        purpose: Sentence about the file.
        required: There must be a path.

    Returns:
        A decorator, as ``click.option`` returns it.
    """
    return option(
        "-o",
        "--output",
        cls=OutputOption,
        heading="Output",
        required=required,
        metavar=f"{metavar}|NAME=KIND",
        help=f"{purpose} {_HELP}",
    )


statements_option = option(
    "--output",
    cls=OutputOption,
    path=False,
    heading=HEADING,
    expose_value=False,
    metavar="NAME=KIND[:WEIGHT]",
    help=f"What an output of the model holds ({_KINDS}) and how much it counts; may be given more than once.",
)
"""The option of commands that write no file."""


def _sort(
    ctx: click.Context,
    param: click.Parameter,
    values: tuple[str, ...],
) -> Path | None:
    """Return the path, and set the parameter ``outputs`` of the command if there are statements."""
    assert isinstance(param, OutputOption)
    statements: dict[str, str] = dict(ctx.meta.get(IN_FILE, {}))
    stated: dict[str, str] = {}
    paths = []
    for text in values:
        match = _STATEMENT.fullmatch(text)
        if match is None:
            paths.append(text)
        elif stated.setdefault(match["name"], match["kind"]) != match["kind"]:
            message = f"{text!r} contradicts '{match['name']}={stated[match['name']]}'; give one of the two."
            raise click.BadParameter(message, ctx, param)
    statements.update(stated)
    if statements:
        ctx.params["outputs"] = checked(statements, ctx, param)
    if paths and not param.takes_path:
        message = (
            f"{paths[0]!r} is not a statement about an output; give NAME=KIND, kinds are {_KINDS}."
        )
        raise click.BadParameter(message, ctx, param)
    if "-" in paths:
        raise click.BadParameter(DASH, ctx, param)
    if len(paths) > 1:
        message = (
            f"{paths[0]!r} and {paths[1]!r} are two paths; give one, and statements as NAME=KIND."
        )
        raise click.BadParameter(message, ctx, param)
    if param.required and not paths:
        raise click.MissingParameter(ctx=ctx, param=param)
    return Path(paths[0]) if paths else None


def checked(
    statements: Mapping[str, object],
    ctx: click.Context,
    param: click.Parameter,
) -> dict[str, str]:
    """Check statements as the settings do.

    Args:
        statements: Kinds with weights by name.
        ctx: Context of the command.
        param: The option, for messages.

    Returns:
        The statements.

    Raises:
        BadParameter: One of them is no kind with a weight above 0.
    """
    from onnx_oamip.core.options.values import kind_and_weight

    result = {}
    for name, text in statements.items():
        try:
            kind_and_weight(str(text))
        except ValueError:
            message = (
                f"'{name}={text}' does not say what an output holds; give KIND or KIND:WEIGHT, with a weight above 0 "
                f"and a kind of {_KINDS}."
            )
            raise click.BadParameter(message, ctx, param) from None
        result[name] = str(text)
    return result
