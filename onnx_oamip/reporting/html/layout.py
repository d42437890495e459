"""Elements of a page, and their rendering to one HTML file. This module does not depend on the content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, ClassVar

from jinja2 import Environment, StrictUndefined

from onnx_oamip.core.printable import visible
from onnx_oamip.reporting.html.wording import pieces


@dataclass(frozen=True)
class Card:
    """A key number at the top of the page.

    Attributes:
        name: Its name.
        value: The number.
        note: A line under it.
        share: Length of a bar under it, in [0, 1]; None for no bar.
    """

    name: str
    value: str
    note: str
    share: float | None = None


@dataclass(frozen=True)
class Figure:
    """A drawing of ``charts``, under a title."""

    svg: str
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class Figures:
    """Drawings side by side; their ``size`` is ``wide`` or ``narrow``."""

    figures: Sequence[Figure]
    size: str
    kind: ClassVar[str] = "figures"


@dataclass(frozen=True)
class Diagram:
    """A drawing in its own size, which scrolls inside its own box where it is larger than the page."""

    svg: str
    kind: ClassVar[str] = "diagram"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: Its heading.
        right: Align to the right, for numbers.
        heat: Tint each cell by its share.
    """

    name: str
    right: bool = False
    heat: bool = False


@dataclass(frozen=True)
class Cell:
    """Text of a cell, with a share in [0, 1] for its tint."""

    text: str
    share: float | None = None


@dataclass(frozen=True)
class Table:
    """A table: columns, and rows of cells."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    kind: ClassVar[str] = "table"

    @property
    def numbers(self) -> bool:
        """True if all columns hold numbers: the table need not be as wide as the page."""
        return all(column.right for column in self.columns)

    @classmethod
    def of(cls, names: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> Table:
        """Makes a table from headings and texts.

        Args:
            names: Headings. A leading '>' marks a column of numbers, a leading '#' one whose cells are tinted.
            rows: Texts or cells, one row after another.

        Returns:
            The table.
        """
        columns = []
        for name in names:
            is_tinted = name.startswith("#")
            is_number = is_tinted or name.startswith(">")
            columns.append(Column(name.lstrip("#>"), is_number, is_tinted))
        cells = [[_as_cell(item) for item in row] for row in rows]
        return cls(columns, cells)


def _as_cell(item: str | Cell) -> Cell:
    if isinstance(item, Cell):
        return item
    return Cell(item)


@dataclass(frozen=True)
class Block:
    """Names and values under a title."""

    title: str
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Pairs:
    """Blocks side by side."""

    blocks: Sequence[Block]
    kind: ClassVar[str] = "pairs"


@dataclass(frozen=True)
class Note:
    """A sentence, coloured if it is a warning."""

    text: str
    warn: bool = False
    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Code:
    """A command to type, cut into lines."""

    lines: Sequence[str]
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]
    kind: ClassVar[str] = "list"


@dataclass(frozen=True)
class Picture:
    """A picture inside the page.

    Attributes:
        jpeg: The picture in base64.
        description: Its content in words.
    """

    jpeg: str
    description: str
    kind: ClassVar[str] = "picture"


Part = Figures | Diagram | Table | Pairs | Note | Code | Bullets | Picture


@dataclass(frozen=True)
class Section:
    """A section of the page; links within the page point to its ``key``."""

    key: str
    title: str
    lead: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """The content of a page."""

    kicker: str
    title: str
    lead: Sequence[str]
    cards: Sequence[Card]
    sections: Sequence[Section]


def render(page: Page) -> bytes:
    """Renders a page.

    Args:
        page: Its content.

    Returns:
        One HTML file in UTF-8. All text is escaped, and invisible characters are spelt out.
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.filters["pieces"] = pieces
    source = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(page=page).encode()


def _visible(value: Any) -> Any:
    """Spells out invisible characters of plain text; markup that is safe already passes unchanged."""
    is_plain_text = isinstance(value, str) and not hasattr(value, "__html__")
    if is_plain_text:
        return visible(value)
    return value
