"""Quantisation and whole runs from Python: the bytes of the command line, and nothing written unless asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import perceptron, samples

import onnx_oamip
from onnx_oamip import OutputError, SettingsError
from onnx_oamip.api import proof
from onnx_oamip.artifacts.recovered_models import Recovered
from onnx_oamip.cli import main
from onnx_oamip.core.records import Measure, Recovery
from onnx_oamip.verification import latency
from onnx_oamip.verification.latency import Ratio, Timing

ARRAYS = {"input": samples(60), "labels": np.arange(60) % 4}
QUICK = {"importance": "l2", "cache": "off", "seed": 3}
FILE = """
model = "m.onnx"
data = "d.npz"
folder = "there"
importance = "l2"
cache = "off"
seed = 3
[prune]
macs = 0.5
[int8]
per-tensor = true
[check]
max-drop = "50%"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def bench(sources: list[Path], *_: object, **__: object) -> tuple[Timing, ...]:
        return tuple(
            Timing("m", 1.0, 2.0, 1.0, 1e3, 9, None, Ratio(0.5, 0.4, 0.6, 9)) for _ in sources
        )

    monkeypatch.setattr(latency, "bench", bench)
    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))
    monkeypatch.chdir(tmp_path)
    perceptron(tmp_path / "m.onnx", 64)
    np.savez(tmp_path / "d.npz", **ARRAYS)
    return tmp_path


def content(model: onnx.ModelProto) -> bytes:
    return model.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--data", "d.npz", "--keep-float", "sec*"], {"keep_float": ["sec*"]}),
        (["--ranges", "dynamic", "--per-tensor"], {"ranges": "dynamic", "per_tensor": True}),
    ],
)
def test_int8_makes_the_bytes_of_the_command_line(
    place: Path, flags: list[str], options: dict[str, Any]
) -> None:
    assert main(["int8", "m.onnx", *flags, "-o", "q.onnx", "-q"]) == 0
    before = sorted(place.iterdir())
    found = onnx_oamip.int8(onnx.load("m.onnx"), ARRAYS, **options)
    assert content(found.model) == Path("q.onnx").read_bytes()
    assert content(onnx_oamip.int8("m.onnx", "d.npz", **options).model) == content(found.model)
    assert sorted(place.iterdir()) == before
    assert found.document["output"]["path"] is None
    assert found.document["output"]["bytes"] == len(content(found.model))
    saved = found.save("r.onnx")
    assert Path("r.onnx").read_bytes() == content(found.model)
    assert saved.document["output"]["path"] == "r.onnx"
    assert repr(found).startswith("<Quantised (model): ")
    assert f"<td>{found.bytes:,}</td>" in found._repr_html_()


def test_pruned_result_is_quantised_and_verified_in_memory(place: Path) -> None:
    model = onnx.load("m.onnx")
    pruned = onnx_oamip.prune(model, ARRAYS, macs=0.5, **QUICK)
    found = onnx_oamip.int8(pruned, ARRAYS)
    assert onnx_oamip.verify(model, found.model, ARRAYS).failures == ()
    assert found.original.file_bytes == pruned.report.after.bytes
    assert found.found.weights == 2


def test_int8_refuses_values_and_paths_in_one_sentence(place: Path) -> None:
    with pytest.raises(SettingsError, match="`ranges`: 'no' is not one of 'static', 'dynamic'"):
        onnx_oamip.int8("m.onnx", "d.npz", ranges="no")
    with pytest.raises(SettingsError, match="there is no setting `range`"):
        onnx_oamip.int8("m.onnx", "d.npz", range="static")
    with pytest.raises(OutputError, match="would overwrite the input"):
        onnx_oamip.int8("m.onnx", "d.npz").save("m.onnx")


def test_run_makes_the_files_of_the_command_line(place: Path) -> None:
    Path("p.toml").write_text(FILE)
    assert main(["run", "p.toml", "-q"]) == 0
    described = {
        "model": "m.onnx",
        "data": ARRAYS,
        "folder": "here",
        **QUICK,
        "prune": {"macs": 0.5},
        "int8": {"per_tensor": True},
        "check": {"max_drop": 50},
    }
    found = onnx_oamip.run(described)
    for name in ("prune.onnx", "int8.onnx"):
        assert (place / "here" / name).read_bytes() == (place / "there" / name).read_bytes()
    assert [row["stage"] for row in found.rows] == ["original", "prune", "int8"]
    assert found.limits.max_drop == 50
    assert found.broken == ()
    assert repr(found).startswith("<StagedRun m.onnx -> here: original ")
    shown = found._repr_html_()
    assert all(f"<td>{row['bytes']:,}</td>" in shown for row in found.rows)
    again = onnx_oamip.run("p.toml")
    assert again.document["reused"] == ["prune", "int8", "check"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": onnx.ModelProto()}, "the pipeline gives a model in memory"),
        ({"folder": None}, "the pipeline names no folder"),
        ({"prune": 0.5}, "the pipeline sets prune to 0.5; it is a table of settings"),
        ({"prune": {"max-drop": 1}}, "sets in .prune. 'max-drop', .* did you mean max_drop"),
        ({"check": {"seconds": -1}}, "the pipeline, .check.: `seconds`: -1 is not a number"),
        ({"int8": {"ranges": 1}}, "the pipeline, .int8.: `ranges`: 1 is not one of"),
    ],
)
def test_wrong_pipeline_is_refused_before_any_work(
    place: Path, change: dict[str, Any], sentence: str
) -> None:
    described = {"model": "m.onnx", "data": ARRAYS, "folder": "here", "prune": {"macs": 0.5}}
    with pytest.raises(SettingsError, match=sentence):
        onnx_oamip.run({**described, **change})
    assert not (place / "here").exists()


@pytest.mark.usefixtures("place")
def test_recovery_is_shown_in_one_line_and_a_table() -> None:
    loss = Measure("y", "y", "classes", "agreement of decisions", 2.5, {})
    after = Measure("y", "y", "classes", "agreement of decisions", 1.25, {})
    recovery = Recovery(
        accepted=True,
        before=0.2,
        after=0.1,
        steps=1500,
        slowed=0,
        best_step=1500,
        batch=8,
        held_bytes=0,
        seconds=1.0,
        ended="budget",
        samples=48,
        held_out=12,
        augment="none",
        device="cpu",
        weights=2,
        features=(),
        left_out=(),
        curve=(),
        outputs_before=(loss,),
        outputs=(after,),
    )
    model = onnx_oamip.load("m.onnx")
    found = Recovered(
        model,
        model,
        model.proto,
        None,
        None,
        recovery,
        onnx_oamip.inspect("m.onnx").objective,
        {},
        {},
    )
    assert repr(found) == "<Recovered m.onnx -> None: loss 0.2 -> 0.1 in 1,500 steps, taken>"
    assert "<td>2.50</td><td>1.25</td>" in found._repr_html_()
