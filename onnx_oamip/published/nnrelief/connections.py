"""Pruning connection by connection (NNrelief): single weights of dense layers, whole kernels of convolutions.

The result is the same network with zeros. It is no faster in a runtime of dense kernels, and no smaller as a file but
where zeros are left out (``--sparse``) or compressed; what matters is the count. ``thinning`` does the work.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnx_oamip.artifacts import provenance
from onnx_oamip.core.budgets import KINDS
from onnx_oamip.core.errors import BudgetNotMet, SettingsError
from onnx_oamip.core.records import (
    Connections,
    Fit,
    LayerConnections,
    Plan,
    Scores,
    Verification,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph import cost
from onnx_oamip.graph.runtime import Session
from onnx_oamip.planning import search
from onnx_oamip.published.nnrelief.rounds import (
    Bench,
    State,
    Thinned,
    held,
)
from onnx_oamip.statistics.context import Context
from onnx_oamip.verification import equivalence

DROP_TRIES = 7
LEAST_SHARE = 1e-3
"""Share of connections that the search for the largest drop starts from."""
DENSE = (
    "zeros are stored and multiplied like other weights: this model is no faster; `sparse` makes the file smaller, and "
    "prune with `importance=nnrelief` and `alpha=1` takes out units that are left without a connection"
)


@dataclass(frozen=True)
class Result:
    """Everything that a report says about it; ``proto`` is what is written, ``dense`` the same with zeros in place."""

    proto: onnx.ModelProto
    dense: onnx.ModelProto
    scores: Scores
    plan: Plan
    connections: Connections
    verification: Verification
    fits: tuple[Fit, ...]
    notes: tuple[str, ...]


def check(settings: Settings, scored: bool = False) -> None:
    """Raises SettingsError for settings that say nothing about connections; ``scored``: there are scores already."""
    if scored:
        raise SettingsError(
            "`scores` holds scores of units, and `granularity=connection` scores connections anew."
        )
    if settings.importance != "nnrelief":
        raise SettingsError(
            f"`granularity=connection` needs `importance=nnrelief`, not {settings.importance}: the others score units."
        )
    if settings.scheduler is not None:
        raise SettingsError(
            "`granularity=connection` has nothing to do for a cluster; leave out `scheduler`."
        )
    for kind in KINDS:
        if kind.name not in ("params", "max_drop") and getattr(settings, kind.name) is not None:
            raise SettingsError(
                f"`{kind.name}` is about units, and `granularity=connection` keeps them all; give `alpha`, `params` or "
                "`max_drop`."
            )
    constraints = {
        "limits": settings.limits != "none",
        "protect": settings.protect > 0,
        "floor": settings.floor > 0,
    }
    for name, given in constraints.items():
        if given:
            raise SettingsError(
                f"`{name}` is about units, and `granularity=connection` keeps them all; leave it out, or name layers "
                "that keep all connections with `exclude`."
            )
    asked = [
        name for name in ("alpha", "params", "max_drop") if getattr(settings, name) is not None
    ]
    if len(asked) > 1:
        names = " and ".join(f"`{name}`" for name in asked)
        raise SettingsError(
            f"`granularity=connection` takes one of `alpha`, `params` and `max_drop`, not {names}."
        )


def prune(opened: Context) -> Result:
    """Prune, refit and check. Raises BudgetNotMet where the budget cannot be met, GateFailed where a gate fails."""
    settings, model = opened.settings, opened.model
    evaluation = _evaluation(opened)
    bench = Bench(opened)
    if not bench.free:
        raise BudgetNotMet(
            f"no connection of {model.path} can be pruned: all linear layers are excluded, or have no constant weights "
            "of their own."
        )
    found = (
        bench.thin(settings.params)
        if settings.max_drop is None
        else _smallest(bench, settings.max_drop)
    )
    if not settings.no_provenance:
        provenance.sign(found.proto, model.sha256, _digest(found.state))
    proto = _sparse(found.proto) if settings.sparse else found.proto
    layers = tuple(
        LayerConnections(name, bench.size(name), held(found.state, name)) for name in bench.free
    )
    widths = np.bincount(
        opened.coupling.unit_group[found.selection.units], minlength=len(opened.coupling.groups)
    ).astype(np.int64)
    equivalence.structure(found.proto)
    if settings.sparse:  # ONNX's shape inference does not look into sparse constants
        onnx.checker.check_model(proto)
    after = Session(proto, opened.device, what="the pruned model")
    before = Session(model.proto, opened.device, what=model.path)
    batches = equivalence.runs_at(model, after, opened.samples, lambda: before)
    seen = equivalence.compare(
        model, before, after, evaluation, settings.batch_size, opened.progress
    )
    equivalence.numbers(model, seen)
    return Result(
        proto=proto,
        dense=found.proto,
        scores=found.scores,
        plan=Plan(found.selection.units, widths, "connections", cost.count(model)),
        connections=Connections(layers, found.rounds, settings.sparse),
        verification=replace(seen, batches=batches),
        fits=found.fits,
        notes=(*found.notes, DENSE),
    )


def _evaluation(opened: Context) -> Samples:
    """The held-out samples: there are some wherever there is data, and this granularity needs data."""
    assert opened.held_out is not None
    return opened.held_out


def _digest(state: State) -> str:
    """SHA-256 of which connections stay: by layer in order of names, its name and one bit a weight."""
    digest = hashlib.sha256()
    for name in sorted(state.weights):
        digest.update(name.encode())
        digest.update(np.packbits(state.weights[name] != 0).tobytes())
    return digest.hexdigest()


def _smallest(bench: Bench, points: float) -> Thinned:
    """The fewest connections that lose at most ``points`` on the evaluation samples, by bisection on a log scale."""
    opened, evaluation = bench.opened, _evaluation(bench.opened)
    original = Session(opened.model.proto, opened.device)

    def lost(found: Thinned) -> float:
        after = Session(found.proto, opened.device)
        seen = equivalence.compare(opened.model, original, after, evaluation, opened.batch)
        return search.drop(seen)

    least: Thinned | None = None
    low, high = np.log(LEAST_SHARE), 0.0
    for i in range(DROP_TRIES):
        middle = (low + high) / 2
        try:
            found = bench.thin(float(np.exp(middle)))
            held = lost(found) <= points
        except BudgetNotMet:
            held = False
        if held:
            least, high = found, middle
        else:
            low = middle
        if bench.progress:
            bench.progress("max-drop", i + 1, DROP_TRIES)
    if least is None:
        raise BudgetNotMet(
            f"no share of connections that was tried loses at most {points} points on {evaluation.source}; ask for a "
            "larger drop."
        )
    return least


def _sparse(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with every constant stored sparsely where that is smaller (8 bytes an index and the value)."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    result.ir_version = max(result.ir_version, 5)
    kept = []
    for tensor in result.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        places = np.flatnonzero(value)
        if value.dtype.kind != "f" or len(places) * (8 + value.itemsize) >= value.nbytes:
            kept.append(tensor)
            continue
        values = onnx.numpy_helper.from_array(value.reshape(-1)[places], tensor.name)
        index = onnx.numpy_helper.from_array(places.astype(np.int64), "")
        result.graph.sparse_initializer.append(
            onnx.helper.make_sparse_tensor(values, index, list(value.shape))
        )
    copies = [onnx.TensorProto.FromString(t.SerializeToString()) for t in kept]
    del result.graph.initializer[:]
    result.graph.initializer.extend(copies)
    return result
