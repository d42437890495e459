"""Which versions decide a result."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

from onnx_oamip.core.version import __version__


def versions() -> dict[str, str | None]:
    """Versions of what decides a result; null for what is not installed."""
    return {
        "onnx_oamip": __version__,
        "onnx": _installed("onnx"),
        "onnxruntime": _installed("onnxruntime", "onnxruntime-gpu"),
        "numpy": _installed("numpy"),
        "python": platform.python_version(),
        "onnx_graphsurgeon": _installed("onnx-graphsurgeon"),
        "gurobipy": _installed("gurobipy"),
        "highspy": _installed("highspy"),
    }


@cache
def sources() -> str:
    """Digest of this package's own sources, which a version's number does not tell apart."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _installed(*names: str) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
