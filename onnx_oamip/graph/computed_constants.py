"""Constants that nodes compute from initialisers: which of them are folded, and the values of the others.

A file may store a tensor once and use it in several forms: a shared weight behind Identity nodes, a float16 weight
behind a Cast, a small table behind a Tile. Folding such nodes would store every form. Normalising therefore folds only
what does not enlarge the file (:func:`enlarging`), and the other nodes stay in the graph. Their values are available
all the same (:class:`Constants`). A new value of a view of an initialiser is written there (``ops.views``).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from onnx_oamip.core.records import Array, Folded
from onnx_oamip.graph import external_data, subgraphs
from onnx_oamip.graph.ops import Trait, domains, has, kinds, views

SMALL = 64
"""Bytes of a constant that cost no more than the node that would compute it."""


LONGEST_COPIED = 4096
"""Elements of a vector of equal numbers of which every reader gets its own copy."""
INDEX_TYPES = frozenset({TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL})
FLOATING_TYPES = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE})


def must_stay(node: NodeProto) -> bool:
    """Tests for nodes that are never folded.

    Quantised weights stay quantised; random and stateful operators stay, and nodes with one of them in a subgraph.

    Args:
        node: Any node.

    Returns:
        True if the node stays although all it reads is constant.
    """
    return _runs(node, kinds.NOT_FOLDED)


def is_random(node: NodeProto) -> bool:
    """Tests for nodes that draw random numbers, themselves or in a subgraph.

    Args:
        node: Any node.

    Returns:
        True if two runs of the node may differ.
    """
    return _runs(node, kinds.RANDOM)


def _runs(node: NodeProto, beginnings: tuple[str, ...]) -> bool:
    """Tests for nodes that run an operator whose name has one of some beginnings."""
    operators = [node.op_type]
    for body in subgraphs.all_bodies(node):
        operators += [inner.op_type for inner in subgraphs.nodes(body)]
    return any(operator.startswith(beginnings) for operator in operators)


def computing_nodes(
    graph: GraphProto, stays: Callable[[NodeProto], bool] = lambda _: False
) -> list[NodeProto]:
    """Finds the nodes that read nothing but constants.

    Args:
        graph: The main graph, its nodes in topological order.
        stays: Nodes whose outputs do not count as constants.

    Returns:
        The nodes, in the order of the graph.
    """
    known = {tensor.name for tensor in graph.initializer}
    result = []
    for node in graph.node:
        if known.issuperset(subgraphs.reads(node)) and not stays(node):
            known.update(name for name in node.output if name)
            result.append(node)
    return result


# ------------------------------------------------------------------------------------------------------------ aliases


def share(proto: ModelProto) -> None:
    """Makes all readers of one constant read one tensor, in place.

    Readers of an Identity of a constant read the constant itself; of several equal nodes that compute the same constant
    (a weight that is transposed for each of its uses) or hold the same constant of a function, all readers read the
    first. The nodes that lose their readers stay.

    Args:
        proto: A model whose names are unique.
    """
    first: dict[str, str] = {}
    made_by: dict[bytes, list[str]] = {}
    for node in computing_nodes(proto.graph, must_stay):
        is_stored_alone = (
            node.op_type in kinds.CONSTANT and node.doc_string != subgraphs.OF_FUNCTION
        )
        if subgraphs.all_bodies(node) or is_stored_alone:
            continue
        for slot, name in enumerate(node.input):
            node.input[slot] = first.get(name, name)
        if views.is_identity(node):
            first[node.output[0]] = node.input[0]
            continue
        earlier = made_by.setdefault(_without_names(node), list(node.output))
        first.update(zip(node.output, earlier, strict=True))
    for reader in subgraphs.nodes(proto.graph):
        for slot, name in enumerate(reader.input):
            if first.get(name, name) != name:
                reader.input[slot] = first[name]
        if reader.doc_string == subgraphs.OF_FUNCTION:
            reader.ClearField("doc_string")


def separate(proto: ModelProto, inputs: Set[str]) -> None:
    """Gives every reader of a vector of equal numbers a copy of its own, in place.

    Exporters store equal initialisers once: the gains of all normalisations that were never trained are one vector of
    ones. As one tensor it would tie the channels of all its readers to each other.

    Args:
        proto: A model whose names are unique.
        inputs: Initialisers whose value a feed may replace.
    """
    readers: dict[str, int] = defaultdict(int)
    nodes = list(subgraphs.nodes(proto.graph))
    for node in nodes:
        for name in node.input:
            readers[name] += 1
    outputs = {value.name for graph in subgraphs.graphs(proto.graph) for value in graph.output}
    shared = {
        tensor.name: tensor
        for tensor in proto.graph.initializer
        if readers[tensor.name] > 1 and tensor.name not in inputs | outputs and _is_uniform(tensor)
    }
    if not shared:
        return
    taken = subgraphs.names(proto.graph)
    read: set[str] = set()
    for node in nodes:
        for slot, name in enumerate(node.input):
            if name not in shared or name not in read:
                read.add(name)
                continue
            copy = subgraphs.unused_name(name, taken)
            taken.add(copy)
            proto.graph.initializer.append(shared[name])
            proto.graph.initializer[-1].name = copy
            node.input[slot] = copy


def _is_uniform(tensor: TensorProto) -> bool:
    """Tests for a small vector of equal numbers of a floating type, along one axis of any rank."""
    sizes = [size for size in tensor.dims if size != 1]
    if (
        len(sizes) != 1
        or not 0 < sizes[0] <= LONGEST_COPIED
        or tensor.data_type not in FLOATING_TYPES
    ):
        return False
    value = external_data.array(tensor)
    return bool((value == value.reshape(-1)[0]).all())


def _without_names(node: NodeProto) -> bytes:
    """Key of the computation of a node; nodes that compute the same have equal keys."""
    bare = NodeProto()
    bare.CopyFrom(node)
    for text in ("name", "doc_string"):
        bare.ClearField(text)
    del bare.metadata_props[:]
    bare.output[:] = [""] * len(node.output)
    return bare.SerializeToString(deterministic=True)


def hoist(proto: ModelProto) -> None:
    """Moves nodes of subgraphs that compute constants to the main graph, where they are folded, in place.

    Args:
        proto: A flattened model.
    """
    main = proto.graph
    if not any(subgraphs.all_bodies(node) for node in main.node):
        return
    known = {tensor.name for tensor in main.initializer}
    known -= {value.name for value in main.input}
    nodes: list[NodeProto] = []
    for node in main.node:
        for body in subgraphs.all_bodies(node):
            for graph in subgraphs.graphs(body):
                nodes += _taken_out(graph, known)
        nodes.append(node)
        if known.issuperset(subgraphs.reads(node)) and not must_stay(node):
            known.update(name for name in node.output if name)
    if len(nodes) > len(main.node):
        subgraphs.set_nodes(main, nodes)
        subgraphs.return_own_tensors(main)


def _taken_out(graph: GraphProto, known: set[str]) -> list[NodeProto]:
    """Removes the nodes of a subgraph that read known constants only; their outputs become known."""
    moved = []
    kept = []
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        computes = known.issuperset(node.input) and _is_plain(node) and not must_stay(node)
        # An Identity of an outer tensor is how a subgraph returns one.
        returns = views.is_identity(node) and node.output[0] in outputs
        if not computes or returns or not any(node.input):
            kept.append(node)
            continue
        known.update(name for name in node.output if name)
        moved.append(NodeProto.FromString(node.SerializeToString()))
    if moved:
        subgraphs.set_nodes(graph, kept)
    return moved


# ------------------------------------------------------------------------------------------------------------ folding


def origins(proto: ModelProto, source: ModelProto) -> dict[str, Folded]:
    """Finds the nodes and initialisers that folded constants were computed from.

    Args:
        proto: The normalised graph.
        source: The graph that it was made of, with the nodes that were folded.

    Returns:
        Their names, by the name of the constant.
    """
    stored = {tensor.name: tensor for tensor in source.graph.initializer}
    makers = {name: node for node in subgraphs.nodes(source.graph) for name in node.output if name}
    held = {
        node.output[0]: node.attribute[0].t
        for node in subgraphs.nodes(source.graph)
        if node.op_type in kinds.CONSTANT and node.attribute[0].name == "value"
    }
    result = {}
    for tensor in proto.graph.initializer:
        if tensor.name not in stored and tensor.name in makers:
            result[tensor.name] = _origin(tensor.name, {**stored, **held}, makers)
    return result


def _origin(
    name: str, stored: Mapping[str, TensorProto], makers: Mapping[str, NodeProto]
) -> Folded:
    """Nodes and initialisers, or nodes that hold constants, on which a tensor depends."""
    nodes: dict[str, None] = {}
    sizes: dict[str, int] = {}
    pending = [name]
    seen = {name}
    while pending:
        tensor = pending.pop()
        if tensor in stored and _may_hold_values(stored[tensor]):
            sizes[tensor] = math.prod(stored[tensor].dims)
        if tensor in makers:
            nodes.setdefault(makers[tensor].name)
            reads = [read for read in subgraphs.reads(makers[tensor]) if read not in seen]
            seen.update(reads)
            pending += reads
    initialisers = sorted(sizes, key=lambda tensor: -sizes[tensor])
    return Folded(tuple(initialisers), tuple(node for node in nodes if node))


def _may_hold_values(tensor: TensorProto) -> bool:
    """Tests for anything but a shape, a list of axes, or indices."""
    return len(tensor.dims) > 1 or tensor.data_type not in INDEX_TYPES


@dataclass
class _Part:
    """Nodes that compute constants from the same initialisers.

    Attributes:
        nodes: The nodes in topological order.
        before: Bytes that folding all of them frees.
        after: Bytes of the constants that folding them makes.
    """

    nodes: list[NodeProto] = field(default_factory=list)
    before: int = 0
    after: int = 0


def enlarging(graph: GraphProto, sizes: Mapping[str, int]) -> set[str]:
    """Finds the constants that must stay computed because folding them would make the file larger.

    Nodes with an initialiser in common are folded together, or else each on its own if its outputs are not larger than
    what only it reads.

    Args:
        graph: The main graph, its nodes in topological order.
        sizes: Bytes of the computed constants, as far as they are known.

    Returns:
        Names of tensors.
    """
    nodes = computing_nodes(graph, must_stay)
    stored = {t.name: external_data.size_of(t) for t in graph.initializer}
    constants = [node for node in nodes if node.op_type in kinds.CONSTANT]
    stored.update((node.output[0], node.ByteSize()) for node in constants)
    computing = [node for node in nodes if node.op_type not in kinds.CONSTANT]
    known = {**{name: 0 for node in computing for name in node.output}, **sizes, **stored}
    readers: dict[str, int] = defaultdict(int)
    for node in graph.node:
        for name in set(subgraphs.reads(node)):
            readers[name] += 1
    for value in graph.output:
        readers[value.name] += 1
    result: set[str] = set()
    for part in _parts(computing, stored, known, readers):
        if part.after > part.before:
            result |= _enlarging_alone(part.nodes, known, readers)
    return result


def _parts(
    computing: Sequence[NodeProto],
    stored: Mapping[str, int],
    known: Mapping[str, int],
    readers: Mapping[str, int],
) -> Iterable[_Part]:
    """Divides nodes into parts that have no large constant in common, with their costs."""
    root: dict[str, str] = {}

    def find(name: str) -> str:
        while root.setdefault(name, name) != name:
            name = root[name]
        return name

    def joined(node: NodeProto) -> list[str]:
        inputs = [name for name in subgraphs.reads(node) if known[name] > SMALL]
        return [*inputs, *(name for name in node.output if name)]

    for node in computing:
        names = joined(node)
        for name in names[1:]:
            root[find(name)] = find(names[0])
    parts: dict[str, _Part] = defaultdict(_Part)
    inner: dict[str, int] = defaultdict(int)
    for node in computing:
        part = parts[find(joined(node)[-1])]
        part.nodes.append(node)
        part.before += node.ByteSize()
        for name in set(subgraphs.reads(node)):
            inner[name] += 1
    for part in parts.values():
        read = {name for node in part.nodes for name in subgraphs.reads(node)}
        made = {name for node in part.nodes for name in node.output}
        freed = [n for n in read if n in stored and inner[n] == readers[n]]
        left = [n for n in made if readers[n] > inner[n] and known[n] > SMALL]
        part.before += sum(stored[name] for name in freed)
        part.after += sum(known[name] for name in left)
    return parts.values()


def _enlarging_alone(
    nodes: Sequence[NodeProto],
    known: Mapping[str, int],
    readers: Mapping[str, int],
) -> set[str]:
    """Outputs of those nodes of a part that are not folded, each judged on its own."""
    result: set[str] = set()
    for node in nodes:
        inputs = set(subgraphs.reads(node))
        freed = sum(known[name] for name in inputs if readers[name] == 1)
        made = sum(known[name] for name in node.output if known[name] > SMALL)
        if made > freed or not result.isdisjoint(inputs):
            result.update(name for name in node.output if name)
    return result


# ------------------------------------------------------------------------------------------------------------- values


def computed_nodes(graph: GraphProto) -> dict[str, NodeProto]:
    """Finds the constants that nodes compute, dequantised weights among them unless activations are quantised too.

    Where activations are quantised as well, ONNX Runtime fuses both dequantisations with the product behind them, and
    the weights stay codes.

    Args:
        graph: The main graph, its nodes in topological order.

    Returns:
        The node by the name of its output.
    """
    kinds_of = {t.name: helper.tensor_dtype_to_np_dtype(t.data_type) for t in graph.initializer}
    quantises = any(has(node, Trait.QUANTISES) for node in subgraphs.nodes(graph))

    def stays(node: NodeProto) -> bool:
        if not _is_plain(node):
            return True
        if has(node, Trait.DEQUANTISES) and not quantises:
            kind = kinds_of.get(node.input[0])
            return kind is None or kind.kind not in "iu"
        return must_stay(node)

    nodes = computing_nodes(graph, stays)
    return {n.output[0]: n for n in nodes if len(n.output) == 1 and n.input}


def followed_views(graph: GraphProto, nodes: Mapping[str, NodeProto]) -> dict[str, str]:
    """Finds the constants that are views of an initialiser.

    Args:
        graph: The main graph.
        nodes: Node of every computed constant, in the order of the graph.

    Returns:
        The initialiser by the name of the view.
    """
    stored = {tensor.name: tensor for tensor in graph.initializer}
    result: dict[str, str] = {}
    for name, node in nodes.items():
        source = node.input[0]
        root = source if source in stored else result.get(source)
        if root is not None and (views.is_view(node) or _is_dequantised(node, stored, nodes)):
            result[name] = root
    return result


def _is_dequantised(
    node: NodeProto, stored: Mapping[str, TensorProto], nodes: Mapping[str, NodeProto]
) -> bool:
    """Tests for codes or numbers of half precision, less constant zero points or times constant scales.

    They may be cast to the type of the scales before.
    """
    if has(node, Trait.DEQUANTISES):
        return True
    codes = node.input[0]
    while codes in nodes and (
        views.keeps_places(nodes[codes]) or has(nodes[codes], Trait.SUBTRACTS)
    ):
        codes = nodes[codes].input[0]
    if not has(node, Trait.SCALES | Trait.SUBTRACTS) or codes not in stored:
        return False
    kind = helper.tensor_dtype_to_np_dtype(stored[codes].data_type)
    return (views.are_codes(kind) or views.is_half(kind)) and _broadcasts(
        node, stored, stored[codes]
    )


def _broadcasts(node: NodeProto, stored: Mapping[str, TensorProto], source: TensorProto) -> bool:
    """Tests for a stored second input whose shape broadcasts to that of the source, not the other way round."""
    if node.input[1] not in stored:
        return False
    shape = tuple(source.dims)
    other = tuple(stored[node.input[1]].dims)
    fits = zip(reversed(shape), reversed(other), strict=False)
    return len(other) <= len(shape) and all(n in (1, length) for length, n in fits)


class Constants(Mapping[str, Array]):
    """Values of constants by name: those of initialisers, and those that nodes compute from them, on demand.

    Attributes:
        stored: Values of the initialisers.
        nodes: Node that computes a constant, by the name of the constant.
        views: Initialiser by the name of a constant that holds its elements, transposed, reshaped, cast or dequantised.
    """

    def __init__(self, proto: ModelProto, wanted: Callable[[str], bool] = lambda _: True) -> None:
        """Finds the constants.

        Args:
            proto: The model; an initialiser that changes later keeps its value here.
            wanted: Computed constants to offer, by name.
        """
        graph = proto.graph
        self.stored = {t.name: external_data.array(t) for t in graph.initializer}
        self.nodes = {name: n for name, n in computed_nodes(graph).items() if wanted(name)}
        self.views = followed_views(graph, self.nodes)
        self._proto = proto
        self._values: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        if name in self.stored:
            return self.stored[name]
        if name not in self._values:
            self._values[name] = self._computed(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*self.stored, *self.nodes))

    def __len__(self) -> int:
        return len(self.stored) + len(self.nodes)

    def __contains__(self, name: object) -> bool:
        return name in self.stored or name in self.nodes

    def path(self, name: str) -> list[NodeProto]:
        """Nodes between a view and its initialiser.

        Args:
            name: A constant that is a view, or an initialiser.

        Returns:
            The nodes, the one behind the initialiser first.
        """
        result: list[NodeProto] = []
        while name not in self.stored:
            result.insert(0, self.nodes[name])
            name = self.nodes[name].input[0]
        return result

    def _computed(self, name: str) -> Array:
        node = self.nodes[name]
        if name in self.views:
            others = [self[other] for other in node.input[1:] if other]
            moved = views.read(node, self[node.input[0]], others)
            if moved is not None:
                return moved
        # Imported here: a session needs a module that uses this one.
        from onnx_oamip.graph.partial_execution import computed

        return computed(self._proto, name)


def _is_plain(node: NodeProto) -> bool:
    """Tests for a node of ONNX's own domain without subgraphs."""
    return node.domain in domains.STANDARD and not subgraphs.all_bodies(node)
