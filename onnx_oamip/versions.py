"""Which versions decide a result."""

from __future__ import annotations

import platform
from importlib import metadata

from . import __version__


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


def _installed(*names: str) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
