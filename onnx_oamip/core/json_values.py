"""Conversion of records to the types of strict JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import PurePath
from typing import Any

import numpy as np


def plain_document(value: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a document.

    Args:
        value: Values by key.

    Returns:
        The document in the types of JSON.
    """
    return {name: plain(item) for name, item in value.items()}


def plain(value: Any) -> Any:
    """Convert a value.

    Args:
        value: Numbers, arrays, mappings, sequences, sets and paths, nested as needed.

    Returns:
        The value in the types of JSON; infinities and NaN, which JSON cannot express, become None.

    Raises:
        TypeError: A value is of another type.
    """
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        if math.isfinite(value):
            return float(value)
        return None
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (Sequence, AbstractSet)):
        return [plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no place in a report")
