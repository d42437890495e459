"""Constants that nodes compute from initialisers: folding never enlarges a file, and what stays is followed and cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from cases_quantized import codes, gains
from graphs import assert_exact, build, distance, feed, keep_one, load, random_keep
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnx_oamip.core.records import Model
from onnx_oamip.graph import cost, loading
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.linear_layers import Editor
from onnx_oamip.graph.runtime import Session

IDENTITY = """(float[N,6] x) => (float[N,4] y)
<float[6,24] first, float[24,24] shared, float[24,4] last> {
    a = MatMul(x, first)
    b = Relu(a)
    c = MatMul(b, shared)
    d = Relu(c)
    alias = Identity(shared)
    e = MatMul(d, alias)
    f = Relu(e)
    y = MatMul(f, last)
}"""
TRANSPOSE = """(float[N,6] x) => (float[N,6] y)
<float[6,20] shared, float[20] bias> {
    a = MatMul(x, shared)
    b = Add(a, bias)
    c = Relu(b)
    turned = Transpose<perm = [1, 0]>(shared)
    y = MatMul(c, turned)
}"""
HALF = """(float[N,6] x) => (float[N,4] y)
<float16[6,24] w1, float16[24,24] w2, float16[24,4] w3, float16[24] b1> {
    v1 = Cast<to = 1>(w1)
    v2 = Cast<to = 1>(w2)
    v3 = Cast<to = 1>(w3)
    c1 = Cast<to = 1>(b1)
    a = Gemm(x, v1, c1)
    b = Relu(a)
    c = Gemm(b, v2)
    d = Relu(c)
    y = Gemm(d, v3)
}"""
RESHAPE = """(float[N,6,4,4] x) => (float[N,12] y)
<float[12,6,1,1] shared, int64[2] matrix = {12, -1}, float[12,12] last> {
    a = Conv(x, shared)
    p = GlobalAveragePool(a)
    f = Flatten(p)
    q = GlobalAveragePool(x)
    g = Flatten(q)
    flat = Reshape(shared, matrix)
    h = Gemm<transB = 1>(g, flat)
    s = Add(f, h)
    r = Relu(s)
    y = MatMul(r, last)
}"""
TIED = """(int64[N,5] x) => (float[N,5,16] y)
<float[16,10] table, float[10,12] up, float[12,10] down> {
    h = Gather(table, x)
    a = MatMul(h, up)
    b = Relu(a)
    c = MatMul(b, down)
    s = Add(h, c)
    head = Transpose<perm = [1, 0]>(table)
    y = MatMul(s, head)
}"""
GRID = """(float[1,3,16,16] x) => (float[1,4] y)
<float[8,3,3,3] w1, float[1,1,1,16] line, int64[4] times = {1, 2, 16, 1}, float[6,10,3,3] w2, float[6,4] w3> {
    a = Conv<pads = [1, 1, 1, 1]>(x, w1)
    b = Relu(a)
    grid = Tile(line, times)
    c = Concat<axis = 1>(b, grid)
    d = Conv<pads = [1, 1, 1, 1]>(c, w2)
    e = Relu(d)
    p = GlobalAveragePool(e)
    f = Flatten(p)
    y = MatMul(f, w3)
}"""
POSITIONS = """(float[N,40,6] x) => (float[N,40,4] y)
<float[6,24] w1, float[1,1,24] line, int64[3] shape = {1, 40, 24}, float[24,4] w2> {
    a = MatMul(x, w1)
    table = Expand(line, shape)
    waves = Sin(table)
    b = Add(a, waves)
    c = Relu(b)
    y = MatMul(c, w2)
}"""
CODES = """(float[N,6] x) => (float[N,4] y)
<int8[6,32] codes, float scale = {0.01}, float[32,4] last> {
    real = Cast<to = 1>(codes)
    weight = Mul(real, scale)
    a = MatMul(x, weight)
    b = Relu(a)
    y = MatMul(b, last)
}"""
CODES_BY_COLUMN = f"""(float[N,6] x) => (float[N,4] y)
<{codes("int8", "q1", 6, 32)}, {gains("s1", 32)}, {codes("int8", "q2", 32, 4)}, float[1,4] s2> {{
    real1 = Cast<to = 1>(q1)
    w1 = Mul(real1, s1)
    a = MatMul(x, w1)
    b = Relu(a)
    real2 = Cast<to = 1>(q2)
    w2 = Mul(real2, s2)
    y = MatMul(b, w2)
}}"""
DEQUANTISED = f"""(float[N,6] x) => (float[N,4] y)
<{codes("uint8", "q1", 6, 32, low=0, high=120)}, {gains("s1", 32)}, {codes("uint8", "z1", 32, low=50, high=70)},
{codes("int8", "q2", 4, 32)}, float s2 = {{0.006}}> {{
    w1 = DequantizeLinear<axis = 1>(q1, s1, z1)
    a = MatMul(x, w1)
    b = Relu(a)
    real2 = DequantizeLinear(q2, s2)
    w2 = Transpose<perm = [1, 0]>(real2)
    y = MatMul(b, w2)
}}"""
ZERO_POINTS = f"""(float[N,6] x) => (float[N,4] y)
<{codes("uint8", "q1", 6, 32, low=0, high=250)}, float z1 = {{120.0}}, float scale = {{0.01}},
float16[32,4] half, float s2 = {{0.5}}> {{
    real = Cast<to = 1>(q1)
    shifted = Sub(real, z1)
    w1 = Mul(shifted, scale)
    a = MatMul(x, w1)
    b = Relu(a)
    wide = Cast<to = 1>(half)
    w2 = Mul(wide, s2)
    y = MatMul(b, w2)
}}"""
FORMS = {
    "identity": (IDENTITY, 24),
    "transpose": (TRANSPOSE, 20),
    "half": (HALF, 48),
    "reshape": (RESHAPE, 12),
    "tied": (TIED, 22),
    "grid": (GRID, 16),
    "positions": (POSITIONS, 24),
    "codes": (CODES, 32),
    "codes-by-column": (CODES_BY_COLUMN, 32),
    "dequantised": (DEQUANTISED, 32),
    "zero points": (ZERO_POINTS, 32),
}
"""Graphs with a constant in several forms, and the units that can be removed, counted by hand."""


def _file_bytes(proto: ModelProto) -> int:
    return len(proto.SerializeToString())


def _stored_bytes(proto: ModelProto) -> int:
    return sum(tensor.ByteSize() for tensor in proto.graph.initializer)


def _parameters(proto: ModelProto) -> int:
    """Elements of the floating initialisers and codes of a file, but for scales and zero points."""
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.UINT8)
    formats = ("s1", "s2", "z1", "scale")
    held = (t for t in proto.graph.initializer if t.data_type in kinds and t.name not in formats)
    return sum(int(np.prod(tensor.dims)) for tensor in held)


@pytest.mark.parametrize("form", FORMS)
def test_file_is_not_enlarged_and_parameters_are_those_stored(form: str, tmp_path: Path) -> None:
    proto = build(FORMS[form][0])
    model = load(proto, tmp_path)
    assert cost.count(model).params == _parameters(proto)
    assert _stored_bytes(model.proto) <= _stored_bytes(proto)
    # Nodes without a name get one; the lengths of messages may need a further byte, and the default domain is named.
    names = sum(len(node.name) + 4 for node in model.proto.graph.node)
    assert _file_bytes(model.proto) <= _file_bytes(proto) + names + 16
    values = feed(model, 1, 2)
    assert distance(Session(proto, "cpu").run(values), Session(model.proto, "cpu").run(values)) == 0


@pytest.mark.parametrize("form", FORMS)
def test_cut_equals_masked_original_and_costs_what_was_predicted(form: str, tmp_path: Path) -> None:
    text, units = FORMS[form]
    proto = build(text)
    for tensor in proto.graph.initializer:  # a parser of text stores integers in more bytes
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    model = load(proto, tmp_path)
    coupling = couple(model)
    assert coupling.n_units == units
    rng = np.random.default_rng(3)
    for keep in (random_keep(coupling, rng, 0.5), keep_one(coupling, rng)):
        cut = assert_exact(model, coupling, keep)
        widths = np.asarray([int(keep[g.units].sum()) for g in coupling.groups], np.int64)
        predicted = cost.ledger(model, coupling).cost(widths)
        counted = cost.count(loading.from_proto(cut, model.bindings))
        assert (predicted.macs, predicted.params) == (counted.macs, counted.params)
        assert abs(predicted.bytes - _file_bytes(cut)) <= 40
        assert _file_bytes(cut) < _file_bytes(model.proto)


FILLED = """(float[N,6] x) => (float[N,4] y)
<float[6,80] w1, int64[1] k = {80}, int64[1] n = {80}, float[80,80] w2, float[80,4] w3> {
    a = MatMul(x, w1)
    half = ConstantOfShape<value = float[1] {0.5}>(k)
    b = Add(a, half)
    c = Relu(b)
    d = MatMul(c, w2)
    whole = ConstantOfShape<value = float[1] {-0.25}>(n)
    turned = Neg(whole)
    e = Mul(d, turned)
    f = Relu(e)
    y = MatMul(f, w3)
}"""


def test_constant_of_one_number_is_cut_by_its_lengths(tmp_path: Path) -> None:
    """A constant that only gives its kept indices is folded on reading, and its numbers count as weights."""
    proto = build(FILLED)
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    model = load(proto, tmp_path)
    assert cost.count(model).params == _parameters(proto)
    coupling = couple(model)
    keep = random_keep(coupling, np.random.default_rng(3), 0.5)
    keep[coupling.groups[0].units[:4]] = False
    cut = assert_exact(model, coupling, keep)
    read = [node.input[0] for node in cut.graph.node if node.op_type == "Gather"]
    assert len(read) == 1
    assert read[0].startswith("turned")
    lengths = {n.op_type: n.input[0] for n in cut.graph.node if n.output[0] in ("half", "whole")}
    assert set(lengths) == {"ConstantOfShape"}
    widths = np.asarray([int(keep[g.units].sum()) for g in coupling.groups], np.int64)
    predicted = cost.ledger(model, coupling).cost(widths)
    assert abs(predicted.bytes - _file_bytes(cut)) <= 40
    assert predicted.params == _parameters(cut)


@pytest.mark.parametrize("form", FORMS)
def test_values_of_computed_constants_are_those_of_the_runtime(form: str, tmp_path: Path) -> None:
    model = load(build(FORMS[form][0]), tmp_path)
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    names = sorted(model.computed)
    for name in names:
        kind = helper.np_dtype_to_tensor_dtype(model.dtypes[name])
        proto.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    assert bool(names) == (form != "identity")
    # Without optimisations: those of ONNX Runtime 1.23 apply a Relu to a weight behind DequantizeLinear as well.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    results = session.run(["y", *names], feed(model, 0, 1))
    for name, expected in zip(names, results[1:], strict=True):
        np.testing.assert_array_equal(model.constants[name], expected)


def test_transposition_of_a_weight_with_one_use_is_folded(tmp_path: Path) -> None:
    text = TRANSPOSE.replace("turned = Transpose<perm = [1, 0]>(shared)", "turned = Transpose(own)")
    model = load(
        build(text.replace("<float[6,20] shared", "<float[6,20] own, float[6,20] shared")), tmp_path
    )
    assert not model.computed


def test_equal_transpositions_of_one_weight_are_stored_once(tmp_path: Path) -> None:
    text = """(float[N,12] x) => (float[N,12] y)
    <float[12,12] w> {
        t = Transpose(w)
        a = MatMul(x, t)
        b = Relu(a)
        u = Transpose(w)
        y = MatMul(b, u)
    }"""
    model = load(build(text), tmp_path)
    assert len(model.proto.graph.initializer) == 1
    assert not model.computed


def test_constant_that_is_a_graph_output_too_stays_readable(tmp_path: Path) -> None:
    text = IDENTITY.replace("(float[N,4] y)", "(float[N,4] y, float[24,24] alias)")
    model = load(build(text), tmp_path)
    coupling = couple(model)
    # The shared weight is given out whole, so that nothing between the two uses can be removed.
    assert coupling.n_units == 0
    assert [port.name for port in model.outputs] == ["y", "alias"]


def test_weight_norm_is_folded_although_one_step_alone_would_grow(tmp_path: Path) -> None:
    text = """(float[N,6] x) => (float[N,4] y)
    <float[6,32] v, float[1,32] g, float[32,4] last> {
        n = ReduceL2<axes = [0], keepdims = 1>(v)
        u = Div(v, n)
        w = Mul(u, g)
        a = MatMul(x, w)
        b = Relu(a)
        y = MatMul(b, last)
    }"""
    model = load(build(text), tmp_path)
    assert not model.computed
    assert couple(model).n_units == 32


def test_weight_that_two_uses_cut_along_both_axes_is_cut_along_both(tmp_path: Path) -> None:
    model = load(build(IDENTITY), tmp_path)
    coupling = couple(model)
    keep = random_keep(coupling, np.random.default_rng(0), 0.5)
    cut = assert_exact(model, coupling, keep)
    width = int(keep.sum())
    shapes = {t.name: tuple(t.dims) for t in cut.graph.initializer}
    assert shapes["shared"] == (width, width)


@pytest.mark.parametrize(
    ("form", "view"), [("half", "v2"), ("reshape", "flat"), ("transpose", "turned")]
)
def test_new_value_of_a_view_is_written_to_its_initialiser(
    form: str, view: str, tmp_path: Path
) -> None:
    model: Model = load(build(FORMS[form][0]), tmp_path)
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    editor = Editor(proto)
    reader, slot = next(
        (node, slot)
        for node in proto.graph.node
        for slot, name in enumerate(node.input)
        if name == view
    )
    value = np.random.default_rng(0).standard_normal(model.shapes[view]).astype(np.float32)
    editor.replace(reader, slot, value, for_all=True)
    np.testing.assert_array_equal(editor.constant(view), editor.rounded(view, value))
    before = {t.name: (t.data_type, tuple(t.dims)) for t in model.proto.graph.initializer}
    assert {t.name: (t.data_type, tuple(t.dims)) for t in proto.graph.initializer} == before
    rounding = 1e-3 if form == "half" else 0.0
    np.testing.assert_allclose(editor.constant(view), value, rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("factor", [0.5, 3.0])
@pytest.mark.parametrize(
    ("form", "view", "bits", "scale"),
    [("codes-by-column", "w2", "q2", "s2"), ("dequantised", "w1", "q1", "s1")],
)
def test_new_weights_are_stored_as_codes_whose_scales_reach_them(
    form: str, view: str, bits: str, scale: str, factor: float, tmp_path: Path
) -> None:
    model: Model = load(build(FORMS[form][0]), tmp_path)
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    editor = Editor(proto)
    reader = next(node for node in proto.graph.node if view in node.input)
    stored = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    value = model.constants[view] * np.float32(factor)
    seen = editor.rounded(view, value)
    editor.replace(reader, 1, value)
    np.testing.assert_array_equal(editor.constant(view), seen)
    after = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    assert after[bits].dtype == stored[bits].dtype
    if form == "dequantised":
        # The scale stays, and codes end at their limits.
        np.testing.assert_array_equal(after[scale], stored[scale])
        zero = stored["z1"].astype(np.float64)
        value = np.clip(value, -zero * stored[scale], (255 - zero) * stored[scale])
    else:
        largest = np.where(value > 0, value / 127, -value / 128).max(axis=0)
        grown = np.maximum(largest, np.abs(stored[scale]).reshape(-1))
        np.testing.assert_allclose(np.abs(after[scale]).reshape(-1), grown, rtol=1e-5)
    assert (np.abs(seen - value) <= 0.501 * np.abs(after[scale])).all()


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_scale_reaches_new_weights_on_both_sides_of_a_zero_point(
    factor: float, tmp_path: Path
) -> None:
    model: Model = load(build(ZERO_POINTS), tmp_path)
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    editor = Editor(proto)
    reader = next(node for node in proto.graph.node if "w1" in node.input)
    value = model.constants["w1"] * np.float32(factor)
    editor.replace(reader, 1, value)
    scale = next(numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == "scale")
    needed = max(float(value.max()) / (255 - 120), float(value.min()) / -120, 0.01)
    np.testing.assert_allclose(scale, needed, rtol=1e-5)
    assert (np.abs(editor.constant("w1") - value) <= 0.501 * scale).all()


def test_product_of_constants_is_no_work_of_the_model(tmp_path: Path) -> None:
    """ONNX Runtime multiplies the factors of a weight once, when it loads the model."""
    text = """(float[N,20] x) => (float[N,4] y) <float[20,2] one, float[2,30] two, float[30,4] last> {
        w = MatMul(one, two)  a = MatMul(x, w)  b = Relu(a)  y = MatMul(b, last) }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    assert cost.count(model).macs == 20 * 30 + 30 * 4
    keep = random_keep(coupling, np.random.default_rng(0), 0.5)
    cut = assert_exact(model, coupling, keep)
    width = int(keep.sum())
    assert cost.count(load(cut, tmp_path)).macs == 20 * width + width * 4


def test_codes_in_several_scales_at_once_are_taken_at_run_time(tmp_path: Path) -> None:
    """A product that makes more elements than there are codes is no view of them."""
    text = """(float[N,6] x) => (float[N,4] y)
    <int8[1,32] codes, float[6,1] scale, float[32,4] last> {
        real = Cast<to = 1>(codes)
        weight = Mul(real, scale)
        a = MatMul(x, weight)
        b = Relu(a)
        y = MatMul(b, last)
    }"""
    model = load(build(text), tmp_path)
    assert model.computed == {"real", "weight"}
    assert set(model.views) == {"real"}
    coupling = couple(model)
    assert_exact(model, coupling, random_keep(coupling, np.random.default_rng(0), 0.5))


def test_half_precision_that_overflows_is_seen_before_it_is_written(tmp_path: Path) -> None:
    model = load(build(HALF), tmp_path)
    editor = Editor(model.proto)
    assert editor.stored_type("v2") == np.float16
    assert np.isinf(editor.rounded("v2", np.full((24, 24), 1e6, np.float32))).all()


def test_bfloat16_weights_behind_a_cast_are_followed(tmp_path: Path) -> None:
    proto = build(HALF.replace("float16", "float"))
    for tensor in proto.graph.initializer:
        value = numpy_helper.to_array(tensor)
        kind = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
        tensor.CopyFrom(numpy_helper.from_array(value.astype(kind), tensor.name))
    model = load(proto, tmp_path)
    assert couple(model).n_units == 48
    assert {t.data_type for t in model.proto.graph.initializer} == {TensorProto.BFLOAT16}
    onnx.checker.check_model(model.proto, full_check=True)
