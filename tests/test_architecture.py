"""Structure of the sources: the contracts of import-linter, names of modules, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from conftest import ROOT

from onnx_oamip.graph.ops import REGISTRY

PACKAGE = ROOT / "onnx_oamip"
NAMED_ELSEWHERE: list[tuple[str, list[str], str]] = [
    (
        "objective/tails.py",
        [
            "ArgMax",
            "Concat",
            "HardSigmoid",
            "Hardmax",
            "Mul",
            "NonMaxSuppression",
            "ReduceMax",
            "Sigmoid",
            "Softmax",
            "Sub",
            "TopK",
            "Where",
        ],
        "how an operator at the end of a graph is read is knowledge about objectives",
    ),
    (
        "verification/latency.py",
        ["Conv", "Expand", "GlobalAveragePool", "Relu"],
        "a network of its own, built to measure a device",
    ),
]
"""(file, names of operators, reason) outside ``graph/ops``."""


def test_import_contracts_hold() -> None:
    """The layers of the package, and the one place of every library, are contracts in pyproject.toml."""
    linter = Path(sys.executable).with_name("lint-imports")
    command = [str(linter), "--no-cache", "--config", str(ROOT / "pyproject.toml")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert "Contracts: " in found.stdout


def test_operators_are_named_in_their_table_only() -> None:
    """A rule for an operator belongs to the entry of the operator: nothing else compares names."""
    operators = {spec.name for spec in REGISTRY}
    operators |= {schema.name for schema in onnx.defs.get_all_schemas()}
    named: dict[str, set[str]] = {}
    scanned = 0
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).as_posix()
        if place.startswith("graph/ops/"):
            continue
        words = _string_constants(ast.parse(path.read_text(encoding="utf-8")))
        scanned += len(words)
        if found := words & operators:
            named[place] = found
    assert scanned > 1000
    # What is listed is still there: the list cannot grow stale.
    assert named == {place: set(names) for place, names, _ in NAMED_ELSEWHERE}
    assert all(reason for *_, reason in NAMED_ELSEWHERE)


def _string_constants(tree: ast.Module) -> set[str]:
    """Every string of a module but the names that it exports."""
    exported = {
        id(item)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for item in ast.walk(node.value)
    }
    constants = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in exported)
    return {node.value for node in constants if isinstance(node.value, str)}


def test_operator_names_in_strings_are_detected() -> None:
    """The scan sees a name in a comparison, a tuple and a call, and no exported name."""
    source = '__all__ = ["Round"]\nif op == "Add" or op in ("Mul",): make("Conv", x=["Gemm"])'
    assert _string_constants(ast.parse(source)) == {"Add", "Mul", "Conv", "Gemm"}


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
