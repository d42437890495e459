"""Layout of a page in a headless Chromium, if one is installed, and the faults of that layout."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
WIDTHS = (1280, 390)

# Runs outside the page, whose own policy allows no script.
MEASURE = """
function measure(frame) {
  const page = frame.contentDocument, root = page.documentElement, width = frame.clientWidth, outside = [], over = [];
  const shown = rect => rect.width > 0 && rect.height > 0;
  const meets = (a, b, by) => a.left + by < b.right && b.left + by < a.right && a.top + by < b.bottom
    && b.top + by < a.bottom;
  const compare = (list, by) => list.forEach((a, i) => list.slice(i + 1).forEach(b => {
    if (meets(a.rect, b.rect, by)) over.push([a.name, b.name]);
  }));
  const boxes = (within, selector) => [...within.querySelectorAll(selector)]
    .map(e => ({name: e.textContent.trim().slice(0, 60), rect: e.getBoundingClientRect()})).filter(b => shown(b.rect));
  for (const svg of page.querySelectorAll('svg')) {
    const texts = boxes(svg, 'text'), area = svg.getBoundingClientRect();
    compare(texts, 2);
    for (const t of texts)
      if (t.rect.left < area.left - 1 || t.rect.right > area.right + 1 || t.rect.right > width || t.rect.left < 0)
        outside.push(t.name);
  }
  compare(boxes(page, 'figure, .card, .scroll, h1, h2, section > p, pre, .lead'), 1);
  for (const b of boxes(page, 'h1, h2, p, pre, .card, figure')) if (b.rect.right > width + 1) outside.push(b.name);
  return {width, scroll: root.scrollWidth, height: root.scrollHeight, outside, over,
          texts: page.querySelectorAll('svg text').length};
}
"""


@dataclass(frozen=True)
class Layout:
    """Sizes in CSS pixels; texts that leave their drawing or the page, and pairs of boxes that overlap."""

    width: int
    scroll: int
    height: int
    outside: list[str]
    over: list[list[str]]
    texts: int


def lay_out(page: bytes, folder: Path) -> list[Layout]:
    """The page in windows of every one of ``WIDTHS``."""
    assert CHROMIUM is not None
    inner = html.escape(page.decode(), quote=True)
    frames = "".join(
        f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{inner}"></iframe>'
        for width in WIDTHS
    )
    outer = folder / "outer.html"
    outer.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><script>{MEASURE}</script><body style="margin:0">{frames}'
        '<pre id="out"></pre><script>onload = () => {'
        "const found = [...document.querySelectorAll('iframe')].map(measure);"
        "document.body.replaceChildren(out); out.textContent = JSON.stringify(found)}</script>",
        encoding="utf-8",
    )
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1400,1000",
        "--dump-dom",
        outer.as_uri(),
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    answer = re.search(r'<pre id="out">(.*?)</pre>', found.stdout, re.DOTALL)
    assert answer, found.stderr
    layouts = [Layout(**one) for one in json.loads(html.unescape(answer[1]))]
    assert [layout.width for layout in layouts] == list(WIDTHS)
    return layouts


def assert_well_laid_out(page: bytes, folder: Path) -> None:
    """At every width nothing overflows the page, leaves its drawing, or lies over something else."""
    for layout in lay_out(page, folder):
        assert layout.scroll == layout.width
        assert layout.outside == []
        assert layout.over == []
        assert layout.texts > 10


class Tree(HTMLParser):
    """A page as a parser sees it: tags with attributes, the text of every section, rows of every table."""

    VOID = frozenset(("meta", "wbr", "br", "link", "img"))

    def __init__(self, page: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.texts: list[str] = []
        self.open: list[str] = []
        self.section = ""
        self.feed(page.decode())
        self.close()
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in self.VOID:
            return
        self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.sections[self.section] = self.sections.get(self.section, "") + data
        if self.open and self.open[-1] == "text":
            self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[self.section][-1][-1] += data

    def named(self, name: str) -> list[dict[str, str | None]]:
        """Attributes of every tag of a name."""
        return [attributes for tag, attributes in self.tags if tag == name]


def assert_fetches_nothing(page: bytes) -> None:
    """No script, no address, nothing but ids and pictures inside the page; and a policy that would refuse the rest."""
    tree = Tree(page)
    for tag, attributes in tree.tags:
        if tag == "img":
            assert set(attributes) == {"src", "alt"}
            assert re.fullmatch(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", attributes["src"] or "")
            continue
        assert tag not in (
            "script",
            "link",
            "iframe",
            "object",
            "embed",
            "base",
            "form",
            "image",
        )
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "srcset", "data", "action", "xlink:href", "background")
            if name == "href":
                assert value is not None
                assert value.startswith("#")
            assert not re.search(r"url\((?!#)|https?:|//", value or "") or name == "aria-label", (
                tag,
                name,
                value,
            )
    style = re.search(rb"<style>(.*?)</style>", page, re.DOTALL)
    assert style
    assert not re.search(rb"url\(|@import|https?:", style[1])
    policies = [
        m["content"] for m in tree.named("meta") if m.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def assert_ids_are_sound(page: bytes) -> None:
    """Every id once, and every reference to an id that is there."""
    tree = Tree(page)
    ids = [attributes["id"] for _, attributes in tree.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in tree.tags:
        for name, value in attributes.items():
            found = re.findall(r"url\(#([^)]+)\)", value or "") + (
                [value[1:]] if name == "href" and value else []
            )
            assert set(found) <= set(ids)
