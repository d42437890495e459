"""SNACS: its estimator against golden values and a slow loop, propagation by hand, limits and protection of plans."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from graphs import NETS, activations, build, load, samples
from scipy.stats import rankdata

from onnx_oamip.api import pipeline
from onnx_oamip.cli import main
from onnx_oamip.core.errors import BudgetNotMet, DataError, SettingsError
from onnx_oamip.core.records import (
    Array,
    Bools,
    Coupling,
    Floats,
    Model,
    Scores,
    Statistics,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.graph import cost
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.linear_layers import linear_consumers
from onnx_oamip.importance import find, names
from onnx_oamip.planning import allocation, attempts, plan_constraints, width_losses
from onnx_oamip.published.dependence import layer_pairs, operating_limits, pooled_activations, snacs
from onnx_oamip.published.dependence.correlation import partial
from onnx_oamip.published.dependence.layer_pairs import standardise
from onnx_oamip.published.dependence.propagation import propagate, share
from onnx_oamip.published.dependence.requests import POOLED_ACTIVATIONS
from onnx_oamip.statistics.requests import MOMENTS

Chain = tuple[Model, Coupling, dict[str, Array]]


def bits(count: int, columns: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).integers(0, 2, (count, columns)).astype(np.float64)


# ----------------------------------------------------------------------------------------------------- golden values


def test_information_of_a_copied_bit_is_one_third() -> None:
    """t = 2 in both cells: 1 - 2/3. A sum over seen cells alone would be 1/12."""
    x = bits(4000, 1)
    assert snacs.dependence(x, x)[0, 0] == pytest.approx(1 / 3, abs=0.005)


def test_independent_data_has_no_information() -> None:
    found = snacs.dependence(bits(2000, 6), bits(2000, 4, seed=1))
    assert found.max() < 0.01
    rng = np.random.default_rng(2)
    assert (
        snacs.dependence(rng.standard_normal((2000, 6)), rng.standard_normal((2000, 4))).max()
        < 0.05
    )


def test_unpaired_rows_have_no_information() -> None:
    """Permuting rows of the children alone: estimates of unpaired samples would pass any other test of independence."""
    rng = np.random.default_rng(3)
    parents = rng.standard_normal((2000, 6))
    children = parents[:, :3] + 0.1 * rng.standard_normal((2000, 3))
    paired = snacs.dependence(parents, children)
    assert (np.diag(paired) > 0.3).all()
    assert snacs.dependence(parents, children[rng.permutation(2000)]).max() < 0.05


def test_parent_explained_by_others_has_no_information() -> None:
    """The child is a function of parent 0; parent 1 only follows it: dependent, and independent given parent 0."""
    rng = np.random.default_rng(4)
    first = rng.integers(0, 2, 4000)
    second = np.where(rng.random(4000) < 0.9, first, 1 - first)
    parents = np.stack([first, second], axis=1).astype(np.float64)
    child = np.where(rng.random(4000) < 0.95, first, 1 - first)[:, None].astype(np.float64)
    alone = snacs.dependence(parents, child, conditions=0)[0]
    given = snacs.dependence(parents, child)[0]
    assert alone[1] > 0.1
    assert given[1] < 0.01
    assert given[0] > 0.05


def _slow(parents: Floats, children: Floats, seed: int, conditions: int) -> Floats:
    """The same estimate, pair by pair and sample by sample."""
    x, y = standardise(children), standardise(parents)
    result = np.zeros((x.shape[1], y.shape[1]))
    hashed = snacs.draws(y, x, seed)
    for c in range(x.shape[1]):
        ranked = sorted(range(y.shape[1]), key=lambda p: -abs(float(x[:, c] @ y[:, p])))
        for p in range(y.shape[1]):
            others = [q for q in ranked if q != p][:conditions]
            for draw in hashed:
                z = [tuple(draw.parents[n, others].tolist()) for n in range(len(x))]
                codes = np.unique(np.asarray([hash(k) for k in z]), return_inverse=True)[1]
                ordered = np.unique(draw.parents[:, others], axis=0, return_inverse=True)[
                    1
                ].reshape(-1)
                assert len(set(z)) == codes.max() + 1
                moved = draw.children[snacs.shuffled(ordered, draw.order), c]
                for values, sign in ((draw.children[:, c], 1.0), (moved, -1.0)):
                    rows = list(zip(values.tolist(), draw.parents[:, p].tolist(), z, strict=True))
                    n_ijk, n_k = Counter(rows), Counter(z)
                    n_ik, n_jk = (
                        Counter((i, k) for i, _, k in rows),
                        Counter((j, k) for _, j, k in rows),
                    )
                    inverse = [
                        1 / (1 + n_ijk[i, j, k] * n_k[k] / (n_ik[i, k] * n_jk[j, k]))
                        for i, j, k in rows
                    ]
                    result[c, p] += sign * (1 - 2 * float(np.mean(inverse))) / len(hashed)
    return np.maximum(result, 0.0)


@pytest.mark.parametrize(
    ("parents", "conditions"), [(1, 2), (2, 2), (3, 2), (6, 2), (6, 1), (5, 0)]
)
def test_count_tables_equal_a_loop_over_pairs_and_samples(parents: int, conditions: int) -> None:
    rng = np.random.default_rng(5)
    a = np.maximum(rng.standard_normal((150, parents)), 0)
    x = a @ rng.standard_normal((parents, 3)) + 0.5 * rng.standard_normal((150, 3))
    np.testing.assert_allclose(
        snacs.dependence(a, x, 7, conditions), _slow(a, x, 7, conditions), atol=1e-12
    )


def test_block_size_of_parents_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    a, x = rng.standard_normal((300, 20)), rng.standard_normal((300, 3))
    whole = snacs.dependence(a, x)
    monkeypatch.setattr(snacs, "TABLE", 1)
    np.testing.assert_array_equal(snacs.dependence(a, x), whole)


def test_shuffle_preserves_the_conditions() -> None:
    rng = np.random.default_rng(7)
    z = rng.integers(0, 9, 200)
    place = snacs.shuffled(z, rng.permutation(200))
    assert sorted(place.tolist()) == list(range(200))
    np.testing.assert_array_equal(z[place], z)
    assert (place != np.arange(200)).mean() > 0.7


def edges(found: Floats, true: Bools) -> float:
    """Area under the curve: the chance that a true edge scores above one that is none."""
    rank = rankdata(found.reshape(-1))[true.reshape(-1)]
    count, rest = true.sum(), (~true).sum()
    return float((rank.sum() - count * (count + 1) / 2) / (count * rest))


def toy(seed: int, samples: int, even: bool = False) -> tuple[Floats, Floats, Bools]:
    """32 correlated rectified parents, 16 noisy children of 4 each; ``even``: of their sizes, not their signs."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((samples, 4)) @ rng.standard_normal((4, 32)) / 2
    hidden += 0.7 * rng.standard_normal((samples, 32))
    parents = hidden if even else np.maximum(hidden, 0)
    weight = np.zeros((16, 32))
    for row in weight:
        row[rng.choice(32, 4, replace=False)] = rng.choice([-1, 1], 4) * rng.uniform(0.5, 1.5, 4)
    read = np.abs(standardise(parents)) if even else standardise(parents)
    return (
        parents,
        read @ weight.T + (0.5 if even else 2.0) * rng.standard_normal((samples, 16)),
        weight != 0,
    )


def test_true_edges_of_a_small_network_are_found() -> None:
    """Plain hashing with one to three conditions was seen to reach 0.895, 0.848 and 0.729, correlation 0.925."""
    parents, children, true = toy(0, 2000)
    plain = np.abs(standardise(children).T @ standardise(parents))
    assert edges(snacs.dependence(parents, children), true) > max(0.95, edges(plain, true))
    # All other parents as the condition leave every sample alone in its cell: all ties.
    assert (snacs.dependence(parents[:300], children[:300, :2], conditions=31) == 0).all()


def test_dependence_without_correlation_is_found() -> None:
    parents, children, true = toy(1, 2000, even=True)
    found = edges(snacs.dependence(parents, children), true)
    assert found > 0.9
    assert found > edges(partial(parents, children), true) + 0.2


# ---------------------------------------------------------------------------------------------------------------- phi


def test_phi_functions_equal_their_definition() -> None:
    weight = np.asarray([[1.0, 2.0], [0.0, 4.0]])
    scaled = weight / 4
    np.testing.assert_allclose(snacs.weigh(weight, "weight"), scaled)
    np.testing.assert_allclose(snacs.weigh(weight, "weight_sq"), scaled**2)
    np.testing.assert_allclose(snacs.weigh(weight, "exp_weight"), np.exp(-(scaled**2) / 2))
    np.testing.assert_allclose(snacs.weigh(weight, "none"), 1.0)
    assert (snacs.weigh(np.zeros((2, 2)), "weight") == 0).all()


@pytest.mark.parametrize("phi", ["weight", "weight_sq", "exp_weight", "none"])
def test_every_phi_gives_positive_scores(tmp_path: Path, phi: str) -> None:
    model, coupling, _, seen = _seen(tmp_path, "mlp", 200)
    found = find("snacs").score(model, coupling, seen, Settings.create(macs=0.5, phi=phi))
    assert (found.values > 0).all()


# -------------------------------------------------------------------------------------------------------- propagation


def _seen(
    folder: Path, net: str, count: int
) -> tuple[Model, Coupling, dict[str, Array], Statistics]:
    model = load(build(NETS[net]), folder)
    coupling = couple(model)
    arrays = samples(model, count)
    found = dataset.load(arrays, model)
    assert found is not None
    seen = pooled_activations.collect(model, coupling, found, "cpu", by_tap=True)
    return (
        model,
        coupling,
        arrays,
        Statistics({MOMENTS: {}, POOLED_ACTIVATIONS: seen}, count, "cpu"),
    )


def test_propagation_equals_a_hand_computation(tmp_path: Path) -> None:
    """A chain 2 -> 2 -> 3: the last children count a third each."""
    text = """(float[N,3] x) => (float[N,3] y) <float[3,2] w1, float[2,2] w2, float[2,3] w3> {
        a = MatMul(x, w1)
        h = Relu(a)
        b = MatMul(h, w2)
        r = Relu(b)
        y = MatMul(r, w3)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    found = dataset.load(samples(model, 20), model)
    assert found is not None
    seen = pooled_activations.collect(model, coupling, found, "cpu")
    # Rows (3/4, 1/4), (1/2, 1/2), (1/2, 1/2).
    last = np.asarray([[3.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    first = np.asarray([[1.0, 4.0], [1.0, 0.0]])  # rows (1/5, 4/5), (1, 0)
    pairs = {p.consumer.data: p for p in layer_pairs.pairs(model, coupling, seen)}
    bare = Statistics({MOMENTS: {}}, 20, "cpu")
    values = propagate(model, coupling, bare, [(pairs["h"], first), (pairs["r"], last)])
    late = np.asarray([(3 / 4 + 1) / 3, (1 / 4 + 1) / 3])
    early = np.asarray([late[0] / 5 + late[1], late[0] * 4 / 5])
    # Shares of a layer sum to one; scores are relative to a group's mean.
    np.testing.assert_allclose(values[coupling.axes["w2", 1]], 2 * late)
    np.testing.assert_allclose(values[coupling.axes["w1", 1]], 2 * early)


def test_shares_of_an_independent_child_are_equal() -> None:
    np.testing.assert_allclose(share(np.zeros((1, 4))), 0.25)


def test_residual_sum_inherits_from_all_its_consumers(tmp_path: Path) -> None:
    """The stream is read by the block and by the head; the block's own output inherits from the head alone."""
    model, coupling, _, seen = _seen(tmp_path, "residual", 30)
    assert seen[POOLED_ACTIVATIONS] is not None
    pairs = {
        p.consumer.weight: p for p in layer_pairs.pairs(model, coupling, seen[POOLED_ACTIVATIONS])
    }
    assert set(pairs) == {"w2", "w3", "w4"}
    rho = {
        name: np.random.default_rng(i).random(p.weight.shape)
        for i, (name, p) in enumerate(pairs.items())
    }
    values = propagate(model, coupling, seen, [(p, rho[name]) for name, p in pairs.items()])
    head = share(rho["w4"]).mean(axis=0)  # by channel of the stream
    inner = head @ share(rho["w3"])
    stream = head + (inner / inner.sum()) @ share(rho["w2"])
    np.testing.assert_allclose(values[coupling.axes["w3", 1]], inner / inner.mean())
    np.testing.assert_allclose(values[coupling.axes["w1", 0]], stream / stream.mean())


# ------------------------------------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize("net", ["mlp", "cnn", "residual", "grouped"])
def test_pooled_is_the_mean_over_space(tmp_path: Path, net: str) -> None:
    model, _, arrays, seen = _seen(tmp_path, net, 37)
    assert seen[POOLED_ACTIVATIONS] is not None
    assert seen[POOLED_ACTIVATIONS].values
    values = activations(
        model, arrays, sorted({tensor for tensor, _ in seen[POOLED_ACTIVATIONS].values})
    )
    for (tensor, axis), found in seen[POOLED_ACTIVATIONS].values.items():
        whole = np.moveaxis(values[tensor].astype(np.float64), axis, 1)
        np.testing.assert_allclose(
            found, whole.reshape(37, whole.shape[1], -1).mean(axis=2), rtol=1e-4, atol=1e-6
        )
        assert found.dtype == np.float32


def test_child_activations_are_read_behind_a_normalisation(tmp_path: Path) -> None:
    *_, seen = _seen(tmp_path, "cnn", 5)
    assert seen[POOLED_ACTIVATIONS] is not None
    assert {t for t, _ in seen[POOLED_ACTIVATIONS].values} == {"p", "n", "f", "y"}


def test_samples_are_bounded_and_balanced(tmp_path: Path) -> None:
    model = load(build(NETS["mlp"]), tmp_path)
    labels = np.repeat([0, 1, 2], [10, 50, 140])
    found = dataset.load({**samples(model, 200), "labels": labels}, model)
    assert found is not None
    seen = pooled_activations.collect(model, couple(model), found, "cpu", most=60)
    assert seen.samples == 60
    assert np.bincount(seen.labels if seen.labels is not None else []).tolist() == [10, 25, 25]
    assert all(len(v) == 60 for v in seen.values.values())


def test_samples_may_lie_along_another_axis_than_0(tmp_path: Path) -> None:
    """A sequence first: rows are still samples."""
    text = """(float[N,5,6] x) => (float[5,N,3] y) <float[6,8] w1, float[8,3] w2> {
        t = Transpose<perm = [1, 0, 2]>(x)
        a = MatMul(t, w1)
        h = Relu(a)
        y = MatMul(h, w2)
    }"""
    model = load(build(text), tmp_path)
    arrays = samples(model, 12)
    found = dataset.load(arrays, model)
    assert found is not None
    seen = pooled_activations.collect(model, couple(model), found, "cpu")
    hidden = np.maximum(arrays["x"] @ model.constants["w1"], 0).mean(axis=1)
    np.testing.assert_allclose(seen.values["h", 2], hidden, rtol=1e-5, atol=1e-6)


def test_overflow_is_reported(tmp_path: Path) -> None:
    model = load(build(NETS["mlp"]), tmp_path)
    found = dataset.load({"x": np.full((4, 6), 3e38, np.float32)}, model)
    assert found is not None
    with pytest.raises(DataError, match=r"NaN or infinite values in 4 of 4 .* from Gemm .* on"):
        pooled_activations.collect(model, couple(model), found, "cpu")


# -------------------------------------------------------------------------------------------------------------- limits


def test_upper_limits_follow_the_published_rule() -> None:
    accuracy = np.asarray([0.9, 0.9, 0.8, 0.5, 0.2])
    # 0.9 - 0.7 * 0.7 = 0.41.
    assert operating_limits.upper_limit(np.asarray([1, 3, 5, 7, 9]), accuracy) == 7
    assert operating_limits.upper_limit(np.asarray([1, 3, 5]), np.asarray([0.5, 0.5, 0.5])) == 5
    assert operating_limits.upper_limit(np.asarray([1, 3, 5]), np.asarray([0.9, 0.1, 0.8])) == 5


@pytest.mark.parametrize("net", ["mlp", "cnn", "residual", "grouped"])
def test_pooled_outputs_equal_those_computed_from_the_taps(tmp_path: Path, net: str) -> None:
    """No pass of the network: the masked layer as ONNX Runtime gives it, and from pooled taps."""
    model, coupling, arrays, seen = _seen(tmp_path, net, 40)
    assert seen[POOLED_ACTIVATIONS] is not None
    places = linear_consumers(model, coupling)
    assert places
    for consumer, place in places:
        inlet, pooled = (consumer.data, consumer.axis), seen[POOLED_ACTIVATIONS]
        layer = operating_limits._Layer(model, pooled, place, inlet=inlet, rows=np.arange(40))
        channels = len(coupling.axes[inlet])
        end = pooled_activations.outlet(model, place)
        gone = np.arange(0, channels, 2)
        found = layer.factor * (layer.linear - layer.part(gone)) + layer.shift
        masked = model.proto.__class__.FromString(model.proto.SerializeToString())
        keep = np.ones(channels, np.float32)
        keep[gone] = 0
        view = [1] * len(model.shapes[consumer.data])
        view[consumer.axis] = -1
        _mask(masked, consumer.node, consumer.slot, keep.reshape(view))
        truth = np.moveaxis(
            activations(model, arrays, [end[0]], masked)[end[0]].astype(np.float64), end[1], 1
        )
        truth = truth.reshape(*truth.shape[:2], -1).mean(axis=2)
        np.testing.assert_allclose(found, truth, atol=1e-5 * np.abs(truth).max())


def _mask(proto, node: str, slot: int, keep: Array) -> None:
    from onnx import helper, numpy_helper

    proto.graph.initializer.append(numpy_helper.from_array(keep, "the_mask"))
    place, found = next((i, n) for i, n in enumerate(proto.graph.node) if n.name == node)
    mul = helper.make_node("Mul", [found.input[slot], "the_mask"], ["the_masked"])
    found.input[slot] = "the_masked"
    proto.graph.node.insert(place, mul)


def test_classifier_matches_the_default_of_scikit_learn() -> None:
    from sklearn.svm import SVC

    rng = np.random.default_rng(8)
    labels = rng.integers(0, 4, 150)
    x = rng.standard_normal((150, 7)) + 0.8 * rng.standard_normal((4, 7))[labels]
    worn = x * (rng.random(7) < 0.6)
    judge = operating_limits.classifier(x, labels)
    expected = SVC(tol=1e-5, random_state=0).fit(x, labels)
    assert judge(x) == pytest.approx(expected.score(x, labels), abs=0.01)
    assert judge(worn) == pytest.approx(expected.score(worn, labels), abs=0.02)
    assert judge(worn) < judge(x)


@pytest.mark.parametrize("columns", [5, 60])
def test_kernel_alignment_equals_its_definition(columns: int) -> None:
    rng = np.random.default_rng(9)
    x = rng.standard_normal((30, columns))
    judge = operating_limits.similarity(x)
    assert judge(x) == pytest.approx(1)
    assert judge(3 * x + 1) == pytest.approx(1)
    assert judge(np.ones_like(x)) == 0
    wide = x - x.mean(axis=0)
    other = rng.standard_normal((30, columns))
    k, m = wide @ wide.T, (other - other.mean(axis=0)) @ (other - other.mean(axis=0)).T
    assert judge(other) == pytest.approx(
        float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))
    )


def _learnable(folder: Path) -> Chain:
    """Two hidden layers, the classes decided by a few units of the first."""
    model = load(build(NETS["mlp"]), folder)
    arrays = samples(model, 240)
    labels = np.argmax(activations(model, arrays, ["y"])["y"], axis=1)
    return model, couple(model), {**arrays, "labels": labels}


@pytest.mark.parametrize("allocate", ["mip", "global", "uniform"])
def test_limits_hold_in_every_allocation(tmp_path: Path, allocate: str) -> None:
    model, _, arrays = _learnable(tmp_path)
    wish = {
        "macs": 0.4,
        "allocate": allocate,
        "refit": "bias",
        "importance": "activation",
        "align": 1,
    }
    free = pipeline.prepare(model.path, arrays, Settings.create(**wish))
    bound = pipeline.prepare(model.path, arrays, Settings.create(**wish, limits="snacs"))
    full = cost.full_widths(bound.coupling)
    least = allocation.least(bound.constraints.floor, bound.steps, full)
    assert (bound.constraints.floor > 0).all()
    assert any("SVM" in note for note in bound.scores.notes)
    chosen = [_allocated(ready) for ready in (free, bound)]
    assert (chosen[0].widths < least).any()
    assert (chosen[1].widths >= least).all()
    assert chosen[1].predicted.macs <= 0.4 * bound.before.macs


def test_budget_beyond_the_limits_names_the_limits(tmp_path: Path) -> None:
    model, _, arrays = _learnable(tmp_path)
    wish = {
        "macs": 0.05,
        "allocate": "uniform",
        "refit": "none",
        "importance": "l2",
        "align": 1,
        "device": "cpu",
    }
    with pytest.raises(BudgetNotMet, match="it can be met without `limits=snacs`"):
        _allocated(pipeline.prepare(model.path, arrays, Settings.create(**wish, limits="snacs")))


def _allocated(ready):
    return attempts.allocate(ready, allocation.limits(ready.settings.budget, ready.before, 0))


@pytest.mark.parametrize("allocate", ["mip", "global", "uniform"])
def test_floors_per_group_hold(tmp_path: Path, allocate: str) -> None:
    """The group that would be cut most may only lose one unit."""
    from dataclasses import replace

    from onnx_oamip.core.records import Sensitivity

    model, _, arrays = _learnable(tmp_path)
    wish = Settings.create(
        macs=0.5, allocate=allocate, refit="bias", importance="activation", align=1, device="cpu"
    )
    ready = pipeline.prepare(model.path, arrays, wish)
    widths = _allocated(ready).widths
    full = cost.full_widths(ready.coupling)
    g = int(np.argmin(widths / full))
    assert widths[g] < full[g] - 1
    floor = np.zeros(len(full))
    floor[g] = (full[g] - 1) / full[g]
    ladder = None
    if ready.ladder is not None:
        from onnx_oamip.planning.budget_program import Ladder

        stays = [w >= (full[g] - 1 if i == g else 1) for i, w in enumerate(ready.ladder.widths)]
        ladder = Ladder(
            tuple(w[s] for w, s in zip(ready.ladder.widths, stays, strict=True)),
            tuple(c[s] for c, s in zip(ready.ladder.cost, stays, strict=True)),
        )
    held = _allocated(
        replace(ready, constraints=replace(ready.constraints, floor=floor), ladder=ladder)
    ).widths
    assert held[g] >= full[g] - 1
    assert held.sum() < full.sum()
    losses = Sensitivity(np.asarray([1, full[g]]), np.asarray([1.0, 0.0]))
    rungs = width_losses.rungs(ready.coupling, (losses,) * len(full), ready.steps, floor)
    assert rungs.widths[g].tolist() == [full[g] - 1, full[g]]
    assert all(rungs.widths[i][0] == 1 for i in range(len(full)) if i != g)


def test_without_labels_alignment_is_used_and_noted(tmp_path: Path) -> None:
    model, _, arrays = _learnable(tmp_path)
    unlabelled = {"x": arrays["x"]}
    wish = Settings.create(
        macs=0.7, allocate="uniform", refit="none", importance="l2", limits="snacs", device="cpu"
    )
    ready = pipeline.prepare(model.path, unlabelled, wish)
    (note,) = [n for n in ready.scores.notes if "`limits=" in n]
    assert "no labels" in note
    assert "CKA" in note
    assert (ready.constraints.floor > 0).all()


@pytest.mark.parametrize(
    "importance",
    [
        pytest.param(name, marks=[] if name in ("obs", "oamip") else [pytest.mark.slow])
        for name in names()
    ],
)
def test_protected_units_are_kept_over_all_iterations(tmp_path: Path, importance: str) -> None:
    """Later rounds score a smaller model; protected are the units of the original."""
    model, coupling, arrays = _learnable(tmp_path)
    wish = Settings.create(
        macs=0.4, protect=0.3, iterations=3, refit="bias", importance=importance, mode="decoupled", align=1,
        device="cpu", force=True,
    )  # fmt: skip
    report = pipeline.prune(model.path, arrays, None, wish)
    kept = plan_constraints.protected(model, coupling, 0.3)
    assert kept.any()
    assert report.plan.keep[kept].all()
    assert not report.plan.keep.all()


@pytest.mark.parametrize("allocate", ["global", "uniform", "mip"])
def test_protected_units_stay(tmp_path: Path, allocate: str) -> None:
    model, coupling, arrays = _learnable(tmp_path)
    wish = Settings.create(
        macs=0.5,
        allocate=allocate,
        refit="none",
        importance="random",
        protect=0.25,
        align=1,
        device="cpu",
    )
    ready = pipeline.prepare(model.path, arrays, wish)
    kept = plan_constraints.protected(model, coupling, 0.25)
    for group, name in zip(coupling.groups, ("w2", "w3"), strict=True):
        weight = np.abs(model.constants[name])  # (inputs, outputs)
        by_unit = (weight / weight.sum(axis=0)).mean(axis=1)[np.argsort(coupling.axes[name, 0])]
        expected = np.argsort(-by_unit)[: -(-len(group.units) // 4)]
        assert sorted(group.units[expected]) == sorted(group.units[kept[group.units]])
    assert _allocated(ready).keep[kept].all()


def test_promotion_preserves_values_and_order_of_other_units(tmp_path: Path) -> None:
    coupling = couple(load(build(NETS["mlp"]), tmp_path))
    values = np.random.default_rng(0).random(coupling.n_units)
    kept = np.zeros(coupling.n_units, bool)
    kept[[3, 15]] = True
    found = plan_constraints.promote(coupling, Scores("x", values), kept).values
    for group in coupling.groups:
        np.testing.assert_allclose(np.sort(found[group.units]), np.sort(values[group.units]))
        rest = group.units[~kept[group.units]]
        assert (np.argsort(found[rest]) == np.argsort(values[rest])).all()
        assert found[group.units[kept[group.units]]].min() > found[rest].max()
    equal = plan_constraints.promote(coupling, Scores("x", np.ones(coupling.n_units)), kept).values
    assert equal[kept].min() > equal[~kept].max()


# ------------------------------------------------------------------------------------------------------- command line


def test_snacs_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _, arrays = _learnable(tmp_path)
    file, out = tmp_path / "data.npz", tmp_path / "out.onnx"
    np.savez(file, **arrays)
    args = [
        "prune",
        model.path,
        "--data",
        str(file),
        "-o",
        str(out),
        "--macs",
        "70%",
        "--importance",
        "snacs",
    ]
    args += [
        "--limits",
        "snacs",
        "--protect",
        "10%",
        "--phi",
        "weight_sq",
        "--allocate",
        "uniform",
        "--align",
        "1",
    ]
    assert main([*args, "--force", "--json"]) == 0
    assert out.exists()
    assert "--limits snacs (accuracy of an SVM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--limits", "taylor", "'taylor' is not one of"),
        ("--phi", "norm", "'norm' is not one of"),
        ("--protect", "1.5", "is not a share"),
        ("--protect", "100%", "below 1"),
        ("--score-time", "0", "seconds above 0"),
    ],
)
def test_invalid_options_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str, words: str
) -> None:
    out = tmp_path / "out.onnx"
    assert main(["prune", "m.onnx", "-o", str(out), "--macs", "0.5", flag, value]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert flag in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_limits_require_data(tmp_path: Path) -> None:
    model = load(build(NETS["mlp"]), tmp_path)
    wish = Settings.create(
        macs=0.7, allocate="uniform", refit="none", importance="l2", limits="snacs"
    )
    with pytest.raises(DataError, match="`limits=snacs` needs calibration data"):
        pipeline.prune(model.path, None, None, wish)


@pytest.mark.parametrize("values", [{"protect": 1.0}, {"phi": "x"}, {"score_time": -1.0}])
def test_invalid_settings_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=f"`{next(iter(values))}`"):
        Settings.create(macs=0.5, **values)


def test_unknown_limits_are_refused_before_any_work(tmp_path: Path) -> None:
    wish = Settings.create(macs=0.7, importance="l2", limits="all")
    with pytest.raises(SettingsError, match="`limits='all'` is unknown; choose one of none, snacs"):
        pipeline.prune(tmp_path / "no-such.onnx", None, None, wish)
