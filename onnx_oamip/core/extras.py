"""Packages that only some features need: the error that names the extra which installs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onnx_oamip.core.errors import EnvironmentMissing

MODULES = {
    "report": ("jinja2", "matplotlib"),
    "images": ("PIL",),
    "parquet": ("pyarrow",),
    "pack": ("sklearn",),
    "recover": ("torch",),
    "mlflow": ("mlflow",),
    "olive": ("olive",),
    "cluster": ("distributed",),
}
"""Importable names of the packages of every extra."""


@contextmanager
def imports_of(extra: str, purpose: str) -> Iterator[None]:
    """Context for the imports of the packages of an extra.

    Args:
        extra: Name of the extra among the project's optional dependencies.
        purpose: Feature that needs the packages, the subject of the error's sentence.

    Raises:
        EnvironmentMissing: A package is not installed, or is broken.
    """
    try:
        yield
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] == "onnx_oamip":
            raise  # a fault of this package, which no installation repairs
        reason = str(error).partition("\n")[0].rstrip(".")
        raise EnvironmentMissing(
            f"{purpose} needs the packages of the extra '{extra}' ({reason}); install them with pip install "
            f"'onnx-oamip[{extra}]'."
        ) from error
