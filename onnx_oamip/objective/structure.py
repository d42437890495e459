"""The graph seen from its outputs: producers, channel axes, and tensors behind operators that only move entries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnx_oamip.core.records import Array, Model, Node
from onnx_oamip.core.records.objective import Part
from onnx_oamip.graph.linear_layers import site
from onnx_oamip.graph.ops import Trait, has, kinds, lookup, recurrent
from onnx_oamip.graph.ops.movement import taken_range
from onnx_oamip.graph.outputs import is_float

ONE_COLUMN = -1
"""Stands for a channel axis that was removed, as it had one channel: all axes count positions."""
DEPTH = 200
"""Steps that are followed behind an output."""


@dataclass(frozen=True)
class Origin:
    """The tensor behind operators that only move entries, the slice of it that is left, and its producer.

    ``seen``: tensors on the way, the first and the last one among them.
    """

    tensor: str
    part: Part | None
    node: Node | None
    seen: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """A model with its producers."""

    model: Model

    @cached_property
    def makers(self) -> dict[str, Node]:
        """The node that gives a tensor, in the graph itself or in a body."""
        return {out: node for node in self.model.every for out in node.outputs if out}

    @cached_property
    def readers(self) -> dict[str, list[Node]]:
        """Nodes that read a tensor, in the graph itself or in a body."""
        found: dict[str, list[Node]] = {}
        for node in self.model.every:
            for name in dict.fromkeys((*node.inputs, *node.captures)):
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def is_fixed(self) -> bool:
        """True for a model that takes a fixed number of samples at a time."""
        return all(isinstance(port.dims[0], int) for port in self.model.inputs if port.dims)

    @cached_property
    def given(self) -> frozenset[str]:
        """Names of graph inputs."""
        return frozenset(port.name for port in self.model.inputs)

    def maker(self, tensor: str) -> Node | None:
        """Return the producer of a tensor.

        Args:
            tensor: Its name.

        Returns:
            The node; None for inputs, constants, and operators of unknown domains.
        """
        node = self.makers.get(tensor)
        return node if node is not None and node.domain in ("", "ai.onnx", "ai.onnx.ml") else None

    def op(self, tensor: str) -> str:
        """Name the operator that produces a tensor.

        Args:
            tensor: Its name.

        Returns:
            The operator; empty for inputs, constants and operators of unknown domains.
        """
        node = self.maker(tensor)
        return "" if node is None else node.op

    def branches(self, tensor: str) -> list[str]:
        """Return the outputs of the branches of an If for one of its outputs.

        Args:
            tensor: Name of a tensor.

        Returns:
            One tensor per branch; empty if the producer has no branches.
        """
        node = self.maker(tensor)
        if node is None or not has(node, Trait.BRANCHES):
            return []
        return [body.outputs[node.outputs.index(tensor)] for body in node.bodies.values()]

    def shape(self, tensor: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor.

        Args:
            tensor: Its name.

        Returns:
            Lengths of the axes for one feed, or None where they are unknown or depend on values.
        """
        lengths = self.lengths(tensor)
        if lengths is None:
            return None
        known = tuple(length for length in lengths if length is not None)
        return known if len(known) == len(lengths) else None

    def lengths(self, tensor: str) -> tuple[int | None, ...] | None:
        """Return the lengths of the axes of a tensor, as inferred, or as declared for a graph output.

        Args:
            tensor: Its name.

        Returns:
            Lengths for one feed, None for an axis of unknown length; None where the rank is unknown.
        """
        if tensor in self.model.shapes:
            return self.model.shapes[tensor]
        declared = self._declared(tensor)
        if not declared:
            return None
        return tuple(self.model.bindings.get(d) if isinstance(d, str) else d for d in declared)

    def rank(self, tensor: str) -> int | None:
        """Return the number of axes of a tensor.

        Args:
            tensor: Its name.

        Returns:
            The number, or None where it is neither inferred nor declared.
        """
        lengths = self.lengths(tensor)
        return None if lengths is None else len(lengths)

    def floating(self, tensor: str) -> bool:
        """Check whether a tensor has a floating-point type.

        Args:
            tensor: Its name.

        Returns:
            False also for tensors of unknown type.
        """
        kind = self.model.dtypes.get(tensor)
        if kind is None:
            kind = next((p.dtype for p in self.model.outputs if p.name == tensor), None)
        return kind is not None and is_float(kind)

    def constant(self, tensor: str) -> Array | None:
        """Return the value of a constant.

        Args:
            tensor: Its name.

        Returns:
            The value, or None for an activation.
        """
        return self.model.constants.get(tensor)

    def number(self, tensor: str) -> float | None:
        """Return the value of a constant with one element.

        Args:
            tensor: Its name.

        Returns:
            The value, or None for an activation and for constants of any other size.
        """
        value = self.constant(tensor)
        return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None

    def integers(
        self,
        node: Node,
        slot: int,
        attribute: str,
    ) -> list[int] | None:
        """Return a list that early opsets have as an attribute and later ones as an input.

        Args:
            node: The node.
            slot: Position of the input.
            attribute: Name of the attribute.

        Returns:
            The list, or None where it is absent or computed.
        """
        if attribute in node.attrs:
            return [int(a) for a in np.atleast_1d(node.attrs[attribute])]
        if len(node.inputs) <= slot or not node.inputs[slot]:
            return None
        value = self.constant(node.inputs[slot])
        return None if value is None else [int(a) for a in value.reshape(-1)]

    def heavy(self, node: Node) -> bool:
        """Check whether a node counts multiply-accumulates.

        Args:
            node: The node.

        Returns:
            True for operators with a cost.
        """
        spec = lookup(node.domain, node.op, node.version)
        return spec is not None and spec.cost is not None

    # ------------------------------------------------------------------------------------------------- moved entries

    def trace(self, tensor: str) -> Origin:
        """Follow a tensor backwards through operators that only move or convert entries.

        These are casts between floats, quantisation, reshapes, transpositions and slices.

        Args:
            tensor: Name of the tensor to start from.

        Returns:
            The first tensor behind them, and the slice of it that arrives.
        """
        part: Part | None = None
        seen = [tensor]
        while (node := self.maker(tensor)) is not None:
            step = self._step(node, tensor, part)
            if step is None:
                break
            tensor, part = step
            seen.append(tensor)
        return Origin(tensor, part, node, tuple(seen))

    def _step(
        self,
        node: Node,
        tensor: str,
        part: Part | None,
    ) -> tuple[str, Part | None] | None:
        source = node.inputs[0] if node.inputs else ""
        if has(node, Trait.IDENTITY) and tensor == node.outputs[0]:
            return source, part
        if has(node, Trait.CASTS) and self.floating(source) and self.floating(tensor):
            return source, part
        if has(node, Trait.DEQUANTISES):
            quantised = self.maker(source)
            if quantised is not None and has(quantised, Trait.QUANTISES):
                return quantised.inputs[0], part
        if has(node, Trait.QUANTISES):
            return source, part
        if has(node, Trait.TRANSPOSES):
            return source, self._transposed(node, source, part)
        if has(node, Trait.RESHAPES):
            moved = None if part is None else self.axis_before(node, part.axis)
            if part is None or moved is None:
                return (source, None) if part is None else None
            return source, Part(moved, part.start, part.stop)
        cut = self._cut(node, tensor)
        return (source, cut) if cut is not None and part is None else None

    def _transposed(
        self,
        node: Node,
        source: str,
        part: Part | None,
    ) -> Part | None:
        if part is None:
            return None
        order = node.attrs.get("perm") or range(self.rank(source) or 0)[::-1]
        return Part(int(order[part.axis]), part.start, part.stop)

    def _cut(self, node: Node, tensor: str) -> Part | None:
        """The slice of its input that a node gives; None where it gives something else."""
        found = taken_range(node, tensor, self)
        return None if found is None else Part(*found)

    def axis_before(self, node: Node, axis: int) -> int | None:
        """Find an axis of the input of a reshape.

        Args:
            node: The reshape.
            axis: Axis of its output.

        Returns:
            The axis of its input that holds the same entries, or None where entries of several axes are merged or
            split.
        """
        return self._matching(node.outputs[0], node.inputs[0], axis)

    def counts_samples(self, tensor: str) -> bool:
        """Check whether axis 0 of a tensor counts samples.

        Args:
            tensor: Its name.

        Returns:
            False where it has another length than that axis of every input of a model with a fixed batch, or a fixed
            length in a model whose batch is free.
        """
        shape = self.shape(tensor)
        firsts = [port.dims[0] for port in self.model.inputs if port.dims]
        if not shape or not firsts:
            return True
        if all(isinstance(dim, int) for dim in firsts):
            return shape[0] in firsts
        declared = next((port.dims for port in self.model.outputs if port.name == tensor), None)
        return not declared or not isinstance(declared[0], int)

    # ------------------------------------------------------------------------------------------------------- channels

    def channel_axis(self, tensor: str) -> int | None:
        """Find the axis of classes, columns or channels of a tensor.

        Args:
            tensor: Its name.

        Returns:
            The axis; None where the tensor has one column or an unknown rank.
        """
        rank = self.rank(tensor)
        if rank == 1 and self._is_one_row(tensor):
            is_over_positions = self._varies(tensor) or self._channels(tensor, 0) == ONE_COLUMN
            return None if is_over_positions else 0
        if rank is None or rank < 2:
            return None
        shape = self.shape(tensor)
        declared = self._declared(tensor)
        # A declared shape may contradict the inferred one.
        dims = declared if declared and len(declared) == rank else shape
        found = self._channels(tensor, 0)
        if found is not None:
            # Similarities of all pairs of two inputs have as many columns as one of these has samples.
            is_over_pairs = dims is not None and dims[found] in self.model.bindings
            return None if found == ONE_COLUMN or is_over_pairs else found
        lengths = self.lengths(tensor)
        if lengths is None or dims is None:
            return 1
        # Channels have a fixed number, and surely not one that the inputs vary, such as the batch.
        possible = [axis for axis in {1, rank - 1} if dims[axis] not in self.model.bindings]
        fixed = [axis for axis in possible if isinstance(dims[axis], int)]
        return min(fixed or possible, key=lambda axis: (lengths[axis] or 0, axis), default=None)

    def _declared(self, tensor: str) -> tuple[int | str | None, ...] | None:
        """Declared dimensions of a tensor that is a graph output, itself or through a copy."""
        for port in self.model.outputs:
            name = port.name
            while (
                name != tensor
                and (node := self.maker(name)) is not None
                and has(node, Trait.COPIES)
            ):
                name = node.inputs[0]
            if name == tensor:
                return port.dims
        return None

    def _is_one_row(self, tensor: str) -> bool:
        """Test for a vector without an axis of samples, as a squeeze of a fixed batch of one leaves it."""
        shape = self.shape(tensor)
        return (
            self.is_fixed and shape is not None and shape[0] > 1 and not self.counts_samples(tensor)
        )

    def _varies(self, tensor: str) -> bool:
        """Test for a vector that is a graph output whose length depends on the inputs."""
        outputs = (port for port in self.model.outputs if port.name == tensor)
        return any(dim in self.model.bindings for port in outputs for dim in port.dims)

    def _channels(self, tensor: str, depth: int, rank: int | None = None) -> int | None:
        """The channel axis as the layers behind a tensor have it, ``ONE_COLUMN`` if they removed an only channel.

        ``rank``: number of axes of a tensor whose shape is not known, as a reader of it has them.
        """
        node = self.maker(tensor)
        shape = self.shape(tensor)
        if shape is None:
            return self._channels_of_rank(tensor, depth, rank or self.rank(tensor))
        if node is None or not shape or depth > DEPTH:
            return None
        if node.op.endswith(kinds.CHANNELS_ON_AXIS_1):
            return 1
        place = site(node, self.model.constants)
        if place is not None:
            return place.output_axis % len(shape)
        if self.heavy(node) or node.op in kinds.CHANNELS_LAST:
            return len(shape) - 1
        source = node.inputs[0] if node.inputs else ""
        if has(node, Trait.TRANSPOSES):
            inner = self._channels(source, depth + 1)
            order = list(node.attrs.get("perm") or range(len(shape))[::-1])
            return inner if inner is None or inner == ONE_COLUMN else order.index(inner)
        if has(node, Trait.RESHAPES):
            inner = self._channels(source, depth + 1)
            before = self.shape(source)
            if inner is None or inner == ONE_COLUMN or before is None:
                return inner
            axis = self._matching(source, tensor, inner)
            if axis is not None or before[inner] != 1:
                return axis
            coordinates = self._coordinates(source)
            columns = None if coordinates is None else self._matching(source, tensor, coordinates)
            return ONE_COLUMN if columns is None else columns
        if node.op in kinds.REDUCTIONS:
            return self._reduced(node, depth)
        for name in node.inputs:
            if self.constant(name) is None and len(self.shape(name) or ()) == len(shape):
                return self._channels(name, depth + 1)
        return None

    def _channels_of_rank(self, tensor: str, depth: int, rank: int | None) -> int | None:
        """The channel axis of a tensor of which only the number of axes is known, behind biases, copies and casts."""
        node = self.maker(tensor)
        if node is None or not rank or depth > DEPTH:
            return None
        place = site(node, self.model.constants)
        if place is not None:
            return place.output_axis % rank
        computed = [name for name in node.inputs if self.constant(name) is None]
        constants = [self.model.constants[name] for name in node.inputs if name not in computed]
        is_passed_on = has(node, Trait.BIAS | Trait.IDENTITY | Trait.CASTS)
        if not is_passed_on or len(computed) != 1 or any(c.ndim >= rank for c in constants):
            return None
        return self._channels(computed[0], depth + 1, rank)

    def _reduced(self, node: Node, depth: int) -> int | None:
        """The channel axis behind a sum, a mean or the like over some axes."""
        source = node.inputs[0]
        rank = self.rank(source)
        axes = self.integers(node, 1, "axes")
        inner = self._channels(source, depth + 1)
        if inner is None or inner == ONE_COLUMN or rank is None or axes is None:
            return inner if axes is not None else None
        reduced = {axis % rank for axis in axes}
        if inner in reduced:
            return ONE_COLUMN
        keeps = bool(node.attrs.get("keepdims", 1))
        return inner if keeps else inner - sum(axis < inner for axis in reduced)

    def _coordinates(self, tensor: str) -> int | None:
        """The axis of coordinates that each are a mean over bins, as of boxes by distributions; None without.

        One channel is then left of every coordinate: the channels of the layer in front were split into coordinates
        and bins.
        """
        node = self.maker(tensor)
        if node is None or site(node, self.model.constants) is None:
            return None
        bins = node.inputs[0]
        axes = range(2, len(self.shape(bins) or ()))
        return next((axis for axis in axes if self._is_split_off(bins, axis, 0)), None)

    def _is_split_off(self, tensor: str, axis: int, depth: int) -> bool:
        """Test whether a reshape made an axis by splitting a longer one."""
        node = self.maker(tensor)
        if node is None or depth > DEPTH or not node.inputs:
            return False
        source = node.inputs[0]
        if has(node, Trait.TRANSPOSES):
            order = list(node.attrs.get("perm") or range(self.rank(tensor) or 0)[::-1])
            return self._is_split_off(source, int(order[axis]), depth + 1)
        shape = self.shape(tensor)
        lengths = self.shape(source)
        if shape is None or lengths is None:
            return False
        if has(node, Trait.RESHAPES):
            before = self._matching(tensor, source, axis)
            if before is not None:
                return self._is_split_off(source, before, depth + 1)
            front = math.prod(shape[:axis])
            return any(
                length > shape[axis] and length % shape[axis] == 0
                for place, length in enumerate(lengths)
                if front
                in (math.prod(lengths[:place]), math.prod(lengths[: place + 1]) // shape[axis])
            )
        is_elementwise = lengths == shape and not self.heavy(node)
        return is_elementwise and self._is_split_off(source, axis, depth + 1)

    def _matching(self, tensor: str, other: str, axis: int) -> int | None:
        """The axis of ``other`` that holds the entries of an axis of ``tensor`` after a reshape."""
        shape = self.shape(tensor)
        lengths = self.shape(other)
        if shape is None or lengths is None:
            return None
        before = math.prod(shape[:axis])
        length = shape[axis]
        # The first axis counts samples, before a reshape and after it, unless a fixed batch of one is squeezed.
        has_samples = axis > 0 and self.counts_samples(tensor) and self.counts_samples(other)
        possible = range(1 if has_samples else 0, len(lengths))
        fits = [i for i in possible if lengths[i] == length and math.prod(lengths[:i]) == before]
        # Of several axes of length 1, the nearest.
        return min(fits, key=lambda i: abs(i - axis), default=None)

    def state_axis(self, tensor: str) -> int | None:
        """Find the axis along which the directions and layers of a recurrent state are stacked.

        Args:
            tensor: Its name.

        Returns:
            The axis; None for other tensors, and for one direction of one layer.
        """
        shape = self.shape(tensor)
        axis = self._directions(tensor, 0)
        if axis is None or shape is None or shape[axis] < 2:
            return None
        return axis

    def _directions(self, tensor: str, depth: int) -> int | None:
        node = self.makers.get(tensor)
        if node is None or depth > DEPTH:
            return None
        own = recurrent.direction_axis(node, tensor)
        if own is not None:
            return own
        source = node.inputs[0] if node.inputs else ""
        if node.op in kinds.CONCATENATION:
            found = {self._directions(name, depth + 1) for name in node.inputs}
            rank = self.rank(tensor) or 1
            along = int(node.attrs.get("axis", 0)) % rank
            return along if found == {along} else None
        moves = Trait.IDENTITY | Trait.CASTS | Trait.TRANSPOSES | Trait.RESHAPES
        if not has(node, moves):
            return None
        inner = self._directions(source, depth + 1)
        if inner is None:
            return None
        if has(node, Trait.TRANSPOSES):
            order = list(node.attrs.get("perm") or range(self.rank(source) or 0)[::-1])
            return order.index(inner)
        if has(node, Trait.RESHAPES):
            return self._matching(source, tensor, inner)
        return inner

    def feeds_a_layer(self, tensor: str) -> bool:
        """Check whether a node with multiply-accumulates depends on a tensor.

        Args:
            tensor: Its name.

        Returns:
            True for hidden states and attention maps, False for what only other outputs are made of.
        """
        source = self.maker(tensor)
        while source is not None and has(source, Trait.COPIES | Trait.CASTS):
            tensor = source.inputs[0]
            source = self.maker(tensor)
        pending, seen = [tensor], {tensor}
        while pending:
            for node in self.readers.get(pending.pop(), ()):
                if self.heavy(node):
                    return True
                pending += [name for name in node.outputs if name and name not in seen]
                seen.update(node.outputs)
        return False

    def like_an_input(self, tensor: str) -> bool:
        """Check whether a tensor is an image with three colours, as one of the graph inputs is.

        Args:
            tensor: Its name.

        Returns:
            True for four axes, three channels, and the shape of a graph input.
        """
        shape = self.shape(tensor)
        if shape is None or len(shape) != 4 or 3 not in (shape[1], shape[3]):
            return False
        return any(self.shape(name) == shape for name in self.given)
