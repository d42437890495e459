"""Tasks for executors, in a module that the workers of a cluster can import."""

from __future__ import annotations

import os
import time

import numpy as np
from threadpoolctl import threadpool_info

from onnx_oamip.core.errors import ModelError
from onnx_oamip.importance.oamip import decoupled


def add(shared: int, item: int) -> int:
    return shared + item


def process(shared: object, item: int) -> int:
    time.sleep(0.02)
    return os.getpid()


def rest(shared: float, item: int) -> int:
    time.sleep(shared)
    return item


def refuse(shared: object, item: int) -> int:
    if item == 3:
        raise ModelError("piece 3 cannot be done; leave it out.")
    return item


def overrun(shared: object, item: int) -> int:
    raise TimeoutError("the piece's own")


def leave(shared: object, item: int) -> None:
    os._exit(1)


def identity(shared: object, item: int) -> int:
    return id(shared)


def threads(shared: object, item: int) -> int:
    np.ones((2, 2)) @ np.ones((2, 2))
    time.sleep(0.05)
    return max(pool["num_threads"] for pool in threadpool_info())


def mismatch(expected: tuple[tuple[str, str | None], ...], device: str) -> str | None:
    """Answer of ``cluster.mismatch`` where the scheduler alone, of which less is required, has another version."""
    return None if len(expected) > 3 else f"has {expected[1][0]} 1.0, and here is another"


def stay(shared: object, item: object) -> None:
    """Longer than anybody waits."""
    time.sleep(600)


def limit_programs(flops: float) -> None:
    """Give the programs of groups in this worker as many operations as those of the tests have."""
    decoupled.FLOPS_PER_GROUP = flops
