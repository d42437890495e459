"""Formulation of the joint importance program: the region of the graph as expressions, variables and rows.

Tensors before the first keep variable are constants: activations that ONNX Runtime computed.
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
    Bools,
    ClassHead,
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
    consumers_of,
    gate_sites,
    nothing_encodable,
    region,
    without_rule,
)
from onnx_oamip.programs import (
    CostBudget,
    Encoder,
    Exact,
    Expression,
    Head,
    Loss,
    Paper,
    Program,
    Rows,
    ScoredLayer,
    Sparsity,
    Tighten,
    objective,
)

EPSILON = 1e-5
"""Half width of the interval around an input in ``paper``: the value of the published code. Images are not clamped."""
MAX_LOGIT_BOUND = 1e6
"""Bound of a logit above which no program is built: differences of losses fall below the solvers' tolerance, 1e-6."""
MAX_BOUND = 1e30
"""Bound above which solvers take a number for infinity."""


@dataclass(frozen=True, eq=False)
class Formulation:
    """An importance program without its cuts.

    Attributes:
        program: The mixed-integer linear program.
        encoder: Encoder that built it; holds the indices of the keep variables.
        loss: Cross-entropy over the program's variables.
        sparsity: Sparsity term, or budget, over the keep variables.
        pending: Rows to add as soon as a point violates them.
        units: The coupling's unit of each keep variable (keep variables,).
        outside: Reason by unit, for the units without a keep variable.
    """

    program: Program
    encoder: Encoder
    loss: Loss
    sparsity: Sparsity
    pending: Rows
    units: Ints
    outside: Mapping[int, str]

    def names(self, coupling: Coupling) -> list[str]:
        """Name the variables by unit, tensor, sample and element.

        Args:
            coupling: Units of the model.

        Returns:
            Name of each variable (variables,).
        """
        of_units = unit_names(coupling)
        rest = [name for label in self.encoder.labels[1:] for name in label.names()]
        return [*(of_units[unit] for unit in self.units), *rest]

    def complete(self, keep: Floats) -> Floats:
        """Evaluate the network at given keep variables.

        Args:
            keep: Value of each keep variable (keep variables,).

        Returns:
            Values of all variables (variables,); those of the loss's epigraph are 0.
        """
        return self.encoder.complete(keep, self.program.n_variables)


def unit_names(coupling: Coupling) -> dict[int, str]:
    """Name the keep variables of all units.

    Args:
        coupling: Units of the model.

    Returns:
        Name by unit: ``keep``, the group, and the position in it.
    """
    return {
        int(unit): f"keep_{group.name}_{position}"
        for group in coupling.groups
        for position, unit in enumerate(group.units)
    }


def formulate(
    model: Model,
    coupling: Coupling,
    images: Images,
    form: Form,
    *,
    cost: Floats | None = None,
    tighten: Tighten | None = None,
) -> Formulation:
    """Formulate one program over all given samples, for every unit that can be encoded.

    Args:
        model: Model to score.
        coupling: Units of the model.
        images: Samples with the activations of the model.
        form: Options of the program.
        cost: Linear cost of each unit (n_units,). Required if the form has a budget.
        tighten: Function that tightens the bounds of rows by linear programs.

    Returns:
        The program with everything that is needed to solve it.

    Raises:
        SettingsError: No unit can be encoded.
        SolverError: Bounds exceed the range that solvers resolve.
    """
    blocked = without_rule(model)
    # Some nodes turn out to be unencodable only when their rule runs. Each of them shrinks the region.
    while True:
        covered = region(model, coupling, images.tensors, form, blocked)
        if not covered.included.any():
            raise SettingsError(nothing_encodable(covered))
        walk = _Formulator(model, coupling, images, form, region=covered, tighten=tighten)
        try:
            return walk.formulation(cost)
        except _Blocked as error:
            blocked[error.node] = error.reason


def _out_of_range(size: float, location: str) -> str:
    return (
        f"bounds of the importance program reach {size:.1e} at {location}, beyond what solvers resolve; "
        "use `mode=decoupled`."
    )


class _Blocked(Exception):
    """The rule of a node behind a gate refused the node."""

    def __init__(self, node: int, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason


class _Formulator:
    """Runs the encoding rules over a region; implements ``ops.Terms``, by which rules state what a node computes."""

    def __init__(
        self,
        model: Model,
        coupling: Coupling,
        images: Images,
        form: Form,
        *,
        region: Region,
        tighten: Tighten | None,
    ) -> None:
        self.model = model
        self.coupling = coupling
        self.images = images
        self.form = form
        self.region = region
        self.keep_index = _keep_indices(region.included)
        encoder = Exact if form.kind == "exact" else Paper
        self.encoder: Encoder = encoder(
            images=len(images.feeds),
            keep=int(region.included.sum()),
            relax_keep=not form.whole_keep,
            relax=form.relax,
            tighten=tighten,
        )
        self.consumers = consumers_of(model)
        self.needed = set(region.nodes) | region.inside
        self.expressions: dict[str, Expression] = {}
        self.shapes: dict[str, tuple[int, ...]] = dict(model.shapes)
        self.gated: set[str] = set()
        self.scored_axis: dict[str, int] = {}
        self.gated_inputs: dict[tuple[str, int], Axis] = {}
        if form.kind == "paper":
            sites = gate_sites(model, coupling, self.consumers, self.needed, form)
            self.scored_axis = dict(site.axis for site in sites)
        else:
            for consumer in coupling.consumers:
                self.gated_inputs[consumer.node, consumer.slot] = (consumer.data, consumer.axis)

    def formulation(self, cost: Floats | None) -> Formulation:
        """Encode the nodes of the region in graph order, then the objective."""
        for i in self.region.nodes:
            self._encode(i)
            # Written so that NaN fails as well.
            if not self.encoder.largest <= MAX_BOUND:
                raise SolverError(_out_of_range(self.encoder.largest, str(self.model.nodes[i])))
        sparsity = self._sparsity(cost)
        heads = [self._head(head) for head in self.images.heads]
        program, loss = objective(self.encoder, heads, weight=self.form.weight, sparsity=sparsity)
        return Formulation(
            program=program,
            encoder=self.encoder,
            loss=loss,
            sparsity=sparsity,
            pending=self.encoder.pending(program.n_variables),
            units=np.flatnonzero(self.region.included),
            outside=self.region.outside,
        )

    def _head(self, head: ClassHead) -> Head:
        """The logits of a classification head, whose bounds must be within the range of solvers."""
        logits = self._value(head.logits)
        magnitude = np.maximum(np.abs(logits.lower), np.abs(logits.upper))
        largest = float(magnitude.max(initial=0.0))
        if not largest <= MAX_LOGIT_BOUND:
            raise SolverError(_out_of_range(largest, f"the logits '{head.logits}'"))
        return Head(logits, head.labels.reshape(-1), head.weight)

    def _encode(self, i: int) -> None:
        node = self.model.nodes[i]
        spec = lookup(node.domain, node.op, node.version)
        inside = i in self.region.inside
        try:
            if spec is None or spec.encode is None or node.captures:
                raise Refused(f"{node} has no form in the program")
            spec.encode(self._with_gated_inputs(node) if inside else node, self)
        except Refused as error:
            if inside:
                raise _Blocked(i, str(error)) from error
            # Only the bounds of this node were wanted: they start again from its known activations.
            for name in node.outputs:
                self.expressions.pop(name, None)
            return
        output = node.outputs[0] if node.outputs else ""
        is_scored = output in self.scored_axis and output in self.expressions
        # ReLUs that read the scored output apply its gate themselves, if nothing else reads it.
        if is_scored and not self._read_by_relus_only(output):
            self._gate_scored(output)

    def _gate_scored(self, output: str) -> None:
        gates = self._keep_of_rows((output, self.scored_axis[output]))
        self.encoder.tensor = output
        self.expressions[output] = self.encoder.gate(self.expressions[output], gates)
        self.gated.add(output)

    # --- ops.Terms --------------------------------------------------------------------------------------------

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Shape of a tensor for one feed."""
        return self.shapes[tensor]

    def constant(self, tensor: str) -> Array | None:
        """Value of an initialiser, or None for a tensor that is computed."""
        return self.model.constants.get(tensor)

    def affine(
        self,
        out: str,
        parts: Sequence[tuple[str, csr_array]],
        offset: npt.ArrayLike = 0.0,
    ) -> None:
        """State that a tensor is a sum of linear maps of other tensors plus an offset.

        Constants among the parts (weights that the node reads as data) are treated like activations.
        """
        if parts:
            size = parts[0][1].shape[0]
        else:
            size = int(np.prod(self.shapes[out]))
        shift = np.asarray(offset, np.float64)
        if not np.isfinite(shift).all():
            raise Refused(f"a constant added to make '{out}' is infinite")
        if shift.size not in (1, size):
            shift = np.broadcast_to(shift, self.shapes[out])
        flat = np.broadcast_to(shift.reshape(-1), size)
        terms = [(matrix, self._value(name)) for name, matrix in parts]
        self.expressions[out] = self.encoder.affine(terms, flat)

    def relu(self, out: str, x: str) -> None:
        """State that a tensor is the ReLU of another, with the gate of either if there is one."""
        gates = None
        if x in self.scored_axis and x not in self.gated:
            gates = self._keep_of_rows((x, self.scored_axis[x]))
        elif self.form.kind == "exact" and out in self.shapes:
            axis = self._shared_gate(out)
            if axis is not None:
                gates = self._keep_of_rows(axis)
                self.gated.add(out)
        self.encoder.tensor = out
        self.expressions[out] = self.encoder.relu(self._value(x), gates)

    def maximum(self, out: str, x: str, windows: Ints) -> None:
        """State that a tensor holds the maxima of windows of another."""
        self.encoder.tensor = out
        self.expressions[out] = self.encoder.maximum(self._value(x), windows)

    # --- gates ------------------------------------------------------------------------------------------------

    def _value(self, name: str) -> Expression:
        """Expression of a tensor; one that no rule has stated is a constant of the program."""
        if name not in self.expressions:
            self.expressions[name] = self._constant_expression(name)
        return self.expressions[name]

    def _constant_expression(self, name: str) -> Expression:
        constant = self.model.constants.get(name)
        if constant is not None:
            return Expression.of(np.tile(constant.reshape(-1), len(self.images.feeds)))
        activation = self.images.activations.get(name)
        if activation is None:
            raise Refused(f"'{name}' is no activation of floating type")
        if not np.isfinite(activation).all():
            raise Refused(f"'{name}' takes infinite values")
        slack = EPSILON if self.form.kind == "paper" else 0.0
        return Expression.of(activation, slack)

    def _keep_of_rows(self, axis: Axis) -> Ints:
        """Keep variable of every row of a tensor's expression, -1 for rows without one."""
        name, dimension = axis
        shape = self.shapes[name]
        labels = self.coupling.axes[axis]
        per_channel = np.where(labels >= 0, self.keep_index[labels], -1)
        along_axis = [1] * len(shape)
        along_axis[dimension] = -1
        per_element = np.broadcast_to(per_channel.reshape(along_axis), shape).reshape(-1)
        return np.tile(per_element, len(self.images.feeds))

    def _with_gated_inputs(self, node: Node) -> Node:
        """The node with gated aliases in place of the tensors that it consumes through a gate."""
        inputs = list(node.inputs)
        for slot, name in enumerate(node.inputs):
            axis = self.gated_inputs.get((node.name, slot))
            if axis is None or name in self.gated:
                continue
            alias = f"{name}/gate{axis[1]}"
            if alias not in self.expressions:
                gates = self._keep_of_rows(axis)
                self.encoder.tensor = alias
                self.expressions[alias] = self.encoder.gate(self._value(name), gates)
                self.shapes[alias] = self.shapes[name]
            inputs[slot] = alias
        return replace(node, inputs=tuple(inputs))

    def _shared_gate(self, name: str) -> Axis | None:
        """Gated axis of a tensor that is read only through that gate, directly or after its elements were moved.

        Such a gate can be applied where the tensor is produced, and then shares the variable of the ReLU. The tensors
        that are read through it are marked as gated.
        """
        dimensions = range(len(self.shapes[name]))
        axes = [a for a in dimensions if (name, a) in self.coupling.axes]
        read_gated = self._read_gated(name)
        if read_gated is None or len(axes) != 1:
            return None
        self.gated |= read_gated
        return name, axes[0]

    def _read_gated(self, name: str) -> set[str] | None:
        """The tensor and all tensors that its elements are moved to, or None if any of them is read without a gate."""
        tensors = {name}
        consumers = [j for j in self.consumers[name] if j in self.needed]
        if name in self.images.tensors or not consumers:
            return None
        for j in consumers:
            node = self.model.nodes[j]
            spec = lookup(node.domain, node.op, node.version)
            for slot, operand in enumerate(node.inputs):
                if operand != name or (node.name, slot) in self.gated_inputs:
                    continue
                if spec is None or Trait.MOVES not in spec.traits or slot:
                    return None
                moved = self._read_gated(node.outputs[0])
                if moved is None:
                    return None
                tensors |= moved
        return tensors

    def _read_by_relus_only(self, name: str) -> bool:
        consumers = [self.model.nodes[j] for j in self.consumers[name] if j in self.needed]
        if not consumers or name in self.images.tensors:
            return False
        return all(has(node, Trait.RECTIFIES) for node in consumers)

    # --- objective --------------------------------------------------------------------------------------------

    def _sparsity(self, cost: Floats | None) -> Sparsity:
        """One layer per group: ``I_l = sum (s - 2) / N_l`` over those of its units that have a keep variable."""
        included = self.region.included
        layers = []
        for group in self.coupling.groups:
            units = group.units[included[group.units]]
            if not len(units):
                continue
            shape = self.model.shapes.get(group.name.partition("#")[0], ())
            if self.form.kernel_share:
                kernel_size = int(np.prod(shape[2:]))
            else:
                kernel_size = 1
            divisor = float(len(group.units) * kernel_size)
            layers.append(ScoredLayer(self.keep_index[units], divisor))
        if self.form.budget is None:
            return Sparsity(tuple(layers))
        assert cost is not None
        per_unit = cost[included]
        budget = CostBudget(per_unit, self.form.budget * float(per_unit.sum()))
        return Sparsity(tuple(layers), budget)


def _keep_indices(included: Bools) -> Ints:
    """Index of the keep variable of every unit, -1 for units without one."""
    return np.where(included, np.cumsum(included) - 1, -1)
