"""Statistics on request: what is collected, once, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import objectives
import pytest
from graphs import MLP, build, load, samples

from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.records import Coupling, Model, Request, Scores, Statistics
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph.coupling import couple
from onnx_oamip.importance import Method, find, names, register
from onnx_oamip.planning.scoring import score
from onnx_oamip.published.dependence import pooled_activations
from onnx_oamip.published.dependence.requests import POOLED_ACTIVATIONS
from onnx_oamip.published.nnrelief import absolute_signal
from onnx_oamip.published.nnrelief.requests import ABSOLUTE_ACTIVATIONS
from onnx_oamip.statistics import calibration, class_samples, covariances
from onnx_oamip.statistics.collector import (
    SENSITIVITY_SAMPLES,
    collect,
    parts,
    undivided_groups,
)
from onnx_oamip.statistics.context import Context
from onnx_oamip.statistics.requests import CLASS_SAMPLES, COVARIANCE, MOMENTS, RELEVANCE

PASSES = {
    MOMENTS: calibration,
    COVARIANCE: covariances,
    CLASS_SAMPLES: class_samples,
    ABSOLUTE_ACTIVATIONS: absolute_signal,
    POOLED_ACTIVATIONS: pooled_activations,
}
"""The module whose ``collect`` answers each request by a pass over the samples."""


@pytest.fixture
def context(tmp_path: Path) -> Context:
    model = load(build(MLP), tmp_path)
    found = dataset.load({**samples(model, 40), "labels": np.arange(40) % 4}, model)
    assert found is not None
    return Context(
        model,
        couple(model),
        found,
        None,
        "cpu",
        Settings.create(macs=0.5, workers=1),
        objectives.of_samples(model, found),
    )


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Request[Any]]:
    """The requests that were answered by a pass over the samples, in order."""
    made: list[Request[Any]] = []
    for request, module in PASSES.items():

        def counted(
            *args: Any, real: Any = module.collect, request: Request[Any] = request, **names: Any
        ) -> Any:
            made.append(request)
            return real(*args, **names)

        monkeypatch.setattr(module, "collect", counted)
    return made


@pytest.mark.parametrize("requests", [(r,) for r in PASSES] + [tuple(PASSES)])
def test_only_requested_statistics_are_collected(
    context: Context, passes: list[Request[Any]], requests: Sequence[Request[Any]]
) -> None:
    found = collect(context, requests)
    assert set(found.answers) == set(passes) == set(requests)
    assert len(passes) == len(requests)


def test_passes_run_in_a_fixed_order(context: Context, passes: list[Request[Any]]) -> None:
    """Built-in statistics first, then by name, in whatever order they are requested."""
    collect(context, reversed(list(PASSES)))
    in_order = [MOMENTS, CLASS_SAMPLES, COVARIANCE, ABSOLUTE_ACTIVATIONS, POOLED_ACTIVATIONS]
    assert passes == in_order


def _count(context: Context) -> int:
    return context.samples.count


def _double_count(context: Context) -> int:
    return 2 * context.samples.count


def test_requests_are_compared_by_name(context: Context) -> None:
    first, same = Request("toy: samples", _count), Request("toy: samples", _count)
    other = Request("toy: twice", _double_count)
    found = collect(context, [first, same, other])
    assert found.answers == {first: 40, other: 80}
    assert found[same] == 40


def test_statistics_with_the_same_name_are_refused(context: Context) -> None:
    collect(context, {Request("toy: samples", _count)})
    with pytest.raises(SettingsError, match="two different statistics are named 'toy: samples'"):
        collect(context, {Request("toy: samples", _double_count)})


def test_another_budget_collects_nothing_again(
    context: Context, passes: list[Request[Any]]
) -> None:
    first = collect(context, {MOMENTS})
    again = collect(
        replace(context, settings=context.settings.model_copy(update={"macs": 0.2})),
        {MOMENTS},
    )
    assert again.moments is first.moments
    assert passes == [MOMENTS]


def test_other_samples_or_settings_are_collected_again(
    context: Context, passes: list[Request[Any]]
) -> None:
    whole = collect(context, {MOMENTS})
    few = collect(replace(context, samples=context.samples.take(np.arange(8))), {MOMENTS})
    seeded = replace(context, settings=context.settings.model_copy(update={"seed": 1}))
    collect(seeded, {MOMENTS})
    assert passes == [MOMENTS] * 3
    assert any((few.moments[axis].mean != whole.moments[axis].mean).any() for axis in whole.moments)


def test_forgotten_statistics_are_collected_again(
    context: Context, passes: list[Request[Any]]
) -> None:
    collect(context, {MOMENTS, COVARIANCE})
    context.collected.forget(but={MOMENTS})
    passes.clear()
    collect(context, {MOMENTS, COVARIANCE})
    assert passes == [COVARIANCE]


@pytest.mark.parametrize("name", names())
def test_scoring_collects_the_statistics_of_the_method(
    context: Context, passes: list[Request[Any]], name: str
) -> None:
    settings = context.settings.model_copy(update={"importance": name, "mode": "decoupled"})
    score(replace(context, settings=settings))
    # An objective of one term needs no relevance of consumers.
    assert set(passes) == find(name).requests(settings) - {RELEVANCE}


def test_reading_an_unrequested_statistic_is_refused(
    context: Context, separate_registry: None
) -> None:
    def greedy(
        model: Model, coupling: Coupling, statistics: Statistics | None, settings: Settings
    ) -> Scores:
        assert statistics is not None
        assert statistics.moments
        return Scores("greedy", np.full(coupling.n_units, float(len(statistics[COVARIANCE]))))

    register("greedy", Method(greedy, "reads covariances without a request"))
    asked = replace(context, settings=context.settings.model_copy(update={"importance": "greedy"}))
    with pytest.raises(
        SettingsError,
        match="reads the statistic 'covariance' without requesting it; add its request",
    ):
        score(asked)


def grouped(context: Context, groups: Sequence[object], fixed_batch: int | None = None) -> Samples:
    """As many samples as groups are given for, in random order."""
    found = dataset.load(samples(context.model, len(groups)), context.model)
    assert found is not None
    named = replace(found, groups=np.asarray(groups), fixed_batch=fixed_batch)
    return dataset.shuffle(named, 3)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", [int, str])
def test_losses_are_measured_on_whole_groups(context: Context, seed: int, kind: type) -> None:
    """About a quarter of the samples are of the groups that no repair uses; the most that is needed is measured on."""
    sizes = np.random.default_rng(seed).integers(1, 40, 60)
    names = [kind(name) for name in np.repeat(np.arange(60), sizes)]
    every = grouped(context, names)
    fitted, measured = parts(every)
    assert fitted.groups is not None
    assert measured.groups is not None
    assert not set(fitted.groups) & set(measured.groups)
    assert abs(every.count - fitted.count - every.count // 4) <= 20
    assert measured.count == min(SENSITIVITY_SAMPLES, every.count - fitted.count)
    assert len(set(measured.groups)) > 0.7 * (60 - len(set(fitted.groups)))
    for part, again in zip((fitted, measured), parts(every), strict=True):
        assert part.origin is not None
        assert again.origin is not None
        np.testing.assert_array_equal(part.origin, again.origin)
    assert undivided_groups(every) == undivided_groups(replace(every, groups=None)) == ""


@pytest.mark.parametrize(
    ("groups", "fixed_batch", "cause"),
    [
        ([0] * 40, None, "all calibration samples are of one group"),
        (["a"] * 40, None, "all calibration samples are of one group"),
        ([0] * 38 + [1] * 2, 4, "leaves the 4 samples of a batch on both sides"),
    ],
)
def test_groups_that_cannot_be_divided_are_measured_as_samples_without(
    context: Context, groups: list[object], fixed_batch: int | None, cause: str
) -> None:
    every = grouped(context, groups, fixed_batch)
    assert cause in undivided_groups(every)
    for part, plain in zip(parts(every), parts(replace(every, groups=None)), strict=True):
        assert part.origin is not None
        assert plain.origin is not None
        np.testing.assert_array_equal(part.origin, plain.origin)
