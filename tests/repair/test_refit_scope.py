"""Scope of the refit: notes on nodes without one, and the nodes that augmented copies are for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from graphs import build, load, random_keep
from refits import random_calibration

from onnx_oamip.graph.coupling import couple
from onnx_oamip.repair import refit_scope
from onnx_oamip.repair.cut_model import Cut

IMAGES = """(float[N, 3, 8, 8] x) => (float[N, 6] y)
    <float[8, 3, 3, 3] v, float[16, 8, 3, 3] w, float[16, 6] u>
    {
        a = Conv<pads = [1, 1, 1, 1]>(x, v)
        b = Relu(a)
        c = Conv<pads = [1, 1, 1, 1]>(b, w)
        d = Relu(c)
        e = ReduceMean<axes = [2, 3], keepdims = 0>(d)
        y = MatMul(e, u)
    }"""


def test_copies_are_left_out_where_samples_suffice(tmp_path: Path) -> None:
    model = load(build(IMAGES), tmp_path)
    coupling = couple(model)
    keep = random_keep(coupling, np.random.default_rng(0), 0.6)
    many = replace(random_calibration(model, 4), count=1_000_000)
    assert refit_scope.short_of_samples(model, coupling, keep, random_calibration(model, 4))
    assert not refit_scope.short_of_samples(model, coupling, keep, many)


CODES = """(float[N, 5] x) => (float[N, 3] y)
    <float sx = {0.03}, uint8 zx = {120}, float sw = {0.006}, uint8 zw = {70}, uint8[5, 8] w1, uint8[8, 3] w2>
    {
        xq = QuantizeLinear(x, sx, zx)
        a = QLinearMatMul(xq, sx, zx, w1, sw, zw, sx, zx)
        b = QLinearMatMul(a, sx, zx, w2, sw, zw, sx, zx)
        y = DequantizeLinear(b, sx, zx)
    }"""


def test_products_of_codes_are_noted_as_quantised(tmp_path: Path) -> None:
    model = load(build(CODES), tmp_path)
    coupling = couple(model)
    keep = np.ones(coupling.n_units, bool)
    keep[0] = False
    families, layers, notes = refit_scope.families_behind(Cut(model, coupling, keep))
    assert not families
    assert not layers
    (note,) = notes
    assert note == f"{model.nodes[2]}: its weight is quantised, so it is not refitted"
