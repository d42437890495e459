"""Commands that give the result of a run again, written from its document."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

from onnx_oamip.core.options.validation import kind_of
from onnx_oamip.core.settings import Settings
from onnx_oamip.reporting.documents import Document

_FROM_PLAN = {"apply": ("refit", "seed", "batch_size")}
"""Settings, by command, whose default comes from the plan: the command line states them always."""


def command_line(value: Document, command: str, names: Iterable[str]) -> list[str]:
    """Write the command that gives the result of a run.

    Args:
        value: The document of the run.
        command: The command to repeat.
        names: Settings that the command has as options.

    Returns:
        The words of the command with its model, then every option with its value.
    """
    settings = value["settings"]
    words: list[tuple[str, ...]] = [("onnx-oamip", command, value["model"]["path"])]
    for name in ("data", "eval_data", "scores", "plan"):
        if settings.get(name) is not None:
            words.append((_flag(name), settings[name]))
    if command == "frontier":
        words.append(("--levels", ",".join(str(share) for share in settings["levels"])))
        if settings["save_dir"] is not None:
            words.append(("--save-dir", settings["save_dir"]))
    for name in names:
        if name == "importance" and settings["scores"] is not None:
            continue
        always = name in _FROM_PLAN.get(command, ())
        if always or not _is_default(name, settings[name]):
            words += _option(name, settings[name])
    if command != "frontier":
        words.append(("-o", value["output"]["path"] or "OUT.onnx"))
    return [shlex.join(part) for part in words]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _is_default(name: str, item: Any) -> bool:
    default = Settings.model_fields[name].get_default()
    # A document holds lists where the settings hold tuples.
    return bool(item == (list(default) if isinstance(default, tuple) else default))


def _option(name: str, item: Any) -> list[tuple[str, ...]]:
    """A setting as an option of the command line, repeated for a list without a separator."""
    flag = _flag(name)
    if item is True:
        return [(flag,)]
    if not isinstance(item, list):
        return [(flag, str(item))]
    kind = kind_of(Settings.model_fields[name])
    if kind and kind.separator:
        return [(flag, kind.separator.join(map(str, item)))]
    return [(flag, str(one)) for one in item]


def knee_command(value: Document) -> str:
    """Write the command that makes the model at the knee of a frontier.

    Args:
        value: Document of ``frontier``, with a knee.

    Returns:
        The command with the options of the run, but for the device, which is found again.
    """
    level = value["knee"]
    output = f"{PurePath(value['model']['path']).stem}-macs{level:g}.onnx"
    settings = {**value["settings"], "macs": level}
    names = [name for name in Settings.model_fields if name in settings and name != "device"]
    document = {**value, "settings": settings, "output": {"path": output}}
    return " ".join(command_line(document, "prune", names))
