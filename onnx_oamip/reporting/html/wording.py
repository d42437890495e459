"""Numbers and foreign names as a reader meets them: units, three digits, nothing invisible."""

from __future__ import annotations

import re

DASH = "\u2013"
"""Stands for what was not measured."""
SPACE = "\u00a0"
"""Between a number and its unit: no line ends there."""
_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def pieces(text: str) -> list[str]:
    """The text cut behind what separates the parts of a name, where a line may end."""
    return re.findall(r"[^./_:#,]*[./_:#,]+|[^./_:#,]+", text)


def count(value: int) -> str:
    """1,234,567."""
    return f"{value:,}"


def short(value: float, unit: str = "") -> str:
    """1.23 M: three digits and a decimal prefix."""
    # What rounds up to the next thousand belongs to the next prefix.
    scale, prefix = next(((s, p) for s, p in _SCALES if abs(value) >= 0.9995 * s), (1.0, ""))
    digits = f"{value / scale:#.3g}".rstrip(".") if scale > 1 else f"{value:,.0f}"
    return f"{digits}{SPACE}{prefix}{unit}".rstrip()


def percent(value: float | None, digits: int = 1) -> str:
    """A share as 12.3 %, or a dash."""
    return DASH if value is None else f"{100 * value:.{digits}f}{SPACE}%"


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    return DASH if value is None else f"{value:.3g}"


def plural(value: int, what: str) -> str:
    """1 group, 2 groups."""
    return f"{value:,} {what}{'' if value == 1 else 's'}"
