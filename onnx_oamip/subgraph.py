"""Parts of a graph as models of their own, so that no run computes more than it must.

``Slicer`` cuts out what leads from some tensors to others. ``Frontier`` walks a graph front to back over all feeds
and holds only the tensors that later nodes still read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import ValueInfoProto, helper

from .bodies import reads
from .data import Samples
from .records import Array, Model
from .runtime import Session
from .settings import ROOM

FRONTIER_BYTES = ROOM
"""Bound of the activations that a walk holds for all its feeds."""
RUN = 32
"""Samples in one run of the model, at most, wherever something is learnt."""


def run_size(model: Model, room: int = FRONTIER_BYTES) -> int:
    """Samples in one run wherever something is learnt: ``RUN``, or as many as keep the widest frontier in ``room``.

    It follows from the model alone: kernels round another way at another batch, and what is learnt, and with it the
    pruned file, should not depend on the batch size that someone compares models at.
    """
    return min(RUN, _most(model, room))


def side_by_side(model: Model, room: int) -> int:
    """Runs of :func:`run_size` samples whose widest frontiers fit in ``room`` bytes together; at least one."""
    return max(1, _most(model, room) // run_size(model, room))


def _most(model: Model, room: int) -> int:
    """Samples whose widest frontier, about three of the largest tensors, takes ``room`` bytes; at least one."""
    sizes = sorted((int(np.prod(s)) for n, s in model.shapes.items() if n not in model.constants), reverse=True)
    return max(1, room // max(4 * sum(sizes[:3]) // max(model.batch, 1), 1))


def affordable(
    model: Model, samples: Samples, batch_size: int, room: int | None = None
) -> tuple[list[dict[str, Array]], int]:
    """(feeds, samples used): as many as keep the widest frontier within ``room`` bytes (``FRONTIER_BYTES``)."""
    most = _most(model, FRONTIER_BYTES if room is None else room)
    feeds: list[dict[str, Array]] = []
    used = 0
    for index, feed in samples.batches(min(batch_size, most)):
        if used and used + len(index) > most:
            break
        feeds.append(feed)
        used += len(index)
    return feeds, used


class Slicer:
    """Index of a proto's nodes, tensors and initialisers."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.nodes = list(proto.graph.node)
        self.reads = [reads(node) for node in self.nodes]
        self.producer = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
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

    def model(self, nodes: Sequence[int], outputs: Sequence[str], dtypes: Mapping[str, int]) -> onnx.ModelProto:
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
            graph.output.append(helper.make_tensor_value_info(name, kind, None) if kind else ValueInfoProto(name=name))
        return result


def element_types(proto: onnx.ModelProto, dtypes: Mapping[str, object]) -> dict[str, int]:
    """ONNX element types by tensor name, from numpy dtypes and the graph's own inputs."""
    types = {name: int(helper.np_dtype_to_tensor_dtype(dtype)) for name, dtype in dtypes.items()}
    types.update({v.name: v.type.tensor_type.elem_type for v in proto.graph.input})
    return types


class Frontier:
    """Activations of one graph over a fixed list of feeds, computed forward as far as asked.

    Every node runs once. ``feeds`` are batches; memory holds, for all of them, the tensors still to be read.
    """

    def __init__(
        self, proto: onnx.ModelProto, feeds: Sequence[Mapping[str, Array]], types: Mapping[str, int], device: str
    ) -> None:
        self.proto = proto
        self.types = dict(types)
        self.device = device
        self.tensors: dict[str, list[Array]] = {}
        for name in feeds[0] if feeds else ():
            self.tensors[name] = [feed[name] for feed in feeds]
        self.batches = len(feeds)
        self.done: set[str] = set()

    def reach(self, targets: Sequence[str]) -> dict[str, list[Array]]:
        """Values of tensors, one array per feed. Runs what is missing and forgets what nobody reads any more."""
        slicer = Slicer(self.proto)
        nodes = slicer.needed(targets, self.tensors)
        if nodes:
            self.done.update(slicer.nodes[i].name for i in nodes)
            rest = [i for i, node in enumerate(slicer.nodes) if node.name not in self.done]
            later = {n for i in rest for n in slicer.reads[i]}
            made = [n for i in nodes for n in slicer.nodes[i].output if n]
            outputs = [n for n in made if n in later or n in targets]
            for name in outputs:
                self.types.setdefault(name, 0)
            part = slicer.model(nodes, outputs, self.types)
            session = Session(part, self.device, what="a part of the model")
            names = session.inputs
            columns: list[list[Array]] = [[] for _ in outputs]
            for b in range(self.batches):
                values = session.run({n: self.tensors[n][b] for n in names}, outputs)
                for column, value in zip(columns, values, strict=True):
                    column.append(value)
            self.tensors.update(zip(outputs, columns, strict=True))
            found = {n: c[0].dtype for n, c in zip(outputs, columns, strict=True) if c}
            self.types.update((n, int(helper.np_dtype_to_tensor_dtype(t))) for n, t in found.items())
            self.tensors = {n: v for n, v in self.tensors.items() if n in later or n in targets}
        return {name: self.tensors[name] for name in targets}
