"""Versions that a result depends on: packages, Python, and the sources of this package."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

from onnx_oamip.core.solvers import PACKAGES as SOLVER_PACKAGES
from onnx_oamip.core.version import __version__

PACKAGE = Path(__file__).parents[1]
"""Folder of the whole package."""


def versions() -> dict[str, str | None]:
    """Find the versions of everything that decides a result.

    Returns:
        Version by package; None for a package that is not installed.
    """
    return {
        "onnx_oamip": __version__,
        "onnx": _installed("onnx"),
        "onnxruntime": _installed("onnxruntime", "onnxruntime-gpu"),
        "numpy": _installed("numpy"),
        "python": platform.python_version(),
        "onnx_graphsurgeon": _installed("onnx-graphsurgeon"),
        **{package: _installed(package) for package in SOLVER_PACKAGES.values()},
    }


@cache
def sources() -> str:
    """Digest the sources of this package, which differ between commits of one version.

    Returns:
        SHA-256 in hexadecimal digits.
    """
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _installed(*names: str) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
