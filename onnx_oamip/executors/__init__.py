"""Where independent pieces of work run: in threads here, or on the workers of a Dask cluster.

A piece is ``task(shared, item)``: a function of a module, what all pieces read, and one small item. Threads hand both
over as they are; a cluster gets ``shared`` once a worker process. Results are the same, in the order of the items.
"""

from __future__ import annotations

from onnx_oamip.executors.spec import Executor
from onnx_oamip.executors.threads import Threads

__all__ = ["Executor", "Threads", "check", "executor"]


def executor(
    workers: int | None = None, scheduler: str | None = None, device: str = "cpu"
) -> Executor:
    """``workers`` threads (None: one for every core), or the cluster of the Dask ``scheduler`` at that address.

    ``device``: where tasks run models, ``cpu`` or ``cuda``; workers that do not have it are refused.
    """
    if scheduler is None:
        return Threads(workers)
    from onnx_oamip.executors.cluster import Cluster

    return Cluster(scheduler, device)


def check(scheduler: str | None, device: str = "cpu") -> None:
    """Raises EnvironmentMissing where a cluster is asked for that cannot be used from here; quick."""
    if scheduler is not None:
        from onnx_oamip.executors.cluster import Cluster

        Cluster(scheduler, device).check()
