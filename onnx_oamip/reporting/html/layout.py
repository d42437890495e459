"""What a page is made of, and how it becomes bytes. Nothing here knows what a report is about."""

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
    """A figure to see first; ``share`` in [0, 1] draws a bar under it."""

    name: str
    value: str
    note: str
    share: float | None = None


@dataclass(frozen=True)
class Figure:
    """A drawing that ``charts`` made, under a title."""

    svg: str
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class Figures:
    """Drawings side by side: ``wide`` or ``narrow``."""

    figures: Sequence[Figure]
    size: str
    kind: ClassVar[str] = "figures"


@dataclass(frozen=True)
class Column:
    """Numbers go ``right``; ``heat`` tints a cell by its share."""

    name: str
    right: bool = False
    heat: bool = False


@dataclass(frozen=True)
class Cell:
    """A text; ``share`` in [0, 1] for its tint."""

    text: str
    share: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells; a column whose name starts with '>' holds numbers, with '#' shares to tint."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    kind: ClassVar[str] = "table"

    @property
    def numbers(self) -> bool:
        """It has no texts, and need not be as wide as the page."""
        return all(column.right for column in self.columns)

    @classmethod
    def of(cls, names: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> Table:
        """A table from names of columns and texts."""
        columns = [
            Column(name.lstrip("#>"), name[:1] in ("#", ">"), name[:1] == "#") for name in names
        ]
        return cls(columns, [[c if isinstance(c, Cell) else Cell(c) for c in row] for row in rows])


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
    """A sentence; ``warn`` colours it."""

    text: str
    warn: bool = False
    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Code:
    """A command that can be typed, cut into lines."""

    lines: Sequence[str]
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Bullets:
    """Sentences of one kind."""

    items: Sequence[str]
    kind: ClassVar[str] = "list"


Part = Figures | Table | Pairs | Note | Code | Bullets


@dataclass(frozen=True)
class Section:
    """``key`` is what a link in the page points to."""

    key: str
    title: str
    lead: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """All of a page."""

    kicker: str
    title: str
    lead: Sequence[str]
    cards: Sequence[Card]
    sections: Sequence[Section]


def render(page: Page) -> bytes:
    """The page as one file of HTML, UTF-8. Every text is escaped, and what is invisible in it spelt out."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters["pieces"] = pieces
    source = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(page=page).encode()


def _shown(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
