"""The importance method oamip: modes, choice of images, requests to solvers, notes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import objectives
import pytest
from conftest import MODELS
from graphs import CNN, MLP, build, load
from graphs import samples as random_samples

from onnx_oamip.api import pipeline
from onnx_oamip.core.errors import SettingsError, SolverError
from onnx_oamip.core.records import (
    Array,
    Coupling,
    Images,
    Model,
    Scores,
    Statistics,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.importance import find, names
from onnx_oamip.importance.oamip import select, solve
from onnx_oamip.programs import Program
from onnx_oamip.programs.solvers import CutSolution, Limit, Solution, Termination
from onnx_oamip.statistics import calibration, class_samples
from onnx_oamip.statistics.requests import CLASS_SAMPLES, COVARIANCE

SEED = 3
"""Random weights by which the networks here see all of their classes."""
SIGMOID = """(float[N,6] x) => (float[N,3] y) <float[6,8] w1, float[8,7] w2, float[7,5] w3, float[5,3] w4> {
    a = Gemm(x, w1) h = Relu(a) b = Gemm(h, w2) r = Sigmoid(b) c = Gemm(r, w3) t = Relu(c) y = Gemm(t, w4)
}"""
NO_HEAD = """(float[N,6] x) => (float[N,2,2] y) <float[6,8] w1, float[8,4] w2, int64[3] to = {0,2,2}> {
    a = Gemm(x, w1) h = Relu(a) b = Gemm(h, w2) y = Reshape(b, to)
}"""
NO_FORM = """(float[N,6] x) => (float[N,3] y) <float[6,8] w1, float[8,3] w2> {
    a = Gemm(x, w1) h = Relu(a) b = Gemm(h, w2) y = Tanh(b)
}"""


def _settings(**values: Any) -> Settings:
    return Settings.create(
        **{"macs": 0.5, "importance": "oamip", "solver": "highs", "time_limit": 20, **values}
    )


def _statistics(moments: Statistics, few: Images | None) -> Statistics:
    """Statistics of a program over the network; there is no covariance for the layer-wise program."""
    answers = {**moments.answers, COVARIANCE: {}, CLASS_SAMPLES: few}
    return Statistics(answers, moments.samples, "cpu")


def _ready(
    text: str, folder: Path, per_class: int = 1, count: int = 60, task: str | None = None
) -> tuple[Model, Coupling, Statistics]:
    model = load(build(text, seed=SEED), folder)
    samples = dataset.load(random_samples(model, count), model)
    assert samples is not None
    coupling = couple(model)
    moments = calibration.collect(model, coupling, samples, "cpu")
    objective = objectives.of_samples(model, samples, task)
    few = class_samples.collect(model, objective, samples, "cpu", per_class=per_class, seed=0)
    return model, coupling, _statistics(moments, few)


def _score(text: str, folder: Path, task: str | None = None, **values: Any) -> Scores:
    return select.score(*_ready(text, folder, task=task), _settings(**values))


# ----------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("mode", ["joint", "per-class"])
@pytest.mark.parametrize("formulation", ["paper", "exact"])
@pytest.mark.parametrize("text", [MLP, CNN], ids=["mlp", "cnn"])
def test_scores_and_records_are_consistent(
    tmp_path: Path, text: str, formulation: str, mode: str
) -> None:
    found = _score(text, tmp_path, mode=mode, formulation=formulation, time_limit=1)
    assert found.method == "oamip"
    assert ((found.values >= 0) & (found.values <= 1)).all()
    # Equal keep variables are told apart.
    assert len(np.unique(found.values)) == len(found.values)
    classes = [c for p in found.programs for c in p["classes"]]
    assert len(classes) == len(set(classes))
    assert len(found.programs) == (1 if mode == "joint" else len(classes))
    for program in found.programs:
        assert program["purpose"] == "importance"
        assert program["solver"] == "highs"
        assert program["status"] in ("optimal", "feasible")
        assert program["gap"] <= 0.01 or program["status"] == "feasible"
        assert program["images"] == len(program["classes"])
        assert {"seconds", "variables", "rows", "bound", "objective"} <= set(program)


def test_scores_are_reproducible(tmp_path: Path) -> None:
    first, second = (_score(MLP, tmp_path, mode="joint") for _ in range(2))
    np.testing.assert_array_equal(first.values, second.values)


def test_per_class_is_the_mean_of_programs_of_one_class(tmp_path: Path) -> None:
    model, coupling, statistics = _ready(MLP, tmp_path)
    settings = _settings(mode="per-class")
    found = select.score(model, coupling, statistics, settings)
    assert statistics[CLASS_SAMPLES] is not None
    parts = select.by_class(statistics[CLASS_SAMPLES])
    keeps = [select.program(model, coupling, part, settings)[1].keep for part in parts]
    np.testing.assert_allclose(found.values, np.mean(keeps, axis=0), atol=2e-6)


def test_heavier_loss_weight_keeps_more_units(tmp_path: Path) -> None:
    light, heavy = (
        _score(MLP, tmp_path, mode="joint", loss_weight=w).values.sum() for w in (0.05, 50.0)
    )
    assert light < heavy


def test_units_are_removed_by_the_guess_if_the_relaxation_takes_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any solution of a program, evaluations of the network still improve on keeping all units."""
    model, coupling, statistics = _ready(MLP, tmp_path)
    images = statistics[CLASS_SAMPLES]
    assert images is not None
    nothing = Solution(Termination.NO_SOLUTION, Limit.TIME, None, None, None, None, 1.0, "highs")

    def out_of_time(program: Program, *_: object, **__: object) -> CutSolution:
        return CutSolution(nothing, program, rounds=1, cuts=0, closed=False)

    monkeypatch.setattr(solve, "solve_with_cuts", out_of_time)
    found = []
    for guess in (None, np.arange(coupling.n_units) / coupling.n_units):
        _, outcome = select.program(model, coupling, images, _settings(loss_weight=0.5), guess)
        found.append(outcome)
    all_kept, improved = found
    assert (all_kept.keep == 1).all()
    assert improved.objective < all_kept.objective
    removed = np.flatnonzero(improved.keep == 0)
    assert len(removed)
    assert removed[0] == 0  # the unit of lowest guess is among them


def test_budget_is_met_and_used(tmp_path: Path) -> None:
    model, coupling, statistics = _ready(MLP, tmp_path)
    found = select.score(model, coupling, statistics, _settings(mode="joint", score_budget=0.5))
    cost = select.unit_costs(model, coupling)
    kept = cost @ np.round(found.values)
    assert 0.3 * cost.sum() < kept <= 0.5 * cost.sum()


def test_unit_costs_are_multiply_accumulates(tmp_path: Path) -> None:
    model = load(build(MLP, seed=SEED), tmp_path)
    coupling = couple(model)
    # A unit of the first layer meets 6 inputs and 10 outputs, one of the second 12 and 4.
    first = coupling.axes["h", 1]
    assert (select.unit_costs(model, coupling)[first] == 16).all()
    assert (select.unit_costs(model, coupling)[coupling.axes["r", 1]] == 16).all()


# ------------------------------------------------------------------------------------------------------------ modes


def _rest(record: list[str]) -> Any:
    def score(
        model: Model, coupling: Coupling, statistics: Statistics, settings: Settings
    ) -> Scores:
        record.append("asked")
        return Scores(
            "decoupled",
            np.full(coupling.n_units, 0.25),
            ({"purpose": "importance"},),
            ("by layers",),
        )

    return score


def test_units_before_operators_without_a_form_are_scored_decoupled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(select.decoupled, "score", _rest(asked))
    model, coupling, statistics = _ready(SIGMOID, tmp_path)
    found = select.score(model, coupling, statistics, _settings(mode="joint"))
    assert asked == ["asked"]
    front = coupling.axes["h", 1]
    assert (found.values[front] == 0.25).all()
    assert (found.values[np.setdiff1d(np.arange(coupling.n_units), front)] != 0.25).all()
    assert any(
        "8 units are scored by the decoupled program: Sigmoid" in note for note in found.notes
    )
    assert "by layers" in found.notes
    assert len(found.programs) == 2


def test_auto_mode_is_joint_for_small_programs(tmp_path: Path) -> None:
    found = _score(MLP, tmp_path, mode="auto")
    assert "mode joint, since" in found.notes[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (MLP, "are more than 0"),
        (NO_HEAD, "no output of shape"),
        (NO_FORM, "Tanh 'Tanh_3' has no form"),
    ],
    ids=["large", "no-head", "no-form"],
)
def test_auto_mode_is_decoupled_if_joint_is_impossible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    monkeypatch.setattr(select.decoupled, "score", _rest([]))
    monkeypatch.setattr(select, "MAX_AUTO_EXTENT", {"exact": 0, "paper": 0})
    task = "classes" if text == NO_FORM else None
    found = _score(text, tmp_path, task, mode="auto")
    assert (found.values == 0.25).all()
    assert "mode decoupled, since" in found.notes[0]
    assert reason in found.notes[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (NO_HEAD, "needs a classifier"),
        (NO_FORM, r"Tanh 'Tanh_3' has no form.*`mode=decoupled`"),
    ],
    ids=["no-head", "no-form"],
)
def test_joint_mode_is_refused_if_impossible(tmp_path: Path, text: str, reason: str) -> None:
    task = "classes" if text == NO_FORM else None
    with pytest.raises(SettingsError, match=reason):
        _score(text, tmp_path, task, mode="joint")


def test_joint_program_over_the_size_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "MAX_EXTENT", 10)
    with pytest.raises(
        SettingsError, match="activations behind a gate, more than 10; use `mode=decoupled`"
    ):
        _score(MLP, tmp_path, mode="joint")


def test_budget_is_refused_with_the_published_form(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="`score_budget` needs `formulation=exact`"):
        _score(MLP, tmp_path, mode="joint", formulation="paper", score_budget=0.5)


def test_bounds_beyond_arithmetic_are_refused(tmp_path: Path) -> None:
    text = MLP.replace("b = Gemm(h, w2, b2)", "g = Mul(h, much) b = Gemm(g, w2, b2)")
    text = text.replace("float[4] b3>", "float[4] b3, float much = {1e8}>")
    with pytest.raises(SolverError, match="beyond what solvers resolve; use `mode=decoupled`"):
        _score(text, tmp_path, mode="joint")


def test_auto_mode_falls_back_to_decoupled_if_the_joint_solve_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select.decoupled, "score", _rest([]))
    text = MLP.replace("b = Gemm(h, w2, b2)", "g = Mul(h, much) b = Gemm(g, w2, b2)")
    text = text.replace("float[4] b3>", "float[4] b3, float much = {1e8}>")
    found = _score(text, tmp_path, mode="auto")
    assert (found.values == 0.25).all()
    assert (
        "mode decoupled, since the joint program failed: bounds of the importance program"
        in found.notes[0]
    )


@pytest.mark.parametrize("solver", ["gurobi", "auto"])
def test_program_over_the_restricted_licence_is_handled(tmp_path: Path, solver: str) -> None:
    from onnx_oamip.programs.solvers import gurobi

    if gurobi.licence().variables is None:
        pytest.skip("Gurobi has no size-limited licence here")
    text = (
        MLP.replace("12", "1500")
        .replace("10]", "600]")
        .replace("[10,", "[600,")
        .replace("1500,10", "1500,600")
    )
    if solver == "gurobi":
        with pytest.raises(
            SolverError, match=r"over the gurobi licence found here.*`solver=highs`"
        ):
            _score(text, tmp_path, mode="joint", formulation="paper", solver=solver)
        return
    found = _score(
        text, tmp_path, mode="joint", formulation="paper", solver=solver, relax=True, time_limit=2
    )
    assert found.programs[0]["solver"] == "highs"
    assert any("solving with highs" in note and "licence" in note for note in found.notes)


# ----------------------------------------------------------------------------------------------------------- images


def _samples(model: Model, arrays: Mapping[str, Array]) -> Samples:
    found = dataset.load(arrays, model)
    assert found is not None
    return found


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("per_class", [1, 3])
def test_selected_images_are_correct_with_low_confidence(
    tmp_path: Path, per_class: int, labelled: bool
) -> None:
    model = load(build(MLP, seed=SEED), tmp_path)
    arrays = dict(random_samples(model, 80))
    logits = Session(model.proto, "cpu").run(arrays)[0].astype(np.float64)
    share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    truth = logits.argmax(axis=1)
    if labelled:
        truth = np.random.default_rng(0).integers(0, 4, 80)
        arrays["labels"] = truth
    found = objectives.class_samples(model, _samples(model, arrays), per_class, 0)
    for label in range(4):
        right = np.flatnonzero((truth == label) & (logits.argmax(axis=1) == label))
        unsure = right[np.argsort(share[right, label])][:per_class]
        chosen = [
            f["x"][0] for f, row in zip(found.feeds, found.labels, strict=True) if row[0] == label
        ]
        assert {a.tobytes() for a in chosen} == {arrays["x"][i].tobytes() for i in unsure}
    np.testing.assert_allclose(found.activations["y"][:, 0].argmax(axis=1), found.labels[:, 0])


def test_class_without_a_correct_sample_is_noted(tmp_path: Path) -> None:
    model = load(build(MLP, seed=SEED), tmp_path)
    arrays = dict(random_samples(model, 40))
    arrays["labels"] = Session(model.proto, "cpu").run(arrays)[0].argmax(axis=1)
    arrays["labels"][arrays["labels"] == 2] = 1
    found = objectives.class_samples(model, _samples(model, arrays), 1, 0)
    assert 2 not in found.labels
    assert found.notes == ("1 of 4 classes have no correct sample",)


def test_logits_are_the_input_of_the_last_softmax(tmp_path: Path) -> None:
    text = MLP.replace("y = Gemm(r, w3, b3)", "o = Gemm(r, w3, b3) y = Softmax(o)")
    model, coupling, statistics = _ready(text, tmp_path)
    assert statistics[CLASS_SAMPLES] is not None
    assert statistics[CLASS_SAMPLES].logits == "o"
    found = select.score(model, coupling, statistics, _settings(mode="joint", formulation="paper"))
    plain = _score(MLP, tmp_path, mode="joint", formulation="paper")
    np.testing.assert_allclose(found.values, plain.values, atol=1e-5)


def test_fixed_batch_is_supported(tmp_path: Path) -> None:
    """Feeds take three images each; those that only fill the last one do not count."""
    fixed, free = MLP.replace("float[N,", "float[3,"), MLP
    model = load(build(fixed, seed=SEED), tmp_path)
    arrays = random_samples(load(build(free, seed=SEED), tmp_path), 60)
    found = objectives.class_samples(model, _samples(model, arrays), 1, 0)
    assert found.labels.shape == (2, 3)
    assert sorted(found.labels[found.labels >= 0].tolist()) == [0, 1, 2, 3]
    coupling = couple(model)
    moments = calibration.collect(model, coupling, _samples(model, arrays), "cpu")
    statistics = _statistics(moments, found)
    scores = select.score(model, coupling, statistics, _settings(mode="joint", formulation="paper"))
    plain = _score(MLP, tmp_path, mode="joint", formulation="paper")
    np.testing.assert_allclose(scores.values, plain.values, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- pipeline


def test_prune_with_oamip_importance(tmp_path: Path) -> None:
    model, arrays = MODELS / "lenet300-mnist.onnx", MODELS / "mnist.npz"
    settings = _settings(
        mode="joint", formulation="paper", allocate="uniform", refit="none", align=1, device="cpu"
    )
    report = pipeline.prune(model, str(arrays), None, settings)
    assert report.scores.method == "oamip"
    assert report.scores.programs[0]["gap"] <= 0.01
    assert report.verification.accuracy_after is not None
    assert report.verification.accuracy_after > 0.5


@pytest.mark.parametrize("mode", ["auto", "joint", "per-class", "decoupled"])
def test_programs_over_the_network_request_samples_of_every_class(mode: str) -> None:
    requesting = [
        name for name in names() if CLASS_SAMPLES in find(name).requests(_settings(mode=mode))
    ]
    assert requesting == ([] if mode == "decoupled" else ["oamip"])
