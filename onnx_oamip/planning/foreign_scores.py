"""Scores by an importance method of another package, checked before anything depends on them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.foreign_code import foreign_code
from onnx_oamip.core.records import Coupling, Floats, Model, Scores, Statistics
from onnx_oamip.importance import Method
from onnx_oamip.statistics.context import Context

ADVICE = "correct the method, or choose another `importance`"


def score(context: Context, method: Method, statistics: Statistics | None) -> Scores:
    """Score all units by a method that is not part of this package.

    Args:
        context: The model and the settings.
        method: The method.
        statistics: The statistics that it requests.

    Returns:
        Its scores, as float64.

    Raises:
        SettingsError: The method raised an exception, changed the model, or returned no number for every unit.
    """
    name = f"`importance={context.settings.importance}`"
    model = context.model
    units = context.coupling.n_units
    before = _digest(model), _labels(context.coupling)
    with foreign_code(name, SettingsError, ADVICE):
        found = method.score(model, context.coupling, statistics, context.settings)
    if (_digest(model), _labels(context.coupling)) != before:
        raise SettingsError(f"{name} changed the model that it was given; {ADVICE}.")
    if not isinstance(found, Scores):
        raise SettingsError(f"{name} returned a {type(found).__name__}, not Scores; {ADVICE}.")
    with foreign_code(f"the scores of {name}", SettingsError, ADVICE):
        method_name = str(found.method)
        orders = {str(other): order for other, order in found.others.items()}
        programs = tuple({str(key): value for key, value in p.items()} for p in found.programs)
        notes = tuple(_text(note) for note in found.notes)
    values = _checked(found.values, f"{name} returned scores", units)
    others = {
        other: _checked(order, f"{name} returned the order '{other}'", units)
        for other, order in orders.items()
    }
    return Scores(method_name, values, programs, notes, others)


def _text(note: object) -> str:
    if not isinstance(note, str):
        raise TypeError(f"a note is a {type(note).__name__}, not a text")
    return note


def _checked(values: Any, subject: str, units: int) -> Floats:
    """Values as float64; raises SettingsError unless there is one finite number per unit."""
    if np.iscomplexobj(values):
        raise SettingsError(f"{subject} that are complex numbers; {ADVICE}.")
    try:
        numbers = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{subject} that are no numbers; {ADVICE}.") from error
    if numbers.shape != (units,):
        raise SettingsError(f"{subject} of shape {numbers.shape} for {units:,} units; {ADVICE}.")
    faulty = np.flatnonzero(~np.isfinite(numbers))
    if faulty.size:
        first = int(faulty[0])
        raise SettingsError(f"{subject} with {numbers[first]:g} for unit {first}; {ADVICE}.")
    return numbers


def _labels(coupling: Coupling) -> str:
    """Digest of the units on every axis, and of the group of every unit."""
    digest = hashlib.sha256(coupling.unit_group.tobytes())
    for labels in coupling.axes.values():
        digest.update(labels.tobytes())
    return digest.hexdigest()


def _digest(model: Model) -> str:
    """Digest of the graph; values of constants are arrays that cannot be written to."""
    return hashlib.sha256(model.proto.SerializeToString(deterministic=True)).hexdigest()
