"""One trained network with its calibration samples: scores, masks, what a mask does, and how right the result is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_oamip.core.records import (
    Array,
    Coupling,
    Floats,
    Images,
    Ints,
    Model,
    Objective,
    Scores,
    Statistics,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset as feeds
from onnx_oamip.graph import cost
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery.rewrite import cut
from onnx_oamip.importance import find
from onnx_oamip.objective import find_objective, scale
from onnx_oamip.planning import scoring
from onnx_oamip.planning.allocation import best_units
from onnx_oamip.repair import least_squares
from onnx_oamip.repair.removed_constants import fold_constants
from onnx_oamip.statistics import class_samples
from onnx_oamip.statistics.collector import collect
from onnx_oamip.statistics.context import Context
from onnx_oamip.statistics.requests import CLASS_SAMPLES, COVARIANCE, MOMENTS

from .data import Dataset
from .protocol import NETWORKS, WEIGHT, Bools, Network

DEVICE = "cpu"
LAYER_WISE = frozenset({MOMENTS, COVARIANCE})
TREATMENTS = ("fold", "cut", "refit")
"""Treatments of the consumers of removed units: constants folded as published, none, least squares."""
EVALUATE = 1000


@dataclass(frozen=True, eq=False)
class Case:
    """A trained network, coupled, with statistics of its calibration pool (without images)."""

    network: str
    data: Dataset
    seed: int
    model: Model
    coupling: Coupling
    samples: feeds.Samples
    statistics: Statistics
    objective: Objective

    @property
    def about(self) -> Network:
        """The published network that this is one training of."""
        return NETWORKS[self.network]

    def pool(self, seed: int) -> feeds.Samples:
        """A pool of training images by seed."""
        return _samples(self.model, self.data, seed)

    def weights(self) -> list[str]:
        """Names of the weights whose first axis holds units, in graph order."""
        names = [k[0] for k in self.coupling.axes if k[1] == 0 and k[0] in self.model.constants]
        return [n for n in dict.fromkeys(names) if self.model.constants[n].ndim > 1]

    def by_weight(self, keep: Bools) -> dict[str, Bools]:
        """Keep mask of the rows of every such weight."""
        return {name: self.coupling.keep((name, 0), keep) for name in self.weights()}


def open_case(
    path: Path, network: str, data: Dataset, seed: int, inputs: Array | None = None
) -> Case:
    """Load a trained network; its calibration pool is drawn by its own seed.

    ``inputs``: inputs of the pool's images for a network that reads something else than images.
    """
    model = models.load(path)
    samples = _samples(model, data, seed, inputs)
    model = models.rebind(model, samples.bindings(model))
    coupling = couple(model)
    plain = settings(importance="oamip", mode="decoupled")
    objective = scale(model, find_objective(model, plain, samples), samples, DEVICE)
    statistics = collect(
        Context(model, coupling, samples, None, DEVICE, plain, objective), LAYER_WISE
    )
    return Case(network, data, seed, model, coupling, samples, statistics, objective)


def _samples(model: Model, data: Dataset, seed: int, inputs: Array | None = None) -> feeds.Samples:
    rows = data.pool(seed)
    source: dict[str, Array] = {"labels": data.train_labels[rows]}
    if inputs is None:
        source["input"] = data.train_images[rows]
        source["input.scale"] = np.asarray(1 / 255, np.float32)
    else:
        source["input"] = inputs
    found = feeds.load(source, model)
    assert found is not None
    return found


def settings(**values: Any) -> Settings:
    """Settings of the published program, but for what is given."""
    base: dict[str, Any] = {
        "importance": "oamip",
        "mode": "joint",
        "formulation": "paper",
        "loss_weight": WEIGHT,
        "refit": "none",
        "allocate": "uniform",
        "device": DEVICE,
        "workers": 1,
    }
    return Settings.create(**{**base, **values})


def score(case: Case, asked: Settings, few: Images | None = None) -> tuple[Scores, float]:
    """(scores, seconds) by a method of the package; ``few`` images for a program over the whole network."""
    context = Context(case.model, case.coupling, case.samples, None, DEVICE, asked, case.objective)
    collect(context, LAYER_WISE)  # outside the measurement, for comparisons of orders of removal
    began = time.perf_counter()
    statistics = replace(case.statistics, answers={**case.statistics.answers, CLASS_SAMPLES: few})
    found = scoring.apply_method(context, find(asked.importance), statistics)
    return found, time.perf_counter() - began


def choose(case: Case, samples: feeds.Samples, per_class: int = 1) -> Images:
    """The package's choice: of the samples that are classified correctly, per class those it is least sure of."""
    found = class_samples.collect(
        case.model, case.objective, samples, DEVICE, per_class=per_class, seed=case.seed
    )
    assert found is not None
    return found


def choose_any(case: Case, samples: feeds.Samples, seed: int) -> Images:
    """One correctly classified sample a class, by chance: what remains of the published choice, whose ranking ties."""
    assert samples.labels is not None
    session = Session(case.model.proto, DEVICE, threads=1)
    guess = np.concatenate(
        [session.run(feed)[0].argmax(axis=1) for _, feed in samples.batches(EVALUATE)]
    )
    order = np.random.default_rng(seed).permutation(samples.count)
    order = order[guess[order] == samples.labels[order]]
    _, first = np.unique(samples.labels[order], return_index=True)
    return choose(case, samples.take(np.sort(order[first])))


def below(case: Case, values: Floats, threshold: float) -> Ints:
    """Width of every group when units that score below the threshold go; one unit stays in any case."""
    stays = np.bincount(
        case.coupling.unit_group[values >= threshold], minlength=len(case.coupling.groups)
    )
    return np.maximum(stays, 1).astype(np.int64)


def mask(case: Case, values: Floats, widths: Ints) -> Bools:
    """The units of largest score in every group."""
    keep: Bools = best_units(case.coupling, values, widths)
    return keep


def carry(case: Case, keep: Bools, treatment: str) -> onnx.ModelProto:
    """The network without the units that do not stay."""
    raw = cut(case.model, case.coupling, keep)
    if keep.all() or treatment == "cut":
        return raw
    if treatment == "fold":
        folded = fold_constants(
            case.model, case.coupling, keep, raw, samples=case.samples, device=DEVICE
        )
        proto: onnx.ModelProto = folded.proto
        return proto
    sampling = least_squares.Sampling(samples=case.samples, device=DEVICE)
    refitted = least_squares.front(case.model, case.coupling, keep, raw, sampling, short=())
    proto: onnx.ModelProto = refitted.proto
    return proto


def accuracy(case: Case, proto: onnx.ModelProto) -> float:
    """Share of all test images that are right, in percent."""
    session = Session(proto, DEVICE, threads=1)
    scale = np.float32(1 / 255)
    right = 0
    for start in range(0, len(case.data.test_labels), EVALUATE):
        part = slice(start, start + EVALUATE)
        logits = session.run({"input": case.data.test_images[part].astype(np.float32) * scale})[0]
        right += int((logits.argmax(axis=1) == case.data.test_labels[part]).sum())
    return 100 * right / len(case.data.test_labels)


def measured(case: Case, keep: Bools, treatments: tuple[str, ...] = TREATMENTS) -> dict[str, float]:
    """Accuracy of a mask by treatment."""
    return {t: accuracy(case, carry(case, keep, t)) for t in treatments}


def gone(case: Case, keep: Bools) -> dict[str, float]:
    """Shares that a mask removes, in percent.

    ``units`` of all hidden units; ``zeroed``: the published figure, weights that make removed units over all
    parameters; ``parameters`` and ``macs`` of the network that is cut.
    """
    total = sum(v.size for v in case.model.constants.values() if cost.is_float(v.dtype))
    zeroed = 0
    for name, rows in case.by_weight(keep).items():
        weight = case.model.constants[name]
        zeroed += int((~rows).sum()) * int(np.prod(weight.shape[1:]))
    ledger = cost.ledger(case.model, case.coupling)
    full = ledger.cost(cost.full_widths(case.coupling))
    widths = np.bincount(
        case.coupling.unit_group[keep], minlength=len(case.coupling.groups)
    ).astype(np.int64)
    left = ledger.cost(widths)
    return {
        "units": 100 * float((~keep).mean()),
        "zeroed": 100 * zeroed / total,
        "parameters": 100 * (1 - left.params / full.params),
        "macs": 100 * (1 - left.macs / full.macs),
    }


def program(records: tuple[Mapping[str, Any], ...]) -> dict[str, Any]:
    """Summary of the programs behind some scores: count, largest gap, total seconds, solvers."""
    gaps = [float(r["gap"]) for r in records]
    return {
        "programs": len(records),
        "gap": max(gaps) if np.isfinite(gaps).all() else None,
        "proven": all(r["status"] == "optimal" for r in records),
        "seconds": sum(float(r["seconds"]) for r in records),
        "variables": max(int(r["variables"]) for r in records),
        "rows": max(int(r["rows"]) for r in records),
        "solvers": sorted({str(r["solver"]) for r in records}),
    }
