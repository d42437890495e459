"""JSON text for people: compact layout, unique keys, and the position of a value in a file."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

MAX_LINE_CHARACTERS = 110
"""Length up to which a small object is written on one line."""
_DECODER = json.JSONDecoder()
_NUMBER_LIST = re.compile(r"\[\n[\s\d,]+\]")
_SMALL_OBJECT = re.compile(r"\{\n[^{}\[\]]{1,200}\}")
_BREAK_AT_BRACKET = re.compile(r"\s*\n\s*(?=[\]}])|(?<=[\[{])\s*\n\s*")
_BREAK = re.compile(r"\s*\n\s*")


def compact(text: str) -> str:
    """Write lists of numbers and small objects on one line each.

    Args:
        text: Indented JSON; its strings hold no line breaks.

    Returns:
        The same document with fewer lines.
    """
    text = _NUMBER_LIST.sub(lambda match: _one_line(match[0]), text)
    return _SMALL_OBJECT.sub(lambda match: _shorter(match[0]), text)


def _shorter(text: str) -> str:
    """An object on one line, unless that line is too long and the original has none that is."""
    return min(_one_line(text), text, key=_has_long_line)


def _one_line(text: str) -> str:
    return _BREAK.sub(" ", _BREAK_AT_BRACKET.sub("", text))


def _has_long_line(text: str) -> bool:
    return max(map(len, text.splitlines())) > MAX_LINE_CHARACTERS


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object, as ``object_pairs_hook`` of ``json.loads``.

    Args:
        pairs: Keys and values.

    Returns:
        The object.

    Raises:
        ValueError: A key occurs twice: readers differ in the value that they take.
    """
    result = dict(pairs)
    if len(result) < len(pairs):
        name, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"'{name}' stands twice in one object")
    return result


def plain_number(value: Any) -> Any:
    """Convert a value that JSON does not know, as ``default`` of ``json.dumps``.

    Args:
        value: The value.

    Returns:
        A number of numpy as one of Python; anything else as text.
    """
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return str(value)


def line_of(text: str, path: Sequence[str | int]) -> int:
    """Find the line of a value.

    Args:
        text: Valid JSON.
        path: Keys and indices that lead to the value.

    Returns:
        Line, counted from 1, of the value or of the innermost value on the path that exists.
    """
    position = _next_token(text, 0)
    for part in path:
        matches = (start for key, start in _members(text, position) if key == part)
        start = next(matches, None)
        if start is None:
            break
        position = start
    return text.count("\n", 0, position) + 1


def _members(text: str, position: int) -> Iterator[tuple[str | int, int]]:
    """Key or index, and position of the value, of each member of the object or array at a position."""
    opening = text[position]
    if opening not in "{[":
        return
    position = _next_token(text, position + 1)
    for index in itertools.count():
        if text[position] in "}]":
            return
        key: str | int = index
        if opening == "{":
            key, end = _DECODER.raw_decode(text, position)
            position = _next_token(text, end)
        yield key, position
        _, end = _DECODER.raw_decode(text, position)
        position = _next_token(text, end)


def _next_token(text: str, position: int) -> int:
    """Position of the next value or closing bracket, behind white space and separators."""
    while text[position] in " \t\n\r,:":
        position += 1
    return position


def describe_path(content: Any, path: Sequence[str | int]) -> str:
    """Describe the location of a value.

    Args:
        content: The document.
        path: Keys and indices that lead to the value.

    Returns:
        The path in words; members of lists with their names.
    """
    words: list[str] = []
    for part in path:
        # A missing key is described as well, and so is everything behind it.
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):
            content = None
        if isinstance(content, dict):
            name = content.get("name")
        else:
            name = None
        if isinstance(part, str):
            words.append(f"'{part}'")
        elif name:
            words.append(f"number {part} ({name})")
        else:
            words.append(f"number {part}")
    return " ".join(words) or "the whole file"
