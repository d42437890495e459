"""Records of the objective: the terms by which a pruned model is judged, and how well each is kept.

A term reads one tensor of the graph (or a slice of it) in the original and in the pruned model and compares the two. It
is found by structure (``detection``), scaled on the original's outputs (``normaliser``), and read by everything that
judges (``losses``, ``measures``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from onnx_oamip.core.records.graph import Array, Floats

Kind: TypeAlias = Literal[
    "classes", "binary", "values", "embedding", "ambiguous", "exact", "ignore"
]
"""Kind of a tensor. ``ambiguous``: class scores or values, the loss takes the worse; ``exact``: equal or not."""
Form: TypeAlias = Literal["auto", "logits", "probabilities", "scores"]
"""Form of stored decisions. ``auto``: logits or probabilities, found on data; ``scores``: compared with a threshold."""
Source: TypeAlias = Literal["structure", "labels", "user"]

MASKED = 0.5
"""Share of the large number for masked entries beyond which an entry is masked: a computed mask adds it to them."""

CHOICES: tuple[Kind, ...] = ("classes", "binary", "values", "embedding", "ignore")
"""Kinds that a user can choose."""


@dataclass(frozen=True, slots=True)
class Part:
    """The slice ``start:stop`` of a tensor along one axis."""

    axis: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"[{self.start}:{self.stop}] of axis {self.axis}"


@dataclass(frozen=True, eq=False)
class Scale:
    """Scale of one unit of a term's loss, found on the original's outputs (``normaliser.Normaliser``).

    ``spread``: loss of the average answer (classes, binary, embedding); ``variance`` (columns,): what squared errors
    are divided by (values); ``background``: the class of most of the original's decisions, -1 where none dominates;
    ``balance`` (columns or 1, 2): weights of positions that the original decides negatively and positively;
    ``unused``: columns of an ambiguous term that are nearly constant, as scores of classes that never occur are. They
    count as constant where errors are divided by the variance.
    """

    form: Form
    spread: float
    variance: Floats
    background: int
    balance: Floats
    unused: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Term:
    """One tensor that the pruned model must keep, and how its error is measured.

    ``output``: the graph output that it was found for; ``axis``: classes, columns or vector components, None for one
    column; ``stacked``: axes of the directions and layers of a recurrent state, whose entries are columns of their own;
    ``threshold``: of a binary decision, in the tensor's own units, None for even odds; ``tail``: what lies
    between the tensor and the output; ``assumption``: what was assumed, and the option that says otherwise;
    ``decided``: the output is made of decisions about the tensor, as ArgMax gives them;
    ``least``: the decision takes the least value, as ArgMin does, so that rows are negated;
    ``fill``: the large number that stands for masked entries, such as -1e9 in logits of padding; None without a mask;
    ``labelled``: the labels of the data belong to this term; ``balanced``: rare positives weigh as much as the rest;
    ``scale``: None before the original's outputs were seen.
    """

    name: str
    output: str
    tensor: str
    kind: Kind
    axis: int | None = None
    part: Part | None = None
    weight: float = 1.0
    form: Form = "auto"
    threshold: float | None = None
    tail: str = ""
    assumption: str = ""
    source: Source = "structure"
    labelled: bool = False
    balanced: bool = True
    decided: bool = False
    scale: Scale | None = None
    stacked: tuple[int, ...] = ()
    least: bool = False
    fill: float | None = None

    @property
    def normaliser(self) -> float | None:
        """Loss of the average answer before scaling: one number for the report."""
        if self.scale is None:
            return None
        if self.kind == "values":
            return float(self.scale.variance.mean())
        return self.scale.spread

    def rows(self, array: Array) -> Floats:
        """Return the term's part of a tensor as a matrix.

        Args:
            array: The tensor that the term compares, of one batch.

        Returns:
            Float64 (positions, columns): one row per sample and position, one column per class, value or component.
        """
        values = self._of_part(array)
        columns = math.prod(values.shape[values.ndim - self._column_axes(values) :])
        rows = values.astype(np.float64).reshape(-1, columns)
        return -rows if self.least else rows

    def values(self, array: Array) -> Floats:
        """Return the term's part of a tensor as values, in which masked entries are no numbers.

        Args:
            array: The tensor that the term compares, of one batch.

        Returns:
            As :meth:`rows`, with minus infinity for entries beyond ``MASKED`` of ``fill``.
        """
        rows = self.rows(array)
        if self.fill is None:
            return rows
        with np.errstate(invalid="ignore"):
            return np.where(rows / self.fill > MASKED, -np.inf, rows)

    def positions(self, array: Array) -> tuple[int, ...]:
        """Return the lengths of the axes that the rows of :meth:`rows` run over.

        Args:
            array: The tensor that the term compares, of one batch.

        Returns:
            Lengths in the order of the tensor's axes.
        """
        values = self._of_part(array)
        return values.shape[: values.ndim - self._column_axes(values)]

    def _of_part(self, array: Array) -> Array:
        """The term's part of a tensor, with the axes of classes, columns or components last."""
        if self.part is not None:
            part = slice(self.part.start, self.part.stop)
            array = array[(slice(None),) * self.part.axis + (part,)]
        if self.axis is None or array.ndim == 0:
            return array
        axes = (*self.stacked, self.axis)
        return np.moveaxis(array, axes, range(-len(axes), 0))

    def _column_axes(self, array: Array) -> int:
        """Number of axes that hold columns."""
        if self.axis is None or array.ndim == 0:
            return 0
        return 1 + len(self.stacked)


@dataclass(frozen=True, eq=False)
class Objective:
    """All terms, those that are ignored among them; ``notes``: what a reader of the report should know."""

    terms: tuple[Term, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def judged(self) -> tuple[Term, ...]:
        """Terms that are not ignored."""
        return tuple(term for term in self.terms if term.kind != "ignore")

    @property
    def tensors(self) -> list[str]:
        """Tensors that the judged terms read, each named once."""
        return list(dict.fromkeys(term.tensor for term in self.judged))

    def pairs(self, *outputs: Sequence[Array]) -> list[tuple[Array, ...]]:
        """Sort tensors by the terms that compare them.

        Args:
            outputs: For each model (original, pruned) its arrays, in the order of ``tensors``.

        Returns:
            For each judged term, the array of every model.
        """
        place = {name: i for i, name in enumerate(self.tensors)}
        return [tuple(arrays[place[term.tensor]] for arrays in outputs) for term in self.judged]


@dataclass(frozen=True, eq=False)
class Measure:
    """Measured quality of one term.

    ``values``: numbers by name (``agreement``, ``accuracy_before``, ``recall``, ``error_over_variance``, ...), None
    where nothing could be measured; ``classes``: (class, share of the original's decisions, recall) of rare classes,
    worst first; ``columns``: error over variance by column.
    """

    term: str
    output: str
    kind: str
    measure: str
    lost: float
    values: Mapping[str, float | None]
    classes: tuple[tuple[int, float, float], ...] = ()
    columns: tuple[float, ...] = ()
    warnings: tuple[str, ...] = ()


def document(objective: Objective) -> list[Mapping[str, Any]]:
    """Return the JSON form of an objective.

    Args:
        objective: The objective.

    Returns:
        One object per term, ignored terms included.
    """
    return [
        {
            "name": term.name,
            "output": term.output,
            "tensor": term.tensor,
            "part": None
            if term.part is None
            else [term.part.axis, term.part.start, term.part.stop],
            "kind": term.kind,
            "axis": term.axis,
            "stacked": term.stacked,
            "weight": term.weight,
            "threshold": term.threshold,
            "normaliser": term.normaliser,
            "tail": term.tail or None,
            "assumption": term.assumption or None,
            "source": term.source,
            "labelled": term.labelled,
        }
        for term in objective.terms
    ]
