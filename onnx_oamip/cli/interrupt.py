"""Ctrl-C, SIGTERM and SIGHUP: an exception in the main thread, or the end of the process if that has no effect.

Python runs signal handlers between two of its own instructions, in the main thread. A solver, a kernel or a thread pool
may block it for long. A thread of this module receives the signal at once, and ends the process if the exception has
not unwound the work after a grace period.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from typing import Any

GRACE = 2.0
"""Seconds for the work to unwind."""
ENDINGS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
"""Signals that end a run, with the word for it."""
if hasattr(signal, "SIGHUP"):  # not on Windows
    ENDINGS[signal.SIGHUP] = "terminated, as its terminal was closed"


_DEFERRED = threading.Semaphore(0)
"""One permit for a Ctrl-C that only asks a block to stop (:func:`first_interrupt_stops`)."""


class Terminated(KeyboardInterrupt):
    """A signal other than that of Ctrl-C was received; code that stops for Ctrl-C stops for it too.

    Attributes:
        code: Number of the signal.
    """

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


def ending(error: BaseException) -> tuple[int, str]:
    """Describes the end of a run by a signal.

    Args:
        error: Exception that Ctrl-C or another signal raised.

    Returns:
        Exit status, and the sentence for the user.
    """
    cause = error.__cause__ or error
    code = cause.code if isinstance(cause, Terminated) else signal.SIGINT
    return 128 + code, f"{ENDINGS[code]}."


@contextmanager
def signals_end_the_work() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP end the block soon, also while compiled code runs."""
    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        yield
        return
    # A signal that the caller ignores (nohup does so with SIGHUP) or handles is left to it.
    ours = [
        code
        for code in ENDINGS
        if code != signal.SIGINT and signal.getsignal(code) is signal.SIG_DFL
    ]
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    previous_wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    done = threading.Event()
    threading.Thread(
        target=_watch, args=(read_end, done, {signal.SIGINT, *ours}), daemon=True
    ).start()
    for code in ours:
        signal.signal(code, _raise_terminated)
    previous_hook = sys.unraisablehook
    sys.unraisablehook = _without_interrupts(previous_hook)
    try:
        yield
    finally:
        done.set()
        sys.unraisablehook = previous_hook
        signal.set_wakeup_fd(previous_wakeup)
        for code in ours:
            signal.signal(code, signal.SIG_DFL)
        os.close(write_end)  # the thread reads the end of the file, and closes its end


@contextmanager
def first_interrupt_stops() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C of the block set a flag, and a second one end the work.

    Yields:
        A function that returns True once Ctrl-C was pressed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed = threading.Event()

    def note(*_: object) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    previous_handler = signal.signal(signal.SIGINT, note)
    _DEFERRED.release()
    try:
        yield pressed.is_set
    finally:
        _DEFERRED.acquire(blocking=False)
        signal.signal(signal.SIGINT, previous_handler)


def _raise_terminated(code: int, _: object) -> None:
    raise Terminated(code)


def _without_interrupts(report: Callable[[Any], object]) -> Callable[[Any], None]:
    """Report of exceptions that Python cannot raise, as in a finaliser, but for those of a signal.

    The watching thread then ends the process, and stderr has its sentence alone.
    """

    def report_others(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            report(unraisable)

    return report_others


def _watch(read_end: int, done: threading.Event, codes: Set[int]) -> None:
    while code := os.read(read_end, 1):
        if code[0] == signal.SIGINT and _DEFERRED.acquire(blocking=False):
            continue
        if code[0] in codes and not done.wait(GRACE):
            _end_process(code[0])
    os.close(read_end)


def _end_process(code: int) -> None:
    """End the process, its children and its temporary folders without unwinding; renamed files are complete."""
    from onnx_oamip.core.atomic_files import remove_all
    from onnx_oamip.core.child_processes import kill_all

    kill_all()
    remove_all()
    with suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"Error: {ENDINGS[code]}.\n".encode())
    os._exit(128 + code)
