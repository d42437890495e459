"""Quantised models as ONNX Runtime writes them, pruned end to end; what a mask is in integer arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from cases import CASES
from graphs import CNN, RUNTIME, assert_exact, build, constants, distance, feed, load, random_keep
from onnx import helper

from onnx_oamip.core.records import Array
from onnx_oamip.data import dataset
from onnx_oamip.graph import cost
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.repair import least_squares

quantization = pytest.importorskip("onnxruntime.quantization")


class _Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.feeds: Iterator[dict[str, Array]] = iter(
            [{"x": rng.standard_normal((4, 3, 8, 8)).astype(np.float32)} for _ in range(8)]
        )

    def get_next(self) -> dict[str, Array] | None:
        return next(self.feeds, None)


def _written(how: str, folder: Path) -> onnx.ModelProto:
    source, target = folder / "float.onnx", folder / "quantised.onnx"
    onnx.save(build(CNN), source)
    kind: dict[str, Any] = {"reduce_range": True, "per_channel": "channel" in how}
    if how.startswith("dynamic"):
        quantization.quantize_dynamic(source, target, **kind)
    else:
        form = (
            quantization.QuantFormat.QDQ
            if how.startswith("qdq")
            else quantization.QuantFormat.QOperator
        )
        weight = quantization.QuantType.QInt8
        quantization.quantize_static(
            source, target, _Reader(), quant_format=form, weight_type=weight, **kind
        )
    return onnx.load(target)


UNITS = {
    "qdq": 8 + 12,
    "qdq-channel": 8 + 12,
    "dynamic": 8 + 12,
    "dynamic-channel": 8 + 12,
    "operators": 8 + 12,
}
"""Units by the form that the quantiser writes."""


@pytest.mark.parametrize("how", UNITS)
def test_models_quantised_by_the_runtime_are_pruned_exactly(how: str, tmp_path: Path) -> None:
    """To the last bit of every rounding: the reference masks integers, so that both run the same integer kernels."""
    if how.startswith("dynamic") and RUNTIME < (1, 24):
        pytest.skip(
            "this ONNX Runtime has no ConvInteger with signed weights, which its own quantiser writes"
        )
    model = load(_written(how, tmp_path), tmp_path)
    coupling = couple(model)
    assert coupling.n_units == UNITS[how], [p.reason for p in coupling.pinned]
    for seed in range(3):
        keep = random_keep(coupling, np.random.default_rng(seed), 0.5)
        cut = rewrite.cut(model, coupling, keep)
        onnx.checker.check_model(cut, full_check=True)
        reference, small = Session(rewrite.mask(model, coupling, keep), "cpu"), Session(cut, "cpu")
        for batch in (1, 4):
            values = feed(model, seed, batch)
            assert distance(reference.run(values), small.run(values)) < 1e-6
        widths = np.asarray([int(keep[g.units].sum()) for g in coupling.groups])
        assert (
            cost.ledger(model, coupling).cost(widths).macs == cost.count(load(cut, tmp_path)).macs
        )


def test_quantised_convolutions_count_like_others(tmp_path: Path) -> None:
    plain = cost.count(load(build(CNN), tmp_path)).macs
    assert cost.count(load(_written("qdq", tmp_path), tmp_path)).macs == plain
    assert cost.count(load(_written("dynamic", tmp_path), tmp_path)).macs == plain


ZERO_POINTS = """(float[N,5] x) => (float[] y) <uint8[5,8] w1 = {{{a}}}, uint8[8,3] w2 = {{{b}}}, float[8] gain,
uint8[8] z1 = {{90, 91, 92, 93, 94, 95, 96, 97}}, float s2 = {{0.01}}, uint8 z2 = {{100}}, float sx = {{0.03}},
uint8 zx = {{120}}> {{
    d1 = DequantizeLinear(w1, gain, z1)
    h = MatMul(x, d1)
    q = QuantizeLinear(h, sx, zx)
    d = DequantizeLinear(q, sx, zx)
    d2 = DequantizeLinear(w2, s2, z2)
    y = MatMul(d, d2)
}}"""


def test_masked_weights_equal_their_zero_point(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = (", ".join(map(str, rng.integers(60, 140, n))) for n in (40, 24))
    model = load(build(ZERO_POINTS.format(a=a, b=b)), tmp_path)
    coupling = couple(model)
    keep = np.arange(8) % 2 == 0
    stored = [
        v
        for n, v in constants(rewrite.mask(model, coupling, keep)).items()
        if n.startswith("oamip_")
    ]
    assert len(stored) == 1
    assert stored[0].dtype == np.uint8
    assert (stored[0][1::2] == 100).all()
    np.testing.assert_array_equal(stored[0][::2], model.constants["w2"][::2])


def test_per_channel_scales_shrink_with_their_channels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = (", ".join(map(str, rng.integers(60, 140, n))) for n in (40, 24))
    model = load(build(ZERO_POINTS.format(a=a, b=b)), tmp_path)
    held = constants(rewrite.cut(model, couple(model), np.arange(8) % 2 == 0))
    assert held["w1"].shape == (5, 4)
    assert held["z1"].tolist() == [90, 92, 94, 96]
    assert held["gain"].shape == (4,)
    assert held["w2"].shape == (4, 3)


def test_dynamic_quantisation_range_contains_zero(tmp_path: Path) -> None:
    """Channels far from zero set the range; without them it still starts at zero, as the operator defines it."""
    text = """(float[N,5] x) => (float[] y) <float[5,8] w1, float[8] b1 = {9, 9, 9, 9, 9, 9, 9, 30}, int8[8,3] w2 =
    {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24}> {
        h = MatMul(x, w1)
        g = Add(h, b1)
        q, s, z = DynamicQuantizeLinear(g)
        i = MatMulInteger(q, w2, z)
        f = Cast<to = 1>(i)
        y = Mul(f, s)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    keep = np.arange(8) < 7
    values = feed(model, 0, 1)
    want = Session(rewrite.mask(model, coupling, keep), "cpu").run(values)
    assert distance(want, Session(rewrite.cut(model, coupling, keep), "cpu").run(values)) < 1e-6


def test_quantised_weight_is_not_refitted_and_is_noted(tmp_path: Path) -> None:
    model = load(_written("qdq", tmp_path), tmp_path)
    coupling = couple(model)
    keep = random_keep(coupling, np.random.default_rng(0), 0.5)
    raw = rewrite.cut(model, coupling, keep)
    values = {"x": np.random.default_rng(1).standard_normal((8, 3, 8, 8)).astype(np.float32)}
    given = dataset.load(values, model)
    assert given is not None
    sampling = least_squares.Sampling(samples=given, device="cpu")
    found = least_squares.front(model, coupling, keep, raw, sampling, short=())
    assert not found.fits
    assert sum("is quantised" in note for note in found.notes) == 2


@pytest.mark.skipif(
    onnx.defs.onnx_opset_version() < 21, reason="this onnx does not know four-bit codes"
)
@pytest.mark.parametrize(("block", "units"), [(0, 64 + 6), (32, 6)])
def test_four_bit_codes_are_pruned_exactly(block: int, units: int, tmp_path: Path) -> None:
    """Two codes a byte. Rows that share a scale stay; columns each have their own."""
    rng = np.random.default_rng(0)
    held = {
        "w1": rng.standard_normal((5, 64)).astype(np.float32),
        "w2": rng.integers(-7, 7, (64, 6)).astype(ml_dtypes.int4),
        "s2": rng.uniform(0.01, 0.02, (2, 6) if block else (6,)).astype(np.float32),
        "w3": rng.standard_normal((6, 3)).astype(np.float32),
    }
    how = {"axis": 0, "block_size": block} if block else {"axis": 1}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("Relu", ["a"], ["h"]),
        helper.make_node("DequantizeLinear", ["w2", "s2"], ["d"], **how),
        helper.make_node("MatMul", ["h", "d"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "w3"], ["y"]),
    ]
    ends = [
        helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["N", k])
        for n, k in (("x", 5), ("y", 3))
    ]
    weights = [onnx.numpy_helper.from_array(v, k) for k, v in held.items()]
    graph = helper.make_graph(nodes, "codes", ends[:1], ends[1:], weights)
    model = load(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10),
        tmp_path,
    )
    coupling = couple(model)
    assert coupling.n_units == units
    keep = random_keep(coupling, np.random.default_rng(0), 0.5)
    cut = assert_exact(model, coupling, keep)
    columns = next(i for i, g in enumerate(coupling.groups) if ("w2", 1) in g.multiplicity)
    left = constants(cut)["w2"]
    assert left.dtype == ml_dtypes.int4
    assert left.shape[1] == keep[coupling.groups[columns].units].sum()


def test_weights_behind_a_transpose_are_masked_in_storage_order(tmp_path: Path) -> None:
    model = load(next(c for c in CASES if c.name == "qdq-weight-transposed").make(), tmp_path)
    coupling = couple(model)
    masked = rewrite.mask(model, coupling, np.arange(8) % 2 == 0)
    assert not any(n.op_type == "Mul" for n in masked.graph.node)
    stored = [v for n, v in constants(masked).items() if n.startswith("oamip_")]
    assert [v.shape for v in stored] == [(6, 8)]
    assert not stored[0][:, 1::2].any()


TWICE = """(float[N,5] x) => (float[] y) <float[5,8] w1, float s1 = {0.05}, uint8 z1 = {130}, float[8] s2 =
{0.021, 0.022, 0.023, 0.024, 0.026, 0.027, 0.028, 0.029}, uint8[8] z2 = {101, 102, 103, 104, 105, 106, 107, 108},
float[8,3] w2> {
    h = MatMul(x, w1)
    q = QuantizeLinear(h, s1, z1)
    d = DequantizeLinear(q, s1, z1)
    r = QuantizeLinear<axis = 1>(d, s2, z2)
    e = DequantizeLinear<axis = 1>(r, s2, z2)
    y = MatMul(e, w2)
}"""


def test_twice_quantised_weight_can_shrink_to_one_channel(tmp_path: Path) -> None:
    """The runtime merges the two pairs where both have one scale: in the cut model, not in the masked one."""
    model = load(build(TWICE), tmp_path)
    coupling = couple(model)
    assert_exact(model, coupling, np.arange(8) == 3, batches=(1, 50))


@pytest.mark.skipif(
    onnx.defs.onnx_opset_version() < 21, reason="this onnx does not know four-bit codes"
)
def test_weights_of_four_bits_are_compared_in_float(tmp_path: Path) -> None:
    """The runtime's products with such weights round activations to a byte: the last bit of a sum can be a step."""
    rng = np.random.default_rng(0)
    wide, inner, out, block = 512, 256, 96, 32
    held = {
        "w0": rng.standard_normal((5, wide)) / 2,
        "w1": rng.standard_normal((wide, inner)) / np.sqrt(wide),
        "s2": rng.uniform(0.01, 0.02, (inner // block, out)),
        "w3": rng.standard_normal((out, 3)) / np.sqrt(out),
    }
    weights = [onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in held.items()]
    weights.append(
        onnx.numpy_helper.from_array(rng.integers(-7, 7, (inner, out)).astype(ml_dtypes.int4), "w2")
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["g"]),
        helper.make_node("Tanh", ["g"], ["t"]),
        helper.make_node("MatMul", ["t", "w1"], ["a"]),
        helper.make_node("Tanh", ["a"], ["h"]),
        helper.make_node("DequantizeLinear", ["w2", "s2"], ["d"], axis=0, block_size=block),
        helper.make_node("MatMul", ["h", "d"], ["b"]),
        helper.make_node("Tanh", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "w3"], ["y"]),
    ]
    ends = [
        helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["N", k])
        for n, k in (("x", 5), ("y", 3))
    ]
    graph = helper.make_graph(nodes, "codes", ends[:1], ends[1:], weights)
    model = load(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10),
        tmp_path,
    )
    coupling = couple(model)
    for seed in range(2):
        assert_exact(
            model,
            coupling,
            random_keep(coupling, np.random.default_rng(seed), 0.5),
            batches=(64, 512),
        )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qdq-conv-per-tensor", 8 * 3 * 9 + 8 + 4 * 8 * 9),
        ("qdq-matmul-per-column", 5 * 8 + 8 + 8 * 3),
        ("qlinear-conv", 8 * 3 * 9 + 8 + 12 * 4 * 9 + 4 * 12),
        # The scales of what a product of integers makes are numbers like any others.
        ("conv-integer", 8 * 3 * 9 + 8 * 9 + 4 * 8 + 1),
        ("dynamic-quantisation", 5 * 8 + 8 * 6 + 8 + 6 + 6 * 3),
        ("dynamic-lstm-scales-of-rows", 5 * 9 + 9 * 24 + 6 * 24 + 48 + 6 * 3),
        ("counted-matmulnbits", 32 * 32 + 32 * 8 + 8 * 3),
        ("counted-dynamicquantizematmul", 32 * 32 + 32 * 8 + 8 * 3),
    ],
)
def test_codes_are_parameters_and_their_scales_are_not(
    name: str, expected: int, tmp_path: Path
) -> None:
    (case,) = (case for case in CASES if case.name == name)
    model = load(case.make(), tmp_path, case.bindings)
    assert cost.count(model).params == expected
