"""Upper limits of removal by SNACS: how much every layer can lose before its outputs lose the classes.

Its operating constraints (Ganesh, Blanchard, Corso, Sekeh, arXiv 2006.12463): for every layer a classifier learns the
classes from the layer's pooled outputs, the layer loses ever more of its inputs, and the limit is the largest share at
which the frozen classifier has not lost more than 70 % of what it loses at all. No retraining and no pass of the
network is needed: a linear layer's pooled output is linear in what its taps read, pooled. Different from the authors'
code: whole units go, in the order in which a plan would take them, since no plan here takes single connections;
absolute weights and folded normalisations. Without labels, linear CKA with the original outputs stands in for the
classifier's accuracy (not part of SNACS).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from onnx_oamip.core.extras import imports_of
from onnx_oamip.core.records import (
    Axis,
    Coupling,
    Floats,
    Ints,
    Model,
    Scores,
)
from onnx_oamip.executors import executor
from onnx_oamip.graph.linear_layers import linear_consumers, matrix
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.planning.limits import UpperLimits
from onnx_oamip.published.dependence.pooled_activations import outlet
from onnx_oamip.published.dependence.requests import POOLED_ACTIVATIONS, Pooled
from onnx_oamip.statistics.collector import collect
from onnx_oamip.statistics.context import Context

LEVELS = np.arange(1, 98, 2)
"""Percentages of a group that are taken away."""
TOLERANCE = 0.7
"""Share of the observed fall that a layer may suffer."""
ROWS = 1000
"""Samples that the classifier learns from and is asked about: its cost grows with their square."""

Judge = Callable[[Floats], float]
"""How much a layer's pooled outputs (samples, children), clamped at 0, still say."""


def check() -> None:
    """Check that the extra ``pack``, for the classifier, is installed.

    Raises:
        EnvironmentMissing: It is not.
    """
    with imports_of("pack", "`limits=snacs`"):
        import sklearn.svm  # noqa: F401


def upper_limits(context: Context, scores: Scores) -> UpperLimits:
    """Find the largest share of every group that each of its linear consumers tolerates to lose.

    Args:
        context: The original model and its calibration samples.
        scores: Scores of its units: they give the order of removal.

    Returns:
        The least limit over a group's linear consumers. A group without one may lose all but what an allocation leaves
        anyway.
    """
    model, coupling, settings = context.model, context.coupling, context.settings
    pooled = collect(context, {POOLED_ACTIVATIONS})[POOLED_ACTIVATIONS]
    labels = pooled.labels
    few = np.random.default_rng(0).permutation(pooled.samples)[:ROWS]
    ranked = labels is not None and len(np.unique(labels[few])) > 1
    criterion = "no labels: linear CKA of layers' outputs"
    if ranked:
        criterion = f"accuracy of an SVM on {len(few)} samples"
    order = np.lexsort((-np.arange(coupling.n_units), scores.values))
    usable = []
    for consumer, place in linear_consumers(model, coupling):
        ends = ((consumer.data, consumer.axis), outlet(model, place))
        if all(axis in pooled.values for axis in ends):
            taps = {name: read for name, read in pooled.taps.items() if name == place.node.name}
            here = replace(pooled, values={axis: pooled.values[axis] for axis in ends}, taps=taps)
            usable.append((ends[0], place, here))
    found = executor(settings.workers, settings.scheduler).map(
        _one, _Whole(model, coupling, few, order, ranked), usable
    )
    shares = np.min([np.ones(len(coupling.groups)), *found], axis=0)
    return UpperLimits(shares, criterion)


@dataclass(frozen=True, eq=False)
class _Whole:
    """What the work on every layer shares: samples looked at, the order (n_units,) of removal, whether labels count."""

    model: Model
    coupling: Coupling
    few: Ints
    order: Ints
    ranked: bool


def _one(whole: _Whole, job: tuple[Axis, Site, Pooled]) -> Floats:
    data, place, pooled = job
    layer = _Layer(whole.model, whole.coupling, pooled, place, data, whole.few)
    if whole.ranked and pooled.labels is not None:
        judge = classifier(layer.original, pooled.labels[whole.few])
    else:
        judge = similarity(layer.original)
    return layer.limits(whole.coupling, whole.order, judge)


def upper_limit(levels: Ints, values: Floats, tolerance: float = TOLERANCE) -> int:
    """The largest level at which a value is at least ``max - tolerance (max - min)`` of all of them."""
    least = values.max() - tolerance * (values.max() - values.min())
    return int(np.max(np.asarray(levels)[np.asarray(values) >= least]))


class _Layer:
    """One linear node on pooled samples: its outputs, clamped at 0, without any of its inputs.

    What follows it by a constant factor and shift a channel is found from the original's outputs.
    """

    def __init__(
        self, model: Model, coupling: Coupling, pooled: Pooled, place: Site, data: Axis, rows: Ints
    ) -> None:
        weight = place.factor * matrix(place, model.constants[place.weight])
        groups, _, ins, _ = weight.shape
        self.labels = coupling.axes[data]
        taps = pooled.taps.get(place.node.name)
        read = pooled.values[data][:, :, None] if taps is None else taps
        self.read = read[rows].astype(np.float64)  # (samples, inputs, taps)
        self.weight = weight
        self.linear = self.part(np.arange(groups * ins))
        after = pooled.values[outlet(model, place)][rows].astype(np.float64)
        centred = self.linear - self.linear.mean(axis=0)
        energy = np.square(centred).sum(axis=0)
        self.factor = np.where(
            energy > 0, (centred * after).sum(axis=0) / np.where(energy > 0, energy, 1.0), 0.0
        )
        self.shift = after.mean(axis=0) - self.factor * self.linear.mean(axis=0)
        self.original = np.maximum(after, 0.0)

    def part(self, inputs: Ints) -> Floats:
        """What some of the inputs bring to the node's outputs (samples, outputs)."""
        groups, outs, ins, _ = self.weight.shape
        result = np.zeros((len(self.read), groups * outs))
        for block in np.unique(inputs // ins).tolist():
            here = inputs[inputs // ins == block]
            read = self.read[:, here].reshape(len(self.read), -1)
            weight = self.weight[block][:, here - block * ins].reshape(outs, -1)
            result[:, block * outs : (block + 1) * outs] = read @ weight.T
        return result

    def limits(self, coupling: Coupling, order: Ints, judge: Judge) -> Floats:
        """Largest share (groups,) of every group that the node may lose; 1 for groups that it does not read."""
        result = np.ones(len(coupling.groups))
        for g in np.unique(coupling.unit_group[self.labels[self.labels >= 0]]).tolist():
            units = order[coupling.unit_group[order] == g]  # as a plan takes them
            counts = LEVELS * len(units) // 100  # one unit always stays
            left, gone, value, values = self.linear, 0, 0.0, []
            for i, count in enumerate(counts.tolist()):
                if count > gone or i == 0:
                    left = left - self.part(np.flatnonzero(np.isin(self.labels, units[gone:count])))
                    value = judge(np.maximum(self.factor * left + self.shift, 0.0))
                    gone = count
                values.append(value)
            at = upper_limit(LEVELS, np.asarray(values))
            result[g] = counts[at == LEVELS][0] / len(units)
        return result


def classifier(original: Floats, labels: Ints) -> Judge:
    """Accuracy of an RBF support vector machine that learnt ``labels`` from the original outputs, then frozen.

    The kernel is computed here, by matrix products; settings are scikit-learn's defaults but for a tolerance of 1e-5.
    """
    from sklearn.svm import SVC

    gamma = 1.0 / (original.shape[1] * (original.var() or 1.0))

    def kernel(found: Floats) -> Floats:
        squares = np.square(found).sum(axis=1)[:, None] + np.square(original).sum(axis=1)
        return np.asarray(np.exp(-gamma * np.maximum(squares - 2 * (found @ original.T), 0.0)))

    machine = SVC(kernel="precomputed", tol=1e-5, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # about data that no machine can learn from: its accuracy says so
        machine.fit(kernel(original), labels)
    return lambda found: float((machine.predict(kernel(found)) == labels).mean())


def similarity(original: Floats) -> Judge:
    """Linear centred kernel alignment with the original outputs (Kornblith et al. 2019), from 0 to 1."""
    ours = original - original.mean(axis=0)
    own = _alignment(ours, ours)

    def judge(found: Floats) -> float:
        theirs = found - found.mean(axis=0)
        scale = np.sqrt(own * _alignment(theirs, theirs))
        return float(_alignment(ours, theirs) / scale) if scale > 0 else 0.0

    return judge


def _alignment(a: Floats, b: Floats) -> float:
    """``||a' b||^2``, by whichever of rows and columns are fewer."""
    if a.shape[1] <= len(a):
        return float(np.square(a.T @ b).sum())
    return float(((a @ a.T) * (b @ b.T)).sum())
