"""Public names of a package, imported when first used; the package's stub is the one list of them."""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def attach_stub(
    package: str, file: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make the names that a stub imports attributes of its package.

    Args:
        package: Name of the package, as in ``__name__``.
        file: Path of the package's ``__init__.py``; ``__init__.pyi`` lies beside it and consists of
            ``from module import name as name``.

    Returns:
        ``__getattr__``, ``__dir__`` and ``__all__`` of the package.
    """
    modules = _modules_by_name(Path(file).with_suffix(".pyi"))

    def get_attribute(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(modules[name]), name)

    def list_attributes() -> list[str]:
        return sorted(modules)

    return get_attribute, list_attributes, sorted(modules)


def _modules_by_name(stub: Path) -> dict[str, str]:
    statements = ast.parse(stub.read_text(encoding="utf-8")).body
    imports = [statement for statement in statements if isinstance(statement, ast.ImportFrom)]
    return {
        alias.name: statement.module
        for statement in imports
        if statement.module is not None
        for alias in statement.names
    }
