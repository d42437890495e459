"""Sound models, samples and options that are odd: their meaning is unusual, their files are not broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from random_network_parts import Value
from random_networks import Blocks, finished, grow

Rng = np.random.Generator
Arrays = dict[str, Any]
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
SIZES = (1, 2, 7, 40, 90)
"""Numbers of samples."""
WIDEST = 30_000
DEEPEST = 150


@dataclass
class Odd:
    """A model, its samples by input name, and the names of what is odd about both."""

    proto: ModelProto
    arrays: Arrays
    oddities: list[str] = field(default_factory=list)

    @property
    def graph(self) -> GraphProto:
        return self.proto.graph


def draw(rng: Rng) -> tuple[Odd, list[str]]:
    """One model with up to four oddities, and options of ``prune``."""
    base = _one_of(rng, tuple(BASES))
    odd = BASES[base](rng)
    odd.oddities.append(base)
    for name in rng.permutation(list(ODDITIES))[: int(rng.integers(4))]:
        ODDITIES[name](odd, rng)
        odd.oddities.append(str(name))
    if rng.random() < 0.4:
        name = _one_of(rng, tuple(ODD_SAMPLES))
        ODD_SAMPLES[name](odd, rng)
        odd.oddities.append(name)
    return odd, list(options(rng))


def _one_of(rng: Rng, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


# ------------------------------------------------------------------------------------------------- networks


def _random(rng: Rng) -> Odd:
    """An image passes a few random blocks, maybe as tokens, then as a vector."""
    make = Blocks(lambda n: int(rng.integers(n)), int(rng.integers(2**31)))
    size = 2 * (1 + make.pick(2))
    image = Value("x", (2, size, size))
    x = make.activate(make.conv(image, 6 + make.pick(6)))
    x = grow(make, x, 1 + make.pick(3), [])
    if make.pick(2):
        x = grow(make, make.to_tokens(x), 1 + make.pick(3), [])
    x = grow(make, make.to_vector(x), make.pick(3), [])
    proto = finished(make, make.linear(x, 3), image)
    return Odd(proto, _samples(rng, image.shape, 3))


def _samples(rng: Rng, shape: tuple[int, ...], outputs: int) -> Arrays:
    count = _one_of(rng, SIZES)
    arrays: Arrays = {"x": rng.normal(size=(count, *shape)).astype(np.float32)}
    if rng.random() < 0.4:
        arrays["labels"] = np.arange(count) % outputs
    return arrays


def _chain(rng: Rng, widths: list[int], residual: bool = False) -> Odd:
    """Linear layers of these widths with an activation between each two."""
    nodes: list[NodeProto] = []
    constants: list[TensorProto] = []
    x = "x"
    for i, (before, after) in enumerate(pairwise(widths)):
        weight = rng.normal(size=(before, after)) * np.sqrt(2 / before)
        bias = 0.1 * rng.normal(size=after)
        for name, value in ((f"w{i}", weight), (f"b{i}", bias)):
            constants.append(numpy_helper.from_array(value.astype(np.float32), name))
        nodes.append(helper.make_node("Gemm", [x, f"w{i}", f"b{i}"], [f"h{i}"], f"layer{i}"))
        result = f"h{i}"
        if i < len(widths) - 2:
            operator = _one_of(rng, ("Relu", "Tanh", "Sigmoid", "LeakyRelu"))
            nodes.append(helper.make_node(operator, [result], [f"a{i}"], f"act{i}"))
            result = f"a{i}"
        if residual and before == after:
            nodes.append(helper.make_node("Add", [x, result], [f"s{i}"], f"sum{i}"))
            result = f"s{i}"
        x = result
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", widths[0]])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["N", widths[-1]])],
        constants,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Odd(proto, _samples(rng, (widths[0],), widths[-1]))


def _wide(rng: Rng) -> Odd:
    width = int(np.exp(rng.uniform(np.log(1000), np.log(WIDEST))))
    return _chain(rng, [int(rng.integers(1, 9)), width, int(rng.integers(1, 4))])


def _deep(rng: Rng) -> Odd:
    depth, width = int(rng.integers(40, DEEPEST)), int(rng.integers(2, 8))
    return _chain(rng, [3, *[width] * depth, 2], residual=bool(rng.integers(2)))


def _narrow(rng: Rng) -> Odd:
    """Layers many of which have one unit."""
    widths = [1 if rng.random() < 0.4 else int(rng.integers(2, 9)) for _ in range(6)]
    return _chain(rng, widths[: int(rng.integers(3, 7))])


def _plain(rng: Rng) -> Odd:
    return _chain(rng, [int(n) for n in rng.integers(2, 40, int(rng.integers(3, 6)))])


BASES: dict[str, Callable[[Rng], Odd]] = {
    "random blocks": _random,
    "linear layers": _plain,
    "very wide": _wide,
    "very deep": _deep,
    "one unit": _narrow,
}


# -------------------------------------------------------------------------------------------------- weights


def _weights(odd: Odd) -> list[TensorProto]:
    """Initialisers of floats that have an axis."""
    return [t for t in odd.graph.initializer if t.data_type in FLOATS and list(t.dims)]


def _change(odd: Odd, rng: Rng, change: Callable[[Any], None]) -> None:
    """Apply ``change`` to the values of one weight, in place."""
    found = _weights(odd)
    if found:
        tensor = _one_of(rng, found)
        value = numpy_helper.to_array(tensor).copy()
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            change(value)
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def _row(value: Any, rng: Rng) -> Any:
    """One slice along the first or the last axis."""
    at = int(rng.integers(value.shape[0]))
    return value[at] if rng.random() < 0.5 and value.ndim > 1 else value[..., at % value.shape[-1]]


def _constant(odd: Odd, rng: Rng) -> None:
    _change(odd, rng, lambda value: value.fill(_one_of(rng, (1.0, -0.5, 1e-3))))


def _dead(odd: Odd, rng: Rng) -> None:
    """A weight of zeros, or one in which most units are."""

    def kill(value: Any) -> None:
        share = _one_of(rng, (0.0, 0.3, 0.9))
        value[rng.random(len(value)) >= share] = 0

    _change(odd, rng, kill)


def _never_active(odd: Odd, rng: Rng) -> None:
    """A bias so low that an activation behind it never fires."""
    biases = [t for t in _weights(odd) if len(t.dims) == 1]
    if biases:
        tensor = _one_of(rng, biases)
        value = numpy_helper.to_array(tensor).copy()
        value[rng.random(len(value)) < 0.8] = -100
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def _scaled(low: float, high: float) -> Callable[[Odd, Rng], None]:
    """One weight, or one slice of it, times a power of ten."""

    def change(odd: Odd, rng: Rng) -> None:
        factor = 10.0 ** rng.uniform(low, high)

        def scale(value: Any) -> None:
            part = value if rng.random() < 0.5 else value[:1]
            part *= np.asarray(min(factor, np.finfo(value.dtype).max), value.dtype)

        _change(odd, rng, scale)

    return change


def _not_finite(odd: Odd, rng: Rng) -> None:
    def spoil(value: Any) -> None:
        value.reshape(-1)[int(rng.integers(value.size))] = _one_of(rng, (np.nan, np.inf, -np.inf))

    _change(odd, rng, spoil)


def _alike(odd: Odd, rng: Rng) -> None:
    """Units that are copies of each other, or of each other with the opposite sign."""

    def copy(value: Any) -> None:
        axis = int(rng.integers(value.ndim))
        moved = np.moveaxis(value, axis, 0)
        moved[len(moved) // 2 :] = _one_of(rng, (1, -1, 2)) * moved[: (len(moved) + 1) // 2]

    def safe(value: Any) -> None:
        if min(value.shape) > 1 and all(n % 2 == 0 for n in value.shape):
            copy(value)
        else:
            value[...] = value[:1]

    _change(odd, rng, safe)


def _aliased(odd: Odd, rng: Rng) -> None:
    """Two nodes read one initialiser, each of which had its own."""
    by_shape: dict[tuple[int, ...], list[TensorProto]] = {}
    for tensor in _weights(odd):
        by_shape.setdefault((tensor.data_type, *tensor.dims), []).append(tensor)
    pairs = [found for found in by_shape.values() if len(found) > 1]
    if pairs:
        kept, *gone = _one_of(rng, pairs)
        names = {tensor.name for tensor in gone}
        for node in odd.graph.node:
            node.input[:] = [kept.name if name in names else name for name in node.input]
        others = [t for t in odd.graph.initializer if t.name not in names]
        del odd.graph.initializer[:]
        odd.graph.initializer.extend(others)


# ----------------------------------------------------------------------------------------- graphs and types


def _repeated_output(odd: Odd, rng: Rng) -> None:
    """An output that is listed twice, given under two names, or is an input."""
    graph, form = odd.graph, int(rng.integers(3))
    if form == 0:
        graph.output.append(graph.output[0])
    elif form == 1:
        first = graph.output[0]
        graph.node.append(helper.make_node("Identity", [first.name], ["same"], "same"))
        copy = graph.output.add()
        copy.CopyFrom(first)
        copy.name = "same"
    else:
        graph.output.append(graph.input[0])


def _inner_output(odd: Odd, rng: Rng) -> None:
    """A tensor inside the network is an output as well."""
    ranks = {"Gemm": 2, "Conv": 4}
    found = [node for node in odd.graph.node if node.op_type in ranks]
    if found:
        node = _one_of(rng, found)
        shape = [None] * ranks[node.op_type]
        odd.graph.output.append(
            helper.make_tensor_value_info(node.output[0], _float_type(odd), shape)
        )


def _float_type(odd: Odd) -> int:
    """The element type of the network's numbers."""
    return int(odd.graph.output[0].type.tensor_type.elem_type)


def _other_floats(odd: Odd, rng: Rng) -> None:
    """The whole network in double or half precision."""
    kind = _one_of(rng, (TensorProto.DOUBLE, TensorProto.FLOAT16))
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for tensor in odd.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            with np.errstate(over="ignore"):
                value = numpy_helper.to_array(tensor).astype(dtype)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    for info in (*odd.graph.input, *odd.graph.output, *odd.graph.value_info):
        if info.type.tensor_type.elem_type == TensorProto.FLOAT:
            info.type.tensor_type.elem_type = kind
    for node in odd.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = kind
    with np.errstate(over="ignore"):
        odd.arrays["x"] = odd.arrays["x"].astype(dtype)


def _integer_input(odd: Odd, rng: Rng) -> None:
    """Samples are integers that the network casts."""
    first = odd.graph.input[0]
    kind = _one_of(rng, (TensorProto.UINT8, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL))
    was = first.type.tensor_type.elem_type
    if was not in FLOATS or any(o.name == first.name for o in odd.graph.output):
        return
    for node in odd.graph.node:
        node.input[:] = ["cast_x" if name == first.name else name for name in node.input]
    odd.graph.node.insert(0, helper.make_node("Cast", [first.name], ["cast_x"], "cast", to=was))
    first.type.tensor_type.elem_type = kind
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    with np.errstate(invalid="ignore"):
        odd.arrays["x"] = (np.abs(np.nan_to_num(odd.arrays["x"])) % 5 * 4).astype(dtype)


def _custom_operator(odd: Odd, rng: Rng) -> None:
    """An unknown operator: in the middle of the network, or beside it."""
    at = int(rng.integers(len(odd.graph.node)))
    read = odd.graph.node[at].output[0]
    made = helper.make_node("Thing", [read], ["thing"], "thing", domain="com.example", level=3)
    if rng.random() < 0.5:
        for node in odd.graph.node:
            node.input[:] = ["thing" if name == read else name for name in node.input]
    else:
        odd.graph.output.append(helper.make_tensor_value_info("thing", _float_type(odd), ["N"]))
    odd.graph.node.insert(at + 1, made)
    odd.proto.opset_import.append(helper.make_opsetid("com.example", 1))


def _function(odd: Odd, rng: Rng) -> None:
    """One activation is a function of the model in a domain of its own."""
    found = [n for n in odd.graph.node if n.op_type in ("Relu", "Tanh", "Sigmoid") and not n.domain]
    if found and odd.proto.ir_version >= 8:
        node = _one_of(rng, found)
        body = [helper.make_node(node.op_type, ["a"], ["b"])]
        opsets = [o for o in odd.proto.opset_import if o.domain == ""]
        odd.proto.functions.append(
            helper.make_function("com.example.own", "Act", ["a"], ["b"], body, opsets)
        )
        odd.proto.opset_import.append(helper.make_opsetid("com.example.own", 1))
        node.op_type, node.domain = "Act", "com.example.own"


def _unused(odd: Odd, rng: Rng) -> None:
    """Nodes that nothing reads, weights that no node reads, a node with an empty name."""
    odd.graph.node.append(helper.make_node("Relu", [odd.graph.node[0].output[0]], ["unread"]))
    odd.graph.initializer.append(numpy_helper.from_array(np.ones((3, 3), np.float32), "spare"))
    for node in odd.graph.node:
        node.name = ""


def _weights_as_inputs(odd: Odd, rng: Rng) -> None:
    """Initialisers are inputs with a default, as old files list them."""
    for tensor in odd.graph.initializer:
        odd.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        )


def _fixed_batch(odd: Odd, rng: Rng) -> None:
    """The first axis has a length, of one or of a few samples."""
    length = _one_of(rng, (1, 3))
    for info in (*odd.graph.input[:1], *odd.graph.output):
        axes = info.type.tensor_type.shape.dim
        if len(axes) and axes[0].dim_param == "N":
            axes[0].dim_value = length


ODDITIES: dict[str, Callable[[Odd, Rng], None]] = {
    "constant weight": _constant,
    "dead units": _dead,
    "never active": _never_active,
    "huge weight": _scaled(4, 38),
    "tiny weight": _scaled(-45, -5),
    "not finite": _not_finite,
    "alike units": _alike,
    "aliased weight": _aliased,
    "repeated output": _repeated_output,
    "inner output": _inner_output,
    "other floats": _other_floats,
    "integer input": _integer_input,
    "custom operator": _custom_operator,
    "function": _function,
    "unused": _unused,
    "weights as inputs": _weights_as_inputs,
    "fixed batch": _fixed_batch,
}


# -------------------------------------------------------------------------------------------------- samples


def _filled(value: Any) -> Callable[[Odd, Rng], None]:
    def change(odd: Odd, rng: Rng) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            odd.arrays["x"][:] = np.asarray(value).astype(odd.arrays["x"].dtype)

    return change


def _one_wrong(odd: Odd, rng: Rng) -> None:
    """One sample has a number that is not finite."""
    if odd.arrays["x"].dtype.kind == "f":
        odd.arrays["x"][0].reshape(-1)[0] = _one_of(rng, (np.nan, np.inf))


def _spread(odd: Odd, rng: Rng) -> None:
    """Samples of magnitudes from the smallest to the largest."""
    if odd.arrays["x"].dtype == np.float32:
        rows = odd.arrays["x"]
        with np.errstate(over="ignore"):
            rows *= (10.0 ** rng.uniform(-30, 12, (len(rows), *[1] * (rows.ndim - 1)))).astype(
                np.float32
            )


def _one_class(odd: Odd, rng: Rng) -> None:
    odd.arrays["labels"] = np.zeros(len(odd.arrays["x"]), np.int64)


def _wrong_labels(odd: Odd, rng: Rng) -> None:
    """Labels that no class has."""
    odd.arrays["labels"] = rng.integers(-2, 1000, len(odd.arrays["x"]))


ODD_SAMPLES: dict[str, Callable[[Odd, Rng], None]] = {
    "samples of zeros": _filled(0),
    "samples all alike": _filled(0.7),
    "samples of 1e30": _filled(1e30),
    "one sample not finite": _one_wrong,
    "samples of all magnitudes": _spread,
    "one class": _one_class,
    "labels of no class": _wrong_labels,
}


# -------------------------------------------------------------------------------------------------- options

METHODS = (
    *[
        ("--importance", name)
        for name in ["obs", "activation", "l1", "l2", "random", "correlation", "mint", "snacs"]
    ],
    *[()] * 8,  # the default
    ("--importance", "nnrelief"),
    ("--importance", "nnrelief", "--granularity", "connection", "--alpha", "0.9"),
    ("--importance", "oamip", "--mode", "decoupled"),
    ("--importance", "oamip", "--mode", "joint", "--relax", "--images-per-class", "1"),
    ("--importance", "oamip", "--mode", "per-class", "--formulation", "exact"),
    ("--importance", "oamip", "--mode", "joint", "--loss-weight", "1e6"),
)
CHOICES: dict[str, tuple[tuple[str, ...], ...]] = {
    "--allocate": (("mip",), ("global",), ("uniform",)),
    "--refit": (("least-squares",), ("bias",), ("none",)),
    "--align": (("auto",), ("1",), ("4",), ("64",)),
    "--floor": (("0.3",), ("1",), ("0",)),
    "--protect": (("0.2",), ("0.9",)),
    "--limits": (("snacs",),),
    "--iterations": (("2",), ("3",)),
    "--effort": (("low",), ("high",)),
    "--draws": (("3",),),
    "--exclude": (("*",), ("w0",), ("nothing*",)),
    "--task": (("classes",), ("binary",), ("values",), ("embedding",)),
    "--samples": (("1",), ("3",), ("1000000",)),
    "--batch-size": (("1",), ("13",), ("100000",)),
    "--workers": (("1",), ("7",)),
    "--seed": (("0",), ("4294967295",)),
    "--solver": (("highs",), ("gurobi",)),
    "--time-limit": (("0.01",), ("5",)),
    "--augment": (("none",),),
    "--strict": ((),),
    "--no-provenance": ((),),
    "--dry-run": ((),),
}
"""Values of options that may be given; an empty one is a flag."""
BUDGETS = (
    ("--macs", "0.5"),
    ("--macs", "0.05"),
    ("--macs", "0.99"),
    ("--params", "0.5"),
    ("--size", "0.7"),
    ("--max-loss", "0.1"),
    ("--max-drop", "5"),
    ("--threshold", "0.01"),
    ("--macs", "0.5", "--params", "0.6"),
    ("--latency", "0.8"),
)
MEMORY = ("300MB", "500MB", "1GB")


def options(rng: Rng) -> Iterator[str]:
    """A budget, the memory, a method, and a few of all other options."""
    yield from _one_of(rng, BUDGETS)
    yield from ("--max-memory", _one_of(rng, MEMORY))
    yield from _one_of(rng, METHODS)
    if rng.random() < 0.8:
        yield "--force"
    for name in rng.permutation(list(CHOICES))[: int(rng.integers(5))]:
        yield from (str(name), *_one_of(rng, CHOICES[str(name)]))


def difference(odd: Odd, content: bytes) -> str:
    """Describe how a written model fails to take the place of the original; empty if it does not."""
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model)
    names = [info.name for info in odd.graph.output]
    if [info.name for info in model.graph.output] != names:
        return f"outputs {[info.name for info in model.graph.output]} in place of {names}"
    if any(node.domain == "com.example" for node in odd.graph.node):
        return ""  # nothing runs it
    feed = _feed(odd)
    if feed is None:
        return ""
    before, after = (_run(proto, feed) for proto in (odd.proto, model))
    for name, old, new in zip(names, before, after, strict=True):
        if old.shape != new.shape or old.dtype != new.dtype:
            return f"{name} is {new.dtype}{new.shape} in place of {old.dtype}{old.shape}"
        if np.isfinite(old).all() and not np.isfinite(new).all():
            return f"{name} is not finite any more"
    return ""


def _feed(odd: Odd) -> Arrays | None:
    """The first samples, as many as the model takes."""
    length = odd.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    samples = odd.arrays["x"]
    if len(samples) < length:
        return None
    return {"x": samples[: length or 5]}


def _run(proto: ModelProto, feed: Arrays) -> list[Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    found: list[Any] = session.run(None, feed)
    return found
