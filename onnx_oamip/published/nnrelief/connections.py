"""Pruning connection by connection (NNrelief): single weights of dense layers, whole kernels of convolutions.

The result is the same network with zeros. It is no faster in a runtime of dense kernels, and no smaller as a file
unless zeros are left out (``sparse``) or compressed; only the count of connections shrinks. ``rounds`` does the work.
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
from onnx_oamip.planning import drop_search
from onnx_oamip.published.nnrelief.rounds import ConnectionPruner, Thinned
from onnx_oamip.published.nnrelief.state import State
from onnx_oamip.statistics.context import Context
from onnx_oamip.verification import equivalence

DROP_TRIES = 7
"""Networks that the search for the largest drop prunes."""
LEAST_SHARE = 1e-3
"""Share of connections that the search for the largest drop starts from."""
DENSE = (
    "zeros are stored and multiplied like other weights: this model is no faster; `sparse` makes the file smaller, and "
    "prune with `importance=nnrelief` and `alpha=1` takes out units that are left without a connection"
)


@dataclass(frozen=True)
class Result:
    """A network with pruned connections, and everything that its report contains.

    Attributes:
        proto: The model to write.
        dense: The same with zeros in place.
        scores: Scores of the units.
        plan: Kept units.
        connections: Counts by layer and by round.
        verification: Results of the checks.
        fits: Refits of the layers.
        notes: Remarks for the report.
    """

    proto: onnx.ModelProto
    dense: onnx.ModelProto
    scores: Scores
    plan: Plan
    connections: Connections
    verification: Verification
    fits: tuple[Fit, ...]
    notes: tuple[str, ...]


def check(settings: Settings, scored: bool = False) -> None:
    """Check that the settings apply to connections.

    Args:
        settings: Settings of the run.
        scored: A file of scores is given.

    Raises:
        SettingsError: A setting does not apply.
    """
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


def prune(context: Context) -> Result:
    """Prune the connections of a model, refit the rest, and check the result.

    Args:
        context: The original model with its calibration samples and its held-out samples.

    Returns:
        The pruned model with its measurements.

    Raises:
        BudgetNotMet: The budget cannot be met, or no connection can be pruned.
        GateFailed: A check fails.
    """
    settings = context.settings
    model = context.model
    pruner = ConnectionPruner(context)
    if not pruner.sites:
        raise BudgetNotMet(
            f"no connection of {model.path} can be pruned: all linear layers are excluded, or have no constant weights "
            "of their own."
        )
    thinned = _thin(pruner, settings)
    if not settings.no_provenance:
        provenance.sign(thinned.proto, model.sha256, _digest(thinned.state))
    if settings.sparse:
        proto = _sparse(thinned.proto)
    else:
        proto = thinned.proto
    verification = _verify(context, thinned.proto, proto)
    layers = tuple(
        LayerConnections(name, pruner.size(name), thinned.state.connections_of(name))
        for name in pruner.sites
    )
    return Result(
        proto=proto,
        dense=thinned.proto,
        scores=thinned.scores,
        plan=_plan(context, thinned),
        connections=Connections(layers, thinned.rounds, settings.sparse),
        verification=verification,
        fits=thinned.fits,
        notes=(*thinned.notes, DENSE),
    )


def _thin(pruner: ConnectionPruner, settings: Settings) -> Thinned:
    if settings.max_drop is not None:
        return _smallest(pruner, settings.max_drop)
    return pruner.prune(settings.params)


def _plan(context: Context, thinned: Thinned) -> Plan:
    kept = thinned.selection.units
    groups = context.coupling.unit_group[kept]
    widths = np.bincount(groups, minlength=len(context.coupling.groups)).astype(np.int64)
    return Plan(kept, widths, "connections", cost.count(context.model))


def _verify(
    context: Context,
    dense: onnx.ModelProto,
    proto: onnx.ModelProto,
) -> Verification:
    """Check the written model, and the same with zeros in place, against the original."""
    model = context.model
    settings = context.settings
    equivalence.structure(dense)
    if settings.sparse:
        # ONNX's shape inference does not read sparse constants, so that they have a check of their own.
        onnx.checker.check_model(proto)
    objective = context.objective
    evaluation = _evaluation(context)
    device = context.device
    size = context.comparison_batch
    after = equivalence.watch(model, objective, device, proto, "the pruned model")
    before = equivalence.watch(model, objective, device, what=model.path)
    batches = equivalence.runs_at(model, after, context.samples, lambda: before)
    verification = equivalence.compare(
        model,
        objective,
        before,
        after,
        samples=evaluation,
        batch_size=size,
        progress=context.progress,
    )
    equivalence.numbers(model, verification)
    if context.metric is not None:
        values = equivalence.user_metric(
            context.metric,
            model,
            proto,
            samples=evaluation,
            device=device,
            batch_size=size,
        )
        verification = replace(verification, metric=values)
    return replace(verification, batches=batches)


def _evaluation(context: Context) -> Samples:
    """The held-out samples, which exist wherever there is data; this granularity needs data."""
    assert context.held_out is not None
    return context.held_out


def _digest(state: State) -> str:
    """SHA-256 of the kept connections: by layer in the order of names, its name and one bit per weight."""
    digest = hashlib.sha256()
    for name in sorted(state.weights):
        digest.update(name.encode())
        digest.update(np.packbits(state.weights[name] != 0).tobytes())
    return digest.hexdigest()


def _smallest(pruner: ConnectionPruner, points: float) -> Thinned:
    """The fewest connections that lose at most ``points`` on the held-out samples, by bisection on a log scale."""
    context = pruner.context
    evaluation = _evaluation(pruner.context)
    model = context.model
    objective = context.objective
    device = context.device
    original = equivalence.watch(model, objective, device)

    def loss(thinned: Thinned) -> float:
        if context.metric is not None:
            return equivalence.user_metric(
                context.metric,
                model,
                thinned.proto,
                samples=evaluation,
                device=device,
                batch_size=context.batch,
            ).lost
        after = equivalence.watch(model, objective, device, thinned.proto)
        measured = equivalence.compare(
            model,
            objective,
            original,
            after,
            samples=evaluation,
            batch_size=context.batch,
        )
        return drop_search.drop(measured).lost

    smallest: Thinned | None = None
    low = np.log(LEAST_SHARE)
    high = 0.0
    for i in range(DROP_TRIES):
        middle = (low + high) / 2
        try:
            thinned = pruner.prune(float(np.exp(middle)))
            acceptable = loss(thinned) <= points
        except BudgetNotMet:
            acceptable = False
        if acceptable:
            smallest = thinned
            high = middle
        else:
            low = middle
        if context.progress:
            context.progress("max-drop", i + 1, DROP_TRIES)
    if smallest is None:
        raise BudgetNotMet(
            f"no share of connections that was tried loses at most {points} points on {evaluation.source}; ask for a "
            "larger drop."
        )
    return smallest


def _sparse(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with constants stored sparsely where that is smaller (8 bytes per index, and the value)."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    result.ir_version = max(result.ir_version, 5)
    dense = []
    for tensor in result.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        nonzero = np.flatnonzero(value)
        sparse_size = len(nonzero) * (8 + value.itemsize)
        if value.dtype.kind != "f" or sparse_size >= value.nbytes:
            dense.append(tensor)
            continue
        values = onnx.numpy_helper.from_array(value.reshape(-1)[nonzero], tensor.name)
        index = onnx.numpy_helper.from_array(nonzero.astype(np.int64), "")
        sparse = onnx.helper.make_sparse_tensor(values, index, list(value.shape))
        result.graph.sparse_initializer.append(sparse)
    # Copies, because the originals are deleted with the field that they are in.
    copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in dense]
    del result.graph.initializer[:]
    result.graph.initializer.extend(copies)
    return result
