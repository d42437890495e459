"""The command ``run``: the stages prune, recover and int8, and checks, as one file describes them.

The file is TOML. Names at the top are those of a configuration file and hold for every stage that has them;
``[prune]``, ``[recover]`` and ``[int8]`` describe the stages that run, by the options of the command of that name;
``[check]`` has the options of ``verify`` and the limits for the last model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnx_oamip.cli.config import PLACEHOLDER, defaults, options, read, statements, unknown
from onnx_oamip.cli.help import Command, option
from onnx_oamip.cli.options import MODEL, json_option, quiet_option, report_option, same_file
from onnx_oamip.cli.settings import SettingType
from onnx_oamip.cli.statements import IN_FILE
from onnx_oamip.cli.terminal import Progress, show
from onnx_oamip.core.errors import OutputError, SettingsError

if TYPE_CHECKING:
    from onnx_oamip.api.staged_run import Stages
    from onnx_oamip.core.records import Budget
    from onnx_oamip.core.settings import Settings

STAGES = ("prune", "recover", "int8")
"""Tables of the stages, each with the options of the command of its name."""
CHECK = "check"
LIMITS = ("macs", "params", "size", "latency", "max-drop")
"""Limits for the last model, named as the budgets of ``prune``."""
OWN = ("model", "data", "eval-data", "folder")
"""Names at the top of the file that are no settings."""
NOT_OF_STAGES = frozenset(
    {
        *OWN,
        "dry-run",
        "json",
        "keep-best",
        "keep-map",
        "mlflow",
        "original",
        "output",
        "plan",
        "quiet",
        "report",
        "scores",
    }
)
"""Options of the commands that name files or say what is printed: the run has its own."""


@dataclass(frozen=True)
class RunFile:
    """Content of a file that describes a run.

    Attributes:
        path: The file.
        own: Values of ``OWN`` that are given.
        shared: Settings for all stages.
        tables: Settings of the stages and of the checks, by name.
        outputs: Statements about outputs of the model.
    """

    path: Path
    own: Mapping[str, str]
    shared: Mapping[str, Any]
    tables: Mapping[str, Mapping[str, Any]]
    outputs: Mapping[str, object]

    @property
    def folder(self) -> Path:
        """Folder that the stages write to: by default beside the file, and named after it."""
        return Path(self.own.get("folder", self.path.with_suffix("")))


@click.command(
    cls=Command,
    examples=("pipeline.toml", "pipeline.toml --report stages.html"),
)
@click.argument("file", type=MODEL, metavar="PIPELINE.toml")
@option(
    "--again",
    heading="Speed and resources",
    is_flag=True,
    help="Run every stage, also those whose inputs and settings are unchanged.",
)
@report_option
@json_option
@quiet_option
@click.pass_context
def run(
    ctx: click.Context,
    /,
    *,
    file: Path,
    again: bool,
    report_file: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run the stages that PIPELINE.toml describes, and compare their models with the original.

    The file names model and data, and has a table [prune], [recover] or [int8] for every stage, with the options of
    that command; [check] has the limits for the last model. A stage whose inputs and settings are unchanged since the
    last run in the same folder is not run again. The exit status is 1 where a limit is broken.
    """
    given = load_run_file(ctx, file)
    if report_file is not None:
        from onnx_oamip.artifacts.output import check_output
        from onnx_oamip.reporting import html

        check_output(given.own["model"], report_file, (file, given.own["data"]), "--report")
    with Progress(quiet) as progress:
        from onnx_oamip.api import staged_run

        found = staged_run.run(
            given.own["model"],
            given.own["data"],
            given.folder,
            _stages(ctx, given),
            eval_data=given.own.get("eval-data"),
            again=again,
            progress=progress,
        )
    if report_file is not None:
        from onnx_oamip.core.atomic_files import write_bytes
        from onnx_oamip.reporting.side_by_side import stages

        write_bytes(html.compare_page(stages(found.document)), report_file)
    if as_json or not quiet:
        show(found.document, as_json)
    if found.broken:
        ctx.exit(1)


def load_run_file(ctx: click.Context, path: Path) -> RunFile:
    """Read the description of a run.

    Args:
        ctx: Context of the command.
        path: A TOML file.

    Returns:
        Its content.

    Raises:
        SettingsError: The file cannot be read, has a name that no stage has, or lacks the model or the data.
        OutputError: A stage would write over the model or the data.
    """
    content = read(path)
    outputs = statements(content.pop("outputs", {}), path)
    tables = {}
    for name in (*STAGES, CHECK):
        if isinstance(content.get(name), dict):
            tables[name] = content.pop(name)
    own = {}
    for name in OWN:
        if name in content:
            own[name] = _text(content.pop(name), name, path)
    for name in OWN[:2]:
        if name not in own:
            raise SettingsError(f'{path} names no {name}; add a line such as {name} = "FILE".')
    names = {name: set(_names(ctx, name)) for name in (*STAGES, CHECK)}
    _check(content, set().union(*names.values()) | set(OWN), f"{path} sets", "no option of a stage")
    for name, table in tables.items():
        _check(table, names[name], f"{path} sets in [{name}]", f"no option of {name}")
    found = RunFile(path, own, content, tables, outputs)
    for stage in STAGES:
        written = found.folder / f"{stage}.onnx"
        if any(same_file(written, read_file) for read_file in own.values()):
            raise OutputError(f"the stage {stage} would write over {written}; give another folder.")
    return found


def _text(value: object, name: str, path: Path) -> str:
    if not isinstance(value, str):
        raise SettingsError(
            f"{path} sets {name} to {value!r}; it is the path of a file, in quotes."
        )
    return value


def _check(content: Mapping[str, Any], known: set[str], where: str, what: str) -> None:
    """Raises SettingsError for a name that is not known, and for a table."""
    for name, value in content.items():
        if isinstance(value, dict):
            tables = ", ".join((*STAGES, CHECK, "outputs"))
            raise SettingsError(f"{where} '{name}' to a table; tables are {tables}.")
        if name not in known:
            raise unknown(name, known, where, what)


def _names(ctx: click.Context, table: str) -> Iterator[str]:
    """Names of the settings that a table may have."""
    if table == CHECK:
        yield from (*LIMITS, "seconds")
    for name, _ in options(_command(ctx, table)):
        if name not in NOT_OF_STAGES:
            yield name


def _command(ctx: click.Context, table: str) -> click.Command:
    """The command whose options a table has."""
    group = ctx.find_root().command
    assert isinstance(group, click.Group)
    return group.commands["verify" if table == CHECK else table]


def _stages(ctx: click.Context, given: RunFile) -> Stages:
    """Settings of all stages."""
    from onnx_oamip.api.staged_run import Stages
    from onnx_oamip.graph.quantisation import Int8Options

    parameters = {name: _parameters(ctx, given, name) for name in (*given.tables, CHECK)}
    settings = {name: _settings(values) for name, values in parameters.items()}
    if "int8" in parameters:
        names = Int8Options.__dataclass_fields__
        recipe = Int8Options(**{name: parameters["int8"][name] for name in names})
    else:
        recipe = Int8Options()
    check = given.tables.get(CHECK, {})
    return Stages(
        prune=settings.get("prune"),
        recover=settings.get("recover"),
        int8=settings.get("int8"),
        int8_options=recipe,
        check=settings[CHECK],
        limits=_limits(ctx, check),
        seconds=_number(ctx, "time_limit", check.get("seconds", 3.0)),
    )


def _parameters(ctx: click.Context, given: RunFile, table: str) -> dict[str, Any]:
    """Values of the options of a stage's command: those of its table, then those of all stages."""
    command = _command(ctx, table)
    content = {**given.shared, **given.tables.get(table, {})}
    taken = {name: value for name, value in content.items() if name not in NOT_OF_STAGES}
    # The command is parsed and not run: its files are placeholders.
    words = []
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            words.append(PLACEHOLDER)
        elif parameter.required:
            words.extend((parameter.opts[-1], PLACEHOLDER))
    ctx.meta[IN_FILE] = given.outputs
    found = command.make_context(
        table, words, parent=ctx.parent, default_map=defaults(command, taken, given.path)
    )
    return dict(found.params)


def _settings(parameters: Mapping[str, Any]) -> Settings:
    from onnx_oamip.core.settings import Settings

    known = Settings.model_fields
    return Settings.create(**{name: v for name, v in parameters.items() if name in known})


def _limits(ctx: click.Context, check: Mapping[str, Any]) -> Budget:
    from onnx_oamip.core.records import Budget

    names = {name: name.replace("-", "_") for name in LIMITS}
    return Budget(**{names[n]: _number(ctx, names[n], check[n]) for n in LIMITS if n in check})


def _number(ctx: click.Context, setting: str, value: object) -> float:
    """A number of the table of checks, read as the option of that setting is."""
    found: float = SettingType(setting).convert(
        value, click.Option([f"--{setting.replace('_', '-')}"]), ctx
    )
    return found
