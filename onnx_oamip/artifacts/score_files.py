"""Files of scores: the importance of every unit in an ``.npz`` that names the model it belongs to.

Arrays are plain (no pickles); structured values are JSON text. A unit is identified by its group and by its first index
on the group's first axis, so that scores still fit if groups are excluded later.

=================  ==========================================================================================
``schema_version``  1; it grows when a key changes its meaning or is removed
``model_sha256``    digest of the model file; ``model_path`` is its path, for people
``tool_version``    version of this package
``method``          name of the importance method
``settings``        JSON object: the options of the run
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnx_oamip.artifacts import json_text
from onnx_oamip.artifacts.keep_maps import Mask
from onnx_oamip.core.atomic_files import write_bytes
from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import (
    Array,
    Axis,
    Coupling,
    Group,
    Ints,
    Model,
    Objective,
    Scores,
)
from onnx_oamip.core.version import __version__
from onnx_oamip.data import numpy_files

SCHEMA_VERSION = 1
SHOWN_DIGITS = 12
"""Digits of a digest in an error."""
_RERUN = "run 'onnx-oamip score' again"
_EXPECTED = "give what 'onnx-oamip score' wrote"
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
_REQUIRED_OF_PROGRAM: Mapping[str, tuple[type, ...]] = {
    "purpose": (str,),
    "solver": (str, type(None)),
    "status": (str,),
    "gap": (float, int, type(None)),
    "variables": (int,),
    "rows": (int,),
}
_OPTIONAL_OF_PROGRAM: Mapping[str, tuple[type, ...]] = {
    "seconds": (float, int, type(None)),
    "limit": (str, type(None)),
    "reason": (str, type(None)),
    "binding": (list, type(None)),
}


@dataclass(frozen=True, repr=False)
class Scored:
    """Result of ``score``.

    Attributes:
        model: Model that was scored.
        coupling: Units of the model.
        scores: Their scores.
        output: File that was written, None for none.
        sha256: Digest of its content.
        seconds: Duration of every stage.
        settings: Options of the run.
        notes: Remarks for a reader.
        objective: Terms that the scores were chosen by.
        mask: Keep-map that was written with the scores, if there is one.
    """

    model: Model
    coupling: Coupling
    scores: Scores
    output: str | None
    sha256: str
    seconds: Mapping[str, float]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    objective: Objective = field(default_factory=Objective)
    mask: Mask | None = None

    def __repr__(self) -> str:
        groups = len(self.coupling.groups)
        return f"<Scored {self.model.path}: {self.coupling.n_units:,} units in {groups} groups by {self.scores.method}>"


def save_scores(
    path: str | os.PathLike[str],
    model: Model,
    coupling: Coupling,
    scores: Scores,
    *,
    settings: Mapping[str, Any],
) -> bytes:
    """Write the scores of a model's units, completely or not at all.

    Args:
        path: File to write.
        model: Model that was scored.
        coupling: Units of the model.
        scores: Their scores.
        settings: Options of the run, as plain values.

    Returns:
        Content of the file.

    Raises:
        DataError: A score is not finite.
        OutputError: The file cannot be written.
    """
    content = score_file(model, coupling, scores, settings)
    write_bytes(content, path)
    return content


def score_file(
    model: Model,
    coupling: Coupling,
    scores: Scores,
    settings: Mapping[str, Any],
) -> bytes:
    """Build the file of the scores of a model's units.

    Args:
        model: Model that was scored.
        coupling: Units of the model.
        scores: Their scores.
        settings: Options of the run, as plain values.

    Returns:
        Content of the file.

    Raises:
        DataError: A score is not finite.
    """
    _check_finite(scores.values, coupling, "the scores")
    index = np.zeros(coupling.n_units, np.int64)
    listed = []
    for group in coupling.groups:
        axes = group_axes(model, group)
        index[group.units] = first_channels(coupling, group, axes[0])
        listed.append(
            [{"tensor": t, "axis": a, "per_unit": group.multiplicity[t, a]} for t, a in axes]
        )
    programs = [dict(program) for program in scores.programs]
    texts = {
        "model_sha256": model.sha256,
        "model_path": model.path,
        "tool_version": __version__,
        "method": scores.method,
        "settings": json.dumps(dict(settings)),
        "programs": json.dumps(programs, default=json_text.plain_number),
        "group_axes": json.dumps(listed),
    }
    arrays: dict[str, Any] = {
        "schema_version": np.int64(SCHEMA_VERSION),
        **{name: np.asarray(text, np.str_) for name, text in texts.items()},
        "values": np.asarray(scores.values, np.float64),
        "unit_group": np.asarray(coupling.unit_group, np.int64),
        "group_names": np.asarray([group.name for group in coupling.groups], np.str_),
        "unit_index": index,
    }
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def load_scores(
    path: str | os.PathLike[str],
    model: Model,
    coupling: Coupling,
) -> Scores:
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
    arrays = _read(Path(path))
    version = _integer(arrays["schema_version"])
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema version {version} but this version reads {SCHEMA_VERSION}; {_RERUN}."
        )
    texts = {name: _text(arrays[name], name, path) for name in _TEXTS}
    if texts["model_sha256"] != model.sha256:
        stored = texts["model_sha256"][:SHOWN_DIGITS]
        own = model.sha256[:SHOWN_DIGITS]
        raise DataError(
            f"{path} holds scores of {texts['model_path']} with sha256 {stored}, but {model.path} "
            f"has {own}; {_RERUN} on this model."
        )
    _check_arrays(arrays, path)
    values = _values_by_unit(arrays, model, coupling, path)
    _check_finite(values, coupling, str(path))
    return Scores(texts["method"], values, _programs(texts["programs"], path))


def _check_arrays(arrays: Mapping[str, Array], path: object) -> None:
    """Check types and shapes of the arrays by unit."""
    values = arrays["values"]
    names = arrays["group_names"]
    unit_group = arrays["unit_group"]
    index = arrays["unit_index"]
    are_integers = unit_group.dtype.kind == "i" and index.dtype.kind == "i"
    are_names = names.dtype.kind == "U" and names.ndim == 1
    if values.dtype != np.float64 or not are_names or not are_integers:
        raise DataError(f"{path} has arrays of types that no scores have; {_RERUN}.")
    if not values.shape == unit_group.shape == index.shape == (values.size,):
        shapes = f"{values.shape}, {unit_group.shape} and {index.shape}"
        raise DataError(
            f"{path}: values, unit_group and unit_index have the shapes {shapes}, not one; {_RERUN}."
        )


def _values_by_unit(
    arrays: Mapping[str, Array],
    model: Model,
    coupling: Coupling,
    path: object,
) -> Array:
    """Score of every unit of the coupling (n_units,)."""
    values = np.zeros(coupling.n_units)
    numbers = {str(name): i for i, name in enumerate(arrays["group_names"])}
    for group in coupling.groups:
        if group.name not in numbers:
            raise DataError(
                f"{path} has no scores for the group '{group.name}'; {_RERUN} without `exclude`."
            )
        stored = np.flatnonzero(arrays["unit_group"] == numbers[group.name])
        expected = first_channels(coupling, group, group_axes(model, group)[0])
        if not np.array_equal(arrays["unit_index"][stored], expected):
            raise DataError(
                f"{path} has {len(stored)} units in the group '{group.name}', and they are not the {len(expected)} "
                f"that go together here; {_RERUN} with the same data and the same version."
            )
        values[group.units] = arrays["values"][stored]
    return values


def _programs(text: str, path: object) -> tuple[dict[str, Any], ...]:
    """Records of the programs behind the scores."""
    try:
        records = [{"seconds": None, **record} for record in json.loads(text)]
        return tuple(check_program(record) for record in records)
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path}: 'programs' is no JSON list of records of programs; {_RERUN}."
        ) from error


def check_program(program: dict[str, Any]) -> dict[str, Any]:
    """Check a record of a program that was read from a file.

    Args:
        program: The record.

    Returns:
        The same record.

    Raises:
        ValueError: A value is missing or of another type.
    """
    types = {**_REQUIRED_OF_PROGRAM, **_OPTIONAL_OF_PROGRAM}
    for name, kinds in types.items():
        is_expected = name in program or name in _REQUIRED_OF_PROGRAM
        if is_expected and not isinstance(program.get(name), kinds):
            raise ValueError(f"'{name}' of a program is missing or of another type")
    binding: Sequence[Any] = program.get("binding") or ()
    if not all(isinstance(text, str) for text in binding):
        raise ValueError("'binding' of a program lists something that is no text")
    return program


def _read(file: Path) -> dict[str, Array]:
    """All arrays of a file of scores."""
    if not file.is_file():
        if file.is_dir():
            finding = "is a folder"
        else:
            finding = "no such file of scores"
        raise DataError(f"{file}: {finding}; {_EXPECTED}.")
    loaded = numpy_files.load(file, "scores", _EXPECTED)
    if not isinstance(loaded, dict):
        raise DataError(f"{file} cannot be read as scores: it holds one array; {_EXPECTED}.")
    missing = [key for key in _KEYS if key not in loaded]
    if missing:
        raise DataError(f"{file} cannot be read as scores: it has no '{missing[0]}'; {_EXPECTED}.")
    return {key: np.asarray(loaded[key]) for key in _KEYS}


def _text(value: Array, name: str, path: object) -> str:
    if value.dtype.kind != "U" or value.ndim:
        raise DataError(f"{path}: '{name}' is no text; {_RERUN}.")
    return str(value)


def _integer(value: Array) -> int | None:
    """A single integer, or None for any other array."""
    if value.dtype.kind not in "iu" or value.ndim:
        return None
    return int(value)


def _check_finite(values: Array, coupling: Coupling, where: str) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        group = coupling.groups[coupling.unit_group[bad[0]]].name
        raise DataError(
            f"{where}: {bad.size} of {values.size} scores are NaN or infinite, the first in the group '{group}'; check "
            "the model's weights and the data, and score again."
        )


def group_axes(model: Model, group: Group) -> list[Axis]:
    """Order the axes of a group as files list them.

    Args:
        model: Model of the group.
        group: Group of units.

    Returns:
        Axes of the weight that the group is named after, then of other constants, then of activations.
    """

    def rank(axis: Axis) -> tuple[bool, bool, bool]:
        tensor, _ = axis
        names = (group.name, group.name.rpartition("#")[0])
        is_vector = len(model.shapes[tensor]) < 2
        return not model.is_stored(tensor), tensor not in names, is_vector

    return sorted(group.multiplicity, key=rank)


def first_channels(coupling: Coupling, group: Group, axis: Axis) -> Ints:
    """Find the channel that identifies each unit.

    Args:
        coupling: Units of the model.
        group: Group of units.
        axis: An axis of the group.

    Returns:
        First index of every unit on the axis (units,).
    """
    labels = coupling.axes[axis]
    units, first = np.unique(labels, return_index=True)
    return np.asarray(first[np.searchsorted(units, group.units)], np.int64)
