"""Executors of independent pieces of work: threads of this process, or the workers of a Dask cluster.

A piece is ``task(shared, item)``: a module-level function, a value that all pieces read, and one small item. Threads
receive both as they are; every worker process of a cluster receives ``shared`` once. Results are the same, in the order
of the items.
"""

from __future__ import annotations

from onnx_oamip.executors.spec import Executor, Receiver
from onnx_oamip.executors.threads import Threads

__all__ = ["Executor", "Receiver", "Threads", "check", "executor"]


def executor(
    workers: int | None = None,
    scheduler: str | None = None,
    device: str = "cpu",
) -> Executor:
    """Choose an executor.

    Args:
        workers: Number of threads, None for one per core.
        scheduler: Address of a Dask scheduler, None for threads.
        device: Device on which tasks run models, ``cpu`` or ``cuda``; a cluster whose workers lack it is refused.

    Returns:
        Threads, or the cluster.
    """
    if scheduler is None:
        return Threads(workers)
    from onnx_oamip.executors.cluster import Cluster

    return Cluster(scheduler, device)


def check(scheduler: str | None, device: str = "cpu") -> None:
    """Check quickly that a cluster can be used.

    Args:
        scheduler: Address of a Dask scheduler; None needs no check.
        device: Device on which tasks run models.

    Raises:
        EnvironmentMissing: The cluster cannot be used from here.
    """
    if scheduler is not None:
        from onnx_oamip.executors.cluster import Cluster

        Cluster(scheduler, device).check()
