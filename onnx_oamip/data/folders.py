"""Files of a folder of samples, without what systems and editors leave there."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

LEFT_BEHIND = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found", "__pycache__"}
"""Folders of archives, file servers and systems. Hidden ones (``.ipynb_checkpoints``, ``._1.png``) start with a dot."""


def visible_files(folder: Path, suffixes: Collection[str]) -> Iterator[Path]:
    """Find the files of a folder and its subfolders, links included. Hidden files and folders are left out.

    Args:
        folder: Folder to search.
        suffixes: Suffixes of the files in lower case.

    Yields:
        Paths in no particular order.
    """
    seen: set[str] = set()
    for root, names, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        # A link to a folder above it would be followed forever.
        names[:] = [] if real in seen else [name for name in names if is_visible(name)]
        if real in seen:
            continue
        seen.add(real)
        for name in files:
            path = Path(root, name)
            if is_visible(name) and path.suffix.lower() in suffixes and path.is_file():
                yield path


def is_visible(name: str) -> bool:
    """Test the name of a file or folder.

    Args:
        name: The name.

    Returns:
        False if it is hidden, or left behind by a system.
    """
    return not name.startswith(".") and name not in LEFT_BEHIND
