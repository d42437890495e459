"""Hand-over of pruned files to other tools: the comparison and the rows, with toy tools."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from graphs import build
from onnx import save

from tools.wild import handover
from tools.wild.handover import Handed, Work

TEXT = """(float[N,3] x) => (float[N,2] y)
<float[3,2] w = {{1.0, 2.0, 0.0, 1.0, {last}, 1.0}}> {{
    y = MatMul(x, w)
}}"""


@pytest.fixture
def pair(tmp_path: Path) -> handover.Pair:
    for name, last in (("original", 1.0), ("pruned", 0.5)):
        save(build(TEXT.format(last=last)), tmp_path / f"{name}.onnx")
    values = np.random.default_rng(0).standard_normal((40, 3), np.float32)
    np.savez(tmp_path / "data.npz", x=values)
    names = ("original.onnx", "pruned.onnx", "data.npz")
    return handover.load(",".join(str(tmp_path / name) for name in names))


def test_difference_is_relative_to_the_largest_value_of_each_output() -> None:
    before = [{"a": np.float32([[1, -4]]), "b": np.float32([[100]])}]
    after = [{"a": np.float32([[1, -3]]), "b": np.float32([[99]])}]
    assert handover.apart(before, after) == 0.25
    assert handover.apart(before, before) == 0


def test_every_tool_gets_both_files_and_a_failure_is_a_cell(
    pair: handover.Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(work: Work) -> Handed:
        found = handover.run(work.file, work.feeds(handover.RUNS))
        size = 30 if work.file == pair.pruned else 40
        return [{name: 2 * values for name, values in row.items()} for row in found], size

    def broken(work: Work) -> Handed:
        if work.file == pair.pruned:
            raise ValueError("first line\nno such operator")
        return handover.run(work.file, work.feeds(handover.RUNS)), None

    package = tmp_path / "modules" / "toy"
    package.mkdir(parents=True)
    (package / "package.json").write_text(json.dumps({"version": "1.2"}))
    tools = {"double": ("numpy", doubled), "broken": ("npm:toy", broken)}
    monkeypatch.setattr(handover, "TOOLS", tools)
    text = handover.write([pair], tmp_path / "modules", tmp_path)
    rows = json.loads((tmp_path / "handover.json").read_text())["rows"]
    first, second = rows
    assert first["version"] == np.__version__
    assert (first["pruned"], first["original"], first["bytes kept"]) == ("1e+00", "1e+00", 0.75)
    assert first["bytes of pruned"] == round(30 / pair.pruned.stat().st_size, 2)
    assert (second["version"], second["pruned"]) == ("1.2", "fails: no such operator")
    assert (second["original"], second["bytes kept"]) == ("0e+00", None)
    assert "| broken | 1.2 | original | fails: no such operator | 0e+00 | - | - |" in text


def test_samples_reach_javascript_unchanged() -> None:
    values = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    packed = json.loads(json.dumps(handover._packed("x", values)))
    assert (packed["type"], packed["dims"]) == ("float32", [2, 3])
    np.testing.assert_array_equal(handover._unpacked(packed), values)
