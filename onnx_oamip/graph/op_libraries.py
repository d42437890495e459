"""Libraries of custom operators of a run, which its sessions of ONNX Runtime register."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_oamip.core.errors import EnvironmentMissing
from onnx_oamip.core.regular_files import refuse_special


@dataclass(frozen=True)
class OpLibrary:
    """A library of custom operators.

    Attributes:
        path: Absolute path of the shared library.
        sha256: Digest of its content.
    """

    path: str
    sha256: str


_in_use: ContextVar[tuple[OpLibrary, ...]] = ContextVar("op_libraries", default=())
"""The libraries of a run belong to its thread: two runs in one process may have different ones."""


def use(paths: Iterable[str]) -> tuple[OpLibrary, ...]:
    """Let later sessions of this thread register libraries of custom operators, in place of those before.

    Args:
        paths: Shared libraries.

    Returns:
        These libraries.

    Raises:
        EnvironmentMissing: A file is missing or cannot be read.
    """
    libraries = tuple(_read(Path(path)) for path in paths)
    share(libraries)
    return libraries


def share(libraries: tuple[OpLibrary, ...]) -> None:
    """Give this thread the libraries of the thread that started it.

    Args:
        libraries: What :func:`in_use` returns there.
    """
    _in_use.set(libraries)


def _read(path: Path) -> OpLibrary:
    refuse_special(path, "`op_library`", EnvironmentMissing)
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EnvironmentMissing(
            f"`op_library`: {path} cannot be read ({reason}); give the shared library of the custom operators."
        ) from error
    return OpLibrary(os.path.abspath(path), hashlib.sha256(content).hexdigest())


def in_use() -> tuple[OpLibrary, ...]:
    """List the libraries of this thread.

    Returns:
        The libraries, in the order in which they were given.
    """
    return _in_use.get()


def register(options: Any) -> None:
    """Register the libraries of this thread for a session.

    Args:
        options: Session options of ONNX Runtime.

    Raises:
        EnvironmentMissing: ONNX Runtime refuses a library.
    """
    for library in in_use():
        try:
            options.register_custom_ops_library(library.path)
        except Exception as error:  # ONNX Runtime documents no type
            text = " ".join(str(error).split())[:300].rstrip(".")
            raise EnvironmentMissing(
                f"`op_library`: ONNX Runtime cannot register {library.path} ({text}); give a shared library for this "
                "release that exports RegisterCustomOps."
            ) from error
