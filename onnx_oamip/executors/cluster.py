"""Workers of a Dask cluster, through ``distributed``'s client. The only module that imports it.

A connection is made for one :meth:`Cluster.map` and closed afterwards. Shared data is sent to all workers at once; if
the last copy is lost with a worker it is sent again, and the pieces of a lost worker run elsewhere.
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
    PieceProgress,
    Receiver,
    S,
    T,
)
from onnx_oamip.graph import op_libraries
from onnx_oamip.graph.runtime import resolve_device

if TYPE_CHECKING:
    from distributed import Client, Future

CONNECT_SECONDS = 5.0
"""Time for a scheduler to answer, and for workers to report their versions."""
MAX_SECONDS_WITHOUT_WORKERS = 30.0
"""Time without any worker after which a run is given up. A lost worker may have been restarted by then."""
POLL_SECONDS = 1.0
"""Interval at which workers are counted while no result arrives."""
FETCH_SECONDS = 60.0
"""Time for one result to arrive; after that it is requested again."""
MAX_SEND_FAILURES = 3
"""Number of failures to send the shared data after which a run is given up."""
PIECES_PER_THREAD = 2
"""Pieces submitted per thread of the cluster: the next one is there when one is finished; the rest waits here."""
COMPARED_PACKAGES = ("scipy", "scikit-learn", "threadpoolctl", "distributed")
"""Packages that decide a result, or whether processes can communicate, besides those of ``versions.versions``."""
COMPARED_WITH_SCHEDULER = ("onnx_oamip", "python", "distributed")
"""Entries of the environment that the scheduler must share as well."""
OP_LIBRARY = "operator library "
"""Beginning of the entries of the environment for libraries of custom operators, before the path."""
Environment = tuple[tuple[str, str | None], ...]
"""Pairs of a name and a version."""


@dataclass(frozen=True)
class Cluster:
    """An executor on the workers of a Dask cluster.

    Attributes:
        scheduler: Address of the scheduler, such as ``tcp://host:8786``.
        device: Device on which tasks run models.
    """

    scheduler: str
    device: str = "cpu"

    def check(self) -> None:
        """Check that the cluster can be used.

        Raises:
            EnvironmentMissing: The cluster cannot be reached, has no worker, or runs other versions.
        """
        with self._client():
            pass

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

        Raises:
            EnvironmentMissing: The cluster cannot be used, or no worker is left.
            ModelError: A model is too large to be sent, or its weights are in a file that workers do not see.
        """
        parcel = Parcel(pack(shared))
        with self._client() as client:
            run = _Run(self, client, task, parcel, items)
            try:
                return run.results(progress, receive)
            finally:
                # A scheduler that has stopped has nothing to cancel.
                with contextlib.suppress(Exception):
                    client.cancel(list(run.running))

    @contextlib.contextmanager
    def _client(self) -> Iterator[Client]:
        """A connection to a cluster that was checked."""
        with imports_of("cluster", "`scheduler`"):
            from distributed import Client
        with _quiet():
            self._check_scheduler_answers()
            client = Client(
                self.scheduler,
                timeout=CONNECT_SECONDS,
                set_as_default=False,
                name="onnx-oamip",
            )
            try:
                self._check_environments(client)
                yield client
            finally:
                client.close(timeout=CONNECT_SECONDS)

    def _check_scheduler_answers(self) -> None:
        """Check the address before a client is made: a client that never connected cannot be closed."""
        from distributed.core import rpc

        async def ask_type() -> Any:
            async with rpc(self.scheduler) as remote:
                identity = await asyncio.wait_for(remote.identity(), CONNECT_SECONDS)
                return identity["type"]

        reason = ""
        try:
            # The calling thread may run an event loop of its own.
            with ThreadPoolExecutor(1) as thread:
                if thread.submit(asyncio.run, ask_type()).result() == "Scheduler":
                    return
        except (TimeoutError, asyncio.TimeoutError):
            pass
        except Exception as error:
            # Sockets, name resolution and other protocols raise many types.
            reason = f" ({_first_line(error)})"
        raise EnvironmentMissing(
            f"`scheduler={self.scheduler}`: no Dask scheduler answers there within {CONNECT_SECONDS:g} s{reason}; give "
            "the address that 'dask scheduler' shows, such as tcp://host:8786."
        )

    def _check_environments(self, client: Client) -> None:
        """Check that the scheduler and all its workers run the same versions as this process."""
        ours = environment()
        try:
            answers: dict[str, Any] = client.run(mismatch, ours, self.device, on_error="return")
        except Exception as error:
            raise EnvironmentMissing(
                f"`scheduler={self.scheduler}`: its workers do not answer ({_first_line(error)}); look at their logs."
            ) from error
        self._check_scheduler(client, ours)
        # A worker that is just shutting down is none.
        workers = {
            address: answer
            for address, answer in answers.items()
            if not isinstance(answer, OSError)
        }
        if not workers:
            raise EnvironmentMissing(
                f"the cluster at `scheduler={self.scheduler}` has no worker; start some with 'dask worker "
                f"{self.scheduler}'."
            )
        for address, answer in sorted(workers.items()):
            if isinstance(answer, Exception):
                raise EnvironmentMissing(
                    f"the worker {address} cannot run onnx-oamip ({_first_line(answer)}); install the same version "
                    "there."
                ) from answer
            if answer:
                raise EnvironmentMissing(f"the worker {address} {answer}.")

    def _check_scheduler(self, client: Client, ours: Environment) -> None:
        """Check the scheduler, which computes nothing but reads the messages that it passes on."""
        shared = tuple(entry for entry in ours if entry[0] in COMPARED_WITH_SCHEDULER)
        try:
            difference = client.run_on_scheduler(mismatch, shared, "cpu")
        except Exception as error:
            raise EnvironmentMissing(
                f"the scheduler {self.scheduler} cannot read what onnx-oamip sends ({_first_line(error)}); install the "
                "same version there."
            ) from error
        if difference:
            raise EnvironmentMissing(f"the scheduler {self.scheduler} {difference}.")


class _Run:
    """One call of ``map``: pieces that wait, run and are finished."""

    def __init__(
        self,
        cluster: Cluster,
        client: Client,
        task: Callable[[Any, Any], Any],
        parcel: Parcel,
        items: Sequence[Any],
    ) -> None:
        self.cluster = cluster
        self.client = client
        self.task = task
        self.parcel = parcel
        self.items = items
        self.environment = environment()
        self.waiting = deque(range(len(items)))
        self.running: dict[Future, int] = {}
        self.finished: dict[int, Any] = {}
        self.shared: Future | None = None
        self.send_failures = 0
        self.workers_seen = time.monotonic()

    def results(self, progress: PieceProgress | None, receive: Receiver[Any] | None) -> list[Any]:
        """Run all pieces; returns the results in order."""
        from distributed import wait

        while len(self.finished) < len(self.items):
            self._send(self._threads())
            if self.running:
                # A timeout, or a lost future: each future reports its own state below.
                with contextlib.suppress(Exception):
                    wait(list(self.running), timeout=POLL_SECONDS, return_when="FIRST_COMPLETED")
            else:
                time.sleep(POLL_SECONDS / 10)
            for future in [f for f in self.running if f.done()]:
                index = self.running[future]
                if not self._take(future):
                    continue
                if receive:
                    receive(index, self.finished[index])
                if progress:
                    progress(len(self.finished), len(self.items))
        return [self.finished[i] for i in range(len(self.items))]

    def _threads(self) -> int:
        """Threads of all workers, 0 without any; raises EnvironmentMissing if that lasts too long."""
        done = f"with {len(self.finished)} of {len(self.items)} pieces of work done"
        if self.client.status == "closed":
            raise EnvironmentMissing(
                f"the scheduler {self.cluster.scheduler} went away, {done}; run again when it is back."
            )
        count = 0
        # Without an answer there is no worker.
        with contextlib.suppress(Exception):
            count = sum(self.client.nthreads().values())
        now = time.monotonic()
        if count:
            self.workers_seen = now
        elif now - self.workers_seen > MAX_SECONDS_WITHOUT_WORKERS:
            raise EnvironmentMissing(
                f"no worker is left at `scheduler={self.cluster.scheduler}`, {done}; look at their logs, start new "
                "ones and run again."
            )
        return count

    def _send(self, threads: int) -> None:
        """Submit as many pieces as the threads need, the shared data before the first."""
        import dask

        if threads and self.shared is None:
            self._send_shared()
        limit = PIECES_PER_THREAD * threads
        while self.shared is not None and self.waiting and len(self.running) < limit:
            index = self.waiting.popleft()
            piece = pickle.dumps((self.task, self.items[index]), pickle.HIGHEST_PROTOCOL)
            with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}):
                future = self.client.submit(
                    perform,
                    self.shared,
                    piece,
                    self.environment,
                    self.cluster.device,
                    pure=False,
                )
            self.running[future] = index

    def _send_shared(self) -> None:
        try:
            self.shared = self.client.scatter(self.parcel, broadcast=True, hash=False)
        except Exception as error:
            # Workers may have stopped in the meantime.
            self.send_failures += 1
            if self.send_failures == MAX_SEND_FAILURES:
                raise EnvironmentMissing(
                    f"the workers of `scheduler={self.cluster.scheduler}` do not take the model "
                    f"({_first_line(error)}); look at their logs."
                ) from error

    def _take(self, future: Future) -> bool:
        """Store the result of a future; false if it was lost and the piece must run again."""
        from distributed import KilledWorker

        index = self.running[future]
        try:
            self.finished[index] = future.result(timeout=FETCH_SECONDS)
        except (TimeoutError, asyncio.TimeoutError) as error:
            # Either the task raised it, or the result did not arrive in time.
            if future.status == "error":
                raise error
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
            self.shared = None
            del self.running[future]
            return False
        del self.running[future]
        return True


# ---------------------------------------------------------------------------------------------------------- on workers


def perform(
    shared: Parcel,
    piece: bytes,
    expected: Environment,
    device: str,
) -> Any:
    """Run one piece of work on a worker.

    Args:
        shared: Value that all pieces read.
        piece: Pickled task and item.
        expected: Environment of the client.
        device: Device on which the task runs models.

    Returns:
        Result of the task.

    Raises:
        EnvironmentMissing: The worker joined after the check and does not fit.
    """
    difference = mismatch(expected, device)
    if difference is not None:
        from distributed import get_worker

        raise EnvironmentMissing(f"the worker {get_worker().address} {difference}.")
    op_libraries.use(_library_paths(expected))  # the answer above may come from another thread
    task, item = pickle.loads(piece)
    value = shared.open()
    with _ONE_THREAD:
        return task(value, item)


@lru_cache(maxsize=8)
def mismatch(expected: Environment, device: str) -> str | None:
    """Compare this process with the client.

    Args:
        expected: Environment of the client, as far as it counts here.
        device: Device on which tasks run models.

    Returns:
        The first difference that may change results, as the rest of a sentence; None if there is none.
    """
    try:
        op_libraries.use(_library_paths(expected))
    except EnvironmentMissing as error:
        return f"lacks a file: {_first_line(error)}"
    own = dict(environment())
    for name, version in expected:
        if own.get(name) != version:
            theirs = own.get(name) or "(none)"
            ours = version or "(none)"
            return f"has {name} {theirs}, and here is {ours}; install the same on both"
    try:
        resolve_device(device)
    except EnvironmentMissing as error:
        return f"does not fit: {_first_line(error)}"
    return None


def _library_paths(expected: Environment) -> list[str]:
    return [name.removeprefix(OP_LIBRARY) for name, _ in expected if name.startswith(OP_LIBRARY)]


def environment() -> Environment:
    """List the versions and the libraries of custom operators that must be the same in all processes.

    Returns:
        Pairs of a name and a version.
    """
    entries = {**versions(), "python": ".".join(platform.python_version_tuple()[:2])}
    entries["onnx_oamip's sources"] = sources()[:12]
    for name in COMPARED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            entries[name] = metadata.version(name)
    for library in op_libraries.in_use():
        entries[f"{OP_LIBRARY}{library.path}"] = library.sha256[:12]
    return tuple(entries.items())


class _OneThread:
    """Limits linear algebra to one thread while any task runs. The limit is that of the process, and tasks overlap."""

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

    Its event loop, tornado's, logs a traceback if a signal interrupts a call that has not begun: distributed then
    cancels a future that does not exist yet.
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


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop."""
    lines = str(error).strip().splitlines()
    if lines:
        return lines[0].rstrip(".")
    return type(error).__name__
