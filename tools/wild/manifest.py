"""The list of files: what each is, where it comes from, and how it is fed and judged."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MANIFEST = Path(__file__).with_name("manifest.toml")
REGISTRIES = ("pypi", "npm")
BUDGETS = ("macs", "params")


@dataclass(frozen=True)
class Package:
    """A release of a package in a registry, and its licence."""

    registry: str
    name: str
    version: str
    licence: str

    @property
    def folder(self) -> str:
        """Name of the folder that it is unpacked to."""
        return f"{self.name.replace('/', '-').lstrip('@')}-{self.version}"


@dataclass(frozen=True)
class Entry:
    """One ONNX file: its package, its place there, its task, its samples, and its judge."""

    name: str
    package: Package
    file: str
    sha256: str
    task: str
    source: str
    """Origin of the samples, in words."""
    samples: str
    """Name of the function of ``samples.SAMPLES`` that makes them."""
    judge: str
    """Name of the function of ``tasks.JUDGES`` that compares the pruned file with the original."""
    budget: str = "macs"
    feed: Mapping[str, Any] = field(default_factory=dict)
    """Options of the function that makes samples."""
    judged: Mapping[str, Any] = field(default_factory=dict)
    """Options of the judge."""
    reason: str = ""
    """Why the task is lost at some budget, as found in the model."""
    options: tuple[str, ...] = ()
    """Options of ``prune`` that state what a user knows and the file does not hold, such as the kind of an output."""

    def path(self, cache: Path) -> Path:
        """The file in a cache folder."""
        return cache / "packages" / self.package.folder / self.file


@dataclass(frozen=True)
class Manifest:
    """All files, and packages that only give data for samples."""

    entries: tuple[Entry, ...]
    packages: Mapping[str, Package]

    def folder(self, cache: Path, package: str) -> Path:
        """Folder of an unpacked package in a cache folder."""
        return cache / "packages" / self.packages[package].folder


def load(path: Path = MANIFEST) -> Manifest:
    """Read a manifest.

    Args:
        path: A TOML file with tables ``package.NAME`` and a list ``file``.

    Raises:
        ValueError: A field is missing, unknown or has an unknown value, or two files have one name.
    """
    found = tomllib.loads(path.read_text(encoding="utf-8"))
    packages = {name: _package(name, row) for name, row in found["package"].items()}
    entries = tuple(_entry(row, packages) for row in found["file"])
    names = [entry.name for entry in entries]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{path.name} has two files named {repeated[0]}; names must be unique.")
    return Manifest(entries, packages)


def _package(name: str, row: Mapping[str, Any]) -> Package:
    if row.get("registry") not in REGISTRIES:
        raise ValueError(f"package {name}: registry must be one of {', '.join(REGISTRIES)}.")
    return Package(name=name, **row)


def _entry(row: Mapping[str, Any], packages: Mapping[str, Package]) -> Entry:
    name, package = row.get("name", "a file without a name"), row.get("package")
    if package not in packages:
        raise ValueError(f"{name}: package {package} has no table of its own.")
    try:
        options = tuple(row.get("options", ()))
        entry = Entry(**{**row, "package": packages[str(package)], "options": options})
    except TypeError as error:
        raise ValueError(f"{name}: {error}.") from error
    if entry.budget not in BUDGETS:
        raise ValueError(f"{name}: budget must be one of {', '.join(BUDGETS)}.")
    if len(entry.sha256) != 64:
        raise ValueError(f"{name}: sha256 must have 64 digits.")
    return entry
