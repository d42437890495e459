"""The examples in docstrings run as they stand, in a folder with the shipped models."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
from conftest import MODELS, ROOT

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "onnx_oamip").rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separate_registry: None
) -> None:
    (tmp_path / "models").symlink_to(MODELS)
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted
    assert not found.failed


def test_doctest_modules_include_the_public_api() -> None:
    assert {"onnx_oamip", "onnx_oamip.importance.registry"} <= set(MODULES)
