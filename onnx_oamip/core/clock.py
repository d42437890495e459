"""Clock that measures the time of each stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Accumulates seconds by stage; while a nested stage runs, the outer one is paused.

    Attributes:
        seconds: Seconds so far by the name of the stage.
    """

    def __init__(self) -> None:
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
        try:
            yield
        finally:
            self._add_elapsed()
            self._running.pop()

    def _add_elapsed(self) -> None:
        """Add the time since the last call to the innermost running stage."""
        now = time.perf_counter()
        if self._running:
            stage = self._running[-1]
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now
