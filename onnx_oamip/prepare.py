"""Everything up to the plan: what does not depend on the budget and can serve many of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache as once
from itertools import islice
from typing import Any

import numpy as np

from . import (
    allocation,
    artefacts,
    cache,
    calibrate,
    connections,
    cost,
    data,
    executors,
    images,
    iterations,
    limits,
    scoring,
    search,
    sensitivity,
)
from . import model as models
from .coupling import couple, exclude
from .data import Samples
from .errors import BudgetNotMet, DataError, GateFailed, SettingsError
from .importance import Method, find
from .ops import lookup
from .records import Array, Budget, Coupling, Model, Scores, Sensitivity, Statistics
from .runtime import UNFUSED, Session, resolve_device
from .search import Prepared, Subject
from .settings import Settings
from .subgraph import run_size

Source = str | os.PathLike[str] | Mapping[str, Array]
BUDGETS = {"macs", "params", "size", "threshold", "latency", "max_drop"}
ARRAYS = "(arrays)"
READING = {
    "image_size", "image_fit", "image_scale", "image_mean", "image_std", "image_layout", "image_color", "samples",
    "column",
}  # fmt: skip
_ELSEWHERE = BUDGETS | READING | {
    "allocate", "align", "floor", "limits", "protect", "force", "strict", "workers", "scheduler", "cache", "exclude",
    "batch_size", "max_memory", "no_provenance",
}  # fmt: skip
"""Settings that no score and no measured loss depends on, or that are told otherwise."""


class Clock:
    """Seconds by stage. A stage within another one counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._book()
        self._open.append(stage)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def _book(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


def prepare(
    path: str | os.PathLike[str],
    source: Source | None,
    settings: Settings,
    eval_data: Source | None = None,
    progress: calibrate.Progress | None = None,
    clock: Clock | None = None,
    scores: str | os.PathLike[str] | None = None,
) -> Prepared:
    """Model, coupling, scores and measured losses: all that a plan is made from.

    What an earlier run found out is taken from the cache. Raises OamipError for bad input.
    """
    clock = clock or Clock()
    method = check(settings, source, scores is not None)
    device = resolve_device(settings.device)
    executors.check(settings.scheduler, device)
    store = cache.open_store(settings.cache)
    model, coupling, samples, held = load(path, source, eval_data, settings, clock)
    given = None
    if scores is not None:
        given = artefacts.load_scores(scores, model, coupling)
        method, settings = _scored_by(given, settings, source)
    ledger = cost.ledger(model, coupling)
    before = replace(ledger.cost(cost.full_widths(coupling)), bytes=model.file_bytes)
    known = _known(model, samples, settings, device) if source is not None else {}

    @once
    def statistics() -> Statistics:
        assert source is not None
        grams = iterations.programmed(settings) or (given is None and method.needs_grams)
        with clock("calibrate"):
            return scoring.statistics(model, coupling, samples, device, settings, grams, progress, store, known)

    @once
    def pooled() -> Statistics:
        whole = statistics()
        with clock("calibrate"):
            return scoring.pool(whole, model, coupling, samples, device, settings, progress)

    with clock("score"):
        needed = (pooled if method.needs_pooled else statistics) if method.needs_data else lambda: None
        found = given or _scores(store, known, model, coupling, needed, samples, device, settings, method, progress)
    with clock("limits"):
        seen = pooled() if settings.limits != "none" else None
        bounds = limits.bound(model, coupling, seen, found, settings)
        found = bounds.scores
    with clock("sensitivity"):
        wide = cost.full_widths(coupling)
        steps = store.keep(
            cache.STEPS,
            {"model": model.sha256, "align": settings.align, "device": device, "exclude": settings.exclude},
            lambda: allocation.steps(model, coupling, settings.align, device),
            lambda found: found.dtype == np.int64 and found.shape == wide.shape and bool((found > 0).all()),
        )
        ladder = None
        losses: tuple[Sensitivity, ...] = ()
        if iterations.programmed(settings):
            order = scoring.order(found, coupling)
            batch = run_size(model, settings.room)
            feeds = [feed for _, feed in scoring.parts(samples)[1].batches(batch)]
            losses = store.keep(
                cache.LOSSES,
                {**known, "order": order.tolist(), "refit": settings.refit},
                lambda: sensitivity.measure(
                    model, coupling, statistics().grams, order, feeds, device, scoring.workers(model, settings),
                    progress, settings.refit, settings.scheduler,
                ),
                lambda found: sensitivity.fits(found, wide),
            )  # fmt: skip
            ladder = search.rungs(coupling, losses, steps, bounds.floor)
    # What else is asked of the statistics depends on the refit alone.
    moments = statistics() if source is not None and settings.refit == "bias" else None
    return Prepared(
        model, coupling, ledger, before, samples, held, moments, device, settings, store, known, found, bounds.floor,
        steps, ladder, losses,
    )  # fmt: skip


def subject(
    path: str | os.PathLike[str],
    source: Source | None,
    settings: Settings,
    eval_data: Source | None,
    progress: calibrate.Progress | None,
    clock: Clock,
) -> Subject:
    """A model and its data for a plan that is already made. Raises OamipError for bad input."""
    if source is None and settings.refit != "none":
        raise DataError(f"--refit {settings.refit} needs calibration data; give --data, or --refit none.")
    device = resolve_device(settings.device)
    store = cache.open_store(settings.cache)
    model, coupling, samples, held = load(path, source, eval_data, settings, clock)
    if source is None and search.folds_constants(settings):
        raise DataError(f"what units removed by {settings.importance} leave behind is found by running; give --data.")
    ledger = cost.ledger(model, coupling)
    before = replace(ledger.cost(cost.full_widths(coupling)), bytes=model.file_bytes)
    moments = None
    known = _known(model, samples, settings, device) if source is not None else {}
    if settings.refit == "bias":
        with clock("calibrate"):
            moments = scoring.statistics(model, coupling, samples, device, settings, False, progress, store, known)
    return Subject(model, coupling, ledger, before, samples, held, moments, device, settings, store, known)


def score(
    path: str | os.PathLike[str],
    source: Source | None,
    settings: Settings,
    progress: calibrate.Progress | None,
    clock: Clock,
) -> tuple[Model, Coupling, Scores, Samples, Samples | None, str]:
    """(model, coupling, scores, calibration samples, evaluation samples, device): :func:`prepare` up to the scores."""
    method = named(settings)
    if source is None and method.needs_data:
        raise DataError(f"--importance {settings.importance} needs calibration data; give --data.")
    device = resolve_device(settings.device)
    executors.check(settings.scheduler, device)
    store = cache.open_store(settings.cache)
    model, coupling, samples, held = load(path, source, None, settings, clock)
    known = _known(model, samples, settings, device) if source is not None else {}

    def statistics() -> Statistics | None:
        if not method.needs_data:
            return None
        with clock("calibrate"):
            whole = scoring.statistics(
                model, coupling, samples, device, settings, method.needs_grams, progress, store, known
            )
            if not method.needs_pooled:
                return whole
            return scoring.pool(whole, model, coupling, samples, device, settings, progress)

    with clock("score"):
        found = _scores(store, known, model, coupling, statistics, samples, device, settings, method, progress)
    return model, coupling, found, samples, held, device


def _scores(
    store: cache.Store,
    known: Mapping[str, Any],
    model: Model,
    coupling: Coupling,
    statistics: Any,
    samples: Samples,
    device: str,
    settings: Settings,
    method: Method,
    progress: calibrate.Progress | None,
) -> Scores:
    def make() -> Scores:
        return scoring.scores(model, coupling, statistics(), samples, device, settings, method, progress)

    # Looking at weights alone costs less than looking up, and code from elsewhere may have changed.
    if not method.needs_data or not str(getattr(method.score, "__module__", "")).startswith(f"{__package__}."):
        return make()
    depends = {**settings.model_dump(mode="json", exclude=_ELSEWHERE), **known}
    return store.keep(cache.SCORES, depends, make, lambda found: scoring.fits(found, coupling))


def _known(model: Model, samples: Samples, settings: Settings, device: str) -> dict[str, Any]:
    """What every statistic depends on."""
    return {
        **cache.identity(model, samples),
        "exclude": settings.exclude,
        "device": device,
        "seed": settings.seed,
        "max_memory": settings.max_memory,
    }


def called(source: Source | None) -> str | None:
    """What a source is called in reports: its path, or ``ARRAYS`` for arrays in memory."""
    return source if source is None else ARRAYS if isinstance(source, Mapping) else os.fspath(source)


def named(settings: Settings) -> Method:
    """The importance method that was asked for. Raises SettingsError where there is none of that name."""
    return find(settings.importance)


def check(settings: Settings, source: Source | None, scored: bool = False) -> Method:
    """Settings that contradict each other or the data, before any work; ``scored``: there are scores already."""
    method = named(settings)
    if settings.granularity == "connection":
        connections.check(settings, scored)
    elif settings.budget == Budget() and settings.alpha is None:
        raise SettingsError(
            "nothing says how much to keep; give --macs, --params, --size, --latency, --max-drop or --threshold."
        )
    iterations.check(settings, scored)
    if settings.limits == "snacs":
        limits.check()
    if settings.latency is not None and settings.allocate != "mip":
        raise SettingsError(f"--latency needs --allocate mip, not {settings.allocate}: only the program knows times.")
    if source is None:
        asks = {
            f"--importance {settings.importance}": method.needs_data and not scored,
            f"--allocate {settings.allocate}": iterations.programmed(settings),
            "--max-drop": settings.max_drop is not None,
            "--latency": settings.latency is not None,
            f"--limits {settings.limits}": settings.limits != "none",
            f"--refit {settings.refit}": settings.refit != "none",
        }
        for what, needed in asks.items():
            if needed:
                raise DataError(
                    f"{what} needs calibration data; give --data, or use --importance l2 --allocate uniform "
                    "--refit none."
                )
    return method


def load(
    path: str | os.PathLike[str], source: Source | None, eval_data: Source | None, settings: Settings, clock: Clock
) -> tuple[Model, Coupling, Samples, Samples | None]:
    """The model at the data's shapes, what goes together in it, and (calibration, evaluation) samples."""
    data.check(source, eval_data)
    with clock("load"):
        model = models.load(path)
        samples, held = samples_of(model, source, eval_data, settings)
        model = models.rebind(model, samples.bindings(model))
        for part in (samples, held):
            if part is not None:
                images.check_labels(model, part)
        # What does not run cannot be proved: say so before the work.
        session = Session(model.proto, "cpu", what=model.path)
        for _, feed in islice(samples.batches(settings.batch_size), None if source is None else 1):
            session.run(feed)
        if session.unfused:
            model = replace(model, notes=(*model.notes, UNFUSED))
    with clock("couple"):
        coupling = exclude(model, couple(model), settings.exclude)
        if settings.granularity == "unit":
            _something_free(model, coupling)
            if settings.strict:
                _nothing_skipped(model, coupling)
    return model, coupling, samples, held


def _scored_by(given: Scores, settings: Settings, source: Source | None) -> tuple[Method, Settings]:
    """The method that made given scores, and the settings as if it had been asked for."""
    settings = settings.model_copy(update={"importance": given.method})
    method = named(settings)
    if source is None and search.folds_constants(settings):
        raise DataError(
            f"what units removed by {given.method} leave behind is found by running the model; give --data."
        )
    return method, settings


def samples_of(
    model: Model, source: Source | None, eval_data: Source | None, settings: Settings
) -> tuple[Samples, Samples | None]:
    """(calibration, evaluation). Without data: a few random feeds for the exactness proof and nothing else."""
    reading = settings.reading
    held = data.load(eval_data, model, reading=reading) if eval_data is not None else None
    if source is None:
        return held or data.placeholder(model, settings.seed), held
    samples = data.load(source, model, reading=reading)
    assert samples is not None
    if held is None:
        held = data.load(source, model, data.EVALUATION, reading)
    if held is None:
        return data.hold_out(samples, settings.seed)
    return samples, held


def _nothing_skipped(model: Model, coupling: Coupling) -> None:
    """Raises GateFailed where channels of a layer stay for another reason than the model's inputs and outputs."""
    layers: set[str] = set()
    for node in model.every:
        spec = lookup(node.domain, node.op, node.version)
        if spec is None or spec.cost is not None:  # nobody knows what is a layer to an operator that is not known
            layers.update(node.inputs)
    found = {p.tensor: p.reason for p in coupling.pinned if not p.given and p.tensor in layers}
    if found:
        listed = [f"'{name}', because {reason}" for name, reason in found.items()]
        raise GateFailed(
            f"--strict: channels of {len(found)} layers cannot be removed: {'; '.join(listed[:3])}"
            f"{'; ...' if len(listed) > 3 else ''}. Leave out --strict, or name them with --exclude."
        )


def _something_free(model: Model, coupling: Coupling) -> None:
    if not coupling.n_units:
        reasons = sorted((p.reason for p in coupling.pinned), key=lambda r: not r.startswith("--exclude"))
        why = f", for example because {reasons[0]}" if reasons else ": it has no weights"
        raise BudgetNotMet(f"no channel of {model.path} can be removed{why}; see 'onnx-oamip inspect'.")
