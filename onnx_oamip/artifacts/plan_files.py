"""A plan between two commands, as a JSON file that a person can read, edit and apply.

Groups are named by the weight that makes their channels; within a group units are numbered ``0 .. units - 1`` in the
order of their channels on the first axis listed, so that for a plain layer a unit's number is its channel's. What
counts is ``keep``; ``kept`` must be its length, and the rest of a group says what is meant. A plan made for one model
can be applied to another of the same names, or of the same topology: it is then matched by the order of groups.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from onnx_oamip.artifacts.score_files import check_program, group_axes, places
from onnx_oamip.core import budgets
from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import (
    Axis,
    Bools,
    Budget,
    Cost,
    Coupling,
    Group,
    Ints,
    Model,
    Plan,
    Scores,
)
from onnx_oamip.core.version import __version__
from onnx_oamip.graph.cost import Ledger

PLAN_VERSION = 1
_DECODER = json.JSONDecoder()
_AGAIN = "mend it, or run 'onnx-oamip plan' again"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelEntry(_Record):
    """The model a plan was made for: its file, and a digest of its graph without names and numbers."""

    path: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    topology: str = Field(pattern="^[0-9a-f]{64}$")


class AxisEntry(_Record):
    """One axis that a group lives on, with the indices that one unit holds there."""

    tensor: str
    axis: int = Field(ge=0)
    per_unit: int = Field(ge=1)


class CostEntry(_Record):
    """Costs as ``records.Cost`` counts them."""

    macs: int = Field(ge=0)
    params: int = Field(ge=0)
    bytes: int = Field(ge=0)


class GroupEntry(_Record):
    """Which units of one group stay. ``loss`` is the measured loss of the model with only this group at that width."""

    name: str
    units: int = Field(ge=1)
    kept: int = Field(ge=1)
    loss: float | None = None
    axes: tuple[AxisEntry, ...] = Field(min_length=1)
    keep: tuple[int, ...]

    @model_validator(mode="after")
    def _consistent(self) -> GroupEntry:
        if self.keep and (min(self.keep) < 0 or max(self.keep) >= self.units):
            stray = min(self.keep) if min(self.keep) < 0 else max(self.keep)
            raise ValueError(
                f"'keep' lists unit {stray}, but the units of this group are 0 to {self.units - 1}"
            )
        unit, count = next(iter(Counter(self.keep).most_common(1)), (0, 0))
        if count > 1:
            raise ValueError(f"'keep' lists unit {unit} twice")
        if self.kept != len(self.keep):
            raise ValueError(
                f"'kept' says {self.kept}, but 'keep' lists {len(self.keep)} units; make the two agree"
            )
        return self


class PlanFile(_Record):
    """A plan file: the kept units of every group, and the settings and costs that it was made with."""

    kind: Literal["onnx-oamip plan"]
    schema_version: Literal[1]
    tool_version: str
    model: ModelEntry
    importance: str
    allocation: str
    budget: dict[str, float | None]
    before: CostEntry
    predicted: CostEntry
    settings: dict[str, Any]
    programs: tuple[Annotated[dict[str, Any], AfterValidator(check_program)], ...] = ()
    notes: tuple[str, ...] = ()
    skipped: tuple[dict[str, Any], ...] = ()
    groups: tuple[GroupEntry, ...]


@dataclass(frozen=True)
class Planned:
    """Result of ``plan``: the plan, the file that was written with its digest, and the duration of every stage."""

    model: Model
    coupling: Coupling
    scores: Scores
    plan: Plan
    before: Cost
    budget: Budget
    output: str | None
    sha256: str | None
    seconds: Mapping[str, float]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def dumps(
    model: Model,
    coupling: Coupling,
    plan: Plan,
    before: Cost,
    importance: str,
    budget: Budget,
    settings: Mapping[str, Any],
    losses: Sequence[float | None],
    programs: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
) -> str:
    """The text of a plan file; ``losses`` has one value a group, or None where none was measured.

    Nothing in it changes from run to run where the plan does not: no times, no dates.
    """
    groups = []
    for group, loss in zip(coupling.groups, losses, strict=True):
        kept = np.flatnonzero(plan.keep[_numbered(model, coupling, group)])
        groups.append(
            {
                "name": group.name,
                "units": len(group.units),
                "kept": len(kept),
                "loss": loss,
                "axes": [
                    {"tensor": t, "axis": a, "per_unit": group.multiplicity[t, a]}
                    for t, a in _weights(model, group)
                ],
                "keep": kept.tolist(),
            }
        )
    document = {
        "kind": "onnx-oamip plan",
        "schema_version": PLAN_VERSION,
        "tool_version": __version__,
        "model": {"path": model.path, "sha256": model.sha256, "topology": topology(model)},
        "importance": importance,
        "allocation": plan.allocation,
        "budget": {kind.name: getattr(budget, kind.name) for kind in budgets.KINDS},
        "before": budgets.costs(before),
        "predicted": budgets.costs(plan.predicted),
        "settings": {
            n: v for n, v in settings.items() if n not in ("cache", "force", "workers", "scheduler")
        },
        "programs": [
            {k: v for k, v in p.items() if k != "seconds"} for p in (*programs, *plan.programs)
        ],
        "notes": list(dict.fromkeys((*notes, *plan.notes))),
        "skipped": [
            {"tensor": p.tensor, "axis": p.axis, "channels": p.count, "reason": p.reason}
            for p in coupling.pinned
        ],
        "groups": groups,
    }
    return _short(json.dumps(document, indent=2, default=_plain)) + "\n"


def digest(model: Model, coupling: Coupling, kept: Bools) -> str:
    """SHA-256 of which units (n_units,) stay: of the JSON object of the lists ``keep`` by group, keys sorted."""
    lists = {
        g.name: np.flatnonzero(kept[_numbered(model, coupling, g)]).tolist()
        for g in coupling.groups
    }
    return hashlib.sha256(
        json.dumps(lists, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def load(path: str | os.PathLike[str]) -> PlanFile:
    """The plan that a file holds. Raises DataError with the line and the rule where it holds none."""
    file = Path(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "no such plan file"
        raise DataError(f"{file}: {what}; give what 'onnx-oamip plan' wrote.")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} cannot be read as text: {error}; give what 'onnx-oamip plan' wrote."
        ) from error
    try:
        content = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        where = (
            f"line {error.lineno}: {error.msg}"
            if isinstance(error, json.JSONDecodeError)
            else str(error)
        )
        raise DataError(f"{file} is no valid JSON, {where}; {_AGAIN}.") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version != PLAN_VERSION:
        raise DataError(
            f"{file} has schema version {version}, but this version reads {PLAN_VERSION}; {_AGAIN}."
        )
    try:
        return PlanFile.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = [p for p in first["loc"] if isinstance(p, (str, int))]
        rule = first["msg"].removeprefix("Value error, ").rstrip(".")
        raise DataError(
            f"{file}, line {_line(text, place)}, {_dotted(content, place)}: {rule}; {_AGAIN}."
        ) from error


def keep(
    found: PlanFile, model: Model, coupling: Coupling, path: str | os.PathLike[str]
) -> tuple[Bools, tuple[str, ...]]:
    """Which units (n_units,) stay in a model by a plan, and notes on how the two were matched.

    Groups that the plan does not name keep all their units. Raises DataError where the plan names what the model has
    not.
    """
    result = np.ones(coupling.n_units, bool)
    notes: list[str] = []
    by_name = {g.name: g for g in coupling.groups}
    pairs = [(entry, by_name.get(entry.name)) for entry in found.groups]
    if found.model.sha256 != model.sha256:
        same = found.model.topology == topology(model) and len(found.groups) == len(coupling.groups)
        if any(g is None for _, g in pairs) and same:
            pairs = list(zip(found.groups, coupling.groups, strict=True))
            notes.append(
                f"the plan was made for {found.model.path}; groups are matched by the order of the same graph"
            )
        else:
            notes.append(f"the plan was made for {found.model.path}; groups are matched by name")
    named: set[str] = set()
    for entry, group in pairs:
        if entry.name in named:
            raise DataError(f"{path} names the group '{entry.name}' twice; {_AGAIN}.")
        named.add(entry.name)
        if group is None:
            raise DataError(
                f"{path} names the group '{entry.name}', which {model.path} does not have; its groups are "
                f"{', '.join(list(by_name)[:3])}{', ...' if len(by_name) > 3 else ''}: {_AGAIN} on this model."
            )
        held = sorted(group.multiplicity[axis] for axis in _weights(model, group))
        if entry.units != len(group.units) or sorted(a.per_unit for a in entry.axes) != held:
            raise DataError(
                f"{path} has {entry.units} units in the group '{entry.name}', {model.path} has {len(group.units)} "
                f"there on other axes or in another number; {_AGAIN} on this model."
            )
        stays = np.zeros(entry.units, bool)
        stays[list(entry.keep)] = True
        result[_numbered(model, coupling, group)] = stays
    left = [g.name for g in coupling.groups if g.name not in named]
    if left and len(pairs) != len(coupling.groups):
        notes.append(
            f"the plan does not name {len(left)} groups, which stay whole: {', '.join(left[:3])}"
        )
    return result, tuple(notes)


def to_plan(
    found: PlanFile, kept: Bools, coupling: Coupling, ledger: Ledger, notes: Sequence[str]
) -> Plan:
    """The record that later stages read, with the cost of what is kept counted again."""
    widths = np.bincount(coupling.unit_group[kept], minlength=len(coupling.groups)).astype(np.int64)
    programs = tuple({"seconds": None, **program} for program in found.programs)
    return Plan(
        kept, widths, found.allocation, ledger.cost(widths), programs, (*found.notes, *notes)
    )


def topology(model: Model) -> str:
    """SHA-256 of the graph without names and values: operators, how they are joined, and shapes of constants."""
    numbers: dict[str, int] = {}

    def number(tensor: str) -> int:
        return numbers.setdefault(tensor, len(numbers)) if tensor else -1

    lines: list[Any] = [[number(p.name), str(p.dtype), len(p.dims)] for p in model.inputs]
    for node in model.every:
        constants = [list(model.shapes[n]) if n in model.constants else None for n in node.inputs]
        joined = [[number(n) for n in node.inputs], [number(n) for n in node.outputs]]
        lines.append([node.op, node.domain, *joined, constants, len(node.captures)])
    lines.append([number(p.name) for p in model.outputs])
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _weights(model: Model, group: Group) -> list[Axis]:
    """The axes of constants, that by which units are numbered first; what lies between them follows."""
    axes = group_axes(model, group)
    return [axis for axis in axes if axis[0] in model.constants] or axes[:1]


def _numbered(model: Model, coupling: Coupling, group: Group) -> Ints:
    """The units of a group in the order of their numbers."""
    first = places(coupling, group, group_axes(model, group)[0])
    return np.asarray(group.units[np.argsort(first, kind="stable")], np.int64)


def _short(text: str) -> str:
    """JSON with lists of numbers and small objects on one line each, which reads better; strings hold no breaks."""
    text = re.sub(r"\[\n[\s\d,]+\]", _flat, text)
    return re.sub(
        r"\{\n[^{}\[\]]{1,200}\}", lambda found: min(_flat(found), found[0], key=_too_long), text
    )


def _flat(found: re.Match[str]) -> str:
    return re.sub(r"\s*\n\s*", " ", re.sub(r"\s*\n\s*(?=[\]}])|(?<=[\[{])\s*\n\s*", "", found[0]))


def _too_long(text: str) -> bool:
    return max(map(len, text.splitlines())) > 110


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; readers differ in which of two values of a name they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"'{name}' stands twice in one object")
    return found


def _line(text: str, place: Sequence[str | int]) -> int:
    """Line of the value at a path of valid JSON, or of the innermost value on the path that exists."""
    position = _between(text, 0)
    for part in place:
        found = next((start for key, start in _members(text, position) if key == part), None)
        if found is None:
            break
        position = found
    return text.count("\n", 0, position) + 1


def _members(text: str, position: int) -> Iterator[tuple[str | int, int]]:
    """(key or index, position of the value) of each member of the object or array at a position of valid JSON."""
    opening = text[position]
    if opening not in "{[":
        return
    position = _between(text, position + 1)
    for index in itertools.count():
        if text[position] in "}]":
            return
        key: str | int = index
        if opening == "{":
            key, end = _DECODER.raw_decode(text, position)
            position = _between(text, end)
        yield key, position
        position = _between(text, _DECODER.raw_decode(text, position)[1])


def _between(text: str, position: int) -> int:
    """Position of the next value, or of the bracket that closes, behind white space and separators."""
    while text[position] in " \t\n\r,:":
        position += 1
    return position


def _dotted(content: Any, place: Sequence[str | int]) -> str:
    """A path for people: groups by their names."""
    words: list[str] = []
    for part in place:
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):  # a key that is missing, and all behind it
            content = None
        name = content.get("name") if isinstance(content, dict) else None
        words.append(
            f"'{part}'" if isinstance(part, str) else f"number {part}{f' ({name})' if name else ''}"
        )
    return " ".join(words) or "the whole file"


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else str(value)
