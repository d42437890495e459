"""The judge: losses on held-out samples, weights that are written back, and the rule that nothing gets worse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import build, load
from onnx import numpy_helper

from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.objective import find_objective, scale
from onnx_oamip.recovery.judge import Best, Judge, split, written

TEXT = "(float[N, 6] x) => (float[N, 4] y) <float[6, 4] w, float[4] b> { y = Gemm(x, w, b) }"


def test_judge_finds_the_loss_and_the_measures_of_a_model(tmp_path: Path) -> None:
    model = load(build(TEXT), tmp_path)
    data = {"x": np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)}
    samples = dataset.load(data, model)
    assert samples is not None
    settings = Settings.create(task="values")
    objective = scale(model, find_objective(model, settings, samples), samples, "cpu")
    judge = Judge(model, objective, samples, device="cpu", batch_size=7)
    shifted = written(model.proto, {"b": model.constants["b"] + 0.5})
    truth = data["x"] @ model.constants["w"]
    expected = np.mean(0.25 / truth.var(axis=0))
    assert judge.losses(model.proto).tolist() == [0.0] * 40
    assert judge.losses(shifted).mean() == pytest.approx(expected, rel=1e-4)
    (measure,) = judge.measures(shifted)
    assert measure.values["error_over_variance"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "end",
    [
        "y = Transpose<perm = [1, 0, 2]>(h)",
        "y = Identity(h) s = ReduceMean<keepdims = 0>(h)",
    ],
    ids=["batch on another axis", "one number for all"],
)
def test_every_sample_has_a_loss(end: str, tmp_path: Path) -> None:
    outputs = "float[N,3,2] y, float[] s" if "s =" in end else "float[3,N,2] y"
    text = f"(float[N,3,4] x) => ({outputs}) <float[4,2] w> {{ h = MatMul(x, w) {end} }}"
    model = load(build(text), tmp_path)
    data = {"x": np.random.default_rng(0).normal(size=(20, 3, 4)).astype(np.float32)}
    samples = dataset.load(data, model)
    assert samples is not None
    settings = Settings.create(outputs={port.name: "values" for port in model.outputs})
    objective = scale(model, find_objective(model, settings, samples), samples, "cpu")
    judge = Judge(model, objective, samples, device="cpu", batch_size=8)
    losses = judge.losses(written(model.proto, {"w": 1.1 * model.constants["w"]}))
    assert losses.shape == (20,)
    assert len(np.unique(losses)) == 20


@pytest.mark.parametrize("kind", [onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16])
def test_weights_are_written_in_their_type_and_nothing_else_changes(
    kind: int, tmp_path: Path
) -> None:
    proto = build(TEXT)
    for held in proto.graph.initializer:
        numpy_type = onnx.helper.tensor_dtype_to_np_dtype(kind)
        value = numpy_helper.to_array(held).astype(numpy_type)
        held.CopyFrom(numpy_helper.from_array(value, held.name))
    result = written(proto, {"w": np.full((6, 4), 1.0001, np.float32)})
    before = {held.name: held for held in proto.graph.initializer}
    after = {held.name: held for held in result.graph.initializer}
    assert after["b"] == before["b"]
    assert after["w"].data_type == kind
    assert (numpy_helper.to_array(after["w"]).astype(np.float32) == 1.0).all()
    assert result.graph.node == proto.graph.node


START = np.array([1.0, 1.2, 0.8, 1.0])


def test_best_is_taken_only_if_it_is_better_than_the_start() -> None:
    best = Best(START, patience=2)
    best.offer(10, START - 1e-4, {"w": np.zeros(1)})
    assert not best.is_better
    best.offer(20, START - 0.2, {"w": np.ones(1)})
    assert (best.is_better, best.step, best.weights["w"].tolist()) == (True, 20, [1.0])
    best.offer(30, START - 0.1, {})
    assert not best.has_stalled
    best.offer(40, START - 0.15, {})
    assert best.has_stalled
    assert best.step == 20
    assert best.loss == pytest.approx(0.8)


def test_later_weights_are_best_unless_they_are_worse_by_more_than_noise() -> None:
    """Each is compared with the lowest, so that many small rises do not add up."""
    rng = np.random.default_rng(0)
    start = rng.uniform(1.0, 2.0, 100)
    noise = rng.normal(0.0, 0.2, 100)
    noise -= noise.mean()
    best = Best(start, 5)
    best.offer(10, start - 0.5, {"w": np.zeros(1)})
    best.offer(20, start - 0.49 + noise, {"w": np.ones(1)})
    assert (best.step, best.loss) == (20, pytest.approx(start.mean() - 0.49))
    assert best.is_better
    best.offer(30, start - 0.45 + noise, {})
    assert best.step == 20
    best.offer(40, start - 0.49 + noise, {"w": np.ones(1)})
    assert best.step == 40


def test_a_gain_on_one_sample_alone_is_noise() -> None:
    best = Best(START, patience=2)
    best.offer(10, START - np.array([0.9, -0.1, -0.1, -0.1]), {})
    assert best.loss < START.mean()
    assert not best.is_better


def test_a_gain_of_most_samples_counts_beside_a_few_large_losses() -> None:
    rng = np.random.default_rng(0)
    start = np.full(100, 0.1)
    start[:4] = 5.0  # their change is all noise
    gains = rng.uniform(0.0, 0.02, 100)
    gains[:4] = 1.0, -1.0, 1.2, -1.2
    best = Best(start, 3)
    best.offer(10, start - gains, {})
    assert gains.mean() < gains.std() / 10
    assert best.is_better
    worse = Best(start, 3)
    worse.offer(10, start - np.append(gains[:4], np.flip(-gains[4:])), {})
    assert not worse.is_better


def test_a_loss_that_is_no_number_is_never_best() -> None:
    best = Best(START, patience=2)
    best.offer(10, np.full(4, np.nan), {})
    assert not best.is_better


def test_held_out_part_of_the_data_judges_and_evaluation_data_do_not(tmp_path: Path) -> None:
    model = load(build(TEXT), tmp_path)
    whole = dataset.load({"x": np.arange(120, dtype=np.float32).reshape(20, 6)}, model)
    assert whole is not None
    train, held = dataset.hold_out(whole, 0)
    assert split(train, held, 0) == (train, held)
    part, judged = split(train, whole, 0)
    assert (part.count, judged.count) == (13, 3)
    seen = {tuple(row) for row in part.feed(np.arange(13))["x"]}
    assert not seen & {tuple(row) for row in judged.feed(np.arange(3))["x"]}


def test_no_group_trains_and_judges(tmp_path: Path) -> None:
    model = load(build(TEXT), tmp_path)
    rows = np.arange(240, dtype=np.float32).reshape(40, 6)
    whole = dataset.load({"x": rows, "groups": np.repeat(np.arange(8), 5)}, model)
    assert whole is not None
    evaluation = dataset.load({"x": rows}, model)
    for samples, held in ((dataset.shuffle(whole, 0), evaluation), dataset.hold_out(whole, 0)):
        part, judged = split(samples, held, 0)
        assert part.groups is not None
        assert judged.groups is not None
        assert not set(part.groups) & set(judged.groups)
        assert (part.count, judged.count) == (30, 10)
