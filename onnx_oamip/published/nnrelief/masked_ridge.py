"""Ridge regression in which every output has inputs of its own: the refit of kept connections.

Per output o with the set S of its inputs,

    minimise  sum_rows |r_o - x_S d - b|^2 + strength |d|^2     over d and b,

where r is the difference to the original's output. Outputs with sets of similar size are solved together; where a layer
is too wide for that, all of its outputs at once by conjugate gradients.
"""

from __future__ import annotations

import numpy as np

from onnx_oamip.core.records import Bools, Floats
from onnx_oamip.repair.ridge import Solve, normal_equations

GATHERED = 1 << 23
"""Most values of the small Gram matrices that are held at a time."""
ROUNDS = 60
"""Most iterations of conjugate gradients."""
PRECISION = 1e-5
"""Residual, relative to the right side, at which conjugate gradients stop."""
DEARER = 5.0
"""Time of an operation on many small matrices, in operations on a large one."""


def masked_solver(
    x: Floats,
    residual: Floats,
    split: int,
    support: Bools,
) -> Solve:
    """Prepare the regression of the residuals of a layer.

    Args:
        x: Inputs (groups, rows, d).
        residual: Differences to the wanted outputs (groups, rows, outputs).
        split: Number of leading rows that a ridge is chosen with.
        support: Inputs of each output (groups, outputs, d).

    Returns:
        Solver for the leading rows or for all rows.
    """
    normal = normal_equations(x, residual, split)

    def solve(count: int, ridge: float) -> Floats:
        by_group = zip(*normal[count], support, strict=True)
        return np.stack([solve_masked(gram, cross, own, ridge) for gram, cross, own in by_group])

    return solve


def solve_masked(
    gram: Floats,
    cross: Floats,
    support: Bools,
    ridge: float,
) -> Floats:
    """Solve the regressions of all outputs of a group.

    Args:
        gram: Centred Gram matrix G of the inputs (d, d).
        cross: Centred right sides C (d, outputs).
        support: Inputs of each output (outputs, d).
        ridge: Strength of the ridge, relative to the mean diagonal of G.

    Returns:
        ``(G_SS + strength I)^-1 C_So`` at the inputs S of each output o, 0 elsewhere (d, outputs).
    """
    diagonal = np.diagonal(gram)
    strength = ridge * float(diagonal.mean()) + 1e-12 * float(diagonal.max(initial=0.0)) + 1e-300
    sizes = support.sum(axis=1)
    direct = DEARER * float((sizes.astype(np.float64) ** 3).sum()) / 3
    iterative = ROUNDS * cross.size * len(gram)
    if direct > iterative:
        return _conjugate_gradients(gram, cross, support, strength)

    result = np.zeros_like(cross)
    inputs_first = np.argsort(~support, axis=1, kind="stable")
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    while len(order):
        width = int(sizes[order[0]])
        # Outputs are padded to the largest set of their batch.
        batch, order = np.split(order, [max(1, GATHERED // width**2)])
        columns = inputs_first[batch, :width]
        own = np.arange(width) < sizes[batch][:, None]
        both_own = own[:, :, None] & own[:, None, :]
        gathered = gram[columns[:, :, None], columns[:, None, :]]
        matrices = np.where(both_own, gathered, 0.0)
        matrices[:, np.arange(width), np.arange(width)] += strength
        right = np.where(own, cross[columns, batch[:, None]], 0.0)
        solutions = np.linalg.solve(matrices, right[..., None])[..., 0]
        outputs = np.broadcast_to(batch[:, None], columns.shape)
        result[columns[own], outputs[own]] = solutions[own]
    return result


def _conjugate_gradients(
    gram: Floats,
    cross: Floats,
    support: Bools,
    strength: float,
) -> Floats:
    """The same by conjugate gradients with the diagonal as preconditioner, for all outputs at once."""
    own = support.T
    preconditioner = 1 / (np.diagonal(gram)[:, None] + strength)
    residual = np.where(own, cross, 0.0)
    result = np.zeros_like(residual)
    scaled = preconditioner * residual
    direction = scaled.copy()
    energy = (residual * scaled).sum(axis=0)
    enough = PRECISION**2 * energy
    for _ in range(ROUNDS):
        if (energy <= enough).all():
            break
        image = np.where(own, gram @ direction, 0.0) + strength * direction
        curvature = (direction * image).sum(axis=0)
        length = _ratio(energy, curvature)
        result += length * direction
        residual -= length * image
        scaled = preconditioner * residual
        new_energy = (residual * scaled).sum(axis=0)
        direction = scaled + _ratio(new_energy, energy) * direction
        energy = new_energy
    return result


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """The ratio where the denominator is positive, 0 elsewhere."""
    positive = denominator > 0
    return np.where(positive, numerator / np.where(positive, denominator, 1.0), 0.0)
