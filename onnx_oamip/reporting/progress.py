"""Progress bars on stderr or in a notebook, by rich."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType
    from rich.progress import Progress as RichProgress

    from onnx_oamip.reporting.documents import Document


class Bars:
    """Bars of a run: one for its steps, and one for every stage that counts.

    They are for work that takes longer than ``DELAY``. An instance is a callback ``progress(stage, done, total)``.
    """

    DELAY = 0.5
    """Seconds before the bars appear."""

    def __init__(self, wanted: bool = True) -> None:
        """Create the bars, which are shown inside a ``with`` block.

        Args:
            wanted: False for a callback that shows nothing.
        """
        self._wanted = wanted
        self._lock = threading.Lock()
        self._tasks: dict[str, Any] = {}
        self._overall: Any = None
        self._display: Any = None
        self._timer: threading.Timer | None = None
        self._points: list[Document] = []

    def __enter__(self) -> Bars:
        if self._wanted:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

            self._display = _display(self._points)(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._overall = self._display.add_task("start", total=None)
            self._timer = threading.Timer(self.DELAY, self._start)
            self._timer.daemon = True
            self._timer.start()
        return self

    def begin(self, step: str, number: int, count: int) -> None:
        """Show the step that a run has come to.

        Args:
            step: Its name.
            number: Its number, from 1.
            count: Number of all steps.
        """
        if self._display is not None:
            self._display.update(
                self._overall,
                description=f"step {number} of {count}: {step}",
                completed=number - 1,
                total=count,
            )

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show the progress of a stage.

        Args:
            stage: Its name; what stands behind a colon may change from call to call.
            done: Finished parts.
            total: All parts.
        """
        if self._display is None:
            return
        name = stage.partition(":")[0]
        with self._lock:
            if name not in self._tasks:
                self._tasks[name] = self._display.add_task(stage, total=total)
        self._display.update(self._tasks[name], description=stage, completed=done, total=total)

    def show_point(self, point: Document) -> None:
        """Show a model of a frontier in a table above the bars.

        Args:
            point: The point, as documents describe it.
        """
        self._points.append(point)
        if self._display is not None:
            self._display.refresh()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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


def _display(points: list[Document]) -> type[RichProgress]:
    """Kind of display that has a table of points above its bars."""
    from rich.progress import Progress

    class Display(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            if points:
                from onnx_oamip.reporting.tables.parts import point_table

                yield point_table(points)
            yield from super().get_renderables()

    return Display
