"""Least squares where every output may use inputs of its own: the refit of surviving connections.

Per output o with the set S of inputs that still reach it,

    minimise  sum_rows |r_o - x_S d - b|^2 + strength |d|^2     over d and b,

where r is what the layer still lacks of the original's output. Outputs with sets of like size are solved together;
where a layer is too wide for that, all of its outputs at once by conjugate gradients.
"""

from __future__ import annotations

import numpy as np

from onnx_oamip.core.records import Bools, Floats
from onnx_oamip.repair.ridge import Solve, normal_equations

GATHERED = 1 << 23
"""Values of the small Gram matrices that are held at a time."""
ROUNDS = 60
PRECISION = 1e-5
"""Conjugate gradients stop at this residual, relative to the right side."""
DEARER = 5.0
"""What an operation on many small matrices takes, in operations on a large one."""


def supported(x: Floats, residual: Floats, split: int, support: Bools) -> Solve:
    """Ridge regression of ``residual`` (groups, rows, outputs) on ``x`` (groups, rows, d), centred, under ``support``
    (groups, outputs, d)."""
    normal = normal_equations(x, residual, split)

    def solve(count: int, ridge: float) -> Floats:
        gram, cross = normal[count]
        return np.stack(
            [solve_supported(g, c, s, ridge) for g, c, s in zip(gram, cross, support, strict=True)]
        )

    return solve


def solve_supported(gram: Floats, cross: Floats, support: Bools, ridge: float) -> Floats:
    """(d, outputs): per output o ``(G_SS + strength I)^-1 C_So`` at the inputs S of ``support`` (outputs, d), else 0.

    ``strength`` is ``ridge`` times the mean diagonal of G (d, d).
    """
    diagonal = np.diagonal(gram)
    strength = ridge * float(diagonal.mean()) + 1e-12 * float(diagonal.max(initial=0.0)) + 1e-300
    sizes = support.sum(axis=1)
    if DEARER * float((sizes.astype(np.float64) ** 3).sum()) / 3 > ROUNDS * cross.size * len(gram):
        return _gradients(gram, cross, support, strength)
    result = np.zeros_like(cross)
    members = np.argsort(~support, axis=1, kind="stable")
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    while len(order):
        width = int(sizes[order[0]])
        batch, order = np.split(order, [max(1, GATHERED // width**2)])
        columns = members[batch, :width]
        inside = np.arange(width) < sizes[batch][:, None]
        part = np.where(
            inside[:, :, None] & inside[:, None, :],
            gram[columns[:, :, None], columns[:, None, :]],
            0.0,
        )
        part[:, np.arange(width), np.arange(width)] += strength
        right = np.where(inside, cross[columns, batch[:, None]], 0.0)
        found = np.linalg.solve(part, right[..., None])[..., 0]
        result[columns[inside], np.broadcast_to(batch[:, None], columns.shape)[inside]] = found[
            inside
        ]
    return result


def _gradients(gram: Floats, cross: Floats, support: Bools, strength: float) -> Floats:
    """The same by conjugate gradients with the diagonal as preconditioner, for all outputs at once."""
    inside = support.T
    scale = 1 / (np.diagonal(gram)[:, None] + strength)
    left = np.where(inside, cross, 0.0)
    result = np.zeros_like(left)
    turned = scale * left
    step = turned.copy()
    energy = (left * turned).sum(axis=0)
    enough = PRECISION**2 * energy
    for _ in range(ROUNDS):
        if (energy <= enough).all():
            break
        image = np.where(inside, gram @ step, 0.0) + strength * step
        curvature = (step * image).sum(axis=0)
        length = np.where(curvature > 0, energy / np.where(curvature > 0, curvature, 1.0), 0.0)
        result += length * step
        left -= length * image
        turned = scale * left
        fresh = (left * turned).sum(axis=0)
        step = turned + np.where(energy > 0, fresh / np.where(energy > 0, energy, 1.0), 0.0) * step
        energy = fresh
    return result
