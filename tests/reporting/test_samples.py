"""The section that shows samples: the picture, the way that images were read, and the note without Pillow."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from onnx_oamip.core.records import ContactSheet
from onnx_oamip.reporting.html import samples
from onnx_oamip.reporting.html.layout import Note, Pairs, Picture
from onnx_oamip.reporting.html.wording import DASH

SHEET = ContactSheet("x", np.full((20, 30, 3), 200, np.uint8), 3, -1.5, 2.25)


def test_section_holds_the_picture_and_the_reading() -> None:
    section = samples.samples_section(SHEET, {"size": [8, 6], "modes": {"L": 2}, "alpha": None})
    assert section is not None
    picture, note, pairs = section.parts
    assert isinstance(picture, Picture)
    with Image.open(io.BytesIO(base64.b64decode(picture.jpeg))) as image:
        assert image.size == (30, 20)
        assert abs(int(np.asarray(image).mean()) - 200) <= 1
    assert isinstance(note, Note)
    assert "3 samples of the input 'x'" in note.text
    assert "from -1.5 (black) to 2.25 (white)" in note.text
    assert isinstance(pairs, Pairs)
    assert pairs.blocks[0].rows == [("size", "8, 6"), ("modes", "L: 2"), ("alpha", DASH)]


def test_section_without_pillow_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "jpeg", lambda _: None)
    section = samples.samples_section(SHEET, None)
    assert section is not None
    (note,) = section.parts
    assert isinstance(note, Note)
    assert "onnx-oamip[images]" in note.text


def test_no_section_without_images() -> None:
    assert samples.samples_section(None, None) is None
