"""Child processes: their output, their failures, and their end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from onnx_oamip.core import child_processes


def _run(code: str, seconds: float = 60.0) -> str:
    return child_processes.run([sys.executable, "-S", "-c", code], timeout=seconds, env=os.environ)


def test_output_is_returned() -> None:
    assert _run("print(3)") == "3\n"
    assert not child_processes._running


def test_failure_of_a_child_is_raised() -> None:
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        _run("raise SystemExit(3)")


def test_child_is_killed_after_its_time() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        _run("import time; time.sleep(60)", 0.05)
    assert not child_processes._running


def test_running_children_are_killed() -> None:
    ends: list[BaseException] = []

    def wait() -> None:
        try:
            _run("import time; time.sleep(60)")
        except subprocess.CalledProcessError as error:
            ends.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    until = time.monotonic() + 30
    while not child_processes._running and time.monotonic() < until:
        time.sleep(0.01)
    child_processes.kill_all()
    thread.join(30)
    assert len(ends) == 1
