"""Prints the licences of what this package needs to run: ``python -m tools.licences``.

They are read from the metadata of what is installed: the licence expression, else the classifier, else the first line
of the licence's text.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
EXTRAS = ("cpu", "gpu", "report", "images", "pack", "parquet")
"""Runtimes, of which one is needed, and what features of the command line need."""


def required() -> list[str]:
    """Names of the direct dependencies, with those of ``EXTRAS``, as the project declares them."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *(line for e in EXTRAS for line in project["optional-dependencies"][e]),
    ]
    return sorted({re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0] for line in lines})


def licence(name: str) -> str | None:
    """Licence that a distribution declares, or None."""
    about = metadata.metadata(name)
    classifiers = [
        c.rpartition(" :: ")[2]
        for c in about.get_all("Classifier") or []
        if c.startswith("License ::")
    ]
    reported = about.get("License-Expression") or ", ".join(
        c for c in classifiers if c != "OSI Approved"
    )
    text = (about.get("License") or "").strip().splitlines()
    return reported or (text[0] if text else None)


def table() -> Iterator[tuple[str, str, str]]:
    """(name, version, licence) of everything that is required and installed."""
    for name in required():
        try:
            yield name, metadata.version(name), licence(name) or "unknown"
        except metadata.PackageNotFoundError:
            continue


if __name__ == "__main__":
    for row in table():
        print("{:20} {:12} {}".format(*row))
