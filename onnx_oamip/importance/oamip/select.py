"""OAMIP: keep variables of all units in one mixed-integer program over the network, on a few images.

ElAraby, Wolf, Carvalho, "OAMIP: Optimizing ANN Architectures Using Mixed-Integer Programming", CPAIOR 2023: the
importance of a unit is its keep variable where ``loss_weight * cross-entropy + sparsity`` is least. Modes:

- *joint*: one program for the images of all classes;
- *per-class*: one program a class, scores averaged;
- *decoupled*: layer by layer, for networks of any size (see ``decoupled``);
- *auto*: joint where the program is small (``MOST``), else decoupled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

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
    SHARE,
    Outcome,
    optimise,
    tightener,
)
from onnx_oamip.programs.solvers import Limits
from onnx_oamip.statistics.requests import CLASS_SAMPLES

GAP = 0.01
WIDE = 0.1
"""A program that ends with a wider gap is told about."""
MOST = {"exact": 200, "paper": 60_000}
"""``auto`` takes the joint program up to this many (image, unit or pixel) pairs in ReLUs and maxima behind a gate.

In ``exact`` most of them are binaries; in ``paper`` nearly all are decided by bounds and only cost rows.
"""
MOST_UNITS = 5_000
LARGEST = 300_000
"""Above this many such pairs a joint program is refused, whoever asks."""
TIE = 1e-6
"""What the activation score adds to keep variables, so that equal ones are told apart by it."""


def score(
    model: Model, coupling: Coupling, statistics: Statistics | None, settings: Settings
) -> Scores:
    """Keep variables in [0, 1] per unit, with a record of every program.

    Equal ones are told apart by the rank of their activation score, which adds at most ``TIE``. Units that the joint
    program cannot hold (an operator without a form lies between them and the logits) are scored by the decoupled
    program; the notes say which and why. Raises SettingsError where a mode cannot be had for this model, SolverError
    where a solver refuses.
    """
    assert statistics is not None
    mode, why = _mode(model, coupling, statistics, settings)
    if mode != "decoupled":
        try:
            found = _programs(model, coupling, statistics, settings, mode)
        except (SettingsError, SolverError) as error:
            if settings.mode != "auto":
                raise
            mode, why = "decoupled", f"since the joint program failed: {str(error).rstrip('.')}"
    if mode == "decoupled":
        found = decoupled.score(model, coupling, statistics, settings)
    told = (f"importance oamip: mode {mode}, {why}",) if why else ()
    return replace(found, method="oamip", notes=(*told, *found.notes))


def _programs(
    model: Model, coupling: Coupling, statistics: Statistics, settings: Settings, mode: str
) -> Scores:
    """Scores by one program, or by one a class."""
    images = _images(statistics)
    size = extent(model, coupling, images, Form(settings.formulation))
    if size > LARGEST:
        raise SettingsError(
            f"`mode={mode}` is over {size:,} activations behind a gate, more than {LARGEST:,}; use `mode=decoupled`."
        )
    cheap = _rank(activation.score(model, coupling, statistics, settings).values)
    notes = list(images.notes)
    parts = by_class(images) if mode == "per-class" else [images]
    values = np.zeros(coupling.n_units)
    programs: list[Mapping[str, Any]] = []
    outside: dict[int, str] = {}
    for part in parts:
        with memory_for(
            f"the {mode} importance program", "use `mode=decoupled`, or fewer `images_per_class`"
        ):
            formulation, outcome = program(model, coupling, part, settings, cheap)
        values[formulation.units] += outcome.keep / len(parts)
        outside.update(formulation.outside)
        notes += outcome.notices
        labels = part.labels[part.labels >= 0]
        about = {"mode": mode, "formulation": settings.formulation, "images": labels.size}
        programs.append({**outcome.record, **about, "classes": np.unique(labels).tolist()})
        if outcome.gap > WIDE:
            width = "no bound" if np.isinf(outcome.gap) else f"a gap of {outcome.gap:.0%}"
            kept = "all units kept" if (outcome.keep > 1 - 1e-6).all() else "its best point"
            notes.append(
                f"the {mode} program ended with {width} after {outcome.record['seconds']:.0f} s, so its scores are "
                f"those of {kept}; give it more `time_limit`, or take `relax`, fewer images or `mode=decoupled`"
            )
    values = (1 - TIE) * values + TIE * cheap
    if outside:
        rest = decoupled.score(model, coupling, statistics, settings)
        units = sorted(outside)
        values[units] = rest.values[units]
        programs += rest.programs
        reasons = "; ".join(list(dict.fromkeys(outside.values()))[:3])
        notes += [f"{len(units)} units are scored by the decoupled program: {reasons}", *rest.notes]
    return Scores("oamip", values, tuple(programs), tuple(dict.fromkeys(notes)))


def program(
    model: Model,
    coupling: Coupling,
    images: Images,
    settings: Settings,
    cheap: Floats | None = None,
) -> tuple[Formulation, Outcome]:
    """One joint program over some images, formulated and solved; ``cheap`` scores (n_units,) give it a first point."""
    limits = Limits(time_s=settings.time_limit, gap=GAP, seed=settings.seed)
    form = Form(settings.formulation, settings.loss_weight, settings.relax, settings.score_budget)
    tighten = None
    if form.kind == "exact":
        tighten = tightener(limits, settings.solver, SHARE * settings.time_limit)
    formulation = formulate(model, coupling, images, form, unit_costs(model, coupling), tighten)
    guess = None if cheap is None else cheap[formulation.units]
    return formulation, optimise(formulation, limits, settings.solver, guess)


def _rank(scores: Floats) -> Floats:
    """Places in ascending order, in [0, 1)."""
    result = np.empty(len(scores))
    result[np.argsort(scores, kind="stable")] = np.arange(len(scores)) / max(len(scores), 1)
    return result


def unit_costs(model: Model, coupling: Coupling) -> Floats:
    """Multiply-accumulates that go with one unit of the full model, (n_units,)."""
    ledger = cost.ledger(model, coupling)
    full = cost.full_widths(coupling)
    before = ledger.cost(full).macs
    fewer = full[None, :] - np.eye(len(full), dtype=np.int64)
    per_group = np.array([before - ledger.cost(widths).macs for widths in fewer], np.float64)
    return per_group[coupling.unit_group]


def _mode(
    model: Model, coupling: Coupling, statistics: Statistics, settings: Settings
) -> tuple[str, str]:
    """(mode, why it was chosen; empty where it was asked for)."""
    if settings.formulation == "paper" and settings.score_budget is not None:
        raise SettingsError(
            "`score_budget` needs `formulation=exact`: the published objective has no budget."
        )
    if settings.mode != "auto":
        return settings.mode, ""
    images = statistics[CLASS_SAMPLES]
    if images is None:
        return "decoupled", "since the model has no output of shape (samples, classes)"
    if not images.activations:
        return "decoupled", f"since {_nothing(images)}"
    try:
        size = extent(model, coupling, images, Form(settings.formulation))
    except SettingsError as error:
        return "decoupled", f"since {str(error).partition('; use')[0]}"
    most = MOST[settings.formulation]
    if coupling.n_units > MOST_UNITS:
        return "decoupled", f"since {coupling.n_units:,} units are more than {MOST_UNITS:,}"
    if size > most:
        return "decoupled", f"since {size:,} activations behind a gate are more than {most:,}"
    return "joint", f"since {size:,} activations behind a gate are at most {most:,}"


def _images(statistics: Statistics) -> Images:
    images = statistics[CLASS_SAMPLES]
    if images is None:
        raise SettingsError(
            "`importance=oamip` needs a classifier, with an output of shape (samples, classes); use `mode=decoupled`."
        )
    if not images.activations:
        raise SettingsError(f"{_nothing(images)}; use `mode=decoupled`.")
    return images


def _nothing(images: Images) -> str:
    """Why there are no activations."""
    if not images.feeds:
        return "no calibration sample is classified as its label says"
    return "the activations of the images do not fit in memory"


def by_class(images: Images) -> list[Images]:
    """The images of every class alone; feeds without one are left out."""
    parts = []
    for label in np.unique(images.labels[images.labels >= 0]):
        labels = np.where(images.labels == label, images.labels, -1)
        feeds = np.flatnonzero((labels >= 0).any(axis=1))
        held = {name: value[feeds] for name, value in images.activations.items()}
        parts.append(
            replace(
                images,
                feeds=tuple(images.feeds[i] for i in feeds),
                labels=labels[feeds],
                activations=held,
            )
        )
    return parts
