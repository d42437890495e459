"""Public names are listed once, in the stub, and imported when they are first used."""

from __future__ import annotations

from pathlib import Path

import pytest

import onnx_oamip
from onnx_oamip.core.lazy_names import attach_stub


def test_every_public_name_can_be_imported() -> None:
    for name in onnx_oamip.__all__:
        assert getattr(onnx_oamip, name) is not None
    assert set(dir(onnx_oamip)) == set(onnx_oamip.__all__)


def test_other_names_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="module 'onnx_oamip' has no attribute 'nothing'"):
        _ = onnx_oamip.nothing


def test_names_are_those_of_the_stub(tmp_path: Path) -> None:
    stub = tmp_path / "__init__.pyi"
    stub.write_text("from json import dumps as dumps\nfrom math import pi as pi, tau as tau\n")
    get_attribute, list_attributes, names = attach_stub("sample", str(tmp_path / "__init__.py"))
    assert names == list_attributes() == ["dumps", "pi", "tau"]
    assert get_attribute("pi") == 3.141592653589793
    with pytest.raises(AttributeError, match="'sample' has no attribute 'e'"):
        get_attribute("e")
