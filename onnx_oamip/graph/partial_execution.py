"""Parts of a graph as models of their own, so that no run computes more than it must.

``Slicer`` cuts out what leads from some tensors to others. ``Frontier`` walks a graph front to back over all feeds
and holds only the tensors that later nodes still read; ``stream`` takes one feed after another through the same parts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import onnx
from onnx import ValueInfoProto, helper

from onnx_oamip.core.records import Array
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.subgraphs import reads


class Slicer:
    """Index of a proto's nodes, tensors and initialisers."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.nodes = list(proto.graph.node)
        self.reads = [reads(node) for node in self.nodes]
        self.producer = {
            name: i for i, node in enumerate(self.nodes) for name in node.output if name
        }
        self.constants = {t.name: t for t in proto.graph.initializer}

    def __reduce__(self) -> tuple[type[Slicer], tuple[onnx.ModelProto]]:
        return Slicer, (self.proto,)  # the index is made anew where it arrives

    def needed(self, targets: Iterable[str], given: Iterable[str]) -> list[int]:
        """Nodes (in order) that compute ``targets`` from ``given`` tensors, constants and graph inputs."""
        stop = set(given)
        found: set[int] = set()
        stack = [t for t in targets if t not in stop]
        while stack:
            i = self.producer.get(stack.pop())
            if i is not None and i not in found:
                found.add(i)
                stack += [n for n in self.reads[i] if n not in stop]
        return sorted(found)

    def descendants(self, sources: Iterable[str]) -> set[int]:
        """Nodes that depend on any of the tensors."""
        touched = set(sources)
        found: set[int] = set()
        for i, node in enumerate(self.nodes):  # nodes are in topological order
            if any(n in touched for n in self.reads[i]):
                found.add(i)
                touched.update(n for n in node.output if n)
        return found

    def model(
        self, nodes: Sequence[int], outputs: Sequence[str], dtypes: Mapping[str, int]
    ) -> onnx.ModelProto:
        """The nodes as a model. What they read and none of them makes becomes an input, of element type ``dtypes``."""
        made = {name for i in nodes for name in self.nodes[i].output if name}
        read = dict.fromkeys(name for i in nodes for name in self.reads[i])
        result = onnx.ModelProto(ir_version=self.proto.ir_version)
        result.opset_import.extend(self.proto.opset_import)
        graph = result.graph
        graph.name = "part"
        graph.node.extend(self.nodes[i] for i in nodes)
        for name in (*read, *(o for o in outputs if o not in made)):
            if name in self.constants:
                graph.initializer.append(self.constants[name])
            elif name not in made and all(v.name != name for v in graph.input):
                graph.input.append(helper.make_tensor_value_info(name, dtypes[name], None))
        for name in outputs:  # the runtime finds a type that is not known here
            kind = dtypes.get(name, 0)
            graph.output.append(
                helper.make_tensor_value_info(name, kind, None)
                if kind
                else ValueInfoProto(name=name)
            )
        return result


def element_types(proto: onnx.ModelProto, dtypes: Mapping[str, object]) -> dict[str, int]:
    """ONNX element types by tensor name, from numpy dtypes and the graph's own inputs."""
    types = {name: int(helper.np_dtype_to_tensor_dtype(dtype)) for name, dtype in dtypes.items()}
    types.update({v.name: v.type.tensor_type.elem_type for v in proto.graph.input})
    return types


@dataclass(frozen=True)
class _Part:
    """What leads from some tensors to the next ones: ``names`` it gives, and what is ``read`` of all after it."""

    session: Session
    names: list[str]
    read: Set[str]

    def run(self, held: Mapping[str, Array]) -> dict[str, Array]:
        """Its tensors by name, from those that are held."""
        found = self.session.run({n: held[n] for n in self.session.inputs}, self.names)
        return dict(zip(self.names, found, strict=True))


class _Parts:
    """A graph taken apart front to back, as far as asked. Every node is in one part."""

    def __init__(
        self, proto: onnx.ModelProto, types: Mapping[str, int], device: str, lean: bool = False
    ) -> None:
        self.proto, self.types, self.device, self.lean = proto, dict(types), device, lean
        self.done: set[str] = set()

    def next(self, targets: Sequence[str], held: Collection[str]) -> _Part | None:
        """The part that leads to ``targets`` from tensors that are ``held``; None where they are held themselves."""
        slicer = Slicer(self.proto)
        nodes = slicer.needed(targets, held)
        if not nodes:
            return None
        self.done.update(slicer.nodes[i].name for i in nodes)
        rest = [i for i, node in enumerate(slicer.nodes) if node.name not in self.done]
        later = {n for i in rest for n in slicer.reads[i]}
        made = [n for i in nodes for n in slicer.nodes[i].output if n]
        outputs = [n for n in made if n in later or n in targets]
        for name in outputs:
            self.types.setdefault(name, 0)
        part = slicer.model(nodes, outputs, self.types)
        session = Session(part, self.device, what="a part of the model", lean=self.lean)
        return _Part(session, outputs, later.union(targets))

    def saw(self, values: Mapping[str, Array]) -> None:
        """Note the types of what a part gave: those that nobody knew are read by the next."""
        self.types.update(
            (n, int(helper.np_dtype_to_tensor_dtype(v.dtype))) for n, v in values.items()
        )


class Frontier:
    """Activations of one graph over a fixed list of feeds, computed forward as far as asked.

    Every node runs once. ``feeds`` are batches; memory holds, for all of them, the tensors still to be read.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        feeds: Sequence[Mapping[str, Array]],
        types: Mapping[str, int],
        device: str,
    ) -> None:
        self.tensors: dict[str, list[Array]] = {}
        for feed in feeds:
            for name, value in feed.items():
                self.tensors.setdefault(name, []).append(value)
        self.batches = len(feeds)
        self._parts = _Parts(proto, types, device)

    def reach(self, targets: Sequence[str]) -> dict[str, list[Array]]:
        """Values of tensors, one array per feed. Runs what is missing and forgets what nobody reads any more."""
        part = self._parts.next(targets, self.tensors)
        if part is not None:
            columns: dict[str, list[Array]] = {name: [] for name in part.names}
            for b in range(self.batches):
                found = part.run({n: self.tensors[n][b] for n in part.session.inputs})
                for name, value in found.items():
                    columns[name].append(value)
            self._parts.saw({name: column[0] for name, column in columns.items() if column})
            self.tensors.update(columns)
            self.tensors = {n: v for n, v in self.tensors.items() if n in part.read}
        return {name: self.tensors[name] for name in targets}


def stream(
    proto: onnx.ModelProto,
    feeds: Iterable[Mapping[str, Array]],
    targets: Sequence[str],
    types: Mapping[str, int],
    device: str,
) -> Iterator[tuple[int, int, Array]]:
    """(feed, place among the targets, value), feed by feed; ``targets`` are in the order of the graph.

    The same parts as a ``Frontier`` runs when it is asked for one target after another, so that values are the same to
    the bit; memory holds one feed.
    """
    parts = _Parts(proto, types, device, lean=True)  # all of them stay open
    steps: list[_Part | None] = []
    for b, feed in enumerate(feeds):
        held = dict(feed)
        for i, target in enumerate(targets):
            if b == 0:
                steps.append(parts.next([target], held))
            step = steps[i]
            if step is not None:
                held.update(found := step.run(held))
                if b == 0:
                    parts.saw(found)
                held = {n: v for n, v in held.items() if n in step.read}
            yield b, i, held[target]
