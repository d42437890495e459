"""Accuracy without retraining at equal MACs: ours, onnxsim, Torch-Pruning and chance, on every shipped network.

All get the same 512 calibration images; Taylor and Hessian get their labels too. A rival has a ratio where we have a
budget: its ratio is bisected until the MACs of its ONNX file are at most the budget. ``rivals-rows`` has a row per
model, budget and method, ``rivals`` the best of each rival, picked per row by the very accuracy that is shown,
``rivals-summary`` what half the MACs cost. Needs the ``experiments`` extra.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx

from onnx_oamip import cost, prepare, search
from onnx_oamip import model as models
from onnx_oamip.errors import BudgetNotMet
from onnx_oamip.runtime import Session
from onnx_oamip.settings import Settings

from .rivals_figure import draw
from .studies import MODELS, Row, paths, save, store

BUDGETS = (0.8, 0.65, 0.5, 0.35, 0.25, 0.15)
OURS: Mapping[str, dict[str, str]] = {"ours": {}, "random": {"importance": "random", "refit": "none"}}
FAMILIES = ("onnxsim", "Torch-Pruning")
ROWS = ("model", "MACs asked", "method", "seed", "MACs kept", "accuracy", "points lost", "why not")
COLUMNS = ("model", "MACs asked", "before", "ours", "random", *FAMILIES, "best rival", "ours ahead by")
SUMMARY = ("model", "lost by ours", "lost by best rival", "ratio", "best rival")
HIGHEST = (0.97, 0.9, 0.8)
"""Ratios to start from: some tools break at the first ones."""
TRIES, NEAR = 9, 0.01


def run(out: Path, seed: int, names: tuple[str, ...] = (), seeds: int = 1) -> str:
    """One row per model and budget; ours and random are means over ``seeds`` seeds from ``seed`` on."""
    rows: list[Row] = []
    for name in names or tuple(MODELS):
        bench = Bench(name)
        for method, changes in OURS.items():
            for s in range(seed, seed + seeds):
                rows += _ours(bench, method, changes, s)
                store(out, "rivals-rows", rows, ROWS, seed)
        for method, peer in bench.peers().items():
            rows += _theirs(bench, method, peer)
            store(out, "rivals-rows", rows, ROWS, seed)
    draw(rows, out / "rivals.svg")
    save(out, "rivals-summary", summary(rows), SUMMARY, seed)
    return save(out, "rivals", best(rows), COLUMNS, seed)


class Bench:
    """A shipped network with its data: how MACs and accuracy are found, the same way for every method."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model, self.data = paths(name)
        with np.load(self.data) as held:
            scale = held["input.scale"]
            self.images, self.labels = held["input"].astype(np.float32) * scale, held["labels"]
            self.unseen, self.truth = held["eval.input"].astype(np.float32) * scale, held["eval.labels"]
        self.macs = cost.count(models.load(self.model)).macs
        self.before = self.accuracy(onnx.load(self.model))

    def share(self, proto: onnx.ModelProto) -> float:
        """MACs over those of the original."""
        return cost.count(models.from_proto(proto)).macs / self.macs

    def accuracy(self, proto: onnx.ModelProto) -> float:
        """Percent of the evaluation images, in ONNX Runtime."""
        session = Session(proto, "cpu")
        parts = [session.run({"input": self.unseen[i : i + 500]})[0] for i in range(0, len(self.unseen), 500)]
        return 100 * float((np.concatenate(parts).argmax(1) == self.truth).mean())

    def peers(self) -> dict[str, Any]:
        """The rivals by name."""
        from . import peers

        theirs = peers.of_torch_pruning(self.name, self.images, self.labels)
        return {**theirs, **peers.of_onnxsim(self.name, self.images)}

    def row(self, budget: float, method: str, seed: int | None, proto: onnx.ModelProto | None, why: str = "") -> Row:
        """``proto`` None: no such model, and ``why``."""
        row: Row = {"model": self.name, "MACs asked": budget, "method": method, "seed": seed}
        row |= {"before": round(self.before, 2), "why not": why or None}
        if proto is not None:
            found = self.accuracy(proto)
            row |= {"MACs kept": round(self.share(proto), 4), "accuracy": round(found, 2)}
            row["points lost"] = round(self.before - found, 2)
        print({k: v for k, v in row.items() if v is not None}, flush=True)
        return row


def _ours(bench: Bench, method: str, changes: dict[str, str], seed: int) -> list[Row]:
    with TemporaryDirectory() as kept:
        settings = Settings.create(macs=BUDGETS[0], seed=seed, cache=kept, **changes)
        ready = prepare.prepare(bench.model, bench.data, settings)
        rows = []
        for budget in BUDGETS:
            here = replace(ready, settings=settings.model_copy(update={"macs": budget}))
            try:
                rows.append(bench.row(budget, method, seed, search.search(here).pruned.proto))
            except BudgetNotMet as error:
                rows.append(bench.row(budget, method, seed, None, str(error)))
        return rows


def _theirs(bench: Bench, method: str, peer: Any) -> list[Row]:
    failed: list[str] = []

    @cache
    def share(ratio: float) -> float:
        try:
            return bench.share(peer.cut(ratio))
        except Exception as error:  # whatever a rival raises is its result at this ratio
            failed.append(f"{type(error).__name__}: {str(error).strip()[:80]}")
            return float("nan")

    rows = []
    for budget in BUDGETS:
        ratio = bisect(share, budget)
        if ratio is None:
            rows.append(bench.row(budget, method, None, None, failed[-1] if failed else "MACs not reached"))
        else:
            rows.append(bench.row(budget, method, None, peer.refit(peer.cut(ratio))))
    return rows


def bisect(share: Callable[[float], float], target: float) -> float | None:
    """The least ratio found whose share is at most ``target``; None where there is none, shares that are NaN included.

    Stops where the share is within a hundredth of the target. Halvings start at the same ends for every target, so a
    cached ``share`` is asked for few ratios twice.
    """
    high = next((ratio for ratio in HIGHEST if share(ratio) <= target), None)
    if high is None:
        return None
    low = 0.0
    for _ in range(TRIES):
        if target - share(high) <= NEAR:
            break
        middle = (low + high) / 2
        if share(middle) <= target:
            high = middle
        else:
            low = middle
    return high


def best(rows: Sequence[Row]) -> list[Row]:
    """One row per model and budget: ours and random (means over seeds), and the best of each rival."""
    found = []
    for model, budget in dict.fromkeys((r["model"], r["MACs asked"]) for r in rows):
        here = [r for r in rows if (r["model"], r["MACs asked"]) == (model, budget)]
        row: Row = {"model": model, "MACs asked": budget, "before": here[0]["before"]}
        for method in OURS:
            seen = [r.get("accuracy") for r in here if r["method"] == method]
            row[method] = None if not seen or None in seen else round(float(np.mean(seen)), 2)
        for family in FAMILIES:
            seen = [r["accuracy"] for r in here if r["method"].startswith(family) and "accuracy" in r]
            row[family] = max(seen, default=None)
        rivals = [r for r in here if r["method"] not in OURS and "accuracy" in r]
        top = max(rivals, key=lambda r: r["accuracy"], default=None)
        if top is not None:
            row["best rival"] = top["method"]
            if row["ours"] is not None:
                row["ours ahead by"] = round(row["ours"] - top["accuracy"], 2)
        found.append(row)
    return found


def summary(rows: Sequence[Row], budget: float = 0.5) -> list[Row]:
    """Points lost at ``budget`` by ours over those of the best rival, per model and for the means over models.

    A ratio is left out where the best rival loses nothing.
    """
    found = []
    for row in best(rows):
        rival = max((row[f] for f in FAMILIES if row[f] is not None), default=None)
        if row["MACs asked"] == budget and rival is not None and row["ours"] is not None:
            lost, theirs = row["before"] - row["ours"], row["before"] - rival
            found.append(_against(row["model"], lost, theirs, row["best rival"]))
    if found:
        means = [float(np.mean([r[c] for r in found])) for c in SUMMARY[1:3]]
        found.append(_against("mean", *means, None))
    return found


def _against(model: str, ours: float, theirs: float, rival: str | None) -> Row:
    ratio = round(ours / theirs, 3) if theirs > 0 else None
    row = {"model": model, "lost by ours": round(ours, 2), "lost by best rival": round(theirs, 2), "ratio": ratio}
    return {**row, "best rival": rival}
