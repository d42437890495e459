"""The cross-entropy of a batch as tangent planes, and the other half of the objective.

The loss of an image, ``log sum_k exp(o_k) - o_y``, is convex in the logits o, and they are affine in the program's
variables: it is the greatest of its tangent planes. One epigraph variable an image stands for it; planes are added
where a solution lies below the loss (Kelley 1960), so that every linear solver takes the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import coo_array, csr_array, vstack

from onnx_oamip.core.records import Bools, Floats, Ints
from onnx_oamip.programs.encoder import Encoder
from onnx_oamip.programs.expression import Expression, widen
from onnx_oamip.programs.program import Program, Rows


@dataclass(frozen=True, eq=False)
class Loss:
    """``logits`` (images * classes rows), ``label`` (images,), ``epigraph`` variables (images,), ``weight`` of each."""

    logits: Expression
    label: Ints
    epigraph: Ints
    weight: float

    def outputs(self, values: Floats) -> Floats:
        """Logits (images, classes) at a point."""
        return self.logits.at(values).reshape(len(self.label), -1)

    def losses(self, outputs: Floats) -> Floats:
        """Cross-entropy (..., images) of logits (..., images, classes)."""
        top = outputs.max(axis=-1)
        total = top + np.log(np.exp(outputs - top[..., None]).sum(axis=-1))
        found: Floats = total - outputs[..., np.arange(len(self.label)), self.label]
        return found

    def tangents(self, outputs: Floats, images: Ints, columns: int) -> Rows:
        """Planes that touch the loss of ``images`` at ``outputs`` (all images, classes)."""
        at = outputs[images]
        classes = at.shape[1]
        top = at.max(axis=1, keepdims=True)
        share = np.exp(at - top)
        total = share.sum(axis=1, keepdims=True)
        share /= total
        level = (top + np.log(total))[:, 0] - (share * at).sum(axis=1)
        slope = share.copy()
        slope[np.arange(len(images)), self.label[images]] -= 1
        rows = (images[:, None] * classes + np.arange(classes)).reshape(-1)
        mix = csr_array(
            (slope.reshape(-1), np.arange(slope.size), np.arange(0, slope.size + 1, classes)),
            shape=(len(images), slope.size),
        )
        constant = mix @ self.logits.constant[rows]
        each = coo_array(
            (np.ones(len(images)), (np.arange(len(images)), self.epigraph[images])),
            shape=(len(images), columns),
        )
        matrix = csr_array(each) - mix @ widen(self.logits.matrix, columns)[rows]
        return Rows(csr_array(matrix), level + constant, np.full(len(images), np.inf))


@dataclass(frozen=True, eq=False)
class Reward:
    """What keeping units costs.

    ``layers``: (keep variables' positions, N) of every scored layer; with ``share_cost`` (a cost per keep variable,
    the most that may be kept) the sparsity is a row instead and the objective is the loss alone.
    """

    layers: tuple[tuple[Ints, float], ...]
    share_cost: tuple[Floats, float] | None = None

    def value(self, keep: Floats) -> float:
        """The published sparsity term S: sum of the (m - 1) largest of ``I_l = sum (s - 2) / N_l`` (m layers)."""
        if self.share_cost is not None:
            return 0.0
        found = np.array([float((keep[index] - 2).sum()) / n for index, n in self.layers])
        return float(found.sum() - (found.min() if len(found) > 1 else 0.0))


def objective(
    encoder: Encoder, logits: Expression, label: Ints, weight: float, reward: Reward
) -> tuple[Program, Loss]:
    """``weight * mean loss + S(s)``, S the sum of the (m - 1) largest I_l (one layer: I_1); or the loss and a budget.

    The sum of all but the smallest is ``sum_l I_l + max_l (-I_l)``: one more variable and a row a layer. ``label``
    (rows of the logits,) is -1 where an output has none and does not count.
    """
    classes = logits.rows // len(label)
    used = np.flatnonzero(label >= 0)
    rows = (used[:, None] * classes + np.arange(classes)).reshape(-1)
    epigraph = encoder.variables(len(used), 0.0, np.inf)
    loss = Loss(logits.take(rows), label[used], epigraph, weight / len(used))
    linear: list[tuple[Ints, Floats | float]] = [(epigraph, loss.weight)]
    offset = 0.0
    if reward.share_cost is not None:
        cost, most = reward.share_cost
        encoder.builder.rows(1, (np.zeros(len(cost), np.int64), encoder.keep, cost), upper=most)
    else:
        linear += [(encoder.keep[index], 1 / n) for index, n in reward.layers]
        offset = float(sum(-2 * len(index) / n for index, n in reward.layers))
        if len(reward.layers) > 1:
            linear.append((_least(encoder, reward.layers), 1.0))
    program = encoder.program()
    total = np.zeros(program.n_variables)
    for index, value in linear:
        np.add.at(total, index, value)
    return replace(program, objective=total, offset=offset), loss


def _least(encoder: Encoder, layers: Sequence[tuple[Ints, float]]) -> Ints:
    """A variable that is at least every -I_l."""
    top = encoder.variables(1, -np.inf, np.inf)

    def step(values: Floats) -> None:
        values[top] = max(float((2 - values[encoder.keep[i]]).sum()) / n for i, n in layers)

    encoder.steps.append(step)
    for index, n in layers:
        each = np.zeros(len(index) + 1, np.int64)
        column = np.append(encoder.keep[index], top)
        encoder.builder.rows(
            1, (each, column, np.append(np.full(len(index), 1 / n), 1.0)), lower=2 * len(index) / n
        )
    return top


@dataclass(eq=False)
class Incumbent:
    """The best point known to satisfy everything, with its true objective."""

    values: Floats | None = None
    objective: float = np.inf


class Separation:
    """Cuts at a point: ranges it leaves and tangents it lies below. Remembers the best feasible point on the way.

    ``accuracy``: what missing planes may hide, relative to the objective. ``room``: most range rows of one round.
    """

    def __init__(
        self, program: Program, loss: Loss, pending: Rows, accuracy: float, room: int = 150
    ) -> None:
        self.program = program
        self.loss = loss
        self.pending = pending
        self.accuracy = accuracy
        self.room = room
        self.best = Incumbent()
        self.added = np.zeros((2, pending.count), bool)

    def violated(self, values: Floats) -> float:
        """The largest violation of the range rows."""
        held = self.pending.matrix @ values
        parts = (self.pending.lower - held, held - self.pending.upper)
        return max(0.0, *(float(p.max(initial=0.0)) for p in parts))

    def truth(self, values: Floats) -> tuple[Floats, float]:
        """The point with its epigraph variables on the loss, and its objective."""
        point = values.copy()
        point[self.loss.epigraph] = self.loss.losses(self.loss.outputs(values))
        return point, self.program.value(point)

    def offer(self, values: Floats) -> bool:
        """Take a point as the incumbent where it is better; it must satisfy all rows but tangents."""
        point, value = self.truth(values)
        if value < self.best.objective:
            self.best = Incumbent(point, value)
            return True
        return False

    def cuts(self, values: Floats, relaxed: Bools | None = None) -> Rows | None:
        """Rows that the point violates. ``relaxed`` marks integer variables whose value may be fractional here."""
        columns = self.program.n_variables
        moved = None
        if relaxed is None or not relaxed.any():
            if self.violated(values) <= ACCEPTED:
                self.offer(values)
            elif not self.program.integer.any() or relaxed is None:
                moved = self._towards(values)
        outputs = self.loss.outputs(values)
        gap = self.loss.losses(outputs) - values[self.loss.epigraph]
        below = np.flatnonzero(gap > self._tolerance(values))
        blocks = [self._ranges(values)]
        if len(below):
            blocks.append(self.loss.tangents(outputs, below, columns))
            if moved is not None:
                blocks.append(
                    self.loss.tangents(
                        self.loss.outputs(moved), np.arange(len(self.loss.label)), columns
                    )
                )
        blocks = [b for b in blocks if b.count]
        return stack(blocks) if blocks else None

    def _tolerance(self, values: Floats) -> float:
        """Least gap of one image that is worth a plane."""
        scale = min(abs(self.program.value(values)), abs(self.truth(values)[1]))
        return max(self.accuracy * scale, self.accuracy * FEASIBLE) / (
            self.loss.weight * len(self.loss.label)
        )

    def _ranges(self, values: Floats) -> Rows:
        """The most violated range rows, one-sided, each once."""
        held = self.pending.matrix @ values
        excess = np.stack([self.pending.lower - held, held - self.pending.upper])
        excess[self.added] = 0.0
        order = np.argsort(-excess, axis=None)[: self.room]
        side, row = np.unravel_index(order[excess.reshape(-1)[order] > FEASIBLE], excess.shape)
        self.added[side, row] = True
        low = np.where(side == 0, self.pending.lower[row], -np.inf)
        high = np.where(side == 1, self.pending.upper[row], np.inf)
        return Rows(csr_array(self.pending.matrix[row]), low, high)

    def _towards(self, values: Floats) -> Floats | None:
        """The best point between the incumbent and ``values`` that keeps all ranges."""
        start = self.best.values
        if start is None or self.program.integer.any():
            return None
        held, change = self.pending.matrix @ start, self.pending.matrix @ (values - start)
        with np.errstate(divide="ignore", invalid="ignore"):
            up = np.where(change > 0, (self.pending.upper - held) / change, np.inf)
            down = np.where(change < 0, (self.pending.lower - held) / change, np.inf)
        far = float(np.clip(np.minimum(up, down).min(initial=1.0), 0.0, 1.0))
        shares = np.linspace(0, far, SEARCH + 1)[1:]
        first, last = self.loss.outputs(start), self.loss.outputs(values)
        outputs = first + shares[:, None, None] * (last - first)
        rest = self.program.objective.copy()
        rest[self.loss.epigraph] = 0.0
        linear = rest @ start + shares * (rest @ (values - start))
        total = linear + self.loss.weight * self.loss.losses(outputs).sum(axis=-1)
        point: Floats = start + shares[int(total.argmin())] * (values - start)
        self.offer(point)
        return point


FEASIBLE = 1e-6
"""Rows are added for violations above this, the solvers' own tolerance."""
ACCEPTED = 1e-5
"""A point that violates no row by more is a solution: solvers scale rows, and stay within their tolerance there."""
SEARCH = 32
"""Points of the line search between the incumbent and a relaxation's solution."""


def stack(blocks: Sequence[Rows]) -> Rows:
    """Several blocks of rows as one."""
    return Rows(
        csr_array(vstack([b.matrix for b in blocks], format="csr")),
        np.concatenate([b.lower for b in blocks]),
        np.concatenate([b.upper for b in blocks]),
    )
