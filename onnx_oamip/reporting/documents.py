"""JSON documents: the record of a run, one function per command.

Documents hold plain values only and are strict JSON: a number that is not finite becomes null. ``tables`` and ``html``
present them. The keys are described in the JSON reference.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np

from onnx_oamip.artifacts.keep_maps import PUBLISHED_THRESHOLD, Checkpoint
from onnx_oamip.artifacts.plan_files import Planned
from onnx_oamip.artifacts.recovered_models import Recovered
from onnx_oamip.artifacts.score_files import Scored
from onnx_oamip.core import budgets
from onnx_oamip.core.json_values import plain_document
from onnx_oamip.core.records import (
    Bools,
    Budget,
    Connections,
    Cost,
    Coupling,
    Fit,
    Floats,
    Frontier,
    Measure,
    MetricValues,
    Model,
    Objective,
    Point,
    Port,
    Recovery,
    Report,
    Scores,
    Uncounted,
    Verification,
)
from onnx_oamip.core.records.objective import document as terms
from onnx_oamip.core.versions import versions
from onnx_oamip.graph import linear_streams
from onnx_oamip.graph.cost import full_widths, ledger, uncounted
from onnx_oamip.graph.ops import REGISTRY
from onnx_oamip.planning import score_draws
from onnx_oamip.programs.solvers import SolverRecord
from onnx_oamip.reporting.knee import knee
from onnx_oamip.verification.benchmark import Benchmark
from onnx_oamip.verification.latency import Timing

SCHEMA_VERSION = 1
Document: TypeAlias = dict[str, Any]


def document(report: Report) -> Document:
    """Convert the report of ``prune`` or ``apply`` to the JSON document of ``--json``.

    Args:
        report: The report.

    Returns:
        A dict of plain values; its keys are described in the JSON reference.
    """
    kept = np.asarray(report.plan.widths, np.int64)
    # A plan from a file comes without scores: their summaries are null.
    if report.scores:
        values = report.scores.values
    else:
        values = np.full(report.coupling.n_units, np.nan)
    result = {
        "schema_version": SCHEMA_VERSION,
        "model": _model(report.model),
        "output": {"path": report.output, "sha256": report.output_sha256},
        "before": {**_cost(report.before), "zip_bytes": report.zip_bytes[0]},
        "after": {**_cost(report.after), "zip_bytes": report.zip_bytes[1]},
        "budget": _budget(report.budget),
        "groups": [
            {
                "name": group.name,
                "units": len(group.units),
                "kept": int(width),
                "level": int(width) / len(group.units),
                "rotated": group.name in report.plan.rotated,
                "factored": group.name in report.plan.factored,
                "emptied": int(width) == 0,
                "score": _summary(values[group.units]),
            }
            for group, width in zip(report.coupling.groups, kept, strict=True)
        ],
        "skipped": _skipped(report.coupling),
        "draws": _draws(report.scores, report.coupling, report.plan.keep),
        "importance": report.scores.method if report.scores else report.settings["importance"],
        "allocation": report.plan.allocation,
        "programs": [*(report.scores.programs if report.scores else ()), *report.plan.programs],
        "fits": [_fit(fit) for fit in report.fits],
        "curves": [{"widths": curve.widths, "losses": curve.loss} for curve in report.curves],
        "tried": [
            {"asked": t.asked, "macs": t.macs, "lost": t.lost, "measure": t.measure}
            for t in report.tried
        ],
        "compared": dict(report.compared),
        "recovery": None if report.recovery is None else _recovery(report.recovery),
        "connections": None if report.connections is None else _connections(report.connections),
        "objective": terms(report.objective),
        "reading": report.reading,
        "verification": verified(report.verification),
        "notes": _distinct([*report.model.notes, *report.notes, *report.plan.notes]),
        "timings": report.timings,
        "settings": report.settings,
        "versions": versions(),
    }
    return plain_document(result)


def _draws(scores: Scores | None, coupling: Coupling, keep: Bools) -> Document | None:
    """Agreement of the draws of the samples; None for scores on all of them."""
    if scores is None or scores.draws is None:
        return None
    groups = score_draws.agreements(scores, coupling, keep)
    return {"count": len(scores.draws), "groups": [asdict(group) for group in groups]}


def frontier(found: Frontier) -> Document:
    """Converts the result of ``frontier`` to its JSON document: the model at every budget, by falling MACs.

    Args:
        found: The result.

    Returns:
        A dict of plain values.
    """
    points = [frontier_point(point, found.before) for point in found.points]
    result = {
        "schema_version": SCHEMA_VERSION,
        "model": _model(found.model),
        "before": {**_cost(found.before), "accuracy": found.accuracy},
        "groups": [
            {"name": group.name, "units": len(group.units)} for group in found.coupling.groups
        ],
        "objective": terms(found.objective),
        "points": points,
        "knee": _knee(points, found.accuracy),
        "importance": found.importance,
        "notes": _distinct([*found.model.notes, *found.notes]),
        "timings": found.timings,
        "settings": found.settings,
        "versions": versions(),
    }
    return plain_document(result)


def _knee(points: Sequence[Document], accuracy: float | None) -> float | None:
    """The level behind which quality falls faster; None if the curve has no such point."""
    made = [point for point in points if not point["reason"]]
    qualities = {"accuracy": accuracy, "agreement": 1.0}
    for name, whole in qualities.items():
        if whole is not None and all(point[name] is not None for point in made):
            shares = [1.0, *(point["shares"]["macs"] for point in made)]
            place = knee(shares, [whole, *(point[name] for point in made)])
            return None if place is None else made[place - 1]["asked"]
    return None


def scoring(found: Scored) -> Document:
    """Converts the result of ``score`` to its JSON document: the distribution of the scores of every group.

    Args:
        found: The result.

    Returns:
        A dict of plain values; ``below`` is the share of scores under ``low``.
    """
    groups = []
    for group in found.coupling.groups:
        values = found.scores.values[group.units]
        spread = {
            **_summary(values),
            "median": np.median(values),
            "below": np.mean(values < PUBLISHED_THRESHOLD),
        }
        groups.append({"name": group.name, "units": len(group.units), "score": spread})
    result = {
        "schema_version": SCHEMA_VERSION,
        "model": _model(found.model),
        "output": {"path": found.output, "sha256": found.sha256},
        "mask": None if found.mask is None else asdict(found.mask),
        "method": found.scores.method,
        "low": PUBLISHED_THRESHOLD,
        "groups": groups,
        "programs": found.scores.programs,
        "objective": terms(found.objective),
        "notes": _distinct([*found.model.notes, *found.objective.notes, *found.notes]),
        "timings": found.seconds,
        "settings": found.settings,
        "versions": versions(),
    }
    return plain_document(result)


def planning(found: Planned) -> Document:
    """Converts the result of ``plan`` to its JSON document: that of ``prune`` with predicted instead of measured costs.

    Args:
        found: The result.

    Returns:
        A dict of plain values.
    """
    groups = []
    for group, width in zip(found.coupling.groups, found.plan.widths.tolist(), strict=True):
        units = len(group.units)
        score = _summary(found.scores.values[group.units])
        groups.append(
            {
                "name": group.name,
                "units": units,
                "kept": width,
                "level": width / units,
                "rotated": group.name in found.plan.rotated,
                "factored": group.name in found.plan.factored,
                "emptied": width == 0,
                "score": score,
            }
        )
    result = {
        "schema_version": SCHEMA_VERSION,
        "model": _model(found.model),
        "output": {"path": found.output, "sha256": found.sha256},
        "before": _cost(found.before),
        "predicted": _cost(found.plan.predicted),
        "budget": _budget(found.budget),
        "objective": terms(found.objective),
        "groups": groups,
        "skipped": _skipped(found.coupling),
        "draws": _draws(found.scores, found.coupling, found.plan.keep),
        "importance": found.scores.method,
        "allocation": found.plan.allocation,
        "programs": [*found.scores.programs, *found.plan.programs],
        "notes": _distinct(
            [*found.model.notes, *found.scores.notes, *found.plan.notes, *found.notes]
        ),
        "timings": found.seconds,
        "settings": found.settings,
        "versions": versions(),
    }
    return plain_document(result)


def inspection(
    model: Model,
    coupling: Coupling,
    objective: Objective,
) -> Document:
    """Builds the JSON document of ``inspect``: removable groups, pinned channels with their reasons, and the terms.

    Args:
        model: The model.
        coupling: Its coupling.
        objective: Terms by which a pruned model is judged.

    Returns:
        A dict of plain values.
    """
    _, reasons = linear_streams.find(model, coupling)
    result = {
        "schema_version": SCHEMA_VERSION,
        "model": _model(model),
        "cost": _whole(model, coupling),
        "groups": [
            {
                "name": group.name,
                "units": len(group.units),
                "axes": [
                    {
                        "tensor": tensor,
                        "axis": axis,
                        "per_unit": held,
                        "constant": model.is_stored(tensor),
                    }
                    for (tensor, axis), held in group.multiplicity.items()
                ],
                "consumers": consumers,
                "fixed_basis": reasons.get(group.name),
            }
            for group, consumers in zip(coupling.groups, _consumers(coupling), strict=True)
        ],
        "skipped": _skipped(coupling),
        "folded": _folded(model, coupling),
        "objective": terms(objective),
        "notes": _distinct([*model.notes, *objective.notes]),
        "versions": versions(),
    }
    return plain_document(result)


def comparison(
    original: Model,
    pruned: Model,
    verification: Verification,
) -> Document:
    """Builds the JSON document of ``verify``.

    Args:
        original: The model before pruning.
        pruned: The model after it.
        verification: How the two compare.

    Returns:
        A dict of plain values.
    """
    sides = []
    for model in (original, pruned):
        # Costs at full width do not depend on the groups.
        no_groups = Coupling(0, (), np.zeros(0, np.int64), {}, (), ())
        sides.append({**_model(model), "cost": _whole(model, no_groups)})
    result = {
        "schema_version": SCHEMA_VERSION,
        "original": sides[0],
        "pruned": sides[1],
        "objective": terms(verification.objective),
        "verification": verified(verification),
        "notes": _distinct(verification.objective.notes),
        "versions": versions(),
    }
    return plain_document(result)


def recovered(found: Recovered) -> Document:
    """Converts the result of ``recover`` to its JSON document.

    Args:
        found: The result.

    Returns:
        A dict of plain values.
    """
    result = {
        "schema_version": SCHEMA_VERSION,
        "original": _model(found.original),
        "unrecovered": _model(found.pruned),
        "output": {"path": found.output, "sha256": found.output_sha256},
        "objective": terms(found.objective),
        "recovery": _recovery(found.recovery),
        "notes": _distinct([*found.original.notes, *found.notes]),
        "timings": found.timings,
        "settings": found.settings,
        "versions": versions(),
    }
    return plain_document(result)


def _recovery(found: Recovery) -> Document:
    before = {measure.term: measure for measure in found.outputs_before}
    return {
        "accepted": found.accepted,
        "before": found.before,
        "after": found.after,
        "steps": found.steps,
        "slowed": found.slowed,
        "best_step": found.best_step,
        "batch": found.batch,
        "held_bytes": found.held_bytes,
        "seconds": found.seconds,
        "ended": found.ended,
        "samples": found.samples,
        "held_out": found.held_out,
        "repeated": found.repeated,
        "augment": found.augment,
        "device": found.device,
        "weights": found.weights,
        "features": list(found.features),
        "features_left_out": dict(found.features_left_out),
        "left_out": list(found.left_out),
        "curve": [{"step": step, "loss": loss} for step, loss in found.curve],
        "outputs": [
            {**_measure(measure), "before_recovery": _measure(before[measure.term])}
            for measure in found.outputs
        ],
    }


def checkpoint(found: Checkpoint) -> Document:
    """Converts the result of ``checkpoint`` to its JSON document: every tensor of the state dict with its shapes.

    Args:
        found: The result.

    Returns:
        A dict of plain values.
    """
    result = {
        "schema_version": SCHEMA_VERSION,
        "output": {"path": found.output, "sha256": found.sha256},
        "tensors": [
            {"name": t.name, "weight": t.weight, "before": list(t.before), "after": list(t.after)}
            for t in found.tensors
        ],
        "unmatched": found.unmatched,
        "versions": versions(),
    }
    return plain_document(result)


def operators() -> Document:
    """Builds the JSON document of ``ops``: every operator whose channels can be followed.

    Returns:
        A dict of plain values.
    """
    result = {
        "schema_version": SCHEMA_VERSION,
        "operators": [
            {
                "name": spec.name,
                "domain": spec.domain,
                "since": spec.since,
                "until": spec.until,
                "macs": spec.cost is not None,
                "refit": spec.linear is not None,
                "repair": spec.edit.repair is not None,
            }
            for spec in sorted(REGISTRY, key=lambda s: (s.domain, s.name.lower(), s.since))
        ],
        "versions": versions(),
    }
    return plain_document(result)


def solvers(found: Sequence[SolverRecord]) -> Document:
    """Builds the JSON document of ``solvers``.

    Args:
        found: The solvers on this machine.

    Returns:
        A dict of plain values; a null limit means any size.
    """
    result = {
        "schema_version": SCHEMA_VERSION,
        "solvers": [
            {
                "name": solver.name,
                "installed": solver.installed,
                "usable": solver.usable,
                "version": solver.version,
                "licence": solver.licence,
                "variables": solver.variables,
                "rows": solver.rows,
            }
            for solver in found
        ],
        "versions": versions(),
    }
    return plain_document(result)


def benchmark(found: Benchmark) -> Document:
    """Converts the result of ``bench`` to its JSON document: the timings of every model, one per batch size.

    Args:
        found: The result.

    Returns:
        A dict of plain values.
    """
    result = {
        "schema_version": SCHEMA_VERSION,
        "device": found.device,
        "threads": found.threads,
        "batch": list(found.timings),
        "seconds": found.seconds,
        "data": found.source,
        "models": [
            {
                "path": model.path,
                "sha256": model.sha256,
                "bytes": model.file_bytes,
                "timings": [
                    {"batch": batch, **_timing(timings[i])}
                    for batch, timings in found.timings.items()
                ],
            }
            for i, model in enumerate(found.models)
        ],
        "versions": versions(),
    }
    return plain_document(result)


def dumps(value: Document) -> str:
    """Serialises a document.

    Args:
        value: The document.

    Returns:
        Strict JSON, indented.
    """
    return json.dumps(value, indent=2, allow_nan=False)


def _model(model: Model) -> Document:
    return {
        "path": model.path,
        "sha256": model.sha256,
        "inputs": [_port(p) for p in model.inputs],
        "outputs": [_port(p) for p in model.outputs],
        "opset": {o.domain or "ai.onnx": o.version for o in model.proto.opset_import},
        "bindings": model.bindings,
        "assumed": list(model.assumed),
        "uncounted": [_uncounted(record) for record in uncounted(model)],
    }


def _uncounted(record: Uncounted) -> Document:
    return {"operator": record.operator, "reason": record.reason, "nodes": list(record.nodes)}


def _port(port: Port) -> Document:
    return {"name": port.name, "dtype": port.dtype.name, "dims": list(port.dims)}


def _budget(budget: Budget) -> Document:
    return asdict(budget)


def _cost(cost: Cost) -> Document:
    return budgets.costs(cost)


def _whole(model: Model, coupling: Coupling) -> Document:
    """Cost of the whole model; the bytes are those of its file, not of the normalised graph."""
    cost = ledger(model, coupling).cost(full_widths(coupling))
    return {**_cost(cost), "bytes": model.file_bytes}


def _summary(values: Floats) -> Document:
    if not len(values):
        return {"min": None, "mean": None, "max": None}
    # A unit ranked directly below another may differ from it by the smallest number that a float can hold.
    normal = np.where(np.abs(values) < np.finfo(np.float64).tiny, 0.0, values)
    return {"min": normal.min(), "mean": normal.mean(), "max": normal.max()}


def _folded(model: Model, coupling: Coupling) -> Document:
    """Names of the initialisers in the file, by the name of a weight that was computed from them on loading."""
    grouped = [tensor for group in coupling.groups for tensor, _ in group.multiplicity]
    weights = dict.fromkeys([*grouped, *(pinned.tensor for pinned in coupling.pinned)])
    names = {name: list(model.file_names(name)) for name in weights if name in model.folded}
    return {name: of for name, of in names.items() if of != [name]}


def _skipped(coupling: Coupling) -> list[Document]:
    return [
        {"tensor": p.tensor, "axis": p.axis, "channels": p.count, "reason": p.reason}
        for p in coupling.pinned
    ]


def _consumers(coupling: Coupling) -> list[list[str]]:
    """Names of the nodes that sum over the channels of each group, in graph order."""
    names: list[dict[str, None]] = [{} for _ in coupling.groups]
    for consumer in (*coupling.consumers, *coupling.inside):
        units = coupling.axes[consumer.data, consumer.axis]
        for group in np.unique(coupling.unit_group[units[units >= 0]]).tolist():
            names[group].setdefault(consumer.node)
    return [list(by_group) for by_group in names]


def verified(found: Verification) -> Document:
    """Converts a verification to its part of a document.

    Args:
        found: The verification.

    Returns:
        A dict of values.
    """
    return {
        "masked_equivalence": found.masked_equivalence,
        "rounding": found.rounding,
        "output_relative_error": found.output_relative_error,
        "agreement": found.agreement,
        "agreement_of": found.agreement_of,
        "accuracy_before": found.accuracy_before,
        "accuracy_after": found.accuracy_after,
        "latency_ratio": found.latency_ratio,
        "latency": found.latency and asdict(found.latency),
        "outputs": _measures(found),
        "metric": _metric(found.metric),
        "batches": found.batches,
        "samples": found.samples,
        "failures": found.failures,
    }


def _measures(verification: Verification) -> list[Document]:
    """One entry for every term of the objective, the worst first, with its numbers before the refit."""
    raw = {measure.term: measure for measure in verification.outputs_before_refit}
    return [
        {
            **_measure(measure),
            "before_refit": _measure(raw[measure.term]) if measure.term in raw else None,
        }
        for measure in verification.outputs
    ]


def _measure(measure: Measure) -> Document:
    classes = [
        {"class": number, "share": share, "recall": recall}
        for number, share, recall in measure.classes
    ]
    return {
        "term": measure.term,
        "output": measure.output,
        "kind": measure.kind,
        "measure": measure.measure,
        "lost": measure.lost,
        "values": measure.values,
        "classes": classes,
        "columns": measure.columns,
        "warnings": measure.warnings,
    }


def _metric(found: MetricValues | None) -> Document | None:
    if found is None:
        return None
    return {
        "name": found.name,
        "before": found.before,
        "after": found.after,
        "lost": found.lost,
    }


def frontier_point(point: Point, before: Cost) -> Document:
    """Converts one point of a frontier to its part of a document.

    Args:
        point: The point.
        before: Cost of the original.

    Returns:
        A dict of values; those that were not measured are None.
    """
    whole = _cost(before)
    if point.cost is None:
        after = dict.fromkeys(whole)
    else:
        after = _cost(point.cost)
    shares: Document = dict.fromkeys(whole)
    for key, value in after.items():
        if value is not None and whole[key]:
            shares[key] = value / whole[key]
    proved = point.verification
    return {
        "asked": point.asked,
        **after,
        "shares": shares,
        "accuracy": proved and proved.accuracy_after,
        "agreement": proved and proved.agreement,
        "output_relative_error": proved and proved.output_relative_error,
        "latency_ratio": proved and proved.latency_ratio,
        "latency": proved and proved.latency and asdict(proved.latency),
        "outputs": proved and _measures(proved),
        "metric": proved and _metric(proved.metric),
        "kept": point.widths,
        "output": point.output,
        "sha256": point.sha256,
        "reason": point.reason,
    }


def _connections(found: Connections) -> Document:
    sizes = {
        "total": found.total,
        "kept": found.kept,
        "compression": found.total / max(found.kept, 1),
    }
    return {**sizes, **asdict(found)}


def _fit(fit: Fit) -> Document:
    return {
        "node": fit.node,
        "form": fit.form,
        "rows": fit.rows,
        "unknowns": fit.unknowns,
        "ridge": fit.ridge,
        "error_before": fit.error_before,
        "error_after": fit.error_after,
    }


def _timing(timing: Timing) -> Document:
    ratio = timing.ratio
    return {
        "p50_ms": timing.p50_ms,
        "p95_ms": timing.p95_ms,
        "mean_ms": timing.mean_ms,
        "throughput": timing.throughput,
        "runs": timing.runs,
        "peak_bytes": timing.peak_bytes,
        "ratio": {
            "median": ratio.median,
            "low": ratio.low,
            "high": ratio.high,
            "rounds": ratio.rounds,
        },
    }


def _distinct(notes: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(notes))
