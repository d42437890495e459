"""Interface of executors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

S = TypeVar("S")
I = TypeVar("I")  # noqa: E741
T = TypeVar("T")
PieceProgress = Callable[[int, int], None]
"""Called with the number of finished pieces and their total, from any thread."""
Receiver = Callable[[int, T], None]
"""Called with the index of a finished piece and its result, from any thread, one call at a time."""


class Executor(Protocol):
    """Runs independent pieces of work."""

    def map(
        self,
        task: Callable[[S, I], T],
        shared: S,
        items: Sequence[I],
        progress: PieceProgress | None = None,
        receive: Receiver[T] | None = None,
    ) -> list[T]:
        """Run ``task(shared, item)`` for every item. Exceptions of a task are raised here.

        Args:
            task: Module-level function.
            shared: Value that all pieces read.
            items: One small value per piece.
            progress: Called whenever a piece is finished.
            receive: Receives every result as soon as it is there.

        Returns:
            Results in the order of the items.
        """
        ...
