"""Clock that measures the time of each stage."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from onnx_oamip.core.progress import Progress


class Clock:
    """Accumulates seconds by stage; while a nested stage runs, the outer one is paused.

    Attributes:
        seconds: Seconds so far by the name of the stage.
    """

    def __init__(self, progress: Progress | None = None, steps: Sequence[str] = ()) -> None:
        """Start with no seconds.

        Args:
            progress: Callback of the run; its method ``begin`` is called at every step, if it has one.
            steps: Names of the stages that are steps of the run, in their order.
        """
        self._begin = getattr(progress, "begin", None)
        self._steps = tuple(steps)
        self._reached = 0
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Measure a block.

        Args:
            stage: Name that its seconds are added to.
        """
        self._add_elapsed()
        self._running.append(stage)
        self._announce(stage)
        try:
            yield
        finally:
            self._add_elapsed()
            self._running.pop()

    def _announce(self, stage: str) -> None:
        """Report a step; a stage that comes before its turn is none."""
        if self._begin is None or stage not in self._steps[self._reached : self._reached + 1]:
            return
        self._reached += 1
        self._begin(stage, self._reached, len(self._steps))

    def _add_elapsed(self) -> None:
        """Add the time since the last call to the innermost running stage."""
        now = time.perf_counter()
        if self._running:
            stage = self._running[-1]
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now
