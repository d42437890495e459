"""Models as torch exports them: half of every group goes, exactly, and most of the parameters with it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import ROOT
from graphs import assert_exact, constants
from onnx import ModelProto

from onnx_oamip.core.records import Bools, Coupling, Model
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple

FOLDER = ROOT / "tests" / "data"
EXPORTERS = ("torchscript", "dynamo")
MOST = {
    "vit": 0.36,
    "bert": 0.30,
    "gpt": 0.30,
    "llama": 0.30,
    "yolo": 0.30,
    "squeeze-excite": 0.40,
    "shuffle": 0.35,
    "unet-resize": 0.30,
    "generator": 0.40,
    "group-norm": 0.30,
}
"""Share of parameters that may stay; a quarter, but for the first and last layers of networks this small."""


@pytest.fixture(params=[f"{name}-{exporter}" for name in MOST for exporter in EXPORTERS])
def exported(request: pytest.FixtureRequest) -> tuple[str, Model, Coupling]:
    name: str = request.param
    model = models.load(FOLDER / f"{name}.onnx")
    return name.rsplit("-", 1)[0], model, couple(model)


def _halves(coupling: Coupling) -> Bools:
    keep = np.zeros(coupling.n_units, bool)
    for group in coupling.groups:
        keep[group.units[::2]] = True
    return keep


def _parameters(proto: ModelProto) -> int:
    return sum(
        v.size for v in constants(proto).values() if np.issubdtype(v.dtype, np.floating) and v.ndim
    )


def test_every_exported_file_is_tested() -> None:
    files = list(FOLDER.glob("*.onnx"))
    assert {f.stem for f in files} == {
        f"{name}-{exporter}" for name in MOST for exporter in EXPORTERS
    }
    assert sum(f.stat().st_size for f in files) < 1_500_000


def test_half_of_the_units_is_cut_exactly(exported: tuple[str, Model, Coupling]) -> None:
    name, model, coupling = exported
    cut = assert_exact(model, coupling, _halves(coupling), 1e-5, batches=(1, 3))
    assert _parameters(cut) <= MOST[name] * _parameters(model.proto)


def test_batch_dimensions_stay_symbolic(exported: tuple[str, Model, Coupling]) -> None:
    _, model, _ = exported
    assert all(port.dims[0] == "batch" for port in model.inputs)


def test_kept_channels_have_a_reason(exported: tuple[str, Model, Coupling]) -> None:
    _, _, coupling = exported
    assert coupling.pinned
    assert all(p.reason and ", untracked" not in p.reason for p in coupling.pinned)


def test_only_channels_of_inputs_and_outputs_are_pinned(
    exported: tuple[str, Model, Coupling],
) -> None:
    name, model, coupling = exported
    weights = {n for n, v in model.constants.items() if v.ndim >= 2 and min(v.shape[:2]) > 4}
    inner = [
        p
        for p in coupling.pinned
        if p.tensor in weights
        and "graph input" not in p.reason
        and "graph output" not in p.reason
        and "picks from it" not in p.reason
        and "whole groups" not in p.reason
    ]
    assert not inner, (name, inner)


def test_files_contain_no_metadata_of_the_exporting_machine() -> None:
    files = sorted(FOLDER.glob("*.onnx"))
    assert files
    for file in files:
        proto = onnx.load(file)
        assert not any(n.metadata_props or n.doc_string for n in proto.graph.node), file.name
