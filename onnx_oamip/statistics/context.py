"""Context of a run: the loaded model with its samples, settings and resources."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar, cast

from onnx_oamip.artifacts.cache import Store
from onnx_oamip.core.clock import Clock
from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.foreign_code import foreign_code, is_own
from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import (
    Cost,
    Coupling,
    Ints,
    Model,
    Objective,
    Request,
    Whole,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.data.dataset import Samples
from onnx_oamip.data.feeds import comparison_size, parallel_runs, run_size
from onnx_oamip.graph import cost
from onnx_oamip.graph.linear_streams import Basis, Stream
from onnx_oamip.objective.metric import Metric

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Rotation:
    """Streams of a model that are expressed in another basis.

    Attributes:
        original: The model in the basis of its file.
        bases: The streams, each with its basis.
        distance: Largest difference of an output from the original's, as a share of its scale.
    """

    original: Model
    bases: tuple[tuple[Stream, Basis], ...]
    distance: float


@dataclass(frozen=True, eq=False)
class Factoring:
    """Layers of a model that are written as two.

    Attributes:
        original: The model with these layers as in its file.
        before: Its cost.
        groups: Names of the groups whose units are the ranks of these layers.
        most: Widest width that a plan may choose (groups,): for ranks, that at which two layers cost less than one.
    """

    original: Model
    before: Cost
    groups: tuple[str, ...]
    most: Ints


@dataclass(frozen=True, eq=False)
class Context:
    """A loaded model with its samples, settings and resources.

    Attributes:
        model: The model at the shapes of the samples.
        coupling: Its units, without those that are excluded.
        samples: Calibration samples; random ones where there is no data.
        held_out: Held-out samples, or None.
        judged: Samples that judge a recovery: those held out, or a part of the calibration samples where these are the
            user's own evaluation data; None without a recovery.
        trained: Samples that a recovery trains on: the calibration samples without those of ``judged``; None without
            a recovery.
        device: The device that inference runs on.
        settings: Settings of the run.
        objective: Terms by which a pruned model is judged; with their scales if there is data.
        metric: The user's own metric, or None.
        store: Cache of the results of earlier runs.
        cache_identity: Everything that the statistics depend on, as plain values: it identifies their cache entries.
            Empty without data.
        progress: Callback ``(stage, done, total)``, None for silence.
        clock: Seconds by stage.
        whole: The model of the file, where branches that all samples take stand in ``model``; else None.
        rotation: The streams of ``model`` in another basis than in the file, or None.
        factoring: The layers of ``model`` that are two in place of one in the file, or None.
        collected: Statistics that this run collected already (see ``collector.collect``).
    """

    model: Model
    coupling: Coupling
    samples: Samples
    held_out: Samples | None
    device: str
    settings: Settings
    objective: Objective
    judged: Samples | None = None
    trained: Samples | None = None
    metric: Metric | None = None
    store: Store = field(default_factory=Store)
    cache_identity: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress | None = None
    clock: Clock = field(default_factory=Clock)
    whole: Whole | None = None
    rotation: Rotation | None = None
    factoring: Factoring | None = None
    collected: Collected = field(default_factory=lambda: Collected())

    @cached_property
    def ledger(self) -> cost.Ledger:
        """Costs of the model at any widths of its groups."""
        return cost.ledger(self.model, self.coupling)

    @property
    def unfactored(self) -> Model:
        """The model with as many layers as in its file."""
        return self.model if self.factoring is None else self.factoring.original

    @property
    def widest(self) -> Ints:
        """Widest width of every group that a plan may choose (groups,)."""
        return cost.full_widths(self.coupling) if self.factoring is None else self.factoring.most

    @property
    def in_file(self) -> tuple[Model, Coupling]:
        """The model of the file and its units, which are those of ``coupling``."""
        if self.whole is None:
            return self.model, self.coupling
        return self.whole.model, self.whole.coupling

    @cached_property
    def before(self) -> Cost:
        """Cost of the whole model, with the bytes of its file."""
        if self.factoring is not None:
            return self.factoring.before
        whole = self.ledger.cost(cost.full_widths(self.coupling))
        return replace(whole, bytes=self.model.file_bytes)

    @property
    def without_judged(self) -> Context:
        """The context in which a model is refitted before a recovery: samples that judge it are no calibration samples.

        It is the same context where they are held out from all stages.
        """
        if self.trained is None or self.trained is self.samples:
            return self
        identity = {**self.cache_identity, "samples of": "recovery"}
        return replace(self, samples=self.trained, cache_identity=identity)

    @property
    def batch(self) -> int:
        """Samples in one inference run of a stage that collects or measures."""
        return run_size(self.model, self.settings.activation_memory_limit)

    @property
    def comparison_batch(self) -> int:
        """Samples in one run of models that are compared: ``batch_size``, or fewer where the activations are large."""
        settings = self.settings
        return comparison_size(self.model, settings.batch_size, settings.activation_memory_limit)

    @property
    def workers(self) -> int | None:
        """Threads that run parts of the model at the same time, bounded by the activations in memory."""
        if self.settings.max_memory is None:
            return self.settings.workers
        requested = self.settings.workers or os.cpu_count() or 1
        return min(requested, parallel_runs(self.model, self.settings.activation_memory_limit))


class Collected:
    """Statistics collected in this run, each with the context that it belongs to."""

    def __init__(self) -> None:
        self._entries: dict[Request[Any], tuple[Context, Any]] = {}

    def get(self, request: Request[T], context: Context) -> T:
        """Answer a request, or return the answer given before for this model, samples and settings.

        Args:
            request: The request.
            context: The context that the statistic is collected from.

        Returns:
            The statistic.

        Raises:
            SettingsError: An earlier request of this name has another collector.
        """
        self._check_name(request)
        entry = self._entries.get(request)
        if entry is None or not _interchangeable(entry[0], context):
            entry = context, _collected(request, context)
            self._entries[request] = entry
        return cast("T", entry[1])

    def forget(self, but: Collection[Request[Any]]) -> None:
        """Free the memory of all answers except those to some requests.

        Args:
            but: The requests whose answers are kept.
        """
        self._entries = {
            request: entry for request, entry in self._entries.items() if request in but
        }

    def _check_name(self, request: Request[Any]) -> None:
        for earlier in self._entries:
            if earlier == request and earlier.collect is not request.collect:
                raise SettingsError(
                    f"two different statistics are named '{request.name}'; rename one of the two requests."
                )


def _collected(request: Request[T], context: Context) -> T:
    """Answer to a request; an exception of a collector of another package is reported as that of the statistic."""
    if is_own(request.collect):
        return request.collect(context)
    advice = "correct its collector, or choose another `importance`"
    with foreign_code(f"the statistic '{request.name}'", SettingsError, advice):
        return request.collect(context)


def _interchangeable(one: Context, other: Context) -> bool:
    """True if both contexts have the same statistics, which do not depend on the budget."""
    for name in ("model", "coupling", "samples"):
        if getattr(one, name) is not getattr(other, name):
            return False
    same_device = one.device == other.device
    return same_device and one.settings.without_budget == other.settings.without_budget
