"""Kinds of values that options take: how a value is read from text, its range, and the words for a value outside."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

LEAST_MEMORY = 1 << 28
"""Bytes below which a memory limit is refused."""
_MEMORY_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, slots=True)
class Kind:
    """The words for a kind of values.

    Attributes:
        name: Noun with its article, as in "50 is not a share to keep".
        expected: Values to give instead.
        metavar: Placeholder in the help of the command line.
        separator: Text between the parts of a value that holds several; empty for one value.
    """

    name: str
    expected: str
    metavar: str
    separator: str = ""

    def refusal(self, value: object) -> str:
        """Explain why a value is not of this kind.

        Args:
            value: The refused value.

        Returns:
            A clause without a full stop, which names a value to give instead.
        """
        return f"{value!r} is not {self.name}; give {self.expected}"


@dataclass(frozen=True, slots=True)
class Shown:
    """Words of the help for one option, where they do not follow from its type and its owner.

    Attributes:
        metavar: Placeholder for the value.
        default: Text of the default.
        heading: Heading that the option is listed under.
        flag_value: Value where the option is given without one; None if it always takes a value.
    """

    metavar: str | None = None
    default: str | None = None
    heading: str | None = None
    flag_value: str | None = None


KINDS = ("classes", "binary", "values", "embedding", "ignore")
"""Kinds that a user can state for an output."""


def kind_and_weight(text: str) -> tuple[str, float]:
    """Read a statement about an output.

    Args:
        text: ``KIND`` or ``KIND:WEIGHT``.

    Returns:
        The kind, and its weight: 1 where none is given.

    Raises:
        ValueError: It is neither.
    """
    kind, separator, weight = text.partition(":")
    number = float(weight) if separator else 1.0
    if kind not in KINDS or not 0 < number < math.inf:
        raise ValueError(f"{text!r} is no kind of {', '.join(KINDS)} with a weight above 0")
    return kind, number


def _checked_statement(text: str) -> str:
    kind_and_weight(text)
    return text


def _read_percentage(value: Any) -> Any:
    """Turn "50%" into 0.5; anything else is left as it is."""
    text = value.strip() if isinstance(value, str) else value
    if not isinstance(text, str) or not text.endswith("%"):
        return text
    try:
        return float(text[:-1]) / 100
    except ValueError:
        return value


def _read_points(value: Any) -> Any:
    """Turn "5%" into 5 points; anything else is left as it is."""
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str) and text.endswith("%"):
        return text[:-1]
    return text


def _read_memory(value: Any) -> Any:
    """Turn "2GB", "1.5 GiB" or "800M" into bytes, by powers of 1,024."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", value.strip().upper())
    if match is None:
        return value
    return int(float(match[1]) * _MEMORY_UNITS[match[2]])


def _read_alignment(value: Any) -> Any:
    if isinstance(value, str):
        return value.strip()
    return value


def _read_pixels(value: Any) -> Any:
    """Turn "224" into (224, 224) and "224x320" into (224, 320)."""
    if isinstance(value, int):
        return value, value
    if not isinstance(value, str):
        return value
    sides = value.lower().split("x")
    if len(sides) <= 2:
        return (sides[0], sides[-1])
    return value


_SHAPE = re.compile(r"(?P<name>.+)=(?P<lengths>[1-9]\d*(?:x[1-9]\d*)*)", re.DOTALL)


def shape_of(text: str) -> tuple[str, tuple[int, ...]]:
    """Read the shape of an input, or the length of a symbolic dimension.

    Args:
        text: ``NAME=1x3x640x640``.

    Returns:
        The name and the lengths.

    Raises:
        ValueError: It is neither.
    """
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no name with lengths")
    return match["name"], tuple(map(int, match["lengths"].split("x")))


def _checked_shape(text: str) -> str:
    shape_of(text)
    return text


def _read_shapes(value: Any) -> Any:
    """Turn a table of lengths by name, or a single shape, into a list of texts."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, dict):
        return value
    lists = {name: v if isinstance(v, (list, tuple)) else (v,) for name, v in value.items()}
    return tuple(f"{name}={'x'.join(map(str, lengths))}" for name, lengths in lists.items())


def _read_numbers(value: Any) -> Any:
    """Turn "0.4,0.5" into its parts, and one number into a list of one."""
    if isinstance(value, str):
        return [_read_percentage(part) for part in value.split(",")]
    if isinstance(value, (int, float)):
        return [value]
    return value


Share = Annotated[
    float,
    Field(gt=0, le=1),
    BeforeValidator(_read_percentage),
    Kind("a share to keep", "a number above 0 and at most 1, or a percentage such as 50%", "R"),
]
ShareOrZero = Annotated[
    float,
    Field(ge=0, le=1),
    BeforeValidator(_read_percentage),
    Kind("a share", "a number from 0 to 1, or a percentage such as 10%", "R"),
]
ShareBelowOne = Annotated[
    float,
    Field(ge=0, lt=1),
    BeforeValidator(_read_percentage),
    Kind("a share", "a number from 0 and below 1, or a percentage such as 10%", "R"),
]
Points = Annotated[
    float,
    Field(ge=0, lt=100),
    BeforeValidator(_read_points),
    Kind("a number of points", "a number from 0 and below 100, such as 2 or 2%", "P"),
]
Positive = Annotated[
    float,
    Field(gt=0, allow_inf_nan=False),
    Kind("a number above 0", "a finite number above 0", "W"),
]
NotNegative = Annotated[
    float,
    Field(ge=0, allow_inf_nan=False),
    Kind("a number from 0", "a finite number that is not negative", "T"),
]
Seconds = Annotated[
    float,
    Field(gt=0, allow_inf_nan=False),
    Kind("a number of seconds above 0", "a finite number above 0", "S"),
]
Count = Annotated[int, Field(ge=1), Kind("a whole number from 1", "1 or more", "N")]
CountOrZero = Annotated[int, Field(ge=0), Kind("a whole number from 0", "0 or more", "N")]
Alignment = Annotated[
    Annotated[int, Field(ge=1)] | Literal["auto"],
    BeforeValidator(_read_alignment),
    Kind("an alignment", "auto or a whole number of channels from 1", "auto|N"),
]
Memory = Annotated[
    int,
    Field(ge=LEAST_MEMORY),
    BeforeValidator(_read_memory),
    Kind("an amount of memory", "a number of bytes from 256 MiB, or one such as 2GB", "SIZE"),
]
Pixels = Annotated[
    tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]],
    BeforeValidator(_read_pixels),
    Kind("a size in pixels", "pixels as 224, or as 224x320 for the height first", "H[xW]", "x"),
]
_Number = Annotated[float, Field(allow_inf_nan=False)]
Numbers = Annotated[
    tuple[_Number, ...],
    Field(min_length=1),
    BeforeValidator(_read_numbers),
    Kind("a list of numbers", "finite numbers such as 0.485,0.456,0.406", "M[,M,M]", ","),
]
_PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveNumbers = Annotated[
    tuple[_PositiveNumber, ...],
    Field(min_length=1),
    BeforeValidator(_read_numbers),
    Kind("a list of numbers above 0", "finite numbers such as 0.229,0.224,0.225", "S[,S,S]", ","),
]
Patterns = Annotated[
    tuple[str, ...],
    Kind("a list of patterns", "shell patterns such as 'conv1*'", "PATTERN"),
]
Shapes = Annotated[
    tuple[Annotated[str, AfterValidator(_checked_shape)], ...],
    BeforeValidator(_read_shapes),
    Kind(
        "a list of shapes",
        "lengths from 1 by the name of an input or of a symbolic dimension, such as x=1x3x640x640 or length=128",
        "NAME=1x3x640x640",
    ),
]
Name = Annotated[str, Kind("a name", "a text", "NAME")]
Address = Annotated[
    str,
    Field(min_length=1),
    Kind("an address", "one such as tcp://host:8786", "ADDRESS"),
]
Statements = Annotated[
    dict[str, Annotated[str, AfterValidator(_checked_statement)]],
    Kind(
        "a set of statements about outputs",
        "kinds by name, such as {'boxes': 'values:0.5'}; kinds are " + ", ".join(KINDS),
        "NAME=KIND[:WEIGHT]",
    ),
]
