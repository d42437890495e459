"""Records of the request and the results: budget, plan, pruned model, verification, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnx_oamip.core.notebook import COST_HEADER, cost_rows, summary, tables
from onnx_oamip.core.records.graph import (
    Array,
    Bools,
    Coupling,
    Ints,
    Model,
)
from onnx_oamip.core.records.objective import Measure, Objective
from onnx_oamip.core.records.statistics import Scores, Sensitivity


@dataclass(frozen=True, slots=True)
class Budget:
    """Budgets of a run; None if a budget is not set.

    Attributes:
        macs: Share of the multiply-accumulates to keep, in (0, 1].
        params: Share of the parameters to keep.
        size: Share of the file's bytes to keep.
        threshold: Units with a lower score are removed.
        latency: Share of the measured latency to keep.
        max_drop: Largest accepted loss of the worst term of the objective, in points of its measure.
        max_loss: Upper bound on the sum of the measured losses of all groups; as few units as possible are kept.
    """

    macs: float | None = None
    params: float | None = None
    size: float | None = None
    threshold: float | None = None
    latency: float | None = None
    max_drop: float | None = None
    max_loss: float | None = None


@dataclass(frozen=True, slots=True)
class Uncounted:
    """Nodes of one operator whose multiply-accumulates are not counted.

    Attributes:
        operator: Name of the operator, with its domain unless that is the default.
        reason: Why they are not counted.
        nodes: Names of the nodes.
    """

    operator: str
    reason: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of a model.

    Attributes:
        macs: Multiply-accumulates for one sample.
        params: Elements of weights, of floating type or stored as codes of few bits.
        bytes: Size of the file with its external data.
    """

    macs: int
    params: int
    bytes: int


@dataclass(frozen=True, repr=False)
class Plan:
    """Units to keep (n_units,), the width of every group, the predicted cost, and the programs behind them.

    ``rotated``: names of the groups whose units are principal components in place of channels. ``factored``: those
    whose units are the ranks of layers that are written as two.
    """

    keep: Bools
    widths: Ints
    allocation: str
    predicted: Cost
    programs: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    rotated: tuple[str, ...] = ()
    factored: tuple[str, ...] = ()

    def __repr__(self) -> str:
        kept = int(np.count_nonzero(self.keep))
        return f"<Plan: keeps {kept:,} of {len(self.keep):,} units in {len(self.widths)} groups, by {self.allocation}>"


@dataclass(frozen=True)
class Fit:
    """The refit of one node.

    Errors are mean squared, relative to the variance of the original output. Where ``form`` ends with "behind" and a
    clamp, they are those of the outputs behind it.
    """

    node: str
    form: str
    rows: int
    unknowns: int
    ridge: float | None
    error_before: float
    error_after: float


@dataclass(frozen=True, repr=False)
class Pruned:
    """A rewritten model: ``raw`` before the refit, ``proto`` after it, and the ``fits`` of its nodes.

    ``losses``: of the objective with the refit and without, where both were compared.
    """

    raw: Any
    proto: Any
    notes: tuple[str, ...] = ()
    fits: tuple[Fit, ...] = ()
    losses: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Pruned: {len(self.fits)} nodes refitted>"


@dataclass(frozen=True)
class Recovery:
    """Training of a pruned model with the original as its teacher.

    Attributes:
        accepted: True if the trained model is taken; otherwise the model is the unrecovered one.
        before: Loss of the objective on held-out samples before training.
        after: The lowest one found by training; None where nothing was trained.
        steps: Steps that were done.
        slowed: Times that the rate was divided because it was too large.
        best_step: Steps behind the lowest loss.
        batch: Samples of one step.
        held_bytes: Bytes of answers of the original that were held to be used again; 0 where all were computed anew.
        seconds: Time of the training.
        ended: Why it ended: ``budget``, ``no improvement``, ``interrupted``, ``diverged``, ``nothing to train`` or
            ``too few samples``.
        samples: Samples trained on.
        held_out: Samples judged on.
        repeated: Samples among those judged on that are equal to samples trained on.
        augment: Changes of the samples, by input.
        device: Device of torch.
        weights: Number of initialisers that were trained.
        features: Tensors that were compared besides those of the objective.
        left_out: Nodes that torch does not compute, with the reason.
        curve: Pairs of a step and the loss after it on held-out samples.
        outputs_before: Measures of the terms before training, on the evaluation data or else on the held-out samples.
        outputs: The same of the model that is taken.
        refusal: Reason why the trained model is not taken, as a clause; empty where it is taken.
        features_left_out: Reason by tensor why the end of a block was not compared.
    """

    accepted: bool
    before: float
    after: float | None
    steps: int
    slowed: int
    best_step: int
    batch: int
    held_bytes: int
    seconds: float
    ended: str
    samples: int
    held_out: int
    augment: str
    device: str
    weights: int
    features: tuple[str, ...]
    left_out: tuple[str, ...]
    curve: tuple[tuple[int, float], ...]
    outputs_before: tuple[Measure, ...] = ()
    outputs: tuple[Measure, ...] = ()
    refusal: str = ""
    features_left_out: Mapping[str, str] = field(default_factory=dict)
    repeated: int = 0


@dataclass(frozen=True, slots=True)
class MetricValues:
    """The user's own metric: its ``name`` (``module:function``), and its values of the original and the pruned model.

    Larger is better.
    """

    name: str
    before: float
    after: float

    @property
    def lost(self) -> float:
        """By how much the value of the pruned model is below that of the original, 0 where it is not."""
        return max(self.before - self.after, 0.0)


@dataclass(frozen=True, slots=True)
class Latency:
    """Measured latency of a result relative to the original's, one sample at a time.

    Attributes:
        median: Median over rounds of the ratio within a round; under 1 if the result is faster.
        low: Lower end of the 95 % interval of that median.
        high: Upper end of the interval.
        rounds: Number of rounds.
        threads: Threads within an operator.
        load: Processes that were ready to run per processor of the machine; None where the system does not say.
        doubt: Reason why the median is not shown, or an empty string.
        added_ms: Median over rounds of the milliseconds that a run takes longer; below 0 if it is faster.
    """

    median: float
    low: float
    high: float
    rounds: int
    threads: int
    load: float | None
    doubt: str = ""
    added_ms: float = 0.0


@dataclass(frozen=True, repr=False)
class Verification:
    """Checks and measurements of a pruned model.

    ``failures`` lists the checks that failed. ``rounding`` is the difference that rounding alone makes to the masked
    model, if ``masked_equivalence`` was compared with it. Values that were not measured are None. ``outputs`` are the
    measures of all terms of the objective, the worst first; ``outputs_before_refit`` those of the cut model, empty if
    nothing was refitted. ``agreement`` and the accuracies are those of the first term with decisions, ``agreement_of``;
    ``output_relative_error`` is that of the worst output. ``objective``: the terms, where no other record holds them.
    ``notes``: remarks for the report.
    """

    masked_equivalence: float | None
    output_relative_error: float | None
    agreement: float | None
    accuracy_before: float | None
    accuracy_after: float | None
    batches: tuple[int, ...]
    samples: int
    failures: tuple[str, ...] = ()
    latency: Latency | None = None
    rounding: float | None = None
    outputs: tuple[Measure, ...] = ()
    outputs_before_refit: tuple[Measure, ...] = ()
    metric: MetricValues | None = None
    objective: Objective = field(default_factory=Objective)
    notes: tuple[str, ...] = ()
    agreement_of: str | None = None

    @property
    def latency_ratio(self) -> float | None:
        """Median latency relative to the original's; None if it was not measured or is in doubt."""
        if self.latency is None or self.latency.doubt:
            return None
        return self.latency.median

    @property
    def sentence(self) -> str:
        """The measurements in one line."""
        parts = []
        is_one_of_several = len(self.outputs) > 1 and self.agreement_of
        of = f" of '{self.agreement_of}'" if is_one_of_several else ""
        if self.accuracy_before is not None and self.accuracy_after is not None:
            parts.append(f"accuracy{of} {self.accuracy_before:.2%} -> {self.accuracy_after:.2%}")
        if self.agreement is not None:
            parts.append(f"agreement{of} {self.agreement:.2%}")
        if self.output_relative_error is not None:
            parts.append(f"output error {self.output_relative_error:.3g}")
        if self.latency is not None and not self.latency.doubt:
            found = self.latency
            parts.append(f"latency ratio {found.median:.2f} ({found.low:.2f} to {found.high:.2f})")
        if self.failures:
            parts.append(f"failed: {'; '.join(self.failures)}")
        measured = ", ".join(parts) or "not measured"
        return f"{measured} ({self.samples:,} samples)"

    def __repr__(self) -> str:
        return f"<Verification: {self.sentence}>"

    def _repr_html_(self) -> str:
        rows = [
            (measure.term, measure.kind, measure.measure, f"{measure.lost:.2f}")
            for measure in self.outputs
        ]
        return tables(self.sentence, (rows, ("output", "kind", "measure", "points lost")))


@dataclass(frozen=True, slots=True)
class Trial:
    """One try of a search for the smallest model: asked to keep the share ``asked`` of the MACs, it kept ``macs`` and
    ``lost`` this many points of ``measure`` on evaluation data. All are None where no plan met the budgets."""

    asked: float
    macs: int | None
    lost: float | None
    measure: str | None = None


@dataclass(frozen=True)
class Point:
    """One model of a frontier: asked to keep the share ``asked`` of the MACs; ``widths`` (groups,).

    Where no plan met it, ``reason`` says why and the rest is None. ``output`` is its file, where it was saved.
    """

    asked: float
    cost: Cost | None = None
    widths: Ints | None = None
    verification: Verification | None = None
    reason: str | None = None
    output: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, repr=False)
class Frontier:
    """Cost and accuracy of a model at several budgets; ``reporting.documents.frontier`` converts it to JSON.

    Attributes:
        before: Cost of the original.
        accuracy: Accuracy of the original; None without labels.
        points: One result for every level.
    """

    model: Model
    coupling: Coupling
    before: Cost
    accuracy: float | None
    importance: str
    points: tuple[Point, ...]
    timings: Mapping[str, float]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    objective: Objective = field(default_factory=Objective)

    def __repr__(self) -> str:
        levels = ", ".join(f"{point.asked:g}" for point in self.points)
        return f"<Frontier {self.model.path}: {len(self.points)} levels of MACs ({levels})>"

    def _repr_html_(self) -> str:
        rows = []
        for point in self.points:
            if point.cost is None or point.verification is None:
                rows.append((f"{point.asked:g}", "-", point.reason))
            else:
                share = point.cost.macs / self.before.macs
                rows.append((f"{point.asked:g}", f"{share:.3f}", point.verification.sentence))
        return tables(f"Frontier of {self.model.path}", (rows, ("asked", "MACs", "result")))


@dataclass(frozen=True, slots=True)
class LayerConnections:
    """Weights and biases of one layer that are not zero, before (``total``) and after (``kept``)."""

    node: str
    total: int
    kept: int


@dataclass(frozen=True, slots=True)
class Round:
    """One round of scoring, pruning and refitting connections.

    Attributes:
        alpha: Share of signal that every unit keeps; that of the kept connections if all are ranked together.
        kept: Connections that remain.
    """

    alpha: float
    kept: int


@dataclass(frozen=True)
class Connections:
    """Result of pruning single connections; ``sparse`` if zeros are not stored."""

    layers: tuple[LayerConnections, ...]
    rounds: tuple[Round, ...]
    sparse: bool

    @property
    def total(self) -> int:
        """Weights and biases of all layers."""
        return sum(layer.total for layer in self.layers)

    @property
    def kept(self) -> int:
        """Those that are not zero."""
        return sum(layer.kept for layer in self.layers)


@dataclass(frozen=True, eq=False)
class ContactSheet:
    """Samples of an input as the model saw them, side by side.

    Attributes:
        input: Name of the input.
        pixels: The drawing (height, width, 3), uint8.
        count: Number of samples in it.
        low: Value that is black.
        high: Value that is white.
    """

    input: str
    pixels: Array
    count: int
    low: float
    high: float


@dataclass(frozen=True, repr=False)
class Report:
    """Result of ``prune`` or ``apply``; ``document`` converts it to JSON.

    ``curves`` are the measured losses of every group at a few widths, if the allocation needed them; ``tried`` the
    steps of a search for ``max_drop``. The result of ``apply`` has no scores. ``reading`` states how images were read,
    and ``contact_sheet`` shows samples of an input that takes images. ``zip_bytes``: sizes before and after, deflated
    as in a zip archive; None for a model in memory.
    """

    model: Model
    output: str | None
    output_sha256: str | None
    before: Cost
    after: Cost
    budget: Budget
    coupling: Coupling
    scores: Scores | None
    plan: Plan
    verification: Verification
    timings: Mapping[str, float]
    settings: Mapping[str, Any]
    notes: Sequence[str] = field(default_factory=tuple)
    fits: tuple[Fit, ...] = ()
    curves: tuple[Sensitivity, ...] = ()
    tried: tuple[Trial, ...] = ()
    connections: Connections | None = None
    objective: Objective = field(default_factory=Objective)
    reading: Mapping[str, Any] | None = None
    contact_sheet: ContactSheet | None = None
    compared: Mapping[str, float] = field(default_factory=dict)
    recovery: Recovery | None = None
    zip_bytes: tuple[int | None, int | None] = (None, None)

    def __repr__(self) -> str:
        costs = summary(self.before, self.after)
        return f"<Report {self.model.path} -> {self.output}: {costs}; {self.verification.sentence}>"

    def _repr_html_(self) -> str:
        widths = self.plan.widths.tolist()
        groups = [
            (group.name, len(group.units), width)
            for group, width in zip(self.coupling.groups, widths, strict=True)
        ]
        return tables(
            f"{self.model.path}: {self.verification.sentence}",
            (cost_rows(self.before, self.after), COST_HEADER),
            (groups, ("group", "units", "kept")),
            ([(note,) for note in dict.fromkeys(self.notes)], ("notes",)),
        )
