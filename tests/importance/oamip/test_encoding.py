"""Encode rules: every operator that has one, as expressions and as a program, against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import build, feed, load, random_keep
from hypothesis import given, settings
from random_networks import Network, networks

from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.records import (
    Bools,
    Coupling,
    Floats,
    Images,
    Model,
)
from onnx_oamip.graph import outputs
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.ops import REGISTRY
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.importance.oamip.formulation import Formulation, formulate
from onnx_oamip.importance.oamip.region import Form
from onnx_oamip.programs import solvers
from onnx_oamip.programs.solvers import SolverLimits, Termination

# From c (float[N,4,5,5], behind two convolutions with a gate between them) to z, with the constants that this takes.
NODES = {
    "relu": ("z = Relu(c)", ""),
    "leaky": ("z = LeakyRelu<alpha = 0.2>(c)", ""),
    "prelu": ("z = PRelu(c, p)", "float[4,1,1] p"),
    "clip": ("z = Clip(c, low, high)", "float low = {-0.2}, float high = {0.3}"),
    "clip-below": ("z = Clip(c, low)", "float low = {0.1}"),
    "neg": ("z = Neg(c)", ""),
    "add": ("z = Add(c, p)", "float[4,1,1] p"),
    "add-two": ("d = Relu(c) z = Add(d, c)", ""),
    "sub": ("z = Sub(p, c)", "float[1,4,5,5] p"),
    "sum": ("z = Sum(c, p, c)", "float[5] p"),
    "mul": ("z = Mul(p, c)", "float[4,1,1] p"),
    "div": ("z = Div(c, gain)", "float[4,1,1] gain"),
    "identity": ("z = Identity(c)", ""),
    "dropout": ("z = Dropout(c)", ""),
    "cast": ("z = Cast<to = 11>(c)", ""),
    "batch-norm": (
        "z = BatchNormalization<epsilon = 0.1>(c, gain, b, m, var)",
        "float[4] gain, float[4] b, float[4] m, float[4] var",
    ),
    "conv": (
        "z = Conv<strides = [2, 1], pads = [1, 0, 2, 1], dilations = [1, 2]>(c, k, b)",
        "float[3,4,3,2] k, float[3] b",
    ),
    "conv-grouped": (
        'z = Conv<group = 2, auto_pad = "SAME_UPPER", strides = [2, 2]>(c, k)',
        "float[6,2,3,3] k",
    ),
    "conv-depthwise": ('z = Conv<group = 4, auto_pad = "SAME_LOWER">(c, k)', "float[4,1,2,2] k"),
    "max-pool": ("z = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(c)", ""),
    "max-pool-overlap": (
        "z = MaxPool<kernel_shape = [3, 2], pads = [1, 0, 1, 1], strides = [2, 1], dilations = [1, 2]>(c)",
        "",
    ),
    "max-pool-ceil": (
        "r = Relu(c) z = MaxPool<kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1>(r)",
        "",
    ),
    "average-pool": (
        "z = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]>(c)",
        "",
    ),
    "average-pool-padding": (
        "z = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 0, 1], count_include_pad = 1>(c)",
        "",
    ),
    "average-pool-same": (
        'z = AveragePool<kernel_shape = [2, 2], auto_pad = "SAME_UPPER", count_include_pad = 1>(c)',
        "",
    ),
    "global-average-pool": ("z = GlobalAveragePool(c)", ""),
    "global-max-pool": ("z = GlobalMaxPool(c)", ""),
    "reduce-mean": ("z = ReduceMean<axes = [2, 3], keepdims = 0>(c)", ""),
    "reduce-sum": ("z = ReduceSum<keepdims = 1>(c, axes)", "int64[1] axes = {-1}"),
    "transpose": ("z = Transpose<perm = [0, 3, 1, 2]>(c)", ""),
    "concat": ("d = Relu(c) e = Concat<axis = 1>(d, c, d) z = Identity(e)", ""),
    "reshape": ("z = Reshape(c, to)", "int64[3] to = {0, 10, -1}"),
    "flatten": ("z = Flatten<axis = 2>(c)", ""),
    "unsqueeze": ("z = Unsqueeze(c, axes)", "int64[1] axes = {1}"),
    "squeeze": ("d = GlobalAveragePool(c) z = Squeeze(d, axes)", "int64[2] axes = {2, 3}"),
    "matmul": ("z = MatMul(c, k)", "float[5,3] k"),
    "matmul-left": ("z = MatMul(k, c)", "float[2,5] k"),
    "matmul-vector": ("z = MatMul(c, k)", "float[5] k"),
    "gemm": (
        "d = Flatten(c) z = Gemm<alpha = 0.5, beta = 2.0, transB = 1>(d, k, b)",
        "float[3,100] k, float[3] b",
    ),
    "gemm-transposed": (
        "d = Flatten(c) e = Transpose(d) z = Gemm<transA = 1>(e, k)",
        "float[100,3] k",
    ),
    "gemm-left": (
        "d = Flatten(c) e = Transpose(d) g = Gemm<transA = 1>(k, e) z = Transpose(g)",
        "float[100,3] k",
    ),
}
IMAGES = 2


def _make(name: str, folder: Path) -> Model:
    nodes, constants = NODES[name]
    extra = f", {constants}" if constants else ""
    text = f"""(float[N,2,6,6] x) => (float[] y)
    <float[5,2,3,3] w1, float[5] b1, float[4,5,2,2] w2, float[4] b2{extra}> {{
        a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
        h = Relu(a)
        c = Conv(h, w2, b2)
        {nodes}
        y = Flatten(z)
    }}"""
    text = (
        text.replace("y = Flatten(z)", "v = Cast<to = 1>(z) y = Flatten(v)")
        if name == "cast"
        else text
    )
    return load(build(text), folder)


def images_of(model: Model, count: int = IMAGES, seed: int = 0) -> Images:
    """Random images with all their activations; the first floating output stands for logits, class 0 everywhere."""
    names = outputs.float_activations(model)
    feeds = tuple(feed(model, seed + i) for i in range(count))
    session = Session(outputs.with_outputs(model, names), "cpu")
    runs = [session.run(f, names) for f in feeds]
    held = {n: np.stack([run[i] for run in runs]) for i, n in enumerate(names)}
    held |= {p.name: np.stack([f[p.name] for f in feeds]) for p in model.inputs}
    return Images(feeds, np.zeros((count, 1), np.int64), model.outputs[0].name, held)


def outputs_of(model: Model, coupling: Coupling, images: Images, units: Bools) -> Floats:
    """The masked network's logits, by ONNX Runtime.

    The same tensors are outputs as in :func:`images_of`. ONNX Runtime fuses nodes where nothing else reads what is
    between them, and a fused kernel rounds another way: where a network quantises, a value on the edge of a step would
    fall to the other side than it did in the activations that the program is made of.
    """
    masked = rewrite.mask(model, coupling, units)
    session = Session(outputs.with_outputs(model, outputs.float_activations(model), masked), "cpu")
    return (
        np.stack([session.run(f, [images.logits])[0] for f in images.feeds])
        .reshape(-1)
        .astype(np.float64)
    )


def distance(found: Floats, expected: Floats) -> float:
    """Largest difference, relative to the largest value expected (absolute where all are zero)."""
    return float(np.abs(found - expected).max() / (np.abs(expected).max() or 1.0))


def evaluated(formulation: Formulation, keep: Floats) -> Floats:
    """Logits at a point that must satisfy every row."""
    values = formulation.complete(keep)
    values[formulation.loss.epigraph] = 1e9
    assert formulation.program.violation(values) < 1e-6
    held = formulation.pending.matrix @ values
    assert (held >= formulation.pending.lower - 1e-5).all()
    assert (held <= formulation.pending.upper + 1e-5).all()
    return formulation.loss.logits.at(values)


def solved(formulation: Formulation, keep: Floats, solver: str, direction: Floats) -> list[float]:
    """Least and greatest value of ``direction @ logits`` that the rows allow at given keep variables."""
    base, loss = formulation.program, formulation.loss
    lower, upper = base.lower.copy(), base.upper.copy()
    lower[formulation.encoder.keep] = upper[formulation.encoder.keep] = keep
    upper[loss.epigraph] = 0.0
    columns = loss.logits.matrix.shape[1]
    along = np.zeros(base.n_variables)
    along[:columns] = direction @ loss.logits.matrix
    found = []
    for sign in (1.0, -1.0):
        program = replace(base, lower=lower, upper=upper, objective=sign * along, offset=0.0)
        # Solvers may leave integrality and rows by a millionth: the gap asked for is wider.
        end = solvers.solve(program, SolverLimits(gap=1e-7), solver)
        assert end.termination is Termination.OPTIMAL
        assert end.values is not None
        found.append(float(along @ end.values + direction @ loss.logits.constant))
    return found


def test_every_encode_rule_has_a_case() -> None:
    used = " ".join(nodes for nodes, _ in NODES.values())
    for spec in REGISTRY:
        assert spec.encode is None or f"= {spec.name}" in used, (
            f"{spec.name} has an encode rule and no case"
        )


@pytest.mark.parametrize("kind", ["exact", "paper"])
@pytest.mark.parametrize("name", NODES)
def test_all_units_kept_equals_the_network(tmp_path: Path, name: str, kind: str) -> None:
    model = _make(name, tmp_path)
    images = images_of(model)
    formulation = formulate(model, couple(model), images, Form(kind))
    assert not formulation.outside
    expected = images.activations[images.logits].reshape(-1).astype(np.float64)
    assert distance(evaluated(formulation, np.ones(len(formulation.units))), expected) < 1e-5


@pytest.mark.parametrize("name", NODES)
def test_exact_form_equals_the_masked_network(tmp_path: Path, name: str) -> None:
    model = _make(name, tmp_path)
    coupling, images = couple(model), images_of(model)
    formulation = formulate(model, coupling, images, Form("exact"))
    rng = np.random.default_rng(0)
    for _ in range(3):
        units = random_keep(coupling, rng, 0.5)
        found = evaluated(formulation, units[formulation.units].astype(np.float64))
        assert distance(found, outputs_of(model, coupling, images, units)) < 1e-5


@pytest.mark.parametrize("solver", ["highs", "gurobi"])
@pytest.mark.parametrize("name", NODES)
def test_rows_admit_no_other_output(tmp_path: Path, name: str, solver: str) -> None:
    """With keep variables fixed, a solver finds the masked network's output, and nothing else is feasible."""
    model = _make(name, tmp_path)
    coupling, images = couple(model), images_of(model, 1)
    rng = np.random.default_rng(1)
    for kind, units in (
        ("exact", random_keep(coupling, rng, 0.5)),
        ("paper", np.ones(coupling.n_units, bool)),
    ):
        formulation = formulate(model, coupling, images, Form(kind))  # type: ignore[arg-type]
        expected = outputs_of(model, coupling, images, units)
        direction = rng.standard_normal(len(expected))
        ends = solved(formulation, units[formulation.units].astype(np.float64), solver, direction)
        scale = np.abs(direction) @ np.abs(expected)
        np.testing.assert_allclose(ends, direction @ expected, atol=1e-5 * scale)


@pytest.mark.parametrize("name", NODES)
def test_intervals_hold_for_every_choice(tmp_path: Path, name: str) -> None:
    """Bounds of every expression of ``exact`` hold at random keep variables, also at fractional ones."""
    model = _make(name, tmp_path)
    formulation = formulate(model, couple(model), images_of(model), Form("exact"))
    logits = formulation.loss.logits
    rng = np.random.default_rng(2)
    for keep in rng.integers(0, 2, (16, len(formulation.units))):
        found = evaluated(formulation, keep.astype(np.float64))
        assert (found >= logits.lower - 1e-9).all()
        assert (found <= logits.upper + 1e-9).all()


def test_decided_bounds_add_no_variables_or_rows(tmp_path: Path) -> None:
    """In the first gated layer the keep variables are all there is: what comes before is data."""
    text = """(float[N,6] x) => (float[N,3] y) <float[6,8] w1, float[8] b1, float[8,3] w2> {
        a = Gemm(x, w1, b1) h = Relu(a) y = Gemm(h, w2)
    }"""
    model = load(build(text), tmp_path)
    for kind in ("exact", "paper"):
        formulation = formulate(model, couple(model), images_of(model, 4), Form(kind))  # type: ignore[arg-type]
        # 8 keep variables and an epigraph variable an image; no row before a cut.
        assert formulation.program.n_variables == 12
        assert formulation.program.n_rows == 0


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("z = Tanh(c)", "Tanh 'Tanh_3' has no form"),
        ("d = Relu(c) z = Mul(c, d)", "multiplies two activations"),
        ("z = MatMul(c, c)", "takes its weight from a computation"),
        ("d = Relu(c) z = Div(c, d)", "divides by an activation"),
        (
            "d, i = MaxPool<kernel_shape = [2, 2]>(c) j = Cast<to = 1>(i) z = Add(d, j)",
            "gives its indices",
        ),
    ],
)
def test_operators_without_a_form_are_named(tmp_path: Path, nodes: str, reason: str) -> None:
    text = f"""(float[N,2,6,6] x) => (float[] y) <float[5,2,3,3] w1, float[4,5,2,2] w2> {{
        a = Conv<pads = [1, 1, 1, 1]>(x, w1)
        h = Relu(a)
        c = Conv(h, w2)
        {nodes}
        y = Flatten(z)
    }}"""
    model = load(build(text), tmp_path)
    with pytest.raises(SettingsError, match=reason):
        formulate(model, couple(model), images_of(model), Form("exact"))


def _units_of(coupling: Coupling, names: Sequence[str]) -> set[int]:
    return {int(u) for g in coupling.groups if g.name in names for u in g.units}


@pytest.mark.parametrize("kind", ["exact", "paper"])
def test_units_behind_operators_without_a_form_are_included(tmp_path: Path, kind: str) -> None:
    text = """(float[N,6] x) => (float[N,3] y) <float[6,8] w1, float[8,7] w2, float[7,5] w3, float[5,3] w4> {
        a = Gemm(x, w1) h = Relu(a) b = Gemm(h, w2) r = Sigmoid(b) c = Gemm(r, w3) t = Relu(c) y = Gemm(t, w4)
    }"""
    model = load(build(text), tmp_path)
    coupling, images = couple(model), images_of(model)
    formulation = formulate(model, coupling, images, Form(kind))  # type: ignore[arg-type]
    # A keep variable of w2 gates what the sigmoid gives (exact), or what it reads (paper).
    inside = _units_of(coupling, ["w2", "w3"] if kind == "exact" else ["w3"])
    assert set(formulation.units.tolist()) == inside
    assert set(formulation.outside) == set(range(coupling.n_units)) - inside
    assert all("Sigmoid" in reason for reason in formulation.outside.values())
    expected = images.activations["y"].reshape(-1).astype(np.float64)
    assert distance(evaluated(formulation, np.ones(len(inside))), expected) < 1e-5


@pytest.mark.fuzz
@settings(max_examples=30)
@given(net=networks())
def test_encoded_random_networks_equal_the_network(
    tmp_path_factory: pytest.TempPathFactory, net: Network
) -> None:
    """Every part of a network that can be encoded equals the network, whole and masked."""
    model = load(net.proto, tmp_path_factory.mktemp("net"))
    coupling = couple(model)
    images = images_of(model)
    for kind in ("exact", "paper"):
        try:
            formulation = formulate(model, coupling, images, Form(kind))  # type: ignore[arg-type]
        except SettingsError:
            continue
        expected = images.activations[images.logits].reshape(-1).astype(np.float64)
        assert distance(evaluated(formulation, np.ones(len(formulation.units))), expected) < 2e-5
        units = (
            random_keep(coupling, np.random.default_rng(0), 0.5)
            if coupling.n_units
            else np.zeros(0, bool)
        )
        units[list(formulation.outside)] = True
        if kind == "exact":
            found = evaluated(formulation, units[formulation.units].astype(np.float64))
            assert distance(found, outputs_of(model, coupling, images, units)) < 2e-5
