"""Output of a command: its document on stdout, its progress on stderr."""

from __future__ import annotations

import logging
import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from onnx_oamip.cli.flags import Flags
from onnx_oamip.cli.stdout import stream, to_stderr

if TYPE_CHECKING:
    from onnx_oamip.reporting.documents import Document


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


class Notes(logging.Handler):
    """Warnings of the package as lines on stderr, with options in place of parameters."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message of the log to stderr as one line, with options in place of parameters.

        Args:
            record: The message.
        """
        text = Flags.of_context().in_text(record.getMessage())
        to_stderr(f"note: {text}")


class Progress:
    """Progress bars and notes on stderr.

    Bars are for work that takes more than a second, where stderr is a terminal.
    """

    DELAY = 1.0
    """Seconds before the bars appear."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._handler: logging.Handler = logging.NullHandler()
        self._wanted = not quiet and sys.stderr.isatty()
        self._lock = threading.Lock()
        self._tasks: dict[str, Any] = {}
        self._display: Any = None
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Progress:
        self._handler = logging.NullHandler() if self._quiet else Notes()
        LOG.addHandler(self._handler)
        LOG.propagate = False
        if self._wanted:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Display

            self._display = Display(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._timer = threading.Timer(self.DELAY, self._start)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show the progress of a stage.

        Args:
            stage: Its name.
            done: Finished steps.
            total: All steps.
        """
        if self._display is None:
            return
        with self._lock:
            if stage not in self._tasks:
                self._tasks[stage] = self._display.add_task(stage, total=total)
        self._display.update(self._tasks[stage], completed=done, total=total)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        LOG.removeHandler(self._handler)
        LOG.propagate = True
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            if self._display is not None:
                self._display.stop()
            self._wanted = False

    def _start(self) -> None:
        with self._lock:
            if self._wanted:
                self._display.start()
