"""Linear streams: channels between linear nodes only, which may be expressed in another basis.

A stream has the channels of one group. Its writers are linear nodes that give these channels, its readers linear nodes
that contract them. Where all nodes in between treat every channel alike (sums, identities, moves of positions, averages
over positions), the channels ``x`` can be replaced by ``T x`` with any invertible T: writers give ``T W``, readers take
``W T^-1``, and the model computes the same. A batch normalisation right behind a writer, or right in front of readers
alone, gives its factors to their weights and keeps a shift.

The channels of an attention's values are such a stream within every head, and queries with keys are a pair of them:
where queries become ``T q``, keys become ``T^-T k``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_oamip.core.records import Axis, Coupling, Floats, Group, Ints, Model, Node
from onnx_oamip.graph.linear_layers import Editor, matrix, quantised, site, unmatrix
from onnx_oamip.graph.loading import remade
from onnx_oamip.graph.ops import (
    Trait,
    batch_affine,
    consumers_by_tensor,
    has,
    lookup,
    shift_alone,
)
from onnx_oamip.graph.ops.matrix_view import Site

PASSES = Trait.IDENTITY | Trait.MOVES | Trait.AVERAGES | Trait.SUM
SHIFT = 2
"""Input index of the shift of a batch normalisation."""
LEAST_FACTOR = 1e-3
"""Least factor of a batch normalisation in front of readers, over its largest: its shift is divided by them."""
MOST_ZEROS = 0.5
"""Share of zeros of a weight from which on it counts as sparse: a change of basis would fill them."""


@dataclass(frozen=True)
class Addend:
    """A constant that is added to a stream.

    Attributes:
        node: The node that adds it, or the linear node whose bias it is.
        slot: Its input index.
        axis: Its axis with the channels.
    """

    node: Node
    slot: int
    axis: int


@dataclass(frozen=True)
class Norm:
    """A batch normalisation of a stream, whose factors linear nodes can take.

    Attributes:
        node: The batch normalisation.
        places: The writer in front of it, or the readers behind it.
        is_behind: Whether it is behind a writer.
    """

    node: Node
    places: tuple[Site, ...]
    is_behind: bool


@dataclass(frozen=True)
class Side:
    """Tensors that are in one basis.

    Attributes:
        writers: Linear nodes that give their channels.
        readers: Linear nodes that contract them; none of a side that another activation contracts.
        addends: Constants that are added to them.
        norms: Batch normalisations of them.
        last: The last of the tensors that has all channels along one axis.
    """

    writers: tuple[Site, ...]
    readers: tuple[Site, ...]
    addends: tuple[Addend, ...]
    norms: tuple[Norm, ...]
    last: Axis


@dataclass(frozen=True)
class Stream:
    """Channels between linear nodes only.

    Attributes:
        group: Index of the group in the coupling.
        width: Its number of units.
        blocks: Number of blocks of as many channels each (heads of an attention), each with a basis of its own.
        side: Tensors that hold the channels.
        opposite: Those of the activation that contracts them (keys), in the contragredient basis; None for a stream
            that linear nodes read.
    """

    group: int
    width: int
    blocks: int
    side: Side
    opposite: Side | None = None


@dataclass(frozen=True)
class Basis:
    """A change of basis.

    Attributes:
        forward: T of every block (blocks, width, width): the new channels are ``T x``.
        inverse: Its inverse.
    """

    forward: Floats
    inverse: Floats

    @property
    def contragredient(self) -> Basis:
        """The basis under which products with vectors in this one are unchanged."""
        return Basis(self.inverse.transpose(0, 2, 1), self.forward.transpose(0, 2, 1))


class _NotLinear(Exception):
    """A group is no linear stream, with the reason."""


def find(model: Model, coupling: Coupling) -> tuple[tuple[Stream, ...], Mapping[str, str]]:
    """Find the groups that are linear streams.

    Args:
        model: A model.
        coupling: Its units.

    Returns:
        The streams, and for every other group by name the reason why it is none.
    """
    finder = _Finder(model, coupling)
    streams: list[Stream] = []
    reasons: dict[str, str] = {}
    for index, group in enumerate(coupling.groups):
        try:
            streams.append(finder.stream(index, group))
        except _NotLinear as reason:
            reasons[group.name] = str(reason)
    return tuple(streams), reasons


def rotated(model: Model, bases: Iterable[tuple[Stream, Basis]]) -> Model:
    """Express streams in other bases.

    Args:
        model: A model.
        bases: Streams with the basis of each.

    Returns:
        A model that computes the same up to rounding, with the same names.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    editor = Editor(proto)
    for stream, basis in bases:
        _fold_norms(editor, model, stream)
        _rotate(editor, stream.side, basis)
        if stream.opposite is not None:
            _rotate(editor, stream.opposite, basis.contragredient)
    return remade(model, proto)


def without_norms(model: Model, streams: Sequence[Stream]) -> Model:
    """Give the factors of all batch normalisations of streams to the linear nodes beside them.

    Args:
        model: A model.
        streams: Its streams.

    Returns:
        A model that computes the same up to rounding, with the same names; the given one without such nodes.
    """
    sides = [side for stream in streams for side in (stream.side, stream.opposite)]
    if not any(side is not None and side.norms for side in sides):
        return model
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    editor = Editor(proto)
    for stream in streams:
        _fold_norms(editor, model, stream)
    return remade(model, proto)


def _fold_norms(editor: Editor, model: Model, stream: Stream) -> None:
    for side in (stream.side, stream.opposite):
        for norm in side.norms if side is not None else ():
            _fold_norm(editor, model, norm)


def _fold_norm(editor: Editor, model: Model, norm: Norm) -> None:
    """Multiply the weights beside a batch normalisation by its factors; the node keeps a shift."""
    read = batch_affine(norm.node, model.constants)
    assert read is not None
    factor, shift = read
    for place in norm.places:
        by_channel = factor[:, None, None] if norm.is_behind else factor[None, :, None]
        _store(editor, place, by_channel * _weight(editor, place))
    if norm.is_behind:
        _scale_bias(editor, norm.places[0], factor)
    else:
        shift = shift / factor
    node = editor.nodes[norm.node.name]
    for slot, value in shift_alone(norm.node, shift).items():
        like = model.constants[norm.node.inputs[slot]]
        editor.replace(node, slot, value.astype(like.dtype))


def _scale_bias(editor: Editor, place: Site, factor: Floats) -> None:
    node, bias = editor.nodes[place.node.name], place.rules.bias
    if bias is None or len(node.input) <= bias.slot or not node.input[bias.slot]:
        return
    old = editor.constant(node.input[bias.slot])
    assert old is not None
    editor.replace(node, bias.slot, (old * factor).astype(old.dtype))


def _rotate(editor: Editor, side: Side, basis: Basis) -> None:
    blocks, width, _ = basis.forward.shape
    for place in side.writers:
        whole = _weight(editor, place)
        outputs, inputs, taps = whole.shape
        per_block = whole.reshape(blocks, width, inputs, taps)
        _store(
            editor,
            place,
            np.einsum("bij,bjkt->bikt", basis.forward, per_block).reshape(outputs, inputs, taps),
        )
    for place in side.readers:
        whole = _weight(editor, place)
        outputs, inputs, taps = whole.shape
        per_block = whole.reshape(outputs, blocks, width, taps)
        _store(
            editor,
            place,
            np.einsum("objt,bji->obit", per_block, basis.inverse).reshape(outputs, inputs, taps),
        )
    for addend in side.addends:
        node = editor.nodes[addend.node.name]
        old = editor.constant(node.input[addend.slot])
        assert old is not None
        last = np.moveaxis(old.astype(np.float64), addend.axis, -1)
        moved = np.einsum(
            "bij,...bj->...bi", basis.forward, last.reshape(*last.shape[:-1], blocks, width)
        )
        new = np.moveaxis(moved.reshape(last.shape), -1, addend.axis)
        editor.replace(node, addend.slot, np.ascontiguousarray(new.astype(old.dtype)))


def _weight(editor: Editor, place: Site) -> Floats:
    """The present weight (outputs, inputs, taps) of a node without groups."""
    value = editor.constant(editor.nodes[place.node.name].input[place.weight_slot])
    assert value is not None
    whole: Floats = matrix(place, value)[0]
    return whole


def _store(editor: Editor, place: Site, whole: Floats) -> None:
    node = editor.nodes[place.node.name]
    like = editor.constant(node.input[place.weight_slot])
    assert like is not None
    editor.replace(node, place.weight_slot, unmatrix(place, whole[None], like))


class _Finder:
    """Finds linear streams of a model."""

    def __init__(self, model: Model, coupling: Coupling) -> None:
        self.model = model
        self.coupling = coupling
        self.editor = Editor(model.proto)
        self.order = {node.name: i for i, node in enumerate(model.nodes)}
        self.producers = {name: node for node in model.every for name in node.outputs if name}
        self.consumers = consumers_by_tensor(model)

    def stream(self, index: int, group: Group) -> Stream:
        """The stream of a group. Raises _NotLinear where it is none."""
        axes = {axis: self.coupling.axes[axis] for axis in group.multiplicity}
        activations = [axis for axis in axes if axis[0] not in self.model.constants]
        if not activations:
            raise _NotLinear("no activation has its channels")
        blocks = self._blocks(group, axes)
        parts, products = self._parts(axes, activations)
        sides = [self._side(axes, part, blocks * len(group.units)) for part in parts]
        self._all_constants_found(axes, sides)
        return _joined(index, group, blocks, sides, products)

    def _blocks(self, group: Group, axes: Mapping[Axis, Ints]) -> int:
        """Number of blocks of channels, each with all units in one order."""
        width = len(group.units)
        first = next(iter(axes.values()))[:width]
        blocks = max(group.multiplicity.values())
        for (tensor, _), labels in axes.items():
            count = len(labels) // width
            if count not in (1, blocks) or not np.array_equal(labels, np.tile(first, count)):
                raise _NotLinear(f"'{tensor}' has its channels in another order or among others")
        return blocks

    def _parts(
        self, axes: Mapping[Axis, Ints], activations: Sequence[Axis]
    ) -> tuple[list[list[Axis]], int]:
        """Activations by basis, and the number of products of two of them."""
        root = {axis[0]: axis[0] for axis in activations}
        if len(root) < len(activations):
            raise _NotLinear("a tensor has its channels along two axes")

        def find(name: str) -> str:
            while root[name] != name:
                name = root[name]
            return name

        products: set[str] = set()
        for tensor, axis in activations:
            nodes = [self.producers.get(tensor), *self.consumers[tensor]]
            for node in nodes:
                role = self._role(node, (tensor, axis), axes)
                if role == "product":
                    assert node is not None
                    products.add(node.name)
                elif role == "passes":
                    assert node is not None
                    for other in (*node.inputs, *node.outputs):
                        if other in root:
                            root[find(other)] = find(tensor)
        parts: dict[str, list[Axis]] = {}
        for axis_ in activations:
            parts.setdefault(find(axis_[0]), []).append(axis_)
        return list(parts.values()), len(products)

    def _role(self, node: Node | None, axis: Axis, axes: Mapping[Axis, Ints]) -> str:
        """Role of a node that touches a tensor towards its channels: writes, reads, passes or product."""
        if node is None or node.name not in self.order:
            raise _NotLinear(f"'{axis[0]}' is used in a subgraph")
        tensor = axis[0]
        place = site(node, self.model.constants)
        contracted = [
            c
            for c in self.coupling.consumers
            if c.node == node.name
            and ((c.data, c.axis) in axes or (c.weight, c.weight_axis) in axes)
        ]
        if place is not None and tensor in node.outputs and self._gives(place, axes):
            return "writes"
        if contracted and tensor in node.inputs:
            if place is not None and place.data == tensor:
                return "reads"
            if place is None and _is_product(node):
                return "product"
            raise _NotLinear(f"{node} is not linear over its channels")
        if has(node, Trait.BATCH_NORM):
            self._norm(node, axes)
        else:
            self._must_pass(node, axes)
        return "passes"

    def _norm(self, node: Node, axes: Mapping[Axis, Ints]) -> Norm:
        """A batch normalisation of the channels. Raises _NotLinear where no linear nodes can take its factors."""
        affine = batch_affine(node, self.model.constants)
        if affine is None:
            raise _NotLinear(f"{node} computes its parameters")
        for slot in range(1, 5):
            self._must_be_own(node, slot)
        data, output = node.inputs[0], node.outputs[0]
        writer = self._site_of(self.producers.get(data))
        if writer is not None and self._gives(writer, axes) and len(self.consumers[data]) == 1:
            return Norm(node, (writer,), is_behind=True)
        readers = [self._site_of(reader) for reader in self.consumers[output]]
        places = tuple(
            place
            for place in readers
            if place is not None and place.data == output and not self._gives(place, axes)
        )
        if not places or len(places) < len(readers):
            raise _NotLinear(f"{node} is neither right behind a linear node nor before such alone")
        size = np.abs(affine[0])
        if size.min() < LEAST_FACTOR * size.max() or size.max() == 0:
            raise _NotLinear(f"{node} has factors near zero")
        return Norm(node, places, is_behind=False)

    def _site_of(self, node: Node | None) -> Site | None:
        """Linear form of a node of the main graph."""
        if node is None or node.name not in self.order:
            return None
        return site(node, self.model.constants)

    def _gives(self, place: Site, axes: Mapping[Axis, Ints]) -> bool:
        """Tests for a linear node whose weight makes the channels."""
        return (place.weight, 1 - place.weight_axis) in axes

    def _must_pass(self, node: Node, axes: Mapping[Axis, Ints]) -> None:
        """Raises _NotLinear for a node that does not treat all channels alike."""
        constants = self.model.constants
        held = {name: axis for name, axis in axes if name not in constants}
        inside = [name for name in node.inputs if name in held]
        computed = [name for name in node.inputs if name and name not in constants]
        if node.outputs[0] not in held or not inside or any(n in held for n in node.outputs[1:]):
            raise _NotLinear(f"{node} is not linear over its channels")
        if has(node, PASSES):
            alike = len(inside) == len(computed)
            if has(node, Trait.SUM):
                alike = alike and _same_place(self.model, held, [*inside, node.outputs[0]])
        elif has(node, Trait.SCALES):
            others = [n for n in node.inputs if n in constants]
            alike = len(others) == 1 and constants[others[0]].size == 1
        else:  # a product over another axis
            alike = _is_product(node) and len(inside) == 1
        if not alike:
            raise _NotLinear(f"{node} is not linear over its channels")

    def _side(self, axes: Mapping[Axis, Ints], part: Sequence[Axis], channels: int) -> Side:
        """Writers, readers and constants of tensors in one basis."""
        writers: dict[str, Site] = {}
        readers: dict[str, Site] = {}
        addends: dict[tuple[str, int], Addend] = {}
        norms: dict[str, Norm] = {}
        for tensor, axis in part:
            producer = self.producers[tensor]
            if self._role(producer, (tensor, axis), axes) == "writes":
                place = self._free_weight(producer, channels)
                writers[producer.name] = place
                bias = place.rules.bias
                if (
                    bias is not None
                    and len(producer.inputs) > bias.slot
                    and producer.inputs[bias.slot]
                ):
                    addends[producer.name, bias.slot] = self._addend(producer, bias.slot, axes)
            elif has(producer, Trait.BATCH_NORM):
                norms[producer.name] = self._norm(producer, axes)
                addends[producer.name, SHIFT] = self._addend(producer, SHIFT, axes)
            elif has(producer, Trait.SUM):
                for slot, name in enumerate(producer.inputs):
                    if name in self.model.constants:
                        addends[producer.name, slot] = self._addend(producer, slot, axes)
            for node in self.consumers[tensor]:
                if self._role(node, (tensor, axis), axes) == "reads":
                    readers[node.name] = self._free_weight(node, channels)
        flat = [axis for axis in part if len(axes[axis]) == channels]
        if not writers or not flat:
            raise _NotLinear("no linear node gives its channels")
        last = max(flat, key=lambda axis: self.order[self.producers[axis[0]].name])
        return Side(
            tuple(writers.values()),
            tuple(readers.values()),
            tuple(addends.values()),
            tuple(norms.values()),
            last,
        )

    def _free_weight(self, node: Node, channels: int) -> Site:
        """A linear node whose weight may be changed. Raises _NotLinear where it may not."""
        place = site(node, self.model.constants)
        assert place is not None
        if place.groups > 1:
            raise _NotLinear(f"{node} has {place.groups} groups of channels")
        if quantised(node, self.model):
            raise _NotLinear(f"the weight of {node} is stored as codes")
        self._must_be_own(node, place.weight_slot)
        weight = self.model.constants[place.weight]
        if channels not in (weight.shape[place.weight_axis], weight.shape[1 - place.weight_axis]):
            raise _NotLinear(f"the weight of {node} has its channels among others")
        if np.count_nonzero(weight) < (1 - MOST_ZEROS) * weight.size:
            raise _NotLinear(f"the weight of {node} is sparse")
        return place

    def _must_be_own(self, node: Node, slot: int) -> None:
        """Raises _NotLinear for a constant that is computed, or that other nodes read."""
        name = node.inputs[slot]
        kind = self.editor.stored_type(name)
        if kind is None or kind.kind != "f":
            raise _NotLinear(f"'{name}' is computed or stored as codes")
        source = self.editor.source(name)
        if len(self.editor.readers_of(source)) > 1 or source in self.editor.outputs:
            raise _NotLinear(f"several nodes share the weight '{source}'")

    def _addend(self, node: Node, slot: int, axes: Mapping[Axis, Ints]) -> Addend:
        """A constant of one value per channel that is added. Raises _NotLinear for another."""
        name = node.inputs[slot]
        found = [axis for tensor, axis in axes if tensor == name]
        if name not in self.model.constants or len(found) != 1:
            raise _NotLinear(f"{node} adds '{name}', which is not one constant per channel")
        self._must_be_own(node, slot)
        return Addend(node, slot, found[0])

    def _all_constants_found(self, axes: Mapping[Axis, Ints], sides: Sequence[Side]) -> None:
        """Raises _NotLinear where a constant has the channels in a role that is not known."""
        known: set[str] = set()
        for side in sides:
            places = (*side.writers, *side.readers)
            names = [place.weight for place in places]
            names += [addend.node.inputs[addend.slot] for addend in side.addends]
            names += [name for norm in side.norms for name in norm.node.inputs[1:]]
            for name in names:
                known |= {name, self.model.source(name), *self._views_between(name)}
        for tensor, _ in axes:
            if tensor in self.model.constants and tensor not in known:
                raise _NotLinear(
                    f"'{tensor}' has its channels in another role than a weight or a bias"
                )

    def _views_between(self, name: str) -> Collection[str]:
        """Tensors between an initialiser and a view of it."""
        return [node.output[0] for node in self.editor.path(name) or ()]


def _is_product(node: Node) -> bool:
    """Tests for an operator that multiplies matrices."""
    spec = lookup(node.domain, node.op, node.version)
    return spec is not None and spec.linear is not None


def _same_place(model: Model, held: Mapping[str, int], names: Sequence[str]) -> bool:
    """Tests for tensors that have the channels along the same axis, counted from the right as in broadcasting."""
    return len({held[name] - len(model.shapes[name]) for name in names}) == 1


def _joined(index: int, group: Group, blocks: int, sides: Sequence[Side], products: int) -> Stream:
    """The stream of one or two sides. Raises _NotLinear where they are neither a stream nor a pair."""
    width = len(group.units)
    if len(sides) == 1 and not products:
        if not sides[0].readers:
            raise _NotLinear("no linear node reads its channels")
        return Stream(index, width, blocks, sides[0])
    is_pair = len(sides) == 2 and products == 1
    if is_pair and not sides[0].readers and not sides[1].readers:
        return Stream(index, width, blocks, sides[0], sides[1])
    raise _NotLinear("its channels are in several products")
