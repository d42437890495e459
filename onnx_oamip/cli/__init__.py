"""The command line: parses options, calls the Python interface, and prints the result.

Heavy packages are imported inside the commands, so that help and usage errors are printed at once.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import click

from onnx_oamip.cli.commands import cli
from onnx_oamip.cli.flags import Flags
from onnx_oamip.cli.interrupt import ending, signals_end_the_work
from onnx_oamip.cli.stdout import ReaderGone, reserve_stdout, to_stderr
from onnx_oamip.core.errors import OamipError

__all__ = ["cli", "main"]

BROKEN_PIPE = 128 + 13
"""Exit status of a program that SIGPIPE ends: the reader of stdout has gone away."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; a failure is one sentence on stderr.

    Args:
        arguments: Command and options, for a call from Python. None takes those of the process, which then is the
            program ``onnx-oamip``: from here to its end, only the command writes to stdout.

    Returns:
        The exit status.
    """
    if arguments is not None:
        return _run(arguments)
    with reserve_stdout():
        status = _run(arguments)
    gc.freeze()  # the end of a process would search all objects of all libraries for cycles
    return status


def _run(arguments: Sequence[str] | None) -> int:
    status, message = _status_and_error(arguments)
    if message:
        given = sys.argv[1:] if arguments is None else arguments
        _report(message, status, as_json="--json" in given)
    return status


def _status_and_error(arguments: Sequence[str] | None) -> tuple[int, str]:
    """Exit status of a command, and the sentence about its failure; empty if there is none."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with signals_end_the_work(), _no_numeric_warnings():
            status = cli.main(arguments, prog_name="onnx-oamip", standalone_mode=False)
    except ReaderGone:
        return BROKEN_PIPE, ""
    except click.ClickException as error:
        return error.exit_code, error.format_message()
    except OamipError as error:
        return error.exit_code, str(error)
    except (click.Abort, KeyboardInterrupt) as error:
        return ending(error)
    except MemoryError:
        advice = "give --max-memory, fewer samples, or a smaller model"
        return 2, f"there is not enough memory; {advice}."
    except OSError as error:  # a full disk, or a file that another process removed
        where = f" {error.filename}" if error.filename else ""
        reason = error.strerror or error
        return 2, f"the system refused a file{where}: {reason}; see to it and run again."
    except Exception as error:  # a fault of this package: the traceback belongs into the bug report
        to_stderr(traceback.format_exc().rstrip())
        kind = type(error).__name__
        return 2, f"{kind} in onnx-oamip itself; please report it with the lines above."
    return status if isinstance(status, int) else 0, ""


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


def _report(message: str, status: int, *, as_json: bool) -> None:
    """Write an error as one sentence to stderr, and with --json as a document to stdout."""
    text = Flags(cli).in_text(" ".join(message.split()))
    sentence = f"{text}{'' if text.endswith(('.', '?')) else '.'}"
    to_stderr(f"Error: {sentence}")
    if not as_json:
        return
    error, _, hint = sentence.rpartition("; ")
    document = {
        "schema_version": 1,
        "error": error or sentence,
        "hint": hint if error else None,
        "status": status,
    }
    with suppress(OSError, ValueError):  # the failure may be that of stdout
        click.echo(json.dumps(document, indent=2))
