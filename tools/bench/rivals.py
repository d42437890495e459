"""Accuracy without retraining at equal MACs: ours, onnxsim, Torch-Pruning and chance, on every shipped network.

All get the same 512 calibration images; Taylor and Hessian get their labels too. A rival has a ratio where we have a
budget: its ratio is bisected until the MACs of its ONNX file are at most the budget. Ours keeps widths in steps of one
channel, as the rivals do, and has time limits that nothing reaches: no clock decides anything here. Seed 0 takes the
images in their order, another seed shuffles them, which says which ones fit and which ones judge.

``rivals-rows-MODEL`` has a row per budget and method, and is written after each method. Methods that it already holds
are not run again: a stopped study continues, and deleting the rows of one method measures that method anew. The other
tables are computed from all rows in the folder, so that models can be run one at a time: ``rivals`` shows the best
variant of each rival, selected per row by the accuracy shown, ``rivals-importances`` every importance of ours, and
``rivals-summary`` the points lost at half the MACs. Needs the ``experiments`` extra.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from scipy.stats import binomtest

from onnx_oamip.api import prepare
from onnx_oamip.core.errors import BudgetNotMet
from onnx_oamip.core.records import Bools, Floats
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph import cost
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.runtime import Session
from onnx_oamip.planning import search

from .studies import MODELS, Resumable, Row, paths, save, together

BUDGETS = (0.8, 0.65, 0.5, 0.35, 0.25, 0.15)
OURS: Mapping[str, dict[str, str]] = {
    "ours": {},
    "random": {"importance": "random", "refit": "none"},
}
IMPORTANCES = ("l1", "l2", "activation", "oamip", "nnrelief", "snacs", "mint", "correlation")
"""Of ours, with its allocation and refit, at the first seed; the default is optimal brain surgeon."""
FIXED: Mapping[str, Any] = {
    "align": 1,
    "mode": "decoupled",
    "time_limit": 3600.0,
    "score_time": 3600.0,
}
FAMILIES = ("onnxsim", "Torch-Pruning")
ROWS = ("model", "MACs asked", "method", "seed", "MACs kept", "accuracy", "points lost", "why not")
COLUMNS = (
    "model",
    "MACs asked",
    "before",
    "ours",
    "lowest",
    "highest",
    "random",
    *FAMILIES,
    "best rival",
    "ours ahead by",
    "standard error",
)
IMPORTANCE_COLUMNS = ("model", "MACs asked", "before", "obs", *IMPORTANCES)
SUMMARY = ("model", "lost by ours", "lost by best rival", "ratio", "best rival")
HIGHEST = (0.97, 0.9, 0.8)
"""Ratios to start from: some tools break at the first ones."""
TRIES, NEAR = 9, 0.01
LEVEL = 0.05
"""A McNemar test at or above this does not tell two models apart."""


def run(out: Path, seed: int, names: tuple[str, ...] = (), seeds: int = 1) -> str:
    """Measure every method on every model, and compute the tables.

    Args:
        out: Folder of the rows; methods with rows there are not measured again.
        seed: First seed.
        names: Models; all shipped ones where empty.
        seeds: Number of seeds for ours and random, whose accuracies are means over them.

    Returns:
        The table of the best rivals in Markdown.
    """
    from . import peers  # noqa: F401  before hours of work: what it needs may not be installed

    for name in names or tuple(MODELS):
        _measure(out, name, seed, range(seed, seed + seeds))
    return conclude(out, seed)


def _measure(out: Path, name: str, seed: int, seeds: Sequence[int]) -> None:
    """Measure the methods whose rows of a model are not complete, and store every row."""
    study = Resumable(out, f"rivals-rows-{name}", ROWS, seed)
    bench = Bench(name)

    def measure(method: str, at: int | None, rows: Iterable[Row]) -> None:
        study.measure({"method": method, "seed": at}, len(BUDGETS), rows)

    for method, changes in OURS.items():
        for each in seeds:
            measure(method, each, _ours(bench, method, changes, each))
    for method, peer in bench.peers().items():
        measure(method, None, _theirs(bench, method, peer))
    for importance in IMPORTANCES:
        method, changes = f"ours ({importance})", {"importance": importance}
        measure(method, seed, _ours(bench, method, changes, seed))


def conclude(out: Path, seed: int) -> str:
    """Compute the tables from all rows in the folder."""
    files = [out / f"rivals-rows-{name}.json" for name in MODELS]
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    rows = [row for record in records for row in record["rows"]]
    measured = together(record["environment"] for record in records)
    found = best(rows)
    save(out, "rivals-importances", importances(rows), IMPORTANCE_COLUMNS, seed, measured=measured)
    save(out, "rivals-summary", summary(rows), SUMMARY, seed, measured=measured)
    text = save(out, "rivals", found, COLUMNS, seed, measured=measured)
    print("\n".join(remarks(found)))
    return text


class Bench:
    """A shipped network with its data: how MACs and accuracy are found, the same way for every method."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model, self.data = paths(name)
        with np.load(self.data) as held:
            scale = held["input.scale"]
            self.images, self.labels = held["input"].astype(np.float32) * scale, held["labels"]
            self.unseen, self.truth = (
                held["eval.input"].astype(np.float32) * scale,
                held["eval.labels"],
            )
        self.macs = cost.count(models.load(self.model)).macs
        self.before = self.accuracy(onnx.load(self.model))

    def shuffled(self, seed: int, folder: Path) -> Path:
        """The data with its calibration images in the order of a seed."""
        if seed == 0:
            return self.data
        with np.load(self.data) as held:
            arrays = dict(held)
        order = np.random.default_rng(seed).permutation(len(arrays["labels"]))
        arrays |= {key: arrays[key][order] for key in ("input", "labels")}
        np.savez(folder / "shuffled.npz", **arrays)
        return folder / "shuffled.npz"

    def share(self, proto: onnx.ModelProto) -> float:
        """MACs over those of the original."""
        return cost.count(models.from_proto(proto)).macs / self.macs

    def accuracy(self, proto: onnx.ModelProto) -> float:
        """Percent of the evaluation images, in ONNX Runtime."""
        return 100 * float(self.right(proto).mean())

    def right(self, proto: onnx.ModelProto) -> Bools:
        """Correct evaluation images, as a mask."""
        session = Session(proto, "cpu")
        parts = [
            session.run({"input": self.unseen[i : i + 500]})[0]
            for i in range(0, len(self.unseen), 500)
        ]
        found: Bools = np.concatenate(parts).argmax(1) == self.truth
        return found

    def peers(self) -> dict[str, Any]:
        """The rivals by name; torch keeps to one thread, so that sums have one order on every machine."""
        import torch

        from . import peers

        torch.set_num_threads(1)
        theirs = peers.of_torch_pruning(self.name, self.images, self.labels)
        return {**theirs, **peers.of_onnxsim(self.name, self.images)}

    def row(
        self,
        budget: float,
        method: str,
        seed: int | None,
        proto: onnx.ModelProto | None,
        why: str = "",
    ) -> Row:
        """``proto`` None: no such model, and ``why``."""
        row: Row = {"model": self.name, "MACs asked": budget, "method": method, "seed": seed}
        row |= {"before": round(self.before, 2), "why not": why or None}
        if proto is not None:
            right = self.right(proto)
            found = 100 * float(right.mean())
            row |= {"MACs kept": round(self.share(proto), 4), "accuracy": round(found, 2)}
            row["points lost"] = round(self.before - found, 2)
        return row if proto is None else {**row, "images": len(right), "right": packed(right)}


def packed(right: Bools) -> str:
    """Bits as text."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def unpacked(row: Row) -> Floats:
    """Of a row: 1 for every image that was classified right, else 0."""
    bits = np.unpackbits(
        np.frombuffer(base64.b64decode(row["right"]), np.uint8), count=row["images"]
    )
    return bits.astype(np.float64)


def _ours(bench: Bench, method: str, changes: Mapping[str, str], seed: int) -> Iterator[Row]:
    with TemporaryDirectory() as kept:
        settings = Settings.create(
            **{**FIXED, "macs": BUDGETS[0], "seed": seed, "cache": kept, **changes}
        )
        ready = prepare.prepare(bench.model, bench.shuffled(seed, Path(kept)), settings)
        for budget in BUDGETS:
            here = replace(ready, settings=settings.model_copy(update={"macs": budget}))
            try:
                yield bench.row(budget, method, seed, search.search(here).pruned.proto)
            except BudgetNotMet as error:
                yield bench.row(budget, method, seed, None, str(error))


def _theirs(bench: Bench, method: str, peer: Any) -> Iterator[Row]:
    failed: list[str] = []

    @cache
    def share(ratio: float) -> float:
        try:
            return bench.share(peer.cut(ratio))
        except Exception as error:  # whatever a rival raises is its result at this ratio
            failed.append(f"{type(error).__name__}: {str(error).strip()[:80]}")
            return float("nan")

    for budget in BUDGETS:
        ratio = bisect(share, budget)
        if ratio is None:
            why = failed[-1] if failed else "MACs not reached"
            yield bench.row(budget, method, None, None, why)
        else:
            yield bench.row(budget, method, None, peer.refit(peer.cut(ratio)))


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
    """One row per model and budget: ours and random (means over seeds), and the best of each rival.

    ``standard error``: of how far ours is ahead, from the same images. What is no column is for the figure and the
    remarks.
    """
    found = []
    for model, budget in dict.fromkeys((r["model"], r["MACs asked"]) for r in rows):
        here = [r for r in rows if (r["model"], r["MACs asked"]) == (model, budget)]
        row: Row = {"model": model, "MACs asked": budget, "before": here[0]["before"]}
        for method, (low, high) in {
            "ours": ("lowest", "highest"),
            "random": ("random low", "random high"),
        }.items():
            mine = [r for r in here if r["method"] == method]
            seen = [r["accuracy"] for r in mine if "accuracy" in r]
            if seen and len(seen) == len(mine):
                row |= {method: round(float(np.mean(seen)), 2), low: min(seen), high: max(seen)}
                row[f"{method} MACs"] = round(float(np.mean([r["MACs kept"] for r in mine])), 4)
        for family in FAMILIES:
            top = _top(r for r in here if r["method"].startswith(family))
            if top is not None:
                row |= {family: top["accuracy"], f"{family} MACs": top["MACs kept"]}
        top = _top(r for r in here if r["method"].startswith(FAMILIES))
        if top is not None:
            row["best rival"] = top["method"]
            if "ours" in row:
                row |= _paired([r for r in here if r["method"] == "ours"], top)
        found.append(row)
    return found


def _top(rows: Iterable[Row]) -> Row | None:
    return max((r for r in rows if "accuracy" in r), key=lambda r: r["accuracy"], default=None)


def _paired(ours: Sequence[Row], rival: Row) -> Row:
    """Mean difference over the images with its standard error; of the first seed the images that only one has right."""
    seeds, theirs = np.stack([unpacked(r) for r in ours]), unpacked(rival)
    ahead = seeds.mean(0) - theirs
    only = int((seeds[0] > theirs).sum()), int((seeds[0] < theirs).sum())
    return {
        "ours ahead by": round(100 * float(ahead.mean()), 2),
        "standard error": round(100 * float(ahead.std(ddof=1)) / len(ahead) ** 0.5, 2),
        "only ours right": only[0],
        "only rival right": only[1],
        "McNemar p": round(float(binomtest(only[0], sum(only)).pvalue), 3) if sum(only) else 1.0,
    }


def remarks(found: Sequence[Row]) -> list[str]:
    """Return a count of the rows without a better rival, and one sentence for every row with one."""
    behind = [r for r in found if r.get("ours ahead by", 0.0) < 0]
    rows = sum("ours ahead by" in r for r in found)
    reported = [
        f"Ours is at or above every variant of every rival in {rows - len(behind)} of {rows} rows."
    ]
    for row in behind:
        text = (
            f"{row['model']} at {row['MACs asked']:.0%} of the MACs: {row['best rival']} is ahead by "
            f"{-row['ours ahead by']:.2f} points ({-row['ours ahead by'] / max(row['standard error'], 0.01):.1f} "
            f"standard errors); of the images {row['only rival right']} are right by it alone and "
            f"{row['only ours right']} by ours alone (exact McNemar test: p = {row['McNemar p']:.2f})."
        )
        lost = row["before"] - row["ours"]
        text += (
            f" Ours loses {lost:.2f} points to the original."
            if lost > 0
            else " Ours is not below the original."
        )
        if row["McNemar p"] >= LEVEL:
            text += " The lead is within the noise of the images, and the rival's variant was picked by this accuracy."
        reported.append(text)
    return reported


def importances(rows: Sequence[Row]) -> list[Row]:
    """Per model and budget the accuracy of ours by importance, all at the first seed."""
    found: dict[tuple[str, float], Row] = {}
    for row in rows:
        name = (
            "obs"
            if row["method"] == "ours"
            else row["method"][6:-1]
            if row["method"].startswith("ours (")
            else None
        )
        if name is not None:
            fresh: Row = {k: row[k] for k in ("model", "MACs asked", "before")}
            found.setdefault((row["model"], row["MACs asked"]), fresh).setdefault(
                name, row.get("accuracy")
            )
    return list(found.values())


def summary(rows: Sequence[Row], budget: float = 0.5) -> list[Row]:
    """Points lost at ``budget`` by ours over those of the best rival, per model and for the means over models.

    A ratio is left out where the best rival loses nothing.
    """
    found = []
    for row in best(rows):
        rival = max((row[f] for f in FAMILIES if f in row), default=None)
        if row["MACs asked"] == budget and rival is not None and "ours" in row:
            lost, theirs = row["before"] - row["ours"], row["before"] - rival
            found.append(_against(row["model"], lost, theirs, row["best rival"]))
    if found:
        means = [float(np.mean([r[c] for r in found])) for c in SUMMARY[1:3]]
        found.append(_against("mean", *means, None))
    return found


def _against(model: str, ours: float, theirs: float, rival: str | None) -> Row:
    ratio = round(ours / theirs, 3) if theirs > 0 else None
    row = {
        "model": model,
        "lost by ours": round(ours, 2),
        "lost by best rival": round(theirs, 2),
        "ratio": ratio,
    }
    return {**row, "best rival": rival}
