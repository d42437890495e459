"""Context of a run: the loaded model with its samples, settings and resources, which every stage works on."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from onnx_oamip.artifacts.cache import Store
from onnx_oamip.core.clock import Clock
from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import (
    Cost,
    Coupling,
    Model,
    Request,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.data.dataset import Samples
from onnx_oamip.data.feeds import run_size, side_by_side
from onnx_oamip.graph import cost


@dataclass(frozen=True, eq=False)
class Context:
    """A loaded model with its samples, settings and resources.

    Attributes:
        model: The model at the shapes of the samples.
        coupling: Its units, without those that are excluded.
        samples: Calibration samples; random ones where there is no data.
        held: Held-out samples, None where there are none.
        device: The device that inference runs on.
        settings: What the run was asked to do.
        store: Cache of what earlier runs computed.
        known: What every statistic depends on, as plain values: the identity of cache entries. Empty without data.
        progress: Callback ``(stage, done, total)``, None for silence.
        clock: Seconds by stage.
        collected: Statistics that this run collected already (see ``collecting.collect``).
    """

    model: Model
    coupling: Coupling
    samples: Samples
    held: Samples | None
    device: str
    settings: Settings
    store: Store = field(default_factory=Store)
    known: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress | None = None
    clock: Clock = field(default_factory=Clock)
    collected: Collected = field(default_factory=lambda: Collected())

    @cached_property
    def ledger(self) -> cost.Ledger:
        """Costs of the model at any widths of its groups."""
        return cost.ledger(self.model, self.coupling)

    @cached_property
    def before(self) -> Cost:
        """Cost of the whole model, with the bytes of its file."""
        whole = self.ledger.cost(cost.full_widths(self.coupling))
        return replace(whole, bytes=self.model.file_bytes)

    @property
    def batch(self) -> int:
        """Samples in one inference run wherever something is collected or measured."""
        return run_size(self.model, self.settings.room)

    @property
    def workers(self) -> int | None:
        """Threads that run parts of the model at the same time: as asked, bounded by the activations they hold."""
        if self.settings.max_memory is None:
            return self.settings.workers
        return min(
            self.settings.workers or os.cpu_count() or 1,
            side_by_side(self.model, self.settings.room),
        )


class Collected:
    """Statistics collected in this run, each with the context that it belongs to."""

    def __init__(self) -> None:
        self._entries: dict[Request, tuple[Context, Any]] = {}

    def get(self, request: Request, context: Context, make: Callable[[Context], Any]) -> Any:
        """The answer to a request, made where there is none for this model, samples and settings."""
        entry = self._entries.get(request)
        if entry is None or not _interchangeable(entry[0], context):
            entry = context, make(context)
            self._entries[request] = entry
        return entry[1]

    def forget(self, but: Collection[Request]) -> None:
        """Free the memory of all answers except those to some requests."""
        self._entries = {
            request: entry for request, entry in self._entries.items() if request in but
        }


def _interchangeable(one: Context, other: Context) -> bool:
    """Statistics do not depend on the budget; everything else must be the same."""
    same = all(
        getattr(one, name) is getattr(other, name) for name in ("model", "coupling", "samples")
    )
    return (
        same
        and one.device == other.device
        and one.settings.without_budget == other.settings.without_budget
    )
