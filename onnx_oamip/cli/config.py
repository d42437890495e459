"""Configuration files with the names of the options, and the command that prints the configuration in effect.

A file is flat TOML: ``macs = 0.5``, ``importance = "oamip"``, ``exclude = ["conv1*"]``. A command takes from it the
options that it has. The command line takes precedence over the file, and the file over the defaults. The table
``outputs`` holds statements about outputs of the model: ``outputs = { boxes = "values:0.5" }``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from onnx_oamip.cli.help import option
from onnx_oamip.cli.options import json_option
from onnx_oamip.cli.statements import IN_FILE, OutputOption
from onnx_oamip.cli.stdout import stream
from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.toml_files import read, statements, unknown

PLACEHOLDER = "placeholder"
"""Value of required parameters of a command that is parsed and not run."""
_NOT_IN_FILES = {"help", "config", "version"}


def options(command: click.Command) -> Iterator[tuple[str, click.Option]]:
    """List the options of a command that a file may set.

    Args:
        command: A command.

    Yields:
        Long name without the dashes, and the option.
    """
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            name = next((o[2:] for o in parameter.opts if o.startswith("--")), None)
            if name is not None and name not in _NOT_IN_FILES:
                yield name, parameter


def _load(
    ctx: click.Context,
    _: click.Parameter,
    path: Path | None,
) -> Path | None:
    """Take defaults of the command from a file. Raises SettingsError for a value that cannot be used."""
    if path is None:
        return None
    content = read(path)
    ctx.meta[IN_FILE] = statements(content.pop("outputs", {}), path)
    _check_names(ctx, path, content)
    ctx.default_map = {**(ctx.default_map or {}), **defaults(ctx.command, content, path)}
    return path


def defaults(command: click.Command, content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Take the options of a command from the content of a file.

    Args:
        command: The command.
        content: Values by the name of an option; names that the command has not are left out.
        path: The file, for messages.

    Returns:
        Defaults by the name of the parameter, as click takes them.

    Raises:
        SettingsError: A value has another type than the option.
    """
    found = {}
    for name, parameter in options(command):
        if name in content and parameter.name is not None:
            try:
                found[parameter.name] = _as_on_the_command_line(parameter, content[name])
            except ValueError as error:
                raise SettingsError(
                    f"the configuration {path} sets {name} to {content[name]!r}; it is {error}."
                ) from error
    return found


def _check_names(
    ctx: click.Context,
    path: Path,
    content: Mapping[str, Any],
) -> None:
    """Raises SettingsError for a name that no command has, and for a table."""
    group = ctx.parent.command if ctx.parent is not None else ctx.command
    commands = group.commands.values() if isinstance(group, click.Group) else [ctx.command]
    known = {name for command in commands for name, _ in options(command)}
    for name, value in content.items():
        if name not in known:
            raise unknown(name, known, f"the configuration {path} sets", "no option of any command")
        if isinstance(value, dict):
            raise SettingsError(
                f"the configuration {path} has a table '{name}'; nested tables are not supported."
            )


def _as_on_the_command_line(parameter: click.Option, value: Any) -> Any:
    """Turn a value of a file into one of the command line. Raises ValueError with the expectation."""
    if isinstance(value, str) and isinstance(parameter, OutputOption):
        return [value]
    separator = getattr(parameter.type, "separator", "")
    if isinstance(value, list) and separator:
        return separator.join(map(str, value))
    if isinstance(value, list) != parameter.multiple:
        raise ValueError(
            "one value, not a list" if isinstance(value, list) else "a list, in brackets"
        )
    if isinstance(value, bool) != bool(parameter.is_flag):
        raise ValueError("true or false" if parameter.is_flag else "no switch")
    # Dates and infinity too are read as on the command line.
    if isinstance(value, (bool, list)):
        return value
    return str(value)


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
    ctx: click.Context,
    command: str,
    path: Path | None,
    schema: bool,
    as_json: bool,
) -> None:
    """Show the configuration in effect: every option of a command with its value, as a file to start from.

    Options without a value are comments. With --json, one object with the value and where it comes from.
    """
    if schema:
        from onnx_oamip.core.settings import Settings

        click.echo(json.dumps(Settings.schema_document(), indent=2), file=stream())
        return
    group = ctx.parent.command if ctx.parent is not None else None
    shown = group.commands.get(command) if isinstance(group, click.Group) else None
    if shown is None:
        raise SettingsError(f"there is no command '{command}'; see 'onnx-oamip --help'.")
    rows = _in_effect(ctx, shown, command, path)
    if as_json:
        document = {"schema_version": 1, "command": command, "options": rows}
        click.echo(json.dumps(document, indent=2), file=stream())
        return
    click.echo(f"# onnx-oamip {command}", file=stream())
    for name, row in rows.items():
        if row["value"] in (None, [], {}):
            click.echo(f"# {name} =", file=stream())
            continue
        value = _toml(row["value"])
        note = f"  # from {path}" if row["source"] == "file" else ""
        click.echo(f"{name} = {value}{note}", file=stream())


def _in_effect(
    ctx: click.Context,
    command: click.Command,
    name: str,
    path: Path | None,
) -> dict[str, dict[str, Any]]:
    """Value and source of every option of a command, by its long name."""
    given = [] if path is None else ["--config", str(path)]
    for parameter in command.params:  # the command is not run: required values are placeholders
        if isinstance(parameter, click.Argument):
            given.append(PLACEHOLDER)
        elif parameter.required:
            given.extend((parameter.opts[-1], PLACEHOLDER))
    inner = command.make_context(name, given, parent=ctx.parent)
    rows = {}
    for option_name, parameter in options(command):
        if parameter.required or parameter.name is None:
            continue
        source = inner.get_parameter_source(parameter.name)
        from_file = source is click.core.ParameterSource.DEFAULT_MAP
        rows[option_name] = {
            "value": _plain(inner.params.get(parameter.name)),
            "source": "file" if from_file else "default",
        }
        if isinstance(parameter, OutputOption):
            statements = inner.params.get("outputs", {})
            rows["outputs"] = {"value": statements, "source": "file" if statements else "default"}
    return rows


def _toml(value: Any) -> str:
    """A value as TOML has it, which for all but tables is how JSON has it."""
    if not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    entries = (f"{_toml(name)} = {_toml(item)}" for name, item in value.items())
    return f"{{ {', '.join(entries)} }}"


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    return value
