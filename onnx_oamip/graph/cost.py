"""MACs, parameters and bytes as sums of products of axis lengths, evaluated for any widths at once.

A factor may be the sum of several lengths (a recurrent node reads its input and its own output at every step).

MACs are the multiply-accumulates of linear operators for one sample at the calibration shapes and nothing else, those
of branches and bodies of loops counted as if each ran once; params are the elements of floating constants; bytes is the
size of the file with its external data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import csr_array

from onnx_oamip.core.records import (
    Array,
    Axis,
    Bools,
    Cost,
    Coupling,
    Ints,
    Model,
)
from onnx_oamip.graph.external_data import size
from onnx_oamip.graph.ops import Total, lookup, rule_errors
from onnx_oamip.graph.ops.inserted_nodes import (
    Names,
    Present,
    scale,
    spread,
)

INDEX = 4
"""Bytes of an index that says where a kept channel is."""


@dataclass(frozen=True)
class Products:
    """A sum of ``factor * product of axis lengths``; ``axes`` (terms, width) is padded with -1 (a length of 1)."""

    factor: Ints
    axes: Ints


@dataclass(frozen=True, eq=False)
class Steps:
    """What is added as soon as one of several groups is cut at all: the nodes that put zeros back, or scale a mean.

    Step s comes where a group g of ``members`` (steps, groups) keeps fewer than its ``full[g]`` units.
    """

    members: Bools
    full: Ints
    params: Ints
    bytes: Ints

    def taken(self, widths: Ints) -> Bools:
        """Which steps come at these widths."""
        less: Bools = np.asarray(widths) < self.full
        return np.asarray((self.members & less).any(axis=1), bool)

    def brought_by(self, widths: Ints) -> Bools:
        """(groups,): which groups bring steps by being cut."""
        less: Bools = np.asarray(widths) < self.full
        return np.asarray((self.members & less).any(axis=0), bool)

    @classmethod
    def none(cls) -> Steps:
        """No steps, for any number of groups."""
        nothing = np.zeros(0, np.int64)
        return cls(np.zeros((0, 1), bool), np.zeros(1, np.int64), nothing, nothing)


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
    steps: Steps = field(default_factory=Steps.none)

    def lengths(self, widths: Ints) -> Ints:
        """Axis lengths, with a trailing 1 for the padding index -1."""
        return np.append(self.fixed + self.per_unit @ np.asarray(widths, np.int64), 1)

    def cost(self, widths: Ints) -> Cost:
        """Costs when group g keeps ``widths[g]`` units."""
        lengths, taken = self.lengths(widths), self.steps.taken(widths)
        return Cost(
            macs=int(self.terms(self.macs, lengths).sum()) // self.batch,
            params=int(self.terms(self.params, lengths).sum() + self.steps.params[taken].sum()),
            bytes=int(self.terms(self.bytes, lengths).sum() + self.steps.bytes[taken].sum())
            + self.overhead,
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
        if (
            spec
            and spec.cost
            and all(n in model.shapes for n in (*node.inputs[:2], *node.outputs) if n)
        ):
            with rule_errors(node):
                terms = spec.cost(node, model.shapes)
                for term in terms:
                    _full(term, model.shapes)
            macs.append([index.setdefault(a, len(index)) for a in terms])
            names.append(node.name)
    floats = [n for n in model.constants if is_float(model.dtypes[n])]
    constants = {
        n: [index.setdefault((n, a), len(index)) for a in range(len(model.shapes[n]))]
        for n in model.constants
    }
    params = [constants[n] for n in floats]
    sizes = np.asarray([model.dtypes[n].itemsize for n in constants], np.int64)
    around = restored(model, coupling)
    places = [[index.setdefault(r.axis, len(index))] for r in around if r.per_index]

    rows, columns, values = [], [], []
    fixed = np.zeros(len(index), np.int64)
    on: dict[Axis, list[int]] = {}
    for length, i in index.items():
        fixed[i] = _full(length, model.shapes)
        for axis in _sum(length)[0]:
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
    uncut = sum(r.per_index * model.shapes[r.axis[0]][r.axis[1]] for r in around)
    held_bytes = sum(model.constants[n].nbytes for n in model.constants)
    return Ledger(
        fixed=fixed,
        per_unit=per_unit,
        macs=_products(macs, np.ones(len(macs), np.int64)),
        params=_products(params, np.ones(len(params), np.int64)),
        bytes=_products(
            [*constants.values(), *places],
            np.append(sizes, [r.per_index for r in around if r.per_index]),
        ),
        overhead=max(size(model.proto) - held_bytes, 0) - uncut,
        batch=model.batch,
        nodes=tuple(names),
        steps=_steps(around, coupling),
    )


@dataclass(frozen=True)
class Restored:
    """What a cut of one axis adds around a node that reads it: ``per_index`` bytes for every index kept, too."""

    axis: Axis
    params: int
    bytes: int
    per_index: int


class _Cut:
    """Implements ``ops.Cuts`` for a cut of one axis, whatever goes."""

    def __init__(self, model: Model, axis: Axis) -> None:
        self._model, self._axis = model, axis

    def shape(self, tensor: str) -> tuple[int, ...]:
        return self._model.shapes[tensor]

    def constant(self, tensor: str) -> Array | None:
        return self._model.constants.get(tensor)

    def keep(self, tensor: str, axis: int) -> Bools | None:
        if (tensor, axis) != self._axis:
            return None
        return np.arange(self._model.shapes[tensor][axis]) > 0

    def kept(self, tensor: str, axis: int) -> int:
        return self._model.shapes[tensor][axis] - ((tensor, axis) == self._axis)


def restored(model: Model, coupling: Coupling) -> list[Restored]:
    """What is added around every node that must see what went, by what its repair says."""
    known = {node.name: node for node in model.every}
    present, names = Present(model), Names(model)
    result = []
    for consumer in (*coupling.consumers, *coupling.inside):
        node, axis = known[consumer.node], (consumer.data, consumer.axis)
        spec = lookup(node.domain, node.op, node.version)
        if consumer.weight is not None or spec is None or spec.edit.repair is None:
            continue
        with rule_errors(node):
            edit = spec.edit.repair(node, _Cut(model, axis))
        shape = model.shapes[consumer.data]
        if edit.spread is not None and present.spread(node, edit.spread, edit.ordered) is None:
            every = np.ones(shape[consumer.axis], bool)
            added = spread(node, len(shape), edit.spread, edit.ordered, every, names)
            result.append(Restored(axis, 0, added.nbytes(node), INDEX if edit.ordered else 0))
        if edit.scale != 1.0 and present.scale(node) is None:
            dtype = model.dtypes[node.outputs[0]]
            result.append(
                Restored(axis, int(is_float(dtype)), scale(node, 1.0, dtype, names).nbytes(node), 0)
            )
    return result


def _steps(around: Sequence[Restored], coupling: Coupling) -> Steps:
    """Restored nodes by the groups whose cut brings them."""
    held = [[r.axis in g.multiplicity for g in coupling.groups] for r in around]
    rows = np.asarray(held, bool).reshape(len(around), len(coupling.groups))
    members, place = np.unique(rows, axis=0, return_inverse=True)
    if not len(around):
        return Steps.none()
    params, size = np.zeros((2, len(members)), np.int64)
    np.add.at(params, place.reshape(-1), [r.params for r in around])
    np.add.at(size, place.reshape(-1), [r.bytes for r in around])
    return Steps(members, full_widths(coupling), params, size)


def _sum(length: Axis | Total) -> Total:
    """The axes whose lengths are added up, and what is added to them."""
    first, second = length
    return (((first, second),), 0) if isinstance(first, str) else (first, second)


def _full(length: Axis | Total, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """A length of the whole model."""
    axes, number = _sum(length)
    return number + sum(shapes[t][a] for t, a in axes)


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
