"""Objectives of small models, with scales from their own feeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx_oamip.core.records import Array, Images, Model, Objective
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph.outputs import with_outputs
from onnx_oamip.graph.runtime import Session
from onnx_oamip.objective import Normaliser, detect, scale
from onnx_oamip.statistics.class_samples import collect


def of_feeds(model: Model, feeds: Sequence[Mapping[str, Array]]) -> Objective:
    """The objective that the structure of a model gives, scaled on feeds."""
    found = detect(model)
    normaliser = Normaliser(found)
    session = Session(with_outputs(model, found.tensors), "cpu")
    for feed in feeds:
        normaliser.update(session.run(feed, found.tensors))
    return normaliser.finish()


def of_samples(model: Model, samples: Samples, task: str | None = None) -> Objective:
    """The objective that the structure, the labels of samples or a stated task give, scaled on them."""
    return scale(model, detect(model, samples.labels, task), samples, "cpu")


def class_samples(
    model: Model, samples: Samples, per_class: int = 1, seed: int = 0
) -> Images | None:
    """Samples of every class of the first head that the objective has; None where it has none."""
    objective = of_samples(model, samples)
    return collect(model, objective, samples, "cpu", per_class=per_class, seed=seed)
