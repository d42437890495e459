"""Inputs of linear nodes as rows: rows @ W + b is the output of ONNX Runtime, for every layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import build, load, samples
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnx_oamip.core.records import (
    Array,
    Floats,
    Ints,
    Model,
)
from onnx_oamip.graph.im2col import (
    data_rows,
    output_rows,
    pick,
    pick_weighted,
    row_axes,
    row_count,
)
from onnx_oamip.graph.linear_layers import Editor, matrix, site
from onnx_oamip.graph.loading import from_proto
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.runtime import Session

# Name -> (input, constants, the node that makes y). One node each; biases where the operator takes them.
NODES = {
    "conv 1d": (
        "N,3,11",
        "float[4,3,3] w, float[4] b",
        "Conv<strides = [2], pads = [2, 1]>(x, w, b)",
    ),
    "conv 1d dilated": ("N,3,11", "float[4,3,3] w", "Conv<dilations = [3], pads = [0, 4]>(x, w)"),
    "conv 2d": ("N,3,6,7", "float[4,3,3,2] w, float[4] b", "Conv(x, w, b)"),
    "conv 2d uneven": (
        "N,3,9,8",
        "float[4,3,3,2] w, float[4] b",
        "Conv<strides = [2, 3], dilations = [2, 1], pads = [1, 0, 3, 2]>(x, w, b)",
    ),
    "conv 2d pointwise": (
        "N,5,4,3",
        "float[4,5,1,1] w, float[4] b",
        "Conv<strides = [1, 2]>(x, w, b)",
    ),
    "conv 3d": (
        "N,2,5,4,6",
        "float[3,2,2,3,2] w, float[3] b",
        "Conv<strides = [2, 1, 1], dilations = [1, 1, 3], pads = [0, 1, 2, 1, 0, 1]>(x, w, b)",
    ),
    "conv upper": (
        "N,3,7,6",
        "float[4,3,4,2] w",
        'Conv<auto_pad = "SAME_UPPER", strides = [2, 1]>(x, w)',
    ),
    "conv lower": (
        "N,3,7,6",
        "float[4,3,4,2] w",
        'Conv<auto_pad = "SAME_LOWER", strides = [2, 1]>(x, w)',
    ),
    "conv upper strided past": (
        "N,3,8,8",
        "float[4,3,1,2] w",
        'Conv<auto_pad = "SAME_UPPER", strides = [3, 3]>(x, w)',
    ),
    "conv valid": (
        "N,3,7,6",
        "float[4,3,4,2] w",
        'Conv<auto_pad = "VALID", strides = [2, 1]>(x, w)',
    ),
    "conv unset": (
        "N,3,6,6",
        "float[4,3,3,3] w",
        'Conv<auto_pad = "NOTSET", pads = [1, 2, 0, 1]>(x, w)',
    ),
    "conv grouped": (
        "N,6,6,5",
        "float[9,2,3,3] w, float[9] b",
        "Conv<group = 3, pads = [1, 1, 1, 1]>(x, w, b)",
    ),
    "conv depthwise": (
        "N,4,6,5",
        "float[4,1,3,3] w, float[4] b",
        "Conv<group = 4, strides = [2, 2]>(x, w, b)",
    ),
    "conv depthwise multiplier": (
        "N,3,6,5",
        "float[6,1,3,3] w",
        "Conv<group = 3, dilations = [2, 2]>(x, w)",
    ),
    "transposed 1d": (
        "N,3,7",
        "float[3,4,3] w, float[4] b",
        "ConvTranspose<strides = [2], pads = [1, 0]>(x, w, b)",
    ),
    "transposed 2d": ("N,3,4,5", "float[3,4,3,2] w, float[4] b", "ConvTranspose(x, w, b)"),
    "transposed uneven": (
        "N,3,4,5",
        "float[3,4,3,2] w, float[4] b",
        "ConvTranspose<strides = [2, 3], dilations = [2, 1], pads = [1, 0, 2, 1], output_padding = [1, 2]>(x, w, b)",
    ),
    "transposed 3d": (
        "N,2,3,3,4",
        "float[2,3,2,3,2] w",
        "ConvTranspose<strides = [2, 1, 3]>(x, w)",
    ),
    "transposed grouped": (
        "N,6,4,4",
        "float[6,3,2,3] w, float[6] b",
        "ConvTranspose<group = 2, strides = [2, 2]>(x, w, b)",
    ),
    "transposed depthwise": (
        "N,4,4,4",
        "float[4,2,3,3] w",
        "ConvTranspose<group = 4, pads = [1, 1, 1, 1]>(x, w)",
    ),
    "transposed to a shape": (
        "N,3,5,4",
        "float[3,4,3,2] w",
        "ConvTranspose<strides = [2, 3], output_shape = [10, 10]>(x, w)",
    ),
    "transposed to a shape, upper": (
        "N,3,5,4",
        "float[3,4,3,2] w",
        'ConvTranspose<strides = [2, 3], output_shape = [10, 10], auto_pad = "SAME_UPPER">(x, w)',
    ),
    "transposed to a shape with padding": (
        "N,3,5,4",
        "float[3,4,3,2] w",
        "ConvTranspose<strides = [2, 3], output_shape = [10, 10], output_padding = [1, 0]>(x, w)",
    ),
    "transposed upper": (
        "N,3,5,4",
        "float[3,4,3,4] w",
        'ConvTranspose<strides=[2,1], auto_pad = "SAME_UPPER">(x, w)',
    ),
    "transposed lower": (
        "N,3,5,4",
        "float[3,4,3,4] w",
        'ConvTranspose<strides=[2,1], auto_pad = "SAME_LOWER">(x, w)',
    ),
    "transposed valid": (
        "N,3,5,4",
        "float[3,4,3,4] w",
        'ConvTranspose<strides=[2,1], auto_pad = "VALID">(x, w)',
    ),
    "gemm": ("N,5", "float[5,4] w, float[4] b", "Gemm(x, w, b)"),
    "gemm transB": (
        "N,5",
        "float[4,5] w, float[4] b",
        "Gemm<transB = 1, alpha = 0.7, beta = 1.3>(x, w, b)",
    ),
    "gemm transA": ("5,N", "float[5,4] w, float[1,4] b", "Gemm<transA = 1, alpha = 1.5>(x, w, b)"),
    "gemm transA transB": (
        "5,N",
        "float[4,5] w, float b = {0.4}",
        "Gemm<transA = 1, transB = 1, beta = 2.0>(x, w, b)",
    ),
    "gemm weight left": ("5,N", "float[4,5] w, float[4,1] b", "Gemm<alpha = 0.7>(w, x, b)"),
    "gemm weight left transA": (
        "5,N",
        "float[5,4] w, float[4,1] b",
        "Gemm<transA = 1, beta = 0.5>(w, x, b)",
    ),
    "gemm weight left transB": (
        "N,5",
        "float[4,5] w, float[1] b",
        "Gemm<transB = 1, alpha = 2.0>(w, x, b)",
    ),
    "gemm weight left both": ("N,5", "float[5,4] w", "Gemm<transA = 1, transB = 1>(w, x)"),
    "matmul": ("N,5", "float[5,4] w", "MatMul(x, w)"),
    "matmul 3d": ("N,6,5", "float[5,4] w", "MatMul(x, w)"),
    "matmul 4d": ("N,2,3,5", "float[5,4] w", "MatMul(x, w)"),
    "matmul weight left": ("5,N", "float[4,5] w", "MatMul(w, x)"),
    "matmul weight left 3d": ("N,5,6", "float[4,5] w", "MatMul(w, x)"),
}


def _net(name: str, folder: Path, seed: int = 0) -> tuple[Model, Site]:
    dims, constants, call = NODES[name]
    model = load(
        build(f"(float[{dims}] x) => (float[] y) <{constants}> {{ y = {call} }}", seed=seed), folder
    )
    place = site(model.nodes[0], model.constants)
    assert place is not None
    return model, place


def _given(place: Site, model: Model, x: Array, rows: Ints, shape: tuple[int, ...]) -> Floats:
    """The node's outputs (rows, outputs) from what the module under test says it reads."""
    weight = place.factor * matrix(place, model.constants[place.weight])
    groups, outs, _, _ = weight.shape
    bias = Editor(model.proto).bias(place)
    assert bias is not None
    seen = data_rows(place, x, rows, shape)
    assert seen.dtype == np.float64
    assert seen.shape == (len(rows), groups, weight[0, 0].size)
    return (
        np.einsum("rgi,goi->rgo", seen, weight.reshape(groups, outs, -1)).reshape(len(rows), -1)
        + bias
    )


@pytest.mark.parametrize("name", NODES)
def test_rows_times_weights_equal_the_output(name: str, tmp_path: Path) -> None:
    model, place = _net(name, tmp_path)
    x = next(iter(samples(model, 4).values()))
    if model.inputs[0].dims[0] == 5:
        x = np.random.default_rng(3).standard_normal((5, 7)).astype(np.float32)
    (y,) = Session(model.proto, "cpu").run({"x": x})
    total = row_count(place, y.shape)
    assert total * y.shape[place.output_axis] == y.size
    assert np.prod(row_axes(place, y.shape)) == total
    every = np.arange(total)
    truth = output_rows(place, y, every)
    np.testing.assert_allclose(
        _given(place, model, x, every, y.shape), truth, rtol=0, atol=1e-5 * np.abs(truth).max()
    )
    # Any choice of rows, in any order, is a choice of these rows.
    some = np.random.default_rng(0).permutation(total)[: total // 2 + 1]
    np.testing.assert_array_equal(output_rows(place, y, some), truth[some])
    np.testing.assert_array_equal(
        data_rows(place, x, some, y.shape), data_rows(place, x, every, y.shape)[some]
    )


def test_output_rows_match_a_hand_computation(tmp_path: Path) -> None:
    """Row (image, pixel) of an image tensor holds the channels of that pixel."""
    _, conv = _net("conv 2d", tmp_path)
    y = np.arange(2 * 4 * 3 * 2, dtype=np.float32).reshape(2, 4, 3, 2)
    np.testing.assert_array_equal(
        output_rows(conv, y, np.asarray([0, 6 + 3])), [y[0, :, 0, 0], y[1, :, 1, 1]]
    )
    _, left = _net("gemm weight left", tmp_path)
    table = np.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(output_rows(left, table, np.asarray([1])), [table[:, 1]])


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[str, int, int, int, tuple[int, ...], dict[str, object]]:
    """(operator, groups, inputs and outputs per group, image size, attributes) of a convolution that has an output."""
    op = draw(st.sampled_from(["Conv", "ConvTranspose"]))
    rank = draw(st.integers(1, 2))
    groups, ins, outs = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 4)) for _ in range(rank)]
    strides = [draw(st.integers(1, 3)) for _ in range(rank)]
    dilations = [draw(st.integers(1, 2)) for _ in range(rank)]
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    size = tuple(draw(st.integers(max(spans), max(spans) + 4)) for _ in range(rank))
    attrs: dict[str, object] = {
        "kernel_shape": kernel,
        "strides": strides,
        "dilations": dilations,
        "group": groups,
    }
    mode = draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if mode == "NOTSET":
        attrs["pads"] = [draw(st.integers(0, min(2, k - 1))) for k in (*kernel, *kernel)]
        if op == "ConvTranspose":
            attrs["output_padding"] = [draw(st.integers(0, s - 1)) for s in strides]
    elif (
        # ONNX Runtime refuses the others.
        op == "ConvTranspose" or mode == "VALID" or max(dilations) == 1
    ):
        attrs["auto_pad"] = mode
    return op, groups, ins, outs, size, attrs


@hypothesis_settings(max_examples=150)
@given(convolutions(), st.integers(0, 99))
def test_rows_times_weight_give_the_output_of_random_convolutions(
    case: tuple[str, int, int, int, tuple[int, ...], dict[str, object]], seed: int
) -> None:
    op, groups, ins, outs, size, attrs = case
    rng = np.random.default_rng(seed)
    kernel = list(attrs["kernel_shape"])  # type: ignore[call-overload]
    shape = (groups * outs, ins, *kernel) if op == "Conv" else (groups * ins, outs, *kernel)
    weight = rng.standard_normal(shape).astype(np.float32)
    bias = rng.standard_normal(groups * outs).astype(np.float32)
    x = rng.standard_normal((2, groups * ins, *size)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w", "b"], ["y"], "node", **attrs)],
        "one",
        [helper.make_tensor_value_info("x", 1, x.shape)],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    model = from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    )
    place = site(model.nodes[0], model.constants)
    assert place is not None
    (y,) = Session(model.proto, "cpu").run({"x": x})
    rows = np.arange(row_count(place, y.shape))
    truth = output_rows(place, y, rows)
    np.testing.assert_allclose(
        _given(place, model, x, rows, y.shape), truth, rtol=0, atol=1e-5 * np.abs(truth).max()
    )


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 999))
def test_picked_rows_are_distinct_and_in_order(total: int, wanted: int, seed: int) -> None:
    rows = pick(total, wanted, np.random.default_rng(seed))
    assert len(rows) == min(total, wanted)
    assert (np.diff(rows) > 0).all()
    assert rows[0] >= 0
    assert rows[-1] < total
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(rows, pick(total, wanted, np.random.default_rng(seed)))


def test_pick_spreads_rows_evenly() -> None:
    """One row of every stretch of ten, and all places within a stretch are met."""
    rows = pick(10_000, 1000, np.random.default_rng(0))
    np.testing.assert_array_equal(rows // 10, np.arange(1000))
    assert np.bincount(rows % 10, minlength=10).min() > 60


def test_weighted_rows_are_chosen_in_proportion() -> None:
    weights = np.where(np.arange(1000) % 50 == 0, 25.0, 0.5)
    chosen = pick_weighted(weights, 400, np.random.default_rng(0))
    assert len(chosen) == round(400 * weights.mean())
    assert (np.diff(chosen) >= 0).all()
    rare = np.isin(chosen, np.flatnonzero(weights > 1)).mean()
    assert rare == pytest.approx(25 * 20 / weights.sum(), abs=0.01)


def test_weighted_rows_include_every_row_where_they_may() -> None:
    weights = np.asarray([0.5, 2.0, 0.5, 1.0])
    chosen = pick_weighted(weights, 10_000, np.random.default_rng(0))
    assert np.bincount(chosen).tolist() == [1, 4, 1, 2]
    assert not pick_weighted(np.zeros(0), 10, np.random.default_rng(0)).size
