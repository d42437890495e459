"""Importance methods: what every one promises, and the simple ones against loops over single units."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import objectives
import pytest
from graphs import NETS, activations, build, load, samples
from onnx import ModelProto, numpy_helper

from onnx_oamip import prune
from onnx_oamip.core.errors import EnvironmentMissing, SettingsError
from onnx_oamip.core.records import (
    Array,
    Coupling,
    Model,
    Scores,
    Statistics,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.graph.coupling import couple
from onnx_oamip.importance import find, names, registry
from onnx_oamip.published.dependence import pooled_activations
from onnx_oamip.published.dependence.requests import POOLED_ACTIVATIONS
from onnx_oamip.published.nnrelief import absolute_signal
from onnx_oamip.published.nnrelief.requests import ABSOLUTE_ACTIVATIONS
from onnx_oamip.statistics import calibration, covariances
from onnx_oamip.statistics.requests import CLASS_SAMPLES, COVARIANCE, MOMENTS, RELEVANCE

SETTINGS = Settings.create(macs=0.5, device="cpu")


def _statistics(model: Model, coupling: Coupling, arrays: dict[str, Array]) -> Statistics:
    """Everything that a method may ask for."""
    found = dataset.load(arrays, model)
    assert found is not None
    moments = calibration.collect(model, coupling, found, "cpu")
    feeds = [feed for _, feed in found.batches(32)]
    grams = covariances.collect(model, coupling, feeds, "cpu", seed=0)
    few = objectives.class_samples(model, found, 1, 0)
    heard = absolute_signal.collect(model, coupling, found, "cpu")
    seen = pooled_activations.collect(model, coupling, found, "cpu")
    answers = {
        MOMENTS: moments.moments,
        RELEVANCE: {},
        COVARIANCE: grams,
        CLASS_SAMPLES: few,
        ABSOLUTE_ACTIVATIONS: heard,
        POOLED_ACTIVATIONS: seen,
    }
    return Statistics(answers, moments.samples, moments.device)


def _score(name: str, model: Model, coupling: Coupling, arrays: dict[str, Array]) -> Scores:
    method = find(name)
    wanted = method.requests(SETTINGS)
    if not wanted:
        return method.score(model, coupling, None, SETTINGS)
    every = _statistics(model, coupling, arrays)
    # Nothing but what the method requests: reading anything else raises.
    statistics = replace(every, answers={request: every.answers[request] for request in wanted})
    return method.score(model, coupling, statistics, SETTINGS)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", names())
def test_every_method_meets_the_score_contract(tmp_path: Path, name: str, net: str) -> None:
    model = load(build(NETS[net]), tmp_path)
    coupling = couple(model)
    arrays = samples(model, 40)
    found = _score(name, model, coupling, arrays)
    assert found.method == name
    assert found.values.shape == (coupling.n_units,)
    assert found.values.dtype == np.float64
    assert np.isfinite(found.values).all()
    assert (found.values >= 0).all()
    # Scores that tell nothing apart would satisfy all of the above.
    assert len(np.unique(found.values)) > coupling.n_units / 2
    np.testing.assert_array_equal(found.values, _score(name, model, coupling, arrays).values)


def test_every_method_is_described() -> None:
    assert "obs" in names()
    for name in names():
        method = find(name)
        assert name == name.lower()
        assert method.summary
        assert not method.summary.endswith(".")


def test_random_scores_depend_on_the_seed_only(tmp_path: Path) -> None:
    model = load(build(NETS["mlp"]), tmp_path)
    coupling = couple(model)
    first, same, other = (
        find("random").score(model, coupling, None, Settings.create(macs=0.5, seed=s)).values
        for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)
    assert ((first > 0) & (first < 1)).all()


# ------------------------------------------------------------------------------------------ loops over single units

WEIGHTS = {
    "mlp": ("w1", "w2", "w3"),
    "cnn": ("w1", "w2", "w3"),
    "residual": ("w1", "w2", "w3", "w4"),
    "grouped": ("w1", "w2", "w3", "w4"),
    "attention": ("we", "wq", "wk", "wv", "wo", "wy"),
}


def _members(model: Model, coupling: Coupling, unit: int) -> Iterator[tuple[str, int, int]]:
    for (tensor, axis), labels in coupling.axes.items():
        for index in np.flatnonzero(labels == unit):
            yield tensor, axis, int(index)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("name", "power"), [("l1", 1), ("l2", 2)])
def test_norms_cover_all_weights_of_a_unit(tmp_path: Path, net: str, name: str, power: int) -> None:
    model = load(build(NETS[net]), tmp_path)
    coupling = couple(model)
    scores = _score(name, model, coupling, {}).values
    assert coupling.n_units > 0
    for unit in range(coupling.n_units):
        total = 0.0
        for tensor, axis, index in _members(model, coupling, unit):
            if tensor in WEIGHTS[net]:
                part = np.take(model.constants[tensor].astype(np.float64), index, axis)
                total += float((np.abs(part) ** power).sum())
        assert scores[unit] == pytest.approx(total ** (1 / power), rel=1e-6)


def _column(model: Model, node: str, weight: str, channel: int, channels: int) -> Array:
    """The weights that meet one input channel of a node."""
    value = model.constants[weight].astype(np.float64)
    found = next(n for n in model.nodes if n.name == node)
    if found.op != "Conv":
        return value[channel]
    groups = int(found.attrs.get("group", 1))
    per_in, per_out = channels // groups, value.shape[0] // groups
    block = channel // per_in
    return value[block * per_out : (block + 1) * per_out, channel % per_in]


@pytest.mark.parametrize("net", ["mlp", "cnn", "residual", "grouped"])
def test_activation_score_is_the_energy_share_at_the_consumers(tmp_path: Path, net: str) -> None:
    model = load(build(NETS[net]), tmp_path)
    coupling = couple(model)
    arrays = samples(model, 40)
    scores = _score("activation", model, coupling, arrays).values
    values = activations(model, arrays, sorted({c.data for c in coupling.consumers}))
    expected = np.zeros(coupling.n_units)
    assert coupling.consumers
    for consumer in coupling.consumers:
        x = np.moveaxis(values[consumer.data].astype(np.float64), consumer.axis, 0)
        assert consumer.weight is not None
        energy = [
            np.square(x[c]).mean()
            * np.square(_column(model, consumer.node, consumer.weight, c, len(x))).sum()
            for c in range(len(x))
        ]
        for c, unit in enumerate(coupling.axes[consumer.data, consumer.axis].tolist()):
            if unit >= 0:
                expected[unit] += energy[c] / sum(energy)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_activation_score_where_two_activations_meet(tmp_path: Path) -> None:
    """A slot of attention scores is worth what its queries times its keys carry."""
    model = load(build(NETS["attention"]), tmp_path)
    coupling = couple(model)
    arrays = samples(model, 40)
    scores = _score("activation", model, coupling, arrays).values
    values = activations(model, arrays, ["qt", "kt"])
    q = np.square(values["qt"].astype(np.float64)).mean(axis=(0, 1, 2))
    k = np.square(values["kt"].astype(np.float64)).mean(axis=(0, 1, 3))
    units = coupling.axes["qt", 3]
    np.testing.assert_allclose(scores[units], q * k / (q * k).sum(), rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- equivariance


def _permuted(proto: ModelProto, axes: dict[str, tuple[int, int]], order: Array) -> ModelProto:
    """Hidden channels in another order: ``axes`` says along which axis of each constant, and how many copies."""
    result = ModelProto()
    result.CopyFrom(proto)
    for tensor in result.graph.initializer:
        if tensor.name in axes:
            axis, per_channel = axes[tensor.name]
            full = (order[:, None] * per_channel + np.arange(per_channel)).reshape(-1)
            value = np.take(numpy_helper.to_array(tensor), full, axis)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), tensor.name))
    return result


PERMUTED = {
    "mlp": ({"w1": (1, 1), "b1": (0, 1), "w2": (0, 1)}, "w1", 1),
    "cnn": (dict.fromkeys(("w2", "gain", "b2", "m", "var"), (0, 1)) | {"w3": (0, 16)}, "w2", 0),
    "residual": ({"w1": (0, 1), "w2": (1, 1), "w3": (0, 1), "w4": (0, 1)}, "w1", 0),
}


@pytest.mark.parametrize("net", PERMUTED)
@pytest.mark.parametrize("name", [n for n in names() if n != "random"])
def test_permuted_channels_have_permuted_scores(tmp_path: Path, name: str, net: str) -> None:
    axes, weight, axis = PERMUTED[net]
    proto = build(NETS[net])
    model = load(proto, tmp_path)
    coupling = couple(model)
    units = coupling.axes[weight, axis]
    order = np.random.default_rng(1).permutation(len(units))
    turned = load(_permuted(proto, axes, order), tmp_path)
    recoupled = couple(turned)
    arrays = samples(model, 40, 1)  # with others two choices are worth the same
    before = _score(name, model, coupling, arrays).values
    after = _score(name, turned, recoupled, arrays).values
    # Position i of the turned layer holds what was at order[i]; other layers keep their places.
    np.testing.assert_allclose(after[recoupled.axes[weight, axis]], before[units[order]], rtol=1e-4)
    others = np.setdiff1d(np.arange(coupling.n_units), units)
    np.testing.assert_allclose(
        np.sort(after[np.setdiff1d(np.arange(coupling.n_units), recoupled.axes[weight, axis])]),
        np.sort(before[others]),
        rtol=1e-4,
    )


# ------------------------------------------------------------------------------------------------------ what it means


@pytest.mark.parametrize("name", ["obs", "activation", "l2", "l1"])
def test_dead_unit_scores_lowest(tmp_path: Path, name: str) -> None:
    """A unit whose weights are all zero carries nothing: no method may prefer it to any other."""
    proto = build(NETS["mlp"])
    for tensor in proto.graph.initializer:
        if tensor.name in ("w1", "b1", "w2"):
            value = numpy_helper.to_array(tensor).copy()
            value[(slice(None), 5) if tensor.name == "w1" else 5] = 0
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    model = load(proto, tmp_path)
    coupling = couple(model)
    scores = _score(name, model, coupling, samples(model, 60)).values
    units = coupling.axes["w1", 1]
    assert np.argmin(scores[units]) == 5


# ------------------------------------------------------------------------------------------------ methods of others


def backwards(
    model: Model, coupling: Coupling, statistics: Statistics | None, settings: Settings
) -> Scores:
    """Later units first."""
    assert statistics is not None, "a bare rule is given moments"
    return Scores("backwards", np.arange(coupling.n_units, dtype=np.float64))


def test_registered_method_prunes(separate_registry: None, tmp_path: Path) -> None:
    registry.register("backwards", backwards)
    assert find("backwards").summary == "Later units first"
    proto = build(
        "(float[N,6] x) => (float[N,3] y) <float[6,12] a, float[12,3] b> {"
        " h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }"
    )
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    data = {"x": np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)}
    asked = Settings.create(
        macs=0.5, importance="backwards", allocate="uniform", refit="none", align=1, force=True
    )
    report = prune(tmp_path / "m.onnx", data, None, asked)
    assert report.plan.keep.tolist() == [False] * 6 + [True] * 6
    with pytest.raises(SettingsError, match="is registered already"):
        registry.register("backwards", backwards)
    with pytest.raises(SettingsError, match="is registered already"):
        registry.register("obs", backwards)


def test_method_of_an_installed_package_is_found(
    separate_registry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = registry.REGISTRY.group
    points = [
        EntryPoint("theirs", f"{__name__}:backwards", group),
        EntryPoint("broken", "no_such_module:rule", group),
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda **_: points)
    monkeypatch.setattr(
        EntryPoint, "load", lambda p: backwards if p.name == "theirs" else exec("import no_such")
    )
    assert {"obs", "theirs", "broken"} <= set(names())
    assert find("theirs").score is backwards
    with pytest.raises(
        EnvironmentMissing, match="'broken' of no_such_module:rule cannot be loaded"
    ):
        find("broken")
    with pytest.raises(
        SettingsError, match=r"`importance='other'` is unknown; choose one of .*theirs"
    ):
        find("other")


def test_installed_packages_are_read_for_unknown_names_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points = [EntryPoint("theirs", f"{__name__}:backwards", registry.REGISTRY.group)]
    asked: list[object] = []
    monkeypatch.setattr(metadata, "entry_points", lambda **given: asked.append(given) or points)
    assert "obs" in registry.REGISTRY
    assert not asked
    assert "theirs" in registry.REGISTRY
    assert "other" not in registry.REGISTRY
    assert len(asked) == 2


def test_published_methods_come_from_entry_points_of_this_distribution() -> None:
    """A fresh install finds them without an import of the published systems by the rooms below them."""
    points = metadata.entry_points(group="onnx_oamip.importance")
    values = {point.name: point.value for point in points if point.dist.name == "onnx-oamip"}
    module = "onnx_oamip.published.methods"
    assert values == {
        "correlation": f"{module}:CORRELATION",
        "mint": f"{module}:MINT",
        "nnrelief": f"{module}:NNRELIEF",
        "snacs": f"{module}:SNACS",
    }
    assert names()[:6] == ["obs", "activation", "l2", "l1", "oamip", "random"]
    assert names() == list(dict.fromkeys(names()))


def test_help_of_all_methods_imports_no_rule() -> None:
    program = (
        "import sys; from onnx_oamip.cli import main; main(['prune', '--help']); "
        "heavy = {'onnx', 'onnxruntime', 'scipy', 'sklearn'}; sys.exit(len(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "snacs, conditional mutual" in " ".join(done.stdout.split())
    assert done.returncode == 0, done.stderr
