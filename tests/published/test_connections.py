"""Pruning by connections: the same network with zeros, its refit against direct solutions, rounds, budgets, files."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import NETS, build, constants, distance, feed
from graphs import load as load_case
from onnx import ModelProto, numpy_helper

from onnx_oamip import prune
from onnx_oamip.cli import main
from onnx_oamip.core.errors import BudgetNotMet
from onnx_oamip.core.records import Array, Budget, Report
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.planning import iterative
from onnx_oamip.published.nnrelief import absolute_signal, masked_ridge
from onnx_oamip.published.nnrelief.connection_shares import layers as connection_layers
from onnx_oamip.published.nnrelief.selection import Rules
from onnx_oamip.reporting import documents

CHAIN = """(float[batch,1,10,10] image) => (float[batch,4] scores)
<float[10,1,3,3] w1, float[10] b1, float[14,10,3,3] w2, float[14] b2, float[126,20] w3, float[20] b3, float[20,4] w4,
 float[4] b4> {
    a = Conv(image, w1, b1)
    h = Relu(a)
    c = Conv<strides = [2, 2]>(h, w2, b2)
    r = Relu(c)
    f = Flatten(r)
    d = MatMul(f, w3)
    e = Add(d, b3)
    t = Relu(e)
    scores = Gemm(t, w4, b4)
}"""


def folder(path: Path, text: str = CHAIN, count: int = 240) -> Path:
    """model.onnx and data.npz, the data with the model's own classes as labels."""
    (path / "model.onnx").write_bytes(build(text).SerializeToString())
    model = models.load(path / "model.onnx")
    values = feed(model, 1, count)
    found = Session(model.proto, "cpu").run(values)[0]
    extra = {"labels": found.argmax(axis=1)} if found.ndim == 2 else {}
    np.savez(path / "data.npz", **values, **extra)
    return path


def settings(**values: object) -> Settings:
    quick = {"importance": "nnrelief", "granularity": "connection", "device": "cpu"}
    return Settings.create(**{**quick, **values})


def run(path: Path, **values: object) -> Report:
    return prune(path / "model.onnx", path / "data.npz", path / "out.onnx", settings(**values))


def operands(proto: ModelProto) -> dict[tuple[str, int], Array]:
    held = constants(proto)
    return {
        (n.name, i): held[t] for n in proto.graph.node for i, t in enumerate(n.input) if t in held
    }


@pytest.mark.parametrize("net", ["chain", "residual", "grouped", "attention", "cnn"])
def test_without_refit_the_result_is_the_original_with_zeros(tmp_path: Path, net: str) -> None:
    path = folder(tmp_path, CHAIN if net == "chain" else NETS[net], 60)
    found = run(path, alpha=0.7, refit="none")
    original = models.load(path / "model.onnx")
    written = onnx.load(path / "out.onnx")
    before, after = operands(original.proto), operands(written)
    assert before.keys() == after.keys()
    gone = 0
    for key, value in after.items():
        stays = (value != 0) | (before[key] == 0)
        np.testing.assert_array_equal(value[stays], before[key][stays])
        gone += int((~stays).sum())
    assert gone
    assert found.connections is not None
    # Normalisation may be silenced too.
    assert found.connections.total - found.connections.kept <= gone
    # Masking what the rules drop by hand gives the same outputs, bit for bit.
    coupling = couple(original)
    samples = dataset.hold_out(dataset.load(path / "data.npz", original), 0)[0]
    signal = absolute_signal.collect(original, coupling, samples, "cpu")
    layers = connection_layers(original, coupling, signal)
    chosen = Rules(original, coupling, signal, layers).select(0.7)
    for layer in layers:
        if layer.prunable:
            kept = int(chosen.masks[layer.site.node.name].weights.sum())
            value = after[layer.site.node.name, layer.site.weight_slot]
            per = value.size // layer.shares.size
            assert int(np.count_nonzero(value)) == kept * per
    assert not np.isnan(found.verification.output_relative_error or 0.0)


def test_kernels_are_removed_as_a_whole(tmp_path: Path) -> None:
    run(folder(tmp_path), alpha=0.6)
    after = constants(onnx.load(tmp_path / "out.onnx"))
    zero = (after["w2"] == 0).reshape(14, 10, 9)
    assert (zero.all(axis=2) == zero.any(axis=2)).all()
    assert 0 < zero.mean() < 1


@pytest.mark.parametrize("count", [3, 40])
def test_least_squares_on_a_support_equals_direct_solves(count: int) -> None:
    rng = np.random.default_rng(count)
    x, r = rng.standard_normal((2, 60, 12)), rng.standard_normal((2, 60, count))
    support = rng.random((2, count, 12)) < 0.4
    support[0, 0] = False
    found = masked_ridge.masked_solver(x, r, 50, support)(50, 0.1)
    for g in range(2):
        a, b = x[g, :50] - x[g, :50].mean(axis=0), r[g, :50] - r[g, :50].mean(axis=0)
        strength = 0.1 * np.square(a).sum(axis=0).mean()
        for o in range(count):
            s = np.flatnonzero(support[g, o])
            direct = np.zeros(12)
            direct[s] = np.linalg.solve(
                a[:, s].T @ a[:, s] + strength * np.eye(len(s)), a[:, s].T @ b[:, o]
            )
            np.testing.assert_allclose(found[g, :, o], direct, atol=1e-9)


def test_conjugate_gradients_equal_direct_solves(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 50)) @ rng.standard_normal((50, 50))
    gram, cross = x.T @ x, x.T @ rng.standard_normal((400, 30))
    support = rng.random((30, 50)) < 0.8
    direct = masked_ridge.solve_masked(gram, cross, support, 0.1)
    monkeypatch.setattr(masked_ridge, "DEARER", 1e9)
    turned = masked_ridge.solve_masked(gram, cross, support, 0.1)
    assert not np.array_equal(turned, direct)
    np.testing.assert_allclose(turned, direct, atol=1e-4 * np.abs(direct).max())
    assert not turned[~support.T].any()


def test_refit_reduces_the_error_and_revives_no_connection(tmp_path: Path) -> None:
    folder(tmp_path)
    errors, zeros = {}, {}
    for refit in ("none", "bias", "least-squares"):
        found = run(tmp_path, alpha=0.6, refit=refit)
        errors[refit] = found.verification.output_relative_error
        zeros[refit] = {
            k: v == 0
            for k, v in constants(onnx.load(tmp_path / "out.onnx")).items()
            if k.startswith("w")
        }
        assert all(fit.error_after <= fit.error_before for fit in found.fits)
    assert errors["least-squares"] < errors["bias"] < errors["none"]
    for name, zero in zeros["none"].items():
        np.testing.assert_array_equal(zeros["least-squares"][name], zero)


def test_iterations_only_remove_connections(tmp_path: Path) -> None:
    found = run(folder(tmp_path), alpha=0.8, iterations=4)
    assert found.connections is not None
    kept = [r.kept for r in found.connections.rounds]
    assert len(kept) == 4
    assert all(a > b for a, b in pairwise(kept))
    assert found.connections.kept == kept[-1]
    document = documents.document(found)["connections"]
    assert document["compression"] == pytest.approx(found.connections.total / kept[-1])
    weights = {k: v for k, v in constants(onnx.load(tmp_path / "out.onnx")).items() if k[0] in "wb"}
    assert kept[-1] == sum(int(np.count_nonzero(v)) for v in weights.values())
    assert found.connections.total == sum(v.size for v in constants(build(CHAIN)).values())


@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_connection_share_budget_is_met(tmp_path: Path, allocate: str) -> None:
    found = run(folder(tmp_path), params=0.3, iterations=3, allocate=allocate)
    assert found.connections is not None
    share = found.connections.kept / found.connections.total
    assert 0.25 < share <= 0.3
    steps = [r.kept / found.connections.total for r in found.connections.rounds]
    np.testing.assert_allclose(steps, [0.3 ** (1 / 3), 0.3 ** (2 / 3), 0.3], atol=0.05)


def test_share_below_one_connection_per_unit_is_refused(tmp_path: Path) -> None:
    folder(tmp_path)
    with pytest.raises(BudgetNotMet, match=r"`params=0\.001` cannot be met"):
        run(tmp_path, params=0.001, allocate="uniform")
    assert not (tmp_path / "out.onnx").exists()


def test_max_drop_limits_connection_pruning(tmp_path: Path) -> None:
    found = run(folder(tmp_path), max_drop=10)
    v = found.verification
    assert v.accuracy_before is not None
    assert v.accuracy_after is not None
    assert v.accuracy_before - v.accuracy_after <= 0.1 + 1e-9
    assert found.connections is not None
    assert found.connections.kept < 0.8 * found.connections.total


def test_sparse_constants_load_everywhere(tmp_path: Path) -> None:
    folder(tmp_path)
    dense = run(tmp_path, params=0.1)
    before = (tmp_path / "out.onnx").read_bytes()
    thin = run(tmp_path, params=0.1, sparse=True)
    written = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(written)
    assert len(written.graph.sparse_initializer)
    assert thin.after.bytes < 0.7 * dense.after.bytes == 0.7 * len(before)
    values = feed(models.load(tmp_path / "model.onnx"), 5, 6)
    results = [
        Session(proto, "cpu").run(values) for proto in (onnx.load_from_string(before), written)
    ]
    assert distance(*results) < 1e-6
    again = models.load(tmp_path / "out.onnx")
    assert couple(again).n_units == couple(models.load(tmp_path / "model.onnx")).n_units


def test_units_without_connections_can_be_removed(tmp_path: Path) -> None:
    """A thinned model, pruned by units at alpha 1, loses them and nothing else."""
    folder(tmp_path)
    thin = run(tmp_path, params=0.05, iterations=2)
    empty = int((~thin.plan.keep).sum())
    assert empty
    (tmp_path / "model.onnx").write_bytes((tmp_path / "out.onnx").read_bytes())
    small = run(tmp_path, alpha=1.0, granularity="unit", refit="none", align=1, allocate="uniform")
    assert int((~small.plan.keep).sum()) >= empty
    assert small.verification.output_relative_error is not None
    assert small.verification.output_relative_error < 1e-5


# ------------------------------------------------------------------------------------------------ rounds over units


def test_alpha_prunes_units_over_iterations(tmp_path: Path) -> None:
    folder(tmp_path)
    widths = []
    for n in (1, 3):
        found = run(tmp_path, alpha=0.5, granularity="unit", iterations=n, align=1)
        widths.append(found.plan.widths)
        assert found.verification.masked_equivalence is not None
        assert (found.plan.widths >= 1).all()
    assert (widths[1] <= widths[0]).all()
    assert widths[1].sum() < widths[0].sum() < couple(models.load(tmp_path / "model.onnx")).n_units


@pytest.mark.parametrize("importance", ["nnrelief", "activation"])
def test_iterations_approach_a_counted_budget(tmp_path: Path, importance: str) -> None:
    folder(tmp_path)
    found = run(
        tmp_path,
        macs=0.4,
        granularity="unit",
        iterations=3,
        align=1,
        importance=importance,
        allocate="uniform",
    )
    assert found.after.macs <= 0.4 * found.before.macs
    assert (found.scores.values[~found.plan.keep] <= np.max(found.scores.values)).all()


def test_units_of_a_pruned_model_are_mapped_to_the_original(tmp_path: Path) -> None:
    model = load_case(build(NETS["residual"]), tmp_path)
    coupling = couple(model)
    rng = np.random.default_rng(3)
    keep = rng.random(coupling.n_units) < 0.6
    keep[[g.units[0] for g in coupling.groups]] = True
    from onnx_oamip.graph.surgery import rewrite

    part = models.from_proto(rewrite.cut(model, coupling, keep), model.bindings)
    found = iterative.units(coupling, couple(part), keep)
    np.testing.assert_array_equal(np.sort(found), np.flatnonzero(keep))
    values = iterative.below(np.ones(coupling.n_units), keep, found, np.full(len(found), 5.0))
    np.testing.assert_array_equal(values, np.where(keep, 5.0, 0.0))


@pytest.mark.parametrize(
    "values", [[-3.0, -1.0, -2.0, -4.0], [0.0, 2.0, 1.0, 3.0], [0.5, 2.0, 1.0, 3.0]]
)
def test_removed_units_score_below_all_others(values: list[float]) -> None:
    """A method may score below 0; what was removed must not rank above what remains."""
    keep = np.asarray([True, False, True, False, True, True])
    found = iterative.below(np.full(6, 9.0), keep, np.asarray([0, 2, 4, 5]), np.asarray(values))
    np.testing.assert_array_equal(found[keep], values)
    assert found[~keep].max() < min(values)
    assert found[~keep].max() <= 0


# ---------------------------------------------------------------------------------------------------- bad requests

BAD = {
    "another importance": ("--granularity connection --alpha 0.9", "--importance nnrelief"),
    "a budget of units": ("--granularity connection --importance nnrelief --macs 0.5", "--macs"),
    "two budgets": (
        "--granularity connection --importance nnrelief --alpha 0.9 --params 0.5",
        "--alpha and --params",
    ),
    "alpha of another": ("--importance l2 --alpha 0.9 --macs 0.5", "--alpha"),
    "alpha of 0": ("--importance nnrelief --alpha 0", "--alpha"),
    "alpha above 1": ("--importance nnrelief --alpha 1.5", "--alpha"),
    "sparse units": ("--importance nnrelief --alpha 0.9 --sparse", "--sparse"),
    "rounds to a drop": ("--importance nnrelief --max-drop 1 --iterations 3", "--max-drop"),
    "no rounds": ("--importance nnrelief --alpha 0.9 --iterations 0", "--iterations"),
    "an unknown granularity": ("--granularity kernel --alpha 0.9", "--granularity"),
    "nothing to say how much": ("--importance nnrelief", "nothing says how much"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_requests_are_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    folder(tmp_path, count=20)
    options, word = BAD[case]
    out = tmp_path / "out.onnx"
    asked = [
        "prune",
        str(tmp_path / "model.onnx"),
        "--data",
        str(tmp_path / "data.npz"),
        "-o",
        str(out),
    ]
    assert main([*asked, *options.split()]) == 2
    text = capfd.readouterr().err
    assert word in text
    assert text.startswith("Error: ")
    assert len(text.strip().splitlines()) == 1
    assert not out.exists()


def test_connection_pruning_requires_data(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path, count=20)
    asked = [
        "prune",
        str(tmp_path / "model.onnx"),
        "-o",
        str(tmp_path / "out.onnx"),
        "--granularity",
        "connection",
    ]
    assert main([*asked, "--importance", "nnrelief", "--alpha", "0.9", "--refit", "none"]) == 2
    assert "--data" in capfd.readouterr().err


def test_command_line_reports_connections(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path, count=60)
    asked = ["prune", str(tmp_path / "model.onnx"), "--data", str(tmp_path / "data.npz"), "-o"]
    options = (
        "--granularity connection --importance nnrelief --alpha 0.7 --iterations 2 --device cpu"
    )
    assert main([*asked, str(tmp_path / "out.onnx"), *options.split(" ")]) == 0
    text = capfd.readouterr().out
    assert "times fewer connections after 2 rounds" in text
    assert "no faster" in " ".join(text.split())


def test_model_without_units_can_lose_connections(tmp_path: Path) -> None:
    text = "(float[N,12] x) => (float[N,5] y) <float[12,5] w, float[5] b> { y = Gemm(x, w, b) }"
    found = run(folder(tmp_path, text), alpha=0.6)
    assert found.connections is not None
    assert found.connections.kept < found.connections.total


def test_removed_branch_contributes_nothing(tmp_path: Path) -> None:
    """Behind a normalisation, whose shift would go on."""
    text = """(float[N,4,5,5] x) => (float[N,3] y)
    <float[6,4,1,1] w1, float[6,6,1,1] w2, float[6] gain, float[6] b, float[6] m, float[6] var, float[6,3] w3> {
        h = Conv(x, w1)
        c = Conv(h, w2)
        n = BatchNormalization(c, gain, b, m, var)
        s = Add(h, n)
        g = GlobalAveragePool(s)
        f = Flatten(g)
        y = MatMul(f, w3)
    }"""
    folder(tmp_path, text, 40)
    proto = onnx.load(tmp_path / "model.onnx")
    for tensor in proto.graph.initializer:
        if tensor.name in ("gain", "b", "m"):
            value = numpy_helper.to_array(tensor).copy()
            value[4] *= 1e-4
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    run(tmp_path, alpha=0.95, refit="none")
    after = constants(onnx.load(tmp_path / "out.onnx"))
    assert after["gain"][4] == 0
    assert after["b"][4] == 0
    assert (after["gain"][[0, 1, 2, 3, 5]] != 0).all()
    assert not after["w2"][4].any()
    shown = models.load(tmp_path / "out.onnx")
    values = feed(shown, 3, 4)
    from graphs import activations

    assert not activations(shown, values, ["n"])["n"][:, 4].any()


def test_connection_settings_have_their_defaults() -> None:
    asked = settings(alpha=0.9)
    assert (asked.granularity, asked.signal, asked.iterations, asked.sparse) == (
        "connection",
        "mean",
        1,
        False,
    )
    assert replace(asked.budget) == Budget()
