"""Importance methods of other packages: what they return, raise or change is checked before it is used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import MLP, build

from onnx_oamip import Scores, Settings, prune
from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.records import Coupling, Model, Statistics
from onnx_oamip.importance import Method
from onnx_oamip.importance.registry import REGISTRY


def _ranks(coupling: Coupling) -> Scores:
    return Scores("mine", np.arange(coupling.n_units, dtype=np.float64))


def _exits(_model: Model, _coupling: Coupling) -> object:
    sys.exit(0)


def _fails(_model: Model, _coupling: Coupling) -> object:
    raise ValueError("no\n weights")


def _one_nan(_model: Model, coupling: Coupling) -> object:
    ranks = _ranks(coupling)
    ranks.values[3] = np.nan
    return ranks


def _changes_a_weight(model: Model, coupling: Coupling) -> object:
    next(iter(model.constants.values()))[0] = 0
    return _ranks(coupling)


def _renames_a_node(model: Model, coupling: Coupling) -> object:
    model.proto.graph.node[0].name = "other"
    return _ranks(coupling)


FAULTS: dict[str, tuple[Callable[[Model, Coupling], object], str]] = {
    "exits": (_exits, "raised SystemExit: 0; correct the method"),
    "fails": (_fails, "raised ValueError: no weights; correct"),
    "array": (lambda _, c: np.zeros(c.n_units), "returned a ndarray, not Scores"),
    "short": (lambda _, c: replace(_ranks(c), values=np.zeros(2)), "scores of shape (2,) for"),
    "texts": (lambda _, c: replace(_ranks(c), values=["a"] * c.n_units), "are no numbers"),
    "nan": (_one_nan, "scores with nan for unit 3"),
    "other": (
        lambda _, c: replace(_ranks(c), others={"more": np.full(c.n_units, np.inf)}),
        "the order 'more' with inf for unit 0",
    ),
    "weight": (_changes_a_weight, "read-only"),
    "node": (_renames_a_node, "changed the model"),
}


def _prune(rule: Callable[[Model, Coupling], object], tmp_path: Path) -> None:
    def score(model: Model, coupling: Coupling, _: Statistics | None, __: Settings) -> Scores:
        return rule(model, coupling)  # type: ignore[return-value]

    (tmp_path / "model.onnx").write_bytes(build(MLP).SerializeToString())
    settings = Settings.create(
        macs=0.5, importance="foreign", allocate="uniform", refit="none", force=True, device="cpu"
    )
    REGISTRY._plugins["foreign"] = Method(score, "of another package", frozenset())
    try:
        prune(tmp_path / "model.onnx", None, tmp_path / "out.onnx", settings)
    finally:
        del REGISTRY._plugins["foreign"]


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_method_is_named(fault: str, tmp_path: Path) -> None:
    rule, expected = FAULTS[fault]
    with pytest.raises(SettingsError) as error:
        _prune(rule, tmp_path)
    assert str(error.value).startswith("`importance=foreign` ")
    assert expected in str(error.value)
    assert not (tmp_path / "out.onnx").exists()


def test_scores_of_whole_numbers_are_accepted(tmp_path: Path) -> None:
    _prune(lambda _, c: Scores("mine", np.arange(c.n_units)), tmp_path)  # type: ignore[arg-type]
    assert (tmp_path / "out.onnx").exists()
