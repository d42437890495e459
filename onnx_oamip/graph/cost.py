"""Costs of a model (MACs, parameters, bytes) as functions of the group widths.

A cost is a sum of products of axis lengths, and a length is linear in the widths, so that the cost at any widths needs
no cut model. A factor may be the sum of several lengths (a recurrent node reads its input and its own output at every
step).

MACs are the multiply-accumulates of linear operators for one sample at the calibration shapes and nothing else. The
body of a loop counts as often as it runs (:func:`body_runs`), and every branch as if it were taken, but for those that
no calibration sample runs; params are the elements of weights, of floating type or stored as codes of few bits
(:func:`parameters`); bytes is the size of the file with its external data.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
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
    Node,
    Uncounted,
    within,
)
from onnx_oamip.graph.external_data import size
from onnx_oamip.graph.ops import Total, Trait, kinds, lookup, rule_errors
from onnx_oamip.graph.ops.inserted_nodes import (
    Names,
    Present,
    computes_whole,
    restore_zeros,
    scale,
    take_kept,
)
from onnx_oamip.graph.outputs import is_float

INDEX_BYTES = 4
"""Bytes that an inserted gather needs for the position of each kept channel."""
NARROW = "iuV"
"""Kinds of numpy for integers of at most eight bits; those of four and two bits are extension types."""
BITS_OF_A_BYTE = 8


@dataclass(frozen=True)
class Products:
    """A sum of terms, each a constant factor times a product of axis lengths.

    Attributes:
        factor: Constant of each term (terms,).
        axes: Indices of the axes that each term multiplies (terms, most axes of a term), padded with -1, which stands
            for a length of 1.
    """

    factor: Ints
    axes: Ints


@dataclass(frozen=True, eq=False)
class OneOffCosts:
    """Fixed costs of nodes that are inserted once any of several groups is pruned.

    Such nodes pad removed channels with zeros, or scale a mean. Their cost is independent of the widths.

    Attributes:
        members: Groups whose pruning inserts the nodes of each item (items, groups).
        full: Width of every group before pruning (groups,).
        params: Added parameters of each item (items,).
        bytes: Added file size of each item (items,).
    """

    members: Bools
    full: Ints
    params: Ints
    bytes: Ints

    def incurred(self, widths: Ints) -> Bools:
        """Items whose cost is incurred at these widths.

        Args:
            widths: Units that every group keeps (groups,).

        Returns:
            A mask of the items (items,).
        """
        pruned: Bools = np.asarray(widths) < self.full
        return np.asarray((self.members & pruned).any(axis=1), bool)

    def inserting_groups(self, widths: Ints) -> Bools:
        """Groups whose pruning inserts nodes.

        Args:
            widths: Units that every group keeps (groups,).

        Returns:
            A mask of the groups (groups,).
        """
        pruned: Bools = np.asarray(widths) < self.full
        return np.asarray((self.members & pruned).any(axis=0), bool)

    @classmethod
    def none(cls) -> OneOffCosts:
        """Make an empty collection, which fits any number of groups.

        Returns:
            The collection.
        """
        nothing = np.zeros(0, np.int64)
        return cls(np.zeros((0, 1), bool), np.zeros(1, np.int64), nothing, nothing)


@dataclass(frozen=True)
class CountedCost:
    """One cost as a function of the group widths: a sum of products, a constant, and the costs of inserted nodes.

    Attributes:
        products: The terms that depend on the widths.
        one_off: Cost of the inserted nodes of each item of ``Ledger.one_off`` (items,).
        constant: Part that does not depend on the widths.
        divisor: Number that the sum is divided by, rounded down.
    """

    products: Products
    one_off: Ints
    constant: int = 0
    divisor: int = 1


@dataclass(frozen=True)
class Ledger:
    """Costs of a model as functions of the group widths.

    The length of axis i is ``fixed[i] + (per_unit @ widths)[i]``.

    Attributes:
        fixed: Part of each axis length that no group changes (axes,).
        per_unit: Indices that one unit of a group occupies on an axis (axes, groups).
        macs: Multiply-accumulates, one term per linear node.
        params: Elements of the weights.
        bytes: Bytes of all constants, inserted indices included.
        overhead: Bytes of the file that do not depend on the widths.
        fixed_params: Parameters that do not depend on the widths, besides those in ``params``.
        batch: Samples per batch at the calibration shapes, which ``macs`` is divided by.
        nodes: Name of the node of each term of ``macs``.
        one_off: Costs of inserted nodes.
        inputs: Tensors that the node of each term of ``macs`` reads.
    """

    fixed: Ints
    per_unit: csr_array
    macs: Products
    params: Products
    bytes: Products
    overhead: int
    batch: int
    nodes: tuple[str, ...]
    one_off: OneOffCosts = field(default_factory=OneOffCosts.none)
    fixed_params: int = 0
    inputs: tuple[tuple[str, ...], ...] = ()

    def lengths(self, widths: Ints) -> Ints:
        """Axis lengths at given widths.

        Args:
            widths: Units that every group keeps (groups,).

        Returns:
            Lengths (axes + 1,); the last entry is 1, for the padding index -1.
        """
        return np.append(self.fixed + self.per_unit @ np.asarray(widths, np.int64), 1)

    def cost(self, widths: Ints) -> Cost:
        """Costs at given widths.

        Args:
            widths: Units that every group keeps (groups,).

        Returns:
            MACs per sample, parameters, and bytes of the file.
        """
        lengths = self.lengths(widths)
        incurred = self.one_off.incurred(widths)
        values = {}
        for name, counted in self.counted.items():
            total = self.terms(counted.products, lengths).sum() + counted.one_off[incurred].sum()
            values[name] = (int(total) + counted.constant) // counted.divisor
        return Cost(**values)

    @property
    def counted(self) -> dict[str, CountedCost]:
        """Every cost that budgets may bound, by its field of ``Cost``."""
        free = np.zeros_like(self.one_off.params)
        return {
            "macs": CountedCost(self.macs, free, divisor=self.batch),
            "params": CountedCost(self.params, self.one_off.params, constant=self.fixed_params),
            "bytes": CountedCost(self.bytes, self.one_off.bytes, constant=self.overhead),
        }

    @staticmethod
    def terms(products: Products, lengths: Ints) -> Ints:
        """Value of every term of a sum of products.

        Args:
            products: The terms.
            lengths: Axis lengths as :meth:`lengths` returns them (axes + 1,).

        Returns:
            The values (terms,).
        """
        values: Ints = products.factor * lengths[products.axes].prod(axis=1)
        return values


class _AxisIndex:
    """Numbers for the axes, and sums of axes, that occur in the terms of a ledger."""

    def __init__(self) -> None:
        self._numbers: dict[Axis | Total, int] = {}

    def numbers(self, lengths: Iterable[Axis | Total]) -> list[int]:
        """Numbers of several lengths; a new length gets the next number."""
        return [self._numbers.setdefault(length, len(self._numbers)) for length in lengths]

    def affine(self, model: Model, coupling: Coupling) -> tuple[Ints, csr_array]:
        """``fixed`` and ``per_unit`` of a ledger for the lengths numbered so far."""
        fixed = np.zeros(len(self._numbers), np.int64)
        lengths_with: dict[Axis, list[int]] = {}
        for length, i in self._numbers.items():
            fixed[i] = _full_length(length, model.shapes)
            axes, _ = _as_total(length)
            for axis in axes:
                lengths_with.setdefault(axis, []).append(i)
        rows = []
        columns = []
        values = []
        for g, group in enumerate(coupling.groups):
            for axis, indices_per_unit in group.multiplicity.items():
                for i in lengths_with.get(axis, ()):
                    rows.append(i)
                    columns.append(g)
                    values.append(indices_per_unit)
                    fixed[i] -= indices_per_unit * len(group.units)
        shape = (len(self._numbers), len(coupling.groups))
        entries = np.asarray(values, np.int64)
        return fixed, csr_array((entries, (rows, columns)), shape=shape)


def ledger(model: Model, coupling: Coupling) -> Ledger:
    """Builds the cost functions of a model under a coupling.

    Args:
        model: The whole model.
        coupling: Its groups; without groups the costs are constant.

    Returns:
        The costs as functions of the group widths.
    """
    index = _AxisIndex()
    macs = []
    names = []
    inputs = []
    runs = body_runs(model)
    for node in model.every:
        spec = lookup(node.domain, node.op, node.version)
        if spec is None or spec.cost is None or _lacks_shapes(node, model):
            continue
        if node.name in model.idle or _computes_constant(node, model):
            continue
        with rule_errors(node):
            terms = spec.cost(node, model.shapes)
            for term in terms:
                _full_length(term, model.shapes)  # a wrong axis is an error of the rule
        macs.append(index.numbers(terms))
        names.append(node.name)
        inputs.append(tuple(node.inputs))

    constants: dict[str, list[int]] = {}
    for name in model.initialisers:
        rank = len(model.shapes[name])
        constants[name] = index.numbers((name, axis) for axis in range(rank))
    counted = parameters(model)
    params = [axes for name, axes in constants.items() if name in counted]
    item_sizes = np.asarray([model.dtypes[name].itemsize for name in constants], np.int64)

    insertions = insertion_costs(model, coupling)
    indexed = [insertion for insertion in insertions if insertion.per_index]
    positions = [index.numbers([insertion.axis]) for insertion in indexed]
    fixed, per_unit = index.affine(model, coupling)

    constant_bytes = sum(model.constants[name].nbytes for name in constants)
    graph_bytes = max(size(model.proto) - constant_bytes, 0)
    # The terms count the positions of the kept channels, a one-off item those of all: subtract one of the two.
    all_positions = 0
    for insertion in insertions:
        tensor, axis = insertion.axis
        all_positions += insertion.per_index * model.shapes[tensor][axis]
    return Ledger(
        fixed=fixed,
        per_unit=per_unit,
        macs=_products(macs, np.asarray([runs[name] for name in names], np.int64)),
        params=_products(params, np.asarray(list(counted.values()), np.int64)),
        bytes=_products(
            [*constants.values(), *positions],
            np.append(item_sizes, [insertion.per_index for insertion in indexed]),
        ),
        overhead=graph_bytes - all_positions + model.aside_bytes,
        batch=model.batch,
        nodes=tuple(names),
        one_off=_one_off_costs(insertions, coupling),
        fixed_params=model.aside_params,
        inputs=tuple(inputs),
    )


def parameters(model: Model) -> dict[str, int]:
    """Finds the initialisers that hold parameters: floating numbers, and codes of weights.

    Scales and zero points of codes are none, nor are integers that are no weights: indices, shapes, lengths.

    Args:
        model: The model.

    Returns:
        Parameters per element by initialiser; more than one where the bytes of a weight hold several codes.
    """
    readers: dict[str, list[tuple[Node, int]]] = defaultdict(list)
    for node in model.every:
        for slot, name in enumerate(node.inputs):
            readers[name].append((node, slot))
    found = {name: _per_element(model, name, readers[name]) for name in model.initialisers}
    return {name: count for name, count in found.items() if count}


def _per_element(model: Model, name: str, readers: Sequence[tuple[Node, int]]) -> int:
    """Parameters per element of an initialiser."""
    if readers and all(_is_format(model, node, slot) for node, slot in readers):
        return 0
    kind = model.dtypes[name]
    if is_float(kind):
        return 1
    specs = (lookup(node.domain, node.op, node.version) for node, _ in readers)
    codes = [spec.codes for spec in specs if spec is not None and spec.codes is not None]
    is_narrow = kind.itemsize == 1 and kind.kind in NARROW and math.prod(model.shapes[name]) > 1
    if not is_narrow:
        return int(kind.kind in "iu" and bool(codes))
    packed = [
        BITS_OF_A_BYTE // node.attrs[rule.bits]
        for node, _ in readers
        for rule in codes
        # ONNX Runtime refuses other numbers of bits when it loads the model.
        if 0 < node.attrs.get(rule.bits, 0) <= BITS_OF_A_BYTE
    ]
    return max(packed, default=1)


def _is_format(model: Model, node: Node, slot: int) -> bool:
    """Tests for an input that is a scale, a zero point or a length of an operator on codes."""
    spec = lookup(node.domain, node.op, node.version)
    if spec is not None and spec.codes is not None:
        return slot in spec.codes.formats
    # A Cast, a difference and a product that write a dequantisation out.
    formats = Trait.SCALES | Trait.SUBTRACTS
    scales = slot > 0 and spec is not None and bool(spec.traits & formats)
    return scales and node.outputs[0] in model.views


def _computes_constant(node: Node, model: Model) -> bool:
    """Tests for a node that ONNX Runtime computes once, when it loads the model."""
    return bool(node.outputs) and all(name in model.computed for name in node.outputs if name)


def _lacks_shapes(node: Node, model: Model) -> bool:
    """Tests whether a shape that costs depend on is not known; optional outputs do not matter."""
    needed = [name for name in (*node.inputs[:2], *node.outputs[:1]) if name]
    return any(name not in model.shapes for name in needed)


def uncounted(model: Model) -> tuple[Uncounted, ...]:
    """Finds the arithmetic that the MACs of a model leave out.

    Args:
        model: The model, at the shapes that costs are counted at.

    Returns:
        One record per operator and reason, in graph order.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for node in model.every:
        does_not_run = node.name in model.idle or _computes_constant(node, model)
        reason = "" if does_not_run else _why_uncounted(node, model) or _why_once(node, model)
        if reason:
            if node.domain:
                operator = f"{node.domain}::{node.op}"
            else:
                operator = node.op
            found.setdefault((operator, reason), []).append(node.name)
    return tuple(
        Uncounted(operator, reason, tuple(nodes)) for (operator, reason), nodes in found.items()
    )


def _why_uncounted(node: Node, model: Model) -> str:
    """Reason why the arithmetic of a node is not counted; empty if it is, or if there is none."""
    spec = lookup(node.domain, node.op, node.version)
    if spec is not None:
        missing = spec.cost is not None and _lacks_shapes(node, model)
        if missing:
            return "its shapes are not known before it runs"
        return ""
    if node.domain == kinds.BLOCKED_LAYOUT:
        if not any(part in node.op for part in kinds.LINEAR_KERNELS):
            return ""
        return (
            "its weights have the layout of one processor; save it at ONNX Runtime's optimisation level 'extended', "
            "or give the one before"
        )
    if node.domain not in kinds.DESCRIBED_DOMAINS:
        return "the operator is not known"
    multiplies = node.op in kinds.LINEAR_MODELS or any(
        part in node.op for part in kinds.LINEAR_KERNELS
    )
    # An operator of the standard that multiplies by weights says so in its name.
    reads_weight = node.domain not in kinds.STANDARD_DOMAINS and any(
        name in model.constants
        and len(model.shapes[name]) > 1
        and (is_float(model.dtypes[name]) or model.dtypes[name].itemsize == 1)
        for name in node.inputs
    )
    if multiplies or reads_weight:
        return "the operator is not known"
    return ""


def _why_once(node: Node, model: Model) -> str:
    """Reason why the body of a loop is counted once; empty if its runs are known, or if it has nothing to count."""
    spec = lookup(node.domain, node.op, node.version)
    if spec is None or spec.runs is None or _runs(node, model) is not None:
        return ""
    inner = (part for body in node.bodies.values() for part in within(body.nodes))
    specs = (lookup(part.domain, part.op, part.version) for part in inner)
    if any(found is not None and found.cost is not None for found in specs):
        return "its body is counted once, as only a run shows how often it runs"
    return ""


def body_runs(model: Model) -> dict[str, int]:
    """Count how often the nodes in bodies run for one feed.

    Args:
        model: The model.

    Returns:
        Runs by the name of every node: the trip count of a Loop that is a constant (a condition may end it before), the
        length of the sequences of a Scan, and 1 for branches and for loops of which only a run shows it.
    """
    found: dict[str, int] = {}

    def count(nodes: Iterable[Node], times: int) -> None:
        for node in nodes:
            found[node.name] = times
            runs = _runs(node, model)
            for body in node.bodies.values():
                count(body.nodes, times if runs is None else times * runs)

    count(model.nodes, 1)
    return found


def _runs(node: Node, model: Model) -> int | None:
    """Runs of the body of a loop in one run of its node; None where only the run shows it, and for other nodes."""
    spec = lookup(node.domain, node.op, node.version)
    if spec is None or spec.runs is None:
        return None
    with rule_errors(node):
        return spec.runs(node, model.shapes, model.constants)


def uncounted_note(model: Model) -> str:
    """States what the MACs of a model leave out.

    Args:
        model: The model.

    Returns:
        One sentence without a full stop; empty if everything is counted.
    """
    parts = [
        f"{len(record.nodes)} x {record.operator} ({record.reason})" for record in uncounted(model)
    ]
    if not parts:
        return ""
    left_out = ", ".join(parts)
    return f"the MACs do not include {left_out}: they are a lower bound, and a budget of MACs bounds the rest only"


@dataclass(frozen=True)
class Insertion:
    """Cost of the nodes that pruning one axis inserts around a node that reads it.

    Attributes:
        axis: The pruned axis.
        params: Added parameters.
        bytes: Added bytes, when no channel is removed.
        per_index: Bytes among these for every channel of the axis.
    """

    axis: Axis
    params: int
    bytes: int
    per_index: int


class _CutOfOneAxis:
    """Cut that removes the first channel of one axis; implements ``ops.Cuts``.

    The kind of nodes that a repair rule inserts does not depend on the choice of channels.
    """

    def __init__(self, model: Model, axis: Axis) -> None:
        self._model = model
        self._axis = axis

    def shape(self, tensor: str) -> tuple[int, ...]:
        return self._model.shapes[tensor]

    def constant(self, tensor: str) -> Array | None:
        return self._model.constants.get(tensor)

    def readers(self, tensor: str) -> Sequence[Node]:
        return [node for node in self._model.every if tensor in node.inputs]

    def producer(self, tensor: str) -> Node | None:
        return next((node for node in self._model.every if tensor in node.outputs), None)

    def keep(self, tensor: str, axis: int) -> Bools | None:
        if (tensor, axis) != self._axis:
            return None
        return np.arange(self._model.shapes[tensor][axis]) > 0

    def kept(self, tensor: str, axis: int) -> int:
        return self._model.shapes[tensor][axis] - ((tensor, axis) == self._axis)


def insertion_costs(model: Model, coupling: Coupling) -> list[Insertion]:
    """Costs of the nodes that pruning inserts around nodes which still have to see removed channels as zeros.

    Args:
        model: The whole model. Nodes that an earlier pruning inserted are reused, and cost nothing again.
        coupling: Its coupling.

    Returns:
        One record per consumer and kind of insertion.
    """
    nodes = {node.name: node for node in model.every}
    present = Present(model)
    names = Names(model)
    result = []
    for consumer in (*coupling.consumers, *coupling.inside):
        node = nodes[consumer.node]
        axis = (consumer.data, consumer.axis)
        spec = lookup(node.domain, node.op, node.version)
        if consumer.weight is not None or spec is None or spec.edit.repair is None:
            continue
        with rule_errors(node):
            edit = spec.edit.repair(node, _CutOfOneAxis(model, axis))
        shape = model.shapes[consumer.data]
        last = nodes[edit.until or node.name]
        if (
            edit.spread is not None
            and present.restored_zeros(node, edit.spread, edit.ordered, last) is None
        ):
            all_channels = np.ones(shape[consumer.axis], bool)
            added = restore_zeros(
                node,
                len(shape),
                edit.spread,
                ordered=edit.ordered,
                keep=all_channels,
                names=names,
                last=last,
            )
            per_index = INDEX_BYTES if edit.ordered else 0
            result.append(Insertion(axis, 0, added.nbytes(node, last), per_index))
        if edit.scale != 1.0 and present.scale(node) is None:
            dtype = model.dtypes[node.outputs[0]]
            added = scale(node, 1.0, dtype, names)
            result.append(Insertion(axis, int(is_float(dtype)), added.nbytes(node), 0))
    return result + _picks(model, coupling, names)


def _picks(model: Model, coupling: Coupling, names: Names) -> list[Insertion]:
    """Costs of the nodes that take the kept indices of a constant which another node computes."""
    makers = {name: node for node in model.nodes for name in node.outputs}
    result = []
    for tensor, axis in coupling.axes:
        if tensor in makers and computes_whole(makers[tensor], model):
            every_index = np.ones(model.shapes[tensor][axis], bool)
            added = take_kept(makers[tensor], {axis: every_index}, names)
            n_bytes = added.nbytes(makers[tensor])
            result.append(Insertion((tensor, axis), 0, n_bytes, INDEX_BYTES))
    return result


def _one_off_costs(insertions: Sequence[Insertion], coupling: Coupling) -> OneOffCosts:
    """Merges the insertions that the same groups cause."""
    if not insertions:
        return OneOffCosts.none()
    caused_by = [
        [insertion.axis in group.multiplicity for group in coupling.groups]
        for insertion in insertions
    ]
    rows = np.asarray(caused_by, bool).reshape(len(insertions), len(coupling.groups))
    members, item = np.unique(rows, axis=0, return_inverse=True)
    params, n_bytes = np.zeros((2, len(members)), np.int64)
    np.add.at(params, item.reshape(-1), [insertion.params for insertion in insertions])
    np.add.at(n_bytes, item.reshape(-1), [insertion.bytes for insertion in insertions])
    return OneOffCosts(members, full_widths(coupling), params, n_bytes)


def _as_total(length: Axis | Total) -> Total:
    """A length as the axes that are added up and the number that is added to them."""
    first, second = length
    if isinstance(first, str):
        return ((first, second),), 0
    return first, second


def _full_length(length: Axis | Total, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Length before pruning."""
    axes, offset = _as_total(length)
    return offset + sum(shapes[tensor][axis] for tensor, axis in axes)


def count(model: Model) -> Cost:
    """Costs of a model as it stands.

    Args:
        model: The model, pruned or not.

    Returns:
        MACs per sample, parameters, and the bytes of its normalised graph.
    """
    no_groups = Coupling(0, (), np.zeros(0, np.int64), {}, (), ())
    return ledger(model, no_groups).cost(np.zeros(0, np.int64))


def _products(terms: Sequence[Sequence[int]], factor: Ints) -> Products:
    longest = max((len(term) for term in terms), default=1) or 1
    axes = np.full((len(terms), longest), -1, np.int64)
    for i, term in enumerate(terms):
        axes[i, : len(term)] = term
    return Products(factor, axes)


def full_widths(coupling: Coupling) -> Ints:
    """Width of every group before pruning.

    Args:
        coupling: The coupling of the model.

    Returns:
        Units per group (groups,).
    """
    return np.asarray([len(group.units) for group in coupling.groups], np.int64)
