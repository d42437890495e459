"""Threads of this process: they share memory, so that nothing is copied."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from threadpoolctl import threadpool_limits

from onnx_oamip.executors.spec import (
    I,
    PieceProgress,
    Receiver,
    S,
    T,
)
from onnx_oamip.graph import op_libraries


@dataclass(frozen=True)
class Threads:
    """An executor on threads.

    Attributes:
        workers: Number of threads, None for one per core.
    """

    workers: int | None = None

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
            task: Any function.
            shared: Value that all pieces read.
            items: One value per piece.
            progress: Called whenever a piece is finished.
            receive: Receives every result as soon as it is there.

        Returns:
            Results in the order of the items.
        """
        lock = threading.Lock()
        done = 0

        def run(index: int, item: I) -> T:
            nonlocal done
            result = task(shared, item)
            with lock:
                done += 1
                if receive:
                    receive(index, result)
                if progress:
                    progress(done, len(items))
            return result

        workers = self.workers or os.cpu_count() or 1
        # Linear algebra gets one thread per worker as well, or the workers wait for each other.
        pool = ThreadPoolExecutor(
            workers,
            initializer=op_libraries.share,
            initargs=(op_libraries.in_use(),),
        )
        with threadpool_limits(1), pool:
            return list(pool.map(run, range(len(items)), items))
