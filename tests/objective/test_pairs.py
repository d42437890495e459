"""Networks with one or two outputs of every kind: pruned together, each output is kept as well as alone."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from heads import HEADS, INPUTS, kept, network

from onnx_oamip import prune
from onnx_oamip.core.records import Array, Report
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph.runtime import Session

COUNT, HELD = 500, 500
KINDS = list(HEADS)
NEIGHBOURS = {*zip(KINDS, KINDS, strict=True), *pairwise(KINDS)}
PAIRS = [
    pytest.param(pair, marks=[] if pair in NEIGHBOURS else [pytest.mark.slow], id="-".join(pair))
    for pair in combinations_with_replacement(KINDS, 2)
]
"""Every kind twice, and with the next one; all others with --slow."""


def _arrays() -> tuple[Array, Array]:
    x = np.random.default_rng(7).standard_normal((COUNT + HELD, INPUTS)).astype(np.float32)
    return x[:COUNT], x[COUNT:]


def _pruned(folder: Path, statements: dict[str, str], macs: float = 0.5) -> Report:
    settings = Settings.create(
        macs=macs, align=1, device="cpu", workers=1, force=True, outputs=statements
    )
    return prune(folder / "model.onnx", {"x": _arrays()[0]}, folder / "out.onnx", settings)


def _outputs(path: Path) -> list[Array]:
    proto = onnx.load(path)
    return Session(proto, "cpu").run({"x": _arrays()[1]}, [y.name for y in proto.graph.output])


def _kept(kinds: tuple[str, ...], folder: Path) -> list[float]:
    before, after = _outputs(folder / "model.onnx"), _outputs(folder / "out.onnx")
    return [kept(*given) for given in zip(kinds, before, after, strict=True)]


def _stated(kinds: tuple[str, ...]) -> dict[str, str]:
    stated = {f"y{i}": HEADS[kind].statement for i, kind in enumerate(kinds)}
    return {name: kind for name, kind in stated.items() if kind is not None}


@pytest.mark.parametrize("kind", HEADS)
def test_single_output_is_kept_at_half_the_cost(kind: str, tmp_path: Path) -> None:
    onnx.save(network((kind,)), tmp_path / "model.onnx")
    report = _pruned(tmp_path, _stated((kind,)))
    assert report.after.macs <= 0.5 * report.before.macs
    assert _kept((kind,), tmp_path)[0] > 0.9


@pytest.mark.parametrize("kinds", PAIRS)
def test_pair_is_kept_as_well_as_each_output_alone(kinds: tuple[str, str], tmp_path: Path) -> None:
    onnx.save(network(kinds), tmp_path / "model.onnx")
    stated = _stated(kinds)
    alone = []
    for i in range(2):
        _pruned(tmp_path, {**stated, f"y{1 - i}": "ignore"})
        alone.append(_kept(kinds, tmp_path)[i])
    report = _pruned(tmp_path, stated)
    assert report.after.macs <= 0.5 * report.before.macs
    together = _kept(kinds, tmp_path)
    assert all(both > 0.95 * single for both, single in zip(together, alone, strict=True))
