"""Standard output is reserved for the document of the command; everything else that is printed goes to stderr.

Libraries, plug-ins and the user's own data functions print to stdout, which would break programs that parse the
document or expect nothing under ``--quiet``. Two levels are redirected. ``reserve_stdout`` takes file descriptor 1,
where compiled code and child processes write, for a process of its own. ``document_only`` takes ``sys.stdout``, where
Python code writes, while a command runs; a command writes its document to ``stream()``.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO

import click

_STREAM = f"{__name__}.stream"


@contextmanager
def reserve_stdout() -> Iterator[None]:
    """Keep stdout for ``sys.stdout`` alone, and point file descriptor 1 at stderr until the process ends.

    For the program only: a Python process that calls the command line keeps its own descriptors, and so does one that
    has replaced ``sys.stdout``. Descriptor 1 is not given back at the end, because text that compiled code left in its
    buffers is only written when the process exits; ``sys.stdout`` is stderr from there on for the same reason.
    """
    original: TextIO | None = sys.stdout
    if original is not sys.__stdout__:
        yield
        return
    if original is None:
        original = _null_device(1)
    if sys.stderr is None:
        sys.stderr = _null_device(2)
    original.flush()
    own = open(os.dup(1), "w", encoding=original.encoding, errors=original.errors)  # noqa: SIM115 - closed below
    os.dup2(2, 1)
    sys.stdout = own
    try:
        yield
    finally:
        sys.stdout = sys.stderr
        # A document is flushed, and its errors reported, where it is written.
        with suppress(OSError):
            own.close()


def document_only(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function of a command so that ``print`` writes to stderr while it runs.

    Args:
        command: The function.

    Returns:
        The function; its document goes to ``stream()``.
    """

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> Any:
        click.get_current_context().meta[_STREAM] = sys.stdout
        with redirect_stdout(sys.stderr):
            return command(*arguments, **options)

    return run


class ReaderGone(Exception):
    """The reader of stdout has gone away."""


@contextmanager
def reader_may_go() -> Iterator[None]:
    """Turn the error of a broken pipe into one that click passes on.

    Raises:
        ReaderGone: A write to a pipe failed because its reader has closed it.
    """
    try:
        yield
    except BrokenPipeError as error:
        raise ReaderGone from error


def to_stderr(line: str) -> None:
    """Write a line to stderr, or nowhere if it is closed or its reader has gone away.

    Args:
        line: The text.
    """
    try:
        click.echo(line, err=True)
    except (OSError, ValueError):
        # The rest of the buffer would fail again at the end of the process, and change its exit status.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - a standard stream stays open


def stream() -> TextIO:
    """Return stdout, for the document of the running command.

    Returns:
        The stream that only the document may be written to.
    """
    stdout: TextIO = click.get_current_context().meta[_STREAM]
    return stdout


def _null_device(descriptor: int) -> TextIO:
    """Open the null device under the number of a standard stream that the process was started without.

    Otherwise the next file to be opened, such as the output model, would get the free number, and with it all printed
    text.
    """
    null = open(os.devnull, "w")  # noqa: SIM115 - a standard stream stays open
    os.dup2(null.fileno(), descriptor)
    return null
