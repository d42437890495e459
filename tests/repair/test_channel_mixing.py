"""Channel mixing: the refit of nodes that are too wide for a Gram matrix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import CNN, GROUPED, RESIDUAL, build, load
from refits import random_calibration, refit, relative_error, without

from onnx_oamip.graph.coupling import couple

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize(("net", "group"), [(CNN, "w1"), (CNN, "w2"), (RESIDUAL, "w2")])
def test_channel_mixing_reduces_the_error(net: str, group: str, tmp_path: Path) -> None:
    """Less than a full refit, more than none; a convolution and a flattened image."""
    model = load(build(net), tmp_path)
    coupling = couple(model)
    (units,) = (g.units for g in coupling.groups if g.name == group)
    keep = without(coupling, group, range(0, len(units), 3))
    found, other = random_calibration(model, 300), random_calibration(model, 100, 7)
    full = refit(model, coupling, keep, found)
    mixed = refit(model, coupling, keep, found, cap=20)
    assert full.fits[0].form.startswith("least squares")
    assert mixed.fits[0].form == "channel mixing"
    assert mixed.fits[0].error_after < 0.9 * mixed.fits[0].error_before
    none, least, middle = (
        relative_error(model, p, other) for p in (full.raw, full.proto, mixed.proto)
    )
    assert middle < 0.9 * none
    assert least < 1.05 * middle


def test_wide_node_with_units_of_unequal_size_is_solved_for_all_unknowns(tmp_path: Path) -> None:
    """Channels of nine places beside features of one have no common form: all unknowns are solved for."""
    proto = build("""(float[N,3,5,5] x, float[N,5] z) => (float[] y)
    <float[8,3,3,3] w1, float[5,6] w2, float[78,4] w> {
        a = Conv(x, w1)
        r = Relu(a)
        f = Flatten(r)
        b = MatMul(z, w2)
        h = Concat<axis = 1>(f, b)
        y = MatMul(h, w)
    }""")
    model = load(proto, tmp_path)
    coupling = couple(model)
    keep = without(coupling, "w1", [1, 4])
    found, other = random_calibration(model, 200), random_calibration(model, 100, 7)
    pruned = refit(model, coupling, keep, found, cap=10)
    assert [f.form for f in pruned.fits] == ["least squares"]
    assert relative_error(model, pruned.proto, other) < 0.8 * relative_error(
        model, pruned.raw, other
    )


def test_wide_grouped_convolution_is_solved_for_all_unknowns(tmp_path: Path) -> None:
    model = load(build(GROUPED), tmp_path)
    coupling = couple(model)
    keep = without(coupling, "w1", [1, 4])
    pruned = refit(model, coupling, keep, random_calibration(model, 100), cap=20)
    forms = {f.node: f.form for f in pruned.fits}
    grouped = next(n.name for n in model.nodes if n.attrs.get("group") == 2)
    assert forms[grouped].startswith("least squares")


def test_wide_node_behind_the_cut_is_refitted_by_mixing(tmp_path: Path) -> None:
    """All its own channels stay; mixing makes up for what is wrong with them."""
    text = """(float[N,6] x) => (float[N,4] y) <float[6,12] w1, float[12,9] w2, float[18,4] w3> {
        a = MatMul(x, w1)
        h = Relu(a)
        b = MatMul(h, w2)
        r = Relu(b)
        s = Concat<axis = 1>(r, r)
        y = MatMul(s, w3)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    keep = without(coupling, "w1", range(6))
    found, other = random_calibration(model, 300), random_calibration(model, 100, 7)
    pruned = refit(model, coupling, keep, found, cap=12)
    assert pruned.fits[1].form == "channel mixing"
    assert relative_error(model, pruned.proto, other) < 0.8 * relative_error(
        model, pruned.raw, other
    )


def test_wide_node_with_overflowing_activations_is_refitted(tmp_path: Path) -> None:
    """Rows that are no numbers are left out of what is mixed, too; both are reported, with their counts."""
    text = """(float[N,6] x) => (float[N,4] y) <float[6,12] w1, float[24,4] w2> {
        a = MatMul(x, w1)
        r = Relu(a)
        h = Concat<axis = 1>(r, r)
        y = MatMul(h, w2)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    keep = without(coupling, "w1", range(4))
    found = random_calibration(model, 300)
    values = np.asarray(found.arrays["x"]).copy()
    values[7:12] = np.sign(values[7:12]) * 2e38
    pruned = refit(model, coupling, keep, replace(found, arrays={"x": values}), cap=10)
    (fit,) = pruned.fits
    assert (fit.form, fit.unknowns) == ("channel mixing", 16)
    assert 290 <= fit.rows < 300
    (note,) = pruned.notes
    assert f"{300 - fit.rows} of 300 rows are not finite and not fitted to; " in note
    assert (
        "; 16 unknowns are too many for a Gram matrix, so removed channels are mixed into kept ones"
        in note
    )
    clean = replace(found, arrays={"x": np.delete(values, np.arange(7, 12), axis=0)}, count=295)
    least = refit(model, coupling, keep, clean, cap=10)
    assert fit.error_after < 1.2 * least.fits[0].error_after
