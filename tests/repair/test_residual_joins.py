"""Joins of a linear node's output with another branch, and the nodes in between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import build, load

from onnx_oamip.core.records import Array, Model
from onnx_oamip.graph.linear_layers import site
from onnx_oamip.repair.residual_joins import LEAST_GAIN, Join, join

HEAD = "(float[N,3,4,4] x) => (float[N,4,4,4] y{more}) <float[4,3,1,1] w1, float[4,3,1,1] w2{constants}>"
PLAIN = "a = Conv(x, w1)  b = Conv(x, w2)  {between}"
NORM = ", float[4] s = {1, 1, 1, 1}, float[4] z = {0, 0, 0, 0}, float[4] m = {0, 0, 0, 0}, float[4] v = {1, 1, 1, 1}"


def _join(
    folder: Path, between: str, constants: str = "", more: str = "", **changed: Array
) -> Join | None:
    """Nodes behind the first convolution, with other values of the constants."""
    text = (
        HEAD.format(constants=constants, more=more) + " { " + PLAIN.format(between=between) + " }"
    )
    model: Model = load(build(text), folder)
    model = replace(
        model,
        constants={**model.constants, **{k: v.astype(np.float32) for k, v in changed.items()}},
    )
    node = next(n for n in model.nodes if "w1" in n.inputs)
    place = site(node, model.constants)
    assert place is not None
    return join(model, place)


@pytest.mark.parametrize("sum_", ["Add(a, b)", "Add(b, a)", "Sum(a, b)"])
def test_sum_with_another_branch_is_a_join(tmp_path: Path, sum_: str) -> None:
    found = _join(tmp_path, f"y = {sum_}")
    assert found is not None
    assert found.other == "b"
    assert found.gain.tolist() == [1, 1, 1, 1]


def test_addition_of_a_bias_is_no_join(tmp_path: Path) -> None:
    constants = ", float[4,1,1] c = {1, 2, 3, 4}"
    found = _join(tmp_path, "k = Add(a, c)  i = Identity(k)  y = Add(i, b)", constants)
    assert found is not None
    assert found.other == "b"


@pytest.mark.parametrize(
    ("between", "more"),
    [
        ("r = Relu(a)  y = Add(r, b)", ""),
        ("y = Add(a, b)  z = Identity(a)", ", float[N,4,4,4] z"),
        ("r = Relu(a)  q = Add(r, b)  y = Add(q, a)", ""),
        ("y = Add(a, a)  z = Identity(b)", ", float[N,4,4,4] z"),
        ("p = GlobalAveragePool(b)  y = Add(a, p)", ""),
        ("y = Mul(a, b)", ""),
        ("y = Sum(a, b, b)", ""),
    ],
)
def test_patterns_without_a_plain_sum_are_no_join(tmp_path: Path, between: str, more: str) -> None:
    """A bend on the way, others who see the output, itself, another shape, no sum of two."""
    assert _join(tmp_path, between, more=more) is None


def test_graph_output_is_no_join(tmp_path: Path) -> None:
    """The graph shows the join, whatever other consumers it has."""
    text = "(float[N,5] x) => (float[N,4] a, float[N,4] y) <float[5,4] w1, float[5,4] w2> { a = MatMul(x, w1)  "
    model = load(build(text + "b = MatMul(x, w2)  y = Add(a, b) }"), tmp_path)
    place = site(model.nodes[0], model.constants)
    assert place is not None
    assert place.node.outputs[0] == "a"
    assert join(model, place) is None


@pytest.mark.parametrize("largest", [0.125, 1.0, 8.0])
def test_gain_of_normalisation_equals_its_definition(tmp_path: Path, largest: float) -> None:
    """scale / sqrt(variance + epsilon), by channel; muted is what is far below the largest, not what is just above."""
    scale = np.asarray(
        [largest, -largest / 2, largest * LEAST_GAIN * 0.999, largest * LEAST_GAIN * 1.001]
    )
    variance, epsilon = np.asarray([3.0, 1.0, 3.0, 3.0]), 0.25
    between = f"n = BatchNormalization<epsilon = {epsilon}>(a, s, z, m, v)  y = Add(n, b)"
    found = _join(tmp_path, between, NORM, s=scale, v=variance)
    assert found is not None
    expected = scale / np.sqrt(variance + epsilon)
    level = np.abs(expected).max() * LEAST_GAIN
    expected[np.abs(expected) < level] = 0
    np.testing.assert_allclose(found.gain, expected, rtol=1e-6)
    assert np.count_nonzero(found.gain) >= 2
    assert np.count_nonzero(found.gain) < 4


def test_correction_cancels_the_error() -> None:
    gain = np.asarray([2.0, 0.0, -0.5, 1.0])
    kept = np.asarray([True, True, True, False])
    error = np.asarray([[1.0, 5.0, 3.0], [-2.0, 0.0, 1.0]])
    with np.errstate(all="raise"):
        found = Join("b", gain).correction(error, kept)
    assert found.tolist() == [[0.5, 0.0, -6.0], [-1.0, 0.0, -2.0]]


def test_normalisation_with_computed_scale_is_no_join(tmp_path: Path) -> None:
    """Without a constant scale there is no gain to speak of."""
    between = "p = ReduceMean<axes = [0, 2, 3], keepdims = 0>(b)  "
    assert (
        _join(tmp_path, between + "n = BatchNormalization(a, p, z, m, v)  y = Add(n, b)", NORM)
        is None
    )


def test_normalisation_in_training_mode_is_no_join(tmp_path: Path) -> None:
    """It divides by the deviation of the batch, not by that of its constants."""
    between = "n, k, l = BatchNormalization<training_mode = {0}>(a, s, z, m, v)  y = Add(n, b)"
    assert _join(tmp_path, between.replace("{0}", "0").replace("n, k, l", "n"), NORM) is not None
    assert _join(tmp_path, between.replace("{0}", "1"), NORM) is None


@pytest.mark.parametrize("positions", [4, 5])
def test_normalisation_of_another_axis_is_no_join(positions: int, tmp_path: Path) -> None:
    """Tokens are scaled, not the four outputs of the product, even where there are as many of them."""
    text = (
        f"(float[N,{positions},3] x) => (float[N,{positions},4] y) <float[3,4] w1, float[3,4] w2,"
        f" float[{positions}] s, float[{positions}] z, float[{positions}] m, float[{positions}] v> {{"
        " a = MatMul(x, w1)  b = MatMul(x, w2)  n = BatchNormalization(a, s, z, m, v)  y = Add(n, b) }"
    )
    model = load(build(text), tmp_path)
    place = site(model.nodes[0], model.constants)
    assert place is not None
    assert place.node.outputs == ("a",)
    assert join(model, place) is None
