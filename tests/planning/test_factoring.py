"""Factoring: layers whose outputs have few components are written as two, at a rank that the budget program chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import build, load
from onnx import ModelProto, helper, numpy_helper

from onnx_oamip.api import pipeline, recovery
from onnx_oamip.api.prepare import prepare
from onnx_oamip.core.errors import DataError, SettingsError
from onnx_oamip.core.records import Array
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph import loading as models
from onnx_oamip.planning import factoring

DENSE = """(float[N,20] x) => (float[N,6] y)
<float[20,24] w1, float[24] b1, float[24,16] w2, float[16] b2, float[16,6] w3> {
    i = Identity(x)
    n = Sqrt(i)
    h = MatMul(n, w1)
    a = Add(h, b1)
    r = Relu(a)
    g = Gemm(r, w2, b2)
    u = Relu(g)
    y = MatMul(u, w3)
}"""
RANK = 4


def _model() -> ModelProto:
    """Every output of the first layer is a mixture of four signals."""
    proto = build(DENSE)
    rng = np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        if tensor.name == "w1":
            value = rng.normal(size=(20, RANK)) @ rng.normal(size=(RANK, 24)) / 4
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), "w1"))
    return proto


def _data() -> dict[str, Array]:
    return {"x": np.random.default_rng(1).uniform(0, 4, (96, 20)).astype(np.float32)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "model.onnx"
    file.write_bytes(_model().SerializeToString())
    return file


def _settings(**options: Any) -> Settings:
    basic = {"macs": 0.5, "factor": "auto", "cache": "off", "align": 1, "workers": 1, "force": True}
    return Settings.create(**{**basic, **options})


def test_layer_of_low_rank_is_factored_and_loses_less(path: Path) -> None:
    factored = pipeline.pruned(path, _data(), _settings())
    plain = pipeline.pruned(path, _data(), _settings(factor="none"))
    assert factored.report.plan.factored == ("w1_low_rank",)
    assert plain.report.plan.factored == ()
    (entry,) = [g for g in factored.document["groups"] if g["factored"]]
    assert RANK <= entry["kept"] < 10  # two layers of rank 10 cost about as much as one
    assert entry["rotated"]
    macs = 20 * 24 + 24 * 16 + 16 * 6
    assert factored.document["before"]["macs"] == plain.document["before"]["macs"] == macs
    assert factored.document["after"]["macs"] <= macs / 2
    assert factored.report.verification.masked_equivalence < 1e-5
    after, before = (r.report.verification.output_relative_error for r in (factored, plain))
    assert after is not None
    assert before is not None
    assert after < 0.5 * before
    assert "1 layer is written as two of lower rank" in factored.document["notes"]


def test_plan_with_factors_is_carried_out_as_prune_does(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    pipeline.plan(path, _data(), file, _settings())
    entries = json.loads(file.read_text())["groups"]
    assert [e["name"] for e in entries if e["factored"]] == ["w1_low_rank"]
    applied = pipeline.applied(path, file, _data(), {"cache": "off"})
    direct = pipeline.pruned(path, _data(), _settings())
    assert applied.model.SerializeToString() == direct.model.SerializeToString()
    original, pruned = load(_model(), tmp_path), models.from_proto(direct.model)
    coupling, keep = recovery.planned_units(file, original, pruned)
    assert coupling is not None
    assert keep is not None
    assert len(keep) == coupling.n_units > 24
    other = tmp_path / "other.onnx"
    other.write_bytes(
        build(DENSE.replace("n, w1", "n, wx").replace("w1,", "wx,")).SerializeToString()
    )
    with pytest.raises(DataError, match="factors the layer of 'w1'"):
        pipeline.applied(other, file, _data(), {"cache": "off"})


def test_excluded_layer_is_left_whole(path: Path) -> None:
    found = prepare(path, _data(), _settings(exclude=("w1",))).factoring
    assert found is None or "w1_low_rank" not in found.groups


def test_layer_is_excluded_by_the_name_of_its_weight_in_the_file(tmp_path: Path) -> None:
    proto = _model()
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == "w1")
    turned = np.ascontiguousarray(numpy_helper.to_array(weight).T)
    weight.CopyFrom(numpy_helper.from_array(turned, "stored"))
    proto.graph.node.insert(0, helper.make_node("Transpose", ["stored"], ["w1"], perm=[1, 0]))
    file = tmp_path / "turned.onnx"
    file.write_bytes(proto.SerializeToString())
    found = prepare(file, _data(), _settings()).factoring
    assert found is not None
    assert "w1_low_rank" in found.groups
    left = prepare(file, _data(), _settings(exclude=("stored",))).factoring
    assert left is None or "w1_low_rank" not in left.groups


@pytest.mark.parametrize(
    "options",
    [
        {"rotate": "none"},
        {"importance": "l2"},
        {"macs": None, "latency": 0.5},
        {"macs": None, "alpha": 0.5},
    ],
    ids=str,
)
def test_factors_are_refused_where_no_ranks_are_chosen(options: dict[str, Any], path: Path) -> None:
    factoring.check(_settings(), scored=False)
    with pytest.raises(SettingsError, match="`factor=auto` chooses ranks"):
        factoring.check(_settings(), scored=True)
    with pytest.raises(SettingsError, match="`factor=auto` chooses ranks"):
        prepare(path, _data(), _settings(**options))


def test_layer_of_full_rank_is_left_whole_with_a_note(tmp_path: Path) -> None:
    file = tmp_path / "full.onnx"
    file.write_bytes(build(DENSE).SerializeToString())
    ready = prepare(file, _data(), _settings())
    assert ready.factoring is None
    assert any("no layer is written as two" in note for note in ready.model.notes)
