"""Memory of freed arrays goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_large_blocks_are_returned_when_freed() -> None:
    """The C library of a fresh process keeps blocks of this size after a larger one was freed."""
    program = """
import numpy as np
from onnx_oamip.core import freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
taken = freed_memory.return_large_blocks()
np.ones(3 << 20)
blocks = [np.ones(1 << 20) for _ in range(8)]
last = blocks.pop()  # without the option, everything below it stays
before = resident()
blocks.clear()
print(taken, before - resident() > 50e6)
"""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["True", "True"]
