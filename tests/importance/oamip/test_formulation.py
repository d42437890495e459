"""The importance program against enumeration, an oracle written without it, and the sizes that are published."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import objectives
import pytest
from conftest import MODELS
from graphs import build, load
from scipy.optimize import linprog

from onnx_oamip.core.records import (
    Coupling,
    Floats,
    Images,
    Model,
)
from onnx_oamip.data import dataset
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.importance.oamip import solve
from onnx_oamip.importance.oamip.formulation import Formulation, formulate
from onnx_oamip.importance.oamip.region import Form
from onnx_oamip.importance.oamip.select import unit_costs
from onnx_oamip.importance.oamip.solve import Outcome
from onnx_oamip.programs.loss import ScoredLayer, Sparsity
from onnx_oamip.programs.solvers import SolverLimits

SOLVERS = ("highs", "gurobi")
# Networks of 12 units. GATE(x, m) is x itself, or x times an input m: then one session serves every choice.
DENSE = """(float[N,5] xMASKS) => (float[N,3] y) <float[5,7] w1, float[7] b1, float[7,5] w2, float[5] b2,
 float[5,3] w3> {
    a = Gemm(x, w1, b1) h = Relu(a)
    GATE(h, m1)
    b = Gemm(h', w2, b2) r = Relu(b)
    GATE(r, m2)
    y = Gemm(r', w3)
}"""
CONV = """(float[N,1,6,6] xMASKS) => (float[N,3] y) <float[5,1,3,3] w1, float[5] b1, float[7,5,2,2] w2, float[7] b2,
 float[7,3] w3> {
    a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1) h = Relu(a)
    p = MaxPool<kernel_shape = [3, 3], strides = [3, 3]>(h)
    GATE(p, m1)
    b = Conv(p', w2, b2) r = Relu(b)
    f = Flatten(r)
    GATE(f, m2)
    y = Gemm(f', w3)
}"""
RESIDUAL = """(float[N,2,3,3] xMASKS) => (float[N,3] y) <float[6,2,3,3] w1, float[6] b1, float[6,6,3,3] w2, float[6] b2,
 float[6,6,1,1] w3, float[6,3] w4> {
    a = Conv(x, w1, b1) h = Relu(a)
    GATE(h, m1)
    b = Conv<pads = [1, 1, 1, 1]>(h', w2, b2) r = Relu(b)
    GATE(r, m2)
    c = Conv(r', w3)
    s = Add(h, c) t = Relu(s)
    g = GlobalAveragePool(t) f = Flatten(g)
    GATE(f, m3)
    y = Gemm(f', w4)
}"""
NETS = {"dense": DENSE, "conv": CONV, "residual": RESIDUAL}
GATED = {"dense": ("h", "r"), "conv": ("p", "f"), "residual": ("h", "r", "f")}


def _text(name: str, masked: bool) -> str:
    lines = []
    for line in NETS[name].splitlines():
        if "GATE(" in line:
            tensor, mask = line.strip()[5:-1].split(", ")
            lines += [f"{tensor}_gated = Mul({tensor}, {mask})"] * masked
        else:
            lines.append(line)
    text = "\n".join(lines)
    for tensor in GATED[name]:
        text = text.replace(f"{tensor}'", f"{tensor}_gated" if masked else tensor)
    masks = "".join(f", float[1,{n}{spatial}] m{i}" for i, n, spatial in _masks(name))
    return text.replace("MASKS", masks if masked else "")


def _masks(name: str) -> Iterator[tuple[int, int, str]]:
    shapes = {
        "dense": [(7, ""), (5, "")],
        "conv": [(5, ",1,1"), (7, "")],
        "residual": [(6, ",1,1"), (6, ",1,1"), (6, "")],
    }
    for i, (n, spatial) in enumerate(shapes[name], start=1):
        yield i, n, spatial


class Case:
    """A network, a few images of it, and the objective of every choice of units by enumeration."""

    def __init__(self, name: str, folder: Path, seed: int = 0) -> None:
        self.model = load(build(_text(name, masked=False), seed=seed), folder)
        self.coupling = couple(self.model)
        rng = np.random.default_rng(seed)
        arrays = {"x": rng.standard_normal((40, *self.model.shapes["x"][1:])).astype(np.float32)}
        samples = dataset.load(arrays, self.model)
        assert samples is not None
        found = objectives.class_samples(self.model, samples, 1, seed)
        self.images = found
        session = Session(build(_text(name, masked=True), seed=seed), "cpu")
        self.keeps = np.array(list(product((0.0, 1.0), repeat=self.coupling.n_units)))
        x = np.concatenate([f["x"] for f in found.feeds])
        masks = []
        for tensor, (i, n, spatial) in zip(GATED[name], _masks(name), strict=True):
            labels = self.coupling.axes[tensor, 1]
            masks.append((f"m{i}", labels, (1, n, *[1] * spatial.count(","))))
        self.logits = np.stack(
            [
                session.run(
                    {
                        "x": x,
                        **{m: k[labels].astype(np.float32).reshape(s) for m, labels, s in masks},
                    }
                )[0]
                for k in self.keeps
            ]
        ).astype(np.float64)

    def losses(self) -> Floats:
        """Mean cross-entropy of every choice."""
        label = self.images.labels.reshape(-1)
        top = self.logits.max(axis=2)
        total = top + np.log(np.exp(self.logits - top[..., None]).sum(axis=2))
        return (total - self.logits[:, np.arange(len(label)), label]).mean(axis=1)

    def sparsity(self) -> Floats:
        """Sum of the (m - 1) largest of sum (s - 2) / N over groups."""
        layers = np.stack([(self.keeps[:, g.units] - 2).mean(axis=1) for g in self.coupling.groups])
        ordered = np.sort(layers, axis=0)
        return ordered[1 if len(layers) > 1 else 0 :].sum(axis=0)


@pytest.fixture(scope="module", params=NETS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("net"), seed=3)


def _optimise(
    case: Case, form: Form, solver: str, gap: float = 1e-4
) -> tuple[Formulation, Outcome]:
    formulation = formulate(
        case.model,
        case.coupling,
        case.images,
        form,
        cost=unit_costs(case.model, case.coupling),
    )
    return formulation, solve.optimise(formulation, SolverLimits(time_s=60, gap=gap), solver)


def _agrees(outcome: Outcome, best: float, gap: float) -> None:
    assert outcome.record["status"] == "optimal"
    assert outcome.bound <= best + 1e-5
    assert outcome.objective >= best - 1e-5
    assert outcome.objective <= best + gap * abs(best) + 1e-5


@pytest.mark.parametrize("weight", [0.5, 5.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_exact_optimum_equals_enumeration(case: Case, solver: str, weight: float) -> None:
    assert case.coupling.n_units == 12
    values = weight * case.losses() + case.sparsity()
    _, outcome = _optimise(case, Form("exact", weight), solver)
    _agrees(outcome, float(values.min()), 1e-4)
    place = int((case.keeps == np.round(outcome.keep)).all(axis=1).argmax())
    assert values[place] == pytest.approx(outcome.objective, abs=1e-5)


@pytest.mark.parametrize("budget", [0.35, 0.7])
@pytest.mark.parametrize("solver", SOLVERS)
def test_exact_optimum_within_a_budget_equals_enumeration(
    case: Case, solver: str, budget: float
) -> None:
    cost = unit_costs(case.model, case.coupling)
    assert (cost > 0).all()
    fits = case.keeps @ cost <= budget * cost.sum()
    best = float(case.losses()[fits].min())
    _, outcome = _optimise(case, Form("exact", 1.0, budget=budget), solver)
    _agrees(outcome, best, 1e-4)
    assert cost @ np.round(outcome.keep) <= budget * cost.sum() + 1e-6


def test_descent_removes_units_of_all_layers_in_proportion() -> None:
    """The sparsity term leaves out the layer that is cut most: only cuts of all layers lower it."""
    layers = (ScoredLayer(np.arange(6), 6.0), ScoredLayer(np.array([6, 7]), 2.0))
    search = solve._Search.__new__(solve._Search)
    search.formulation = SimpleNamespace(sparsity=Sparsity(layers))
    priority = np.array([0.3, 0.1, 0.2, 0.5, 0.4, 0.6, 0.9, 0.8])
    order = search._by_layer(priority)
    assert sorted(order[:4]) == [0, 1, 2, 7]
    assert [unit for unit in order if unit < 6] == [1, 2, 0, 4, 3, 5]


def test_tightened_bounds_change_no_optimum(case: Case) -> None:
    limits = SolverLimits(time_s=60, gap=1e-4)
    tighten = solve.BoundTightener(limits, "highs", 2.0)
    plain, before = _optimise(case, Form("exact", 2.0), "highs")
    formulation = formulate(
        case.model, case.coupling, case.images, Form("exact", 2.0), tighten=tighten
    )
    after = solve.optimise(formulation, limits, "highs")
    assert after.objective == pytest.approx(before.objective, rel=2e-4, abs=1e-5)
    assert formulation.program.n_variables <= plain.program.n_variables
    assert formulation.encoder.largest <= plain.encoder.largest + 1e-9


def test_relaxation_is_a_lower_bound(case: Case) -> None:
    best = float((2.0 * case.losses() + case.sparsity()).min())
    formulation, outcome = _optimise(case, Form("exact", 2.0, relax=True), "highs", 1e-3)
    assert not formulation.program.integer.any()
    assert outcome.bound <= best + 1e-6


# ------------------------------------------------------------------------------------------------ the published form

MLP = """(float[N,8] x) => (float[N,4] y) <float[8,7] w1, float[7] b1, float[7,6] w2, float[6] b2, float[6,4] w3,
 float[4] b3> {
    a = Gemm(x, w1, b1) h = Relu(a)
    b = Gemm(h, w2, b2) r = Relu(b)
    y = Gemm(r, w3, b3)
}"""


def _frozen(model: Model, coupling: Coupling, held: Images, weight: float) -> float:
    """The published program with its activation pattern frozen, as a convex problem in s alone; loops and no sharing.

    Active units: h = a - (1 - s) U with 0 <= h <= U; inactive: h = 0 with L <= a <= 0. Kelley's method on the loss.
    """
    w = {k: v.astype(np.float64) for k, v in model.constants.items()}
    count = 13
    rows: list[tuple[Floats, float]] = []  # row @ s <= side

    def at_most(matrix: Floats, constant: Floats, side: Floats) -> None:
        rows.extend((matrix[i], side[i] - constant[i]) for i in range(len(side)))

    logits = []
    for feed in held.feeds:
        x = feed["x"][0].astype(np.float64)
        low, high = x - 1e-5, x + 1e-5
        matrix, constant = np.zeros((8, count)), x
        start = 0
        for layer in ("1", "2"):
            kernel, bias = w[f"w{layer}"].T, w[f"b{layer}"]
            matrix, constant = kernel @ matrix, kernel @ constant + bias
            up, down = np.maximum(kernel, 0), np.minimum(kernel, 0)
            low, high = up @ low + down @ high + bias, up @ high + down @ low + bias
            assert ((low > 0) | (high <= 0)).all(), "the pattern is not frozen: take another seed"
            units = coupling.axes["h" if layer == "1" else "r", 1]
            active = low > 0
            gated, moved = np.zeros_like(matrix), np.zeros_like(constant)
            for i, unit in enumerate(units):
                if active[i]:
                    gated[i] = matrix[i]
                    gated[i, unit] += high[i]
                    moved[i] = constant[i] - high[i]
                    at_most(-gated[[i]], -moved[[i]], np.zeros(1))
                    at_most(gated[[i]], moved[[i]], high[[i]])
                else:
                    at_most(matrix[[i]], constant[[i]], np.zeros(1))
                    at_most(-matrix[[i]], -constant[[i]], -low[[i]])
            matrix, constant = gated, moved
            low, high = np.maximum(low, 0), np.maximum(high, 0)
            start += len(units)
        logits.append((w["w3"].T @ matrix, w["w3"].T @ constant + w["b3"]))

    # Variables: s, t (one an image), m. Objective: weight * mean t + I_1 + I_2 + m with m >= -I_l.
    n = len(logits)
    label = held.labels.reshape(-1)
    sizes = [(coupling.axes[t, 1], k) for t, k in (("h", 7), ("r", 6))]
    objective = np.concatenate([np.zeros(count), np.full(n, weight / n), [1.0]])
    matrix_rows = [np.concatenate([a, np.zeros(n + 1)]) for a, _ in rows]
    sides = [b for _, b in rows]
    for units, size in sizes:
        objective[units] += 1 / size
        row = np.zeros(count + n + 1)
        row[units] = -1 / size
        row[-1] = -1.0
        matrix_rows.append(row)
        sides.append(-2.0)
    best = np.inf
    point = np.ones(count)
    for _ in range(500):
        total = 0.0
        for i, (a, b) in enumerate(logits):
            out = a @ point + b
            share = np.exp(out - out.max())
            value = out.max() + np.log(share.sum()) - out[label[i]]
            slope = share / share.sum()
            slope[label[i]] -= 1
            row = np.zeros(count + n + 1)
            row[:count] = slope @ a
            row[count + i] = -1.0
            matrix_rows.append(row)
            sides.append(float(row[:count] @ point) - value)
            total += weight / n * value
        layers = [(point[units] - 2).sum() / size for units, size in sizes]
        best = min(best, total + max(layers))
        bounds = [(0, 1)] * count + [(0, None)] * n + [(None, None)]
        found = linprog(objective, np.array(matrix_rows), np.array(sides), bounds=bounds)
        assert found.success
        if best - (found.fun - 4.0) < 1e-5:
            break
        point = found.x[:count]
    return best


def _mlp(folder: Path, seed: int) -> tuple[Model, Coupling, Images]:
    model = load(build(MLP, seed=seed), folder)
    arrays = {"x": np.random.default_rng(seed).standard_normal((60, 8)).astype(np.float32)}
    samples = dataset.load(arrays, model)
    assert samples is not None
    held = objectives.class_samples(model, samples, 1, seed)
    return model, couple(model), held


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("seed", range(5))
def test_paper_agrees_with_the_frozen_pattern(tmp_path: Path, seed: int, solver: str) -> None:
    model, coupling, held = _mlp(tmp_path, seed)
    expected = _frozen(model, coupling, held, 5.0)
    formulation = formulate(model, coupling, held, Form("paper"))
    # Nothing is left but keep variables, one epigraph an image and the one of the sum of largest.
    assert formulation.program.n_variables == 13 + len(held.feeds) + 1
    assert not formulation.program.integer.any()
    outcome = solve.optimise(formulation, SolverLimits(time_s=30, gap=1e-4), solver)
    assert outcome.record["status"] == "optimal"
    assert outcome.objective == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert outcome.bound <= expected + 1e-4


def test_dead_units_score_zero(tmp_path: Path) -> None:
    """A unit that no image activates is free of rows, and sparsity takes it (all of it, where nothing holds it)."""
    model, coupling, held = _mlp(tmp_path, 0)
    dead = (held.activations["h"] == 0).all(axis=(0, 1))
    formulation = formulate(model, coupling, held, Form("paper", weight=5.0))
    outcome = solve.optimise(formulation, SolverLimits(time_s=30, gap=1e-5), "highs")
    assert (outcome.keep[coupling.axes["h", 1][dead]] < 0.5).all()


def test_separate_bias_belongs_to_its_layer(tmp_path: Path) -> None:
    model, _, held = _mlp(tmp_path, 1)
    apart = MLP.replace("a = Gemm(x, w1, b1)", "p = MatMul(x, w1) a = Add(p, b1)")
    apart = apart.replace("b = Gemm(h, w2, b2)", "q = MatMul(h, w2) b = Add(b2, q)")
    other = load(build(apart, seed=1), tmp_path)
    more = Images(
        held.feeds, held.labels, held.logits, {**held.activations, "p": held.activations["a"]}
    )
    for kind in ("paper", "exact"):
        found = [
            formulate(m, couple(m), images, Form(kind))  # type: ignore[arg-type]
            for m, images in ((model, held), (other, more))
        ]
        sizes = {(f.program.n_variables, f.program.n_rows, f.pending.count) for f in found}
        assert len(sizes) == 1
        ends = [
            solve.optimise(f, SolverLimits(time_s=30, gap=1e-4), "highs").objective for f in found
        ]
        assert ends[0] == pytest.approx(ends[1], rel=2e-4)


def test_convolutions_weigh_less_in_the_published_objective(tmp_path: Path) -> None:
    case = Case("conv", tmp_path)
    published = formulate(case.model, case.coupling, case.images, Form("paper")).sparsity.layers
    ours = formulate(case.model, case.coupling, case.images, Form("exact")).sparsity.layers
    # Kernels of 3 x 3 and 2 x 2.
    assert [n for _, n in published] == [5 * 9.0, 7 * 4.0]
    assert [n for _, n in ours] == [5.0, 7.0]


# ------------------------------------------------------------------------------------------------------------- size


def _shipped(name: str, per_class: int = 1) -> tuple[Model, Coupling, Images]:
    model = models.load(MODELS / f"{name}.onnx")
    samples = dataset.load(str(MODELS / "mnist.npz"), model)
    assert samples is not None
    model = models.rebind(model, samples.bindings(model))
    held = objectives.class_samples(model, samples, per_class, 0)
    return model, couple(model), held


def _one(held: Images) -> Images:
    few = {k: v[:1] for k, v in held.activations.items()}
    return Images(held.feeds[:1], held.labels[:1], held.logits, few)


@pytest.mark.parametrize(
    ("name", "kind", "count", "variables", "rows"),
    [
        # As published: every layer's input is a variable, the image too (16,340 variables and 24,740 rows with ten
        # images). Here a stable ReLU is an expression of the scores: those and one epigraph an image are all, and
        # range rows come only where they are violated. Folding the first layer alone would leave 2,410 and 3,000.
        ("lenet300-mnist", "paper", 10, 2410, 3000),
        # One image as published: 1,994 and 3,194; with the first layer folded 601 and 300.
        ("lenet300-mnist", "paper", 1, 601, 300),
        # Exact has the same variables as that folded form (and one for the objective), four rows an unstable ReLU.
        ("lenet300-mnist", "exact", 1, 1994, 3194),
        ("lenet5-mnist", "paper", 10, 113_046, 206_952),
    ],
)
def test_programs_are_smaller_than_published(
    name: str, kind: str, count: int, variables: int, rows: int
) -> None:
    model, coupling, held = _shipped(name)
    few = held if count == 10 else _one(held)
    formulation = formulate(model, coupling, few, Form(kind))  # type: ignore[arg-type]
    assert formulation.program.n_variables < variables
    assert formulation.program.n_rows < rows


@pytest.mark.parametrize("solver", ["highs", pytest.param("gurobi", marks=pytest.mark.slow)])
def test_lenet_is_solved_in_seconds_within_the_restricted_licence(solver: str) -> None:
    model, coupling, held = _shipped("lenet300-mnist")
    formulation = formulate(model, coupling, held, Form("paper"))
    outcome = solve.optimise(formulation, SolverLimits(time_s=60, gap=0.01), solver)
    assert outcome.record["status"] == "optimal"
    assert outcome.gap <= 0.01
    assert outcome.record["variables"] < 500
    assert outcome.record["rows"] < 2000
    assert outcome.record["seconds"] < 20
