"""Short texts and HTML tables by which records show themselves in interpreters and notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

Rows = Iterable[Sequence[object]]
"""Rows of a table, one value per column."""
COST_HEADER = ("", "before", "after", "kept")


def summary(before: Any, after: Any) -> str:
    """Describe costs before and after in one line.

    Args:
        before: Costs of the original (a ``Cost``).
        after: Costs of the pruned model.

    Returns:
        Such as ``macs 266,200 -> 133,000 (50.0 %), ...``.
    """
    parts = [
        f"{name} {old} -> {new} ({share})" for name, old, new, share in cost_rows(before, after)
    ]
    return ", ".join(parts)


def cost_rows(before: Any, after: Any) -> list[tuple[str, str, str, str]]:
    """List costs before and after.

    Args:
        before: Costs of the original (a ``Cost``).
        after: Costs of the pruned model.

    Returns:
        One row per cost, under ``COST_HEADER``.
    """
    rows = []
    for part in fields(before):
        old = getattr(before, part.name)
        new = getattr(after, part.name)
        share = f"{new / old:.1%}".replace("%", " %") if old else "-"
        rows.append((part.name, f"{old:,}", f"{new:,}", share))
    return rows


def tables(title: str, *parts: tuple[Rows, Sequence[str]]) -> str:
    """Render tables under a title as HTML without styles or scripts of its own.

    Args:
        title: Text above the tables.
        parts: Rows and header of each table; one without rows is left out.

    Returns:
        The HTML.
    """
    body = [f"<p><strong>{html.escape(title)}</strong></p>"]
    for rows, header in parts:
        lines = [_row(row, "td") for row in rows]
        if lines:
            body.append(
                f"<table><thead>{_row(header, 'th')}</thead><tbody>{''.join(lines)}</tbody></table>"
            )
    return f"<div>{''.join(body)}</div>"


def _row(values: Sequence[object], tag: str) -> str:
    cells = "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values)
    return f"<tr>{cells}</tr>"
