"""Statistics on request: what is collected, once, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import MLP, build, load, samples

from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.records import Coupling, Model, Request, Scores, Statistics
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.graph.coupling import couple
from onnx_oamip.importance import METHODS, Method
from onnx_oamip.planning.scoring import score
from onnx_oamip.published.dependence import pooled_activations
from onnx_oamip.published.nnrelief import absolute_signal
from onnx_oamip.statistics import calibration, class_samples, covariances
from onnx_oamip.statistics.collector import COLLECTORS, collect
from onnx_oamip.statistics.context import Context

PASSES = {
    Request.MOMENTS: calibration,
    Request.COVARIANCE: covariances,
    Request.CLASS_SAMPLES: class_samples,
    Request.ABSOLUTE_ACTIVATIONS: absolute_signal,
    Request.POOLED_ACTIVATIONS: pooled_activations,
}
"""The module whose ``collect`` answers each request by a pass over the samples."""


@pytest.fixture
def context(tmp_path: Path) -> Context:
    model = load(build(MLP), tmp_path)
    found = dataset.load({**samples(model, 40), "labels": np.arange(40) % 4}, model)
    assert found is not None
    return Context(model, couple(model), found, None, "cpu", Settings.create(macs=0.5, workers=1))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that were answered by a pass over the samples, in order."""
    made: list[Request] = []
    for request, module in PASSES.items():

        def counted(
            *args: Any, real: Any = module.collect, request: Request = request, **names: Any
        ) -> Any:
            made.append(request)
            return real(*args, **names)

        monkeypatch.setattr(module, "collect", counted)
    return made


def test_every_request_has_a_collector() -> None:
    assert set(COLLECTORS) == set(PASSES) == set(Request)


@pytest.mark.parametrize("requests", [(r,) for r in Request] + [tuple(Request)])
def test_what_is_requested_is_collected_and_nothing_else(
    context: Context, passes: list[Request], requests: Sequence[Request]
) -> None:
    found = collect(context, requests)
    assert set(found.answers) == set(passes) == set(requests)
    assert len(passes) == len(requests)


def test_nothing_is_collected_twice_for_another_budget(
    context: Context, passes: list[Request]
) -> None:
    first = collect(context, {Request.MOMENTS})
    again = collect(
        replace(context, settings=context.settings.model_copy(update={"macs": 0.2})),
        {Request.MOMENTS},
    )
    assert again.moments is first.moments
    assert passes == [Request.MOMENTS]


def test_other_samples_or_settings_are_collected_anew(
    context: Context, passes: list[Request]
) -> None:
    whole = collect(context, {Request.MOMENTS})
    few = collect(replace(context, samples=context.samples.take(np.arange(8))), {Request.MOMENTS})
    seeded = replace(context, settings=context.settings.model_copy(update={"seed": 1}))
    collect(seeded, {Request.MOMENTS})
    assert passes == [Request.MOMENTS] * 3
    assert any((few.moments[axis].mean != whole.moments[axis].mean).any() for axis in whole.moments)


def test_forgotten_answers_are_collected_anew(context: Context, passes: list[Request]) -> None:
    collect(context, {Request.MOMENTS, Request.COVARIANCE})
    context.collected.forget(but={Request.MOMENTS})
    passes.clear()
    collect(context, {Request.MOMENTS, Request.COVARIANCE})
    assert passes == [Request.COVARIANCE]


@pytest.mark.parametrize("name", METHODS)
def test_scoring_collects_what_the_method_requests(
    context: Context, passes: list[Request], name: str
) -> None:
    settings = context.settings.model_copy(update={"importance": name, "mode": "decoupled"})
    score(replace(context, settings=settings))
    assert set(passes) == METHODS[name].requests(settings)


def test_a_method_that_reads_more_than_it_requests_is_refused(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(
        model: Model, coupling: Coupling, statistics: Statistics | None, settings: Settings
    ) -> Scores:
        assert statistics is not None
        assert statistics.moments
        return Scores("greedy", np.full(coupling.n_units, float(len(statistics.grams))))

    table = {**METHODS, "greedy": Method(greedy, "reads covariances without a request")}
    monkeypatch.setattr("onnx_oamip.planning.scoring.find", table.__getitem__)
    asked = replace(context, settings=context.settings.model_copy(update={"importance": "greedy"}))
    with pytest.raises(
        SettingsError, match=r"reads the statistic 'covariance' .* add Request\.COVARIANCE"
    ):
        score(asked)
