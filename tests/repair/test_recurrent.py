"""Refit of recurrent layers: what is redundant is restored exactly, in every direction and for every kind of gate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import build, load
from onnx import numpy_helper

from onnx_oamip.core.records import Array, Model
from onnx_oamip.data import dataset
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.linear_layers import Editor
from onnx_oamip.graph.partial_execution import Frontier
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.repair import least_squares, recurrent

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS, SAMPLES, SOURCES, INPUTS, HIDDEN = 6, 64, 3, 6, 8
KINDS = [
    ("LSTM", "forward", ""),
    ("LSTM", "reverse", ""),
    ("LSTM", "bidirectional", ""),
    ("GRU", "forward", ""),
    ("GRU", "bidirectional", ", linear_before_reset = 1"),
    ("RNN", "forward", ""),
]


def _weights(
    op: str, directions: int, rng: np.random.Generator, *, twins: bool
) -> dict[str, Array]:
    """Random weights; with twins the second half of the hidden units repeats the first."""
    rows = GATES[op]
    w = rng.normal(0, 0.5, (directions, rows, HIDDEN, INPUTS))
    r = rng.normal(0, 0.3, (directions, rows, HIDDEN, HIDDEN))
    b = rng.normal(0, 0.2, (directions, 2 * rows, HIDDEN))
    if twins:
        half = HIDDEN // 2
        for array in (w, r):
            array[:, :, half:] = array[:, :, :half]
        b[:, :, half:] = b[:, :, :half]
    shapes = {"w": (directions, -1, INPUTS), "r": (directions, -1, HIDDEN), "b": (directions, -1)}
    return {
        name: array.reshape(shapes[name]).astype(np.float32)
        for name, array in (("w", w), ("r", r), ("b", b))
    }


def _network(
    op: str,
    direction: str,
    more: str,
    folder: Path,
    *,
    twins: bool = False,
    lengths: bool = False,
) -> Model:
    """Inputs that are a product of fewer sources, a recurrent layer, and a product of its states."""
    directions = 1 + (direction == "bidirectional")
    rows = GATES[op]
    text = f"""(float[{STEPS}, N, {SOURCES}] s{", int32[N] ends" if lengths else ""}) => (float[] y)
        <float[{SOURCES}, {INPUTS}] m, float[{directions}, {rows * HIDDEN}, {INPUTS}] w,
        float[{directions}, {rows * HIDDEN}, {HIDDEN}] r, float[{directions}, {2 * rows * HIDDEN}] b,
        float[{HIDDEN}, 4] v> {{
        x = MatMul(s, m)
        h = {op} <hidden_size = {HIDDEN}, direction = "{direction}"{more}> (x, w, r, b{", ends" if lengths else ""})
        y = MatMul(h, v) }}"""
    rng = np.random.default_rng(3)
    values = _weights(op, directions, rng, twins=twins)
    values["m"] = rng.normal(0, 1, (SOURCES, INPUTS)).astype(np.float32)
    values["v"] = rng.normal(0, 1, (HIDDEN, 4)).astype(np.float32)
    proto = build(text)
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    return load(proto, folder)


def _data(model: Model, lengths: bool = False) -> Samples:
    rng = np.random.default_rng(4)
    arrays: dict[str, Array] = {"s": rng.normal(0, 1, (SAMPLES, STEPS, SOURCES)).astype(np.float32)}
    arrays["s"] = np.ascontiguousarray(arrays["s"].transpose(1, 0, 2))
    if lengths:
        arrays["ends"] = rng.integers(1, STEPS + 1, SAMPLES).astype(np.int32)
    found = dataset.load(arrays, model)
    assert found is not None
    return found


INPUT_AXIS = ("m", 1)
STATE_AXIS = ("r", 2)


def _errors(model: Model, axis: tuple[str, int], found: Samples) -> tuple[float, float]:
    """Relative output error of the cut model and of the refitted one, without the second half of an axis."""
    coupling = couple(model)
    keep = np.ones(coupling.n_units, bool)
    units = coupling.axes[axis]
    keep[units[len(units) // 2 :]] = False
    raw = rewrite.cut(model, coupling, keep)
    sampling = least_squares.Sampling(samples=found, device="cpu")
    pruned = least_squares.front(model, coupling, keep, raw, sampling, short=())
    assert any(fit.form == "gate sums" for fit in pruned.fits)
    (feed,) = (feed for _, feed in found.batches(SAMPLES))
    outputs = [Session(proto, "cpu").run(feed)[0] for proto in (model.proto, raw, pruned.proto)]
    scale = float(np.square(outputs[0]).sum())
    cut, refitted = (float(np.square(out - outputs[0]).sum()) / scale for out in outputs[1:])
    return cut, refitted


@pytest.mark.parametrize(("op", "direction", "more"), KINDS)
def test_inputs_that_the_others_determine_are_restored(
    op: str, direction: str, more: str, tmp_path: Path
) -> None:
    """Six inputs of three sources: three of them are enough."""
    model = _network(op, direction, more, tmp_path)
    cut, refitted = _errors(model, INPUT_AXIS, _data(model))
    assert cut > 1e-2
    assert refitted < 1e-5


@pytest.mark.parametrize(("op", "direction", "more"), KINDS)
def test_hidden_units_that_others_repeat_are_restored(
    op: str, direction: str, more: str, tmp_path: Path
) -> None:
    model = _network(op, direction, more, tmp_path, twins=True)
    cut, refitted = _errors(model, STATE_AXIS, _data(model))
    assert cut > 1e-2
    assert refitted < 1e-5


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_steps_behind_the_end_of_a_sequence_are_no_rows(direction: str, tmp_path: Path) -> None:
    model = _network("LSTM", direction, "", tmp_path, twins=True, lengths=True)
    found = _data(model, lengths=True)
    layer = recurrent.layer(next(n for n in model.nodes if n.op == "LSTM"), model)
    assert layer is not None
    (feed,) = (feed for _, feed in found.batches(SAMPLES))
    types = {"s": 1, "ends": 6, "x": 1, "h": 1}
    rng = np.random.default_rng(0)
    steps = recurrent.collect(
        model, [layer], [feed], types=types, device="cpu", rng=rng, memory_limit=1 << 30
    )
    (one,) = steps[layer.node.name]
    assert len(one.rows) == feed["ends"].sum()
    assert (one.rows // SAMPLES < feed["ends"][one.rows % SAMPLES]).all()
    # The first step of the forward direction, and the last one of the backward direction, start from zeros.
    assert (one.h[0, one.rows < SAMPLES] == 0).all()
    if direction == "bidirectional":
        is_last = one.rows // SAMPLES == feed["ends"][one.rows % SAMPLES] - 1
        assert (one.h[1, is_last] == 0).all()
        assert (one.h[1, ~is_last] != 0).any()
    cut, refitted = _errors(model, STATE_AXIS, found)
    assert cut > 1e-2
    assert refitted < 1e-5


def test_little_memory_means_few_rows(tmp_path: Path) -> None:
    model = _network("LSTM", "forward", "", tmp_path)
    layer = recurrent.layer(next(n for n in model.nodes if n.op == "LSTM"), model)
    assert layer is not None
    feeds = [feed for _, feed in _data(model).batches(SAMPLES)]
    assert len(feeds) == 1
    types = {"s": 1, "x": 1, "h": 1}
    counts = []
    for limit in (1 << 30, 1 << 17, 1):
        rng = np.random.default_rng(0)
        steps = recurrent.collect(
            model, [layer], feeds, types=types, device="cpu", rng=rng, memory_limit=limit
        )
        counts.append(sum(len(one.rows) for one in steps[layer.node.name]))
    # Per row 6 inputs and 8 states, and three times those and 32 sums, of eight bytes each.
    assert counts == [STEPS * SAMPLES, (1 << 17) // 8 // 152, recurrent.FEWEST_ROWS]


def test_weights_that_nodes_put_together_are_not_refitted(tmp_path: Path) -> None:
    """New weights would be stored beside the parts, from which other nodes may make theirs."""
    model = _network("RNN", "forward", "", tmp_path)
    layer = recurrent.layer(next(n for n in model.nodes if n.op == "RNN"), model)
    assert layer is not None
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    proto.graph.node.insert(0, onnx.helper.make_node("Concat", ["w"], ["made"], axis=1))
    (node,) = (node for node in proto.graph.node if node.op_type == "RNN")
    node.input[1] = "made"
    editor = Editor(proto)
    frontier = Frontier(proto, [], {}, "cpu")
    found = recurrent.refit(layer, np.ones(HIDDEN, bool), editor, frontier, [])
    assert found == (None, ["its weights are computed from constants, so it is not refitted"])
