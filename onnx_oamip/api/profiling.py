"""Latency tables of this device, for plans that are made on another machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_oamip.artifacts.output import check_output
from onnx_oamip.core.atomic_files import write_bytes
from onnx_oamip.core.errors import ModelError
from onnx_oamip.core.json_values import plain_document
from onnx_oamip.core.records import Coupling, Ints, Model
from onnx_oamip.core.settings import Settings
from onnx_oamip.core.versions import versions
from onnx_oamip.data import dataset
from onnx_oamip.data.sources import File, Source
from onnx_oamip.graph import op_libraries
from onnx_oamip.graph.coupling import couple, exclude
from onnx_oamip.graph.loading import ModelSource, load
from onnx_oamip.graph.runtime import resolve_device
from onnx_oamip.planning import latency_model, latency_tables
from onnx_oamip.planning.latency_model import LatencyModel
from onnx_oamip.verification.latency import find_step

CANDIDATES = 10
"""Widths of a group among which those to measure are chosen."""


@dataclass(frozen=True, eq=False)
class Profile:
    """Result of ``profile``.

    Attributes:
        model: The model.
        output: File of the table.
        device: Device that was measured.
        step: Multiple of channels that its kernels prefer.
        fitted: Latency model that a plan would take from the table.
    """

    model: Model
    output: str
    device: str
    step: int
    fitted: LatencyModel

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document of the command ``profile``."""
        fitted = self.fitted
        found = {
            "schema_version": 1,
            "model": {"path": self.model.path, "sha256": self.model.sha256},
            "output": {"path": self.output},
            "device": self.device,
            "step": self.step,
            "by_node": fitted.by_node,
            "largest_error": fitted.error,
            "levels": [
                {"milliseconds": 1e3 * measured, "fitted": 1e3 * predicted}
                for measured, predicted in zip(fitted.measured, fitted.fitted, strict=True)
            ],
            "versions": versions(),
        }
        return plain_document(found)


def profile(
    path: ModelSource,
    output: File,
    settings: Settings,
    source: Source | None = None,
    *,
    batch: int = 1,
    threads: int | None = None,
    seconds: float = 10.0,
) -> Profile:
    """Time a model at several widths, and write the latency table.

    Args:
        path: Model file, or a model in memory.
        output: File to write.
        settings: Device, seed, shapes and excluded groups.
        source: Samples to run on; random numbers if None.
        batch: Samples per run.
        threads: Threads within an operator. Default: the choice of ONNX Runtime.
        seconds: Approximate time of the measurement.

    Returns:
        The times, and how well the latency model fits them.

    Raises:
        OamipError: Bad input, or the model has no layer whose time could depend on widths. No file is written.
    """
    target = check_output(path, output, (source,))
    op_libraries.use(settings.op_library)
    device = resolve_device(settings.device)
    model = load(path, stated=settings.shapes)
    if source is None:
        samples = dataset.placeholder(model, settings.seed)
    else:
        loaded = dataset.load(source, model, reading=settings.reading)
        assert loaded is not None
        samples = loaded
        model = dataset.at_data(model, samples)
    coupling = exclude(model, couple(model), settings.exclude)
    if not coupling.groups:
        raise ModelError(
            f"no channel of {model.path} can be removed, so that no time depends on widths; see 'onnx-oamip inspect'."
        )
    measured = latency_model.measure(
        model,
        coupling,
        _candidates(coupling),
        samples,
        device=device,
        batch=batch,
        threads=threads,
        seconds=seconds,
        seed=settings.seed,
    )
    step = find_step(device).value
    text = latency_tables.dumps(
        model, coupling, measured, device=device, step=step, threads=threads, batch=batch
    )
    write_bytes(text.encode(), target)
    fitted = latency_model.fitted(model, coupling, measured)
    return Profile(model, str(target), device, step, fitted)


def _candidates(coupling: Coupling) -> list[Ints]:
    """Widths of every group, evenly spread up to all of its units."""
    shares = np.arange(1, CANDIDATES + 1) / CANDIDATES
    return [
        np.unique(np.maximum(np.round(shares * len(group.units)), 1).astype(np.int64))
        for group in coupling.groups
    ]
