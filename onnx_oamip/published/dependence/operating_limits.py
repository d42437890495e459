"""Upper limits of removal by SNACS: the largest share of its inputs that a layer loses without losing the classes.

Its operating constraints (Ganesh, Blanchard, Corso, Sekeh, arXiv 2006.12463): for every layer a classifier learns the
classes from the layer's pooled outputs, the layer loses ever more of its inputs, and the limit is the largest share at
which the frozen classifier has not lost more than 70 % of its largest loss. No retraining and no run of the network is
needed: a linear layer's pooled output is linear in the pooled inputs of its taps. Different from the authors' code:
whole units are removed, in the order in which a plan would remove them, since no plan here removes single connections;
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
"""Percentages of a group that are removed."""
TOLERANCE = 0.7
"""Share of the observed loss that a layer may suffer."""
ROWS = 1000
"""Samples that the classifier learns from and is applied to: its cost grows with their square."""

Measure = Callable[[Floats], float]
"""Information in pooled outputs (samples, children), clamped at 0: accuracy, or similarity to the original."""


@dataclass(frozen=True, eq=False)
class _Shared:
    """Input of the work on every layer.

    Attributes:
        model: The model.
        coupling: Its units and groups.
        rows: Samples that are used.
        order: Order of removal of all units (n_units,).
        classified: The measure is the accuracy of a classifier.
    """

    model: Model
    coupling: Coupling
    rows: Ints
    order: Ints
    classified: bool


_Job = tuple[Axis, Site, Pooled]
"""A layer: the axis that it sums over, its linear form, and the pooled activations of both its ends."""


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
        The least limit over a group's linear consumers. A group without one has no limit.
    """
    model = context.model
    coupling = context.coupling
    settings = context.settings
    pooled = collect(context, {POOLED_ACTIVATIONS})[POOLED_ACTIVATIONS]
    rows = np.random.default_rng(0).permutation(pooled.samples)[:ROWS]
    labels = pooled.labels
    classified = labels is not None and len(np.unique(labels[rows])) > 1
    criterion = "no labels: linear CKA of layers' outputs"
    if classified:
        criterion = f"accuracy of an SVM on {len(rows)} samples"
    order = np.lexsort((-np.arange(coupling.n_units), scores.values))

    shared = _Shared(model, coupling, rows, order, classified)
    jobs = _jobs(model, coupling, pooled)
    limits = executor(settings.workers, settings.scheduler).map(_layer_limits, shared, jobs)
    shares = np.min([np.ones(len(coupling.groups)), *limits], axis=0)
    return UpperLimits(shares, criterion)


def upper_limit(
    levels: Ints,
    values: Floats,
    tolerance: float = TOLERANCE,
) -> int:
    """Find the largest level at which a value is at least ``max - tolerance (max - min)`` of all values.

    Args:
        levels: Levels of removal.
        values: Value at each level.
        tolerance: Share of the range that may be lost.

    Returns:
        The level.
    """
    least = values.max() - tolerance * (values.max() - values.min())
    tolerated = np.asarray(levels)[np.asarray(values) >= least]
    return int(np.max(tolerated))


def classifier(original: Floats, labels: Ints) -> Measure:
    """Train an RBF support vector machine on the original outputs of a layer, and freeze it.

    The kernel is computed here, by matrix products; settings are scikit-learn's defaults but for a tolerance of 1e-5.

    Args:
        original: Original outputs (samples, children).
        labels: Class of every sample.

    Returns:
        Function that computes its accuracy on other outputs.
    """
    from sklearn.svm import SVC

    gamma = 1.0 / (original.shape[1] * (original.var() or 1.0))

    def kernel(outputs: Floats) -> Floats:
        squares = np.square(outputs).sum(axis=1)[:, None] + np.square(original).sum(axis=1)
        distances = np.maximum(squares - 2 * (outputs @ original.T), 0.0)
        return np.asarray(np.exp(-gamma * distances))

    machine = SVC(kernel="precomputed", tol=1e-5, random_state=0)
    with warnings.catch_warnings():
        # Warnings about data that no machine can learn from: its accuracy shows that.
        warnings.simplefilter("ignore")
        machine.fit(kernel(original), labels)

    def accuracy(outputs: Floats) -> float:
        return float((machine.predict(kernel(outputs)) == labels).mean())

    return accuracy


def similarity(original: Floats) -> Measure:
    """Prepare linear centred kernel alignment with the original outputs of a layer (Kornblith et al. 2019).

    Args:
        original: Original outputs (samples, children).

    Returns:
        Function that computes the alignment of other outputs, from 0 to 1.
    """
    centred_original = original - original.mean(axis=0)
    own = _alignment(centred_original, centred_original)

    def alignment(outputs: Floats) -> float:
        centred = outputs - outputs.mean(axis=0)
        scale = np.sqrt(own * _alignment(centred, centred))
        if scale > 0:
            return float(_alignment(centred_original, centred) / scale)
        return 0.0

    return alignment


def _jobs(model: Model, coupling: Coupling, pooled: Pooled) -> list[_Job]:
    """The layers with pooled activations at both ends, each with no others, so that little is sent to a worker."""
    result = []
    for consumer, layer in linear_consumers(model, coupling):
        inlet = (consumer.data, consumer.axis)
        ends = (inlet, outlet(model, layer))
        if all(axis in pooled.values for axis in ends):
            values = {axis: pooled.values[axis] for axis in ends}
            node = layer.node.name
            if node in pooled.taps:
                taps = {node: pooled.taps[node]}
            else:
                taps = {}
            result.append((inlet, layer, replace(pooled, values=values, taps=taps)))
    return result


def _layer_limits(shared: _Shared, job: _Job) -> Floats:
    inlet, site, pooled = job
    layer = _Layer(shared.model, pooled, site, inlet=inlet, rows=shared.rows)
    if shared.classified and pooled.labels is not None:
        measure = classifier(layer.original, pooled.labels[shared.rows])
    else:
        measure = similarity(layer.original)
    return layer.limits(shared.coupling, inlet, shared.order, measure)


class _Layer:
    """One linear node on pooled samples: its outputs, clamped at 0, without any of its inputs.

    Nodes behind it that only scale and shift channels are fitted to the original's outputs.
    """

    def __init__(
        self,
        model: Model,
        pooled: Pooled,
        site: Site,
        *,
        inlet: Axis,
        rows: Ints,
    ) -> None:
        self.weight = site.factor * matrix(site, model.constants[site.weight])
        by_tap = pooled.taps.get(site.node.name)
        if by_tap is None:
            inputs = pooled.values[inlet][:, :, None]
        else:
            inputs = by_tap
        self.inputs = inputs[rows].astype(np.float64)  # (samples, inputs, taps)
        groups, _, ins, _ = self.weight.shape
        self.linear = self.part(np.arange(groups * ins))
        outputs = pooled.values[outlet(model, site)][rows].astype(np.float64)
        centred = self.linear - self.linear.mean(axis=0)
        energy = np.square(centred).sum(axis=0)
        slope = (centred * outputs).sum(axis=0) / np.where(energy > 0, energy, 1.0)
        self.factor = np.where(energy > 0, slope, 0.0)
        self.shift = outputs.mean(axis=0) - self.factor * self.linear.mean(axis=0)
        self.original = np.maximum(outputs, 0.0)

    def part(self, inputs: Ints) -> Floats:
        """Compute the part of the node's outputs that comes from some of its inputs.

        Args:
            inputs: Indices of inputs.

        Returns:
            Contributions (samples, outputs).
        """
        groups, outs, ins, _ = self.weight.shape
        samples = len(self.inputs)
        result = np.zeros((samples, groups * outs))
        for block in np.unique(inputs // ins).tolist():
            of_block = inputs[inputs // ins == block]
            read = self.inputs[:, of_block].reshape(samples, -1)
            weight = self.weight[block][:, of_block - block * ins].reshape(outs, -1)
            result[:, block * outs : (block + 1) * outs] = read @ weight.T
        return result

    def limits(
        self,
        coupling: Coupling,
        inlet: Axis,
        order: Ints,
        measure: Measure,
    ) -> Floats:
        """Find the largest share of every group that the node tolerates to lose.

        Args:
            coupling: The units and groups.
            inlet: The axis that the node sums over.
            order: Order of removal of all units (n_units,).
            measure: Information in the outputs.

        Returns:
            Shares (groups,); 1 for groups that the node does not read.
        """
        labels = coupling.axes[inlet]
        result = np.ones(len(coupling.groups))
        for group in np.unique(coupling.unit_group[labels[labels >= 0]]).tolist():
            units = order[coupling.unit_group[order] == group]
            counts = LEVELS * len(units) // 100  # below all of them: one unit is always kept
            values = self._values(labels, units, counts, measure)
            level = upper_limit(LEVELS, values)
            result[group] = counts[level == LEVELS][0] / len(units)
        return result

    def _values(
        self,
        labels: Ints,
        units: Ints,
        counts: Ints,
        measure: Measure,
    ) -> Floats:
        """Information in the outputs after the removal of the first ``counts`` units, in ascending order."""
        left = self.linear
        removed = 0
        values: list[float] = []
        for count in counts.tolist():
            if count > removed or not values:
                channels = np.flatnonzero(np.isin(labels, units[removed:count]))
                left = left - self.part(channels)
                removed = count
                values.append(measure(np.maximum(self.factor * left + self.shift, 0.0)))
            else:
                values.append(values[-1])
        return np.asarray(values)


def _alignment(a: Floats, b: Floats) -> float:
    """``||a' b||^2``, by the smaller of the two Gram matrices."""
    if a.shape[1] <= len(a):
        return float(np.square(a.T @ b).sum())
    return float(((a @ a.T) * (b @ b.T)).sum())
