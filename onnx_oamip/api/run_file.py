"""Description of a run of several stages: a TOML file, or a mapping with the same content.

Names at the top are settings that hold for every stage that has them; ``prune``, ``recover`` and ``int8`` are tables of
the stages that run, with the settings of the function of that name; ``check`` has the settings of ``verify``, and the
limits for the last model. Files write names with dashes, mappings with underscores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_oamip.api.staged_run import RunDescription, Stages
from onnx_oamip.core.command_settings import INT8, PRUNE, RECOVER, VERIFY
from onnx_oamip.core.errors import OutputError, SettingsError
from onnx_oamip.core.options import LimitOptions, Options, QuantisationOptions
from onnx_oamip.core.regular_files import same_file
from onnx_oamip.core.settings import Settings
from onnx_oamip.core.toml_files import read, statements, unknown
from onnx_oamip.data.sources import File

STAGES = {"prune": PRUNE, "recover": RECOVER, "int8": INT8}
"""Settings of the stages, by the names of their tables."""
CHECK = "check"
_SETTINGS = {**STAGES, CHECK: VERIFY}
OWN = ("model", "data", "eval_data", "folder")
"""Names at the top that are no settings."""
OUTPUTS = "outputs"
"""Statements about outputs of the model, a table at the top."""


def describe(pipeline: File | Mapping[str, Any]) -> RunDescription:
    """Read the description of a run.

    Args:
        pipeline: A TOML file, or its content with underscores in names; there, data may be in memory.

    Returns:
        The description. The folder of a file is by default beside it, and named after it.

    Raises:
        SettingsError: The file cannot be read, has a name that no stage has, or lacks the model or the data.
        OutputError: A stage would write over the model or the data.
    """
    if isinstance(pipeline, Mapping):
        content = _Content(dict(pipeline), "the pipeline", str)
    else:
        path = Path(pipeline)
        content = _Content(read(path), str(path), lambda name: name.replace("_", "-"))
        for name in OWN:
            content.check_text(name)
        content.values.setdefault("folder", str(path.with_suffix("")))
    return content.description()


@dataclass(frozen=True)
class _Content:
    """Content of a description.

    Attributes:
        values: Values and tables by name.
        where: The file, for messages.
        spelling: How the description writes a name.
    """

    values: dict[str, Any]
    where: str
    spelling: Callable[[str], str]

    def check_text(self, name: str) -> None:
        """Raises SettingsError for the name of a file that is no text."""
        value = self.values.get(self.spelling(name), "")
        if not isinstance(value, str):
            raise SettingsError(
                f"{self.where} sets {self.spelling(name)} to {value!r}; it is the path of a file, in quotes."
            )

    def description(self) -> RunDescription:
        """Check all names and values. Raises SettingsError or OutputError."""
        values = dict(self.values)
        outputs = statements(values.pop(OUTPUTS, {}), self.where)
        tables = {n: values.pop(n) for n in (*STAGES, CHECK) if isinstance(values.get(n), Mapping)}
        for name in (*STAGES, CHECK):
            if name in values:
                raise SettingsError(
                    f"{self.where} sets {name} to {values[name]!r}; it is a table of settings, such as "
                    "{'macs': 0.5}."
                )
        own = {name: values.pop(self.spelling(name), None) for name in OWN}
        for name in ("model", "data", "folder"):
            if own[name] is None:
                raise SettingsError(
                    f'{self.where} names no {name}; add a line such as {name} = "FILE".'
                )
        if not isinstance(own["model"], (str, os.PathLike)):
            raise SettingsError(
                f"{self.where} gives a model in memory, but stages read files; save it and give its path."
            )
        names = {name: self._names(name) for name in (*STAGES, CHECK)}
        known = {*OWN, *(n for table in names.values() for n in table.values())}
        self._check(values, {self.spelling(n): n for n in known}, "sets", "no option of a stage")
        for name, table in tables.items():
            self._check(table, names[name], f"sets in [{name}]", f"no option of {name}")
        folder = Path(own["folder"])
        _check_outputs(folder, own)
        stages = self._stages(values, tables, outputs)
        return RunDescription(own["model"], own["data"], own["eval_data"], folder, stages)

    def _names(self, table: str) -> dict[str, str]:
        """Settings that a table may have, by the names in this description."""
        found = _SETTINGS[table].all_names() - {OUTPUTS}
        if table == CHECK:
            found |= LimitOptions.model_fields.keys()
        return {self.spelling(name): name for name in found}

    def _check(
        self,
        table: Mapping[str, Any],
        known: Mapping[str, str],
        verb: str,
        what: str,
    ) -> None:
        """Raises SettingsError for a name that is not known, and for a table."""
        for name, value in table.items():
            if isinstance(value, Mapping):
                tables = ", ".join((*STAGES, CHECK, OUTPUTS))
                raise SettingsError(
                    f"{self.where} {verb} '{name}' to a table; tables are {tables}."
                )
            if name not in known:
                raise unknown(name, known, f"{self.where} {verb}", what)

    def _stages(
        self,
        shared: Mapping[str, Any],
        tables: Mapping[str, Mapping[str, Any]],
        outputs: Mapping[str, object],
    ) -> Stages:
        """Settings of all stages."""
        settings: dict[str, Settings] = {}
        quantisation = QuantisationOptions.create()
        limits = LimitOptions.create()
        for table in dict.fromkeys((*tables, CHECK)):
            taken = _SETTINGS[table].all_names()
            own = self._parameters(tables.get(table, {}))
            given = {**self._parameters(shared), **own}
            if outputs:
                given[OUTPUTS] = dict(outputs)
            with self._located(table):
                settings[table] = Settings.create(**_of(Settings, given, taken))
                if table == "int8":
                    quantisation = QuantisationOptions.create(
                        **_of(QuantisationOptions, given, taken)
                    )
                if table == CHECK:
                    limits = LimitOptions.create(**_of(LimitOptions, own))
        return Stages(
            prune=settings.get("prune"),
            recover=settings.get("recover"),
            int8=settings.get("int8"),
            quantisation=quantisation,
            check=settings[CHECK],
            limits=limits.budget,
            seconds=limits.seconds,
        )

    def _parameters(self, table: Mapping[str, Any]) -> dict[str, Any]:
        """Values by the name of a setting."""
        return {name.replace("-", "_"): value for name, value in table.items()}

    @contextmanager
    def _located(self, table: str) -> Iterator[None]:
        """Name the table in the error for a value in it."""
        try:
            yield
        except SettingsError as error:
            raise SettingsError(f"{self.where}, [{table}]: {error}") from error


def _of(
    options: type[Options],
    values: Mapping[str, Any],
    taken: Collection[str] | None = None,
) -> dict[str, Any]:
    """Values of a group of options: of all of them, or of those that are taken."""
    names = options.model_fields.keys()
    return {n: v for n, v in values.items() if n in names and (taken is None or n in taken)}


def _check_outputs(folder: Path, own: Mapping[str, Any]) -> None:
    """Raises OutputError where a stage would write over a file that is read."""
    for stage in STAGES:
        written = folder / f"{stage}.onnx"
        for source in own.values():
            if isinstance(source, (str, os.PathLike)) and same_file(written, source):
                raise OutputError(
                    f"the stage {stage} would write over {written}; give another folder."
                )
