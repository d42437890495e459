"""JSON documents made of records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from graphs import MLP, build, load

from onnx_oamip.artifacts.score_files import Scored
from onnx_oamip.core.records import Scores
from onnx_oamip.graph.coupling import couple
from onnx_oamip.reporting import documents


def test_score_that_is_zero_but_for_rounding_is_zero(tmp_path: Path) -> None:
    """A removed unit of an earlier iteration scores just below the least remaining score."""
    model = load(build(MLP), tmp_path)
    coupling = couple(model)
    values = np.ones(coupling.n_units)
    values[coupling.groups[0].units[0]] = np.nextafter(0.0, -np.inf)
    values[coupling.groups[1].units[0]] = -1e-9
    scored = Scored(model, coupling, Scores("l2", values), "s.npz", "", {}, {})
    found = [group["score"]["min"] for group in documents.scoring(scored)["groups"]]
    assert found[:2] == [0.0, -1e-9]
    assert not np.signbit(found[0])
