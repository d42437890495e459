"""Samples from a user's function, named ``module:function``, or from feeds in memory."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.foreign_code import described, foreign_code
from onnx_oamip.core.records import Array, Model, Reading
from onnx_oamip.data.loaded import Format, Loaded
from onnx_oamip.data.unequal import FeedCollector

FILES = (".npz", ".npy", ".parquet")
"""Suffixes of files: a name with a colon and one of these names no function."""

EXPECTED = "an iterable of feeds, dicts of arrays by input name"
ADVICE = "call it in Python to see where, and correct it"


def matches(source: str) -> bool:
    """Test for ``module:function``.

    Args:
        source: Name of a source.

    Returns:
        True if it names a function.
    """
    path = Path(source)
    return ":" in source and path.suffix not in FILES and not path.exists()


def load(source: str, _model: Model, reading: Reading) -> Loaded:
    """Call a function and collect its feeds.

    Args:
        source: ``module:function``. The module is searched in the working directory as well. The function takes no
            arguments and returns an iterable of feeds (dicts of arrays by input name), or an object with ``get_next()``
            like ONNX Runtime's CalibrationDataReader.
        _model: Ignored: a function knows its model.
        reading: Most samples to take.

    Returns:
        Arrays by input name, one whole feed per index of axis 0.

    Raises:
        DataError: The function cannot be imported, fails, or yields no feeds, or feeds of unequal names or types.
    """
    where = f"`data={source}`"
    function = _imported(source, where)
    with foreign_code(where, DataError, ADVICE):
        feeds = function()
    return _collected(feeds, where, source, reading.most)


def collect(feeds: Any, where: str, most: int | None) -> Loaded:
    """Collect feeds in memory.

    Args:
        feeds: An iterable of feeds, or an object with ``get_next()``.
        where: Name of the source.
        most: Most samples to take; None for all.

    Returns:
        Arrays by input name, one whole feed per index of axis 0.

    Raises:
        DataError: There are no feeds, or they have unequal names or types.
    """
    return _collected(feeds, where, where, most)


def _collected(feeds: Any, where: str, source: str, most: int | None) -> Loaded:
    """Feeds of up to ``most`` samples, with a note if there are more."""
    collector = FeedCollector(where)
    samples = 0
    notes: tuple[str, ...] = ()
    for feed in _checked(feeds, where):
        if most is not None and samples >= most:
            limit = f"as `samples={most}` allows"
            notes = (f"{where}: only the first {samples:,} samples are used, {limit}",)
            break
        collector.append(feed)
        samples += _rows(feed, f"{where} yielded feed {collector.count - 1}")
    if not collector.count:
        raise DataError(f"{where} yielded no feeds; expected {EXPECTED}.")
    return Loaded(collector.finish(), source, notes=notes)


def _imported(source: str, where: str) -> Callable[[], Any]:
    """The function of a source."""
    module_name, _, name = source.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (Exception, SystemExit) as error:  # importing runs the user's own code
        raise DataError(
            f"{where} cannot be imported: {described(error)}; expected an importable module:function that returns "
            "feeds."
        ) from error
    if not callable(function):
        raise DataError(
            f"{where} is a {type(function).__name__}; expected a function that returns feeds."
        )
    return cast("Callable[[], Any]", function)


def _checked(feeds: Any, where: str) -> Iterator[Mapping[str, Array]]:
    """Feeds one by one, each a dict by name. The user's code runs at every step: any exception is possible."""
    with foreign_code(where, DataError, ADVICE):
        steps = _steps(feeds)
    if steps is None:
        raise DataError(f"{where} returned a {type(feeds).__name__}; expected {EXPECTED}.")
    while True:
        with foreign_code(where, DataError, ADVICE):
            found = next(steps, None)
            feed = dict(found) if isinstance(found, Mapping) else {}
        if found is None:
            return
        if not feed:
            raise DataError(f"{where} yielded a {type(found).__name__}; expected {EXPECTED}.")
        if not all(isinstance(name, str) for name in feed):
            raise DataError(
                f"{where} yielded a feed whose names are no texts; expected {EXPECTED}."
            )
        yield {name: _array(name, value, where) for name, value in feed.items()}


def _array(name: str, value: Any, where: str) -> Array:
    try:
        return np.asarray(value)
    except (
        Exception
    ) as error:  # lists of unequal lengths, or an object that fails to become an array
        raise DataError(
            f"{where} yielded '{name}', which is no array: {described(error)}; give an array of numbers."
        ) from error


def _steps(feeds: Any) -> Iterator[Any] | None:
    """Iterate over feeds; None for anything that has none."""
    if isinstance(feeds, type):  # a class of readers, not a reader
        return None
    if hasattr(feeds, "get_next"):
        return iter(feeds.get_next, None)
    if isinstance(feeds, (str, bytes, Mapping)) or not isinstance(feeds, Iterable):
        return None
    return iter(feeds)


def _rows(feed: Mapping[str, Array], where: str) -> int:
    """Samples of a feed, by the longest leading axis of its arrays.

    Raises:
        DataError: An array has no samples.
    """
    shapes = {name: value.shape for name, value in feed.items()}
    for name, shape in shapes.items():
        if shape and not shape[0]:
            raise DataError(
                f"{where} without samples: '{name}' has shape {shape}; leave such feeds out."
            )
    return max((shape[0] for shape in shapes.values() if shape), default=1)


FORMAT = Format("module:function", matches, load)
