"""Output of a command: its document on stdout, its progress on stderr."""

from __future__ import annotations

import logging
import sys
from types import TracebackType
from typing import TYPE_CHECKING

import click

from onnx_oamip.cli.flags import Flags
from onnx_oamip.cli.stdout import stream, to_stderr
from onnx_oamip.core.printable import visible

if TYPE_CHECKING:
    from onnx_oamip.reporting.documents import Document
    from onnx_oamip.reporting.progress import Bars


LOG = logging.getLogger("onnx_oamip")


def show(document: Document, as_json: bool) -> None:
    """Print a document.

    Args:
        document: Result of a command.
        as_json: Print it as JSON; as tables by default.
    """
    from onnx_oamip.reporting import documents

    document = Flags.of_context().in_document(document)
    if as_json:
        click.echo(documents.dumps(document), file=stream())
        return
    from rich.console import Console

    from onnx_oamip.reporting import tables

    tables.show(document, Console(file=stream(), highlight=False, markup=False, emoji=False))


def explain_drop(document: Document) -> None:
    """Print on stderr why a search for a largest loss chose its model.

    Args:
        document: Document of ``prune``.
    """
    from onnx_oamip.reporting.tables.parts import drop_choice

    sentence = drop_choice(document)
    if sentence:
        note(sentence)


def note(text: str) -> None:
    """Print a note as one line on stderr, with options in place of parameters.

    Args:
        text: The note, which may hold names from a model; their invisible characters are spelt out.
    """
    to_stderr(f"note: {visible(Flags.of_context().in_text(text))}")


class Notes(logging.Handler):
    """Warnings of the package as lines on stderr, with options in place of parameters."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message of the log as a note.

        Args:
            record: The message.
        """
        note(record.getMessage())


class Progress:
    """Notes of the package on stderr, and progress bars where stderr is a terminal.

    To be entered before heavy packages are imported, so that the first bar appears in time.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._handler: logging.Handler = logging.NullHandler()
        self._bars: Bars | None = None

    def __enter__(self) -> Bars:
        from onnx_oamip.reporting.progress import Bars

        self._handler = logging.NullHandler() if self._quiet else Notes()
        LOG.addHandler(self._handler)
        LOG.propagate = False
        self._bars = Bars(not self._quiet and sys.stderr.isatty())
        return self._bars.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        LOG.removeHandler(self._handler)
        LOG.propagate = True
        if self._bars is not None:
            self._bars.__exit__(kind, value, trace)
