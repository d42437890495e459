"""Formats of samples. A new one is a module with a ``Format``, and its entry in ``FORMATS``."""

from __future__ import annotations

from pathlib import Path

from onnx_oamip.core.errors import DataError
from onnx_oamip.data import array_folders, feed_functions, images, numpy_files, parquet
from onnx_oamip.data.loaded import Format

FORMATS: tuple[Format, ...] = (
    feed_functions.FORMAT,
    parquet.FORMAT,
    array_folders.FORMAT,
    images.FORMAT,
    numpy_files.FORMAT,
)
"""All formats; a source has the first that matches."""


def matching(source: str) -> Format | None:
    """Find the format of a source by its name and content.

    Args:
        source: Path or ``module:function``.

    Returns:
        The first format that matches, None if there is none.
    """
    return next((entry for entry in FORMATS if entry.matches(source)), None)


def find(source: str) -> Format:
    """Find the format of a source.

    Args:
        source: Path or ``module:function``.

    Returns:
        Its format.

    Raises:
        DataError: The source does not exist, or has none of the formats.
    """
    entry = matching(source)
    is_function = entry is feed_functions.FORMAT
    if entry is not None and (is_function or Path(source).exists()):
        return entry
    descriptions = [known.description for known in FORMATS]
    if Path(source).exists():
        finding = "its format is not read"
    else:
        finding = "no such data file"
    raise DataError(
        f"{source}: {finding}; give {', '.join(descriptions[1:])}, or {descriptions[0]}."
    )
