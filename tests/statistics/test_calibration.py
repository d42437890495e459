"""Streaming moments against numpy on the same activations, whatever the batch size, the type and the device.

One pass keeps two sums per consumed channel and nothing else, so memory does not grow with the number of samples.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import NETS, activations, build, load, samples

from onnx_oamip.core.errors import DataError, EnvironmentMissing
from onnx_oamip.core.records import (
    Array,
    Coupling,
    Model,
    Statistics,
)
from onnx_oamip.data import dataset
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import resolve_device
from onnx_oamip.statistics import calibration


def _collect(
    model: Model,
    coupling: Coupling,
    arrays: dict[str, Array],
    device: str = "cpu",
    batch_size: int = 32,
) -> Statistics:
    found = dataset.load(arrays, model)
    assert found is not None
    return calibration.collect(model, coupling, found, device, batch_size=batch_size)


def _assert_moments(
    model: Model, found: Statistics, arrays: dict[str, Array], tolerance: float
) -> None:
    """Mean and mean square against float64 numpy; the mean relative to the channel's root mean square."""
    tensors = sorted({tensor for tensor, _ in found.moments})
    values = activations(model, arrays, tensors)
    assert found.moments
    for (tensor, axis), moments in found.moments.items():
        x = np.moveaxis(values[tensor].astype(np.float64), axis, 0)
        x = x.reshape(len(x), -1)
        square = np.square(x).mean(axis=1)
        assert moments.count == x.shape[1]
        np.testing.assert_allclose(
            moments.mean_square, square, rtol=tolerance, atol=1e-30, err_msg=tensor
        )
        apart = np.abs(moments.mean - x.mean(axis=1))
        assert (apart <= tolerance * np.sqrt(square) + 1e-30).all(), (tensor, axis, apart)


@pytest.mark.parametrize("name", NETS)
def test_moments_equal_numpy(tmp_path: Path, name: str) -> None:
    model = load(build(NETS[name]), tmp_path)
    coupling = couple(model)
    arrays = samples(model, 50)
    found = _collect(model, coupling, arrays)
    assert {(c.data, c.axis) for c in coupling.consumers} <= set(found.moments)
    assert (found.samples, found.device) == (50, "cpu")
    _assert_moments(model, found, arrays, 1e-6)


def test_attention_scores_have_moments_on_both_sides(tmp_path: Path) -> None:
    model = load(build(NETS["attention"]), tmp_path)
    coupling = couple(model)
    found = _collect(model, coupling, samples(model, 9))
    # Two activations meet: what one side is multiplied with is the other side's statistic.
    assert {("qt", 3), ("kt", 2)} <= set(found.moments)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_moments_do_not_depend_on_the_batch_size(tmp_path: Path, batch_size: int) -> None:
    model = load(build(NETS["cnn"]), tmp_path)
    coupling = couple(model)
    arrays = samples(model, 50)
    reference, found = (
        _collect(model, coupling, arrays),
        _collect(model, coupling, arrays, batch_size=batch_size),
    )
    for site, moments in found.moments.items():
        other = reference.moments[site]
        assert moments.count == other.count
        np.testing.assert_allclose(moments.mean_square, other.mean_square, rtol=1e-6)
        np.testing.assert_allclose(
            moments.mean, other.mean, atol=1e-6 * np.sqrt(other.mean_square.max())
        )


def test_fixed_batch_leaves_the_remainder_out(tmp_path: Path) -> None:
    model = load(build(NETS["mlp"].replace("N,", "4,")), tmp_path)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((10, 6)).astype(np.float32)
    coupling = couple(model)
    found = _collect(model, coupling, {"x": x})
    assert found.samples == 8
    assert all(m.count == 8 for m in found.moments.values())
    by_hand = _collect(load(build(NETS["mlp"]), tmp_path), coupling, {"x": x[:8]})
    for site, moments in found.moments.items():
        np.testing.assert_allclose(moments.mean, by_hand.moments[site].mean, rtol=1e-5, atol=1e-6)


def test_whole_feeds_count_all_their_rows(tmp_path: Path) -> None:
    model = load(build(NETS["mlp"]), tmp_path, {"N": 4})
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4, 6)).astype(np.float32)
    coupling = couple(model)
    whole = _collect(model, coupling, {"x": x})
    flat = _collect(model, coupling, {"x": x.reshape(12, 6)})
    assert (whole.samples, flat.samples) == (3, 12)
    for site, moments in whole.moments.items():
        assert moments.count == flat.moments[site].count == 12
        np.testing.assert_allclose(moments.mean_square, flat.moments[site].mean_square, rtol=1e-6)


def test_half_precision_activations_are_measured(tmp_path: Path) -> None:
    text = NETS["mlp"].replace("float", "float16")
    model = load(build(text), tmp_path)
    coupling = couple(model)
    arrays = samples(model, 40)
    # The runtime keeps more bits between its kernels than a half-precision output shows: 2^-11 each.
    _assert_moments(model, _collect(model, coupling, arrays), arrays, 2e-3)


def test_half_precision_sums_do_not_overflow(tmp_path: Path) -> None:
    """One activation fits into half precision, the sum of the squares of a batch does not."""
    text = """(float16[N,2] x) => (float16[N,1] y) <float16[2,3] w1, float16[3,1] w2>
    { h = MatMul(x, w1) y = MatMul(h, w2) }"""
    proto = build(text)
    for tensor, value in zip(
        proto.graph.initializer, (np.full((2, 3), 100), np.zeros((3, 1))), strict=True
    ):
        tensor.CopyFrom(onnx.numpy_helper.from_array(value.astype(np.float16), tensor.name))
    model = load(proto, tmp_path)
    found = _collect(model, couple(model), {"x": np.ones((64, 2), np.float16)})
    np.testing.assert_allclose(found.moments["h", 1].mean_square, 200.0**2, rtol=1e-6)


def test_model_that_overflows_is_refused(tmp_path: Path) -> None:
    model = load(
        build(
            "(float[N,2] x) => (float[N,1] y) <float[2,3] w1, float[3,1] w2> { a = MatMul(x, w1) h = Exp(a)"
            " y = MatMul(h, w2) }"
        ),
        tmp_path,
    )
    with pytest.raises(
        DataError, match=r"'h', which MatMul .* NaN or infinite values in 3 of 3 .* from Exp .* on"
    ):
        _collect(model, couple(model), {"x": np.full((3, 2), 1e30, np.float32)})


def test_progress_counts_samples(tmp_path: Path) -> None:
    model = load(build(NETS["mlp"]), tmp_path)
    found = dataset.load(samples(model, 10), model)
    assert found is not None
    seen: list[tuple[str, int, int]] = []
    calibration.collect(
        model, couple(model), found, "cpu", batch_size=4, progress=lambda *step: seen.append(step)
    )
    assert seen == [("calibrate", 4, 10), ("calibrate", 8, 10), ("calibrate", 10, 10)]


def test_model_without_measured_tensors_has_no_moments(tmp_path: Path) -> None:
    model = load(
        build("(float[N,2] x) => (float[] y) <float[2,3] w> { y = MatMul(x, w) }"), tmp_path
    )
    found = _collect(model, couple(model), {"x": np.ones((3, 2), np.float32)})
    assert found.moments == {}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cnn", "attention"])
def test_cuda_gives_the_same_moments(tmp_path: Path, name: str) -> None:
    try:
        resolve_device("cuda")
    except EnvironmentMissing as error:
        pytest.skip(str(error))
    model = load(build(NETS[name]), tmp_path)
    coupling = couple(model)
    arrays = samples(model, 64)
    cpu, cuda = _collect(model, coupling, arrays), _collect(model, coupling, arrays, "cuda")
    assert cuda.device == "cuda"
    for site, moments in cpu.moments.items():
        scale = np.sqrt(moments.mean_square.max())
        np.testing.assert_allclose(
            cuda.moments[site].mean_square, moments.mean_square, rtol=1e-4, atol=1e-4 * scale**2
        )
        np.testing.assert_allclose(cuda.moments[site].mean, moments.mean, atol=1e-4 * scale)
