"""Formatting of numbers and names for readers: units, three digits, line breaks in long names."""

from __future__ import annotations

import re

DASH = "\u2013"
"""Stands for a value that was not measured."""
SPACE = "\u00a0"
"""Between a number and its unit: no line ends there."""
_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def pieces(text: str) -> list[str]:
    """Cuts a name behind its separators, where a line may end.

    Args:
        text: A name such as ``/encoder/layer.0/MatMul``.

    Returns:
        The pieces, separators included.
    """
    return re.findall(r"[^./_:#,]*[./_:#,]+|[^./_:#,]+", text)


def count(value: int) -> str:
    """Formats a whole number with separators: 1,234,567.

    Args:
        value: The number.

    Returns:
        The text.
    """
    return f"{value:,}"


def short(value: float, unit: str = "") -> str:
    """Formats a number with three digits and a decimal prefix: 1.23 M.

    Args:
        value: The number.
        unit: Its unit, behind the prefix.

    Returns:
        The text, with a non-breaking space.
    """
    # A number that rounds up to the next thousand gets the next prefix.
    scale, prefix = next(((s, p) for s, p in _SCALES if abs(value) >= 0.9995 * s), (1.0, ""))
    if scale > 1:
        digits = f"{value / scale:#.3g}".rstrip(".")
    else:
        digits = f"{value:,.0f}"
    return f"{digits}{SPACE}{prefix}{unit}".rstrip()


def percent(value: float | None, digits: int = 1) -> str:
    """Formats a share in percent: 12.3 %.

    Args:
        value: The share, 1 for all; None if it was not measured.
        digits: Digits behind the point.

    Returns:
        The text, a dash for None.
    """
    if value is None:
        return DASH
    return f"{100 * value:.{digits}f}{SPACE}%"


def number(value: float | None) -> str:
    """Formats a number with three digits.

    Args:
        value: The number; None if it was not measured.

    Returns:
        The text, a dash for None.
    """
    if value is None:
        return DASH
    return f"{value:.3g}"
