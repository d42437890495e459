"""The shape of the sources: who may import whom, which library lives where, how large a file may get."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

from onnx_oamip.graph.ops import REGISTRY

PACKAGE = ROOT / "onnx_oamip"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Imports point upwards in this list, or sideways where that makes no circle. A new module needs a place here.
TIERS: tuple[tuple[str, ...], ...] = (
    ("text", "errors", "extras", "records", "plain", "versions"),
    ("ops", "milp", "settings"),
    (
        "aside", "weights", "runtime", "bodies", "bounds", "sizes", "shapes", "folding", "model", "coupling",
        "restoring", "cost", "rows", "pictures", "pages", "parquet", "arrays", "data", "overflow", "calibrate",
        "affine", "patches",
        "residual", "ridge", "subgraph", "gram", "latency", "output", "artefacts", "checkpoint", "images", "solvers",
        "region", "formulation", "solving", "signals", "pooled", "executors", "objective",
    ),
    ("importance",),
    ("budget", "allocation", "planfile", "provenance"),
    ("rewrite", "refit", "scaling", "constants", "verify", "profiling", "sensitivity", "benchmark", "report",
     "supports"),
    ("cache",),
    ("context", "collecting"),
    ("limits", "scoring", "ladders", "search", "thinning", "connections", "iterations"),
    ("prepare",),
    ("pipeline",),
    ("storage", "curve"),
    ("tables", "html", "tracking", "olive"),
    ("cli",),
)  # fmt: skip
TIER = {name: i for i, names in enumerate(TIERS) for name in names}

# Parts that see nothing but these.
ONLY = {
    "ops": {"errors", "records"},
    "milp": {"errors", "records"},
    "solvers": {"errors", "records", "milp"},
    "coupling": {"errors", "records", "ops"},
    "objective": {"errors", "records", "ops"},
}

# Libraries with an interface that changes, or that not everybody has: each behind one door.
HOMES = {
    "onnxruntime": ("runtime.py",),
    "onnx_graphsurgeon": ("model.py", "rewrite.py"),
    "gurobipy": ("solvers/gurobi.py",),
    "highspy": ("solvers/highs.py",),
    "click": ("cli.py", "cli/*.py"),
    "rich": ("report.py", "tables/*.py", "cli.py", "cli/*.py"),
    "pydantic": ("settings.py", "planfile.py"),
    "sklearn": ("limits.py", "storage/codebook.py"),
    "safetensors": ("checkpoint.py",),
    "PIL": ("pictures.py",),
    "pyarrow": ("parquet.py",),
    "platformdirs": ("cache.py",),
    "jinja2": ("html/layout.py",),
    "matplotlib": ("html/charts.py",),
    "mlflow": ("tracking.py",),
    "olive": ("olive.py",),
    "distributed": ("executors/cluster.py",),
    "dask": ("executors/cluster.py",),
}
LINES = 400


def _module(path: Path) -> str:
    """The part of the package that a file belongs to: a file of its own, or a folder."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def _imports(path: Path) -> tuple[set[str], set[str]]:
    """(parts of this package, top-level names of other packages) that a file imports, wherever in the file."""
    inside: set[str] = set()
    outside: set[str] = set()
    folder = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [(alias.name.split("."), 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            stem = node.module.split(".") if node.module else []
            names = [([*stem, alias.name], node.level) for alias in node.names]
        else:
            continue
        for parts, level in names:
            if level:
                here = [*folder[: len(folder) - (level - 1)], *parts]
            elif parts[0] == PACKAGE.name:
                here = parts[1:]
            else:
                outside.add(parts[0])
                continue
            inside.add(here[0])
    return inside & {_module(p) for p in SOURCES}, outside


def _edges() -> dict[str, set[str]]:
    edges: dict[str, set[str]] = {}
    for path in SOURCES:
        edges.setdefault(_module(path), set()).update(_imports(path)[0] - {_module(path)})
    return edges


EDGES = {k: v for k, v in _edges().items() if k not in ("__init__", "__main__")}


def test_every_module_has_its_place() -> None:
    assert set(EDGES) - set(TIER) == set(), "a new module needs a line in TIERS"


@pytest.mark.parametrize("name", EDGES)
def test_imports_point_one_way(name: str) -> None:
    for other in EDGES[name] - {"__init__"}:
        assert TIER[other] <= TIER[name], f"{name} imports {other}, which comes after it"


def test_imports_make_no_circle() -> None:
    left = {name: set(others) - {"__init__"} for name, others in EDGES.items()}
    while left:
        free = [name for name, others in left.items() if not others & set(left)]
        assert free, f"these import each other in a circle: {sorted(left)}"
        for name in free:
            del left[name]


@pytest.mark.parametrize("name", ONLY)
def test_parts_that_know_little(name: str) -> None:
    assert EDGES[name] <= ONLY[name]


@pytest.mark.parametrize("library", HOMES)
def test_libraries_live_at_one_place(library: str) -> None:
    users = [p.relative_to(PACKAGE) for p in SOURCES if library in _imports(p)[1]]
    assert users
    for path in users:
        assert any(path.full_match(h) if hasattr(path, "full_match") else path.match(h) for h in HOMES[library]), path


def test_solvers_are_reached_through_their_front() -> None:
    for path in SOURCES:
        if _module(path) == "solvers":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not node.module.endswith(("programs.solvers.gurobi", "programs.solvers.highs")), path


def test_coupling_names_no_operator() -> None:
    """A rule for an operator belongs to the operator's entry."""
    operators = {spec.name for spec in REGISTRY}
    source = ast.parse((PACKAGE / "coupling.py").read_text(encoding="utf-8"))
    words = {n.value for n in ast.walk(source) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert not words & operators


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES


@pytest.mark.parametrize("name", ["utils", "util", "helpers", "helper", "common", "base", "misc"])
def test_names_say_what_is_inside(name: str) -> None:
    assert not list(PACKAGE.rglob(f"{name}.py"))
    assert not list(PACKAGE.rglob(f"{name}/__init__.py"))


def test_the_door_is_light() -> None:
    """Importing the package imports nothing heavy: names are fetched when first used."""
    top = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imported = {
        (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else alias.name.split(".")[0]
        for node in top.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert imported <= {"__future__", "importlib", "typing"}
