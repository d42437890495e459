"""Standard output belongs to the command: its document is written there, and everything else is sent to stderr.

Libraries, plug-ins and the user's own data functions print where they like, and a program that parses the document, or
reads nothing under ``--quiet``, breaks on any of it. Two levels are redirected. ``reserved`` takes file descriptor 1,
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
def reserved() -> Iterator[None]:
    """Keeps stdout for ``sys.stdout`` alone, and points file descriptor 1 at stderr until the process ends.

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
        with suppress(
            OSError
        ):  # every document is flushed where it is written, and its errors are reported there
            own.close()


def document_only(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps the function of a command so that ``print`` writes to stderr while it runs; ``stream()`` is stdout."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> Any:
        click.get_current_context().meta[_STREAM] = sys.stdout
        with redirect_stdout(sys.stderr):
            return command(*arguments, **options)

    return run


def stream() -> TextIO:
    """Stdout, for the document of the command that runs."""
    found: TextIO = click.get_current_context().meta[_STREAM]
    return found


def _null_device(descriptor: int) -> TextIO:
    """Opens the null device under the number of a standard stream that the process was started without.

    The number is free otherwise, so that the next file to be opened, such as the model that is written, would get it,
    and with it everything that is printed.
    """
    null = open(os.devnull, "w")  # noqa: SIM115 - a standard stream stays open
    os.dup2(null.fileno(), descriptor)
    return null
