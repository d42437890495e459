"""Child processes that end with this one, also where it ends without unwinding."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress

_running: set[subprocess.Popen[str]] = set()


def run(arguments: Sequence[str], *, timeout: float, env: Mapping[str, str]) -> str:
    """Run a program to its end.

    Args:
        arguments: The program and its arguments.
        timeout: Seconds after which it is killed.
        env: Its environment.

    Returns:
        All that it printed on stdout.

    Raises:
        subprocess.SubprocessError: It took too long, or its exit status is not 0.
        OSError: It cannot be started.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdout=pipe, stderr=pipe, text=True, env=env) as process:
        _running.add(process)
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:  # Ctrl-C too
            process.kill()
            raise
        finally:
            _running.discard(process)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments, out, err)
    return out


def kill_all() -> None:
    """Kill all that run, for an end of this process that leaves no time for anything else."""
    for process in list(_running):
        with suppress(OSError):
            process.kill()
