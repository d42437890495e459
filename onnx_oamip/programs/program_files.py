"""Files of mixed-integer programs (MPS, LP) and of their solutions, with names that say unit, layer and sample."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from onnx_oamip.core.atomic_files import output_errors, write_bytes
from onnx_oamip.core.errors import DataError, SettingsError
from onnx_oamip.core.records import Floats
from onnx_oamip.core.settings import Settings
from onnx_oamip.programs.program import Program
from onnx_oamip.programs.solvers import highs

SUFFIXES = (".mps", ".lp")
"""Formats that a program can be written in."""
_FORBIDDEN = re.compile(r"[^A-Za-z0-9_.]")
"""Characters that the LP format does not allow in names."""
_NOT_IN_TITLES = re.compile(r"[^A-Za-z0-9_.-]")


@dataclass(frozen=True)
class ProgramFile:
    """Files of one program: the program itself, and a solution of it from elsewhere.

    Attributes:
        title: Words that tell this program from the others of the run.
        programs: Value of ``write_program``: a folder, or a file whose name gets the title appended.
        solutions: Value of ``read_solutions``: a folder.
        groups: Names of the groups, for programs over widths.
    """

    title: str
    programs: str | None = None
    solutions: str | None = None
    groups: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, settings: Settings, title: str, groups: tuple[str, ...] = ()) -> ProgramFile:
        """Files that the settings ask for.

        Args:
            settings: Settings of the run.
            title: Words that tell this program from the others of the run.
            groups: Names of the groups, for programs over widths.

        Returns:
            The files.
        """
        return cls(title, settings.write_program, settings.read_solutions, groups)

    @property
    def _name(self) -> str:
        return _NOT_IN_TITLES.sub("_", self.title)

    @property
    def path(self) -> Path | None:
        """Path of the program: ``FOLDER/TITLE.mps``, or ``STEM-TITLE.lp`` for a target ``STEM.lp``; None for none."""
        if self.programs is None:
            return None
        target = Path(self.programs)
        if target.suffix in SUFFIXES:
            return target.with_name(f"{target.stem}-{self._name}{target.suffix}")
        return target / f"{self._name}.mps"

    def write(
        self,
        program: Callable[[], Program],
        columns: Callable[[], Sequence[str]],
        rows: Callable[[], Mapping[int, str]] | None = None,
    ) -> None:
        """Write the program, if a file is asked for.

        Args:
            program: Function that makes the program.
            columns: Function that names each variable; characters that formats do not allow are replaced.
            rows: Function that names some rows by their index.

        Raises:
            OutputError: The file cannot be written.
            SolverError: HiGHS, which writes the formats, refuses the program.
        """
        path = self.path
        if path is None:
            return
        given = rows() if rows is not None else {}
        row_names = {index: _FORBIDDEN.sub("_", name) for index, name in given.items()}
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory() as folder:
            staged = Path(folder) / f"program{path.suffix}"
            highs.write(program(), staged, distinct(columns()), row_names)
            write_bytes(staged.read_bytes(), path)

    def solution(self) -> dict[str, float] | None:
        """Read the solution of the program.

        Returns:
            Values by the names of variables in the program's file, or None if ``FOLDER/TITLE.sol`` does not exist.

        Raises:
            DataError: The file cannot be read, or holds no value.
        """
        if self.solutions is None:
            return None
        path = Path(self.solutions) / f"{self._name}.sol"
        if not path.is_file():
            return None
        return read_solution(path)

    def values(self, columns: Callable[[], Sequence[str]]) -> Floats | None:
        """Read the values of variables from the solution of the program.

        Args:
            columns: Function that names variables, in the order of the program.

        Returns:
            Value of each variable (n,), 0 for those that the file leaves out, as solvers do; None without a file.

        Raises:
            DataError: The file cannot be read, or holds none of the variables.
        """
        found = self.solution()
        if found is None:
            return None
        names = distinct(columns())
        if not found.keys() & names:
            raise DataError(
                f"the solution {self._name}.sol in {self.solutions} names none of the variables of its program, such "
                f"as {names[0]}; write the program with `write_program` and solve that file."
            )
        return np.asarray([found.get(name, 0.0) for name in names], np.float64)


def read_solution(path: Path) -> dict[str, float]:
    """Read a solution file: lines of a name and a value, as Gurobi, HiGHS, SCIP, CBC and CPLEX's console write them.

    Args:
        path: File to read.

    Returns:
        Values by name. A first column of numbers, as CBC writes, is skipped; so are lines of other forms.

    Raises:
        DataError: The file cannot be read, or no line has a name and a value.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the solution {path} cannot be read: {error}.") from error
    values = {}
    for line in text.splitlines():
        words = line.split()
        if words and _number(words[0]) is not None:
            words = words[1:]
        value = _number(words[1]) if len(words) > 1 else None
        if value is not None:
            values[words[0]] = value
    if not values:
        raise DataError(
            f"the solution {path} has no line NAME VALUE; write it as Gurobi, HiGHS and SCIP write .sol files."
        )
    return values


def _number(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def first_point_record(read: int, taken: int) -> dict[str, Any]:
    """Part of a program's record about solutions that were read.

    Args:
        read: Number of solutions read.
        taken: Number of those that were better than the first points found here.

    Returns:
        The keys and values; none if nothing was read.
    """
    if not read:
        return {}
    return {"solutions_read": read, "solutions_taken": taken}


def check_solutions_read(settings: Settings, programs: Iterable[Mapping[str, Any]]) -> None:
    """Refuse a run in which no solution was read, though the settings name a folder of them.

    Args:
        settings: Settings of the run.
        programs: Records of all programs of the run.

    Raises:
        SettingsError: No program has its solution in the folder.
    """
    if settings.read_solutions is None:
        return
    if not any(record.get("solutions_read") for record in programs):
        raise SettingsError(
            f"no program of this run has its solution in `read_solutions={settings.read_solutions}`: files are called "
            "TITLE.sol, where `write_program` writes TITLE.mps."
        )


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
