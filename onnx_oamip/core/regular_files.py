"""Check of paths to read: pipes have no end in sight, and devices none at all."""

from __future__ import annotations

import os
from pathlib import Path

from onnx_oamip.core.errors import OamipError


def refuse_special(path: Path, what: str, error: type[OamipError]) -> None:
    """Refuse a path that exists and is neither a file nor a folder.

    Args:
        path: The path; a missing one is left to the reader, whose message says what it needs.
        what: What the path is for, in a sentence: "the configuration".
        error: Kind of error to raise.

    Raises:
        OamipError: The path is a pipe, a socket or a device; of the given kind.
    """
    # Not the methods of Path, which raise errors for names that no file can have.
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise error(f"{what} {path} is a pipe or a device; give a file.")


def same_file(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
) -> bool:
    """Check whether two paths name one file, which need not exist.

    Args:
        first: A path.
        second: Another one, absolute or relative, with or without links.

    Returns:
        True for the same file.
    """
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):  # a configuration can hold a name that no file can have
        return os.path.abspath(first) == os.path.abspath(second)
