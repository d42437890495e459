"""The importance program layer by layer: scores, sets, records, and what is known of certain units."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import objectives
import pytest
from graphs import ATTENTION, MLP, NETS, build, load, samples
from onnx import ModelProto, numpy_helper

from onnx_oamip.core.records import (
    Array,
    Bools,
    Consumer,
    Coupling,
    Floats,
    Ints,
    Model,
    Scores,
    Statistics,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.graph.coupling import couple
from onnx_oamip.importance import activation, find, obs
from onnx_oamip.importance.oamip import decoupled
from onnx_oamip.planning import scoring, sensitivity
from onnx_oamip.programs.repaired_loss import Repaired
from onnx_oamip.statistics import calibration, covariances
from onnx_oamip.statistics.collector import collect, parts
from onnx_oamip.statistics.context import Context
from onnx_oamip.statistics.layer_problems import Problem, compensate, problems
from onnx_oamip.statistics.requests import COVARIANCE

REFITS = ("least-squares", "bias", "none")
KEYS = {
    "purpose",
    "group",
    "solver",
    "reason",
    "status",
    "limit",
    "gap",
    "objective",
    "bound",
    "seconds",
    "variables",
    "rows",
    "programs",
    "improved",
}
Ready = tuple[Model, Coupling, Statistics]


@pytest.fixture(autouse=True)
def _few_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups here are narrow: a few turns and rounds are as good as many."""
    monkeypatch.setattr(decoupled, "MAX_SEARCH_STEPS", 8)
    monkeypatch.setattr(decoupled, "MAX_SOLVES", 3)
    monkeypatch.setattr(decoupled, "FLOPS_PER_GROUP", 2e8)


def _settings(**values: Any) -> Settings:
    given = {
        "macs": 0.5,
        "importance": "oamip",
        "mode": "decoupled",
        "solver": "highs",
        "workers": 1,
    }
    return Settings.create(**{**given, **values})


def _ready(
    proto: ModelProto, folder: Path, count: int = 64, arrays: Mapping[str, Array] | None = None
) -> Ready:
    folder.mkdir(exist_ok=True)
    model = load(proto, folder)
    coupling = couple(model)
    found = dataset.load(arrays or samples(model, count), model)
    assert found is not None
    collected = calibration.collect(model, coupling, found, "cpu", batch_size=16)
    feeds = [feed for _, feed in found.batches(16)]
    grams = covariances.collect(model, coupling, feeds, "cpu")
    return (
        model,
        coupling,
        Statistics({**collected.answers, COVARIANCE: grams}, count, "cpu"),
    )


def _score(ready: Ready, **values: Any) -> Scores:
    return decoupled.score(*ready, _settings(**values))


def _change(proto: ModelProto, changes: Mapping[str, Callable[[Array], Array]]) -> ModelProto:
    for tensor in proto.graph.initializer:
        if tensor.name in changes:
            value = changes[tensor.name](numpy_helper.to_array(tensor).copy())
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), tensor.name))
    return proto


def _group(coupling: Coupling, name: str) -> int:
    return next(i for i, group in enumerate(coupling.groups) if group.name == name)


def _problem(
    seed: int, outs: int, columns: Ints, others: int = 0, mean: float = 1.0, twist: float = 1.0
) -> Problem:
    """Correlated inputs of uneven size; ``twist`` above 1: they cancel each other in the outputs."""
    rng = np.random.default_rng(seed)
    d = columns.size + others
    place = rng.permutation(d)
    factor = rng.standard_normal((d, d)) * np.exp(0.5 * rng.standard_normal((d, 1)))
    covariance = factor @ factor.T / d
    weight = rng.standard_normal((outs, d))
    # Weights along which the inputs hardly vary: the sum is far quieter than its parts.
    if twist > 1:
        vectors = np.linalg.eigh(covariance)[1]
        weight = rng.standard_normal((outs, 2)) @ vectors[:, :2].T + weight / (10 * twist)
    scale = float(np.einsum("od,de,oe->", weight, covariance, weight))
    load = 1e-3 * float(np.trace(covariance)) / d
    return Problem(
        Consumer("node", 0, "x", 1, "w", 0),
        0,
        weight,
        covariance + load * np.eye(d),
        mean * rng.standard_normal(d),
        place[columns],
        np.arange(d)[:, None],
        scale,
        load,
    )


def _units(count: int, held: int = 1) -> Ints:
    return np.arange(count * held).reshape(count, held)


PROBLEMS: Mapping[str, Callable[[int], list[Problem]]] = {
    "one consumer": lambda s: [_problem(s, 6, _units(12))],
    "three consumers, taps, others": lambda s: [
        _problem(s, 6, _units(11)),
        _problem(s + 9, 3, _units(11, 2)),
        _problem(s + 99, 9, _units(11), 4),
    ],
    "cancelling": lambda s: [_problem(s, 3, _units(12), twist=3.0)],
    "cancelling with means": lambda s: [
        _problem(s, 3, _units(9), mean=3.0, twist=3.0),
        _problem(s + 9, 5, _units(9)),
    ],
    "a blind block": lambda s: [
        _problem(s, 4, _units(8)),
        _problem(s + 9, 4, np.zeros((8, 0), np.int64), 4),
    ],
}


def _loss(found: Sequence[Problem], keep: Bools, refit: str) -> float:
    """Relative loss of the consumers, averaged: weights after their repair, original moments."""
    total = 0.0
    for p in found:
        covariance = p.gram - p.ridge * np.eye(len(p.gram))
        apart = p.weight - compensate(p, np.flatnonzero(~keep), refit)[0]
        if refit == "least-squares":
            full = (
                np.einsum("od,de,oe->", apart, covariance, apart)
                + p.ridge * np.square(p.weight - apart).sum()
            )
            # With all units there the ridge moves weights too: that is not the units' loss.
            best = np.linalg.solve(p.gram, covariance @ p.weight.T).T
            rest = p.weight - best
            none = np.einsum("od,de,oe->", rest, covariance, rest) + p.ridge * np.square(best).sum()
            stays = np.ones(len(p.gram), bool)
            stays[p.columns[~keep]] = False
            fitted = np.zeros_like(p.weight)
            here = np.ix_(stays, stays)
            fitted[:, stays] = np.linalg.solve(p.gram[here], (covariance @ p.weight.T)[stays]).T
            gone = p.weight - fitted
            least = (
                np.einsum("od,de,oe->", gone, covariance, gone) + p.ridge * np.square(fitted).sum()
            )
            assert least <= full * (1 + 1e-9)
            total += float(least - none) / p.scale
            continue
        moments = p.gram if refit == "bias" else p.gram + np.outer(p.mean, p.mean)
        energy = np.einsum("od,de,oe->", p.weight, moments, p.weight)
        total += float(np.einsum("od,de,oe->", apart, moments, apart) / energy)
    return total / len(found)


# ----------------------------------------------------------------------------------------------------------- walks


@pytest.mark.parametrize("refit", REFITS)
@pytest.mark.parametrize("kind", PROBLEMS)
def test_sets_are_nested_and_are_the_top_scores(
    kind: str, refit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every share the set that was found is what the scores keep; a score is the loss at which units go."""
    for seed in range(2 if kind.startswith("cancelling") and refit != "least-squares" else 1):
        found = PROBLEMS[kind](seed)
        count = len(found[0].columns)
        steps: list[Bools] = []
        improve = decoupled._improve

        def recorded(*args: Any, to: list[Bools] = steps, call: Any = improve, **named: Any) -> Any:
            step = call(*args, **named)
            to.append(step.keep)
            return step

        with monkeypatch.context() as patch:
            patch.setattr(decoupled, "_improve", recorded)
            walk = decoupled._solve_group(found, count, "g", _settings(refit=refit))
        wanted = sorted(
            {max(1, round(share * count)) for share in decoupled.KEPT_SHARES} - {count},
            reverse=True,
        )
        assert [int(s.sum()) for s in steps] == wanted
        assert len(np.unique(walk.values)) == count
        assert (walk.values >= 0).all()
        assert (walk.values <= 1).all()
        height = 0.0
        ordered = np.sort(walk.values)
        for before, stays in pairwise([np.ones(count, bool), *steps, np.zeros(count, bool)]):
            assert not (stays & ~before).any()
            top = np.argsort(walk.values, kind="stable")[count - int(stays.sum()) :]
            np.testing.assert_array_equal(np.sort(top), np.flatnonzero(stays))
            height = max(height, min(1.0, _loss(found, stays, refit)))
            assert ordered[count - stays.sum() - 1] == pytest.approx(height, abs=2e-6)
        assert walk.record["programs"] == len(steps)
        assert walk.record["variables"] == count + 1
        assert walk.record["bound"] <= walk.record["objective"] * (1 + 1e-9)


def test_cancelling_problems_lose_less_with_fewer_units() -> None:
    """The cases above are what they are for: without repair a set may lose less than a part of it, or more than all."""
    found = PROBLEMS["cancelling"](0)
    keep = np.ones(12, bool)
    losses = []
    for unit in range(12):
        keep[unit] = False
        losses.append(_loss(found, keep, "bias"))
    assert max(losses) > 1.05
    assert min(np.diff(losses)) < -0.05


@pytest.mark.parametrize("refit", REFITS)
def test_sets_lose_less_than_those_of_other_methods(refit: str) -> None:
    """On the loss that the program is about, no order of removal known before does better."""
    for kind in ("one consumer", "three consumers, taps, others"):
        found = PROBLEMS[kind](3)
        count = len(found[0].columns)
        walk = decoupled._solve_group(found, count, "g", _settings(refit=refit))
        order, _ = obs.eliminate(found, count)
        loud = np.argsort(sum(decoupled.quadratic(p, refit == "bias").diagonal() for p in found))

        def losses(order: Ints, found: Sequence[Problem] = found) -> Floats:
            sets = [
                np.isin(np.arange(len(order)), order[-max(1, round(s * len(order))) :])
                for s in (0.8, 0.5, 0.3)
            ]
            return np.asarray([_loss(found, keep, refit) for keep in sets])

        mine = losses(np.argsort(walk.values))
        for other in (losses(order), losses(loud)):
            # Nested sets: one share's best is bound by the last one's, so allow a little.
            assert (mine <= 1.2 * other).all()
            assert mine.sum() <= 1.02 * other.sum()


@pytest.mark.parametrize("held", [1, 3])
def test_quadratic_form_equals_the_loss_of_a_consumer(held: int) -> None:
    """Q gives the relative loss of the outputs for sets, with covariances or with second moments."""
    rng = np.random.default_rng(held)
    p = _problem(held, 5, _units(6, held), others=2, mean=2.0)
    for centred in (True, False):
        q = decoupled.quadratic(p, centred)
        for keep in (np.zeros(6, bool), *(rng.random((5, 6)) < 0.5)):
            gone = (~keep).astype(np.float64)
            assert gone @ q @ gone == pytest.approx(
                _loss([p], keep, "bias" if centred else "none"), rel=1e-10
            )
    only = _problem(held, 5, _units(6, held))
    assert decoupled.quadratic(only, True).sum() == pytest.approx(1.0, rel=1e-12)


def test_loss_depends_on_the_refit() -> None:
    found = PROBLEMS["one consumer"](0)
    order = np.arange(12)
    loss = decoupled._loss(found, "least-squares", order)
    assert isinstance(loss, Repaired)
    np.testing.assert_allclose(
        loss.consumers[0].covariance + found[0].ridge * np.eye(12), found[0].gram, atol=1e-12
    )
    before = found[0].gram.copy()
    for refit, centred in (("bias", True), ("none", False)):
        other = decoupled._loss(found, refit, order)
        assert isinstance(other, decoupled.Quadratic)
        np.testing.assert_allclose(other.matrix, decoupled.quadratic(found[0], centred), atol=1e-14)
    np.testing.assert_array_equal(found[0].gram, before)


def test_proven_optimum_equals_enumeration() -> None:
    """If a record states an optimum, the sum over shares is within its gap of the losses of the best nested sets."""
    from itertools import combinations

    for refit in ("least-squares", "bias"):
        found = [_problem(1, 4, _units(8))]
        steps: list[tuple[Bools, Any]] = []
        improve = decoupled._improve

        def recorded(
            subset: Any,
            free: Bools,
            *rest: Any,
            to: list[Any] = steps,
            call: Any = improve,
            **named: Any,
        ) -> Any:
            step = call(subset, free, *rest, **named)
            to.append((free, subset.loss, step))
            return step

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoupled, "_improve", recorded)
            decoupled._solve_group(found, 8, "g", _settings(refit=refit))
        assert len(steps) == 7
        for free, loss, step in steps:
            best = np.inf
            for chosen in combinations(np.flatnonzero(free).tolist(), int(step.keep.sum())):
                keep = np.zeros(8, bool)
                keep[list(chosen)] = True
                best = min(best, loss.value(keep))
            assert step.bound <= best * (1 + 1e-6)
            assert best * (1 - 1e-9) <= step.value <= best * 1.02
            assert step.value == pytest.approx(loss.value(step.keep), rel=1e-12)


def test_zero_time_limit_still_gives_scores() -> None:
    """Without a single solve the first set stands, and nothing is claimed to be proven."""
    found = PROBLEMS["one consumer"](2)
    walk = decoupled._solve_group(found, 12, "g", _settings(time_limit=1e-9))
    assert walk.record["bound"] == 0
    assert walk.record["solver"] is None
    assert walk.record["status"] == "feasible"
    assert len(np.unique(walk.values)) == 12


@pytest.mark.parametrize(
    ("groups", "share"), [(1, 1.0), (5, 1.0), (8, 0.625), (10, 0.5), (100, 0.5)]
)
def test_many_groups_get_fewer_operations_each(
    groups: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Mapping[str, Any]] = []

    def recorded(*arguments: Any, call: Any = decoupled._improve, **limits: Any) -> Any:
        given.append(limits)
        return call(*arguments, **limits)

    monkeypatch.setattr(decoupled, "_improve", recorded)
    began = time.perf_counter()
    settings = _settings(time_limit=50.0)
    decoupled._solve_group(PROBLEMS["one consumer"](2), 12, "g", settings, groups=groups)
    ended = time.perf_counter()
    whole = share * decoupled.FLOPS_PER_GROUP
    assert given[0]["most_flops"] == pytest.approx(decoupled.ROOT_SHARE * whole, rel=1e-12)
    assert given[0]["flops"] == pytest.approx(whole / 45, rel=1e-12)
    # Every program has all of its time.
    assert all(began + 50 <= limits["deadline"] <= ended + 50 for limits in given)
    assert given[0]["deadline"] < given[-1]["deadline"]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("refit", REFITS)
def test_narrow_groups_are_scored(count: int, refit: str) -> None:
    walk = decoupled._solve_group(
        [_problem(count, 3, _units(count), others=1)], count, "g", _settings(refit=refit)
    )
    assert len(np.unique(walk.values)) == count
    assert ((walk.values >= 0) & (walk.values <= 1)).all()
    assert set(walk.record) == KEYS
    if count == 1:
        assert walk.record["programs"] == 0
        assert walk.record["reason"] == "nothing to choose"


# ---------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("net", "refit"),
    [
        *(("mlp", r) for r in REFITS),
        ("cnn", "bias"),
        ("residual", "least-squares"),
        ("residual", "bias"),
        ("grouped", "least-squares"),
        ("grouped", "none"),
        ("attention", "least-squares"),
        ("attention", "none"),
    ],
)
def test_scores_and_records_are_consistent(net: str, refit: str, tmp_path: Path) -> None:
    """Dense, convolved, residual, grouped and depthwise, attention."""
    model, coupling, statistics = ready = _ready(build(NETS[net]), tmp_path)
    found = _score(ready, refit=refit)
    assert found.method == "oamip"
    assert found.values.shape == (coupling.n_units,)
    assert ((found.values >= 0) & (found.values <= 1)).all()
    with_problems = [
        g
        for i, g in enumerate(coupling.groups)
        if problems(model, coupling, statistics[COVARIANCE], i)
    ]
    assert [p["group"] for p in found.programs] == [g.name for g in with_problems]
    for group, program in zip(with_problems, found.programs, strict=True):
        assert len(np.unique(found.values[group.units])) == len(group.units)
        assert set(program) == KEYS
        assert program["purpose"] == "importance"
        assert program["solver"] == "highs"
        assert program["variables"] == len(group.units) + 1
        assert program["gap"] >= 0
        assert program["status"] == (
            "optimal" if program["gap"] <= decoupled.RELATIVE_GAP else "feasible"
        )
        assert program["improved"] <= program["programs"]
    assert set(found.others) == (
        set() if refit == "least-squares" else {"activation", "obs", "l2", "other moments"}
    )
    for name, values in found.others.items():
        assert values.shape == found.values.shape
        assert np.isfinite(values).all()
        if name in ("activation", "l2"):
            np.testing.assert_array_equal(
                values, find(name).score(model, coupling, statistics, _settings()).values
            )
        if name == "obs":
            exact = find("obs").score(model, coupling, statistics, _settings()).values
            for group in with_problems:
                np.testing.assert_array_equal(
                    np.argsort(values[group.units]), np.argsort(exact[group.units])
                )


@pytest.mark.parametrize(("net", "refit"), [("residual", "least-squares"), ("grouped", "none")])
def test_scores_do_not_depend_on_the_number_of_workers(
    net: str, refit: str, tmp_path: Path
) -> None:
    ready = _ready(build(NETS[net]), tmp_path)
    one, two = (_score(ready, refit=refit, workers=n) for n in (1, 2))
    np.testing.assert_array_equal(one.values, two.values)
    for a, b in zip(one.programs, two.programs, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"
        }
    assert one.notes == two.notes
    for name, values in one.others.items():
        np.testing.assert_array_equal(values, two.others[name])


@pytest.mark.parametrize("refit", ["least-squares", "none"])
def test_program_size_does_not_depend_on_the_number_of_samples(refit: str, tmp_path: Path) -> None:
    most = 1 + len(decoupled.KEPT_SHARES) * (2 + 2 * decoupled.MAX_SOLVES)
    sizes = []
    for count in (64, 256):
        found = _score(_ready(build(MLP), tmp_path, count), refit=refit)
        sizes.append([p["variables"] for p in found.programs])
        assert all(p["rows"] <= most for p in found.programs)
    assert sizes == [[13, 11], [13, 11]]


@pytest.mark.parametrize("refit", REFITS)
def test_groups_without_second_moments_use_their_activation(refit: str, tmp_path: Path) -> None:
    model, coupling, statistics = ready = _ready(build(ATTENTION), tmp_path)
    found = _score(ready, refit=refit)
    assert found.notes == (
        "1 groups have no consumer with second moments, so activation scores stand in (wq)",
    )
    plain = activation.score(model, coupling, statistics, _settings()).values
    names = [group.name for group in coupling.groups]
    assert [p["group"] for p in found.programs] == [n for n in names if n != "wq"]
    units = coupling.groups[_group(coupling, "wq")].units
    np.testing.assert_allclose(found.values[units], plain[units] / plain[units].max(), rtol=1e-12)
    # No moments at all: every group.
    bare = replace(statistics, answers={**statistics.answers, COVARIANCE: {}})
    found = _score((model, coupling, bare), refit=refit)
    assert found.programs == ()
    assert found.notes[0].startswith(f"{len(names)} groups have no consumer")
    for group in coupling.groups:
        np.testing.assert_array_equal(
            np.argsort(found.values[group.units]), np.argsort(plain[group.units])
        )
        assert found.values[group.units].max() == pytest.approx(1.0)


@pytest.mark.parametrize("refit", REFITS)
def test_permuted_channels_have_permuted_scores(refit: str, tmp_path: Path) -> None:
    turn = np.random.default_rng(4).permutation(12)
    plain = _ready(build(MLP), tmp_path / "a")
    changes: Mapping[str, Callable[[Array], Array]] = {
        "w1": lambda w: w[:, turn],
        "b1": lambda b: b[turn],
        "w2": lambda w: w[turn],
    }
    turned = _ready(_change(build(MLP), changes), tmp_path / "b")
    a, b = _score(plain, refit=refit).values, _score(turned, refit=refit).values
    first = plain[1].axes["h", 1]
    np.testing.assert_allclose(b[turned[1].axes["h", 1]], a[first][turn], rtol=1e-3, atol=1e-6)
    second = plain[1].axes["r", 1]
    np.testing.assert_allclose(b[turned[1].axes["r", 1]], a[second], rtol=1e-3, atol=1e-6)


def _set(unit: int, value: float) -> Callable[[Array], Array]:
    def change(held: Array) -> Array:
        held[..., unit] = value
        return held

    return change


@pytest.mark.parametrize("refit", REFITS)
def test_dead_unit_scores_lowest(refit: str, tmp_path: Path) -> None:
    """A unit that is never active, and one without consumers."""
    silent: Mapping[str, Callable[[Array], Array]] = {"w1": _set(7, 0.0), "b1": _set(7, -2.0)}
    ready = _ready(_change(build(MLP), silent), tmp_path / "a", 256)
    units = ready[1].axes["h", 1]
    values = _score(ready, refit=refit).values
    assert np.argmin(values[units]) == 7

    def unheard(held: Array) -> Array:
        held[7] = 0
        return held

    if refit != "least-squares":  # there it may still help to repair others
        ready = _ready(_change(build(MLP), {"w2": unheard}), tmp_path / "b", 256)
        assert np.argmin(_score(ready, refit=refit).values[ready[1].axes["h", 1]]) == 7


def test_constant_unit_is_removed_first_if_its_mean_is_folded(tmp_path: Path) -> None:
    """Always 2: of no account once the mean is in the bias, of much without a refit."""
    always: Mapping[str, Callable[[Array], Array]] = {"w1": _set(3, 0.0), "b1": _set(3, 2.0)}
    ready = _ready(_change(build(MLP), always), tmp_path, 256)
    units = ready[1].axes["h", 1]
    assert np.argmin(_score(ready, refit="least-squares").values[units]) == 3
    bias, none = (_score(ready, refit=r) for r in ("bias", "none"))
    assert np.argmin(bias.values[units]) == 3
    assert np.argsort(np.argsort(none.values[units]))[3] >= 6
    # Each offers the order by the other's moments.
    assert np.argmin(none.others["other moments"][units]) == 3
    assert np.argsort(np.argsort(bias.others["other moments"][units]))[3] >= 6


def test_one_of_two_equal_units_is_removed_early(tmp_path: Path) -> None:
    """The other then does both their work: only where consumers are repaired, for both are heard well."""

    def twin(held: Array) -> Array:
        held[..., 5] = held[..., 2]
        return held

    def louder(held: Array) -> Array:
        held[[2, 5]] *= 2
        return held

    loud: Mapping[str, Callable[[Array], Array]] = {"w1": twin, "b1": twin, "w2": louder}
    ready = _ready(_change(build(MLP), loud), tmp_path, 400)
    units = ready[1].axes["h", 1]
    values = _score(ready).values[units]
    assert np.argsort(np.argsort(values))[[2, 5]].min() <= 1
    assert values[[2, 5]].min() < 0.1 * values[[2, 5]].max()
    plain = _score(ready, refit="bias").values[units]
    assert np.argsort(np.argsort(plain))[[2, 5]].min() > 1


# --------------------------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize("refit", REFITS)
@pytest.mark.parametrize("net", ["mlp", "attention"])
def test_scores_are_permuted_within_groups_only(net: str, refit: str, tmp_path: Path) -> None:
    """With several measured orders, the values of a group are the program's, assigned in the order chosen."""
    model = load(build(NETS[net]), tmp_path)
    coupling = couple(model)
    found = dataset.load(samples(model, 400), model)
    assert found is not None
    settings = _settings(refit=refit)
    context = Context(
        model, coupling, found, None, "cpu", settings, objectives.of_samples(model, found)
    )
    own = decoupled.score(
        model, coupling, collect(context, find("oamip").requests(settings)), settings
    )
    result = scoring.score(context)
    assert result.method == "oamip"
    assert not result.others
    assert result.programs[0]["purpose"] == "importance"
    for group in coupling.groups:
        np.testing.assert_array_equal(
            np.sort(result.values[group.units]), np.sort(own.values[group.units])
        )
    assert result.notes[: len(own.notes)] == own.notes
    if refit == "least-squares":
        assert result.notes == own.notes
        np.testing.assert_array_equal(result.values, own.values)
        return
    assert len(result.notes) == len(own.notes) + 1
    reported = result.notes[-1]
    assert reported.startswith("orders of removal measured on 100 samples; least loss by groups: ")
    orders = {"the program": own.values, **own.others}
    counts = dict.fromkeys(orders, 0)
    for part in reported.partition("groups: ")[2].split(", "):
        name, _, number = part.rpartition(" ")
        counts[name] = int(number)
    assert sum(counts.values()) == len(coupling.groups)
    for group in coupling.groups:  # each group has one of the orders, of those that were told
        dealt = np.argsort(result.values[group.units], kind="stable")
        same = [
            n
            for n, o in orders.items()
            if np.array_equal(dealt, np.argsort(o[group.units], kind="stable"))
        ]
        assert any(counts[name] for name in same)


def test_choices_are_measured_on_samples_outside_the_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(build(MLP), tmp_path)
    coupling = couple(model)
    arrays = samples(model, 400)
    found = dataset.load(arrays, model)
    assert found is not None
    settings = _settings(refit="none")
    seen: list[Sequence[Mapping[str, Array]]] = []
    choose = sensitivity.choose

    def recorded(*args: Any, **named: Any) -> Ints:
        seen.append(args[4])
        assert named["repair"] == "none"
        return choose(*args, **named)

    monkeypatch.setattr(sensitivity, "choose", recorded)
    scoring.score(
        Context(model, coupling, found, None, "cpu", settings, objectives.of_samples(model, found))
    )
    fitted, _ = parts(found)
    used = {row.tobytes() for row in fitted.arrays["x"]}
    rows = {row.tobytes() for batch in seen[0] for row in batch["x"]}
    assert len(rows) >= 32
    assert not used & rows
