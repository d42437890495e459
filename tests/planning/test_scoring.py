"""Choice among orders of removal: the order that was measured to lose least is the one of the scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import build

from onnx_oamip import prune
from onnx_oamip.api import prepare
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph.runtime import Session
from onnx_oamip.planning import scoring, sensitivity

COUNT = 600
X = np.random.default_rng(5).standard_normal((900, 16)).astype(np.float32)
# The loss in a normalisation is not part of the error that obs minimises: its scores of the units in front are zero.
NORMALISED = """(float[N,16] x) => (float[N,4] y)
    <float[16,64] w1, float[64] b1, float[64] g1, float[64] c1, float[64,48] w2, float[48] b2, float[48] g2,
     float[48] c2, float[48,4] w3> {
        a = Gemm(x, w1, b1) n = LayerNormalization(a, g1, c1) h = Relu(n)
        b = Gemm(h, w2, b2) m = LayerNormalization(b, g2, c2) r = Relu(m)
        y = MatMul(r, w3)
    }"""


def _settings(**options: object) -> Settings:
    given = {"macs": 0.5, "align": 1, "device": "cpu", "workers": 1, "outputs": {"y": "values"}}
    return Settings.create(**{**given, "force": True, **options})


def test_ties_keep_the_chosen_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(build(NORMALISED, seed=1), tmp_path / "model.onnx")

    def second(*args: object, **names: object) -> np.ndarray:  # type: ignore[type-arg]
        return np.ones(2, np.int64)

    monkeypatch.setattr(sensitivity, "choose", second)
    found, wanted = (
        scoring.score(
            prepare.open_context(
                tmp_path / "model.onnx", {"x": X[:100]}, _settings(importance=name)
            )
        )
        for name in ("obs", "activation")
    )
    assert "activation 2" in found.notes[0]
    context = prepare.open_context(tmp_path / "model.onnx", {"x": X[:100]}, _settings())
    groups = context.coupling.groups
    assert [len(group.units) for group in groups] == [64, 48]
    for group in groups:
        values = found.values[group.units]
        assert np.argsort(values).tolist() == np.argsort(wanted.values[group.units]).tolist()
        assert len(np.unique(values)) == len(values)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_default_loses_no_more_than_cheap_orders_before_a_normalisation(
    seed: int, tmp_path: Path
) -> None:
    proto = build(NORMALISED, seed=seed)
    onnx.save(proto, tmp_path / "model.onnx")
    before = Session(proto, "cpu").run({"x": X[COUNT:]}, ["y"])[0]

    def error(**options: str) -> float:
        target = tmp_path / "out.onnx"
        prune(tmp_path / "model.onnx", {"x": X[:COUNT]}, target, _settings(**options))
        after = Session(onnx.load(target), "cpu").run({"x": X[COUNT:]}, ["y"])[0]
        return float((np.square(before - after).mean(axis=0) / before.var(axis=0)).mean())

    default = error()
    assert default <= 1.05 * error(importance="activation")
    assert default <= error(importance="l2", refit="none")
    assert default < 0.15
