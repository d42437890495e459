"""Weights and biases of linear nodes, read and written the same way whatever the operator's layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import build, constants, distance, load, samples
from onnx import ModelProto

from onnx_oamip.core.records import Array, Floats, Model
from onnx_oamip.graph.linear_layers import (
    Editor,
    matrix,
    matrix_shape,
    site,
    unmatrix,
)
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.runtime import Session

# Name -> (operator call, shape of the weight w, groups, outputs per group, inputs per group, taps).
WEIGHTS = {
    "conv 1d": ("(float[N,3,9] x)", "Conv(x, w)", (5, 3, 4), (1, 5, 3, 4)),
    "conv 2d": ("(float[N,3,9,9] x)", "Conv(x, w)", (5, 3, 4, 2), (1, 5, 3, 8)),
    "conv 3d": ("(float[N,3,9,9,9] x)", "Conv(x, w)", (5, 3, 1, 2, 3), (1, 5, 3, 6)),
    "conv grouped": ("(float[N,6,9,9] x)", "Conv<group = 3>(x, w)", (12, 2, 3, 3), (3, 4, 2, 9)),
    "conv depthwise": ("(float[N,4,9,9] x)", "Conv<group = 4>(x, w)", (8, 1, 3, 3), (4, 2, 1, 9)),
    "transposed": ("(float[N,3,9,9] x)", "ConvTranspose(x, w)", (3, 5, 4, 2), (1, 5, 3, 8)),
    "transposed grouped": (
        "(float[N,6,9,9] x)",
        "ConvTranspose<group = 2>(x, w)",
        (6, 5, 2, 2),
        (2, 5, 3, 4),
    ),
    "gemm": ("(float[N,5] x)", "Gemm(x, w)", (5, 4), (1, 4, 5, 1)),
    "gemm transB": ("(float[N,5] x)", "Gemm<transB = 1>(x, w)", (4, 5), (1, 4, 5, 1)),
    "gemm transA": ("(float[5,N] x)", "Gemm<transA = 1>(x, w)", (5, 4), (1, 4, 5, 1)),
    "gemm left": ("(float[5,N] x)", "Gemm(w, x)", (4, 5), (1, 4, 5, 1)),
    "gemm left transA": ("(float[5,N] x)", "Gemm<transA = 1>(w, x)", (5, 4), (1, 4, 5, 1)),
    "gemm left both": (
        "(float[N,5] x)",
        "Gemm<transA = 1, transB = 1>(w, x)",
        (5, 4),
        (1, 4, 5, 1),
    ),
    "matmul": ("(float[N,6,5] x)", "MatMul(x, w)", (5, 4), (1, 4, 5, 1)),
    "matmul left": ("(float[N,5,6] x)", "MatMul(w, x)", (4, 5), (1, 4, 5, 1)),
    "einsum": ("(float[N,6,5] x)", 'Einsum<equation = "bnd,dk->bnk">(x, w)', (5, 4), (1, 4, 5, 1)),
    "einsum transposed": (
        "(float[N,6,5] x)",
        'Einsum<equation = "...d,kd->...k">(x, w)',
        (4, 5),
        (1, 4, 5, 1),
    ),
}


def _only(inputs: str, call: str, declared: str, folder: Path) -> tuple[Model, Site]:
    model = load(build(f"{inputs} => (float[] y) <{declared}> {{ y = {call} }}"), folder)
    place = site(model.nodes[0], model.constants)
    assert place is not None
    return model, place


@pytest.fixture(params=WEIGHTS)
def held(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Site, Array, tuple[int, ...]]:
    inputs, call, shape, form = WEIGHTS[request.param]
    model, place = _only(inputs, call, f"float{list(shape)} w", tmp_path)
    return place, model.constants["w"], form


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_matrix_round_trip_restores_the_weight(
    held: tuple[Site, Array, tuple[int, ...]], dtype: type
) -> None:
    place, weight, form = held
    weight = weight.astype(dtype)
    found = matrix(place, weight)
    assert found.dtype == np.float64
    assert found.shape == form == matrix_shape(place, weight)
    back = unmatrix(place, found, weight)
    assert back.dtype == dtype
    assert back.flags.c_contiguous
    np.testing.assert_array_equal(back, weight)


def test_fewer_channels_are_fewer_rows_and_columns(
    held: tuple[Site, Array, tuple[int, ...]],
) -> None:
    """Rows missing in the matrix form are the channels missing in the weight, if the layout has that channel."""
    place, weight, (groups, outs, ins, _) = held
    value = np.arange(weight.size, dtype=np.float32).reshape(weight.shape)
    rows = [True] + [False] * (outs - 2) + [True]
    columns = [True] * (ins - 1) + [False] if ins > 1 else [True]
    by_form = unmatrix(place, matrix(place, value)[:, rows][:, :, columns], value)
    if place.spatial and place.node.op == "Conv":
        expected = value[np.tile(rows, groups)][:, columns]
    elif place.spatial:
        expected = value[np.tile(columns, groups)][:, rows]
    else:
        expected = np.compress(
            columns, np.compress(rows, value, 1 - place.weight_axis), place.weight_axis
        )
    np.testing.assert_array_equal(by_form, expected)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("(float[N,5] x, float[5,4] w) => (float[] y) { y = MatMul(x, w) }", "two activations"),
        (
            "(float[N,3,5,5] x, float[4,3,3,3] w) => (float[] y) { y = Conv(x, w) }",
            "a computed weight",
        ),
        (
            "(float[2,3,5] x) => (float[] y) <float[2,5,4] w> { y = MatMul(x, w) }",
            "a stack of matrices",
        ),
        ("(float[N,5] x) => (float[] y) <float[5] w> { y = MatMul(x, w) }", "a vector"),
        ("(float[N,5] x) => (float[] y) { y = Relu(x) }", "another operator"),
    ],
)
def test_unsupported_nodes_have_no_site(text: str, why: str, tmp_path: Path) -> None:
    model = load(build(text), tmp_path)
    assert site(model.nodes[0], model.constants) is None


# --------------------------------------------------------------------------------------------------------- editor

# The node 'y' comes from must put out exactly `delta` more per output: (inputs, constants, nodes).
BIASES = {
    "conv": ("float[N,3,6,6] x", "float[4,3,3,3] w, float[4] b", "y = Conv(x, w, b)"),
    "conv without": ("float[N,3,6,6] x", "float[4,3,3,3] w", "y = Conv(x, w)"),
    "conv grouped": ("float[N,6,6,6] x", "float[4,3,3,3] w", "y = Conv<group = 2>(x, w)"),
    "transposed": (
        "float[N,3,4,4] x",
        "float[3,4,2,2] w, float[4] b",
        "y = ConvTranspose<strides = [2, 2]>(x, w, b)",
    ),
    "transposed grouped": (
        "float[N,4,4,4] x",
        "float[4,2,2,2] w",
        "y = ConvTranspose<group = 2>(x, w)",
    ),
    "gemm": ("float[N,5] x", "float[5,4] w, float[4] b", "y = Gemm(x, w, b)"),
    "gemm beta": (
        "float[N,5] x",
        "float[5,4] w, float[4] b",
        "y = Gemm<alpha = 0.5, beta = 4.0>(x, w, b)",
    ),
    "gemm beta zero": ("float[N,5] x", "float[5,4] w, float[4] b", "y = Gemm<beta = 0.0>(x, w, b)"),
    "gemm row": ("float[N,5] x", "float[5,4] w, float[1,4] b", "y = Gemm<beta = 2.0>(x, w, b)"),
    "gemm scalar": (
        "float[N,5] x",
        "float[5,4] w, float b = {0.5}",
        "y = Gemm<beta = 2.0>(x, w, b)",
    ),
    "gemm one": ("float[N,5] x", "float[5,4] w, float[1] b", "y = Gemm<beta = 2.0>(x, w, b)"),
    "gemm without": ("float[N,5] x", "float[5,4] w", "y = Gemm<alpha = 0.5, beta = 2.0>(x, w)"),
    "gemm empty": ("float[N,5] x", "float[5,4] w", "n = Identity(w)  y = Gemm(x, n)"),
    "gemm left": ("float[5,N] x", "float[4,5] w, float[4,1] b", "y = Gemm<beta = 2.0>(w, x, b)"),
    "gemm left scalar": ("float[5,N] x", "float[4,5] w, float[1] b", "y = Gemm(w, x, b)"),
    "gemm left without": ("float[5,N] x", "float[4,5] w", "y = Gemm(w, x)"),
    "matmul": ("float[N,6,5] x", "float[5,4] w", "y = MatMul(x, w)"),
    "matmul left": ("float[N,5,6] x", "float[4,5] w", "y = MatMul(w, x)"),
    "matmul add": ("float[N,6,5] x", "float[5,4] w, float[4] b", "m = MatMul(x, w)  y = Add(m, b)"),
    "matmul add before": (
        "float[N,6,5] x",
        "float[5,4] w, float[4] b",
        "m = MatMul(x, w)  y = Add(b, m)",
    ),
    "matmul add scalar": (
        "float[N,6,5] x",
        "float[5,4] w, float[1] b",
        "m = MatMul(x, w)  y = Add(m, b)",
    ),
    "matmul add row": (
        "float[N,6,5] x",
        "float[5,4] w, float[1,4] b",
        "m = MatMul(x, w)  y = Add(m, b)",
    ),
    "matmul add table": (
        "float[N,6,5] x",
        "float[5,4] w, float[6,4] b",
        "m = MatMul(x, w)  y = Add(m, b)",
    ),
    "matmul add itself": (
        "float[N,6,5] x",
        "float[5,4] w",
        "m = MatMul(x, w)  z = Sub(m, m)  y = Add(m, z)",
    ),
    "matmul left add": (
        "float[N,4,4] x",
        "float[4,4] w, float[4] b",
        "m = MatMul(w, x)  y = Add(m, b)",
    ),
    "matmul square": (
        "float[4,4] x",
        "float[4,4] w, float[4] b",
        "m = MatMul(x, w)  y = Add(m, b)",
    ),
}
BY_AXIS = ("conv", "transposed")


def _linear(model: Model) -> Site:
    return next(p for n in model.nodes if (p := site(n, model.constants)) is not None)


def _copy(model: Model) -> ModelProto:
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    return proto


def _along(place: Site, delta: Floats, rank: int) -> Array:
    view = [1] * rank
    view[place.output_axis] = -1
    return delta.reshape(view)


@pytest.fixture(params=BIASES)
def biased(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Model]:
    inputs, declared, nodes = BIASES[request.param]
    return request.param, load(
        build(f"({inputs}) => (float[] y) <{declared}> {{ {nodes} }}"), tmp_path
    )


def test_added_bias_is_added_to_the_output(biased: tuple[str, Model]) -> None:
    _, model = biased
    place = _linear(model)
    proto = _copy(model)
    editor = Editor(proto)
    delta = np.asarray([0.5, -2.0, 0.0, 3.25])
    assert editor.add_bias(place, delta)
    onnx.checker.check_model(proto, full_check=True)
    feed = samples(model, 5)
    if isinstance(model.inputs[0].dims[0], int) and model.inputs[0].dims[0] == 5:
        feed = {"x": np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)}
    (before,), (after,) = Session(model.proto, "cpu").run(feed), Session(proto, "cpu").run(feed)
    expected = np.broadcast_to(_along(place, delta, before.ndim), before.shape)
    np.testing.assert_allclose(after - before, expected, atol=2e-6)
    # And once more: what the first change made must be found again.
    assert editor.add_bias(place, delta)
    (twice,) = Session(proto, "cpu").run(feed)
    np.testing.assert_allclose(twice - after, after - before, atol=4e-6)


def test_bias_equals_the_addend_of_the_node(biased: tuple[str, Model]) -> None:
    """For Conv and Gemm: the output for an input of zeros. A MatMul adds nothing itself."""
    _, model = biased
    place = _linear(model)
    editor = Editor(_copy(model))
    found = editor.bias(place)
    assert found is not None
    assert found.shape == (4,)
    assert found.dtype == np.float64
    if place.node.op == "MatMul":
        assert not found.any()
        return
    shape = [5 if not isinstance(d, int) else d for d in model.inputs[0].dims]
    (y,) = Session(model.proto, "cpu").run({"x": np.zeros(shape, np.float32)})
    np.testing.assert_allclose(y, np.broadcast_to(_along(place, found, y.ndim), y.shape), atol=1e-6)
    editor.add_bias(place, np.arange(4.0))
    again = editor.bias(place)
    assert again is not None
    np.testing.assert_allclose(again, found + np.arange(4), atol=1e-6)


def test_bias_growth_equals_the_size_of_a_new_bias(biased: tuple[str, Model]) -> None:
    """``room`` promises how many elements a model may grow by."""
    _, model = biased
    place = _linear(model)
    proto = _copy(model)
    editor = Editor(proto)
    room = editor.bias_growth(place)
    before = _read_elements(proto)
    editor.add_bias(place, np.ones(4))
    assert _read_elements(proto) - before == room


def _read_elements(proto: ModelProto) -> int:
    """Elements of the constants that somebody reads."""
    read = {name for node in proto.graph.node for name in node.input}
    return sum(v.size for k, v in constants(proto).items() if k in read)


@pytest.mark.parametrize(
    ("inputs", "declared", "call"),
    [
        ("float[4,5] x", "float[5,3] w, float[4,3] b", "Gemm(x, w, b)"),
        ("float[4,5] x", "float[5,3] w, float[4,1] b", "Gemm(x, w, b)"),
        ("float[5,3] x", "float[4,5] w, float[4,3] b", "Gemm(w, x, b)"),
        ("float[5,3] x", "float[4,5] w, float[3] b", "Gemm(w, x, b)"),
        ("float[N,5] x, float[3] b", "float[5,3] w", "Gemm(x, w, b)"),
        ("float[N,3,5,5] x, float[4] b", "float[4,3,3,3] w", "Conv(x, w, b)"),
    ],
)
def test_bias_with_other_than_one_constant_per_output_is_not_reused(
    inputs: str, declared: str, call: str, tmp_path: Path
) -> None:
    model, place = _only(f"({inputs})", call, declared, tmp_path)
    editor = Editor(_copy(model))
    assert editor.bias(place) is None
    computed = "b" not in model.constants
    assert editor.add_bias(place, np.ones(matrix_shape(place, model.constants["w"])[1])) != computed


def test_addition_of_a_vector_is_reused_as_bias(tmp_path: Path) -> None:
    for nodes in ("m = MatMul(x, w)  y = Add(m, b)", "m = MatMul(x, w)  y = Add(b, m)"):
        text = f"(float[N,5] x) => (float[] y) <float[5,4] w, float[4] b> {{ {nodes} }}"
        model = load(build(text), tmp_path)
        proto = _copy(model)
        Editor(proto).add_bias(_linear(model), np.arange(4.0))
        assert len(proto.graph.node) == 2
        assert sorted(constants(proto)) == ["b", "w"]
        np.testing.assert_allclose(
            constants(proto)["b"], model.constants["b"] + np.arange(4), rtol=1e-6
        )


@pytest.mark.parametrize(
    ("outputs", "nodes"),
    [
        ("y", "y = MatMul(x, w)"),
        ("y, m", "m = MatMul(x, w)  y = Add(m, b)"),
        ("y, z", "m = MatMul(x, w)  y = Add(m, b)  z = Relu(m)"),
        ("y", "m = MatMul(x, w)  y = Add(m, m)"),
        ("y", "m = MatMul(x, w)  y = Sub(m, b)"),
    ],
)
def test_products_without_bias_get_an_addition(outputs: str, nodes: str, tmp_path: Path) -> None:
    """Every reader of the product sees the new bias, and outputs keep their names."""
    declared = ", ".join(f"float[] {o}" for o in outputs.split(", "))
    model = load(
        build(f"(float[N,5] x) => ({declared}) <float[5,4] w, float[4] b> {{ {nodes} }}"), tmp_path
    )
    proto = _copy(model)
    place = _linear(model)
    Editor(proto).add_bias(place, np.arange(4.0))
    onnx.checker.check_model(proto, full_check=True)
    assert [n.op_type for n in proto.graph.node][:2] == ["MatMul", "Add"]
    assert len({n.name for n in proto.graph.node}) == len(proto.graph.node)
    assert [o.name for o in proto.graph.output] == outputs.split(", ")
    # The same as a model in which the weight's product had the bias from the start.
    shifted = nodes.replace("m = MatMul(x, w)", "t = MatMul(x, w)  m = Add(t, d)").replace(
        "y = MatMul(x, w)", "t = MatMul(x, w)  y = Add(t, d)"
    )
    expected = load(
        build(
            f"(float[N,5] x) => ({declared}) <float[5,4] w, float[4] b, float[4] d = {{0, 1, 2, 3}}> {{ {shifted} }}"
        ),
        tmp_path,
    )
    feed = samples(model, 3)
    assert (
        distance(Session(expected.proto, "cpu").run(feed), Session(proto, "cpu").run(feed)) < 1e-6
    )


def test_shared_constants_are_copied_for_the_node_that_changes_them(tmp_path: Path) -> None:
    text = """(float[N,5] x) => (float[] y, float[] z) <float[5,5] w, float[5] b> {
        y = Gemm(x, w, b)
        z = Gemm(x, w, b)
    }"""
    model = load(build(text), tmp_path)
    proto = _copy(model)
    editor = Editor(proto)
    place = _linear(model)
    changed = 2 * model.constants["w"]
    editor.replace(proto.graph.node[0], 1, changed)
    assert editor.add_bias(place, np.ones(5))
    held = constants(proto)
    first, second = proto.graph.node
    assert list(second.input) == ["x", "w", "b"]
    np.testing.assert_array_equal(held["w"], model.constants["w"])
    np.testing.assert_array_equal(held["b"], model.constants["b"])
    np.testing.assert_array_equal(held[first.input[1]], changed)
    np.testing.assert_allclose(held[first.input[2]], model.constants["b"] + 1, rtol=1e-6)
    # The copy is the node's own now: changed again, it is changed in place.
    size = len(proto.graph.initializer)
    editor.replace(proto.graph.node[0], 1, model.constants["w"])
    assert editor.add_bias(place, np.ones(5))
    assert len(proto.graph.initializer) == size
    # And so is what the other node still reads.
    editor.replace(proto.graph.node[1], 1, changed)
    assert len(proto.graph.initializer) == size
    np.testing.assert_array_equal(constants(proto)["w"], changed)


def test_constant_read_twice_by_one_node_is_copied(tmp_path: Path) -> None:
    text = "(float[N,5] x) => (float[] y) <float[5,5] w> { p = Gemm(x, w, w)  y = Relu(p) }"
    proto = build(text.replace("float[N,5]", "float[5,5]"))
    model = load(proto, tmp_path)
    edited = _copy(model)
    Editor(edited).replace(edited.graph.node[0], 1, 2 * model.constants["w"])
    feed = samples(model, 5)
    (y,) = Session(edited, "cpu").run(feed)
    expected = np.maximum(feed["x"] @ (2 * model.constants["w"]) + model.constants["w"], 0)
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("op", ["MatMul(h, w)", "Gemm(h, w, c)"])
def test_constant_read_by_a_branch_is_not_changed(op: str, tmp_path: Path) -> None:
    """Captured constants have a second reader, though no node lists them among its inputs."""
    text = f"""(float[N,5] x, bool flag) => (float[] y, float[] z) <float[5,6] w1, float[6,4] w, float[4] c> {{
        h = MatMul(x, w1)
        y = {op}
        z = If(flag) <
            then_branch = yes () => (float[N,4] u) {{ v = MatMul(h, w) u = Add(v, c) }},
            else_branch = no () => (float[N,4] t) {{ t = MatMul(h, w) }}
        >
    }}"""
    model = load(build(text), tmp_path)
    proto = _copy(model)
    editor = Editor(proto)
    place = site(model.nodes[1], model.constants)
    assert place is not None
    editor.replace(editor.nodes[place.node.name], place.weight_slot, 0 * model.constants["w"])
    assert editor.add_bias(place, np.ones(4))
    for flag in (True, False):
        feed = {**samples(model, 3), "flag": np.asarray(flag)}
        before, after = Session(model.proto, "cpu").run(feed), Session(proto, "cpu").run(feed)
        np.testing.assert_array_equal(after[1], before[1])
        bias = model.constants["c"] if op.startswith("Gemm") else 0
        np.testing.assert_allclose(after[0], np.broadcast_to(bias + 1, after[0].shape), rtol=1e-6)


def test_addition_is_no_bias_if_its_product_is_captured(tmp_path: Path) -> None:
    text = """(float[N,5] x, bool flag) => (float[] y, float[] z) <float[5,4] w, float[4] b> {
        m = MatMul(x, w)
        y = Add(m, b)
        z = If(flag) <
            then_branch = yes () => (float[N,4] u) { u = Neg(m) },
            else_branch = no () => (float[N,4] t) { t = Abs(m) }
        >
    }"""
    model = load(build(text), tmp_path)
    proto = _copy(model)
    Editor(proto).add_bias(_linear(model), np.ones(4))
    feed = {**samples(model, 3), "flag": np.asarray(True)}
    before, after = Session(model.proto, "cpu").run(feed), Session(proto, "cpu").run(feed)
    np.testing.assert_allclose(after[0], before[0] + 1, atol=1e-6)
    np.testing.assert_allclose(after[1], before[1] - 1, atol=1e-6)


def test_new_names_are_unused(tmp_path: Path) -> None:
    """Names that the editor would like may be taken by tensors of the model."""
    text = """(float[N,5] x) => (float[] y, float[] z) <float[5,5] w, float[5] w_refitted> {
        m = MatMul(x, w)
        y_unbiased = Add(m, w_refitted)
        z = MatMul(x, w)
        y = MatMul(y_unbiased, w)
    }"""
    model = load(build(text), tmp_path)
    proto = _copy(model)
    editor = Editor(proto)
    last = site(model.nodes[-1], model.constants)
    assert last is not None
    editor.replace(editor.nodes[last.node.name], 1, 3 * model.constants["w"])
    editor.add_bias(last, np.ones(5))
    onnx.checker.check_model(proto, full_check=True)
    feed = samples(model, 3)
    (y, z), (new_y, new_z) = Session(model.proto, "cpu").run(feed), Session(proto, "cpu").run(feed)
    np.testing.assert_array_equal(new_z, z)
    np.testing.assert_allclose(new_y, 3 * y + 1, rtol=1e-5, atol=1e-5)


def test_half_precision_stays_half_precision(tmp_path: Path) -> None:
    text = "(float16[N,5] x) => (float16[] y) <float16[5,4] w> { y = Gemm(x, w) }"
    model = load(build(text), tmp_path)
    proto = _copy(model)
    Editor(proto).add_bias(_linear(model), np.full(4, 1 / 3))
    assert {v.dtype for v in constants(proto).values()} == {np.dtype(np.float16)}
    onnx.checker.check_model(proto, full_check=True)
