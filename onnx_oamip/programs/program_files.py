"""Files of mixed-integer programs (MPS, LP), with names that say unit, layer and sample, for any solver."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from onnx_oamip.core.atomic_files import output_errors, write_bytes
from onnx_oamip.programs.program import Program
from onnx_oamip.programs.solvers import highs

SUFFIXES = (".mps", ".lp")
"""Formats that a program can be written in."""
_FORBIDDEN = re.compile(r"[^A-Za-z0-9_.]")
"""Characters that the LP format does not allow in names."""
_NOT_IN_TITLES = re.compile(r"[^A-Za-z0-9_.-]")


@dataclass(frozen=True)
class ProgramFile:
    """File of one program, and the names in it.

    Attributes:
        target: Value of ``write_program``: a folder, or a file whose name gets the title appended.
        title: Words that tell this program from the others of the run.
        groups: Names of the groups, for programs over widths.
    """

    target: str
    title: str
    groups: tuple[str, ...] = field(default=())

    @property
    def path(self) -> Path:
        """Path of the file: ``FOLDER/TITLE.mps``, or ``STEM-TITLE.lp`` for a target ``STEM.lp``."""
        target = Path(self.target)
        title = _NOT_IN_TITLES.sub("_", self.title)
        if target.suffix in SUFFIXES:
            return target.with_name(f"{target.stem}-{title}{target.suffix}")
        return target / f"{title}.mps"

    def write(
        self,
        program: Program,
        columns: Sequence[str],
        rows: Mapping[int, str] | None = None,
    ) -> None:
        """Write a program.

        Args:
            program: The program.
            columns: Name of each variable; characters that formats do not allow are replaced.
            rows: Names of some rows by their index.

        Raises:
            OutputError: The file cannot be written.
            SolverError: HiGHS, which writes the formats, refuses the program.
        """
        path = self.path
        names = distinct(columns)
        row_names = {index: _FORBIDDEN.sub("_", name) for index, name in (rows or {}).items()}
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory() as folder:
            staged = Path(folder) / f"program{path.suffix}"
            highs.write(program, staged, names, row_names)
            write_bytes(staged.read_bytes(), path)


def distinct(names: Sequence[str]) -> list[str]:
    """Make names that both formats allow, all different.

    Args:
        names: Names with any characters.

    Returns:
        Names of letters, digits, dots and underscores; repeated ones get their index appended.
    """
    result: list[str] = []
    seen: set[str] = set()
    for index, name in enumerate(names):
        clean = _FORBIDDEN.sub("_", name)
        if clean in seen:
            clean = f"{clean}__{index}"
        seen.add(clean)
        result.append(clean)
    return result
