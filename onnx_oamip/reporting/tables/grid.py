"""Tables of the terminal that show numbers in full at any width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table

LONGEST_WORD = 16
"""Characters of a word that stays in one piece; a longer one is folded."""
GAP = 3
"""Characters between two columns."""


class Grid(Table):
    """A table that is divided into several, each with the first column, where the console is too narrow for it."""

    def __init__(self, *, header: bool = True) -> None:
        """Create a table without columns.

        Args:
            header: Show the headings.
        """
        super().__init__(
            box=box.SIMPLE_HEAD if header else None,
            show_header=header,
            show_edge=False,
            pad_edge=False,
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = self._divided(console, options)
        if len(parts) == 1:
            yield from super().__rich_console__(console, options)
            return
        for number, columns in enumerate(parts):
            if number:
                yield ""
            yield self._with(columns)

    def _divided(self, console: Console, options: ConsoleOptions) -> list[list[Column]]:
        """Columns of the tables that fit."""
        if not self.columns:
            return [[]]
        first, *others = self.columns
        parts = [[first]]
        start = left = options.max_width - _width(first, console, options)
        for column in others:
            width = GAP + _width(column, console, options)
            if width > left and len(parts[-1]) > 1:
                parts.append([first])
                left = start
            parts[-1].append(column)
            left -= width
        return parts

    def _with(self, columns: Sequence[Column]) -> Grid:
        part = Grid(header=self.show_header)
        part.columns = [replace(column, _index=i) for i, column in enumerate(columns)]
        part.rows = self.rows
        return part


def _width(column: Column, console: Console, options: ConsoleOptions) -> int:
    """Least width at which numbers are complete and words in one piece."""
    cells = [Measurement.get(console, options, cell) for cell in (column.header, *column.cells)]
    if column.no_wrap:
        return max(cell.maximum for cell in cells)
    return min(max(cell.minimum for cell in cells), LONGEST_WORD)
