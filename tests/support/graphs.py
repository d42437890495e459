"""Graphs built from ONNX text with seeded weights, and comparisons that apply to any graph."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

from onnx_oamip.core.records import (
    Array,
    Bools,
    Coupling,
    Model,
)
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite

RUNTIME = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
"""The release of ONNX Runtime: what an older one cannot do is left out there."""
OPSET = min(onnx.defs.onnx_opset_version(), 24 if RUNTIME >= (1, 24) else 23)
"""The newest opset that both know."""


def build(
    text: str,
    opset: int = 17,
    ir: int = 8,
    domains: Mapping[str, int] | None = None,
    seed: int = 0,
    weights_as_inputs: bool = False,
) -> ModelProto:
    """The graph ``(inputs) => (outputs) <constants> { nodes }``.

    Constants declared without a value get seeded random weights, so that a graph reads as its architecture. Outputs
    declared as ``float[]`` get the shape that inference finds.
    """
    imports = ", ".join(f'"{d}": {v}' for d, v in {"": opset, **(domains or {})}.items())
    proto = parser.parse_model(f"<ir_version: {ir}, opset_import: [{imports}]> case {text}")
    graph = proto.graph
    made = {name for node in graph.node for name in node.output} | {
        t.name for t in graph.initializer
    }
    for value in graph.value_info:
        if value.name not in made:
            graph.initializer.append(random_weight(value, seed))
            if weights_as_inputs:
                graph.input.append(value)
    del graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    found = {v.name: v for v in (*inferred.graph.output, *inferred.graph.value_info)}
    for value in graph.output:
        if not value.type.tensor_type.HasField("shape"):
            value.CopyFrom(found[value.name])
    return proto


def random_weight(value: onnx.ValueInfoProto, seed: int) -> TensorProto:
    """Weights of a variance that keeps activations near one; ``var*`` and ``gain*`` are positive."""
    kind = value.type.tensor_type
    shape = [d.dim_value for d in kind.shape.dim]
    rng = np.random.default_rng([seed, zlib.crc32(value.name.encode())])
    if value.name.startswith(("var", "gain")):
        values = rng.uniform(0.5, 1.5, shape)
    elif len(shape) > 1:
        # He scaling needs the fan-in; the smaller of the two plausible ones keeps signals from dying out.
        fan = min(np.prod(shape[1:]), np.prod(shape) / shape[-1])
        values = rng.standard_normal(shape) / np.sqrt(fan)
    else:
        values = 0.3 * rng.standard_normal(shape)
    return numpy_helper.from_array(
        values.astype(helper.tensor_dtype_to_np_dtype(kind.elem_type)), value.name
    )


def load(proto: ModelProto, folder: Path, bindings: Mapping[str, int] | None = None) -> Model:
    """Write and load: every test sees the graph as a user's file."""
    path = folder / "case.onnx"
    path.write_bytes(proto.SerializeToString())
    return models.load(path, bindings)


def feed(model: Model, seed: int, batch: int | None = None) -> dict[str, Array]:
    """Random inputs; where the leading dimension is symbolic it is ``batch`` long. Integers are small indices.

    Inputs that carry sizes hold what their names say for an image of 8 channels and 4 x 4 pixels.
    """
    sizes = {
        "from": [0, 0, 0, 1],
        "to": [1, 8, 3, 4],
        "pads": [0, 0, 1, 0, 0, 0, 0, 2],
        "size": [1, 8, 6, 5],
        "ones": [1, 1, 1, 1],
        "parts": [5, 3],
    }
    rng = np.random.default_rng([seed, 7])
    made: dict[str, Array] = {}
    for port in model.inputs:
        shape = list(model.shapes[port.name])
        if batch is not None and shape and not isinstance(port.dims[0], int):
            shape[0] = batch
        if port.name in sizes:
            made[port.name] = np.asarray(sizes[port.name], np.int64)
        elif port.dtype.kind == "b":
            made[port.name] = rng.integers(0, 2, shape).astype(bool)
        elif port.dtype.kind in "iu":
            made[port.name] = rng.integers(0, 5, shape).astype(port.dtype)
        else:
            made[port.name] = rng.standard_normal(shape).astype(port.dtype)
    return made


def distance(reference: Sequence[Array], other: Sequence[Array]) -> float:
    """Largest difference over the largest magnitude, over all outputs; infinite for unequal shapes or types."""
    worst, scale = 0.0, 0.0
    for a, b in zip(reference, other, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        a64, b64 = a.astype(np.float64), b.astype(np.float64)
        both = np.isfinite(a64) & np.isfinite(b64)
        if not np.array_equal(a64[~both], b64[~both], equal_nan=True):
            return float("inf")
        worst = max(worst, float(np.abs(a64 - b64)[both].max(initial=0.0)))
        scale = max(scale, float(np.abs(a64)[both].max(initial=0.0)))
    return worst / scale if scale else worst


def random_keep(coupling: Coupling, rng: np.random.Generator, density: float) -> Bools:
    """A random choice of units that leaves at least one in every group."""
    keep = rng.random(coupling.n_units) < density
    for group in coupling.groups:
        if not keep[group.units].any():
            keep[rng.choice(group.units)] = True
    return keep


def keep_one(coupling: Coupling, rng: np.random.Generator) -> Bools:
    """One unit of every group: the narrowest model there is."""
    keep = np.zeros(coupling.n_units, bool)
    for group in coupling.groups:
        keep[rng.choice(group.units)] = True
    return keep


def assert_exact(
    model: Model,
    coupling: Coupling,
    keep: Bools,
    tolerance: float = 1e-5,
    batches: Sequence[int] = (1, 3),
    rounds: bool = False,
) -> ModelProto:
    """The cut model is valid and equals the original with removed channels zeroed at their consumers.

    Where the graph ``rounds``, a value on the edge of a step may fall to either side; then two of three further feeds
    must be equal: what is wrong is wrong for all of them.
    """
    cut = rewrite.cut(model, coupling, keep)
    onnx.checker.check_model(cut, full_check=True)
    masked = rewrite.mask(model, coupling, keep)
    small, reference = (Session(proto, "cpu", exact=True) for proto in (cut, masked))
    assert small.inputs == [p.name for p in model.inputs]

    def apart(seed: int, batch: int) -> float:
        values = feed(model, seed, batch)
        return distance(reference.run(values), small.run(values))

    for seed, batch in enumerate(batches):
        found = apart(seed, batch)
        if found > tolerance and rounds:
            found = sorted(apart(100 * (seed + 1) + i, batch) for i in range(3))[1]
        assert found <= tolerance, (
            f"cut and masked differ by {found:.2e} at batch {batch}, keep {keep.astype(int)}"
        )
    return cut


def constants(proto: ModelProto) -> dict[str, Array]:
    """Initialisers by name."""
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def operands(proto: ModelProto) -> Iterator[tuple[str, int, Array]]:
    """Every constant where a node reads it: (node, slot, value). Names of constants do not matter to a graph."""
    held = constants(proto)
    for node in proto.graph.node:
        for slot, name in enumerate(node.input):
            if name in held:
                yield node.name, slot, held[name]


# A few networks that several test files look at.
MLP = """(float[N,6] x) => (float[N,4] y)
<float[6,12] w1, float[12] b1, float[12,10] w2, float[10] b2, float[10,4] w3, float[4] b3> {
    a = Gemm(x, w1, b1)
    h = Relu(a)
    b = Gemm(h, w2, b2)
    r = Relu(b)
    y = Gemm(r, w3, b3)
}"""
CNN = """(float[N,3,8,8] x) => (float[N,5] y)
<float[8,3,3,3] w1, float[8] b1, float[12,8,3,3] w2, float[12] gain, float[12] b2, float[12] m, float[12] var,
 float[192,5] w3, float[5] b3> {
    a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
    h = Relu(a)
    p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(h)
    b = Conv<pads = [1, 1, 1, 1]>(p, w2)
    n = BatchNormalization(b, gain, b2, m, var)
    r = Relu(n)
    f = Flatten(r)
    y = Gemm(f, w3, b3)
}"""
RESIDUAL = """(float[N,3,6,6] x) => (float[N,4] y)
<float[8,3,3,3] w1, float[6,8,3,3] w2, float[8,6,3,3] w3, float[8,4] w4> {
    a = Conv<pads = [1, 1, 1, 1]>(x, w1)
    h = Relu(a)
    b = Conv<pads = [1, 1, 1, 1]>(h, w2)
    r = Relu(b)
    c = Conv<pads = [1, 1, 1, 1]>(r, w3)
    s = Add(h, c)
    g = GlobalAveragePool(s)
    f = Flatten(g)
    y = MatMul(f, w4)
}"""
GROUPED = """(float[N,3,6,6] x) => (float[N,4,4,4] y)
<float[12,3,1,1] w1, float[12,6,3,3] w2, float[12] b2, float[12,1,3,3] w3, float[4,12,3,3] w4> {
    a = Conv(x, w1)
    h = Relu(a)
    g = Conv<group = 2, pads = [1, 1, 1, 1]>(h, w2, b2)
    r = Relu(g)
    d = Conv<group = 12, pads = [1, 1, 1, 1]>(r, w3)
    t = Relu(d)
    y = Conv(t, w4)
}"""
ATTENTION = """(float[N,5,6] x) => (float[N,5,4] y)
<float[6,12] we, float[12,12] wq, float[12,12] wk, float[12,12] wv, int64[4] in = {0, 5, 3, 4},
 int64[3] out = {0, 5, 12}, float[12,12] wo, float[12,4] wy> {
    h = MatMul(x, we)
    q = MatMul(h, wq)
    k = MatMul(h, wk)
    v = MatMul(h, wv)
    q4 = Reshape(q, in)
    k4 = Reshape(k, in)
    v4 = Reshape(v, in)
    qt = Transpose<perm = [0, 2, 1, 3]>(q4)
    kt = Transpose<perm = [0, 2, 3, 1]>(k4)
    vt = Transpose<perm = [0, 2, 1, 3]>(v4)
    l = MatMul(qt, kt)
    p = Softmax(l)
    o = MatMul(p, vt)
    ot = Transpose<perm = [0, 2, 1, 3]>(o)
    om = Reshape(ot, out)
    m = MatMul(om, wo)
    s = Add(h, m)
    y = MatMul(s, wy)
}"""
NETS = {"mlp": MLP, "cnn": CNN, "residual": RESIDUAL, "grouped": GROUPED, "attention": ATTENTION}


def samples(model: Model, count: int, seed: int = 0) -> dict[str, Array]:
    """``count`` random samples of every input, as arrays batched along axis 0."""
    return feed(model, seed, count)


def activations(
    model: Model, feeds: Mapping[str, Array], names: Sequence[str], proto: ModelProto | None = None
) -> dict[str, Array]:
    """Intermediate tensors as the original graph gives them, or another one with the same tensors."""
    shown = ModelProto()
    shown.CopyFrom(proto or model.proto)
    del shown.graph.output[:]
    for name in names:
        kind = helper.np_dtype_to_tensor_dtype(model.dtypes[name])
        shown.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    return dict(zip(names, Session(shown, "cpu").run(feeds, list(names)), strict=True))
