"""Values of shape computations against ONNX's reference, and with symbols in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnx_oamip.graph.loading import load
from onnx_oamip.graph.ops.shape_values import evaluate
from onnx_oamip.graph.symbolic_dims import Size, Unknown

N = Size.of("n")


def value_of(node: onnx.NodeProto, inputs: list[Any]) -> list[Any]:
    """Elements that the rule gives."""
    given = [np.asarray(value, object) for value in inputs]
    return list(evaluate(node, given, None).ravel())


@pytest.mark.parametrize(
    ("operator", "inputs"),
    [
        ("Max", [[3, -7], [5]]),
        ("Max", [[1, 8], [4, 2], [3, 3]]),
        ("Min", [[3, -7], [5]]),
        ("Min", [[1, 8], [4, 2], [3, 3]]),
        ("Mod", [[7, -7, 7, -7], [3, 3, -3, -3]]),
        ("Neg", [[4, -2, 0]]),
    ],
)
def test_numbers_agree_with_the_reference(operator: str, inputs: list[list[int]]) -> None:
    names = [f"in{i}" for i in range(len(inputs))]
    node = helper.make_node(operator, names, ["out"])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(n, TensorProto.INT64, [None]) for n in names],
        [helper.make_tensor_value_info("out", TensorProto.INT64, [None])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    feeds = {n: np.array(value, np.int64) for n, value in zip(names, inputs, strict=True)}
    expected = ReferenceEvaluator(model).run(None, feeds)[0]
    assert value_of(node, inputs) == list(expected)


@pytest.mark.parametrize(
    ("operator", "inputs", "expected"),
    [
        ("Max", [N, 0], N),
        ("Max", [N + 2, N], N + 2),
        ("Max", [N * -1, 0], 0),
        ("Min", [N, 0], 0),
        ("Min", [N + 2, N], N),
        ("Min", [N, -1, N + 4], -1),
    ],
)
def test_extremes_of_sizes_that_hold_for_all_lengths(
    operator: str, inputs: list[Any], expected: Any
) -> None:
    node = helper.make_node(operator, [f"in{i}" for i in range(len(inputs))], ["out"])
    assert value_of(node, inputs) == [expected]


@pytest.mark.parametrize(
    ("operator", "inputs"),
    [
        ("Max", [N, 1]),
        ("Min", [N, 256]),
        ("Max", [Size.of("?v"), 0]),
        ("Mod", [N, 2]),
        ("Mod", [1, 0]),
    ],
)
def test_values_that_depend_on_lengths_are_unknown(operator: str, inputs: list[Any]) -> None:
    node = helper.make_node(operator, [f"in{i}" for i in range(len(inputs))], ["out"])
    with pytest.raises(Unknown):
        value_of(node, inputs)


def test_remainder_with_the_sign_of_the_dividend_is_unknown() -> None:
    with pytest.raises(Unknown):
        value_of(helper.make_node("Mod", ["a", "b"], ["out"], fmod=1), [-7, 3])


def test_padding_to_a_least_length_has_known_shapes(tmp_path: Path) -> None:
    numbers = {"axis": [1], "least": [64], "zero": [0], "front": [0, 0, 0], "middle": [1]}
    kernel = numpy_helper.from_array(np.ones((4, 1, 9), np.float32), "kernel")
    graph = helper.make_graph(
        [
            helper.make_node("Shape", ["audio"], ["shape"]),
            helper.make_node("Gather", ["shape", "axis"], ["length"]),
            helper.make_node("Sub", ["least", "length"], ["lacking"]),
            helper.make_node("Max", ["lacking", "zero"], ["added"]),
            helper.make_node("Concat", ["front", "added"], ["pads"], axis=0),
            helper.make_node("Pad", ["audio", "pads"], ["padded"]),
            helper.make_node("Unsqueeze", ["padded", "middle"], ["signal"]),
            helper.make_node("Conv", ["signal", "kernel"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("audio", TensorProto.FLOAT, [1, "samples"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, "frames"])],
        [
            *(numpy_helper.from_array(np.array(v, np.int64), k) for k, v in numbers.items()),
            kernel,
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = tmp_path / "padded.onnx"
    onnx.save(model, path)
    assert load(path, stated={"samples": (20,)}).shapes["y"] == (1, 4, 56)
    assert load(path, stated={"samples": (100,)}).shapes["y"] == (1, 4, 92)
