"""Samples from a user's function, named ``module:function``, or from feeds in memory."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import Model, Reading
from onnx_oamip.data.loaded import Format, Loaded
from onnx_oamip.data.unequal import FeedCollector, Stored

FILES = (".npz", ".npy", ".parquet")
"""Suffixes of files: a name with a colon and one of these names no function."""


def matches(source: str) -> bool:
    """Test for ``module:function``.

    Args:
        source: Name of a source.

    Returns:
        True if it names a function.
    """
    path = Path(source)
    return ":" in source and path.suffix not in FILES and not path.exists()


def load(source: str, _model: Model, _reading: Reading) -> Loaded:
    """Call a function and collect its feeds.

    Args:
        source: ``module:function``. The module is searched in the working directory as well. The function takes no
            arguments and returns an iterable of feeds (dicts of arrays by input name), or an object with ``get_next()``
            like ONNX Runtime's CalibrationDataReader.
        _model: Ignored: a function knows its model.
        _reading: Ignored.

    Returns:
        Arrays by input name, one whole feed per index of axis 0.

    Raises:
        DataError: The function cannot be imported, fails, or yields no feeds, or feeds of unequal names or types.
    """
    return Loaded(_collected(_called(source), f"`data={source}`"), source)


def collect(feeds: Any, where: str) -> dict[str, Stored]:
    """Collect feeds in memory.

    Args:
        feeds: An iterable of feeds, or an object with ``get_next()``.
        where: Name of the source.

    Returns:
        Arrays by input name, one whole feed per index of axis 0.

    Raises:
        DataError: There are no feeds, or they have unequal names or types.
    """
    try:
        iterator = _iterator(feeds)
    except TypeError as error:
        raise _no_feeds(where) from error
    return _collected(iterator, where)


def _collected(feeds: Iterator[Any], where: str) -> dict[str, Stored]:
    collector = FeedCollector(where)
    while (feed := _next(feeds, where)) is not None:
        if not isinstance(feed, Mapping) or not feed:
            raise _no_feeds(where)
        collector.append(feed)
    if not collector.count:
        raise _no_feeds(where)
    return collector.finish()


def _called(source: str) -> Iterator[Any]:
    """Import and call the function."""
    module_name, _, function = source.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return _iterator(getattr(importlib.import_module(module_name), function)())
    except Exception as error:
        raise _failed(f"`data={source}`", error) from error


def _iterator(feeds: Any) -> Iterator[Any]:
    """Iterate over feeds; raises TypeError for anything else."""
    if hasattr(feeds, "get_next"):
        return iter(feeds.get_next, None)
    return iter(feeds)


def _next(feeds: Iterator[Any], where: str) -> Any:
    """The next feed, or None at the end. The user's code runs here: any exception is possible."""
    try:
        return next(feeds, None)
    except Exception as error:
        raise _failed(where, error) from error


def _failed(where: str, error: Exception) -> DataError:
    return DataError(
        f"{where}: {type(error).__name__}: {error}; expected an importable module:function that yields feeds."
    )


def _no_feeds(where: str) -> DataError:
    return DataError(f"{where} yielded no feeds; expected dicts of arrays by input name.")


FORMAT = Format("module:function", matches, load)
