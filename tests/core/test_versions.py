"""The digest of the sources covers the whole package: cached results of other code are not reused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from conftest import ROOT

from onnx_oamip.core import versions


def test_the_digest_covers_every_module() -> None:
    assert versions.PACKAGE == ROOT / "onnx_oamip"
    digest = hashlib.sha256()
    for path in sorted((ROOT / "onnx_oamip").glob("**/*.py")):
        digest.update(path.read_bytes())
    assert versions.sources() == digest.hexdigest()


def test_the_digest_follows_a_change_in_any_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "room").mkdir()
    module = tmp_path / "room" / "module.py"
    module.write_text("WIDTH = 1\n")
    monkeypatch.setattr(versions, "PACKAGE", tmp_path)
    before = versions.sources.__wrapped__()
    module.write_text("WIDTH = 2\n")
    assert versions.sources.__wrapped__() != before
