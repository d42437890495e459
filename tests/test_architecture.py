"""Structure of the sources: the contracts of import-linter, names of modules, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from onnx_oamip.graph.ops import REGISTRY

PACKAGE = ROOT / "onnx_oamip"


def test_import_contracts_hold() -> None:
    """The layers of the package, and the one place of every library, are contracts in pyproject.toml."""
    linter = Path(sys.executable).with_name("lint-imports")
    command = [str(linter), "--no-cache", "--config", str(ROOT / "pyproject.toml")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert "Contracts: " in found.stdout


def test_coupling_names_no_operator() -> None:
    """A rule for an operator belongs to the entry of the operator."""
    operators = {spec.name for spec in REGISTRY}
    source = ast.parse((PACKAGE / "graph" / "coupling.py").read_text(encoding="utf-8"))
    constants = [node.value for node in ast.walk(source) if isinstance(node, ast.Constant)]
    words = {value for value in constants if isinstance(value, str)}
    assert words
    assert not words & operators


@pytest.mark.parametrize("name", ["utils", "util", "helpers", "helper", "common", "base", "misc"])
def test_module_names_are_specific(name: str) -> None:
    assert not list(PACKAGE.rglob(f"{name}.py"))
    assert not list(PACKAGE.rglob(f"{name}/__init__.py"))


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, onnx_oamip; "
        "print([m for m in ('numpy', 'onnx', 'scipy', 'onnxruntime') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
