"""Records of the formats of samples: what a reader returns, and the entry of a format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from onnx_oamip.core.records import Model, Reading
from onnx_oamip.data.unequal import Stored


@dataclass(frozen=True)
class Loaded:
    """Samples as a reader found them, before they are checked against the model.

    Attributes:
        arrays: Arrays by name: inputs, ``labels``, ``NAME.scale``, ``NAME.offset``.
        where: Name of the source in messages.
        reading: How images were read, for the report; None without images.
        notes: Remarks for the report.
    """

    arrays: Mapping[str, Stored]
    where: str
    reading: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class Format:
    """A format of samples.

    Attributes:
        description: Noun with its article, for the message about unknown sources.
        matches: Tests whether a source has this format, by its name, or by the content of a file or folder.
        read: Reads a source for a model.
        has_parts: True if the source may hold held-out samples under ``eval.`` names.
        has_columns: True if the option ``column`` chooses among its columns.
        check_extra: Raises EnvironmentMissing if a package is missing; None if the format needs none.
    """

    description: str
    matches: Callable[[str], bool]
    read: Callable[[str, Model, Reading], Loaded]
    has_parts: bool = False
    has_columns: bool = False
    check_extra: Callable[[str], None] | None = None
