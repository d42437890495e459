"""Frontier of a model: cost and accuracy at several budgets, from one preparation.

Statistics, scores and sensitivities are made once; every budget then is a plan, a cut, a refit and all checks of
``prune``. Speed is measured and reported, but is no condition: a model may be slower than the original.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from onnx_oamip.api import proof
from onnx_oamip.api.prepare import prepare
from onnx_oamip.artifacts.output import check_new_folder, check_output, write
from onnx_oamip.core.atomic_files import output_errors
from onnx_oamip.core.clock import Clock
from onnx_oamip.core.errors import (
    BudgetNotMet,
    GateFailed,
    ModelError,
    SettingsError,
)
from onnx_oamip.core.progress import FRONTIER, Progress
from onnx_oamip.core.records import Frontier, Point
from onnx_oamip.core.settings import Settings
from onnx_oamip.data.sources import Source, source_name
from onnx_oamip.graph.loading import ModelSource
from onnx_oamip.planning import iterative, search
from onnx_oamip.planning.attempts import Prepared
from onnx_oamip.reporting import documents
from onnx_oamip.verification import equivalence

LEVELS = (0.8, 0.65, 0.5, 0.35, 0.25, 0.15)
"""Shares of the multiply-accumulates at which a model is looked at."""


def frontier(
    path: ModelSource,
    source: Source,
    settings: Settings,
    levels: Sequence[float] = LEVELS,
    eval_data: Source | None = None,
    *,
    progress: Progress | None = None,
    scores: str | os.PathLike[str] | None = None,
    save_dir: str | os.PathLike[str] | None = None,
) -> Frontier:
    """Prune a model to several shares of its MACs, widest first.

    Args:
        path: Model file, or a model in memory.
        source: Calibration samples.
        settings: Options; other budgets in it hold at every level.
        levels: Shares of the MACs to keep.
        eval_data: Samples to measure on. Default: the held-out part of ``source``.
        progress: Called as ``progress(stage, done, total)``.
        scores: File of scores written by ``score``, used in place of ``settings.importance``.
        save_dir: Folder for the models, named ``MODEL-macs0.5.onnx``; it is made if it does not exist. Default: none
            is written.

    Returns:
        One point per level; a level that cannot be met has a reason in place of a result.

    Raises:
        OamipError: Bad input or a missing package.
        BudgetNotMet: No level can be met.
    """
    shares = sorted(set(levels), reverse=True)
    if not shares:
        raise SettingsError("there are no levels; give at least one share of the MACs to keep.")
    asked = [
        Settings.create(**{**settings.model_dump(), "macs": share, "force": True})
        for share in shares
    ]
    targets = {
        share: _target(path, save_dir, share, (source, eval_data, scores)) for share in shares
    }
    clock = Clock(progress, FRONTIER)
    ready = prepare(
        path,
        source,
        asked[0],
        eval_data=eval_data,
        progress=progress,
        clock=clock,
        scores=scores,
    )
    points = []
    show_point = getattr(progress, "show_point", None)
    for i, share in enumerate(shares):
        here = replace(ready, settings=ready.settings.model_copy(update={"macs": share}))
        with clock("plan, refit and verify"):
            points.append(_point(here, share, targets[share]))
        if progress:
            progress("frontier", i + 1, len(shares))
        if show_point is not None:
            show_point(documents.frontier_point(points[-1], ready.before))
    proofs = [p.verification for p in points if p.verification is not None]
    if not proofs:
        raise BudgetNotMet(f"no level can be met; at {shares[0]:g}: {points[0].reason}")
    kept = {
        k: v
        for k, v in ready.settings.model_dump(mode="json").items()
        if k not in ("macs", "force")
    }
    return Frontier(
        model=ready.model,
        coupling=ready.coupling,
        before=ready.before,
        accuracy=proofs[0].accuracy_before,
        importance=ready.scores.method,
        points=tuple(points),
        timings=clock.seconds,
        settings={
            "levels": shares,
            **kept,
            "device": ready.device,
            "data": source_name(source),
            "eval_data": source_name(eval_data),
            "scores": source_name(scores),
            "save_dir": source_name(save_dir),
            "steps": sorted(set(ready.steps.tolist())),
            "evaluated": proofs[0].samples,
        },
        notes=(
            *ready.objective.notes,
            *ready.scores.notes,
            *equivalence.few_samples(proofs[0].samples),
            *ready.store.notes(),
        ),
        objective=ready.objective,
    )


def _target(
    path: ModelSource,
    folder: str | os.PathLike[str] | None,
    share: float,
    sources: tuple[object, ...],
) -> Path | None:
    """Path of the model of one level. Raises OutputError where it cannot be written there."""
    if folder is None:
        return None
    stem = "model" if isinstance(path, onnx.ModelProto) else Path(path).stem
    target = Path(folder) / f"{stem}-macs{share}.onnx"
    if Path(folder).exists():
        return check_output(path, target, sources, "`save_dir`")
    check_new_folder(Path(folder), "`save_dir`")
    return target


def _point(ready: Prepared, share: float, target: Path | None) -> Point:
    """The model of one level, written where it is proved."""
    try:
        ready, found = iterative.approach(ready)
        search.meets(ready.settings.budget, ready.before, found.after)
        verification = proof.prove(ready, found)
        proto = proof.in_file(ready, found)
    except (BudgetNotMet, GateFailed, ModelError) as error:
        return Point(share, reason=str(error))
    point = Point(share, found.after, np.asarray(found.plan.widths, np.int64), verification)
    if target is None:
        return point
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    sha256, size = write(proto, target)
    return replace(point, cost=replace(found.after, bytes=size), output=str(target), sha256=sha256)
