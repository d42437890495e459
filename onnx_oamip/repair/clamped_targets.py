"""Clamped targets: a refit that aims at the outputs behind a clamp, as of Relu, Clip, Min and Max.

All values beyond a bound of a clamp have the same output. With v the original value in front of it, p that of the cut
model, and bounds l and u, the wanted value is therefore

    min(p, l)  where v <= l,      max(p, u)  where v >= u,      v  elsewhere:

a value that has to be beyond a bound may be anywhere beyond it. The squared distance is convex in p, and
majorisation-minimisation decreases it: in every step the wanted values for the present p are the targets of a
least-squares problem, whose Gram matrix is that of the fit to v. Steps are taken as long as the error behind the clamp
falls on held-out rows, first with the ridge strength of the fit to v and then with a tenth of it. The last one is made
on all rows. If no step makes that error smaller, the fit to v stays, or no fit if that error is smaller without.

Between the node and the clamp there may be identities, constants that are added, normalisations with constant
parameters, and the residual sum whose other branch the refit compensates (:mod:`~onnx_oamip.repair.residual_joins`):
then v and p are sums. Factor and shift of every channel on the way are undone in the bounds, which are thus in units of
the node's output; a negative factor swaps them.

In two cases the fit to v always stays. Nodes that share a weight have clamps of their own, or none, and where their
biases differ, their rows are centred by node. A node whose channels are mixed is not fitted to its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from onnx_oamip.core.records import Array, Bools, Floats, Model, Node
from onnx_oamip.graph import chains
from onnx_oamip.graph.ops import Trait, batch_affine, clamp_bounds, has
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.repair.residual_joins import Join
from onnx_oamip.repair.ridge import Regression, RidgeFit, best_shift, blocks

MOST_STEPS = 4
"""Steps on the leading rows."""
LEAST_FALL = 5e-3
"""Fall of the held-out error, relative to it, that a further step is worth."""
WEAKER = 0.1
"""Ridge strength of the last steps, relative to that of the fit to the values in front of the clamp."""

_Step = Callable[[Floats | None, Floats], tuple[Floats | None, Floats]]
"""Changes of the weights and of the bias -> those after a step."""


@dataclass(frozen=True)
class Clamp:
    """A clamp behind a linear node. Its bounds are in units of the node's output.

    Attributes:
        op: Operator, for the report.
        lower: Lower bounds (outputs,), minus infinity where there is none.
        upper: Upper bounds (outputs,), infinity where there is none.
    """

    op: str
    lower: Floats
    upper: Floats

    def bounds(self, values: Floats, kept: Bools) -> Bounds | None:
        """Apply the clamp to sampled values.

        Args:
            values: Original values in front of it, in units of the node's output (groups, rows, outputs).
            kept: Mask of the outputs that the node keeps (outputs,).

        Returns:
            The values with their bounds; None if none of them is beyond its bounds.
        """
        groups, _, outputs = values.shape
        lower, upper = (side[kept].reshape(groups, 1, outputs) for side in (self.lower, self.upper))
        is_beyond = (values.min(axis=1, keepdims=True, initial=np.inf) <= lower) | (
            values.max(axis=1, keepdims=True, initial=-np.inf) >= upper
        )
        return Bounds(values, lower, upper) if is_beyond.any() else None


@dataclass(frozen=True)
class Bounds:
    """Original values at sampled rows, and the bounds beyond which they have no effect.

    Attributes:
        values: Original values in front of the clamp (groups, rows, outputs).
        lower: Lower bounds (groups, 1, outputs).
        upper: Upper bounds (groups, 1, outputs).
    """

    values: Floats
    lower: Floats
    upper: Floats

    def lacking(self, rows: slice, error: Floats) -> Floats:
        """Compute what the values of the cut model lack to the wanted ones.

        Args:
            rows: Some rows.
            error: Original values minus those of the cut model there, in front of the clamp (groups, rows, outputs).

        Returns:
            Wanted values minus those of the cut model (groups, rows, outputs).
        """
        values = self.values[:, rows]
        present = values - error
        below = np.minimum(self.lower - present, 0.0)
        result: Floats = np.where(values <= self.lower, below, error)
        if np.isfinite(self.upper).any():
            above = np.maximum(self.upper - present, 0.0)
            np.copyto(result, above, where=values >= self.upper)
        return result

    def behind(self, rows: slice, error: Floats) -> Floats:
        """Compute the error behind the clamp.

        Args:
            rows: Some rows.
            error: Original values minus those of the cut model there, in front of the clamp (groups, rows, outputs).

        Returns:
            The same difference behind the clamp (groups, rows, outputs).
        """
        values = self.values[:, rows]
        result: Floats = np.clip(values, self.lower, self.upper)
        result -= np.clip(values - error, self.lower, self.upper)
        return result


@dataclass(frozen=True)
class ClampedProblem:
    """Least-squares problem of a node with a clamp behind it.

    Attributes:
        x: Inputs (groups, rows, inputs * taps).
        residual: Original outputs minus those before the fit, in front of the clamp (groups, rows, outputs).
        bounds: Original values with the bounds of the clamp.
        split: Number of leading rows; the others are held out.
    """

    x: Floats
    residual: Floats
    bounds: Bounds
    split: int

    def error(self, change: Floats | None, shift: Floats) -> float:
        """Measure the error behind the clamp on the held-out rows.

        Args:
            change: Change of the weights (groups, inputs * taps, outputs); None for none.
            shift: Change of the bias (groups, outputs).

        Returns:
            Mean square over the rows, summed over groups and outputs.
        """
        count = self.x.shape[1]
        total = 0.0
        for rows in blocks(count, self.split):
            left = self.bounds.behind(
                rows, self.residual[:, rows] - self._fitted(rows, change, shift)
            )
            total += float(np.square(left).sum())
        return float(total / (count - self.split))

    def refined(self, solve: Regression | None, plain: RidgeFit) -> RidgeFit | None:
        """Continue a fit to the outputs of the node as one to the outputs behind the clamp.

        The steps start from that fit or from no fit, whichever has the smaller error behind the clamp on the held-out
        rows.

        Args:
            solve: Solver for the change of the weights; None to change only the bias.
            plain: The fit to the outputs of the node.

        Returns:
            The fit, with errors behind the clamp before it and after it; None where the fit to the outputs of the node
            is the best one there.
        """
        ridge = plain.ridge
        solve = None if ridge is None else solve
        change, shift = self._leading(solve, ridge)
        nothing = np.zeros_like(shift)
        before, least = self.error(None, nothing), self.error(change, shift)
        starts_anew = before <= least
        if starts_anew:
            change, shift, least = None, nothing, before
        chosen = ridge
        taken = steps = 0
        for strength in (ridge,) if ridge is None else (ridge, WEAKER * ridge):
            if steps == MOST_STEPS:
                break
            step = self._step(solve, self.split, strength)
            while steps < MOST_STEPS:
                steps += 1
                found = step(change, shift)
                error = self.error(*found)
                if not error < (1 - LEAST_FALL) * least:
                    break
                (change, shift), least, chosen = found, error, strength
                taken = steps
        if not taken:
            return RidgeFit(None, nothing, None, (before, before)) if starts_anew else None
        final = self._step(solve, self.x.shape[1], chosen)
        return RidgeFit(*final(change, shift), chosen, (before, least))

    def _leading(
        self, solve: Regression | None, ridge: float | None
    ) -> tuple[Floats | None, Floats]:
        """The fit to the outputs of the node on the leading rows."""
        leading = slice(0, self.split)
        means = self.x[:, leading].mean(axis=1), self.residual[:, leading].mean(axis=1)
        change = None if solve is None or ridge is None else solve(self.split, ridge)
        return change, best_shift(*means, change)

    def _step(self, solve: Regression | None, count: int, ridge: float | None) -> _Step:
        """Prepares fits of some leading rows to the values that are wanted in place of the present ones."""
        factored = None if solve is None or ridge is None else solve.factored(count, ridge)

        def wanted(rows: slice, fitted: Floats) -> Floats:
            result = self.bounds.lacking(rows, self.residual[:, rows] - fitted)
            result += fitted
            return result

        def step(change: Floats | None, shift: Floats) -> tuple[Floats | None, Floats]:
            if factored is not None:
                return factored(change, shift, wanted)
            total = np.zeros_like(shift)
            for rows in blocks(count):
                total += wanted(rows, shift[:, None]).sum(axis=1)
            return None, total / count

        return step

    def _fitted(self, rows: slice, change: Floats | None, shift: Floats) -> Floats:
        """Change of the outputs by a fit, at some rows (groups, rows, outputs)."""
        if change is None:
            return shift[:, None]
        fitted: Floats = self.x[:, rows] @ change
        fitted += shift[:, None]
        return fitted


def clamp_behind(model: Model, place: Site, join: Join | None) -> Clamp | None:
    """Find the clamp that alone reads the output of a linear node, also through a residual sum.

    Args:
        model: The original model.
        place: The linear node.
        join: The residual sum whose other branch the refit of the node compensates, if any.

    Returns:
        The clamp; None if there is none, or anything else in between.
    """
    output = place.node.outputs[0]
    shape = model.shapes.get(output)
    if shape is None:
        return None
    axis = place.output_axis % len(shape)
    factor = np.ones(shape[axis])
    shift = np.zeros(shape[axis])
    chain = chains.of_model(model).behind(output)
    for tensor, node in chain:
        if model.shapes.get(node.outputs[0]) != shape:
            return None
        found = clamp_bounds(node, model.constants)
        if found is not None:
            bounds = _narrowed(found, chain, model)
            is_fixed = factor == 0 if join is None else (factor == 0) | (join.gain == 0)
            return _clamp(node.op, bounds, np.where(is_fixed, 0.0, factor), shift)
        affine = _affine(node, tensor, model, axis, join)
        if affine is None:
            return None
        factor, shift = factor * affine[0], shift * affine[0] + affine[1]
    return None


def _narrowed(
    bounds: tuple[float, float], chain: Iterator[tuple[str, Node]], model: Model
) -> tuple[float, float]:
    """Bounds of a clamp and of those right behind it: Max and Min together are one clamp."""
    for _, node in chain:
        found = clamp_bounds(node, model.constants)
        if found is None:
            break
        lower, upper = max(bounds[0], found[0]), min(bounds[1], found[1])
        if not lower < upper:
            break
        bounds = lower, upper
    return bounds


def _affine(
    node: Node, tensor: str, model: Model, axis: int, join: Join | None
) -> tuple[Array | float, Array | float] | None:
    """Factor and shift by which a node maps the channels of a tensor, the other branch of the join left out."""
    if has(node, Trait.IDENTITY):
        return 1.0, 0.0
    if has(node, Trait.BATCH_NORM):
        return batch_affine(node, model.constants) if axis == 1 else None
    if not has(node, Trait.SUM) or len(node.inputs) != 2 or "broadcast" in node.attrs:
        return None
    other = node.inputs[1] if node.inputs[0] == tensor else node.inputs[0]
    if other not in model.constants:
        return (1.0, 0.0) if join is not None and other == join.other else None
    shape = model.shapes[tensor]
    value = model.constants[other].astype(np.float64)
    value = value.reshape((1,) * (len(shape) - value.ndim) + value.shape)
    return (1.0, value.reshape(-1)) if value.size == value.shape[axis] else None


def _clamp(op: str, bounds: tuple[float, float], factor: Floats, shift: Floats) -> Clamp | None:
    """A clamp of ``factor x + shift`` in units of x; None if all its bounds are infinite."""
    usable = factor != 0
    with np.errstate(over="ignore"):
        sides = [(bound - shift) / np.where(usable, factor, 1.0) for bound in bounds]
    lower, upper = np.minimum(*sides), np.maximum(*sides)
    usable &= (lower < np.inf) & (upper > -np.inf)  # False for NaN too
    lower, upper = np.where(usable, lower, -np.inf), np.where(usable, upper, np.inf)
    if not (np.isfinite(lower) | np.isfinite(upper)).any():
        return None
    return Clamp(op, lower, upper)
