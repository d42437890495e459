"""The importance program of a model: the part of the graph that ``region`` finds, as expressions and rows.

What lies before the first keep variable are constants: activations that ONNX Runtime computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from onnx_oamip.core.errors import SettingsError, SolverError
from onnx_oamip.core.records import (
    Array,
    Axis,
    Coupling,
    Floats,
    Images,
    Ints,
    Model,
    Node,
)
from onnx_oamip.graph.ops import Refused, Trait, has, lookup
from onnx_oamip.importance.oamip.region import (
    Form,
    Region,
    gate_sites,
    nothing_encodable,
    readers_of,
    region,
    without_rule,
)
from onnx_oamip.programs import (
    Encoder,
    Exact,
    Expression,
    Loss,
    Paper,
    Program,
    Reward,
    Rows,
    Tighten,
    objective,
)

EPSILON = 1e-5
"""How far an input may move for the bounds of ``paper``: the published code's value (images are not clamped here)."""
BIG = 1e6
"""Logits that may reach this are not told apart at the solvers' tolerance of 1e-6 of a range: there is no program."""
MOST = 1e30
"""Bounds above this are no numbers to solvers."""


@dataclass(frozen=True, eq=False)
class Formulation:
    """A program without its cuts. ``units`` (keep variables,): the coupling's unit of each keep variable.

    ``outside``: reason by unit for those that are not in it. ``pending``: rows to add where a point violates them.
    """

    program: Program
    encoder: Encoder
    loss: Loss
    reward: Reward
    pending: Rows
    units: Ints
    outside: Mapping[int, str]

    def complete(self, keep: Floats) -> Floats:
        """All variables at given keep variables, but for the epigraph."""
        return self.encoder.complete(keep, self.program.n_variables)


def formulate(
    model: Model,
    coupling: Coupling,
    images: Images,
    form: Form,
    cost: Floats | None = None,
    tighten: Tighten | None = None,
) -> Formulation:
    """The program of all units that it can hold, for the images together.

    ``cost`` (n_units,): linear cost of each unit, for a budget. Raises SettingsError where no unit can be encoded,
    SolverError where bounds grow beyond what solvers resolve.
    """
    blocked = without_rule(model)
    while True:
        found = region(model, coupling, images.logits, form, blocked)
        try:
            return _Graph(model, coupling, images, form, found, tighten).formulation(cost)
        except _Blocked as error:
            blocked[error.node] = error.reason


def _beyond(size: float, where: str) -> str:
    return (
        f"bounds of the importance program reach {size:.1e} at {where}, beyond what solvers resolve; "
        "use `mode=decoupled`."
    )


class _Blocked(Exception):
    def __init__(self, node: int, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason


class _Graph:
    """Walks the region and hands every statement of a rule to the encoder; implements ``ops.Terms``."""

    def __init__(
        self,
        model: Model,
        coupling: Coupling,
        images: Images,
        form: Form,
        found: Region,
        tighten: Tighten | None,
    ) -> None:
        self.model = model
        self.coupling = coupling
        self.images = images
        self.form = form
        self.region = found
        count = int(found.included.sum())
        if not count:
            raise SettingsError(nothing_encodable(found))
        self.position = np.where(found.included, np.cumsum(found.included) - 1, -1)
        kind = Exact if form.kind == "exact" else Paper
        feeds = len(images.feeds)
        self.encoder: Encoder = kind(feeds, count, not form.whole_keep, form.relax, tighten)
        self.readers = readers_of(model)
        self.needed = set(found.nodes) | found.inside
        self.known: dict[str, Expression] = {}
        self.shapes: dict[str, tuple[int, ...]] = dict(model.shapes)
        self.gated: set[str] = set()
        self.scored = (
            {
                axis[0]: axis[1]
                for axis, _ in gate_sites(model, coupling, self.readers, self.needed, form)
            }
            if form.kind == "paper"
            else {}
        )
        self.consumers: dict[tuple[str, int], Axis] = (
            {(c.node, c.slot): (c.data, c.axis) for c in coupling.consumers}
            if form.kind == "exact"
            else {}
        )

    def formulation(self, cost: Floats | None) -> Formulation:
        """Everything: the region's rules one after the other, then the objective."""
        for i in self.region.nodes:
            self._encode(i)
            if not self.encoder.largest <= MOST:
                raise SolverError(_beyond(self.encoder.largest, str(self.model.nodes[i])))
        reward = self._reward(cost)
        logits = self._value(self.images.logits)
        widest = float(np.maximum(np.abs(logits.lower), np.abs(logits.upper)).max(initial=0.0))
        if not widest <= BIG:
            raise SolverError(_beyond(widest, f"the logits '{self.images.logits}'"))
        program, loss = objective(
            self.encoder, logits, self.images.labels.reshape(-1), self.form.weight, reward
        )
        pending = self.encoder.pending(program.n_variables)
        units = np.flatnonzero(self.region.included)
        return Formulation(program, self.encoder, loss, reward, pending, units, self.region.outside)

    def _encode(self, i: int) -> None:
        node = self.model.nodes[i]
        spec = lookup(node.domain, node.op, node.version)
        inside = i in self.region.inside
        try:
            if spec is None or spec.encode is None or node.captures:
                raise Refused(f"{node} has no form in the program")
            spec.encode(self._behind_gates(node) if inside else node, self)
        except Refused as error:
            if inside:
                raise _Blocked(i, str(error)) from error
            # Only bounds were wanted here: they start afresh from what the node was seen to give.
            for name in node.outputs:
                self.known.pop(name, None)
            return
        for name in node.outputs[:1]:
            if name in self.scored and name in self.known and not self._only_relus(name):
                self.known[name] = self.encoder.gate(
                    self.known[name], self._units((name, self.scored[name]))
                )
                self.gated.add(name)

    # --- ops.Terms --------------------------------------------------------------------------------------------

    def shape(self, tensor: str) -> tuple[int, ...]:
        return self.shapes[tensor]

    def constant(self, tensor: str) -> Array | None:
        return self.model.constants.get(tensor)

    def affine(
        self, out: str, parts: Sequence[tuple[str, csr_array]], offset: npt.ArrayLike = 0.0
    ) -> None:
        """Constants among the parts (weights read as data) go the same way as activations."""
        size = parts[0][1].shape[0] if parts else int(np.prod(self.shapes[out]))
        shift = np.asarray(offset, np.float64)
        if not np.isfinite(shift).all():
            raise Refused(f"a constant added to make '{out}' is infinite")
        if shift.size not in (1, size):
            shift = np.broadcast_to(shift, self.shapes[out])
        flat = np.broadcast_to(shift.reshape(-1), size)
        self.known[out] = self.encoder.affine(
            [(matrix, self._value(name)) for name, matrix in parts], flat
        )

    def relu(self, out: str, x: str) -> None:
        unit = None
        if x in self.scored and x not in self.gated:
            unit = self._units((x, self.scored[x]))
        elif self.form.kind == "exact" and out in self.shapes:
            axis = self._gate_of(out)
            if axis is not None:
                unit = self._units(axis)
                self.gated.add(out)
        self.known[out] = self.encoder.relu(self._value(x), unit)

    def maximum(self, out: str, x: str, windows: Ints) -> None:
        self.known[out] = self.encoder.maximum(self._value(x), windows)

    # --- gates ------------------------------------------------------------------------------------------------

    def _value(self, name: str) -> Expression:
        if name not in self.known:
            constant = self.model.constants.get(name)
            if constant is not None:
                self.known[name] = Expression.of(
                    np.tile(constant.reshape(-1), len(self.images.feeds))
                )
            else:
                if name not in self.images.activations:
                    raise Refused(f"'{name}' is no activation of floating type")
                slack = EPSILON if self.form.kind == "paper" else 0.0
                if not np.isfinite(self.images.activations[name]).all():
                    raise Refused(f"'{name}' takes infinite values")
                self.known[name] = Expression.of(self.images.activations[name], slack)
        return self.known[name]

    def _units(self, axis: Axis) -> Ints:
        """Keep variable of every row of a tensor, -1 where there is none."""
        name, place = axis
        shape = self.shapes[name]
        labels = self.coupling.axes[axis]
        found = np.where(labels >= 0, self.position[labels], -1)
        view = [1] * len(shape)
        view[place] = -1
        one = np.broadcast_to(found.reshape(view), shape).reshape(-1)
        return np.tile(one, len(self.images.feeds))

    def _behind_gates(self, node: Node) -> Node:
        """The node reading gated tensors where it consumes them."""
        inputs = list(node.inputs)
        for slot, name in enumerate(node.inputs):
            axis = self.consumers.get((node.name, slot))
            if axis is None or name in self.gated:
                continue
            alias = f"{name}/gate{axis[1]}"
            if alias not in self.known:
                self.known[alias] = self.encoder.gate(self._value(name), self._units(axis))
                self.shapes[alias] = self.shapes[name]
            inputs[slot] = alias
        return replace(node, inputs=tuple(inputs))

    def _gate_of(self, name: str) -> Axis | None:
        """The gated axis of a tensor that nobody reads but through that gate, here or after moving its elements.

        The gate may then be where the tensor is made, and share its variable; the readers are marked as gated.
        """
        axes = [a for a in range(len(self.shapes[name])) if (name, a) in self.coupling.axes]
        moved = self._read_gated(name)
        if moved is None or len(axes) != 1:
            return None
        self.gated |= moved
        return name, axes[0]

    def _read_gated(self, name: str) -> set[str] | None:
        """The tensor and all that its elements are moved to, where every reader of them gates it; else None."""
        found = {name}
        readers = [j for j in self.readers[name] if j in self.needed]
        if name == self.images.logits or not readers:
            return None
        for j in readers:
            node = self.model.nodes[j]
            spec = lookup(node.domain, node.op, node.version)
            for slot, read in enumerate(node.inputs):
                if read != name or (node.name, slot) in self.consumers:
                    continue
                further = (
                    self._read_gated(node.outputs[0])
                    if spec is not None and Trait.MOVES in spec.traits and not slot
                    else None
                )
                if further is None:
                    return None
                found |= further
        return found

    def _only_relus(self, name: str) -> bool:
        readers = [self.model.nodes[j] for j in self.readers[name] if j in self.needed]
        return (
            bool(readers)
            and all(has(node, Trait.RECTIFIES) for node in readers)
            and name != self.images.logits
        )

    # --- objective --------------------------------------------------------------------------------------------

    def _reward(self, cost: Floats | None) -> Reward:
        """One layer per group of units: I_l = sum (s - 2) / N_l over those of its units that are in the program."""
        included = self.region.included
        layers = []
        for group in self.coupling.groups:
            units = group.units[included[group.units]]
            if not len(units):
                continue
            shape = self.model.shapes.get(group.name.partition("#")[0], ())
            kernel = int(np.prod(shape[2:])) if self.form.kernel_share else 1
            layers.append((self.position[units], float(len(group.units) * kernel)))
        share = None
        if self.form.budget is not None:
            assert cost is not None
            per_unit = cost[included]
            share = (per_unit, self.form.budget * float(per_unit.sum()))
        return Reward(tuple(layers), share)
