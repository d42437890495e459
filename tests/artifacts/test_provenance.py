"""Provenance in a pruned model: its source and settings, and the option that leaves it out."""

from __future__ import annotations

import hashlib
import json
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import build
from network_texts import RESIDUAL_CNN as TEXT

from onnx_oamip import (
    __version__,
    apply,
    compare,
    pack,
    prune,
    unpack,
)
from onnx_oamip import plan as make_plan
from onnx_oamip.artifacts import provenance
from onnx_oamip.cli import main
from onnx_oamip.core.settings import Settings
from tools import licences


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with model.onnx, which has an entry of its own, and data.npz."""
    proto = build(TEXT)
    proto.metadata_props.add(key="author", value="somebody")
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    images = np.random.default_rng(0).normal(size=(60, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", image=images, labels=np.arange(60) % 5)
    return tmp_path


def asked(**values: Any) -> Settings:
    return Settings.create(**{"macs": 0.5, "align": 1, "device": "cpu", "workers": 1, **values})


def entry(path: Path) -> dict[str, Any]:
    proto = onnx.load(path)
    props = {p.key: p.value for p in proto.metadata_props}
    assert len(props) == len(proto.metadata_props)
    assert props["author"] == "somebody"
    return json.loads(props["onnx_oamip.provenance"])


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_written_model_records_its_provenance(task: Path) -> None:
    prune(task / "model.onnx", task / "data.npz", task / "a.onnx", asked())
    make_plan(task / "model.onnx", task / "data.npz", task / "p.json", asked())
    groups = json.loads((task / "p.json").read_text())["groups"]
    lists = json.dumps(
        {g["name"]: g["keep"] for g in groups}, sort_keys=True, separators=(",", ":")
    )
    found = entry(task / "a.onnx")
    assert found == {
        "tool_version": __version__,
        "source_sha256": sha256(task / "model.onnx"),
        "plan_sha256": hashlib.sha256(lists.encode()).hexdigest(),
    }
    apply(task / "model.onnx", task / "p.json", task / "data.npz", task / "b.onnx")
    assert (task / "a.onnx").read_bytes() == (task / "b.onnx").read_bytes()
    prune(task / "model.onnx", task / "data.npz", task / "c.onnx", asked(macs=0.4))
    assert entry(task / "c.onnx")["plan_sha256"] != found["plan_sha256"]


def test_provenance_of_a_twice_pruned_model_is_a_chain(task: Path) -> None:
    prune(task / "model.onnx", task / "data.npz", task / "a.onnx", asked(macs=0.7, iterations=2))
    prune(task / "a.onnx", task / "data.npz", task / "b.onnx", asked(macs=0.7))
    first, second = entry(task / "a.onnx"), entry(task / "b.onnx")
    assert "parent" not in first
    assert second["parent"] == first
    assert second["source_sha256"] == sha256(task / "a.onnx")


def test_connection_pruning_records_provenance(task: Path) -> None:
    settings = asked(macs=None, params=0.6, granularity="connection", importance="nnrelief")
    prune(task / "model.onnx", task / "data.npz", task / "a.onnx", settings)
    assert entry(task / "a.onnx")["source_sha256"] == sha256(task / "model.onnx")
    prune(
        task / "model.onnx",
        task / "data.npz",
        task / "b.onnx",
        settings.model_copy(update={"params": 0.4}),
    )
    assert entry(task / "a.onnx")["plan_sha256"] != entry(task / "b.onnx")["plan_sha256"]


def test_provenance_can_be_left_out_without_other_changes(task: Path) -> None:
    common = [
        "--data",
        str(task / "data.npz"),
        "--macs",
        "0.5",
        "--align",
        "1",
        "--device",
        "cpu",
        "-q",
    ]
    for name, more in (("with", []), ("without", ["--no-provenance"])):
        assert (
            main(["prune", str(task / "model.onnx"), *common, "-o", str(task / name), *more]) == 0
        )
    proto = onnx.load(task / "with")
    provenance.remove(proto)
    assert provenance.read(proto) is None
    assert proto == onnx.load(task / "without")
    assert [p.key for p in proto.metadata_props] == ["author"]


def test_verify_and_pack_keep_the_provenance(task: Path) -> None:
    prune(task / "model.onnx", task / "data.npz", task / "a.onnx", asked())
    compare(task / "model.onnx", task / "a.onnx", task / "data.npz", asked())
    pack(task / "a.onnx", task / "a.oamip", lossless=True)
    unpack(task / "a.oamip", task / "b.onnx")
    assert entry(task / "b.onnx") == entry(task / "a.onnx")


@pytest.mark.parametrize("value", ["no JSON", "[1]", "[" * 100_000])
def test_foreign_metadata_entry_is_no_parent(value: str) -> None:
    proto = onnx.ModelProto()
    proto.metadata_props.add(key=provenance.KEY, value=value)
    provenance.sign(proto, "a", "b")
    assert provenance.read(proto) == {
        "tool_version": __version__,
        "source_sha256": "a",
        "plan_sha256": "b",
    }


def test_no_command_opens_a_network_connection(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was asked for")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    common = ["--data", str(task / "data.npz"), "--macs", "0.5", "--align", "1", "-q", "--force"]
    files = [
        "-o",
        str(task / "a.onnx"),
        "--report",
        str(task / "a.html"),
        "--keep-map",
        str(task / "a.safetensors"),
    ]
    assert main(["prune", str(task / "model.onnx"), *common, *files, "--importance", "oamip"]) == 0


def test_every_dependency_has_a_known_licence() -> None:
    """Permissive ones, and that of Gurobi, whose wheel brings its own limits."""
    known = re.compile(r"MIT|BSD|Apache|HPND|PSF|Python Software Foundation|0BSD")
    found = {name: reported for name, _, reported in licences.table()}
    assert {"numpy", "onnx", "scipy", "click", "highspy"} <= set(found)
    assert {name: reported for name, reported in found.items() if not known.search(reported)} in (
        {},
        {"gurobipy": "Proprietary"},
    )
