"""Numbers that misbehave: a result that holds, or a sentence that says why there is none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import objectives
import onnx
import pytest
from graphs import build
from network_texts import CNN as TEXT
from onnx import numpy_helper

from onnx_oamip import couple, prune
from onnx_oamip.cli import main
from onnx_oamip.core.errors import BudgetNotMet, DataError, SolverError
from onnx_oamip.core.records import (
    Coupling,
    Images,
    Model,
    Report,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.runtime import Session
from onnx_oamip.importance import magnitude
from onnx_oamip.importance.oamip.formulation import Formulation, formulate
from onnx_oamip.importance.oamip.region import Form
from onnx_oamip.importance.oamip.solve import optimise
from onnx_oamip.programs.solvers import SolverLimits


def go(
    tmp_path: Path, images: np.ndarray, proto: onnx.ModelProto | None = None, **values: Any
) -> Report:
    path = tmp_path / "model.onnx"
    path.write_bytes((proto or build(TEXT)).SerializeToString())
    settings = Settings.create(**{"macs": 0.6, "align": 1, "device": "cpu", "workers": 1, **values})
    arrays = {"image": images.astype(np.float32), "labels": np.arange(len(images)) % 5}
    return prune(path, arrays, tmp_path / "out.onnx", settings)


def scaled(**factors: float) -> onnx.ModelProto:
    proto = build(TEXT)
    for tensor in proto.graph.initializer:
        if tensor.name in factors:
            value = numpy_helper.to_array(tensor) * np.float32(factors[tensor.name])
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return proto


IMAGES = np.random.default_rng(0).normal(size=(60, 3, 8, 8))
SINGULAR = {
    "one image, again and again": np.repeat(IMAGES[:1], 60, axis=0),
    "all zeros": np.zeros_like(IMAGES),
    "one channel three times": np.repeat(IMAGES[:, :1], 3, axis=1),
    "one constant": np.full_like(IMAGES, 0.25),
}


@pytest.mark.parametrize("importance", ["obs", "oamip"])
@pytest.mark.parametrize("name", SINGULAR)
def test_singular_second_moments_are_handled(name: str, importance: str, tmp_path: Path) -> None:
    report = go(tmp_path, SINGULAR[name], importance=importance, mode="decoupled")
    assert report.after.macs <= 0.6 * report.before.macs
    for tensor in onnx.load(tmp_path / "out.onnx").graph.initializer:
        assert np.isfinite(numpy_helper.to_array(tensor)).all(), tensor.name
    assert report.scores is not None
    assert np.isfinite(report.scores.values).all()


@pytest.mark.parametrize("factor", [1e-12, 1e8])
def test_activations_of_huge_or_tiny_range_are_handled(factor: float, tmp_path: Path) -> None:
    """The second layer takes back what the first one scales: the network is the same, and so is what goes."""
    plain = go(tmp_path, IMAGES)
    other = go(tmp_path, IMAGES, scaled(w1=factor, b1=factor, w2=1 / factor))
    assert plain.verification.output_relative_error is not None
    assert other.verification.output_relative_error == pytest.approx(
        plain.verification.output_relative_error, rel=0.05
    )
    np.testing.assert_array_equal(plain.plan.keep, other.plan.keep)


def test_activations_that_overflow_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="NaN or infinite"):
        go(tmp_path, IMAGES, scaled(w1=1e30, w2=1e30))
    assert not (tmp_path / "out.onnx").exists()


def test_overflowing_squares_are_summed_in_double(tmp_path: Path) -> None:
    """Every activation is finite, but their squares are not in float32."""
    plain = go(tmp_path, IMAGES)
    other = go(tmp_path, IMAGES, scaled(w1=1e25, b1=1e25, w2=1e-25))
    np.testing.assert_array_equal(plain.plan.keep, other.plan.keep)


def test_bounds_beyond_solver_limits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SolverError, match=r"beyond what solvers resolve; use `mode=decoupled`"):
        go(
            tmp_path,
            IMAGES,
            scaled(w1=1e8, b1=1e8),
            importance="oamip",
            mode="joint",
            refit="none",
            time_limit=5.0,
        )
    assert not (tmp_path / "out.onnx").exists()


def test_unreachable_budget_error_names_the_parameters(tmp_path: Path) -> None:
    with pytest.raises(
        BudgetNotMet, match=r"`macs` budget cannot be met.*w1.*most MACs then are in"
    ):
        go(tmp_path, IMAGES, macs=0.001)
    with pytest.raises(BudgetNotMet, match="without `floor="):
        go(tmp_path, IMAGES, macs=0.3, floor=0.9)


# ------------------------------------------------------------------------------------------ through the command line

CLIPPED = """(float[batch, 6] x) => (float[batch, 5] scores)
<float[6, 24] w1, float[24, 20] w2, float[20] b2, float[20, 5] w3, float lo = {0}, float hi = {6}> {
    a = MatMul(x, w1)
    h = Relu(a)
    b = MatMul(h, w2)
    c = Add(b, b2)
    r = Clip(c, lo, hi)
    scores = MatMul(r, w3)
}"""
LOGARITHM = """(float[batch, 6] x) => (float[batch, 5] scores)
<float[6, 24] w1, float[24, 20] w2, float[20, 5] w3, float zero = {0}> {
    a = MatMul(x, w1)
    h = Relu(a)
    l = Log(h)
    m = Greater(h, zero)
    s = Where(m, l, zero)
    b = MatMul(s, w2)
    r = Relu(b)
    scores = MatMul(r, w3)
}"""
RULED_OUT = """(float[batch, 6] x) => (float[batch, 5] scores)
<float[6, 24] w1, float[24, 20] w2, float[20, 5] w3, float[5] mask> {
    a = MatMul(x, w1)
    h = Relu(a)
    b = MatMul(h, w2)
    r = Relu(b)
    c = MatMul(r, w3)
    d = Add(c, mask)
    scores = LogSoftmax<axis = -1>(d)
}"""
CAUSAL = """(float[batch, 7, 16] x) => (float[batch, 5] scores)
<float[16, 16] wq, float[16, 16] wk, float[16, 16] wv, float[16, 16] wo, float[16, 32] w1, float[32, 16] w2,
 float[16, 5] w3, float[7, 7] mask, float quarter = {0.25}> {
    q = MatMul(x, wq)
    k = MatMul(x, wk)
    v = MatMul(x, wv)
    t = Transpose<perm = [0, 2, 1]>(k)
    s = MatMul(q, t)
    z = Mul(s, quarter)
    m = Add(z, mask)
    p = Softmax<axis = -1>(m)
    c = MatMul(p, v)
    o = MatMul(c, wo)
    y = Add(o, x)
    h = MatMul(y, w1)
    r = Relu(h)
    e = MatMul(r, w2)
    u = Add(e, y)
    g = ReduceMean<axes = [1], keepdims = 0>(u)
    scores = MatMul(g, w3)
}"""
ROWS = np.random.default_rng(1).normal(size=(60, 6)).astype(np.float32)
TOKENS = np.random.default_rng(2).normal(size=(60, 7, 16)).astype(np.float32)
METHODS: dict[str, tuple[str, ...]] = {
    "default": (),
    "decoupled": ("--importance", "oamip", "--mode", "decoupled"),
    "nnrelief": ("--importance", "nnrelief"),
    "snacs": ("--importance", "snacs"),
    "limits": ("--limits", "snacs"),
    "bias": ("--refit", "bias", "--importance", "activation", "--allocate", "global"),
}


def changed(proto: onnx.ModelProto, **values: np.ndarray) -> onnx.ModelProto:
    for tensor in proto.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(
                numpy_helper.from_array(values[tensor.name].astype(np.float32), tensor.name)
            )
    return proto


def half(proto: onnx.ModelProto) -> onnx.ModelProto:
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
        )
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    return proto


@dataclass(frozen=True)
class PruneOutcome:
    code: int
    error: str
    target: Path
    document: dict[str, Any]


@pytest.fixture
def prune_outcome(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., PruneOutcome]:
    """``prune`` on the command line: the process status, the sentence, the document, which must be strict JSON."""

    def call(proto: onnx.ModelProto, arrays: dict[str, np.ndarray], *options: str) -> PruneOutcome:
        model, source, target = (
            tmp_path / "model.onnx",
            tmp_path / "data.npz",
            tmp_path / "out.onnx",
        )
        model.write_bytes(proto.SerializeToString())
        np.savez(source, **arrays)
        target.unlink(missing_ok=True)
        capfd.readouterr()
        budget = () if "--macs" in options else ("--macs", "0.6")
        given = (
            "--data",
            source,
            "--align",
            "1",
            "--device",
            "cpu",
            "--json",
            "--force",
            "-o",
            target,
        )
        code = main([str(a) for a in ("prune", model, *given, *budget, *options)])
        out, error = capfd.readouterr()

        def refuse(word: str) -> None:
            raise ValueError(f"{word} is not JSON")

        found = PruneOutcome(
            code, error, target, json.loads(out, parse_constant=refuse) if code == 0 else {}
        )
        assert code == 0 or not target.exists()
        assert "Traceback" not in error
        return found

    return call


def legitimate() -> dict[str, tuple[onnx.ModelProto, np.ndarray]]:
    """Networks with infinities that no unit's reader meets."""
    triangle = np.where(np.tril(np.ones((7, 7))) > 0, 0.0, -np.inf)
    ruled_out = np.asarray([0, 0, 0, -np.inf, 0])
    return {
        "a causal mask": (changed(build(CAUSAL), mask=triangle), TOKENS),
        "a causal mask in half precision": (
            half(changed(build(CAUSAL), mask=triangle)),
            TOKENS.astype(np.float16),
        ),
        "a class that is ruled out": (changed(build(RULED_OUT), mask=ruled_out), ROWS),
        "a logarithm of 0, masked": (build(LOGARITHM), ROWS),
    }


@pytest.mark.parametrize("method", ["default", "nnrelief", "snacs", "bias"])
@pytest.mark.parametrize("name", legitimate())
def test_infinities_without_consumer_are_harmless(
    name: str, method: str, prune_outcome: Callable[..., PruneOutcome]
) -> None:
    proto, x = legitimate()[name]
    found = prune_outcome(proto, {"x": x, "labels": np.arange(len(x)) % 3}, *METHODS[method])
    assert found.code == 0, found.error
    after = Session(found.target, "cpu").run({"x": x})[0].astype(np.float64)
    before = Session(proto, "cpu").run({"x": x})[0].astype(np.float64)
    np.testing.assert_array_equal(np.isfinite(after), np.isfinite(before))
    assert found.document["after"]["macs"] <= 0.6 * found.document["before"]["macs"]
    assert 0 < found.document["verification"]["output_relative_error"] < 1


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_overflow_names_the_tensor(
    method: str, prune_outcome: Callable[..., PruneOutcome]
) -> None:
    images = IMAGES.copy()
    images[[3, 50]] *= 4000
    proto = half(scaled(w1=20, w2=20))
    found = prune_outcome(
        proto, {"image": images.astype(np.float16), "labels": np.arange(60) % 5}, *METHODS[method]
    )
    assert found.code == 2
    assert re.search(
        r"NaN or infinite values in [12] of 48 calibration samples, first in sample (3|50) ",
        found.error,
    )
    assert "from Conv 'Conv_0' on (float16 ends at 6.55e+04)" in found.error
    assert (
        "leave those samples out, or prune the model in float32 and convert the result"
        in found.error
    )


@pytest.mark.parametrize("method", ["default", "decoupled", "nnrelief", "bias"])
@pytest.mark.parametrize("kind", ["half", "single"])
def test_rows_that_overflow_behind_a_clip_are_left_out_of_the_fit(
    kind: str, method: str, prune_outcome: Callable[..., PruneOutcome]
) -> None:
    """Inputs of units are finite, but a later layer overflows before it is clipped."""
    if kind == "half":
        proto, x = (
            half(changed(build(CLIPPED), w2=3e4 * weights(build(CLIPPED), "w2"))),
            ROWS.astype(np.float16),
        )
    else:
        proto, x = changed(build(CLIPPED), w2=2e38 * weights(build(CLIPPED), "w2")), ROWS
    found = prune_outcome(proto, {"x": x, "labels": np.arange(60) % 5}, *METHODS[method])
    assert found.code == 0, found.error
    for tensor in onnx.load(found.target).graph.initializer:
        assert np.isfinite(numpy_helper.to_array(tensor)).all(), tensor.name
    assert found.document["verification"]["output_relative_error"] < 1


@pytest.mark.parametrize("method", ["snacs", "limits"])
def test_overflowing_layers_are_named(
    method: str, prune_outcome: Callable[..., PruneOutcome]
) -> None:
    proto = half(changed(build(CLIPPED), w2=3e4 * weights(build(CLIPPED), "w2")))
    found = prune_outcome(
        proto, {"x": ROWS.astype(np.float16), "labels": np.arange(60) % 5}, *METHODS[method]
    )
    assert found.code == 2
    assert re.search(
        r"'c', which Clip .* reads, takes NaN or infinite values .*from MatMul .* on", found.error
    )


def test_nan_outputs_are_refused(prune_outcome: Callable[..., PruneOutcome]) -> None:
    proto = changed(build(CLIPPED), w3=np.full((20, 5), 3e38))
    found = prune_outcome(proto, {"x": ROWS, "labels": np.arange(60) % 5})
    assert found.code == 2
    assert (
        "the tensor 'scores' takes NaN or infinite values in 48 of 48 calibration samples"
        in found.error
    )


def test_infinite_mask_as_data_is_refused_with_the_replacement(
    prune_outcome: Callable[..., PruneOutcome],
) -> None:
    x = ROWS.copy()
    x[4, 2] = -np.inf
    found = prune_outcome(build(CLIPPED), {"x": x})
    assert found.code == 2
    assert (
        "first in sample 4; clean the data, and where -inf masks something, write the type's lowest"
        in found.error
    )


def weights(proto: onnx.ModelProto, name: str) -> np.ndarray:
    return next(numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == name)


# --------------------------------------------------------------------------------------------------- scales, properties


def channels(factor: float, back: bool = True) -> onnx.ModelProto:
    """The first channel ``factor`` times as large, taken back by what reads it."""
    proto = build(TEXT)
    values = {name: weights(proto, name).copy() for name in ("w1", "b1", "w2")}
    values["w1"][0] *= factor
    values["b1"][0] *= factor
    values["w2"][:, 0] /= factor if back else 1.0
    return changed(proto, **values)


def copies() -> onnx.ModelProto:
    proto = build(TEXT)
    values = {name: weights(proto, name).copy() for name in ("w1", "b1")}
    for value in values.values():
        value[1:6] = value[0]
    return changed(proto, **values)


ODD = {
    "activations of 1e30": (lambda: scaled(w1=1e30, b1=1e30, w2=1e-30), IMAGES),
    "activations of 1e-30": (lambda: scaled(w1=1e-30, b1=1e-30, w2=1e30), IMAGES),
    "a channel of 1e8": (lambda: channels(1e8), IMAGES),
    "a channel of zeros": (lambda: channels(0.0, back=False), IMAGES),
    "six channels alike": (copies, IMAGES),
    "one sample": (lambda: build(TEXT), IMAGES[:1]),
    "two samples": (lambda: build(TEXT), IMAGES[:2]),
}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("importance", ["obs", "activation"])
@pytest.mark.parametrize("name", ODD)
def test_refit_is_finite_and_reduces_the_error(name: str, importance: str, tmp_path: Path) -> None:
    """The same units go; with their repair the outputs are at least as close as without, on the samples given."""
    make, images = ODD[name]
    proto = make()
    wish = {"importance": importance, "mode": "decoupled", "allocate": "uniform"}
    errors = {}
    for refit in ("none", "least-squares"):
        report = fitted(tmp_path, images, proto, refit=refit, **wish)
        errors[refit] = report.verification.output_relative_error
        assert report.verification.masked_equivalence is not None
        assert report.verification.masked_equivalence <= 1e-4
        for tensor in onnx.load(tmp_path / "out.onnx").graph.initializer:
            assert np.isfinite(numpy_helper.to_array(tensor)).all(), tensor.name
    assert errors["least-squares"] <= 1.02 * errors["none"] + 1e-5


def fitted(tmp_path: Path, images: np.ndarray, proto: onnx.ModelProto, **values: Any) -> Report:
    """Pruned and measured on the calibration samples themselves."""
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    settings = Settings.create(**{"macs": 0.6, "align": 1, "device": "cpu", "workers": 1, **values})
    arrays = {"image": images.astype(np.float32)}
    return prune(path, arrays, tmp_path / "out.onnx", settings, eval_data=arrays)


@pytest.mark.parametrize("importance", ["obs", "activation", "oamip", "nnrelief", "snacs"])
def test_scaling_of_layers_does_not_change_the_choice(importance: str, tmp_path: Path) -> None:
    """The second layer takes back what the first one scales, by more than squares in float32 can hold."""
    wish = {"importance": importance, "mode": "decoupled", "refit": "none", "allocate": "uniform"}
    plain = go(tmp_path, IMAGES, **wish)
    for factor in (2.0**100, 2.0**-100):
        other = go(tmp_path, IMAGES, scaled(w1=factor, b1=factor, w2=1 / factor), **wish)
        np.testing.assert_array_equal(plain.plan.keep, other.plan.keep)


def test_norms_of_half_precision_weights_do_not_overflow() -> None:
    """Squares of 1e-4 are 0 in float16, and those of 300 are infinite."""
    weight = np.asarray([[1e-4, 2e-4], [300.0, 400.0]], np.float16)
    exact = np.square(weight.astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(magnitude.power_sums(weight, (1,), 2), exact, rtol=1e-6)
    wide = np.asarray([[1e30, 2e30], [0.0, 0.0]], np.float32)
    np.testing.assert_allclose(magnitude.power_sums(wide, (1,), 2), [5e60, 0.0], rtol=1e-6)


def test_joint_mode_without_a_correct_sample_is_refused(
    tmp_path: Path, prune_outcome: Callable[..., PruneOutcome]
) -> None:
    images = IMAGES[:4].astype(np.float32)
    wrong = (Session(build(TEXT), "cpu").run({"image": images})[0].argmax(1) + 1) % 5
    arrays = {"image": images, "labels": wrong}
    assert prune_outcome(build(TEXT), arrays, "--importance", "oamip").code == 0
    found = prune_outcome(build(TEXT), arrays, "--importance", "oamip", "--mode", "joint")
    assert found.code == 2
    assert (
        "no calibration sample is classified as its label says; use --mode decoupled" in found.error
    )


# ---------------------------------------------------------------------------------------------------- joint programs

TINY = """(float[batch, 3] x) => (float[batch, 3] y)
<float[3, 4] w1, float[4] b1, float[4, 3] w2, float[3] b2, float[3, 3] w3> {
    a = Gemm(x, w1, b1)
    h = Relu(a)
    b = Gemm(h, w2, b2)
    r = Relu(b)
    y = MatMul(r, w3)
}"""


def tiny(factor: float) -> onnx.ModelProto:
    proto = build(TINY, seed=3)
    w1, b1, w2, w3 = (weights(proto, n) for n in ("w1", "b1", "w2", "w3"))
    return changed(proto, w1=factor * w1, b1=factor * b1, w2=w2 / factor, w3=3 * w3)


@pytest.mark.parametrize("solver", ["highs", "gurobi"])
@pytest.mark.parametrize("factor", [1.0, 1e6, 1e-6, 1e9])
def test_joint_program_equals_enumeration_of_subsets(
    factor: float, solver: str, tmp_path: Path
) -> None:
    """Big-Ms of 1e9, and of 1e-6 as solvers' tolerances are: the optimum is the one that enumeration finds."""
    path = tmp_path / "tiny.onnx"
    path.write_bytes(tiny(factor).SerializeToString())
    model = models.load(path)
    x = np.random.default_rng(5).normal(size=(40, 3)).astype(np.float32)
    samples = dataset.load({"x": x}, model)
    assert samples is not None
    model = models.rebind(model, samples.bindings(model))
    coupling = couple(model)
    held = objectives.class_samples(model, samples, 1, 0)
    formulation = formulate(model, coupling, held, Form("exact", 5.0))
    outcome = optimise(formulation, SolverLimits(time_s=20, gap=1e-6), solver)
    every = np.asarray(list(product((0.0, 1.0), repeat=len(formulation.units))))
    values = np.asarray([objective(model, coupling, held, formulation, keep) for keep in every])
    assert outcome.record["status"] == "optimal"
    assert outcome.objective == pytest.approx(values.min(), rel=1e-5, abs=1e-6)
    best = objective(model, coupling, held, formulation, np.round(outcome.keep))
    assert best == pytest.approx(values.min(), rel=1e-5, abs=1e-6)
    assert outcome.bound <= values.min() + 1e-5


def objective(
    model: Model, coupling: Coupling, held: Images, formulation: Formulation, keep: np.ndarray
) -> float:
    """The published objective of one subset, from the weights: weighted cross-entropy plus sparsity."""
    w1, b1, w2, b2, w3 = (
        model.constants[n].astype(np.float64) for n in ("w1", "b1", "w2", "b2", "w3")
    )
    kept = np.ones(coupling.n_units)
    kept[formulation.units] = keep
    x = np.concatenate([feed["x"] for feed in held.feeds]).astype(np.float64)
    h = np.maximum(x @ w1 + b1, 0) * kept[coupling.axes["h", 1]]
    r = np.maximum(h @ w2 + b2, 0) * kept[coupling.axes["r", 1]]
    y = r @ w3
    label = held.labels.reshape(-1)
    loss = (
        np.log(np.exp(y - y.max(1, keepdims=True)).sum(1)) + y.max(1) - y[np.arange(len(y)), label]
    )
    return 5.0 * float(loss.mean()) + formulation.sparsity.value(keep)


# ------------------------------------------------------------------------------------------------ budgets out of reach


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ("--macs", "0.3", "--floor", "0.9"),
            r"least that can be met is --macs 0\.8\d+; .* without --floor 0\.9\.",
        ),
        (
            ("--macs", "0.05", "--align", "8"),
            r"least .* --macs 0\.3\d+; .* without --align 8, that is with --align 1",
        ),
        (("--macs", "0.2", "--exclude", "w1"), r"--exclude 'w1' keeps channels that could go"),
        (("--macs", "0.3", "--protect", "0.8"), r"it can be met without --protect 0\.8\."),
        (("--macs", "0.001"), r"the least that can be met is --macs 0\.0\d+; ask for more"),
    ],
)
def test_unreachable_budget_error_names_the_binding_options(
    options: tuple[str, ...], says: str, prune_outcome: Callable[..., PruneOutcome]
) -> None:
    arrays = {"image": IMAGES.astype(np.float32)}
    found = prune_outcome(build(TEXT), arrays, *options)
    assert found.code == 1
    assert re.search(says, found.error), found.error


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_least_budget_named_in_the_error_can_be_met(
    floor: float, prune_outcome: Callable[..., PruneOutcome]
) -> None:
    arrays = {"image": IMAGES.astype(np.float32)}
    options = (
        "--floor",
        str(floor),
        "--allocate",
        "uniform",
        "--importance",
        "l2",
        "--refit",
        "none",
    )
    failed = prune_outcome(build(TEXT), arrays, "--macs", "0.001", *options)
    least = re.search(r"least that can be met is --macs (0\.\d+)", failed.error)
    assert least is not None
    assert prune_outcome(build(TEXT), arrays, "--macs", least[1], *options).code == 0
    below = f"{float(least[1]) - 2e-4:.4f}"
    assert prune_outcome(build(TEXT), arrays, "--macs", below, *options).code == 1
