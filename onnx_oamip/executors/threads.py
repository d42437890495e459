"""Threads of this process: they share memory, so nothing is copied."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from threadpoolctl import threadpool_limits

from onnx_oamip.executors.spec import (
    I,
    S,
    T,
    Told,
)


@dataclass(frozen=True)
class Threads:
    """``workers`` at a time; None: one for every core."""

    workers: int | None = None

    def map(
        self, task: Callable[[S, I], T], shared: S, items: Sequence[I], progress: Told | None = None
    ) -> list[T]:
        """See :class:`onnx_oamip.executors.Executor`."""
        lock = threading.Lock()
        done = 0

        def one(item: I) -> T:
            nonlocal done
            result = task(shared, item)
            with lock:
                done += 1
                if progress:
                    progress(done, len(items))
            return result

        # One thread a worker for linear algebra too, or the workers wait for each other.
        with threadpool_limits(1), ThreadPoolExecutor(self.workers or os.cpu_count() or 1) as pool:
            return list(pool.map(one, items))
