"""Latency tables: times of operators on another device, from which a latency budget for that device is planned.

``profile`` writes one with times at several widths (``dumps``). Tables of other programs hold times at full width:

===================  ================================================================================================
CSV                  columns ``operator`` and ``shapes`` (of the inputs, as ``1x3x32x32;16x3x3x3``), or ``name`` of
                     the node, and ``milliseconds``
ONNX Runtime         the profile that ``SessionOptions.enable_profiling`` writes
trtexec              the file of ``--exportProfile``
benchmark_app        the report of ``-report_type detailed_counters``
===================  ================================================================================================
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnx_oamip.core.errors import BudgetNotMet, DataError
from onnx_oamip.core.records import Coupling, Ints, Model
from onnx_oamip.core.regular_files import refuse_special
from onnx_oamip.core.version import __version__
from onnx_oamip.graph.cost import full_widths, ledger
from onnx_oamip.graph.emptying import effect_of
from onnx_oamip.planning.budget_program import LinearisedLimit
from onnx_oamip.planning.latency_model import (
    LatencyModel,
    Measurement,
    assign,
    fitted,
    parse,
)

KIND = "onnx-oamip latency table"
SCHEMA_VERSION = 1
EXPECTED = (
    "give what 'onnx-oamip profile' wrote, a CSV file with the columns operator, shapes and milliseconds, or a profile "
    "of ONNX Runtime, trtexec or benchmark_app"
)
_NAMES = ("name", "layername")
_OPERATORS = ("operator", "layertype", "op")
_TIMES = ("milliseconds", "ms", "realtime (ms)", "averagems")
UNKNOWN_STEP = 8
"""Alignment step of channels for a table that states none."""


class Run(BaseModel):
    """Times at one vector of widths.

    Attributes:
        widths: Units by group; groups that are not named have all of theirs.
        milliseconds: Time of a whole run.
        nodes: Time by linear node; empty if unknown.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    widths: dict[str, int] = Field(default_factory=dict)
    milliseconds: float = Field(gt=0, allow_inf_nan=False)
    nodes: dict[str, float] = Field(default_factory=dict)


class LatencyTable(BaseModel):
    """Content of a table that ``profile`` wrote.

    Attributes:
        device: Where it was measured.
        step: Multiple of channels that the kernels of the device prefer.
        runs: Times, those at full width first.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    kind: str
    schema_version: int
    device: str
    step: int = Field(ge=1)
    runs: tuple[Run, ...] = Field(min_length=1)


class Row(NamedTuple):
    """Time of one operator at full width.

    Attributes:
        name: Name of the node or of the kernel; empty if unknown.
        operator: Its operator; empty if unknown.
        shapes: Shapes of its first inputs; empty if unknown.
        seconds: Its time.
    """

    name: str
    operator: str
    shapes: tuple[tuple[int, ...], ...]
    seconds: float


def dumps(
    model: Model,
    coupling: Coupling,
    measured: Measurement,
    *,
    device: str,
    step: int,
    threads: int | None,
    batch: int,
) -> str:
    """Build the text of a table.

    Args:
        model: Model that was measured.
        coupling: Its coupling.
        measured: The times.
        device: Where it was measured.
        step: Multiple of channels that the kernels of the device prefer.
        threads: Threads within an operator, None for the choice of ONNX Runtime.
        batch: Samples per run.

    Returns:
        Content of the file.
    """
    names = ledger(model, coupling).nodes
    runs = []
    for level, (widths, wall) in enumerate(zip(measured.widths, measured.walls, strict=True)):
        times = (
            {} if measured.nodes is None else dict(zip(names, measured.nodes[level], strict=True))
        )
        runs.append(
            {
                "widths": {
                    group.name: int(width)
                    for group, width in zip(coupling.groups, widths, strict=True)
                },
                "milliseconds": 1e3 * float(wall),
                "nodes": {name: 1e3 * float(seconds) for name, seconds in times.items()},
            }
        )
    document = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "tool_version": __version__,
        "model": {"path": model.path, "sha256": model.sha256},
        "device": device,
        "threads": threads,
        "batch": batch,
        "step": step,
        "runs": runs,
    }
    return json.dumps(document, indent=2) + "\n"


def limit(path: str, model: Model, coupling: Coupling, share: float) -> LinearisedLimit:
    """Make the latency row of the budget program from a table.

    Args:
        path: The table.
        model: The whole model.
        coupling: Its coupling.
        share: Share of the latency to keep.

    Returns:
        The limit: the time that the table predicts for a plan is at most this share of that for the whole model.

    Raises:
        DataError: The table cannot be read, or was made for another model.
    """
    table = load(path, model, coupling)
    whole = table.seconds(ledger(model, coupling).lengths(full_widths(coupling)))
    return table.limit(share * whole)


def refuse_constant(path: str, row: LinearisedLimit, share: float) -> None:
    """Check that widths can meet a limit by a table at all.

    Args:
        path: The table.
        row: The limit, for a network that may lack branches.
        share: Share of the latency to keep.

    Raises:
        BudgetNotMet: The time that does not depend on widths exceeds the budget.
    """
    if row.constant >= row.limit:
        whole = row.limit / share
        raise BudgetNotMet(
            f"the `latency` budget cannot be met: by {path}, {row.constant / whole:.2f} of the original's time does "
            f"not depend on widths, asked for {share}."
        )


def predicted(path: str, model: Model, coupling: Coupling, widths: Ints) -> float:
    """Predict the latency of a plan relative to the original's.

    Args:
        path: The table.
        model: The whole model.
        coupling: Its coupling.
        widths: Units of every group in the plan (groups,). Nodes of groups without any take no time.

    Returns:
        The ratio, under 1 if the plan is faster.

    Raises:
        DataError: The table cannot be read, or was made for another model.
    """
    table = load(path, model, coupling)
    costs = ledger(model, coupling)
    whole = table.seconds(costs.lengths(full_widths(coupling)))
    removed = effect_of(model, coupling, (widths > 0)[coupling.unit_group]).removed
    saved = sum(table.starts.get(name, 0.0) for name in removed)
    return (table.seconds(costs.lengths(widths)) - saved) / whole


def step(path: str) -> int:
    """Read the alignment step of the device of a table.

    Args:
        path: The table.

    Returns:
        Multiple of channels that its kernels prefer; ``UNKNOWN_STEP`` if the table states none.

    Raises:
        DataError: The table cannot be read.
    """
    content = _parsed(path)
    return content.step if isinstance(content, LatencyTable) else UNKNOWN_STEP


def load(path: str, model: Model, coupling: Coupling) -> LatencyModel:
    """Load a table and fit the latency model of its device.

    Args:
        path: The table.
        model: The whole model.
        coupling: Its coupling.

    Returns:
        The fitted model.

    Raises:
        DataError: The table cannot be read, or was made for another model.
    """
    content = _parsed(path)
    if isinstance(content, LatencyTable):
        return fitted(model, coupling, _of_runs(content, model, coupling, path))
    return fitted(model, coupling, _of_rows(content, model, coupling, path))


def _of_runs(table: LatencyTable, model: Model, coupling: Coupling, path: str) -> Measurement:
    names = ledger(model, coupling).nodes
    units = {group.name: len(group.units) for group in coupling.groups}
    widths = []
    for run in table.runs:
        for group, width in run.widths.items():
            if not 0 < width <= units.get(group, 0):
                raise DataError(
                    f"{path} has {width} units in the group '{group}', which {model.path} does not have; run "
                    "'onnx-oamip profile' on this model."
                )
        widths.append([run.widths.get(name, count) for name, count in units.items()])
    nodes = None
    if all(run.nodes for run in table.runs):
        times = [[1e-3 * run.nodes.get(name, 0.0) for name in names] for run in table.runs]
        nodes = np.asarray(times)
    walls = np.asarray([1e-3 * run.milliseconds for run in table.runs])
    return Measurement(np.asarray(widths, np.int64), walls, nodes)


def _of_rows(rows: list[Row], model: Model, coupling: Coupling, path: str) -> Measurement:
    """Times of the nodes of a model by the rows that match them, by name or by operator and shapes."""
    costs = ledger(model, coupling)
    operators = {node.name: node.op for node in model.every}
    kernels: dict[str, tuple[str, float]] = {}
    for place, row in enumerate(rows):
        name = _node_named(row.name, operators)
        if name:
            kernels[name] = (operators[name], row.seconds)
        elif row.name:
            kernels[f"{row.name} {place}"] = (row.operator, row.seconds)
    by_shapes = [row for row in rows if row.shapes and row.operator]
    for node in model.every:
        shapes = tuple(model.shapes.get(name, ()) for name in node.inputs)
        if node.name in kernels:
            continue
        for row in by_shapes:
            if row.operator == node.op and shapes[: len(row.shapes)] == row.shapes:
                kernels[node.name] = (row.operator, row.seconds)
    full = full_widths(coupling)
    macs = np.asarray(costs.terms(costs.macs, costs.lengths(full)), float)
    times = assign(model.proto, costs.nodes, kernels, macs)
    if not times.any():
        raise DataError(
            f"{path} has no row for a convolution or a product of {model.path}; names, or operators and shapes, must "
            "be those of this model."
        )
    total = sum(seconds for _, seconds in kernels.values())
    return Measurement(full[None, :], np.asarray([max(total, times.sum())]), times[None, :])


def _node_named(name: str, known: Collection[str]) -> str:
    """First node of a kernel's name, in which trtexec joins those that it fused by plus signs."""
    return next((part for part in (name, *name.split(" + ")) if part in known), "")


def _parsed(path: str) -> LatencyTable | list[Row]:
    file = Path(path)
    refuse_special(file, "the latency table", DataError)
    if not file.is_file():
        raise DataError(f"{path}: no such latency table; {EXPECTED}.")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}; {EXPECTED}.") from error
    try:
        if text.lstrip().startswith(("{", "[")):
            return _of_json(json.loads(text))
        return _of_csv(text)
    except (ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is no latency table: {reason}; {EXPECTED}.") from error


def _of_json(content: Any) -> LatencyTable | list[Row]:
    if isinstance(content, dict):
        if content.get("kind") != KIND:
            raise ValueError("an object of another kind")
        try:
            return LatencyTable.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"{place}: {first['msg']}") from error
    entries = [entry for entry in content if isinstance(entry, dict)]
    if any(entry.get("cat") == "Node" for entry in entries):
        kernels = parse([entry for entry in entries if "cat" in entry])
        return _checked(Row(name, op, (), seconds) for name, (op, seconds) in kernels.items())
    return _checked(
        Row(str(entry["name"]), "", (), 1e-3 * float(entry["averageMs"]))
        for entry in entries
        if "averageMs" in entry
    )


def _of_csv(text: str) -> list[Row]:
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    rows = []
    for record in csv.DictReader(text.splitlines(), delimiter=delimiter):
        cells = {
            str(key).strip().lower(): str(value or "").strip() for key, value in record.items()
        }
        time = _cell(cells, _TIMES)
        if not time:
            continue
        row = Row(
            _cell(cells, _NAMES),
            _cell(cells, _OPERATORS),
            _shapes(cells.get("shapes", "")),
            1e-3 * float(time),
        )
        rows.append(row)
    return _checked(rows)


def _cell(cells: Mapping[str, str], names: Iterable[str]) -> str:
    return next((cells[name] for name in names if name in cells), "")


def _shapes(text: str) -> tuple[tuple[int, ...], ...]:
    """Shapes as ``1x3x32x32;16x3x3x3``."""
    parts = text.replace(";", " ").replace(",", " ").split()
    return tuple(tuple(int(length) for length in part.split("x")) for part in parts)


def _checked(rows: Iterable[Row]) -> list[Row]:
    result = [row for row in rows if row.seconds > 0]
    if not result:
        raise ValueError("it has no row with a time")
    return result
