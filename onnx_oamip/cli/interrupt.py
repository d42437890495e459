"""Ctrl-C and SIGTERM: an exception in the main thread, and the end of the process if that does not come through.

Python runs signal handlers between two of its own instructions, in the main thread. A solver, a kernel or a thread pool
may block it for long. A thread of this module receives the signal at once, and ends the process if the exception has
not unwound the work after a grace period.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

GRACE = 2.0
"""Seconds for the work to unwind."""
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM was received; code that stops for Ctrl-C stops for it too."""


@contextmanager
def signals_end_the_work() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the block soon, also while compiled code runs."""
    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        yield
        return
    previous_handler = signal.getsignal(signal.SIGTERM)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    previous_wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    done = threading.Event()
    threading.Thread(target=_watch, args=(read_end, done), daemon=True).start()
    if previous_handler is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(previous_wakeup)
        if previous_handler is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, previous_handler)
        os.close(write_end)  # the thread reads the end of the file, and closes its end


def _raise_terminated(*_: object) -> None:
    raise Terminated


def _watch(read_end: int, done: threading.Event) -> None:
    while code := os.read(read_end, 1):
        if code[0] in (signal.SIGINT, signal.SIGTERM) and not done.wait(GRACE):
            _end_process(code[0])
    os.close(read_end)


def _end_process(code: int) -> None:
    """End the process without unwinding: remove its temporary folders; files that were renamed already are complete."""
    from onnx_oamip.core.atomic_files import remove_all

    remove_all()
    if code == signal.SIGINT:
        word = "interrupted"
    else:
        word = "terminated"
    with suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"Error: {word}.\n".encode())
    os._exit(128 + code)
