"""The frozen records that flow through the stages, one way.

``Model -> Coupling -> Statistics -> Scores -> Plan -> Pruned -> Verification -> Report``

Tensors are identified by name, units by their index in ``Coupling`` (``0 .. n_units - 1``). Arrays inside records are
to be treated as read-only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Array = npt.NDArray[Any]
Axis = tuple[str, int]
"""One axis of one tensor: (tensor name, non-negative axis)."""


@dataclass(frozen=True, slots=True)
class Node:
    """One operator call. ``captures`` are outer tensors that only its subgraphs read."""

    name: str
    op: str
    domain: str
    version: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any]
    captures: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.op} '{self.name}'"


@dataclass(frozen=True, slots=True)
class Port:
    """A graph input or output: ``dims`` holds an int, a symbol's name, or None where nothing is known."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Reading:
    """How samples are read from images and tables; defaults fit a network fed with values from 0 to 1.

    ``size``: (height, width), None for the model's own; ``fit``: resize the short side and cut the middle out
    (``crop``), the long side and fill up (``pad``), or both (``stretch``); ``mean`` and ``std`` per channel, in values
    after ``scale``; ``most``: samples read at most, spread evenly over the classes; ``column``: of a table.
    """

    size: tuple[int, int] | None = None
    fit: Literal["crop", "pad", "stretch"] = "crop"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Literal["auto", "nchw", "nhwc"] = "auto"
    color: Literal["rgb", "bgr"] = "rgb"
    most: int = 2048
    column: str | None = None


@dataclass(frozen=True)
class Model:
    """A loaded model: constants folded, nodes named, shapes known for one feed of ``batch`` samples.

    ``proto`` is the normalised graph with symbolic dimensions as they were in the file; ``shapes`` holds concrete
    shapes under ``bindings`` (symbol -> size).
    """

    proto: Any
    nodes: tuple[Node, ...]
    constants: Mapping[str, Array]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype[Any]]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    bindings: Mapping[str, int]
    batch: int
    path: str
    sha256: str
    file_bytes: int

    def port(self, name: str) -> Port:
        """The graph input called ``name``."""
        return next(p for p in self.inputs if p.name == name)


@dataclass(frozen=True, slots=True)
class Consumer:
    """A place where channels are summed over: ``node`` reads ``data`` along ``axis`` and contracts it.

    ``weight`` is what meets it along ``weight_axis``: a constant, another activation (attention scores), or None where
    nothing does (a plain sum). ``groups`` is the number of channel blocks that share the weight axis (grouped
    convolution; 1 otherwise).
    """

    node: str
    slot: int
    data: str
    axis: int
    weight: str | None
    weight_axis: int
    groups: int = 1


@dataclass(frozen=True, slots=True)
class Group:
    """Units that occupy the same axes the same number of times, so that only their count matters for cost.

    ``multiplicity`` maps every axis the group lives on to the number of indices one unit holds there.
    """

    name: str
    units: Ints
    multiplicity: Mapping[Axis, int]


@dataclass(frozen=True, slots=True)
class Pinned:
    """Channels of a constant that cannot go, and why."""

    tensor: str
    axis: int
    count: int
    reason: str


@dataclass(frozen=True)
class Coupling:
    """What must go together. ``axes`` maps an axis to the unit of each index (-1: pinned)."""

    n_units: int
    groups: tuple[Group, ...]
    unit_group: Ints
    axes: Mapping[Axis, Ints]
    consumers: tuple[Consumer, ...]
    pinned: tuple[Pinned, ...]

    def keep(self, axis: Axis, units: Bools) -> Bools:
        """Which indices of ``axis`` stay when ``units`` (n_units,) says which units stay."""
        labels = self.axes[axis]
        return np.where(labels < 0, True, units[labels]) if self.n_units else np.ones(labels.shape, bool)


@dataclass(frozen=True, slots=True)
class Moments:
    """Streaming moments of one tensor along one axis: per-channel mean and mean square, and the values seen."""

    mean: Floats
    mean_square: Floats
    count: int


@dataclass(frozen=True)
class Gram:
    """Covariance of what one linear node reads, per block: ``matrix`` (groups, d, d), ``mean`` (groups, d).

    ``columns`` (d, fold): the inputs (channel * taps + tap, within a block) that each of the d columns stands for. With
    a fold above 1 the covariance is that of equal places of a channel, averaged, and places count as outputs.
    """

    matrix: Floats
    mean: Floats
    columns: Ints
    taps: int
    rows: int


@dataclass(frozen=True)
class Images:
    """A few chosen samples and all they do: ``activations`` maps a tensor to (feeds, *its shape for one feed).

    ``labels`` (feeds, rows): the class of every row of the ``logits`` tensor, -1 where a row does not count.
    """

    feeds: tuple[Mapping[str, Array], ...]
    labels: Ints
    logits: str
    activations: Mapping[str, Array]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pooled:
    """Activations pooled over positions: ``values`` maps an axis to (samples, channels) float32, rows the same samples.

    ``taps``: by convolution (samples, channels, taps), what every tap of its kernel reads on average over the output's
    positions. ``labels`` (samples,): classes, where they are known.
    """

    values: Mapping[Axis, Array]
    taps: Mapping[str, Array]
    labels: Ints | None
    samples: int


@dataclass(frozen=True)
class Statistics:
    """What one pass over the calibration data collected: moments per consumed axis, Gram matrices per linear node.

    ``images``: a few chosen samples with their activations, ``pooled``: activations of many samples pooled over
    positions, where the method asks for them.
    """

    moments: Mapping[Axis, Moments]
    samples: int
    device: str
    seconds: float
    grams: Mapping[str, Gram] = field(default_factory=dict)
    images: Images | None = None
    pooled: Pooled | None = None


@dataclass(frozen=True)
class Scores:
    """One importance per unit: larger means keep. ``method`` names where they come from.

    ``programs``: one record for every program solved for them; ``notes``: what a reader should know about them;
    ``others``: scores by name whose orders are worth a measurement beside this one (see ``sensitivity.choose``).
    """

    method: str
    values: Floats
    programs: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    others: Mapping[str, Floats] = field(default_factory=dict)


@dataclass(frozen=True)
class Sensitivity:
    """``widths`` (levels,) ascending, last the full width; ``loss`` (levels,), never rising with width."""

    widths: Ints
    loss: Floats


@dataclass(frozen=True, slots=True)
class Budget:
    """Shares to keep, each in (0, 1], or None; ``threshold`` removes units that score below it.

    ``max_drop`` is the most accuracy (or agreement, without labels) that may be lost, in points.
    """

    macs: float | None = None
    params: float | None = None
    size: float | None = None
    threshold: float | None = None
    latency: float | None = None
    max_drop: float | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """``macs`` for one sample, ``params`` elements of floating constants, ``bytes`` of the file."""

    macs: int
    params: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """Which units stay (n_units,), with the widths per group and what the allocation said."""

    keep: Bools
    widths: Ints
    allocation: str
    predicted: Cost
    programs: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fit:
    """How one node was refitted. Errors are mean squared, relative to the variance of the original output."""

    node: str
    form: str
    rows: int
    unknowns: int
    ridge: float | None
    error_before: float
    error_after: float


@dataclass(frozen=True)
class Pruned:
    """The rewritten model. ``raw`` is before refit, ``proto`` after it; ``fits`` tells how each node was refitted."""

    raw: Any
    proto: Any
    notes: tuple[str, ...] = ()
    fits: tuple[Fit, ...] = ()


@dataclass(frozen=True)
class Verification:
    """What was checked about the written model; ``failures`` lists gates that did not hold.

    ``rounding`` is how far rounding alone moves the masked model, where ``masked_equivalence`` was held against it.
    """

    masked_equivalence: float | None
    output_relative_error: float | None
    agreement: float | None
    accuracy_before: float | None
    accuracy_after: float | None
    batches: tuple[int, ...]
    samples: int
    failures: tuple[str, ...] = ()
    latency_ratio: float | None = None
    rounding: float | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """One try of a search for the smallest model: asked to keep the share ``asked`` of the MACs, it kept ``macs`` and
    ``lost`` this many points on evaluation data. Both are None where no plan met the budgets."""

    asked: float
    macs: int | None
    lost: float | None


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


@dataclass(frozen=True)
class Frontier:
    """What a model costs and still does at several budgets; ``report.frontier`` turns it into JSON.

    ``accuracy`` is the original's, None without labels.
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


@dataclass(frozen=True)
class Report:
    """All of it; ``report.document`` turns it into the JSON of the command line. A plan from a file has no scores.

    ``curves``: the measured loss of every group at a few widths, where the allocation asked for it; ``tried``: what a
    search for ``max_drop`` went through.
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
