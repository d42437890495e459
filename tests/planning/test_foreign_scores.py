"""Importance methods of other packages: what they return, raise or change is checked before it is used."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import MLP, build, load, samples

from onnx_oamip import Scores, Settings, prune
from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.records import Coupling, Model, Request, Statistics
from onnx_oamip.importance import Method
from onnx_oamip.importance.registry import REGISTRY
from onnx_oamip.planning import limits
from onnx_oamip.planning.limits import LimitMethod, LimitRule, UpperLimits
from onnx_oamip.statistics.context import Context


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


def _moves_a_unit(_model: Model, coupling: Coupling) -> object:
    coupling.unit_group[0] = 1 - coupling.unit_group[0]
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
    "group": (_moves_a_unit, "changed the model"),
    "complex": (
        lambda _, c: replace(_ranks(c), values=np.full(c.n_units, 1j)),
        "that are complex numbers",
    ),
    "no orders": (lambda _, c: replace(_ranks(c), others=None), "AttributeError"),  # type: ignore[arg-type]
    "programs": (lambda _, c: replace(_ranks(c), programs=(1,)), "AttributeError"),  # type: ignore[arg-type]
    "notes": (lambda _, c: replace(_ranks(c), notes=(1,)), "a note is a int, not a text"),  # type: ignore[arg-type]
}


def _prune(rule: Callable[[Model, Coupling], object], tmp_path: Path) -> None:
    def score(model: Model, coupling: Coupling, _: Statistics | None, __: Settings) -> Scores:
        return rule(model, coupling)  # type: ignore[return-value]

    _prune_by(Method(score, "of another package", frozenset()), tmp_path)


def _prune_by(method: Method, tmp_path: Path, **options: object) -> None:
    (tmp_path / "model.onnx").write_bytes(build(MLP).SerializeToString())
    settings = Settings.create(
        **{
            "macs": 0.5,
            "importance": "foreign",
            "allocate": "uniform",
            "refit": "none",
            "force": True,
            "device": "cpu",
            **options,
        }
    )
    data = None
    if method.requests(settings) or "limits" in options:
        data = samples(load(build(MLP), tmp_path), 40)
    REGISTRY._plugins["foreign"] = method
    try:
        prune(tmp_path / "model.onnx", data, tmp_path / "out.onnx", settings)
    finally:
        del REGISTRY._plugins["foreign"]


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_method_is_named(fault: str, tmp_path: Path) -> None:
    rule, expected = FAULTS[fault]
    with pytest.raises(SettingsError) as error:
        _prune(rule, tmp_path)
    assert re.match("(the scores of )?`importance=foreign` ", str(error.value))
    assert expected in str(error.value)
    assert not (tmp_path / "out.onnx").exists()


def test_scores_of_whole_numbers_are_accepted(tmp_path: Path) -> None:
    _prune(lambda _, c: Scores("mine", np.arange(c.n_units)), tmp_path)  # type: ignore[arg-type]
    assert (tmp_path / "out.onnx").exists()


def _peaks(context: Context) -> object:
    raise KeyError("peaks")


def test_faulty_statistic_is_named(tmp_path: Path) -> None:
    request: Request[object] = Request("mine: peaks", _peaks)
    method = Method(lambda _, c, __, ___: _ranks(c), "of another package", frozenset({request}))
    with pytest.raises(
        SettingsError, match=r"^the statistic 'mine: peaks' raised KeyError: 'peaks'; correct"
    ):
        _prune_by(method, tmp_path)
    assert not (tmp_path / "out.onnx").exists()


LIMITS: dict[str, tuple[LimitRule, str]] = {
    "exits": (lambda *_: sys.exit(3), "raised SystemExit: 3; correct the method"),
    "nothing": (lambda *_: None, "raised AttributeError"),  # type: ignore[arg-type, return-value]
    "short": (lambda *_: UpperLimits(np.zeros(5), "mine"), "shares of shape (5,) for 2 groups"),
    "nan": (lambda *_: UpperLimits(np.full(2, np.nan), "mine"), "nan as the share of group 0"),
    "above 1": (
        lambda *_: UpperLimits(np.array([0.5, 1.5]), "mine"),
        "1.5 as the share of group 1",
    ),
}


@pytest.mark.parametrize("fault", LIMITS)
def test_faulty_limit_method_is_named(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, expected = LIMITS[fault]
    plugins = {**limits.REGISTRY._plugins, "mine": LimitMethod(rule, "of another package")}
    monkeypatch.setattr(limits.REGISTRY, "_plugins", plugins)
    method = Method(lambda _, c, __, ___: _ranks(c), "of another package", frozenset())
    with pytest.raises(SettingsError) as error:
        _prune_by(method, tmp_path, limits="mine")
    assert str(error.value).startswith("`limits=mine` ")
    assert expected in str(error.value)
    assert not (tmp_path / "out.onnx").exists()
