"""Plan files: the kept units of every group as JSON that a person can read, edit and apply.

Groups are named by the weight that produces their channels; within a group units are numbered ``0 .. units - 1`` in the
order of their channels on the first axis listed, so that for a plain layer a unit's number is its channel's. Only
``keep`` counts; ``kept`` must be its length, and the rest of a group serves the reader. A plan made for one model can
be applied to another with the same names, or with the same topology: groups are then matched by their order.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from onnx_oamip.artifacts import json_text
from onnx_oamip.artifacts.plan_schema import GroupEntry, PlanFile
from onnx_oamip.artifacts.score_files import (
    first_channels,
    group_axes,
)
from onnx_oamip.core import budgets, notebook
from onnx_oamip.core.atomic_files import write_bytes
from onnx_oamip.core.errors import DataError
from onnx_oamip.core.notebook import COST_HEADER, cost_rows, summary
from onnx_oamip.core.records import (
    Axis,
    Bools,
    Budget,
    Cost,
    Coupling,
    Group,
    Ints,
    Model,
    Objective,
    Plan,
    Scores,
)
from onnx_oamip.core.regular_files import refuse_special
from onnx_oamip.core.version import __version__
from onnx_oamip.graph.cost import Ledger
from onnx_oamip.graph.emptying import effect_of, emptied_groups
from onnx_oamip.graph.low_rank import SUFFIX

SCHEMA_VERSION = 1
IN_MEMORY = "(plan)"
"""Name of a plan in memory in messages and reports."""
MAX_LISTED_GROUPS = 3
"""Groups that a message lists by name."""
IRRELEVANT_SETTINGS = ("cache", "force", "workers", "scheduler")
"""Settings that do not change a plan."""
_EXPECTED = "give what 'onnx-oamip plan' wrote"
_REMEDY = "fix it, or run 'onnx-oamip plan' again"


@dataclass(frozen=True, repr=False)
class Planned:
    """Result of ``plan``, which ``apply`` takes as it is or as the file that ``save`` writes.

    Attributes:
        model: Model that was planned.
        coupling: Units of the model.
        scores: Their scores.
        plan: The plan.
        before: Cost of the model.
        budget: Budget of the plan.
        output: File that was written, None if none was requested.
        sha256: Its digest.
        seconds: Duration of every stage.
        settings: Options of the run.
        notes: Remarks for a reader.
        objective: Terms by which a pruned model is judged.
        losses: Measured loss of each group at its width, None if it was not measured.
    """

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
    objective: Objective = field(default_factory=Objective)
    losses: tuple[float | None, ...] = ()

    @property
    def text(self) -> str:
        """Content of the plan file."""
        return dumps(
            self.model,
            self.coupling,
            self.plan,
            before=self.before,
            importance=self.scores.method,
            budget=self.budget,
            settings=self.settings,
            losses=self.losses or (None,) * len(self.coupling.groups),
            programs=self.scores.programs,
            notes=self.scores.notes,
        )

    def save(self, path: str | os.PathLike[str]) -> Planned:
        """Write the plan file.

        Args:
            path: File to write, completely or not at all.

        Returns:
            The same plan, with the file and its digest.

        Raises:
            OutputError: The file cannot be written; an existing one is unchanged.
        """
        content = self.text.encode()
        write_bytes(content, Path(path))
        return replace(self, output=str(path), sha256=hashlib.sha256(content).hexdigest())

    def __repr__(self) -> str:
        return f"<Planned {self.model.path}: {summary(self.before, self.plan.predicted)}>"

    def _repr_html_(self) -> str:
        widths = self.plan.widths.tolist()
        rows = [
            [group.name, len(group.units), width]
            for group, width in zip(self.coupling.groups, widths, strict=True)
        ]
        return notebook.tables(
            f"Plan for {self.model.path}",
            (cost_rows(self.before, self.plan.predicted), COST_HEADER),
            (rows, ("group", "units", "kept")),
        )


PlanSource = str | os.PathLike[str] | Planned | PlanFile
"""A plan file, the result of ``plan``, or the content of a plan file."""


def content(source: PlanSource) -> PlanFile:
    """Return the content of a plan.

    Args:
        source: Plan file, result of ``plan``, or content of a plan file.

    Returns:
        The content.

    Raises:
        DataError: The file holds no plan.
    """
    if isinstance(source, PlanFile):
        return source
    if isinstance(source, Planned):
        return PlanFile.model_validate_json(source.text, strict=True)
    return load(source)


def name(source: PlanSource) -> str:
    """Name a plan in messages and reports.

    Args:
        source: Plan file, result of ``plan``, or content of a plan file.

    Returns:
        The path, or ``(plan)`` for one in memory.
    """
    if isinstance(source, PlanFile):
        return IN_MEMORY
    if isinstance(source, Planned):
        return source.output or IN_MEMORY
    return os.fspath(source)


def dumps(
    model: Model,
    coupling: Coupling,
    plan: Plan,
    *,
    before: Cost,
    importance: str,
    budget: Budget,
    settings: Mapping[str, Any],
    losses: Sequence[float | None],
    programs: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
) -> str:
    """Build the text of a plan file. Equal plans give equal texts: it holds no times and no dates.

    Args:
        model: Model that was planned.
        coupling: Units of the model.
        plan: The plan.
        before: Cost of the model.
        importance: Name of the importance method.
        budget: Budget of the plan.
        settings: Options of the run.
        losses: Measured loss of each group at its width, None if it was not measured.
        programs: Records of the programs behind the scores.
        notes: Remarks for a reader.

    Returns:
        Content of the file.
    """
    groups = []
    for group, loss in zip(coupling.groups, losses, strict=True):
        groups.append(_group_entry(model, coupling, plan, group, loss))
    all_programs = [dict(program) for program in (*programs, *plan.programs)]
    for program in all_programs:
        program.pop("seconds", None)
    skipped = [
        {"tensor": p.tensor, "axis": p.axis, "channels": p.count, "reason": p.reason}
        for p in coupling.pinned
    ]
    document = {
        "kind": "onnx-oamip plan",
        "schema_version": SCHEMA_VERSION,
        "tool_version": __version__,
        "model": {"path": model.path, "sha256": model.sha256, "topology": topology(model)},
        "importance": importance,
        "allocation": plan.allocation,
        "budget": {kind.name: getattr(budget, kind.name) for kind in budgets.KINDS},
        "before": budgets.costs(before),
        "predicted": budgets.costs(plan.predicted),
        "settings": {n: v for n, v in settings.items() if n not in IRRELEVANT_SETTINGS},
        "programs": all_programs,
        "notes": list(dict.fromkeys((*notes, *plan.notes))),
        "skipped": skipped,
        "groups": groups,
    }
    return json_text.compact(json.dumps(document, indent=2, default=json_text.plain_number)) + "\n"


def _group_entry(
    model: Model,
    coupling: Coupling,
    plan: Plan,
    group: Group,
    loss: float | None,
) -> dict[str, Any]:
    """One group as an entry of the file."""
    kept = np.flatnonzero(plan.keep[_numbered_units(model, coupling, group)])
    axes = []
    for tensor, axis in _constant_axes(model, group):
        per_unit = group.multiplicity[tensor, axis]
        axes.append({"tensor": tensor, "axis": axis, "per_unit": per_unit})
    return {
        "name": group.name,
        "units": len(group.units),
        "kept": len(kept),
        "loss": loss,
        "rotated": group.name in plan.rotated,
        "factored": group.name in plan.factored,
        "axes": axes,
        "keep": kept.tolist(),
    }


def digest(model: Model, coupling: Coupling, kept: Bools) -> str:
    """Identify a choice of units.

    Args:
        model: Model that was planned.
        coupling: Units of the model.
        kept: Kept units (n_units,).

    Returns:
        SHA-256 of the JSON object of the lists ``keep`` by group, keys sorted.
    """
    lists = {}
    for group in coupling.groups:
        numbered = kept[_numbered_units(model, coupling, group)]
        lists[group.name] = np.flatnonzero(numbered).tolist()
    text = json.dumps(lists, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def load(path: str | os.PathLike[str]) -> PlanFile:
    """Load a plan file.

    Args:
        path: File to load.

    Returns:
        Content of the file.

    Raises:
        DataError: The file holds no plan; the message names the line and the rule.
    """
    file = Path(path)
    refuse_special(file, "the plan", DataError)
    if not file.is_file():
        if file.is_dir():
            finding = "is a folder"
        else:
            finding = "no such plan file"
        raise DataError(f"{file}: {finding}; {_EXPECTED}.")
    try:
        # Editors of some systems begin a text with a byte order mark.
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text: {error}; {_EXPECTED}.") from error
    content = _parse(text, file)
    if isinstance(content, dict):
        version = content.get("schema_version")
    else:
        version = None
    if isinstance(version, int) and version != SCHEMA_VERSION:
        raise DataError(
            f"{file} has schema version {version}, but this version reads {SCHEMA_VERSION}; {_REMEDY}."
        )
    try:
        return PlanFile.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":  # nested too deeply, which newer interpreters read
            reason = first["msg"].removeprefix("Invalid JSON: ")
            raise DataError(f"{file} is no valid JSON, {reason}; {_REMEDY}.") from error
        location = [part for part in first["loc"] if isinstance(part, (str, int))]
        rule = first["msg"].removeprefix("Value error, ").rstrip(".")
        line = json_text.line_of(text, location)
        described = json_text.describe_path(content, location)
        raise DataError(f"{file}, line {line}, {described}: {rule}; {_REMEDY}.") from error


def _parse(text: str, file: Path) -> Any:
    try:
        return json.loads(text, object_pairs_hook=json_text.unique_keys)
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno}: {error.msg}"
        raise DataError(f"{file} is no valid JSON, {reason}; {_REMEDY}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no valid JSON, {error}; {_REMEDY}.") from error


class MatchedUnits(NamedTuple):
    """A plan in terms of a model.

    Attributes:
        keep: Kept units (n_units,).
        notes: Remarks on the way in which groups were matched.
        rotated: Names of the model's groups whose units are principal components.
        factored: Names of the groups whose units are ranks of factored layers.
    """

    keep: Bools
    notes: tuple[str, ...]
    rotated: tuple[str, ...] = ()
    factored: tuple[str, ...] = ()


class _MatchedGroups(NamedTuple):
    """Entries of a plan with the model's groups, None for a name that the model does not have."""

    pairs: list[tuple[GroupEntry, Group | None]]
    notes: list[str]


def match_units(
    plan: PlanFile,
    model: Model,
    coupling: Coupling,
    path: str | os.PathLike[str],
) -> MatchedUnits:
    """Find the units that a plan keeps. Groups that it does not name keep all their units.

    Args:
        plan: The plan.
        model: Model to prune.
        coupling: Units of the model.
        path: File of the plan, for error messages.

    Returns:
        Kept units of the model.

    Raises:
        DataError: The plan names a group twice, or one that the model does not have in this form, or keeps no unit of a
            group that the model cannot do without.
    """
    keep = np.ones(coupling.n_units, bool)
    matched = _match_groups(plan, model, coupling)
    notes = matched.notes
    named: set[str] = set()
    rotated: list[str] = []
    factored: list[str] = []
    for entry, group in matched.pairs:
        if entry.name in named:
            raise DataError(f"{path} names the group '{entry.name}' twice; {_REMEDY}.")
        named.add(entry.name)
        if group is None:
            raise DataError(
                f"{path} names the group '{entry.name}', which {model.path} does not have; its groups are "
                f"{_listed([g.name for g in coupling.groups])}: {_REMEDY} on this model."
            )
        _check_entry(entry, model, group, path)
        kept = np.zeros(entry.units, bool)
        kept[list(entry.keep)] = True
        keep[_numbered_units(model, coupling, group)] = kept
        if entry.rotated:
            rotated.append(group.name)
        if entry.factored:
            factored.append(group.name)
    _check_emptied(keep, model, coupling, path)
    unnamed = [group.name for group in coupling.groups if group.name not in named]
    if unnamed and len(matched.pairs) != len(coupling.groups):
        listed = ", ".join(unnamed[:MAX_LISTED_GROUPS])
        notes.append(f"the plan does not name {len(unnamed)} groups, which stay whole: {listed}")
    return MatchedUnits(keep, tuple(notes), tuple(rotated), tuple(factored))


def _check_emptied(
    keep: Bools, model: Model, coupling: Coupling, path: str | os.PathLike[str]
) -> None:
    """Check that the model can do without the groups of which a plan keeps no unit."""
    obstacle = effect_of(model, coupling, keep).obstacle
    if obstacle:
        emptied = sorted(emptied_groups(coupling, keep))
        names = _listed([coupling.groups[group].name for group in emptied])
        raise DataError(
            f"{path} keeps no unit of {names}, but {obstacle}; keep at least one unit there, or {_REMEDY}."
        )


def _match_groups(
    plan: PlanFile,
    model: Model,
    coupling: Coupling,
) -> _MatchedGroups:
    """Match groups by name, or by order if names differ and the graph is the same."""
    by_name = {group.name: group for group in coupling.groups}
    pairs = [(entry, by_name.get(entry.name)) for entry in plan.groups]
    if plan.model.sha256 == model.sha256:
        return _MatchedGroups(pairs, [])
    made_for = f"the plan was made for {plan.model.path}"
    names_differ = any(group is None for _, group in pairs)
    same_count = len(plan.groups) == len(coupling.groups)
    if names_differ and same_count and plan.model.topology == topology(model):
        pairs = list(zip(plan.groups, coupling.groups, strict=True))
        note = f"{made_for}; groups are matched by the order of the same graph"
    else:
        note = f"{made_for}; groups are matched by name"
    return _MatchedGroups(pairs, [note])


def _check_entry(
    entry: GroupEntry,
    model: Model,
    group: Group,
    path: str | os.PathLike[str],
) -> None:
    """Check that an entry has the units of a group."""
    multiplicities = sorted(group.multiplicity[axis] for axis in _constant_axes(model, group))
    stored = sorted(axis.per_unit for axis in entry.axes)
    if entry.units != len(group.units) or stored != multiplicities:
        raise DataError(
            f"{path} has {entry.units} units in the group '{entry.name}', {model.path} has {len(group.units)} "
            f"there on other axes or in another number; {_REMEDY} on this model."
        )


def _listed(names: Sequence[str]) -> str:
    listed = ", ".join(names[:MAX_LISTED_GROUPS])
    if len(names) > MAX_LISTED_GROUPS:
        return f"{listed}, ..."
    return listed


def to_plan(
    stored: PlanFile,
    matched: MatchedUnits,
    coupling: Coupling,
    ledger: Ledger,
) -> Plan:
    """Convert a plan file to the record that later stages read.

    Args:
        stored: The plan file.
        matched: Kept units of the model.
        coupling: Units of the model.
        ledger: Costs of the model.

    Returns:
        The plan, with the cost of the kept units counted again.
    """
    groups = coupling.unit_group[matched.keep]
    widths = np.bincount(groups, minlength=len(coupling.groups)).astype(np.int64)
    return Plan(
        matched.keep,
        widths,
        stored.allocation,
        ledger.cost(widths),
        tuple({"seconds": None, **program} for program in stored.programs),
        (*stored.notes, *matched.notes),
        matched.rotated,
        matched.factored,
    )


def factored_weights(plan: PlanFile) -> tuple[str, ...]:
    """List the layers that a plan writes as two.

    Args:
        plan: Content of a plan file.

    Returns:
        Names of their weights.
    """
    tensors = (axis.tensor for entry in plan.groups if entry.factored for axis in entry.axes)
    return tuple(name.removesuffix(SUFFIX) for name in tensors if name.endswith(SUFFIX))


def topology(model: Model) -> str:
    """Identify a graph without names and values.

    Args:
        model: Model to identify.

    Returns:
        SHA-256 of the operators, their connections, and the shapes of constants.
    """
    numbers: dict[str, int] = {}

    def number(tensor: str) -> int:
        # An omitted input has no name.
        if tensor:
            return numbers.setdefault(tensor, len(numbers))
        return -1

    lines: list[Any] = [[number(p.name), str(p.dtype), len(p.dims)] for p in model.inputs]
    for node in model.every:
        constants = []
        for name in node.inputs:
            constants.append(list(model.shapes[name]) if name in model.constants else None)
        inputs = [number(name) for name in node.inputs]
        outputs = [number(name) for name in node.outputs]
        lines.append([node.op, node.domain, inputs, outputs, constants, len(node.captures)])
    lines.append([number(port.name) for port in model.outputs])
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _constant_axes(model: Model, group: Group) -> list[Axis]:
    """Axes of a group on constants, the one that numbers the units first; of activations one if there are none."""
    axes = group_axes(model, group)
    return [axis for axis in axes if model.is_stored(axis[0])] or axes[:1]


def _numbered_units(model: Model, coupling: Coupling, group: Group) -> Ints:
    """Units of a group in the order of their numbers."""
    channel = first_channels(coupling, group, group_axes(model, group)[0])
    return np.asarray(group.units[np.argsort(channel, kind="stable")], np.int64)
