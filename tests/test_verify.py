"""Gates and measurements: differences are told apart from agreement, and what must fail fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import NETS, build, constants, load, samples
from onnx import ModelProto, numpy_helper

from onnx_oamip import data, verify
from onnx_oamip.data import Samples
from onnx_oamip.errors import GateFailed
from onnx_oamip.records import Array, Model
from onnx_oamip.runtime import Session


def _changed(proto: ModelProto, name: str, value: Array) -> ModelProto:
    result = ModelProto()
    result.CopyFrom(proto)
    for tensor in result.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))
    return result


def _samples(model: Model, arrays: dict[str, Array]) -> Samples:
    found = data.load(arrays, model)
    assert found is not None
    return found


@pytest.fixture
def mlp(tmp_path: Path) -> Model:
    return load(build(NETS["mlp"]), tmp_path)


# -------------------------------------------------------------------------------------------------------- structure


def test_a_valid_graph_passes(mlp: Model) -> None:
    verify.structure(mlp.proto)


def test_shapes_that_contradict_each_other_fail(mlp: Model) -> None:
    broken = _changed(mlp.proto, "w2", constants(mlp.proto)["w2"][:-1])
    with pytest.raises(GateFailed, match="fails the ONNX checker") as caught:
        verify.structure(broken)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_a_missing_tensor_fails(mlp: Model) -> None:
    broken = ModelProto()
    broken.CopyFrom(mlp.proto)
    del broken.graph.initializer[0]
    with pytest.raises(GateFailed):
        verify.structure(broken)


# ------------------------------------------------------------------------------------------------------- difference


def test_difference_is_relative_to_the_largest_output(mlp: Model) -> None:
    found = _samples(mlp, samples(mlp, 50))
    bias = constants(mlp.proto)["b3"]
    shift = np.asarray([0, 0.25, 0, -0.5], np.float32)
    other = Session(_changed(mlp.proto, "b3", bias + shift), "cpu")
    reference = Session(mlp.proto, "cpu")
    largest = np.abs(reference.run(found.feed(np.arange(50)))[0]).max()
    for batch_size in (7, 64):
        assert verify.difference(reference, reference, found, batch_size) == 0
        assert verify.difference(reference, other, found, batch_size) == pytest.approx(0.5 / largest, rel=1e-5)


def test_one_wrong_sample_is_enough(tmp_path: Path) -> None:
    """The largest difference counts, not an average over samples."""
    model = load(build("(float[N,3] x) => (float[N,3] y) <float[3] c> { y = Add(x, c) }"), tmp_path)
    text = """(float[N,3] x) => (float[N,3] y) <float[3] c, float limit = {90.0}, float one = {1.0}> {
        s = Add(x, c)
        far = Greater(x, limit)
        f = Cast<to = 1>(far)
        y = Add(s, f)
    }"""
    other = load(build(text), tmp_path)
    x = np.zeros((40, 3), np.float32)
    x[13, 2] = 100.0  # in the second of five batches
    apart = verify.difference(Session(model.proto, "cpu"), Session(other.proto, "cpu"), _samples(model, {"x": x}), 8)
    assert apart == pytest.approx(1.0 / (100.0 + constants(model.proto)["c"][2]), rel=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_never_agree(mlp: Model, value: float) -> None:
    bias = constants(mlp.proto)["b3"].copy()
    bias[1] = value
    other = Session(_changed(mlp.proto, "b3", bias), "cpu")
    found = _samples(mlp, samples(mlp, 5))
    assert verify.difference(Session(mlp.proto, "cpu"), other, found, 32) == float("inf")


def test_whole_numbers_must_be_equal(tmp_path: Path) -> None:
    text = """(float[N,6] x) => (float[N,4] y, int64[N] z) <float[6,4] w>
    { y = MatMul(x, w)  z = ArgMax<axis = 1, keepdims = 0>(y) }"""
    model = load(build(text), tmp_path)
    found = _samples(model, samples(model, 30))
    reference = Session(model.proto, "cpu")
    other = Session(_changed(model.proto, "w", constants(model.proto)["w"][:, ::-1]), "cpu")
    assert verify.difference(reference, reference, found, 32) == 0
    assert verify.difference(reference, other, found, 32) == float("inf")


def test_outputs_of_zero(tmp_path: Path) -> None:
    model = load(build("(float[N,3] x) => (float[N,2] y) <float[3,2] w> { m = MatMul(x, w)  y = Sub(m, m) }"), tmp_path)
    other = load(build("(float[N,3] x) => (float[N,2] y) <float[3,2] w> { y = MatMul(x, w) }"), tmp_path)
    found = _samples(model, samples(model, 4))
    nothing = Session(model.proto, "cpu")
    assert verify.difference(nothing, nothing, found, 32) == 0
    assert verify.difference(nothing, Session(other.proto, "cpu"), found, 32) == float("inf")


def test_tolerance_follows_the_precision(tmp_path: Path, mlp: Model) -> None:
    assert verify.tolerance(mlp) == 1e-4
    half = load(build(NETS["mlp"].replace("float", "float16")), tmp_path)
    assert 1e-3 < verify.tolerance(half) < 0.1
    double = load(build(NETS["mlp"].replace("float", "double")), tmp_path)
    assert verify.tolerance(double) == 1e-4


# ---------------------------------------------------------------------------------------------------------- compare


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_compare_against_numpy(mlp: Model, batch_size: int) -> None:
    rng = np.random.default_rng(2)
    arrays = samples(mlp, 50)
    labels = rng.integers(0, 4, 50)
    found = _samples(mlp, {**arrays, "labels": labels})
    weight = constants(mlp.proto)["w3"]
    other = _changed(mlp.proto, "w3", weight + 0.5 * rng.standard_normal(weight.shape).astype(np.float32))
    before, after = Session(mlp.proto, "cpu"), Session(other, "cpu")
    a, b = (s.run(arrays)[0].astype(np.float64) for s in (before, after))
    result = verify.compare(mlp, before, after, found, batch_size)
    assert result.samples == 50
    assert result.output_relative_error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-4)
    assert result.agreement == (a.argmax(1) == b.argmax(1)).mean()
    assert result.accuracy_before == (a.argmax(1) == labels).mean()
    assert result.accuracy_after == (b.argmax(1) == labels).mean()
    assert 0 < result.agreement < 1
    assert result.masked_equivalence is None


def test_a_model_agrees_with_itself(mlp: Model) -> None:
    session = Session(mlp.proto, "cpu")
    result = verify.compare(mlp, session, session, _samples(mlp, samples(mlp, 9)), 4)
    assert (result.output_relative_error, result.agreement) == (0, 1)
    assert (result.accuracy_before, result.accuracy_after) == (None, None)


def test_without_classes_there_is_no_agreement(tmp_path: Path) -> None:
    model = load(build("(float[N,3,6,6] x) => (float[] y) <float[8,3,3,3] w> { y = Conv(x, w) }"), tmp_path)
    session = Session(model.proto, "cpu")
    result = verify.compare(model, session, session, _samples(model, samples(model, 3)), 4)
    assert result.agreement is None
    assert result.output_relative_error == 0


def test_labels_of_whole_feeds_count_every_row(mlp: Model) -> None:
    arrays = samples(mlp, 24)
    session = Session(mlp.proto, "cpu")
    truth = session.run(arrays)[0].argmax(1)
    whole = {"x": arrays["x"].reshape(6, 4, 6), "labels": truth.reshape(6, 4)}
    result = verify.compare(mlp, session, session, _samples(mlp, whole), 32)
    assert (result.accuracy_before, result.accuracy_after) == (1, 1)


# ---------------------------------------------------------------------------------------------------------- runs_at


def test_two_batch_sizes_where_the_batch_is_free(mlp: Model, tmp_path: Path) -> None:
    session = Session(mlp.proto, "cpu")
    assert verify.runs_at(mlp, session, _samples(mlp, samples(mlp, 5))) == (1, 2)
    # One sample is enough: it is fed twice.
    assert verify.runs_at(mlp, session, _samples(mlp, samples(mlp, 1))) == (1, 2)
    whole = {"x": samples(mlp, 6)["x"].reshape(2, 3, 6)}
    assert verify.runs_at(mlp, session, _samples(mlp, whole)) == (1,)
    fixed = load(build(NETS["mlp"].replace("N,", "4,")), tmp_path)
    four = _samples(fixed, {"x": np.zeros((9, 6), np.float32)})
    assert verify.runs_at(fixed, Session(fixed.proto, "cpu"), four) == (4,)


def test_rows_that_get_lost_fail(mlp: Model, tmp_path: Path) -> None:
    short = load(
        build("(float[N,6] x) => (float[N,4] y)"
              " <float[6,4] w, int64[1] from = {0}, int64[1] to = {1}, int64[1] at = {0}>"
              " { m = MatMul(x, w)  y = Slice(m, from, to, at) }"),
        tmp_path,
    )  # fmt: skip
    with pytest.raises(GateFailed, match="gives 1 rows in 'y' for a batch of 2"):
        verify.runs_at(mlp, Session(short.proto, "cpu"), _samples(mlp, samples(mlp, 5)))


def test_outputs_that_are_no_numbers_fail(mlp: Model) -> None:
    bias = constants(mlp.proto)["b3"].copy()
    bias[0] = np.nan
    broken = Session(_changed(mlp.proto, "b3", bias), "cpu")
    with pytest.raises(GateFailed, match="NaN or infinity in 'y'"):
        verify.runs_at(mlp, broken, _samples(mlp, samples(mlp, 5)))


def test_the_head_is_the_first_table_of_floats(tmp_path: Path, mlp: Model) -> None:
    assert verify.head(mlp) == 0
    second = load(
        build("(float[N,6] x) => (float[N,6,1] a, int64[N,6] b, float[N,4] y) <float[6,4] w, int64[1] at = {2}> {"
              " a = Unsqueeze(x, at)  b = Cast<to = 7>(x)  y = MatMul(x, w) }"),
        tmp_path,
    )  # fmt: skip
    assert verify.head(second) == 2
    none = load(build("(float[N,6] x) => (float[N,1] y) <float[6,1] w> { y = MatMul(x, w) }"), tmp_path)
    assert verify.head(none) is None


def test_checker_sees_the_final_model(mlp: Model) -> None:
    """The full check infers shapes: a declared output that cannot be is refused too."""
    broken = ModelProto()
    broken.CopyFrom(mlp.proto)
    broken.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5
    onnx.checker.check_model(broken)
    with pytest.raises(GateFailed):
        verify.structure(broken)
