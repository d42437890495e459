"""prune(...) and its parts: the only place where the order of stages exists."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from . import artefacts, calibrate, cost, data, plan, rewrite, scoring, search, sensitivity, verify
from . import model as models
from .artefacts import Scored
from .coupling import couple, exclude
from .data import Samples
from .errors import BudgetNotMet, DataError, GateFailed, ModelError, SettingsError
from .importance import METHODS, Method
from .latency import compare_latency
from .output import check_output, write
from .records import Array, Budget, Cost, Coupling, Model, Report, Scores, Verification
from .runtime import Session, resolve_device
from .search import Attempt, Prepared
from .settings import Settings

Source = str | os.PathLike[str] | Mapping[str, Array]
PROOF_SAMPLES = 64
"""Samples on which pruned and masked are compared: exactness does not need more."""
GATE_SECONDS = (0.3, 2.0)
"""Time for the latency gate: a first look, and a longer one where that does not show the pruned model to be faster."""
SLOWER = 1.02
"""A pruned model is refused where even the optimistic end of its measured latency ratio is above this."""


def prune(
    path: str | os.PathLike[str],
    source: Source | None,
    output: str | os.PathLike[str] | None,
    settings: Settings,
    eval_data: Source | None = None,
    progress: calibrate.Progress | None = None,
    scores: str | os.PathLike[str] | None = None,
) -> Report:
    """Prune one model and write it if every gate holds.

    ``source`` is calibration data (see ``data``), ``output`` the file to write (None: nothing is written), ``scores``
    a file that :func:`score` wrote, taken in place of scores by ``settings.importance``. Raises OamipError: exit code
    2 for bad input, 1 for a budget or gate that was not met; then no file is written.
    """
    clock = Clock()
    _check(settings, source, scores is not None)
    target = None if output is None else check_output(path, output, (source, eval_data, scores))
    ready = prepare(path, source, settings, eval_data, progress, clock, scores)
    with clock("plan and refit"):
        result = search.search(ready, progress)
    with clock("verify"):
        _meets(settings.budget, ready.before, result.after)
        try:
            verification = _prove(ready, result, progress)
        except ModelError as error:  # the original ran before: what does not load or run here is what was made of it
            raise GateFailed(f"{str(error).rstrip('.')}; nothing was written, please report this model.") from error
    after = result.after
    sha256 = None
    if target is not None:
        with clock("write"):
            sha256, size = write(result.pruned.proto, target)
            after = replace(after, bytes=size)
    return Report(
        model=ready.model,
        output=None if target is None else str(target),
        output_sha256=sha256,
        before=ready.before,
        after=after,
        budget=settings.budget,
        coupling=ready.coupling,
        scores=ready.scores,
        plan=result.plan,
        verification=verification,
        timings=clock.seconds,
        settings={
            **ready.settings.model_dump(mode="json"),
            "device": ready.device,
            "scores": None if scores is None else str(scores),
            "steps": sorted(set(ready.steps.tolist())),
        },
        notes=(*ready.scores.notes, *result.plan.notes, *result.pruned.notes),
        fits=result.pruned.fits,
    )


def score(
    path: str | os.PathLike[str],
    source: Source | None,
    output: str | os.PathLike[str],
    settings: Settings,
    progress: calibrate.Progress | None = None,
) -> Scored:
    """Score every unit of one model by ``settings.importance`` and write the scores to ``output`` (see ``artefacts``).

    They are those that :func:`prune` would use: where ``source`` has no evaluation part, a fifth of it is held out.
    Raises OamipError (exit code 2) for bad input; then no file is written.
    """
    clock = Clock()
    method = _method(settings)
    if source is None and method.needs_data:
        raise DataError(f"--importance {settings.importance} needs calibration data; give --data.")
    target = check_output(path, output, (source,))
    device = resolve_device(settings.device)
    model, coupling, samples, held = _open(path, source, None, settings, clock)
    statistics = None
    if method.needs_data:
        with clock("calibrate"):
            statistics = scoring.statistics(model, coupling, samples, device, settings, method.needs_grams, progress)
    with clock("score"):
        found = scoring.scores(model, coupling, statistics, samples, device, settings, method, progress)
    used = samples.usable() if method.needs_data else 0
    asked = {**settings.model_dump(mode="json"), "device": device, "samples": used}
    with clock("write"):
        content = artefacts.save_scores(target, model, coupling, found, asked)
    notes: tuple[str, ...] = ()
    if used and held is not None and held.source == samples.source:
        notes = (f"scored on {used} samples; as in prune, {held.usable()} others are left for evaluation",)
    digest = hashlib.sha256(content).hexdigest()
    return Scored(model, coupling, found, str(target), digest, clock.seconds, asked, (*found.notes, *notes))


def prepare(
    path: str | os.PathLike[str],
    source: Source | None,
    settings: Settings,
    eval_data: Source | None = None,
    progress: calibrate.Progress | None = None,
    clock: Clock | None = None,
    scores: str | os.PathLike[str] | None = None,
) -> Prepared:
    """Everything up to the plan: what does not depend on the budget and can serve many of them."""
    clock = clock or Clock()
    method = _check(settings, source, scores is not None)
    device = resolve_device(settings.device)
    model, coupling, samples, held = _open(path, source, eval_data, settings, clock)
    given = None
    if scores is not None:
        given = artefacts.load_scores(scores, model, coupling)
        method, settings = _scored_by(given, settings, source)
    ledger = cost.ledger(model, coupling)
    before = replace(ledger.cost(cost.full_widths(coupling)), bytes=model.file_bytes)
    statistics = None
    if source is not None:
        grams = settings.allocate == "mip" or (given is None and method.needs_grams)
        with clock("calibrate"):
            statistics = scoring.statistics(model, coupling, samples, device, settings, grams, progress)
    with clock("score"):
        found = given or scoring.scores(model, coupling, statistics, samples, device, settings, method, progress)
    with clock("sensitivity"):
        steps = plan.steps(model, coupling, settings.align, device)
        ladder = None
        if settings.allocate == "mip":
            assert statistics is not None
            feeds = [feed for _, feed in scoring.parts(samples)[1].batches(settings.batch_size)]
            losses = sensitivity.measure(
                model, coupling, statistics.grams, scoring.order(found, coupling), feeds, device,
                settings.workers, progress, settings.refit,
            )  # fmt: skip
            ladder = search.rungs(coupling, losses, steps, settings.floor)
    return Prepared(
        model, coupling, ledger, before, samples, held, statistics, found, steps, ladder, device, settings
    )


def compare(
    original: str | os.PathLike[str],
    pruned: str | os.PathLike[str],
    source: Source,
    settings: Settings,
    progress: calibrate.Progress | None = None,
) -> Verification:
    """Check a pruned file against its original on data: checker, two batch sizes, error, agreement, accuracy."""
    device = resolve_device(settings.device)
    model, other = models.load(original), models.load(pruned)
    for ours, theirs, what in ((model.inputs, other.inputs, "inputs"), (model.outputs, other.outputs, "outputs")):
        if [(p.name, p.dtype) for p in ours] != [(p.name, p.dtype) for p in theirs]:
            names = [", ".join(p.name for p in ports) for ports in (ours, theirs)]
            raise GateFailed(f"the two models have different {what}: {names[0]} against {names[1]}.")
    samples = data.load(source, model, data.EVALUATION) or data.load(source, model)
    assert samples is not None
    model = models.rebind(model, samples.bindings(model))
    verify.structure(other.proto)
    after = Session(other.proto, device, what=str(pruned))
    batches = verify.runs_at(model, after, samples)
    before = Session(model.proto, device, what=str(original))
    found = verify.compare(model, before, after, samples, settings.batch_size, progress)
    return replace(found, batches=batches)


def _method(settings: Settings) -> Method:
    method = METHODS.get(settings.importance)
    if method is None:
        raise SettingsError(f"--importance '{settings.importance}' is unknown; choose one of {', '.join(METHODS)}.")
    return method


def _check(settings: Settings, source: Source | None, scored: bool = False) -> Method:
    """Settings that contradict each other or the data, before any work; ``scored``: there are scores already."""
    method = _method(settings)
    if settings.budget == Budget():
        raise SettingsError(
            "nothing says how much to keep; give --macs, --params, --size, --latency, --max-drop or --threshold."
        )
    if settings.latency is not None and settings.allocate != "mip":
        raise SettingsError(f"--latency needs --allocate mip, not {settings.allocate}: only the program knows times.")
    if source is None:
        asks = {
            f"--importance {settings.importance}": method.needs_data and not scored,
            f"--allocate {settings.allocate}": settings.allocate == "mip",
            "--max-drop": settings.max_drop is not None,
            "--latency": settings.latency is not None,
            f"--refit {settings.refit}": settings.refit != "none",
        }
        for what, needed in asks.items():
            if needed:
                raise DataError(
                    f"{what} needs calibration data; give --data, or use --importance l2 --allocate uniform "
                    "--refit none."
                )
    return method


def _scored_by(given: Scores, settings: Settings, source: Source | None) -> tuple[Method, Settings]:
    """The method that made given scores, and the settings as if it had been asked for."""
    settings = settings.model_copy(update={"importance": given.method})
    method = _method(settings)
    if source is None and search.folds_constants(settings):
        raise DataError(
            f"what units removed by {given.method} leave behind is found by running the model; give --data."
        )
    return method, settings


def _open(
    path: str | os.PathLike[str], source: Source | None, eval_data: Source | None, settings: Settings, clock: Clock
) -> tuple[Model, Coupling, Samples, Samples | None]:
    """The model at the data's shapes, what goes together in it, and (calibration, evaluation) samples."""
    with clock("load"):
        model = models.load(path)
        samples, held = _samples(model, source, eval_data, settings.seed)
        model = models.rebind(model, samples.bindings(model))
    with clock("couple"):
        coupling = exclude(model, couple(model), settings.exclude)
        _something_free(model, coupling)
    return model, coupling, samples, held


def _samples(
    model: Model, source: Source | None, eval_data: Source | None, seed: int
) -> tuple[Samples, Samples | None]:
    """(calibration, evaluation). Without data: a few random feeds for the exactness proof and nothing else."""
    held = data.load(eval_data, model) if eval_data is not None else None
    if source is None:
        return held or data.placeholder(model, seed), held
    samples = data.load(source, model)
    assert samples is not None
    if held is None:
        held = data.load(source, model, data.EVALUATION)
    if held is None:
        return data.hold_out(samples, seed)
    return samples, held


def _something_free(model: Model, coupling: Coupling) -> None:
    if not coupling.n_units:
        reasons = sorted((p.reason for p in coupling.pinned), key=lambda r: not r.startswith("--exclude"))
        why = f", for example because {reasons[0]}" if reasons else ": it has no weights"
        raise BudgetNotMet(f"no channel of {model.path} can be removed{why}; see 'onnx-oamip inspect'.")


def _meets(budget: Budget, before: Cost, after: Cost) -> None:
    for name, share, old, new in (
        ("macs", budget.macs, before.macs, after.macs),
        ("params", budget.params, before.params, after.params),
        ("size", budget.size, before.bytes, after.bytes),
    ):
        if share is not None and new > share * old:
            raise GateFailed(
                f"the pruned model keeps {new / max(old, 1):.4f} of its {name}, more than --{name} {share}; "
                "nothing was written."
            )


def _prove(ready: Prepared, result: Attempt, progress: calibrate.Progress | None) -> Verification:
    """All gates and measurements on the final model. Raises GateFailed."""
    model, samples, device, settings = ready.model, ready.samples, ready.device, ready.settings
    pruned = result.pruned
    verify.structure(pruned.proto)
    original = Session(model.proto, device, what=model.path)
    # Rounding of the proof must not depend on a provider's reduced precision: it is done on the CPU.
    masked = Session(rewrite.mask(model, ready.coupling, result.plan.keep), "cpu", what="the masked model")
    cut = Session(pruned.raw, "cpu", what="the cut model")
    few = samples.take(np.arange(min(samples.count, max(PROOF_SAMPLES, samples.fixed_batch or 1))))
    distance = verify.difference(masked, cut, few, settings.batch_size)
    if not distance <= verify.tolerance(model):
        raise GateFailed(
            f"the cut model differs from the masked original by {distance:.2e} of the output's scale, more than "
            f"{verify.tolerance(model):.0e}; nothing was written, please report this model."
        )
    final = Session(pruned.proto, device, what="the pruned model")
    batches = verify.runs_at(model, final, samples)
    ratio = None if result.plan.keep.all() else _measured_latency(ready, result)
    if ready.held is None:
        return Verification(distance, None, None, None, None, batches, 0, latency_ratio=ratio)
    found = verify.compare(model, original, final, ready.held, settings.batch_size, progress)
    return replace(found, masked_equivalence=distance, batches=batches, latency_ratio=ratio)


def _measured_latency(ready: Prepared, result: Attempt) -> float:
    """Latency over the original's. Raises GateFailed where it is surely over 1, or over the budget by more than 5 %."""
    budget = ready.settings.latency
    allowed = SLOWER if budget is None else budget * (1 + search.LATENCY_SLACK)
    for seconds in GATE_SECONDS if budget is None else (3.0,):
        found = compare_latency(ready.model.proto, result.pruned.proto, ready.samples, ready.device, seconds=seconds)
        if found.high < 1:
            break
    if found.low > allowed and not ready.settings.force:
        what = "slower than the original" if budget is None else f"over --latency {budget}"
        raise GateFailed(
            f"the pruned model was measured {what} on {ready.device}: {found.median:.2f} of its time; nothing was "
            "written; try --align 8 or --align 16, another budget, or --force."
        )
    return found.median


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
