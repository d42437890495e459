"""The workers of a Dask cluster, through ``distributed``'s client: the only place that knows it.

A connection is made for one :meth:`Cluster.map` and closed behind it. Shared data goes to all workers at once; where
the last copy is lost with a worker it is sent again, and pieces that a lost worker had run elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import platform
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

from threadpoolctl import threadpool_limits

from onnx_oamip.core.errors import EnvironmentMissing
from onnx_oamip.core.extras import imports_of
from onnx_oamip.core.versions import sources, versions
from onnx_oamip.executors.parcel import Parcel, pack
from onnx_oamip.executors.spec import (
    I,
    S,
    T,
    Told,
)
from onnx_oamip.graph.runtime import resolve_device

if TYPE_CHECKING:
    from distributed import Client, Future

TIMEOUT = 5.0
"""Seconds for a scheduler to answer, and for workers to say what they are."""
PATIENCE = 30.0
"""Seconds without any worker after which a run is given up: one that was lost may be started again by then."""
TICK = 1.0
"""Seconds between looks at the workers while no result comes."""
FETCH = 60.0
"""Seconds for one result to arrive; after that it is asked for again."""
SENDS = 3
"""Times that sending the shared data may fail."""
AHEAD = 2
"""Pieces sent for every thread of the cluster: the next one is there when one is done, and the rest waits here."""
DECISIVE = ("scipy", "scikit-learn", "threadpoolctl", "distributed")
"""Packages that decide a result or whether processes understand each other, besides ``versions.versions``."""
ALIKE = ("onnx_oamip", "python", "distributed")
"""What the scheduler must have too."""
Facts = tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class Cluster:
    """The cluster of the Dask scheduler at an address such as ``tcp://host:8786``."""

    scheduler: str
    device: str = "cpu"

    def check(self) -> None:
        """Raises EnvironmentMissing where the cluster cannot be reached, has no worker, or runs other versions."""
        with self._client():
            pass

    def map(
        self, task: Callable[[S, I], T], shared: S, items: Sequence[I], progress: Told | None = None
    ) -> list[T]:
        """See :class:`onnx_oamip.executors.Executor`. Raises EnvironmentMissing where no worker is left."""
        parcel = Parcel(pack(shared))
        with self._client() as client:
            run = _Run(self, client, task, parcel, items)
            try:
                return run.results(progress)
            finally:
                with contextlib.suppress(
                    Exception
                ):  # a scheduler that is gone has nothing to cancel
                    client.cancel(list(run.running))

    @contextlib.contextmanager
    def _client(self) -> Iterator[Client]:
        with imports_of("cluster", "`scheduler`"):
            from distributed import Client
        with _quiet():
            self._knock()
            client = Client(
                self.scheduler, timeout=TIMEOUT, set_as_default=False, name="onnx-oamip"
            )
            try:
                self._meet(client)
                yield client
            finally:
                client.close(timeout=TIMEOUT)

    def _knock(self) -> None:
        """Raises EnvironmentMissing where no scheduler answers: a client that never connected does not close."""
        from distributed.core import rpc

        async def ask() -> Any:
            async with rpc(self.scheduler) as there:
                return (await asyncio.wait_for(there.identity(), TIMEOUT))["type"]

        why = ""
        try:
            with ThreadPoolExecutor(1) as thread:  # the caller's may have a loop of its own
                if thread.submit(asyncio.run, ask()).result() == "Scheduler":
                    return
        except Exception as error:  # whatever a socket, a name or another protocol raises
            why = (
                ""
                if isinstance(error, (TimeoutError, asyncio.TimeoutError))
                else f" ({_line(error)})"
            )
        raise EnvironmentMissing(
            f"`scheduler={self.scheduler}`: no Dask scheduler answers there within {TIMEOUT:g} s{why}; give the "
            "address that 'dask scheduler' shows, such as tcp://host:8786."
        )

    def _meet(self, client: Client) -> None:
        """Raises EnvironmentMissing unless the scheduler and all its workers are as this process is."""
        ours = facts()
        try:
            found: dict[str, Any] = client.run(misfit, ours, self.device, on_error="return")
        except Exception as error:
            raise EnvironmentMissing(
                f"`scheduler={self.scheduler}`: its workers do not answer ({_line(error)}); look at their logs."
            ) from error
        # The scheduler works out nothing, but reads what it passes on.
        alike = tuple((name, version) for name, version in ours if name in ALIKE)
        try:
            why = client.run_on_scheduler(misfit, alike, "cpu")
        except Exception as error:
            raise EnvironmentMissing(
                f"the scheduler {self.scheduler} cannot read what onnx-oamip sends ({_line(error)}); install the same "
                "version there."
            ) from error
        if why:
            raise EnvironmentMissing(f"the scheduler {self.scheduler} {why}.")
        # One that is going away just now is none.
        found = {
            address: answer for address, answer in found.items() if not isinstance(answer, OSError)
        }
        if not found:
            raise EnvironmentMissing(
                f"the cluster at `scheduler={self.scheduler}` has no worker; start some with 'dask worker "
                f"{self.scheduler}'."
            )
        for address, answer in sorted(found.items()):
            if isinstance(answer, Exception):
                raise EnvironmentMissing(
                    f"the worker {address} cannot run onnx-oamip ({_line(answer)}); install the same version there."
                ) from answer
            if answer:
                raise EnvironmentMissing(f"the worker {address} {answer}.")


class _Run:
    """One map: what was sent and not come back."""

    def __init__(
        self,
        cluster: Cluster,
        client: Client,
        task: Callable[[Any, Any], Any],
        parcel: Parcel,
        items: Sequence[Any],
    ) -> None:
        self.cluster, self.client, self.task, self.parcel, self.items = (
            cluster,
            client,
            task,
            parcel,
            items,
        )
        self.facts = facts()
        self.waiting = deque(range(len(items)))
        self.running: dict[Future, int] = {}
        self.found: dict[int, Any] = {}
        self.held: Future | None = None
        self.missed = 0
        self.seen = time.monotonic()

    def results(self, progress: Told | None) -> list[Any]:
        """All results, in order."""
        from distributed import wait

        while len(self.found) < len(self.items):
            self._send(self._threads())
            if self.running:
                with contextlib.suppress(
                    Exception
                ):  # time is out, or a future was lost: each one tells below
                    wait(list(self.running), timeout=TICK, return_when="FIRST_COMPLETED")
            else:
                time.sleep(TICK / 10)
            for future in [f for f in self.running if f.done()]:
                if self._take(future) and progress:
                    progress(len(self.found), len(self.items))
        return [self.found[i] for i in range(len(self.items))]

    def _threads(self) -> int:
        """Threads of all workers, 0 while there are none. Raises EnvironmentMissing where that takes too long."""
        done = f"with {len(self.found)} of {len(self.items)} pieces of work done"
        if self.client.status == "closed":
            raise EnvironmentMissing(
                f"the scheduler {self.cluster.scheduler} went away, {done}; run again when it is back."
            )
        count = 0
        with contextlib.suppress(Exception):  # no answer is no worker
            count = sum(self.client.nthreads().values())
        now = time.monotonic()
        if count:
            self.seen = now
        elif now - self.seen > PATIENCE:
            raise EnvironmentMissing(
                f"no worker is left at `scheduler={self.cluster.scheduler}`, {done}; look at their logs, start new "
                "ones and run again."
            )
        return count

    def _send(self, threads: int) -> None:
        """Submit pieces, the shared data before the first."""
        import dask

        if threads and self.held is None:
            try:
                self.held = self.client.scatter(self.parcel, broadcast=True, hash=False)
            except Exception as error:  # workers may have gone meanwhile
                self.missed += 1
                if self.missed == SENDS:
                    raise EnvironmentMissing(
                        f"the workers of `scheduler={self.cluster.scheduler}` do not take the model ({_line(error)}); "
                        "look at their logs."
                    ) from error
        while self.held is not None and self.waiting and len(self.running) < AHEAD * threads:
            index = self.waiting.popleft()
            piece = pickle.dumps((self.task, self.items[index]), pickle.HIGHEST_PROTOCOL)
            with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}):
                future = self.client.submit(
                    perform, self.held, piece, self.facts, self.cluster.device, pure=False
                )
            self.running[future] = index

    def _take(self, future: Future) -> bool:
        """Note the result of a future; False where it was lost, and is to be sent again."""
        from distributed import KilledWorker

        index = self.running[future]
        try:
            self.found[index] = future.result(timeout=FETCH)
        except (TimeoutError, asyncio.TimeoutError) as error:
            if future.status == "error":
                raise error  # the task's own
            return False
        except KilledWorker as error:
            raise EnvironmentMissing(
                f"workers died at the same piece of work ({error.allowed_failures + 1} of them), most likely for want "
                "of memory; give them more, or each fewer threads."
            ) from error
        except Exception:
            if not future.cancelled():
                raise
            self.waiting.appendleft(index)
            self.held = None
            del self.running[future]
            return False
        del self.running[future]
        return True


# ---------------------------------------------------------------------------------------------------------- on workers


def perform(shared: Parcel, piece: bytes, expected: Facts, device: str) -> Any:
    """One piece of work, on a worker."""
    why = misfit(expected, device)
    if why is not None:  # it came after the others were asked
        from distributed import get_worker

        raise EnvironmentMissing(f"the worker {get_worker().address} {why}.")
    task, item = pickle.loads(piece)
    held = shared.open()
    with _ONE_THREAD:
        return task(held, item)


@lru_cache(maxsize=8)
def misfit(expected: Facts, device: str) -> str | None:
    """Why this process would not give the client's results; None where it does."""
    here = dict(facts())
    for what, version in expected:
        if here.get(what) != version:
            return _other(what, here.get(what), version)
    try:
        resolve_device(device)
    except EnvironmentMissing as error:
        return f"does not fit: {_line(error)}"
    return None


def facts() -> Facts:
    """What must be the same here and there: names with versions."""
    known = {**versions(), "python": ".".join(platform.python_version_tuple()[:2])}
    known["onnx_oamip's sources"] = sources()[:12]
    for name in DECISIVE:
        with contextlib.suppress(metadata.PackageNotFoundError):
            known[name] = metadata.version(name)
    return tuple(known.items())


def _other(what: str, theirs: str | None, ours: str | None) -> str:
    return (
        f"has {what} {theirs or '(none)'}, and here is {ours or '(none)'}; install the same on both"
    )


class _OneThread:
    """Linear algebra with one thread while any task runs: limits are the whole process's, and tasks overlap."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._limits: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._limits = threadpool_limits(1)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._limits.restore_original_limits()


_ONE_THREAD = _OneThread()


# ------------------------------------------------------------------------------------------------------------- logging


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the logs and warnings of distributed: an error is reported in one sentence.

    Its event loop, tornado's, logs a traceback where a signal interrupts a call that has not begun:
    distributed then cancels a future that does not exist yet.
    """
    names = ("distributed", "distributed.client", "tornado.application")
    logs = [logging.getLogger(name) for name in names]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"distributed\.")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _line(error: BaseException) -> str:
    """The first line of an error, without its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
