"""Refit of emptied branches: their constant takes on the mean of what is missing."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from branch_networks import NETS
from graphs import activations, build, constants, load
from refits import change_initialiser, random_calibration, refit, relative_error, without

from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.emptying import Emptying
from onnx_oamip.graph.surgery import branch_constants, rewrite
from onnx_oamip.repair import refit_scope
from onnx_oamip.repair.mean_folding import fold_means
from onnx_oamip.statistics import calibration


@pytest.mark.parametrize("name", NETS)
def test_refit_without_groups_is_nearer_to_the_original(name: str, tmp_path: Path) -> None:
    model = load(build(NETS[name], opset=20), tmp_path)
    coupling = couple(model)
    found = random_calibration(model, 128)
    graph = Emptying(model, coupling)
    for bundle in graph.bundles().values():
        keep = ~np.isin(coupling.unit_group, sorted(bundle))
        pruned = refit(model, coupling, keep, found)
        # A join has other channels left, whose layer is refitted; a sum has a constant.
        effect = graph.effect(bundle)
        becomes_constant = not effect.idle.issuperset(effect.biases)
        assert ("constant" in {fit.form for fit in pruned.fits}) == becomes_constant
        before = relative_error(model, pruned.raw, found)
        assert relative_error(model, pruned.proto, found) < before
        folded = branch_constants.fold(model, coupling, keep, pruned.proto)
        assert relative_error(model, folded, found) < before
        assert refit_scope.short_of_samples(model, coupling, keep, found) is not None


def test_constant_is_the_mean_of_the_branch(tmp_path: Path) -> None:
    model = load(build(NETS["mobile"], opset=20), tmp_path)
    coupling = couple(model)
    last = len(coupling.groups) - 1
    assert coupling.groups[last].name == "we2"
    keep = coupling.unit_group != last
    found = random_calibration(model, 64)
    feeds = dict(next(iter(found.batches(64)))[1])
    mean = activations(model, feeds, ["p2"])["p2"].mean(axis=(0, 2, 3))
    # The target of the residual sum is that of the branch where the other branch is whole.
    fitted = refit(model, coupling, keep, found, objective=None)
    np.testing.assert_allclose(constants(fitted.proto)["p2"].reshape(-1), mean, atol=0.02)
    raw = rewrite.cut(model, coupling, keep)
    moments = calibration.collect(model, coupling, found, "cpu")
    folded = fold_means(model, coupling, keep, moments, raw)
    np.testing.assert_allclose(constants(folded.proto)["p2"].reshape(-1), mean, atol=1e-5)


def test_branch_beside_a_constant_takes_on_its_error(tmp_path: Path) -> None:
    """Two equal branches are added: the one that is left is doubled."""
    text = """(float[N,6] x) => (float[N,4] y)
    <float[6,8] w0, float[8,12] wa, float[12,8] wb, float[8,12] wc, float[12,8] wd, float[8,4] wy> {
        a = MatMul(x, w0)
        p = MatMul(a, wa)
        pr = Relu(p)
        q = MatMul(pr, wb)
        u = MatMul(a, wc)
        ur = Relu(u)
        v = MatMul(ur, wd)
        s = Add(q, v)
        t = Add(a, s)
        y = MatMul(t, wy)
    }"""
    proto = build(text)
    values = constants(proto)
    for first, second in (("wa", "wc"), ("wb", "wd")):
        change_initialiser(proto, second, partial(np.copyto, src=values[first]))
    model = load(proto, tmp_path)
    coupling = couple(model)
    number = [group.name for group in coupling.groups].index("wa")
    keep = without(coupling, "wc", [0]) & (coupling.unit_group != number)
    found = random_calibration(model, 256)
    pruned = refit(model, coupling, keep, found)
    feeds = dict(next(iter(found.batches(256)))[1])
    wanted, before, after = (
        activations(model, feeds, ["s"], proto)["s"] for proto in (None, pruned.raw, pruned.proto)
    )
    assert np.square(after - wanted).mean() < 0.3 * np.square(before - wanted).mean()
