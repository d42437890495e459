"""Samples from a user's function, named ``module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from onnx_oamip.core.errors import DataError
from onnx_oamip.data.out_of_core import Spool, Values


class _ArrayType(NamedTuple):
    """Shape and element type of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, value: Any) -> _ArrayType:
        array = np.asarray(value)
        return cls(array.shape, array.dtype)

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"


def load(source: str) -> dict[str, Values]:
    """Call a function and collect its feeds.

    Args:
        source: ``module:function``. The module is searched in the working directory as well. The function takes no
            arguments and returns an iterable of feeds (dicts of arrays by input name), or an object with ``get_next()``
            like ONNX Runtime's CalibrationDataReader.

    Returns:
        Arrays by input name, one whole feed per index of axis 0.

    Raises:
        DataError: The function cannot be imported, fails, or yields no feeds or unequal ones.
    """
    feeds = _feeds(source)
    first = _next(feeds, source)
    if not isinstance(first, Mapping) or not first:
        raise _no_feeds(source)
    # One index is one whole feed: feeds of equal shapes can be stacked, whatever their own batch is.
    types = {name: _ArrayType.of(value) for name, value in first.items()}
    spools = {name: Spool(f"`data={source}`: what it yields for '{name}'") for name in first}
    count = 0
    feed: Any = first
    while feed is not None:
        if not isinstance(feed, Mapping):
            raise _no_feeds(source)
        for name, spool in spools.items():
            _check_equal(feed, name, types[name], count, source)
            spool.append(np.asarray(feed[name]))
        count += 1
        feed = _next(feeds, source)
    arrays = {}
    for name, (shape, dtype) in types.items():
        arrays[name] = spools[name].finish((count, *shape), dtype)
    return arrays


def _feeds(source: str) -> Iterator[Any]:
    """Import and call the function."""
    module_name, _, function = source.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        result = getattr(importlib.import_module(module_name), function)()
        if hasattr(result, "get_next"):
            return iter(result.get_next, None)
        return iter(result)
    except Exception as error:
        raise _failed(source, error) from error


def _next(feeds: Iterator[Any], source: str) -> Any:
    """The next feed, or None at the end. The user's code runs here: any exception is possible."""
    try:
        return next(feeds, None)
    except Exception as error:
        raise _failed(source, error) from error


def _check_equal(
    feed: Mapping[str, Any], name: str, wanted: _ArrayType, number: int, source: str
) -> None:
    """Check that an array of a feed has the type that it has in the first feed."""
    if name not in feed:
        difference = f"there is no '{name}'"
    else:
        present = _ArrayType.of(feed[name])
        if present == wanted:
            return
        difference = f"'{name}' is {present}"
    raise DataError(
        f"`data={source}` yields feeds of unequal names or shapes, or types (in the first '{name}' is {wanted}, in "
        f"feed {number} {difference}); make them equal."
    )


def _failed(source: str, error: Exception) -> DataError:
    return DataError(
        f"`data={source}`: {type(error).__name__}: {error}; expected an importable module:function that yields feeds."
    )


def _no_feeds(source: str) -> DataError:
    return DataError(f"`data={source}` yielded no feeds; expected dicts of arrays by input name.")
