"""Comparison of pruned models by their reports: one document from the documents of several runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.json_values import plain_document
from onnx_oamip.core.regular_files import refuse_special
from onnx_oamip.core.versions import versions
from onnx_oamip.reporting.documents import SCHEMA_VERSION, Document

COSTS = ("macs", "params", "bytes", "zip_bytes")
FROM_RUNS = "what 'onnx-oamip prune' or 'onnx-oamip run' prints as JSON"
UNRELATED = frozenset({"cache", "device", "workers", "scheduler", "steps"})
"""Settings in which runs may differ without a difference of their results."""


def side_by_side(paths: Sequence[Path]) -> Document:
    """Compare the models that reports are about.

    Args:
        paths: Documents of ``prune``, ``apply`` and ``run`` as JSON files, all about one original.

    Returns:
        The JSON document of the command ``compare``.

    Raises:
        DataError: A file cannot be read, is no report, or is about another original; or there is only one model.
    """
    values = [_read(path) for path in paths]
    for path, value in zip(paths, values, strict=True):
        ours, first = _original(value), _original(values[0])
        if ours["sha256"] != first["sha256"]:
            raise DataError(
                f"{path} is about another model than {paths[0]}: {ours['path']} and {first['path']} differ; compare "
                "reports of one original."
            )
    entries = [
        entry for path, value in zip(paths, values, strict=True) for entry in _entries(value, path)
    ]
    if len(entries) < 2:
        raise DataError(f"{paths[0]} is about one model; give the reports of two and more.")
    return _compared(_original(values[0]), entries)


def stages(value: Document) -> Document:
    """Compare the models of one run.

    Args:
        value: Document of ``run``.

    Returns:
        The document of ``compare`` for its stages, with the limits that are broken as ``broken``.
    """
    entries = list(_entries(value, None))
    return {**_compared(_original(value), entries), "broken": value["broken"]}


def _compared(before: Document, entries: list[Document]) -> Document:
    """The document of a comparison."""
    for entry in entries:
        entry["shares"] = {
            name: entry[name] / before[name] if entry[name] and before[name] else None
            for name in COSTS
        }
    _name(entries)
    found = {
        "schema_version": SCHEMA_VERSION,
        "original": before,
        "compared_models": entries,
        "differences": _differences(entries),
        "versions": versions(),
    }
    return plain_document(found)


def _read(path: Path) -> Document:
    """The document of a file; that of a stage stands inside its record."""
    refuse_special(path, "the report", DataError)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"the report {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"the report {path} is no JSON; give {FROM_RUNS}.") from error
    if isinstance(value, dict) and isinstance(value.get("document"), dict):
        value = value["document"]
    is_report = isinstance(value, dict) and (
        {"before", "after", "verification", "groups"} <= value.keys() or "broken" in value
    )
    if not is_report:
        raise DataError(f"{path} is no report of a pruned model; give {FROM_RUNS}.")
    return dict(value)


def _original(value: Document) -> Document:
    """Path, digest and costs of the original."""
    costs = value["stages"][0] if "stages" in value else value["before"]
    model = {"path": value["model"]["path"], "sha256": value["model"]["sha256"]}
    return {**model, **{name: costs.get(name) for name in COSTS}}


def _entries(value: Document, path: Path | None) -> Iterator[Document]:
    """Models of a report, which is in no file yet if the path is None."""
    if "stages" in value:
        for row in value["stages"][1:]:
            yield {
                "name": row["stage"] if path is None else f"{path.stem}, {row['stage']}",
                "report": None if path is None else str(path),
                "path": row["path"],
                "sha256": row["sha256"],
                **{name: row[name] for name in COSTS},
                "method": None,
                "verification": row["verification"],
                "groups": None,
                "settings": value["settings"].get(row["stage"]) or {},
            }
        return
    assert path is not None
    method = {name: value[name] for name in ("importance", "allocation")}
    output = value["output"]["path"]
    yield {
        "name": path.stem if output is None else PurePath(output).stem,
        "report": str(path),
        "path": output,
        "sha256": value["output"]["sha256"],
        **{name: value["after"].get(name) for name in COSTS},
        "method": {**method, "refit": value["settings"]["refit"]},
        "verification": value["verification"],
        "groups": [
            {"name": group["name"], "units": group["units"], "kept": group["kept"]}
            for group in value["groups"]
        ],
        "settings": value["settings"],
    }


def _name(entries: Sequence[Document]) -> None:
    """Give models of equal names the names of their reports besides, and a number where these are equal too."""
    for key in ("report", None):
        names = [entry["name"] for entry in entries]
        for number, entry in enumerate(entries, 1):
            if names.count(entry["name"]) > 1 or names.count(names[number - 1]) > 1:
                more = f"number {number}" if key is None else PurePath(entry[key]).stem
                entry["name"] = f"{names[number - 1]} ({more})"


def _differences(entries: Sequence[Document]) -> list[Document]:
    """Settings in which the runs differ."""
    every = dict.fromkeys(name for entry in entries for name in entry["settings"])
    rows = []
    for name in every:
        given = [entry["settings"][name] for entry in entries if name in entry["settings"]]
        if name not in UNRELATED and any(value != given[0] for value in given):
            values = [entry["settings"].get(name) for entry in entries]
            rows.append({"setting": name, "values": values})
    for entry in entries:
        del entry["settings"]
    return rows


def lost(verification: Mapping[str, Any] | None) -> float | None:
    """Points that the worst output of a model lost.

    Args:
        verification: Its verification in a document.

    Returns:
        The points, None where nothing was measured.
    """
    if verification is None:
        return None
    found = [measure["lost"] for measure in verification["outputs"] if measure["lost"] is not None]
    return max(found) if found else None
