"""Results between two commands, as files: scores of every unit in an ``.npz`` that says which model they belong to.

Arrays are plain (no pickles); what has a structure is JSON text. A unit is found again by its group and by its place on
the group's first axis, so that scores still fit where groups were excluded later.

=================  ==========================================================================================
``schema_version``  1; it grows when a key changes its meaning or goes
``model_sha256``    of the model file; ``model_path`` is where it was, for people
``tool_version``    of this package
``method``          name of the importance method
``settings``        JSON object: what was asked
``programs``        JSON list: the mathematical programs behind the scores
``values``          (units,) float64, larger means keep
``unit_group``      (units,) number of each unit's group
``group_names``     (groups,) text
``group_axes``      JSON list: per group its axes as ``tensor``, ``axis``, ``per_unit``, that of a weight first
``unit_index``      (units,) first index of each unit on the first axis of its group
=================  ==========================================================================================
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnx_oamip.core.atomic_files import write_bytes
from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import (
    Array,
    Axis,
    Coupling,
    Group,
    Ints,
    Model,
    Scores,
)
from onnx_oamip.core.version import __version__
from onnx_oamip.data import numpy_files

SCORES_VERSION = 1
_TEXTS = (
    "model_sha256",
    "model_path",
    "tool_version",
    "method",
    "settings",
    "programs",
    "group_axes",
)
_KEYS = ("schema_version", *_TEXTS, "values", "unit_group", "group_names", "unit_index")


@dataclass(frozen=True)
class Scored:
    """Result of ``score``: the scores, the file that was written with its digest, and the duration of every stage."""

    model: Model
    coupling: Coupling
    scores: Scores
    output: str
    sha256: str
    seconds: Mapping[str, float]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def save_scores(
    path: str | os.PathLike[str],
    model: Model,
    coupling: Coupling,
    scores: Scores,
    settings: Mapping[str, Any],
) -> bytes:
    """Write the scores of a model's units, whole or not at all; the bytes written.

    ``settings`` are plain values. Raises DataError where a score is not finite, OutputError where the file cannot be
    written.
    """
    _finite(scores.values, coupling, "the scores")
    order = [group_axes(model, group) for group in coupling.groups]
    index = np.zeros(coupling.n_units, np.int64)
    for group, axes in zip(coupling.groups, order, strict=True):
        index[group.units] = places(coupling, group, axes[0])
    listed = [
        [{"tensor": t, "axis": a, "per_unit": group.multiplicity[t, a]} for t, a in axes]
        for group, axes in zip(coupling.groups, order, strict=True)
    ]
    texts = {
        "model_sha256": model.sha256,
        "model_path": model.path,
        "tool_version": __version__,
        "method": scores.method,
        "settings": json.dumps(dict(settings)),
        "programs": json.dumps([dict(p) for p in scores.programs], default=_plain),
        "group_axes": json.dumps(listed),
    }
    stream = io.BytesIO()
    made: dict[str, Any] = {
        "schema_version": np.int64(SCORES_VERSION),
        **{name: np.asarray(text, np.str_) for name, text in texts.items()},
        "values": np.asarray(scores.values, np.float64),
        "unit_group": np.asarray(coupling.unit_group, np.int64),
        "group_names": np.asarray([g.name for g in coupling.groups], np.str_),
        "unit_index": index,
    }
    np.savez(stream, **made)
    write_bytes(stream.getvalue(), path)
    return stream.getvalue()


def load_scores(path: str | os.PathLike[str], model: Model, coupling: Coupling) -> Scores:
    """Read the scores of a model from a file that ``score`` wrote.

    The file may have more groups than ``coupling`` (some were excluded since), never fewer.

    Args:
        path: File of scores.
        model: The model that was scored.
        coupling: Its coupling.

    Returns:
        One score per unit.

    Raises:
        DataError: The file is missing, unreadable, malformed, of another schema version or of another model, or it does
            not have every unit once with a finite score.
    """
    found = _read(Path(path))
    if (version := _number(found["schema_version"])) != SCORES_VERSION:
        raise DataError(
            f"{path} has schema version {version} but this version reads {SCORES_VERSION}; {_AGAIN}."
        )
    texts = {name: _text(found[name], name, path) for name in _TEXTS}
    if texts["model_sha256"] != model.sha256:
        raise DataError(
            f"{path} holds scores of {texts['model_path']} with sha256 {texts['model_sha256'][:12]}, but {model.path} "
            f"has {model.sha256[:12]}; {_AGAIN} on this model."
        )
    values, unit_group, index = found["values"], found["unit_group"], found["unit_index"]
    names = found["group_names"]
    whole = values.dtype == np.float64 and names.dtype.kind == "U" and names.ndim == 1
    if not whole or any(a.dtype.kind != "i" for a in (unit_group, index)):
        raise DataError(f"{path} has arrays of types that no scores have; {_AGAIN}.")
    if not values.shape == unit_group.shape == index.shape == (values.size,):
        shapes = f"{values.shape}, {unit_group.shape} and {index.shape}"
        raise DataError(
            f"{path}: values, unit_group and unit_index have the shapes {shapes}, not one; {_AGAIN}."
        )
    result = np.zeros(coupling.n_units)
    numbers = {str(name): i for i, name in enumerate(names)}
    for group in coupling.groups:
        if group.name not in numbers:
            raise DataError(
                f"{path} has no scores for the group '{group.name}'; {_AGAIN} without `exclude`."
            )
        units = np.flatnonzero(unit_group == numbers[group.name])
        here = places(coupling, group, group_axes(model, group)[0])
        if not np.array_equal(index[units], here):
            raise DataError(
                f"{path} has {len(units)} units in the group '{group.name}', and they are not the {len(here)} that "
                f"go together here; {_AGAIN} with the same data and the same version."
            )
        result[group.units] = values[units]
    _finite(result, coupling, str(path))
    try:
        programs = tuple(
            check_program({"seconds": None, **p}) for p in json.loads(texts["programs"])
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path}: 'programs' is no JSON list of records of programs; {_AGAIN}."
        ) from error
    return Scores(texts["method"], result, programs)


_PROGRAM: Mapping[str, tuple[type, ...]] = {
    "purpose": (str,),
    "solver": (str,),
    "status": (str,),
    "gap": (float, int, type(None)),
    "variables": (int,),
    "rows": (int,),
}
_MORE: Mapping[str, tuple[type, ...]] = {
    "seconds": (float, int, type(None)),
    "limit": (str, type(None)),
    "reason": (str, type(None)),
    "binding": (list, type(None)),
}


def check_program(program: dict[str, Any]) -> dict[str, Any]:
    """A record of a program from a file, as it is. Raises ValueError where it is none."""
    for name, kinds in (*_PROGRAM.items(), *_MORE.items()):
        if (name in program or name in _PROGRAM) and not isinstance(program.get(name), kinds):
            raise ValueError(f"'{name}' of a program is missing or of another type")
    if not all(isinstance(text, str) for text in program.get("binding") or ()):
        raise ValueError("'binding' of a program lists something that is no text")
    return program


_AGAIN = "run 'onnx-oamip score' again"


def _read(file: Path) -> dict[str, Array]:
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "no such file of scores"
        raise DataError(f"{file}: {what}; give what 'onnx-oamip score' wrote.")
    found = numpy_files.load(file, "scores", "give what 'onnx-oamip score' wrote")
    missing = [key for key in _KEYS if key not in found] if isinstance(found, dict) else []
    if missing or not isinstance(found, dict):
        why = f"it has no '{missing[0]}'" if missing else "it holds one array"
        raise DataError(
            f"{file} cannot be read as scores: {why}; give what 'onnx-oamip score' wrote."
        )
    return {key: np.asarray(found[key]) for key in _KEYS}


def _text(value: Array, name: str, path: object) -> str:
    if value.dtype.kind != "U" or value.ndim:
        raise DataError(f"{path}: '{name}' is no text; {_AGAIN}.")
    return str(value)


def _number(value: Array) -> int | None:
    return int(value) if value.dtype.kind in "iu" and not value.ndim else None


def _finite(values: Array, coupling: Coupling, where: str) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        group = coupling.groups[coupling.unit_group[bad[0]]].name
        raise DataError(
            f"{where}: {bad.size} of {values.size} scores are NaN or infinite, the first in the group '{group}'; check "
            "the model's weights and the data, and score again."
        )


def group_axes(model: Model, group: Group) -> list[Axis]:
    """The axes of a group in the order that files list them: of the weight that it is called after, of other constants,
    of activations."""
    return sorted(
        group.multiplicity,
        key=lambda axis: (
            axis[0] not in model.constants,
            axis[0] not in (group.name, group.name.rpartition("#")[0]),
            len(model.shapes[axis[0]]) < 2,
        ),
    )


def places(coupling: Coupling, group: Group, axis: Axis) -> Ints:
    """First index of every unit (units,) of a group on one of its axes: the channel that it is known by."""
    labels = coupling.axes[axis]
    units, first = np.unique(labels, return_index=True)
    return np.asarray(first[np.searchsorted(units, group.units)], np.int64)


def _plain(value: Any) -> Any:
    """A number of numpy as one of Python."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else str(value)
