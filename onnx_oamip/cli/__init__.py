"""The command line: parse, call, render. Nothing here knows how pruning works.

Everything heavy is imported inside the commands, so that help and usage errors answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from ..errors import OamipError
from .commands import cli

__all__ = ["cli", "main"]

INTERRUPTED = 130


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
    except MemoryError as error:
        return _fail(
            f"the memory of this machine is not enough ({error}); give smaller inputs, fewer samples or a smaller "
            "--batch-size.", OamipError.exit_code,
        )  # fmt: skip
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted.", INTERRUPTED)
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int) -> int:
    text = " ".join(message.split())
    click.echo(f"Error: {text}{'' if text.endswith(('.', '?')) else '.'}", err=True)
    return status
