"""Results in memory, and the files that are written from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_oamip.artifacts import keep_maps
from onnx_oamip.artifacts.output import (
    FileTargets,
    Page,
    Written,
    check_not_larger,
    check_output,
    stage,
)
from onnx_oamip.artifacts.plan_files import Planned
from onnx_oamip.artifacts.shipped_sizes import zipped_file, zipped_model
from onnx_oamip.core.atomic_files import Batch
from onnx_oamip.core.clock import Clock
from onnx_oamip.core.notebook import tables
from onnx_oamip.core.records import Coupling, Model, Objective, Report, Scores
from onnx_oamip.data.sources import File
from onnx_oamip.graph import default_inputs, external_data
from onnx_oamip.graph.loading import IN_MEMORY
from onnx_oamip.reporting import documents
from onnx_oamip.verification.equivalence import judged


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """Result of ``prune`` or ``apply`` in memory; nothing was written.

    Attributes:
        model: The pruned model.
        report: What was removed, what could not be removed and why, and what it cost.
    """

    model: onnx.ModelProto
    report: Report

    @property
    def plan(self) -> Planned:
        """The plan behind the result, which ``apply`` takes and ``Planned.save`` writes."""
        report = self.report
        scores = report.scores
        if scores is None:  # of a plan that was applied
            unknown = np.full(report.coupling.n_units, np.nan)
            scores = Scores(str(report.settings["importance"]), unknown)
        return Planned(
            model=report.model,
            coupling=report.coupling,
            scores=scores,
            plan=report.plan,
            before=report.before,
            budget=report.budget,
            output=None,
            sha256=None,
            seconds=report.timings,
            settings=report.settings,
            notes=tuple(report.notes),
            objective=report.objective,
        )

    @property
    def document(self) -> dict[str, Any]:
        """The report as the JSON document of ``--json``."""
        return documents.document(self.report)

    def save(
        self,
        path: File,
        *,
        keep_map: File | None = None,
        page: File | None = None,
    ) -> Report:
        """Write the model, and files beside it if they are named: all of them or none.

        Args:
            path: File of the model.
            keep_map: File for the kept indices of every weight, which the command ``checkpoint`` reads.
            page: File for the report as an HTML page.

        Returns:
            The report, with the file and its digest.

        Raises:
            OutputError: A file cannot be written, or the model would overwrite its original.
            EnvironmentMissing: The page needs a package that is not installed.
        """
        original = self.report.model.path
        written = (path, keep_map)
        targets = FileTargets(
            check_output(original, path),
            None if keep_map is None else check_output(original, keep_map, others=(path,)),
            None if page is None else _ReportPage(check_output(original, page, others=written)),
        )
        return write(self, targets, Clock())

    def __repr__(self) -> str:
        return repr(self.report).replace("<Report ", "<Result ", 1).replace(" -> None", "", 1)

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


@dataclass(frozen=True, eq=False, repr=False)
class Inspection:
    """Result of ``inspect``.

    Attributes:
        model: The model.
        coupling: Its units, and the channels that cannot be removed with their reasons.
        objective: Terms by which a pruned model is judged.
    """

    model: Model
    coupling: Coupling
    objective: Objective = field(default_factory=Objective)

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document of the command ``inspect``.

        Raises:
            ModelError: The cost of a node cannot be counted, and the model does not run.
        """
        with judged(self.model):
            return documents.inspection(self.model, self.coupling, self.objective)

    def __repr__(self) -> str:
        coupling = self.coupling
        return (
            f"<Inspection {self.model.path}: {coupling.n_units:,} units in {len(coupling.groups)} groups can be "
            f"removed, {len(coupling.pinned)} axes cannot>"
        )

    def _repr_html_(self) -> str:
        coupling = self.coupling
        pinned = [(p.tensor, p.axis, p.count, p.reason) for p in coupling.pinned]
        return tables(
            repr(self).strip("<>"),
            ([(g.name, len(g.units)) for g in coupling.groups], ("group", "units")),
            (pinned, ("tensor", "axis", "channels", "cannot be removed, because")),
        )


@dataclass
class _ReportPage:
    """The page of a report (``Page``)."""

    path: Path

    def draw(self, report: Report) -> bytes:
        """Render the page.

        Args:
            report: Report of the run.

        Returns:
            The HTML file.
        """
        from onnx_oamip.reporting import html  # needs the extra `report`

        return html.prune_page(report)


def finished(report: Report, proto: onnx.ModelProto) -> Result:
    """Give a pruned model the inputs of its original, and a result its size.

    Args:
        report: Report of the run.
        proto: The pruned model.

    Returns:
        The result.

    Raises:
        OutputError: The pruned model is larger than its original.
    """
    proto, notes = default_inputs.reopen(proto, report.model)
    size = external_data.size(proto)
    # Removed connections are stored as zeros: their file is as large as the original.
    narrower = not report.plan.keep.all() and report.settings["granularity"] == "unit"
    if narrower and not report.settings["force"]:
        check_not_larger(report.model, proto, size)
    after = replace(report.after, bytes=size)
    original = report.model.path
    zipped = None if original == IN_MEMORY else zipped_file(original)
    result = replace(
        report,
        after=after,
        notes=(*report.notes, *notes),
        zip_bytes=(zipped, zipped_model(proto)),
    )
    return Result(proto, result)


def write(result: Result, targets: FileTargets, clock: Clock) -> Report:
    """Write what was asked for, all of it or nothing.

    Args:
        result: A result in memory.
        targets: Files to write.
        clock: Receives the seconds of writing.

    Returns:
        The report, with what was written.

    Raises:
        OutputError: A file cannot be written; existing files are unchanged.
    """
    report = result.report
    with Batch() as batch:
        written: Written | None = None
        with clock("write"):
            if targets.keep_map is not None:
                content = keep_maps.keep_map(report.model, report.coupling, report.plan.keep)
                batch.add(targets.keep_map, content)
            if targets.model is not None:
                written = stage(batch, result.model, targets.model)
                report = replace(
                    report,
                    output=str(targets.model),
                    output_sha256=written.sha256,
                    after=replace(report.after, bytes=written.bytes),
                )
        if targets.page is not None:
            page: Page = targets.page
            batch.add(page.path, page.draw(report), first=True)
        with clock("write"):
            batch.commit()
            if written is not None:
                written.remove_stale()
    return _timed(report, clock.seconds)


def _timed(report: Report, seconds: Mapping[str, float]) -> Report:
    """The report with the seconds of writing."""
    return replace(report, timings={**report.timings, **seconds})
