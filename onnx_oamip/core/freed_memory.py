"""Memory of freed arrays, which the C library may keep."""

from __future__ import annotations

import ctypes
import sys

LARGE = 4 << 20
"""Bytes from which a block goes back to the system when it is freed."""
_MMAP_THRESHOLD = -3
"""Number of that option of glibc's ``mallopt``."""


def return_large_blocks() -> bool:
    """Return large blocks to the system as soon as they are freed, where the C library is glibc.

    By itself, glibc raises its own threshold up to 32 MiB with every larger block that is freed, and keeps smaller ones
    in the heaps of all threads: with arrays of some MiB, a process holds up to twice the memory that it uses.

    Returns:
        True if the C library took the option.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.pythonapi, "mallopt", None)  # other C libraries have none
    return mallopt is not None and mallopt(_MMAP_THRESHOLD, LARGE) == 1
