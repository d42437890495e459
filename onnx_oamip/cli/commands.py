"""The group of all commands, and the commands with few options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnx_oamip.cli.checkpoint import checkpoint
from onnx_oamip.cli.compare import compare
from onnx_oamip.cli.config import config, config_option
from onnx_oamip.cli.frontier import frontier
from onnx_oamip.cli.int8 import int8
from onnx_oamip.cli.options import MODEL, data_option, json_option
from onnx_oamip.cli.pack import pack, unpack
from onnx_oamip.cli.profile import profile
from onnx_oamip.cli.prune import apply, plan, prune
from onnx_oamip.cli.recover import recover
from onnx_oamip.cli.run import run
from onnx_oamip.cli.score import score
from onnx_oamip.cli.settings import SettingsCommand, timing_options
from onnx_oamip.cli.statements import statements_option
from onnx_oamip.cli.stdout import document_only, reader_may_go
from onnx_oamip.cli.terminal import Progress, note, show
from onnx_oamip.core.command_settings import VERIFY, CommandSettings
from onnx_oamip.core.version import __version__


class Commands(click.Group):
    """Group of commands, listed in the order of a user's work, with stdout reserved for their documents."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command; other text that is printed while it runs goes to stderr.

        Args:
            cmd: The command.
            name: Its name; that of the command itself by default.
        """
        if cmd.callback is not None:
            cmd.callback = document_only(cmd.callback)
        super().add_command(cmd, name)

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """Parse the options in front of the command, which may print help.

        Args:
            *arguments: As for any command of click.
            **options: As for any command of click.

        Returns:
            The context.

        Raises:
            ReaderGone: The reader of stdout has gone away.
        """
        with reader_may_go():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Parse the options of a command, and run it.

        Args:
            ctx: Context of the group.

        Returns:
            The exit status, or None for 0.

        Raises:
            ReaderGone: The reader of stdout has gone away.
        """
        with reader_may_go():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """List the commands in the order in which they were added.

        Args:
            ctx: Context of the group; not used.

        Returns:
            Their names.
        """
        return list(self.commands)


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
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


@cli.command(cls=SettingsCommand, settings=CommandSettings(names=("task", "shape")))
@click.argument("model", type=MODEL)
@statements_option
@json_option
@config_option
def inspect(model: Path, as_json: bool, **choices: Any) -> None:
    """Show which channels of MODEL can be removed, which cannot and why, and by what a pruned model is judged."""
    from onnx_oamip.api import in_memory
    from onnx_oamip.graph.cost import uncounted_note

    found = in_memory.inspect(model, **choices)
    uncounted = uncounted_note(found.model)
    if uncounted:
        note(uncounted)
    show(found.document, as_json)


cli.add_command(prune)
cli.add_command(score)
cli.add_command(plan)
cli.add_command(apply)
cli.add_command(recover)
cli.add_command(int8)
cli.add_command(run)
cli.add_command(checkpoint)
cli.add_command(frontier)


@cli.command(cls=SettingsCommand, settings=VERIFY)
@click.argument("original", type=MODEL)
@click.argument("pruned", type=MODEL)
@data_option(
    "Samples to compare on: as for prune; where a file has keys that start with 'eval.', those are used.",
    required=True,
)
@statements_option
@json_option
@config_option
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    *,
    original: Path,
    pruned: Path,
    data: str,
    as_json: bool,
    **choices: Any,
) -> None:
    """Run ORIGINAL and PRUNED side by side on the same samples.

    The exit status is 1 where a check of the pruned model does not hold.
    """
    from onnx_oamip.api import comparison
    from onnx_oamip.core.settings import Settings
    from onnx_oamip.graph.loading import load
    from onnx_oamip.reporting import documents

    settings = Settings.create(**choices)
    with Progress() as progress:
        verification = comparison.compare(original, pruned, data, settings, progress=progress)
    before, after = (load(path, stated=settings.shapes) for path in (original, pruned))
    show(documents.comparison(before, after, verification), as_json)
    if verification.failures:
        ctx.exit(1)


@cli.command(
    cls=SettingsCommand,
    settings=CommandSettings(names=("device", "op_library", "seed", "shape")),
)
@click.argument("models", type=MODEL, nargs=-1, required=True, metavar="MODEL [MODEL ...]")
@timing_options(
    model="the first model",
    measured=" at each batch size, all models together",
    several_batches=True,
)
@json_option
def bench(
    *,
    models: tuple[Path, ...],
    data: str | None,
    batches: tuple[int, ...],
    threads: int | None,
    seconds: float,
    device: str,
    op_library: tuple[str, ...],
    seed: int,
    shape: tuple[str, ...],
    as_json: bool,
) -> None:
    """Time models side by side: latency, throughput and peak memory.

    The models take turns in random order in one run, so that other load on the machine affects all of them alike. The
    others are compared with the first MODEL.
    """
    from onnx_oamip.core.settings import Settings
    from onnx_oamip.reporting import documents
    from onnx_oamip.verification import benchmark

    stated = Settings.create(shape=shape).shapes
    with Progress() as progress:
        result = benchmark.run(
            models,
            data,
            batches,
            device=device,
            threads=threads,
            seconds=seconds,
            seed=seed,
            progress=progress,
            stated=stated,
            op_library=op_library,
        )
    show(documents.benchmark(result), as_json)


cli.add_command(compare)
cli.add_command(profile)
cli.add_command(pack)
cli.add_command(unpack)


@cli.command()
@json_option
def ops(as_json: bool) -> None:
    """List the operators whose channels can be followed."""
    from onnx_oamip.reporting import documents

    show(documents.operators(), as_json)


@cli.command()
@json_option
def solvers(as_json: bool) -> None:
    """List the installed solvers and the limits of their licences."""
    from onnx_oamip.programs import solvers as backends
    from onnx_oamip.reporting import documents

    show(documents.solvers(backends.available()), as_json)


@cli.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, /, *, as_json: bool) -> None:
    """Show versions, devices, solvers and the cache, and prune a tiny network on every device.

    The exit status is 1 if something that the package needs does not work.
    """
    with Progress():
        from onnx_oamip.api.doctor import diagnose

        found = diagnose()
    show(found.document, as_json)
    if found.problems:
        ctx.exit(1)


cli.add_command(config)
