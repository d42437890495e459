"""Samples in memory as other libraries hold them: bare arrays, inputs with labels, loaders and data sets.

They become arrays or feeds by name:

=================================  ==================================================================================
an array or a tensor               the model's only input
a tuple of arrays                  the inputs in the order of the model; one more holds the labels
an iterable of such values         one batch after the other, as a ``DataLoader`` of PyTorch yields them
an object with items and a length  one sample after the other, evenly spread if there are too many (a ``Dataset``)
=================================  ==================================================================================
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import Array, Model
from onnx_oamip.data import layouts
from onnx_oamip.data.array_checks import LABELS

LOG = logging.getLogger("onnx_oamip")
EXPECTED = "an array for the only input, a tuple with the inputs in order and labels last, or a dict by name"


class Named(NamedTuple):
    """Samples with the names of their arrays.

    Attributes:
        samples: Arrays by name, or an iterable of feeds by name.
        most: Largest number of samples to take of the feeds; None for all.
    """

    samples: Any
    most: int | None = None


def by_name(source: Any, model: Model, most: int) -> Named:
    """Name the arrays of samples in memory.

    Args:
        source: Samples in one of the forms above, or feeds by name.
        model: Model that reads the samples.
        most: Largest number of samples to take of a source that may be large or without an end.

    Returns:
        Arrays or feeds by name. What is none of these is returned as it is.

    Raises:
        DataError: The number of arrays is not that of the inputs.
    """
    if isinstance(source, Mapping):
        return Named({name: _on_host(value) for name, value in source.items()})
    names = tuple(port.name for port in model.inputs)
    if _is_array(source) or (isinstance(source, tuple) and all(map(_is_array, source))):
        return Named(_named(source, names))
    limit = None if hasattr(source, "__len__") else most
    if hasattr(source, "get_next") or isinstance(source, (type, str, bytes)):
        return Named(source, limit)
    if isinstance(source, Iterable):
        return _of_items(source, model, most, limit)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        places = np.linspace(0, len(source) - 1, min(len(source), most)).astype(int).tolist()
        return Named([_named(source[place], names) for place in places])
    return Named(source, limit)


def _of_items(
    source: Iterable[Any],
    model: Model,
    most: int,
    limit: int | None,
) -> Named:
    """Feeds by name as they are, and batches without names sample by sample."""
    items = iter(source)
    first = next(items, None)
    if first is None or isinstance(first, Mapping):
        return Named(_Feeds(first, items, model), limit)
    if not isinstance(source, Sequence):
        limit = most
    feeds = _Feeds(first, items, model)
    if _is_batch(feeds.named(first), model):
        return Named(_first(_split(feeds), limit))
    return Named(feeds, limit)


class _Feeds:
    """Items of an iterable as feeds by name; the first was read before."""

    def __init__(self, first: Any, others: Iterator[Any], model: Model) -> None:
        self._first = first
        self._others = others
        self._names = tuple(port.name for port in model.inputs)

    def named(self, item: Any) -> Any:
        """Name the arrays of one item.

        Args:
            item: A feed, an array, or arrays in the order of the inputs.

        Returns:
            A feed by name; an item of another type as it is.
        """
        return _named(item, self._names)

    def __iter__(self) -> Iterator[Any]:
        if self._first is None:
            return
        yield self.named(self._first)
        for item in self._others:
            yield self.named(item)


def _is_batch(feed: Any, model: Model) -> bool:
    """Test for a feed whose arrays all count samples on axis 0."""
    if not isinstance(feed, Mapping):
        return False
    arrays = {name: np.asarray(value) for name, value in feed.items()}
    if len({array.shape[:1] for array in arrays.values()}) != 1:
        return False
    return all(
        arrays[port.name].ndim == len(port.dims) and layouts.batch_axis(port, model) == 0
        for port in model.inputs
    )


def _split(feeds: Iterable[Any]) -> Iterator[Any]:
    """Samples of batches one by one, without their batch axis."""
    for feed in feeds:
        arrays = {name: np.asarray(value) for name, value in feed.items()}
        for place in range(min(len(array) for array in arrays.values())):
            yield {name: array[place] for name, array in arrays.items()}


def _first(samples: Iterator[Any], most: int | None) -> Iterator[Any]:
    for count, sample in enumerate(samples):
        if most is not None and count >= most:
            LOG.warning(
                "the data: only the first %s samples are used, as `samples=%d` allows", most, most
            )
            return
        yield sample


def _named(item: Any, names: tuple[str, ...]) -> Any:
    """One item by name; one of another type is returned as it is, and refused where it is read."""
    if isinstance(item, Mapping):
        return {name: _on_host(value) for name, value in item.items()}
    if _is_array(item):
        values: Sequence[Any] = (item,)
    elif isinstance(item, (tuple, list)) and item:
        values = item
    else:
        return item
    if len(values) not in (len(names), len(names) + 1):
        raise DataError(
            f"the data has {len(values)} arrays without names for a model with {len(names)} inputs "
            f"({', '.join(names)}); give {EXPECTED}."
        )
    keys = (*names, LABELS)[: len(values)]
    return {key: _on_host(value) for key, value in zip(keys, values, strict=True)}


def _is_array(value: Any) -> bool:
    """Test for arrays and tensors, which have a shape; a feed by name and a list have none."""
    return hasattr(value, "__array__") and hasattr(value, "shape")


def _on_host(value: Any) -> Any:
    """A tensor of PyTorch as an array; numpy takes all others as they are."""
    if not hasattr(value, "detach"):
        return value
    array: Array = value.detach().cpu().numpy()
    return array
