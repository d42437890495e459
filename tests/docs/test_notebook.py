"""The notebook of the documentation: its cells run as a program, and its stored outputs are complete and small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from onnx_oamip.api import proof
from onnx_oamip.verification.latency import Ratio

NOTEBOOK = ROOT / "docs" / "guide" / "first-model.ipynb"
MOST_BYTES = 50_000


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    """Its code cells."""
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def test_outputs_are_stored_in_order_without_errors(cells: list[dict]) -> None:
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell["outputs"] for cell in cells)
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds <= {"execute_result", "stream"}
    tables = [output["data"] for cell in cells for output in cell["outputs"] if "data" in output]
    assert any("text/html" in data for data in tables)


def test_cells_run_in_order(
    cells: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On fewer samples, in the folder of a copy."""
    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))
    place = tmp_path / "docs" / "guide"
    place.mkdir(parents=True)
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(ROOT / "models" / "lenet300-mnist.onnx", models)
    whole = np.load(ROOT / "models" / "mnist.npz")
    np.savez(models / "mnist.npz", **{k: v[:64] if v.ndim else v for k, v in whole.items()})
    monkeypatch.chdir(place)
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in cells:
        exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
    assert (place / "half.onnx").exists()
