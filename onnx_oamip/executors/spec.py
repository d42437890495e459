"""What every executor can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

S = TypeVar("S")
I = TypeVar("I")  # noqa: E741
T = TypeVar("T")
Told = Callable[[int, int], None]
"""Called with (pieces done, pieces in all), from whatever thread."""


class Executor(Protocol):
    """A place for independent pieces of work."""

    def map(
        self, task: Callable[[S, I], T], shared: S, items: Sequence[I], progress: Told | None = None
    ) -> list[T]:
        """``task(shared, item)`` for every item, in order. What a task raises is raised here."""
        ...
