"""Partial execution: runs parts of a graph as models of their own, so that no run computes more than it must.

``Slicer`` cuts out the nodes between some tensors and others. ``Frontier`` runs a graph front to back over all feeds
and keeps only the tensors that later nodes still read, within a limit of memory. ``stream`` takes one feed after
another through the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TypeVar

import onnx
from onnx import ValueInfoProto, helper

from onnx_oamip.core.records import Array
from onnx_oamip.graph.computed_constants import computing_nodes, is_random
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.subgraphs import reads

T = TypeVar("T")
REPEATS = 4
"""Node runs per feed that a frontier may repeat to save memory, relative to the number of nodes."""


def computed(proto: onnx.ModelProto, constant: str) -> Array:
    """Value of a constant that nodes compute.

    Args:
        proto: The model.
        constant: Name of a tensor that depends on initialisers only.

    Returns:
        The value.
    """
    slicer = Slicer(proto)
    part = slicer.model(slicer.needed([constant], ()), [constant], {})
    value: Array = Session(part, "cpu", what=f"the constant '{constant}'").run({}, [constant])[0]
    return value


class Slicer:
    """Index of the nodes of a graph, from which parts can be cut out as models.

    Attributes:
        proto: The indexed model.
        nodes: Its nodes in topological order.
        reads: Tensors that each node needs, those that its subgraphs capture included.
        producer: Position of the producer of each tensor.
        constants: Initialisers by name.
        on_constants: Positions of the nodes that compute constants; a part that needs one computes it again.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.nodes = list(proto.graph.node)
        self.reads = [reads(node) for node in self.nodes]
        self.producer: dict[str, int] = {}
        for i, node in enumerate(self.nodes):
            self.producer.update((name, i) for name in node.output if name)
        self.constants = {t.name: t for t in proto.graph.initializer}
        computing = computing_nodes(proto.graph, is_random)
        constant = {name for node in computing for name in node.output if name}
        self.on_constants = {
            i for i, node in enumerate(self.nodes) if not constant.isdisjoint(node.output)
        }

    def __reduce__(self) -> tuple[type[Slicer], tuple[onnx.ModelProto]]:
        return Slicer, (self.proto,)  # the receiver of a pickled slicer rebuilds the index

    def needed(self, targets: Iterable[str], given: Iterable[str]) -> list[int]:
        """Finds the nodes that compute some tensors from others.

        Args:
            targets: Tensors to compute.
            given: Tensors whose values are known, besides constants and graph inputs.

        Returns:
            Positions of the nodes, in topological order.
        """
        known = set(given)
        result: set[int] = set()
        pending = [target for target in targets if target not in known]
        while pending:
            i = self.producer.get(pending.pop())
            if i is not None and i not in result:
                result.add(i)
                pending += [name for name in self.reads[i] if name not in known]
        return sorted(result)

    def descendants(self, sources: Iterable[str]) -> set[int]:
        """Finds the nodes that depend on any of some tensors.

        Args:
            sources: Names of tensors.

        Returns:
            Positions of the nodes.
        """
        dependent_tensors = set(sources)
        result: set[int] = set()
        for i, node in enumerate(self.nodes):  # nodes are in topological order
            if not dependent_tensors.isdisjoint(self.reads[i]):
                result.add(i)
                dependent_tensors.update(name for name in node.output if name)
        return result

    def model(
        self,
        nodes: Sequence[int],
        outputs: Sequence[str],
        dtypes: Mapping[str, int],
    ) -> onnx.ModelProto:
        """Makes a model of some nodes. Tensors that they read and do not compute become its inputs.

        Args:
            nodes: Positions of the nodes, in topological order.
            outputs: Outputs of the new model.
            dtypes: ONNX element types of its inputs, and of those outputs whose type is known (else 0 or missing).

        Returns:
            The model, with the constants that it needs.
        """
        computed: set[str] = set()
        read: dict[str, None] = {}  # a set in order
        for i in nodes:
            computed.update(name for name in self.nodes[i].output if name)
            read.update(dict.fromkeys(self.reads[i]))
        result = onnx.ModelProto(ir_version=self.proto.ir_version)
        result.opset_import.extend(self.proto.opset_import)
        graph = result.graph
        graph.name = "part"
        graph.node.extend(self.nodes[i] for i in nodes)
        for name in (*read, *(output for output in outputs if output not in computed)):
            if name in self.constants:
                graph.initializer.append(self.constants[name])
            elif name not in computed and all(value.name != name for value in graph.input):
                graph.input.append(helper.make_tensor_value_info(name, dtypes[name], None))
        for name in outputs:
            element_type = dtypes.get(name, 0)
            if element_type:
                output = helper.make_tensor_value_info(name, element_type, None)
            else:
                output = ValueInfoProto(name=name)  # ONNX Runtime infers the type
            graph.output.append(output)
        return result


def element_types(proto: onnx.ModelProto, dtypes: Mapping[str, object]) -> dict[str, int]:
    """ONNX element types of the tensors of a model.

    Args:
        proto: The model; the declarations of its inputs take precedence.
        dtypes: numpy element types by tensor name.

    Returns:
        Element types by tensor name.
    """
    types = {name: int(helper.np_dtype_to_tensor_dtype(dtype)) for name, dtype in dtypes.items()}
    types.update({v.name: v.type.tensor_type.elem_type for v in proto.graph.input})
    return types


@dataclass(frozen=True)
class _Part:
    """A part of a graph, ready to run.

    Attributes:
        session: The loaded part.
        outputs: Tensors that it computes.
        moving: Names of its nodes that do not compute constants.
        needed_later: Tensors that any later part reads.
    """

    session: Session
    outputs: list[str]
    moving: Set[str]
    needed_later: Set[str]

    @property
    def size(self) -> int:
        """Number of its nodes that do not compute constants."""
        return len(self.moving)

    def run(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Computes the outputs from the values of other tensors; both are given by name."""
        feed = {name: values[name] for name in self.session.inputs}
        results = self.session.run(feed, self.outputs)
        return dict(zip(self.outputs, results, strict=True))


class _Partition:
    """A graph divided into parts from inputs to outputs, up to the targets.

    Every node is in at most one part, unless it computes a constant or the results of its part were not held.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        types: Mapping[str, int],
        device: str,
        lean: bool = False,
    ) -> None:
        self._proto = proto
        self._types = dict(types)
        self._device = device
        self._lean = lean
        self._done: set[str] = set()

    def next(self, targets: Sequence[str], available: Collection[str]) -> _Part | None:
        """Makes the part that computes some tensors.

        Args:
            targets: Tensors to compute.
            available: Tensors whose values are known.

        Returns:
            The part, or None if all targets are available.
        """
        slicer = Slicer(self._proto)
        nodes = slicer.needed(targets, available)
        if not nodes:
            return None
        # Constants are computed wherever they are needed, and never held for every feed.
        moving = {slicer.nodes[i].name for i in nodes if i not in slicer.on_constants}
        done = self._done | moving
        read_later: set[str] = set()
        for i, node in enumerate(slicer.nodes):
            if node.name not in done:
                read_later.update(slicer.reads[i])
        read_later.difference_update(n for i in slicer.on_constants for n in slicer.nodes[i].output)
        results = [name for i in nodes for name in slicer.nodes[i].output if name]
        outputs = [name for name in results if name in read_later or name in targets]
        for name in outputs:
            self._types.setdefault(name, 0)
        part = slicer.model(nodes, outputs, self._types)
        session = Session(part, self._device, what="a part of the model", lean=self._lean)
        return _Part(session, outputs, moving, read_later.union(targets))

    def advance(self, part: _Part) -> None:
        """Notes that the outputs of a part are held, so that later parts begin behind it."""
        self._done |= part.moving

    def record_types(self, values: Mapping[str, Array]) -> None:
        """Notes the element types of computed tensors: the next part declares its inputs with them."""
        for name, value in values.items():
            self._types[name] = int(helper.np_dtype_to_tensor_dtype(value.dtype))


class Frontier:
    """Activations of one graph over a fixed list of feeds, computed from inputs to outputs up to the targets.

    Memory holds, for all feeds, the tensors that later nodes still read. Where they exceed the memory limit, the
    tensors in front of them stay in memory and the nodes in between run again for the next targets: every node runs
    once per feed unless memory is short. Nodes run again at most ``REPEATS`` times as often as the graph has nodes;
    beyond that the last feeds are left out.

    Attributes:
        tensors: Values of the tensors in memory, one array per feed.
        batches: Number of feeds.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        feeds: Sequence[Mapping[str, Array]],
        types: Mapping[str, int],
        device: str,
        memory_limit: int | None = None,
    ) -> None:
        """Starts at the graph inputs, which are read from the feeds whenever they are needed.

        Args:
            proto: The model.
            feeds: Values of the graph inputs, one mapping per batch.
            types: ONNX element types by tensor name.
            device: ``cpu`` or ``cuda``.
            memory_limit: Upper bound in bytes on the tensors in memory; None for no bound.
        """
        self.tensors: dict[str, list[Array]] = {}
        self.batches = len(feeds)
        self._feeds = feeds
        self._inputs = {value.name for value in proto.graph.input}
        self._memory_limit = memory_limit
        self._partition = _Partition(proto, types, device)
        self._repeats_left = REPEATS * len(proto.graph.node)

    def reach(self, targets: Sequence[str]) -> dict[str, list[Array]]:
        """Computes tensors, and drops from memory those that no later node reads.

        Args:
            targets: Names of tensors that are in memory, or computed by nodes that have not run yet.

        Returns:
            Values by name, one array per feed.
        """
        columns = self.each(targets, lambda _, values: dict(values))
        return {name: [values[name] for values in columns] for name in targets}

    def each(
        self, targets: Sequence[str], take: Callable[[int, Mapping[str, Array]], T]
    ) -> list[T]:
        """Computes tensors for one feed after another, and drops from memory those that no later node reads.

        Args:
            targets: Names of tensors that are in memory, or computed by nodes that have not run yet.
            take: Function of the index of a feed and the values of the targets by name.

        Returns:
            Results of the function, one per feed.
        """
        part = self._partition.next(targets, self.tensors)
        read = list(targets) if part is None else [*part.session.inputs, *targets]
        columns: dict[str, list[Array]] = {}
        taken: list[T] = []
        while len(taken) < self.batches:
            i = len(taken)
            values = self._values(i, read)
            if part is not None:
                results = part.run(values)
                if i == 0:
                    self._partition.record_types(results)
                    columns = {name: [] for name in results if self._holds(part, results)}
                for name, column in columns.items():
                    column.append(results[name])
                values.update(results)
            taken.append(take(i, {name: values[name] for name in targets}))
        if part is not None and columns:
            self._partition.advance(part)
            self.tensors.update(columns)
            self.tensors = {n: v for n, v in self.tensors.items() if n in part.needed_later}
        return taken

    def _values(self, i: int, names: Sequence[str]) -> dict[str, Array]:
        """Values of those tensors that are in memory, or graph inputs, at one feed."""
        held = {name: self.tensors[name][i] for name in names if name in self.tensors}
        missing = [name for name in names if name in self._inputs and name not in held]
        given = self._feeds[i] if missing else {}  # reading a feed may take long
        return held | {name: given[name] for name in missing if name in given}

    def _holds(self, part: _Part, results: Mapping[str, Array]) -> bool:
        """Decides whether the results of a part are held for all feeds, and leaves out feeds if they have to be."""
        if self._memory_limit is None:
            return True
        held = {name: column[0] for name, column in self.tensors.items()} | dict(results)
        bytes_per_feed = sum(v.nbytes for name, v in held.items() if name in part.needed_later)
        within_limit = self._memory_limit // max(bytes_per_feed, 1)
        if within_limit >= self.batches:
            return True
        if self._repeats_left >= part.size:
            self._repeats_left -= part.size
            return False
        self.batches = max(within_limit, 1)
        return True


def stream(
    proto: onnx.ModelProto,
    feeds: Iterable[Mapping[str, Array]],
    targets: Sequence[str],
    types: Mapping[str, int],
    device: str,
) -> Iterator[tuple[int, int, Array]]:
    """Computes tensors for one feed after another, so that memory holds one feed only.

    The parts are those of a :class:`Frontier` that is asked for one target after another: values agree to the last
    bit.

    Args:
        proto: The model.
        feeds: Values of the graph inputs, one mapping per batch.
        targets: Tensors to compute, in the order of the graph.
        types: ONNX element types by tensor name.
        device: ``cpu`` or ``cuda``.

    Yields:
        Index of the feed, index of the target, and its value.
    """
    partition = _Partition(proto, types, device, lean=True)  # all sessions stay open
    parts: list[_Part | None] = []
    for i, feed in enumerate(feeds):
        is_first_feed = i == 0
        values = dict(feed)
        for k, target in enumerate(targets):
            if is_first_feed:
                parts.append(partition.next([target], values))
            part = parts[k]
            if part is not None:
                if is_first_feed:
                    partition.advance(part)
                results = part.run(values)
                values.update(results)
                if is_first_feed:
                    partition.record_types(results)
                values = {n: v for n, v in values.items() if n in part.needed_later}
            yield i, k, values[target]
