"""The command line: parses options, calls the Python interface, and prints the result.

Heavy packages are imported inside the commands, so that help and usage errors are printed at once.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import click

from onnx_oamip.cli.commands import cli
from onnx_oamip.cli.flags import Flags
from onnx_oamip.cli.interrupt import (
    INTERRUPTED,
    TERMINATED,
    Terminated,
    signals_end_the_work,
)
from onnx_oamip.cli.stdout import reserve_stdout
from onnx_oamip.core.errors import OamipError

__all__ = ["cli", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; a failure is one sentence on stderr.

    Args:
        arguments: Command and options, for a call from Python. None takes those of the process, which then is the
            program ``onnx-oamip``: from here to its end, only the command writes to stdout.

    Returns:
        The exit status.
    """
    with reserve_stdout() if arguments is None else nullcontext():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with signals_end_the_work(), _no_numeric_warnings():
            status = cli.main(arguments, prog_name="onnx-oamip", standalone_mode=False)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except OamipError as error:
        return _fail(str(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        if isinstance(error.__cause__ or error, Terminated):
            return _fail("terminated.", TERMINATED)
        return _fail("interrupted.", INTERRUPTED)
    except MemoryError:
        return _fail(
            "there is not enough memory; give --max-memory, fewer samples, or a smaller model.", 2
        )
    except OSError as error:  # a full disk, or a file that another process removed
        where = f" {error.filename}" if error.filename else ""
        return _fail(
            f"the system refused a file{where}: {error.strerror or error}; see to it and run again.",
            2,
        )
    except Exception as error:  # a fault of this package: the traceback belongs into the bug report
        traceback.print_exc()
        return _fail(
            f"{type(error).__name__} in onnx-oamip itself; please report it with the lines above.",
            2,
        )
    return status if isinstance(status, int) else 0


@contextmanager
def _no_numeric_warnings() -> Iterator[None]:
    """Keep warnings of numpy and scipy about overflow and the like off stderr, but not those of a user's function.

    Results that are not finite are refused or noted where they matter.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", category=RuntimeWarning, module=r"(onnx_oamip|numpy|scipy)(\.|$)"
        )
        yield


def _fail(message: str, status: int) -> int:
    text = Flags(cli).in_text(" ".join(message.split()))
    click.echo(f"Error: {text}{'' if text.endswith(('.', '?')) else '.'}", err=True)
    return status
