"""Section of a page that shows samples as the model saw them, and how images were read."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from onnx_oamip.core.records import ContactSheet
from onnx_oamip.data.images import jpeg
from onnx_oamip.reporting.html.layout import Block, Note, Pairs, Part, Picture, Section
from onnx_oamip.reporting.html.wording import DASH
from onnx_oamip.reporting.tables.parts import plural

LEAD = "Colours, orientation and brightness should look right; the wrong order of channels, scale or layout shows here."


def samples_section(
    sheet: ContactSheet | None, reading: Mapping[str, Any] | None
) -> Section | None:
    """Makes the section about samples that are images.

    Args:
        sheet: Samples as the model saw them.
        reading: How images were read.

    Returns:
        The section; None if no input takes images.
    """
    if sheet is None:
        return None
    words = (
        f"{plural(sheet.count, 'sample')} of the input '{sheet.input}' as the model saw them, from {sheet.low:.4g} "
        f"(black) to {sheet.high:.4g} (white)"
    )
    content = jpeg(sheet.pixels)
    parts: list[Part] = []
    if content is None:
        parts.append(
            Note("Samples are not shown: that needs pip install 'onnx-oamip[images]'.", warn=True)
        )
    else:
        parts.append(Picture(base64.b64encode(content).decode(), words))
        parts.append(Note(f"{words}."))
    if reading is not None:
        rows = [(name, _text(value)) for name, value in reading.items()]
        parts.append(Pairs([Block("How images were read", rows)]))
    return Section("samples", "What the model saw", LEAD, parts)


def _text(value: Any) -> str:
    """Text of one entry."""
    if value is None:
        return DASH
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {count}" for name, count in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
