"""Ctrl-C and SIGTERM: an exception where the program stands, and the end of the process where nobody hears it.

Python runs signal handlers between two of its own instructions, in the main thread. A solver, a kernel or a pool of
threads may keep it from there for long; a thread of our own hears of the signal at once and ends the process when the
exception has not done so after a while.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

GRACE = 2.0
"""Seconds that work has to unwind."""
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Whoever stops for Ctrl-C stops for it too."""


@contextmanager
def heard() -> Iterator[None]:
    """Ctrl-C and SIGTERM end what is inside soon."""
    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    old = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    done = threading.Event()
    threading.Thread(target=_watch, args=(ear, done), daemon=True).start()
    if before is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(old)
        if before is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, before)
        os.close(mouth)  # the thread reads the end of the file, and closes its side


def _raise(*_: object) -> None:
    raise Terminated


def _watch(ear: int, done: threading.Event) -> None:
    while code := os.read(ear, 1):
        if code[0] in (signal.SIGINT, signal.SIGTERM) and not done.wait(GRACE):
            _leave(code[0])
    os.close(ear)


def _leave(code: int) -> None:
    """End the process without unwinding; what it wrote aside goes, what it wrote is whole."""
    from onnx_oamip.core.atomic_files import remove_all

    remove_all()
    with suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"Error: {told(code)}.\n".encode())
    os._exit(128 + code)


def told(code: int) -> str:
    """What a user is told about a signal."""
    return "interrupted" if code == signal.SIGINT else "terminated"
