"""Selection of the part of a model that is trained: torch has to compute it as ONNX Runtime does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from onnx_oamip.core.records import Array
from onnx_oamip.graph.outputs import with_outputs
from onnx_oamip.graph.runtime import Session
from onnx_oamip.recovery import parts
from onnx_oamip.recovery.batches import fed
from onnx_oamip.recovery.engine import CannotRun, Engine, is_supported
from onnx_oamip.recovery.losses import differentiable
from onnx_oamip.recovery.operators.calls import Tensor
from onnx_oamip.recovery.parts import Part
from onnx_oamip.recovery.task import Task
from onnx_oamip.recovery.trainable import Trainable

TOLERANCE = 0.02
"""Relative error of a tensor against ONNX Runtime above which an operator counts as computed differently."""
SMALLEST = 1e-12


def trained_part(task: Task) -> tuple[Part, tuple[str, ...]]:
    """Find the part that torch computes as ONNX Runtime does.

    Args:
        task: Models, samples and loss.

    Returns:
        The part, and the nodes that limit it with the reasons.
    """
    model = task.pruned
    wanted = _wanted(task)
    needed = parts.ancestors(model, wanted)
    reasons = {
        node.name: f"{node}: torch has no function for it"
        for node in needed
        if not is_supported(node)
    }
    feed = next(task.samples.batches(1))[1]
    trainable = Trainable(model)
    while True:
        part = parts.choose(model, wanted, reasons, trainable)
        if not part.weights or not part.tensors:
            return part, tuple(reasons.values())
        found = _first_difference(task, part, feed)
        if found is None:
            return part, tuple(reasons.values())
        reasons[found[0]] = found[1]


def _wanted(task: Task) -> list[str]:
    terms = [term.tensor for term in differentiable(task.objective)]
    names = (*terms, *(feature.tensor for feature in task.features))
    return parts.floating(task.pruned, dict.fromkeys(names))


def _first_difference(task: Task, part: Part, feed: Mapping[str, Array]) -> tuple[str, str] | None:
    """Name of the first node that torch cannot compute as ONNX Runtime does, and the reason; None if there is none."""
    model = task.pruned
    engine = Engine(model, part.tensors, given=part.given, every_branch=True)
    tensors = [*part.tensors, *part.given]
    values = _runtime_values(task, tensors, feed)
    given = fed({**feed, **{name: values[name] for name in part.given}}, "cpu")
    try:
        with torch.no_grad():
            found = engine.run(given)
    except CannotRun as error:
        home = model.homes[error.node.name]
        return home, f"{error.node}: {error.reason}"
    if all(_is_close(a, values[n]) for n, a in zip(part.tensors, found, strict=True)):
        return None
    return _locate(task, part, given, feed)


def _runtime_values(
    task: Task, tensors: Sequence[str], feed: Mapping[str, Array]
) -> dict[str, Array]:
    names = list(dict.fromkeys(tensors))
    proto = with_outputs(task.pruned, names)
    session = Session(proto, "cpu", what="the pruned model", exact=True)
    return dict(zip(names, session.run(feed, names), strict=True))


def _locate(
    task: Task, part: Part, given: Mapping[str, Tensor], feed: Mapping[str, Array]
) -> tuple[str, str]:
    """The node whose output is the first to differ."""
    model = task.pruned
    nodes = parts.ancestors(model, part.tensors, part.given)
    tensors = parts.floating(model, (name for node in nodes for name in node.outputs if name))
    values = _runtime_values(task, tensors, feed)
    with torch.no_grad():
        found = dict(zip(tensors, Engine(model, tensors, given=part.given).run(given), strict=True))
    for node in nodes:
        for name in node.outputs:
            if name in found and not _is_close(found[name], values[name]):
                return node.name, f"{node}: torch computes it differently"
    return nodes[-1].name, f"{nodes[-1]}: torch computes it differently"


def _is_close(found: Tensor, truth: Array) -> bool:
    ours = found.detach().numpy().astype(np.float64)
    theirs = truth.astype(np.float64)
    if ours.shape != theirs.shape:
        return False
    known = np.isfinite(theirs)
    error = np.linalg.norm(ours[known] - theirs[known])
    return bool(error <= TOLERANCE * np.linalg.norm(theirs[known]) + SMALLEST)
