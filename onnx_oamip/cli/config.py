"""A configuration file with the command line's own names, and the command that shows the one in effect.

The file is flat TOML: ``macs = 0.5``, ``importance = "oamip"``, ``exclude = ["conv1*"]``. Every command takes from it
the options that it has. What stands on the command line wins over the file, the file over the defaults.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from onnx_oamip.cli.help import option
from onnx_oamip.cli.options import json_option
from onnx_oamip.cli.stdout import stream
from onnx_oamip.core.errors import SettingsError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NOT_IN_FILES = {"help", "config", "version"}


def read(path: Path) -> dict[str, Any]:
    """The content of a file, by option name without the dashes. Raises SettingsError for what is not TOML."""
    try:
        with path.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise SettingsError(
            f"the configuration {path} cannot be read: {error.strerror}."
        ) from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # numbers of thousands of digits, brackets in brackets, no TOML
        raise SettingsError(f"the configuration {path} is no valid TOML: {error}.") from error


def _load(ctx: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    """Take defaults of the command from a file. Raises SettingsError for a name that no command has."""
    if path is None:
        return None
    content = read(path)
    group = ctx.parent.command if ctx.parent is not None else ctx.command
    commands = group.commands.values() if isinstance(group, click.Group) else [ctx.command]
    known = {name for command in commands for name, _ in options(command)}
    for name, value in content.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; is it {close[0]}" if close else ""
            raise SettingsError(
                f"the configuration {path} sets '{name}', which is no option of any command{hint}?"
            )
        if isinstance(value, dict):
            raise SettingsError(
                f"the configuration {path} has a table '{name}'; options stand side by side in it."
            )
    here = dict(options(ctx.command))
    found = {
        p.name: content[name] for name, p in here.items() if name in content and p.name is not None
    }
    for name, value in found.items():
        parameter = next(p for p in here.values() if p.name == name)
        separator = getattr(parameter.type, "separator", "")
        if isinstance(value, list) and separator:
            found[name] = separator.join(map(str, value))
            continue
        if isinstance(value, list) != parameter.multiple:
            what = "one value, not a list" if isinstance(value, list) else "a list, in brackets"
            raise SettingsError(
                f"the configuration {path} sets {parameter.opts[-1][2:]} to {value!r}; it is {what}."
            )
        if isinstance(value, bool) != bool(parameter.is_flag):
            what = "true or false" if parameter.is_flag else "no switch"
            raise SettingsError(
                f"the configuration {path} sets {parameter.opts[-1][2:]} to {value!r}; it is {what}."
            )
        if not isinstance(value, (bool, list)):
            found[name] = str(value)  # dates, infinity: read as on the command line
    ctx.default_map = {**(ctx.default_map or {}), **found}
    return path


def options(command: click.Command) -> Iterator[tuple[str, click.Option]]:
    """(name as on the command line, option) of all that a file may set."""
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            name = next((o[2:] for o in parameter.opts if o.startswith("--")), None)
            if name is not None and name not in _NOT_IN_FILES:
                yield name, parameter


config_option = option(
    "--config",
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_load,
    metavar="FILE.toml",
    help="Take options from this file, under their names without the dashes; those given here win.",
)


@click.command()
@click.option(
    "--of",
    "command",
    default="prune",
    show_default=True,
    metavar="COMMAND",
    help="Whose options to show.",
)
@click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="The file in effect.",
)
@click.option("--schema", is_flag=True, help="Print the JSON schema of the settings instead.")
@json_option
@click.pass_context
def config(
    ctx: click.Context, command: str, path: Path | None, schema: bool, as_json: bool
) -> None:
    """Show the configuration in effect: every option of a command with its value, as a file to start from.

    Options without a value are comments. With --json, one object with the value and where it comes from.
    """
    if schema:
        from onnx_oamip.core.settings import Settings

        click.echo(json.dumps(Settings.schema_document(), indent=2), file=stream())
        return
    group = ctx.parent.command if ctx.parent is not None else None
    found = group.commands.get(command) if isinstance(group, click.Group) else None
    if found is None:
        raise SettingsError(f"there is no command '{command}'; see 'onnx-oamip --help'.")
    given = [] if path is None else ["--config", str(path)]
    needed = [p for p in found.params if isinstance(p, click.Argument) or p.required]
    for parameter in needed:  # it is not run: what it needs does not matter
        parameter_value = (
            ["-"] if isinstance(parameter, click.Argument) else [parameter.opts[-1], "-"]
        )
        given.extend(parameter_value)
    inner = found.make_context(command, given, parent=ctx.parent)
    rows = {}
    for name, parameter in options(found):
        if parameter.required or parameter.name is None:
            continue
        value = inner.params.get(parameter.name)
        source = inner.get_parameter_source(parameter.name)
        from_file = source is click.core.ParameterSource.DEFAULT_MAP
        rows[name] = {"value": _plain(value), "source": "file" if from_file else "default"}
    if as_json:
        click.echo(
            json.dumps({"schema_version": 1, "command": command, "options": rows}, indent=2),
            file=stream(),
        )
        return
    click.echo(f"# onnx-oamip {command}", file=stream())
    for name, row in rows.items():
        text = "" if row["value"] in (None, []) else json.dumps(row["value"], ensure_ascii=False)
        note = f"  # from {path}" if row["source"] == "file" else ""
        click.echo(f"{name} = {text}{note}" if text else f"# {name} =", file=stream())


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
