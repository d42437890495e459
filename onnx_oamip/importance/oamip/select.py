"""OAMIP: keep variables of all units in one mixed-integer program over the network, on a few samples.

The importance of a unit is its keep variable where ``loss_weight * cross-entropy + sparsity`` is least. Modes:

- *joint*: one program for the samples of all classes;
- *per-class*: one program per class, scores averaged;
- *decoupled*: layer by layer, for networks of any size (see ``decoupled``);
- *auto*: joint if the program is small (``MAX_AUTO_EXTENT``), else decoupled.

Source: ElAraby, Wolf, Carvalho, "OAMIP: Optimizing ANN Architectures Using Mixed-Integer Programming", CPAIOR 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from onnx_oamip.core.errors import SettingsError, SolverError, memory_for
from onnx_oamip.core.records import (
    Coupling,
    Floats,
    Images,
    Model,
    Scores,
    Statistics,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph import cost
from onnx_oamip.importance import activation
from onnx_oamip.importance.oamip import decoupled
from onnx_oamip.importance.oamip.formulation import Formulation, formulate
from onnx_oamip.importance.oamip.region import Form, extent
from onnx_oamip.importance.oamip.solve import (
    TIGHTENING_TIME_SHARE,
    BoundTightener,
    Outcome,
    optimise,
)
from onnx_oamip.programs.program_files import ProgramFile
from onnx_oamip.programs.solvers import SolverLimits
from onnx_oamip.statistics.requests import CLASS_SAMPLES

RELATIVE_GAP = 0.01
MAX_SILENT_GAP = 0.1
"""Gap above which a note reports that a program ended early."""
MAX_AUTO_EXTENT = {"exact": 200, "paper": 60_000}
"""Largest extent (samples times elements of ReLUs and maxima behind a gate) for which ``auto`` is joint.

In ``exact`` most of the elements become binaries; in ``paper`` nearly all are decided by bounds and only cost rows.
"""
MAX_AUTO_UNITS = 5_000
"""Largest number of units for which ``auto`` is joint."""
MAX_EXTENT = 300_000
"""Extent above which a joint program is refused even on request."""
TIE_BREAK = 1e-6
"""Weight of the activation rank, which orders units with equal keep variables."""
MAX_LISTED_REASONS = 3
"""Distinct reasons that a note lists."""


class _ModeChoice(NamedTuple):
    """A mode, and the reason if ``auto`` chose it (empty if it was requested)."""

    mode: str
    reason: str


def score(
    model: Model,
    coupling: Coupling,
    statistics: Statistics | None,
    settings: Settings,
) -> Scores:
    """Score units by their keep variables.

    Equal keep variables are ordered by their activation score, which adds at most ``TIE_BREAK``. Units that the joint
    program cannot hold (an operator without an encoding lies between them and the logits) are scored by the decoupled
    program; a note says which and why.

    Args:
        model: Model to score.
        coupling: Units of the model.
        statistics: Class samples for joint modes, covariances for the decoupled one, activation statistics for both.
        settings: Options of the run.

    Returns:
        Scores in [0, 1] (n_units,), with a record of every program.

    Raises:
        SettingsError: The requested mode is not available for this model.
        SolverError: The solver refuses a program of the requested mode.
    """
    assert statistics is not None
    mode, reason = _choose_mode(model, coupling, statistics, settings)
    if mode != "decoupled":
        try:
            scores = _joint_scores(model, coupling, statistics, settings, mode)
        except (SettingsError, SolverError) as error:
            if settings.mode != "auto":
                raise
            mode = "decoupled"
            reason = f"since the joint program failed: {str(error).rstrip('.')}"
    if mode == "decoupled":
        scores = decoupled.score(model, coupling, statistics, settings)
    notes = scores.notes
    if reason:
        notes = (f"importance oamip: mode {mode}, {reason}", *notes)
    return replace(scores, method="oamip", notes=notes)


def _joint_scores(
    model: Model,
    coupling: Coupling,
    statistics: Statistics,
    settings: Settings,
    mode: str,
) -> Scores:
    """Scores by one program, or by one per class."""
    images = _class_samples(statistics)
    size = extent(model, coupling, images, Form(settings.formulation))
    if size > MAX_EXTENT:
        raise SettingsError(
            f"`mode={mode}` is over {size:,} activations behind a gate, more than {MAX_EXTENT:,}; use `mode=decoupled`."
        )
    guess = _rank(activation.score(model, coupling, statistics, settings).values)
    notes = list(images.notes)
    parts = by_class(images) if mode == "per-class" else [images]
    values = np.zeros(coupling.n_units)
    programs: list[Mapping[str, Any]] = []
    outside: dict[int, str] = {}
    for part in parts:
        with memory_for(
            f"the {mode} importance program", "use `mode=decoupled`, or fewer `images_per_class`"
        ):
            formulation, outcome = program(model, coupling, part, settings, guess)
        values[formulation.units] += outcome.keep / len(parts)
        outside.update(formulation.outside)
        notes += outcome.notices
        labels = part.labels[part.labels >= 0]
        record = {
            "mode": mode,
            "formulation": settings.formulation,
            "images": labels.size,
            "classes": np.unique(labels).tolist(),
        }
        programs.append({**outcome.record, **record})
        if outcome.gap > MAX_SILENT_GAP:
            notes.append(_early_end(mode, outcome))
    values = (1 - TIE_BREAK) * values + TIE_BREAK * guess
    if outside:
        layerwise = decoupled.score(model, coupling, statistics, settings)
        units = sorted(outside)
        values[units] = layerwise.values[units]
        programs += layerwise.programs
        reasons = "; ".join(list(dict.fromkeys(outside.values()))[:MAX_LISTED_REASONS])
        notes.append(f"{len(units)} units are scored by the decoupled program: {reasons}")
        notes += layerwise.notes
    return Scores("oamip", values, tuple(programs), tuple(dict.fromkeys(notes)))


def _early_end(mode: str, outcome: Outcome) -> str:
    """Note for a program that ended with a wide gap."""
    if np.isinf(outcome.gap):
        bound = "no bound"
    else:
        bound = f"a gap of {outcome.gap:.0%}"
    all_kept = bool((outcome.keep > 1 - 1e-6).all())
    point = "all units kept" if all_kept else "its best point"
    return (
        f"the {mode} program ended with {bound} after {outcome.record['seconds']:.0f} s, so its scores are "
        f"those of {point}; give it more `time_limit`, or take `relax`, fewer images or `mode=decoupled`"
    )


def program(
    model: Model,
    coupling: Coupling,
    images: Images,
    settings: Settings,
    guess: Floats | None = None,
) -> tuple[Formulation, Outcome]:
    """Formulate and solve one joint program.

    Args:
        model: Model to score.
        coupling: Units of the model.
        images: Samples of the program.
        settings: Options of the run.
        guess: Cheap scores (n_units,) that propose a first point.

    Returns:
        The program and its solution.

    Raises:
        SettingsError: No unit can be encoded.
        SolverError: The solver refuses the program or finds no point in time.
    """
    limits = SolverLimits(time_s=settings.time_limit, gap=RELATIVE_GAP, seed=settings.seed)
    form = Form(settings.formulation, settings.loss_weight, settings.relax, settings.score_budget)
    tighten = None
    if form.kind == "exact":
        seconds = TIGHTENING_TIME_SHARE * settings.time_limit
        tighten = BoundTightener(limits, settings.solver, seconds)
    formulation = formulate(
        model,
        coupling,
        images,
        form,
        cost=unit_costs(model, coupling),
        tighten=tighten,
    )
    if guess is None:
        first_point = None
    else:
        first_point = guess[formulation.units]
    classes = "-".join(str(label) for label in np.unique(images.labels[images.labels >= 0]))
    file = ProgramFile.of(settings, f"importance-{settings.formulation}-classes-{classes}")
    names = formulation.names(coupling)
    keep = formulation.encoder.keep
    proposed = file.values(lambda: [names[column] for column in keep])
    outcome = optimise(formulation, limits, settings.solver, first_point, proposed=proposed)
    file.write(lambda: outcome.program, lambda: names)
    return formulation, outcome


def _rank(scores: Floats) -> Floats:
    """Ranks in ascending order, scaled to [0, 1)."""
    count = len(scores)
    ranks = np.empty(count)
    ranks[np.argsort(scores, kind="stable")] = np.arange(count) / max(count, 1)
    return ranks


def unit_costs(model: Model, coupling: Coupling) -> Floats:
    """Compute the cost of each unit in the full model.

    Args:
        model: Model to score.
        coupling: Units of the model.

    Returns:
        MACs (n_units,) saved by removing one unit of the full model.
    """
    ledger = cost.ledger(model, coupling)
    full = cost.full_widths(coupling)
    macs_of_full = ledger.cost(full).macs
    narrower = full[None, :] - np.eye(len(full), dtype=np.int64)
    saved = [macs_of_full - ledger.cost(widths).macs for widths in narrower]
    return np.array(saved, np.float64)[coupling.unit_group]


def _choose_mode(
    model: Model,
    coupling: Coupling,
    statistics: Statistics,
    settings: Settings,
) -> _ModeChoice:
    """Resolve ``auto`` by the size of the joint program."""
    if settings.formulation == "paper" and settings.score_budget is not None:
        raise SettingsError(
            "`score_budget` needs `formulation=exact`: the published objective has no budget."
        )
    if settings.mode != "auto":
        return _ModeChoice(settings.mode, "")
    images = statistics[CLASS_SAMPLES]
    if images is None:
        reason = "since the model has no output of shape (samples, classes)"
        return _ModeChoice("decoupled", reason)
    if not images.activations:
        return _ModeChoice("decoupled", f"since {_no_activations(images)}")
    try:
        size = extent(model, coupling, images, Form(settings.formulation))
    except SettingsError as error:
        cause = str(error).partition("; use")[0]
        return _ModeChoice("decoupled", f"since {cause}")
    limit = MAX_AUTO_EXTENT[settings.formulation]
    if coupling.n_units > MAX_AUTO_UNITS:
        reason = f"since {coupling.n_units:,} units are more than {MAX_AUTO_UNITS:,}"
        return _ModeChoice("decoupled", reason)
    if size > limit:
        reason = f"since {size:,} activations behind a gate are more than {limit:,}"
        return _ModeChoice("decoupled", reason)
    return _ModeChoice("joint", f"since {size:,} activations behind a gate are at most {limit:,}")


def _class_samples(statistics: Statistics) -> Images:
    """Samples of the classes; raises SettingsError if there are none to build a program of."""
    images = statistics[CLASS_SAMPLES]
    if images is None:
        raise SettingsError(
            "`importance=oamip` needs a classifier, with an output of shape (samples, classes); use `mode=decoupled`."
        )
    if not images.activations:
        raise SettingsError(f"{_no_activations(images)}; use `mode=decoupled`.")
    return images


def _no_activations(images: Images) -> str:
    """Reason for missing activations."""
    if not images.feeds:
        return "no calibration sample is classified as its label says"
    return "the activations of the images do not fit in memory"


def by_class(images: Images) -> list[Images]:
    """Split class samples by class.

    Args:
        images: Samples of all classes.

    Returns:
        One record per class, without the feeds that hold no sample of it. In a feed of several samples those of other
        classes have the label -1.
    """
    parts = []
    for label in np.unique(images.labels[images.labels >= 0]):
        labels = np.where(images.labels == label, images.labels, -1)
        feeds = np.flatnonzero((labels >= 0).any(axis=1))
        activations = {name: value[feeds] for name, value in images.activations.items()}
        others = []
        for head in images.others:
            of_class = np.where(labels >= 0, head.labels, -1)
            others.append(replace(head, labels=of_class[feeds]))
        part = replace(
            images,
            feeds=tuple(images.feeds[i] for i in feeds),
            labels=labels[feeds],
            activations=activations,
            others=tuple(others),
        )
        parts.append(part)
    return parts
