"""Programs over networks with several classification heads, against enumeration of all choices of units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import objectives
import pytest
from graphs import build, load
from scipy.special import log_softmax

from onnx_oamip.core.records import ClassHead, Coupling, Floats, Images, Model, Objective
from onnx_oamip.data import dataset
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.importance.oamip import solve
from onnx_oamip.importance.oamip.formulation import formulate
from onnx_oamip.importance.oamip.region import Form
from onnx_oamip.importance.oamip.select import by_class
from onnx_oamip.programs.solvers import SolverLimits
from onnx_oamip.statistics import class_samples

WEIGHT = 5.0
MASKS = ", float[1,2] m1, float[1,2] m2"
TWO_HEADS = """(float[N,5] x MASKS) => (float[N,3] y, float[N,2] z)
<float[5,2] w1, float[2] b1, float[2,2] w2, float[2] b2, float[2,3] wy, float[3] by, float[2,2] wz> {
    a = Gemm(x, w1, b1)
    h = Relu(a)
    MASKED1
    b = Gemm(H, w2, b2)
    r = Relu(b)
    MASKED2
    y = Gemm(R, wy, by)
    z = MatMul(H, wz)
}"""


def _text(masked: bool) -> str:
    text = TWO_HEADS.replace(" MASKS", MASKS if masked else "")
    text = text.replace("MASKED1", "hm = Mul(h, m1)" * masked)
    text = text.replace("MASKED2", "rm = Mul(r, m2)" * masked)
    return text.replace("(H,", "(hm," if masked else "(h,").replace(
        "(R,", "(rm," if masked else "(r,"
    )


def _prepared(folder: Path, seed: int) -> tuple[Model, Coupling, Objective, Images]:
    model = load(build(_text(masked=False), seed=seed), folder)
    arrays = {"x": np.random.default_rng(seed).standard_normal((60, 5)).astype(np.float32)}
    samples = dataset.load(arrays, model)
    assert samples is not None
    objective = objectives.of_samples(model, samples)
    found = class_samples.collect(model, objective, samples, "cpu", per_class=1, seed=seed)
    assert found is not None
    return model, couple(model), objective, found


def _enumerated(coupling: Coupling, images: Images, seed: int) -> tuple[Floats, Floats]:
    """All choices of units (choices, units), and the objective of each."""
    session = Session(build(_text(masked=True), seed=seed), "cpu")
    x = np.concatenate([feed["x"] for feed in images.feeds])
    keeps = np.array(list(product((0.0, 1.0), repeat=coupling.n_units)))
    values = []
    for keep in keeps:
        masks = {
            "m1": keep[coupling.axes["h", 1]][None].astype(np.float32),
            "m2": keep[coupling.axes["r", 1]][None].astype(np.float32),
        }
        outputs = dict(zip(("y", "z"), session.run({"x": x, **masks}, ["y", "z"]), strict=True))
        loss = sum(
            head.weight * _cross_entropy(outputs[head.logits], head) for head in images.heads
        )
        layers = [(keep[group.units] - 2).sum() / len(group.units) for group in coupling.groups]
        values.append(WEIGHT * loss + max(layers))
    return keeps, np.asarray(values)


def _cross_entropy(logits: Floats, head: ClassHead) -> float:
    labels = head.labels.reshape(-1)
    counted = labels >= 0
    log = log_softmax(logits.astype(np.float64), axis=1)
    return float(-log[np.flatnonzero(counted), labels[counted]].mean())


def test_heads_are_weighed_by_their_spreads(tmp_path: Path) -> None:
    _, _, objective, images = _prepared(tmp_path, 0)
    assert [head.logits for head in images.heads] == ["y", "z"]
    spreads = [term.scale.spread for term in objective.judged if term.scale is not None]
    inverse = 1 / np.asarray(spreads)
    expected = inverse / inverse.mean()
    assert [head.weight for head in images.heads] == pytest.approx(expected.tolist())
    assert all(head.labels.shape == images.labels.shape for head in images.heads)


@pytest.mark.parametrize("seed", range(3))
def test_exact_program_finds_the_best_of_all_choices(tmp_path: Path, seed: int) -> None:
    model, coupling, _, images = _prepared(tmp_path, seed)
    keeps, values = _enumerated(coupling, images, seed)
    assert len(values) == 16
    formulation = formulate(model, coupling, images, Form("exact", weight=WEIGHT))
    assert formulation.units.tolist() == [0, 1, 2, 3]
    outcome = solve.optimise(formulation, SolverLimits(time_s=30, gap=1e-6), "highs")
    assert outcome.record["status"] == "optimal"
    assert outcome.objective == pytest.approx(values.min(), rel=1e-4)
    chosen = (keeps == np.round(outcome.keep)).all(axis=1)
    assert values[chosen] == pytest.approx(values.min(), rel=1e-4)


def test_every_choice_has_the_enumerated_loss(tmp_path: Path) -> None:
    model, coupling, _, images = _prepared(tmp_path, 1)
    formulation = formulate(model, coupling, images, Form("exact", weight=WEIGHT))
    for keep, expected in zip(*_enumerated(coupling, images, 1), strict=True):
        values = formulation.complete(keep)
        values[formulation.loss.epigraph] = formulation.loss.losses(
            formulation.loss.outputs(values)
        )
        assert formulation.program.value(values) == pytest.approx(expected, rel=1e-5)


def test_the_second_head_changes_the_choice(tmp_path: Path) -> None:
    """With the first head alone a unit that only the second one reads is free."""
    model, coupling, _, images = _prepared(tmp_path, 0)

    def keep(heads: Sequence[ClassHead]) -> Floats:
        first, *others = heads
        some = replace(
            images,
            labels=first.labels,
            logits=first.logits,
            weight=first.weight,
            others=tuple(others),
        )
        form = Form("exact", weight=50.0)
        formulation = formulate(model, coupling, some, form)
        found = solve.optimise(formulation, SolverLimits(time_s=30, gap=1e-6), "highs")
        result = np.zeros(coupling.n_units)
        result[formulation.units] = np.round(found.keep)
        return result

    y, z = images.heads
    units_of_z = coupling.axes["h", 1]
    assert keep([z])[units_of_z].sum() >= 1
    assert not keep([z])[coupling.axes["r", 1]].any()
    assert keep([y, z]).sum() >= keep([y]).sum()


def test_programs_of_single_classes_have_all_heads(tmp_path: Path) -> None:
    _, _, _, images = _prepared(tmp_path, 2)
    parts = by_class(images)
    assert len(parts) == len(np.unique(images.labels[images.labels >= 0]))
    for part in parts:
        assert len(part.heads) == 2
        for head in part.heads:
            assert head.labels.shape == part.labels.shape
