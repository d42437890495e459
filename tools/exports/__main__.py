"""``python -m tools.exports [FRAMEWORK ...] [--out FOLDER] [--table]``."""

from __future__ import annotations

import argparse
import importlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx

from . import digits, table

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "exports"
MODULES = {
    name: f"from_{name.replace('-', '_')}"
    for name in ("pytorch", "keras", "scikit-learn", "jax", "paddle")
}


def make(name: str, folder: Path) -> bool:
    """Train and export in one framework; False, with a line that says why, where it is not installed."""
    try:
        module = importlib.import_module(f".{MODULES[name]}", __package__)
    except ModuleNotFoundError as error:
        print(
            f"{name}: {error.name} is not installed; what to install is listed in tools/exports/__init__.py."
        )
        return False
    module.write(folder)
    homes = metadata.packages_distributions()
    versions = {
        home: metadata.version(home) for package in module.PACKAGES for home in homes[package][:1]
    }
    for file, exporter in module.MADE_BY.items():
        path = folder / f"{file}.onnx"
        _tidy(path)
        record(folder, file, {"framework": name, "exporter": exporter, "versions": versions})
        print(f"{path.name}: {path.stat().st_size} bytes")
    return True


def _tidy(path: Path) -> None:
    """Take out stack traces of exporters, which hold paths of this machine; everything else stays as it is."""
    proto = onnx.load(path)
    values = (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)
    for noted in (*proto.graph.node, *values, *(n for f in proto.functions for n in f.node)):
        del noted.metadata_props[:]
        noted.doc_string = ""
    onnx.save(proto, path)


def record(folder: Path, file: str, entry: dict[str, Any]) -> None:
    """Put one line into the table of what each export was made with."""
    path = folder / "made.json"
    made = json.loads(path.read_text()) if path.exists() else {}
    made[file] = entry
    path.write_text(json.dumps(dict(sorted(made.items())), indent=1) + "\n")


def main() -> None:
    """Make the data where it is missing, then the exports that were named."""
    parser = argparse.ArgumentParser(prog="python -m tools.exports", description=__doc__)
    parser.add_argument(
        "framework", nargs="*", help=f"of {', '.join(MODULES)}; without one, all that are installed"
    )
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument(
        "--table", action="store_true", help="prune what is there and write docs/guide/exports.md"
    )
    chosen = parser.parse_args()
    if unknown := sorted(set(chosen.framework) - set(MODULES)):
        parser.error(f"no framework is called {unknown[0]}; there are {', '.join(MODULES)}")
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.table:
        table.write(chosen.out, ROOT / "docs" / "guide" / "exports.md")
        return
    if not (chosen.out / digits.FILE).exists():
        digits.write(chosen.out)
    done = [make(name, chosen.out) for name in chosen.framework or MODULES]
    if chosen.framework and not all(done):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
