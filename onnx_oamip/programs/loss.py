"""Cross-entropy of a batch as tangent planes, and the sparsity term of the objective.

The loss of a sample, ``log sum_k exp(o_k) - o_y``, is convex in the logits o, and the logits are affine in the
variables of the program: the loss is the greatest of its tangent planes. One epigraph variable per sample represents
it; planes are added where a solution lies below the loss, so that every linear solver takes the program. With several
classification heads every head has its own loss of a sample, and the objective has their weighted sum.

Source: Kelley, "The cutting-plane method for solving convex programs", 1960.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array, csr_array, vstack

from onnx_oamip.core.records import Bools, Floats, Ints
from onnx_oamip.programs.encoder import Encoder
from onnx_oamip.programs.expression import Expression, concatenate, widen
from onnx_oamip.programs.program import Program, Rows

FEASIBLE = 1e-6
"""Violation above which a row is added: the solvers' own tolerance."""
ACCEPTED = 1e-5
"""Largest violation of a solution. It is above the solvers' tolerance because they scale rows."""
LINE_SEARCH_POINTS = 32
"""Points of the line search between the incumbent and the solution of a relaxation."""
MAX_RANGE_ROWS = 150
"""Range rows that one round adds."""


ABSENT = -1e30
"""Logit of a class that a head does not have: heads of several sizes stand in one array."""


class Head(NamedTuple):
    """A classification head.

    Attributes:
        logits: Expression with (outputs * classes) rows.
        label: Class of each output (outputs,), -1 for outputs that do not count.
        weight: Weight of the head's mean loss beside the other heads'.
    """

    logits: Expression
    label: Ints
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Loss:
    """Cross-entropy over the variables of a program. A sample stands here for one head on one sample.

    Attributes:
        logits: Expression with (samples * classes) rows.
        label: Class of each sample (samples,).
        epigraph: Index of the variable that stands for the loss of each sample (samples,).
        weight: Weight of each sample in the objective (samples,).
    """

    logits: Expression
    label: Ints
    epigraph: Ints
    weight: Floats

    def equal_logits(self) -> Floats:
        """Return the logits at which all classes that a head has are equally probable.

        Returns:
            Logits (samples, classes): zeros, and ``ABSENT`` for classes that a head does not have.
        """
        absent = self.logits.constant == ABSENT
        return np.where(absent, ABSENT, 0.0).reshape(len(self.label), -1)

    def outputs(self, values: Floats) -> Floats:
        """Compute the logits at a point.

        Args:
            values: Variables of the program (variables,).

        Returns:
            Logits (samples, classes).
        """
        return self.logits.at(values).reshape(len(self.label), -1)

    def losses(self, outputs: Floats) -> Floats:
        """Compute the cross-entropy of logits.

        Args:
            outputs: Logits (..., samples, classes).

        Returns:
            Loss of each sample (..., samples).
        """
        largest = outputs.max(axis=-1)
        shifted = np.exp(outputs - largest[..., None])
        log_sum = largest + np.log(shifted.sum(axis=-1))
        samples = np.arange(len(self.label))
        result: Floats = log_sum - outputs[..., samples, self.label]
        return result

    def tangents(self, outputs: Floats, images: Ints, columns: int) -> Rows:
        """Build the tangent planes of some samples.

        Args:
            outputs: Logits of all samples (samples, classes) at which the planes touch the loss.
            images: Indices of the samples (n,).
            columns: Number of variables of the program.

        Returns:
            One row per sample, ``epigraph >= plane``.
        """
        logits = outputs[images]
        count, classes = logits.shape
        largest = logits.max(axis=1, keepdims=True)
        probability = np.exp(logits - largest)
        total = probability.sum(axis=1, keepdims=True)
        probability /= total
        log_sum = (largest + np.log(total))[:, 0]
        level = log_sum - (probability * logits).sum(axis=1)
        slope = probability.copy()
        slope[np.arange(count), self.label[images]] -= 1
        # One row per plane, whose columns are the logits of its sample.
        row_starts = np.arange(0, slope.size + 1, classes)
        mix = csr_array(
            (slope.reshape(-1), np.arange(slope.size), row_starts), shape=(count, slope.size)
        )
        rows = (images[:, None] * classes + np.arange(classes)).reshape(-1)
        constant = mix @ self.logits.constant[rows]
        epigraph = coo_array(
            (np.ones(count), (np.arange(count), self.epigraph[images])), shape=(count, columns)
        )
        matrix = csr_array(epigraph) - mix @ widen(self.logits.matrix, columns)[rows]
        return Rows(csr_array(matrix), level + constant, np.full(count, np.inf))


class ScoredLayer(NamedTuple):
    """A layer of the sparsity term: ``I = sum (s - 2) / divisor`` over its keep variables.

    Attributes:
        keep: Positions among the keep variables (units,).
        divisor: Number of units of the layer; with the published program times the kernel size.
    """

    keep: Ints
    divisor: float


class CostBudget(NamedTuple):
    """Upper bound on the cost of the kept units.

    Attributes:
        cost: Cost of each keep variable (keep variables,).
        limit: Largest sum of costs, in the same unit.
    """

    cost: Floats
    limit: float


@dataclass(frozen=True, eq=False)
class Sparsity:
    """Price of keeping units.

    Attributes:
        layers: Layers of the published sparsity term.
        budget: A budget in place of the sparsity term: the objective is then the loss alone.
    """

    layers: tuple[ScoredLayer, ...]
    budget: CostBudget | None = None

    def value(self, keep: Floats) -> float:
        """Evaluate the published sparsity term.

        Args:
            keep: Keep variables (keep variables,).

        Returns:
            Sum of the (m - 1) largest ``I`` of m layers, of the only one if m is 1, or 0 under a budget.
        """
        if self.budget is not None:
            return 0.0
        terms = []
        for positions, divisor in self.layers:
            terms.append(float((keep[positions] - 2).sum()) / divisor)
        smallest = min(terms) if len(terms) > 1 else 0.0
        return float(np.array(terms).sum() - smallest)


def objective(
    encoder: Encoder,
    heads: Sequence[Head],
    *,
    weight: float,
    sparsity: Sparsity,
) -> tuple[Program, Loss]:
    """Add the objective ``weight * sum of mean losses + S(s)``, or the weighted losses alone under a budget.

    S is the sum of the (m - 1) largest of the m layer terms I_l, which is ``sum_l I_l + max_l (-I_l)``: one more
    variable and one row per layer.

    Args:
        encoder: Encoder of the program, with all layers stated.
        heads: Classification heads, each with an output that counts.
        weight: Weight of the losses.
        sparsity: Sparsity term or budget.

    Returns:
        The complete program and its loss.
    """
    most_classes = max(head.logits.rows // len(head.label) for head in heads)
    logits = []
    labels = []
    weights = []
    for head in heads:
        counted = np.flatnonzero(head.label >= 0)
        logits.append(_padded(head, counted, most_classes))
        labels.append(head.label[counted])
        weights.append(np.full(len(counted), weight * head.weight / len(counted)))
    label = np.concatenate(labels)
    epigraph = encoder.variables(len(label), 0.0, np.inf, kind="loss")
    loss = Loss(
        logits=concatenate(logits),
        label=label,
        epigraph=epigraph,
        weight=np.concatenate(weights),
    )
    linear: list[tuple[Ints, Floats | float]] = [(epigraph, loss.weight)]
    offset = 0.0
    if sparsity.budget is not None:
        cost, limit = sparsity.budget
        first_row = np.zeros(len(cost), np.int64)
        encoder.builder.rows(1, (first_row, encoder.keep, cost), upper=limit)
    else:
        for positions, divisor in sparsity.layers:
            linear.append((encoder.keep[positions], 1 / divisor))
        offset = float(sum(-2 * len(keep) / divisor for keep, divisor in sparsity.layers))
        if len(sparsity.layers) > 1:
            linear.append((_largest_negative(encoder, sparsity.layers), 1.0))
    program = encoder.program()
    coefficients = np.zeros(program.n_variables)
    for variables, coefficient in linear:
        np.add.at(coefficients, variables, coefficient)
    return replace(program, objective=coefficients, offset=offset), loss


def _padded(head: Head, counted: Ints, classes: int) -> Expression:
    """The logits of some outputs of a head, with absent ones up to a number of classes."""
    own = head.logits.rows // len(head.label)
    rows = (counted[:, None] * own + np.arange(own)).reshape(-1)
    logits = head.logits.take(rows)
    if own == classes:
        return logits
    absent = Expression.of(np.full(len(counted) * (classes - own), ABSENT))
    places = [
        np.arange(logits.rows).reshape(len(counted), own),
        logits.rows + np.arange(absent.rows).reshape(len(counted), classes - own),
    ]
    return concatenate([logits, absent]).take(np.concatenate(places, axis=1).reshape(-1))


def _largest_negative(encoder: Encoder, layers: Sequence[ScoredLayer]) -> Ints:
    """A variable that is at least every -I_l."""
    top = encoder.variables(1, -np.inf, np.inf, kind="sparsity")

    def step(values: Floats) -> None:
        negatives = []
        for positions, divisor in layers:
            removed = 2 - values[encoder.keep[positions]]
            negatives.append(float(removed.sum()) / divisor)
        values[top] = max(negatives)

    encoder.steps.append(step)
    for positions, divisor in layers:
        units = len(positions)
        column = np.append(encoder.keep[positions], top)
        weight = np.append(np.full(units, 1 / divisor), 1.0)
        first_row = np.zeros(units + 1, np.int64)
        encoder.builder.rows(1, (first_row, column, weight), lower=2 * units / divisor)
    return top


@dataclass(eq=False)
class Incumbent:
    """Best point known to satisfy all constraints, with its true objective."""

    values: Floats | None = None
    objective: float = np.inf


class Separation:
    """Finds cuts at a point: violated range rows and tangent planes. Keeps the best feasible point on the way."""

    def __init__(
        self,
        program: Program,
        loss: Loss,
        pending: Rows,
        accuracy: float,
    ) -> None:
        """Start without an incumbent.

        Args:
            program: Program without its cuts.
            loss: Loss of the program.
            pending: Range rows, added as soon as a point violates them.
            accuracy: Error relative to the objective that missing planes may cause.
        """
        self.program = program
        self.loss = loss
        self.pending = pending
        self.accuracy = accuracy
        self.best = Incumbent()
        # By side (lower, upper) and range row: whether a round has added it.
        self.added = np.zeros((2, pending.count), bool)

    def range_violation(self, values: Floats) -> float:
        """Measure the largest violation of the range rows.

        Args:
            values: Variables of the program (variables,).

        Returns:
            Largest violation, 0 if all hold.
        """
        return max(0.0, *(float(side.max(initial=0.0)) for side in self._excess(values)))

    def _excess(self, values: Floats) -> tuple[Floats, Floats]:
        """Amounts by which range rows are violated below and above; negative if they hold."""
        activity = self.pending.matrix @ values
        return self.pending.lower - activity, activity - self.pending.upper

    def on_loss(self, values: Floats) -> tuple[Floats, float]:
        """Move a point onto the loss.

        Args:
            values: Variables of the program (variables,).

        Returns:
            The point with the true losses as epigraph variables, and its objective.
        """
        point = values.copy()
        point[self.loss.epigraph] = self.loss.losses(self.loss.outputs(values))
        return point, self.program.value(point)

    def offer(self, values: Floats) -> bool:
        """Take a point as the incumbent if it is better.

        Args:
            values: A point (variables,) that satisfies all rows except tangents.

        Returns:
            True if the point became the incumbent.
        """
        point, value = self.on_loss(values)
        if value < self.best.objective:
            self.best = Incumbent(point, value)
            return True
        return False

    def cuts(self, values: Floats, relaxed: Bools | None = None) -> Rows | None:
        """Find rows that a point violates. A feasible point is offered as the incumbent.

        Args:
            values: Variables of the program (variables,).
            relaxed: Boolean per variable, true for integer variables that may be fractional at this point.

        Returns:
            Violated range rows and tangent planes, or None if there are none.
        """
        columns = self.program.n_variables
        moved = None
        if relaxed is None or not relaxed.any():
            if self.range_violation(values) <= ACCEPTED:
                self.offer(values)
            else:
                moved = self._line_search(values)
        outputs = self.loss.outputs(values)
        gap = self.loss.losses(outputs) - values[self.loss.epigraph]
        below = np.flatnonzero(gap > self._tolerance(values))
        blocks = [self._violated_ranges(values)]
        if len(below):
            blocks.append(self.loss.tangents(outputs, below, columns))
            if moved is not None:
                images = np.arange(len(self.loss.label))
                blocks.append(self.loss.tangents(self.loss.outputs(moved), images, columns))
        blocks = [block for block in blocks if block.count]
        return stack(blocks) if blocks else None

    def _tolerance(self, values: Floats) -> float:
        """Smallest gap of one sample that is worth a plane."""
        scale = min(abs(self.program.value(values)), abs(self.on_loss(values)[1]))
        allowed = max(self.accuracy * scale, self.accuracy * FEASIBLE)
        return allowed / float(self.loss.weight.sum())

    def _violated_ranges(self, values: Floats) -> Rows:
        """The most violated range rows, one-sided, each once."""
        excess = np.stack(self._excess(values))
        excess[self.added] = 0.0
        largest = np.argsort(-excess, axis=None, kind="stable")[:MAX_RANGE_ROWS]
        violated = largest[excess.reshape(-1)[largest] > FEASIBLE]
        side, row = np.unravel_index(violated, excess.shape)
        self.added[side, row] = True
        lower = np.where(side == 0, self.pending.lower[row], -np.inf)
        upper = np.where(side == 1, self.pending.upper[row], np.inf)
        return Rows(csr_array(self.pending.matrix[row]), lower, upper)

    def _line_search(self, values: Floats) -> Floats | None:
        """The best point between the incumbent and ``values`` that satisfies all range rows.

        It is offered as the incumbent. None without an incumbent, or with integer variables, which would be fractional
        between two points.
        """
        start = self.best.values
        if start is None or self.program.integer.any():
            return None
        direction = values - start
        steps = np.linspace(0, self._longest_step(start, direction), LINE_SEARCH_POINTS + 1)[1:]
        first = self.loss.outputs(start)
        last = self.loss.outputs(values)
        outputs = first + steps[:, None, None] * (last - first)
        rest = self.program.objective.copy()
        rest[self.loss.epigraph] = 0.0
        linear = rest @ start + steps * (rest @ direction)
        total = linear + self.loss.losses(outputs) @ self.loss.weight
        point: Floats = start + steps[int(total.argmin())] * direction
        self.offer(point)
        return point

    def _longest_step(self, start: Floats, direction: Floats) -> float:
        """Largest share in [0, 1] of a direction that violates no range row."""
        activity = self.pending.matrix @ start
        change = self.pending.matrix @ direction
        with np.errstate(divide="ignore", invalid="ignore"):
            to_upper = np.where(change > 0, (self.pending.upper - activity) / change, np.inf)
            to_lower = np.where(change < 0, (self.pending.lower - activity) / change, np.inf)
        nearest = np.minimum(to_upper, to_lower).min(initial=1.0)
        return float(np.clip(nearest, 0.0, 1.0))


def stack(blocks: Sequence[Rows]) -> Rows:
    """Concatenate blocks of rows.

    Args:
        blocks: At least one block, all over the same variables.

    Returns:
        The rows of all blocks as one.
    """
    return Rows(
        csr_array(vstack([block.matrix for block in blocks], format="csr")),
        np.concatenate([block.lower for block in blocks]),
        np.concatenate([block.upper for block in blocks]),
    )
