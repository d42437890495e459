"""Least-squares refits of small models, and their errors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from graphs import samples as random_samples
from onnx import ModelProto, numpy_helper

from onnx_oamip.core.records import Bools, Coupling, Model, Pruned
from onnx_oamip.data import dataset
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph.linear_layers import site
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.repair import least_squares


def random_calibration(model: Model, count: int, seed: int = 0) -> Samples:
    found = dataset.load(random_samples(model, count, seed), model)
    assert found is not None
    return found


def without(coupling: Coupling, group: str, places: Sequence[int]) -> Bools:
    """All units but some of one group."""
    keep = np.ones(coupling.n_units, bool)
    (found,) = (g for g in coupling.groups if g.name == group)
    keep[found.units[list(places)]] = False
    return keep


def refit(model: Model, coupling: Coupling, keep: Bools, found: Samples, **named: object) -> Pruned:
    raw = rewrite.cut(model, coupling, keep)
    frozen = raw.SerializeToString()
    sampling = least_squares.Sampling(samples=found, device="cpu", **named)  # type: ignore[arg-type]
    pruned = least_squares.front(model, coupling, keep, raw, sampling, short=())
    assert raw.SerializeToString() == frozen == pruned.raw.SerializeToString()
    onnx.checker.check_model(pruned.proto, full_check=True)
    for fit in pruned.fits:
        assert 0 <= fit.error_after <= fit.error_before < np.inf
    return pruned


def relative_error(model: Model, other: ModelProto, found: Samples) -> float:
    """Root of the squared output error over the output's energy."""
    before, after = Session(model.proto, "cpu"), Session(other, "cpu")
    squared = energy = 0.0
    for _, feed in found.batches(64):
        for a, b in zip(before.run(feed), after.run(feed), strict=True):
            squared += float(np.square(a.astype(np.float64) - b).sum())
            energy += float(np.square(a.astype(np.float64)).sum())
    return float(np.sqrt(squared / energy))


def linear_sites(model: Model) -> list[Site]:
    return [p for n in model.nodes if (p := site(n, model.constants)) is not None]


def change_initialiser(proto: ModelProto, name: str, change: object) -> None:
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    value = numpy_helper.to_array(tensor).copy()
    change(value)  # type: ignore[operator]
    tensor.CopyFrom(numpy_helper.from_array(value, name))
