"""Structure of the sources: the contracts of import-linter, names of modules, and what importing costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TypeAlias

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
            "ArgMin",
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
TABLES = ("graph/ops/", "recovery/operators/")
"""Folders of tables with one entry per operator. The second computes operators by torch, which is optional."""


@cache
@cache
def _modules() -> dict[str, ast.Module]:
    """Return the parsed modules of the package by path."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {p.relative_to(PACKAGE).as_posix(): ast.parse(p.read_text("utf-8")) for p in paths}


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
    for place, tree in _modules().items():
        if place.startswith(TABLES):
            continue
        words = _string_constants(tree)
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


def test_long_linear_algebra_lets_other_threads_run() -> None:
    """``scipy.linalg`` holds the interpreter lock, so that a signal could not end the process meanwhile."""
    importing = {
        place
        for place, tree in _modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        and "scipy.linalg" in {getattr(node, "module", ""), *(name.name for name in node.names)}
    }
    assert importing == {"core/cholesky.py"}


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


# -------------------------------------------------------------------------------------------- signatures and docstrings

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
POSITIONAL = 5
"""Parameters that may be given by position; further ones are keyword-only."""


def _functions(
    tree: ast.AST, path: str = "", method: bool = False
) -> Iterator[tuple[str, Function, bool]]:
    """Yield every function with its dotted name and True for a method, functions inside functions included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{path}{node.name}.", True)
        elif isinstance(node, Function):
            static = any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
            yield f"{path}{node.name}", node, method and not static
            yield from _functions(node, f"{path}{node.name}.<locals>.")
        else:
            yield from _functions(node, path, method)


def _parameters(function: Function, method: bool) -> tuple[list[str], list[str]]:
    """Return the names of parameters by position and of all others, without the one a method is bound to."""
    given = function.args
    positional = [p.arg for p in (*given.posonlyargs, *given.args)][1 if method else 0 :]
    starred = [p for p in (given.vararg, given.kwarg) if p is not None]
    return positional, [p.arg for p in (*given.kwonlyargs, *starred)]


def _sections(docstring: str) -> dict[str, str]:
    """Return the text below each heading of a Google-style docstring."""
    parts = re.split(r"^(Args|Returns|Yields|Raises):\n", docstring, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _described(section: str) -> set[str]:
    """Return the parameters that a section "Args" has entries for."""
    entries = re.findall(r"^    ([\w*]+(?:, [\w*]+)*)(?: \(.*?\))?: +\S", section, re.MULTILINE)
    return {name.strip("* ") for entry in entries for name in entry.split(",")}


def _is_exempt(function: Function) -> bool:
    """Recognise functions whose parameters are described elsewhere.

    Properties are documented as attributes, overloads by their implementation, and commands of the command line by the
    help of every option: their docstring is the text of ``--help``.
    """
    decorators = [ast.unparse(d).partition("(")[0] for d in function.decorator_list]
    last = {name.rpartition(".")[2] for name in decorators}
    return bool(last & {"property", "cached_property", "setter", "overload", "command", "group"})


def _protocol_methods(modules: Iterable[ast.Module]) -> set[str]:
    """Return the methods (``Class.method``) that classes have from the protocols they name as bases."""
    classes = {
        node.name: node
        for module in modules
        for node in ast.walk(module)
        if isinstance(node, ast.ClassDef)
    }

    def bases(name: str) -> list[str]:
        return [ast.unparse(base) for base in classes[name].bases] if name in classes else []

    found = set()
    for name in classes:
        waiting = bases(name)
        while waiting:
            base = waiting.pop()
            waiting += bases(base)
            if "Protocol" in bases(base):
                methods = (node for node in classes[base].body if isinstance(node, Function))
                found |= {f"{name}.{method.name}" for method in methods}
    return found


def _incomplete(module: ast.Module, inherited: Collection[str] = ()) -> list[str]:
    """Name the public functions of a module whose docstring lacks a parameter or the result.

    Methods that a protocol describes (``inherited``) need no description of their own.
    """
    missing = []
    for name, function, method in _functions(module):
        private = any(part.startswith(("_", "<")) for part in name.split("."))
        if private or _is_exempt(function) or name in inherited:
            continue
        positional, others = _parameters(function, method)
        sections = _sections(ast.get_docstring(function) or "")
        if _described(sections.get("Args", "")) != {*positional, *others}:
            missing.append(f"{name}: Args")
        returned = "None" if function.returns is None else ast.unparse(function.returns)
        decorators = {ast.unparse(d) for d in function.decorator_list}
        # A context manager that yields nothing has no result.
        empty = {"None", "NoReturn"} | (
            {"Iterator[None]"} if "contextmanager" in str(decorators) else set()
        )
        if returned not in empty and not {"Returns", "Yields"} & sections.keys():
            missing.append(f"{name}: Returns")
    return missing


def test_public_functions_describe_parameters_and_results() -> None:
    """``Args`` has an entry for each parameter and no other; ``Returns`` or ``Yields`` describes the result."""
    inherited = _protocol_methods(_modules().values())
    incomplete = {
        place: found
        for place, tree in _modules().items()
        if (found := _incomplete(tree, inherited))
    }
    assert len(_modules()) > 200
    assert incomplete == {}


def test_incomplete_docstrings_are_detected() -> None:
    """The scan sees a missing, a surplus and an undescribed parameter and a missing result, and no private function."""
    source = '''
def half(a, b) -> int:
    """Add.

    Args:
        a: First.

    Returns:
        The sum.
    """

def surplus(a):
    """Add.

    Args:
        a: First,
            second: no entry.
        c: Third.
    """

class Plain:
    def method(self, x) -> int:
        """Add.

        Args:
            x: First.
        """

    @property
    def value(self) -> int: ...
    def _private(self, x) -> int: ...

@contextmanager
def quiet() -> Iterator[None]: ...
@app.command(name="x")
def shown(x) -> None: ...
def bare(x, *, y=1, **z) -> None:
    """Add.

    Args:
        x, y: Numbers.
        **z: More.
    """
'''
    assert _incomplete(ast.parse(source)) == [
        "half: Args",
        "surplus: Args",
        "Plain.method: Returns",
    ]


def test_methods_of_protocols_are_described_once() -> None:
    """The protocol's own method needs a description, that of a class that names it as a base does not."""
    tree = ast.parse("""
class Shape(Protocol):
    def area(self, unit): ...

class Square(Shape):
    def area(self, unit): ...
    def side(self, unit): ...

class Other:
    def area(self, unit): ...
""")
    inherited = _protocol_methods([tree])
    assert inherited == {"Square.area"}
    assert _incomplete(tree, inherited) == [
        "Shape.area: Args",
        "Square.side: Args",
        "Other.area: Args",
    ]


def test_further_parameters_are_keyword_only() -> None:
    """Calls with many positional arguments are hard to read, and easy to get wrong."""
    scanned, crowded = 0, []
    for place, tree in _modules().items():
        for name, function, method in _functions(tree):
            scanned += 1
            positional, _ = _parameters(function, method)
            if len(positional) > POSITIONAL:
                crowded.append(f"{place}: {name}")
    assert scanned > 2000
    assert crowded == []
