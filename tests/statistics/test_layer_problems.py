"""Problems of wide consumers: groups solved side by side, and arrays at a time, within a target for memory."""

from __future__ import annotations

import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import MLP, build, load, samples

from onnx_oamip.api.prepare import prepare
from onnx_oamip.core.records import Consumer, Coupling, Gram, Model
from onnx_oamip.core.settings import Settings
from onnx_oamip.executors import Threads
from onnx_oamip.graph.coupling import couple
from onnx_oamip.importance import obs
from onnx_oamip.statistics import layer_problems
from onnx_oamip.statistics.layer_problems import (
    HELD,
    PASSING,
    Problem,
    compensate,
    parallel_groups,
)


def _gram(size: int) -> Gram:
    return Gram(
        matrix=np.eye(size)[None],
        mean=np.zeros((1, size)),
        columns=np.arange(size)[:, None],
        rows=100,
        taps=1,
    )


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Model, Coupling, list[str]]:
    """A model of which only problems take memory, and its linear nodes behind the first."""
    monkeypatch.setattr(layer_problems, "LIBRARY_BYTES", 0)
    monkeypatch.setattr(layer_problems, "MODEL_COPIES", 0)
    model = load(build(MLP), tmp_path)
    return model, couple(model), [n.name for n in model.nodes if n.op in ("Gemm", "MatMul")][1:]


Case = tuple[Model, Coupling, list[str]]


def test_groups_side_by_side_take_half_of_the_memory(case: Case) -> None:
    model, coupling, nodes = case
    grams = {nodes[0]: _gram(100), **{name: _gram(10) for name in nodes[1:]}}
    group = (HELD + PASSING) * 8 * 100**2
    assert parallel_groups(7, model, coupling, grams, None) == 7
    assert parallel_groups(None, model, coupling, grams, None) is None
    assert parallel_groups(7, model, coupling, grams, 2 * 3 * group) == 3
    assert parallel_groups(7, model, coupling, grams, 2 * 3 * group - 1) == 2
    assert parallel_groups(2, model, coupling, grams, 2 * 3 * group) == 2
    assert parallel_groups(7, model, coupling, grams, group) == 1
    assert parallel_groups(None, model, coupling, grams, 2 * 10**4 * group) == os.cpu_count()
    assert parallel_groups(7, model, coupling, {}, 1) == 1


def test_weights_count_where_they_are_larger_than_covariances(case: Case) -> None:
    model, coupling, nodes = case
    weights = {
        node.name: model.constants[node.inputs[1]].size
        for node in model.nodes
        if node.name in nodes
    }
    weight = (HELD + PASSING) * 8 * max(weights.values())
    grams = {name: _gram(1) for name in weights}
    assert parallel_groups(7, model, coupling, grams, 2 * 3 * weight) == 3
    assert parallel_groups(7, model, coupling, grams, 2 * 3 * weight - 1) == 2


def test_all_consumers_of_a_group_count_and_shared_covariances_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_problems, "LIBRARY_BYTES", 0)
    monkeypatch.setattr(layer_problems, "MODEL_COPIES", 0)
    text = """(float[N,4] x) => (float[] y, float[] z) <float[4,6] w, float[6,2] v, float[6,2] u>
        { h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) z = MatMul(r, u) }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    first, second = (node.name for node in model.nodes[2:])
    one, other = 8 * 100**2, 8 * 50**2
    group = HELD * (one + other) + PASSING * one
    grams = {first: _gram(100), second: _gram(50)}
    assert parallel_groups(7, model, coupling, grams, 2 * 3 * group) == 3
    assert parallel_groups(7, model, coupling, grams, 2 * 3 * group - 1) == 2
    shared = _gram(100)
    grams = {first: shared, second: shared}
    assert parallel_groups(7, model, coupling, grams, 2 * 3 * (HELD + PASSING) * one) == 3


def test_groups_get_what_libraries_and_the_model_leave(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, coupling, nodes = case
    grams = {nodes[0]: _gram(100)}
    group = (HELD + PASSING) * 8 * 100**2
    constants = sum(value.nbytes for value in model.constants.values())
    monkeypatch.setattr(layer_problems, "LIBRARY_BYTES", 10 * group)
    monkeypatch.setattr(layer_problems, "MODEL_COPIES", 5)
    taken = 10 * group + 5 * constants
    assert parallel_groups(7, model, coupling, grams, taken + 3 * group) == 3
    assert parallel_groups(7, model, coupling, grams, taken + 3 * group - 1) == 2
    assert parallel_groups(7, model, coupling, grams, taken // 2) == 1


def test_scores_and_losses_keep_to_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []

    def record(workers: int | None, *_: object) -> Threads:
        asked.append(workers)
        return Threads(1)

    monkeypatch.setattr(obs, "executor", record)
    monkeypatch.setattr("onnx_oamip.planning.sensitivity.executor", record)
    monkeypatch.setattr(layer_problems, "HELD", 10**9)
    model = load(build(MLP), tmp_path)
    settings = Settings.create(
        macs=0.5, align=1, device="cpu", workers=4, max_memory="1GB", refit="bias"
    )
    assert prepare(model.path, samples(model, 40), settings).ladder
    assert len(asked) == 2
    assert set(asked) == {1}


def _wide_problem(size: int, rows: int | None) -> Problem:
    """One consumer of `size` single-column units and as many outputs, with a factor of `rows` rows or a covariance."""
    rng = np.random.default_rng(0)
    columns = np.arange(size)[:, None]
    consumer = Consumer("node", 0, "x", 1, "w", 0)
    factor = None if rows is None else rng.standard_normal((rows, size))
    return Problem(
        consumer=consumer,
        block=0,
        weight=rng.standard_normal((size, size)),
        gram=np.diag(rng.uniform(1, 2, size)) if rows is None else None,
        mean=rng.standard_normal(size),
        columns=columns,
        spread=columns,
        scale=1.0,
        ridge=1.0,
        factor=factor,
        uses=("node",),
    )


def test_repaired_weights_take_three_arrays_of_their_size_at_a_time() -> None:
    """Beside the weight of the problem, which stays as it is."""
    problem = _wide_problem(400, rows=10)
    size = problem.weight.nbytes
    before = problem.weight.copy()
    tracemalloc.start()
    weight, shift = problem.unfold(*compensate(problem, np.arange(20)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * size
    assert np.array_equal(problem.weight, before)
    assert not weight[:, :20].any()
    assert np.allclose(shift, (before - weight) @ problem.mean)


def test_row_and_column_forms_repair_alike() -> None:
    wide = _wide_problem(30, rows=12)
    assert wide.factor is not None
    square = replace(wide, factor=None, gram=wide.factor.T @ wide.factor + np.eye(30))
    removed = np.asarray([3, 7, 8, 20])
    found, expected = (compensate(problem, removed) for problem in (wide, square))
    kept = np.setdiff1d(np.arange(30), removed)
    gram = square.gram
    assert gram is not None
    exact = wide.weight @ gram[:, kept] @ np.linalg.inv(gram[np.ix_(kept, kept)])
    for weight, shift in (found, expected):
        assert np.allclose(weight[:, kept], exact)
        assert not weight[:, removed].any()
        assert np.allclose(shift, (wide.weight - weight) @ wide.mean)
