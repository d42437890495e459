"""Text from files made safe to print: names may hold line ends, escape sequences and invisible characters."""

from __future__ import annotations

import unicodedata

_HIDDEN_CATEGORIES = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))


def visible(text: str) -> str:
    r"""Escape control, formatting, surrogate and unassigned characters.

    Args:
        text: Any text.

    Returns:
        The text with these characters spelt out, as in ``\u202e``.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        _escaped(c) if unicodedata.category(c) in _HIDDEN_CATEGORIES else c for c in text
    )


def _escaped(character: str) -> str:
    code = ord(character)
    if code < 256:
        return f"\\x{code:02x}"
    if code < 65536:
        return f"\\u{code:04x}"
    return f"\\U{code:08x}"


def shortened(text: str, most: int = 80) -> str:
    """Leave out the middle of a long name.

    Args:
        text: Any text.
        most: Longest result in characters.

    Returns:
        The text, or its beginning and its end with ``...`` between them.
    """
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return f"{text[: most - 3 - half]}...{text[-half:]}"
