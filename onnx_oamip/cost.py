"""MACs, parameters and bytes as sums of products of axis lengths, evaluated for any widths at once.

A factor may be the sum of several lengths (a recurrent node reads its input and its own output at every step).

MACs are the multiply-accumulates of linear operators for one sample at the calibration shapes and nothing else, those
of branches and bodies of loops counted as if each ran once; params are the elements of floating constants; bytes is the
size of the file with its external data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from .ops import Total, lookup
from .records import Axis, Cost, Coupling, Ints, Model
from .weights import size


@dataclass(frozen=True)
class Products:
    """A sum of ``factor * product of axis lengths``; ``axes`` (terms, width) is padded with -1 (a length of 1)."""

    factor: Ints
    axes: Ints


@dataclass(frozen=True)
class Ledger:
    """Costs as a function of group widths: the length of axis i is ``fixed[i] + (per_unit @ widths)[i]``."""

    fixed: Ints
    per_unit: csr_array
    macs: Products
    params: Products
    bytes: Products
    overhead: int
    batch: int
    nodes: tuple[str, ...]

    def lengths(self, widths: Ints) -> Ints:
        """Axis lengths, with a trailing 1 for the padding index -1."""
        return np.append(self.fixed + self.per_unit @ np.asarray(widths, np.int64), 1)

    def cost(self, widths: Ints) -> Cost:
        """Costs when group g keeps ``widths[g]`` units."""
        lengths = self.lengths(widths)
        return Cost(
            macs=int(self.terms(self.macs, lengths).sum()) // self.batch,
            params=int(self.terms(self.params, lengths).sum()),
            bytes=int(self.terms(self.bytes, lengths).sum()) + self.overhead,
        )

    @staticmethod
    def terms(products: Products, lengths: Ints) -> Ints:
        """Value of every term."""
        values: Ints = products.factor * lengths[products.axes].prod(axis=1)
        return values


def ledger(model: Model, coupling: Coupling) -> Ledger:
    """The cost functions of a model under a coupling."""
    index: dict[Axis | Total, int] = {}
    macs = []
    names = []
    for node in model.every:
        spec = lookup(node.domain, node.op, node.version)
        if spec and spec.cost and all(n in model.shapes for n in (*node.inputs[:2], *node.outputs) if n):
            macs.append([index.setdefault(a, len(index)) for a in spec.cost(node, model.shapes)])
            names.append(node.name)
    floats = [n for n in model.constants if is_float(model.dtypes[n])]
    constants = {
        n: [index.setdefault((n, a), len(index)) for a in range(len(model.shapes[n]))] for n in model.constants
    }
    params = [constants[n] for n in floats]
    sizes = np.asarray([model.dtypes[n].itemsize for n in constants], np.int64)

    rows, columns, values = [], [], []
    fixed = np.zeros(len(index), np.int64)
    on: dict[Axis, list[int]] = {}
    for length, i in index.items():
        axes, number = _sum(length)
        fixed[i] = number + sum(model.shapes[t][a] for t, a in axes)
        for axis in axes:
            on.setdefault(axis, []).append(i)
    for g, group in enumerate(coupling.groups):
        for axis, held in group.multiplicity.items():
            for i in on.get(axis, ()):
                rows.append(i)
                columns.append(g)
                values.append(held)
                fixed[i] -= held * len(group.units)
    shape = (len(index), len(coupling.groups))
    per_unit = csr_array((np.asarray(values, np.int64), (rows, columns)), shape=shape)
    held_bytes = sum(model.constants[n].nbytes for n in model.constants)
    return Ledger(
        fixed=fixed,
        per_unit=per_unit,
        macs=_products(macs, np.ones(len(macs), np.int64)),
        params=_products(params, np.ones(len(params), np.int64)),
        bytes=_products(list(constants.values()), sizes),
        overhead=max(size(model.proto) - held_bytes, 0),
        batch=model.batch,
        nodes=tuple(names),
    )


def _sum(length: Axis | Total) -> Total:
    """The axes whose lengths are added up, and what is added to them."""
    first, second = length
    return (((first, second),), 0) if isinstance(first, str) else (first, second)


def count(model: Model) -> Cost:
    """Costs of a model as it stands; ``bytes`` is that of its normalised graph."""
    nothing = Coupling(0, (), np.zeros(0, np.int64), {}, (), ())
    return ledger(model, nothing).cost(np.zeros(0, np.int64))


def _products(terms: Sequence[Sequence[int]], factor: Ints) -> Products:
    width = max((len(t) for t in terms), default=1) or 1
    axes = np.full((len(terms), width), -1, np.int64)
    for i, term in enumerate(terms):
        axes[i, : len(term)] = term
    return Products(factor, axes)


def is_float(dtype: np.dtype[np.generic]) -> bool:
    """Floating-point, with the extension types (bfloat16, float8) that numpy itself does not know."""
    return np.issubdtype(dtype, np.inexact) or "float" in dtype.name


def full_widths(coupling: Coupling) -> Ints:
    """Width of every group before pruning."""
    return np.asarray([len(g.units) for g in coupling.groups], np.int64)
