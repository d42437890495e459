"""Result of a recovery in memory, and the model file that is written from it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx

from onnx_oamip.artifacts import output
from onnx_oamip.core.notebook import tables
from onnx_oamip.core.records import Model, Objective, Recovery
from onnx_oamip.graph.loading import external_paths


@dataclass(frozen=True, repr=False)
class Recovered:
    """Result of ``recover``; ``reporting.documents.recovered`` converts it to JSON.

    Attributes:
        original: The teacher.
        pruned: The model before recovery.
        model: The model after recovery.
        output: File that was written, None for none.
        output_sha256: Its digest.
        recovery: How it was trained.
        objective: Terms of the loss.
        timings: Seconds by stage.
        settings: Options of the run.
        notes: Remarks.
    """

    original: Model
    pruned: Model
    model: onnx.ModelProto
    output: str | None
    output_sha256: str | None
    recovery: Recovery
    objective: Objective
    timings: Mapping[str, float]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def save(self, path: str | os.PathLike[str]) -> Recovered:
        """Write the model after recovery.

        Args:
            path: File to write, completely or not at all.

        Returns:
            The same result, with the file and its digest.

        Raises:
            OutputError: The file cannot be written, or is one of the two models that were read.
        """
        sources = (self.original.path, *external_paths(self.original.path))
        target = output.check_output(self.pruned.path, path, sources)
        sha256, _ = output.write(self.model, target)
        return replace(self, output=str(target), output_sha256=sha256)

    def __repr__(self) -> str:
        found = self.recovery
        after = "-" if found.after is None else f"{found.after:.4g}"
        taken = "taken" if found.accepted else "left as it was"
        return (
            f"<Recovered {self.pruned.path} -> {self.output}: loss {found.before:.4g} -> {after} in {found.steps:,} "
            f"steps, {taken}>"
        )

    def _repr_html_(self) -> str:
        found = self.recovery
        rows = [
            (before.term, before.measure, f"{before.lost:.2f}", f"{after.lost:.2f}")
            for before, after in zip(found.outputs_before, found.outputs, strict=True)
        ]
        header = ("output", "measure", "points lost before", "after")
        return tables(repr(self).strip("<>"), (rows, header))
