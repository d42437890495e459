"""Larger networks at equal MACs, without retraining: ResNet-56, VGG-16 and EfficientNet-Lite with published weights.

``--larger DIR`` names the folder that ``tools/make_larger_models.py`` fills. All methods get the same 512 calibration
images; Taylor gets their labels too. Networks with labelled test images are judged by accuracy; EfficientNet-Lite by
how often its first answer is that of the original on crops of photographs that no method has seen, and beside it by
how many of the first five answers are the same, and by the mean Kullback-Leibler divergence of its answers from the
original's. What is not installed or not in DIR is left out, with a message. Every row is stored when it is measured,
and no row is measured twice. ``--method NAME`` and ``--budget SHARE`` measure a part of the rows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import onnx

from onnx_oamip.api import prepare
from onnx_oamip.core.errors import BudgetNotMet
from onnx_oamip.core.records import Array, Cost
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph import cost
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.runtime import Session
from onnx_oamip.planning import search

from .rivals import OURS, bisect
from .studies import MODELS, LeftOut, Resumable, Row, paths, save

if TYPE_CHECKING:
    from .larger_rivals import Peer

NETWORKS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2", "resnet56", "vgg16")
BUDGETS = (0.8, 0.65, 0.5, 0.35, 0.25)
BATCH = 32
FIRST = 5
COLUMNS = (
    "model",
    "MACs asked",
    "method",
    "MACs kept",
    "params kept",
    "judged by",
    "before",
    "after",
    "points lost",
    "first five kept %",
    "divergence",
    "why not",
)
SUMMARY = (
    "model",
    "MACs asked",
    "judged by",
    "before",
    "ours",
    "random",
    "its figure",
    "best rival",
    "ours ahead by",
)


def run(
    out: Path,
    seed: int,
    names: tuple[str, ...] = (),
    larger: Path | None = None,
    methods: tuple[str, ...] = (),
    budgets: tuple[float, ...] = (),
) -> str:
    """Measure every method on every network; ``larger-summary`` has one row per network and budget.

    Args:
        out: Folder of the rows; those that it holds are not measured again.
        seed: Seed of ours.
        names: Networks; all of ``NETWORKS`` if empty.
        larger: Folder of the networks.
        methods: Methods to measure; all if empty.
        budgets: Shares of the MACs to measure at; ``BUDGETS`` if empty.

    Returns:
        The table in Markdown.

    Raises:
        LeftOut: There is no method of a given name.
    """
    study = Resumable(out, "larger", COLUMNS, seed)
    for name in names or NETWORKS:
        if missing := absent(name, larger):
            print(missing, flush=True)
            continue
        assert larger is not None
        bench = Bench(name, larger)
        known = _methods(bench, seed, ours_only=bool(methods) and set(methods) <= set(OURS))
        if unknown := sorted(set(methods) - set(known)):
            raise LeftOut(f"no method '{unknown[0]}'; there are: {', '.join(known)}.")
        for method in methods or known:
            wanted = [
                budget
                for budget in budgets or BUDGETS
                if not study.holds({"model": name, "method": method, "MACs asked": budget})
            ]
            for row in known[method](wanted) if wanted else ():
                study.add(row)
    if not study.rows:
        return ""
    save(out, "larger-summary", summary(study.rows), SUMMARY, seed, measured=study.environment)
    return study.save()


def absent(name: str, folder: Path | None) -> str | None:
    """One sentence on what is missing for a network and how to make it; None where nothing is."""
    how = f"make it with `python -m tools.make_larger_models {name} --fashion DIR --photographs DIR --out DIR`"
    if folder is None:
        return f"{name} is left out: no folder was given with --larger; {how}."
    files = [f"{name}.onnx", f"{name}.npz"]
    lost = [file for file in files if not (folder / file).is_file()]
    return f"{name} is left out: {folder} has no {' and no '.join(lost)}; {how}." if lost else None


class Bench:
    """A network with its data: how MACs and answers are judged, the same way for every method.

    Data without ``eval.labels`` is judged by agreement: the original's first answers are the truth.
    """

    def __init__(self, name: str, folder: Path, data: Path | None = None) -> None:
        self.name, self.folder = name, folder
        self.model, self.data = folder / f"{name}.onnx", data or folder / f"{name}.npz"
        with np.load(self.data) as held:
            self.scale, self.offset = held["input.scale"], held.get("input.offset", np.float32(0))
            self.images, self.unseen = held["input"], held["eval.input"]
            labels, truth = held.get("labels"), held.get("eval.labels")
        self.original = onnx.load(self.model)
        self.cost = cost_of(self.original)
        self.expected = self.answers(self.original, self.unseen)
        self.judged = "agreement" if truth is None else "accuracy"
        self.truth = self.expected.argmax(1) if truth is None else truth
        self.labels = (
            self.answers(self.original, self.images).argmax(1) if labels is None else labels
        )
        self.before = 100 * float((self.expected.argmax(1) == self.truth).mean())

    def feeds(self, images: Array) -> Iterator[dict[str, Array]]:
        """Inputs of the network, batch by batch."""
        for i in range(0, len(images), BATCH):
            yield {"input": images[i : i + BATCH].astype(np.float32) * self.scale + self.offset}

    def answers(self, proto: onnx.ModelProto, images: Array) -> Array:
        """Logits [images, classes] in ONNX Runtime."""
        session = Session(proto, "cpu")
        return np.concatenate([session.run(feed)[0] for feed in self.feeds(images)])

    def share(self, proto: onnx.ModelProto) -> float:
        """MACs over those of the original."""
        return cost_of(proto).macs / self.cost.macs

    def row(self, budget: float, method: str, proto: onnx.ModelProto | None, why: str = "") -> Row:
        """``proto`` None: no such model, and ``why``."""
        row: Row = {
            "model": self.name,
            "MACs asked": budget,
            "method": method,
            "judged by": self.judged,
        }
        row["before"] = round(self.before, 2)
        if proto is None:
            return row | {"why not": why}
        found, kept = self.answers(proto, self.unseen), cost_of(proto)
        after = 100 * float((found.argmax(1) == self.truth).mean())
        return row | {
            "MACs kept": round(kept.macs / self.cost.macs, 4),
            "params kept": round(kept.params / self.cost.params, 4),
            "after": round(after, 2),
            "points lost": round(self.before - after, 2),
            "first five kept %": round(100 * first_kept(self.expected, found), 2),
            "divergence": round(divergence(self.expected, found), 4),
        }


def benches(names: Iterable[str], larger: Path | None) -> Iterator[Bench]:
    """Shipped networks, and those in the folder of larger ones, each with its data; a line for every other."""
    for name in names:
        if name in MODELS:
            model, data = paths(name)
            yield Bench(name, model.parent, data)
        elif missing := absent(name, larger):
            print(missing, flush=True)
        else:
            assert larger is not None
            yield Bench(name, larger)


def cost_of(proto: onnx.ModelProto) -> Cost:
    """Costs of a file as any exporter writes it: shapes that it computes from constants are folded first."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(proto, path)
        return cost.count(models.load(path))


def first_kept(expected: Array, found: Array, first: int = FIRST) -> float:
    """Mean share of the ``first`` largest logits of each row that are among the ``first`` largest of ``found``."""
    best, here = (np.argpartition(-x, first - 1, axis=1)[:, :first] for x in (expected, found))
    return float((best[:, :, None] == here[:, None, :]).any(2).mean())


def divergence(expected: Array, found: Array) -> float:
    """Mean Kullback-Leibler divergence, in nats, of the softmax of ``found`` from that of ``expected``."""
    p, q = (x.astype(np.float64) - x.max(1, keepdims=True) for x in (expected, found))
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(1).mean())


Measured = Callable[[Sequence[float]], Iterator[Row]]
"""A method on one network: rows at some budgets, which are measured as they are iterated over."""


def _methods(bench: Bench, seed: int, ours_only: bool = False) -> dict[str, Measured]:
    """Methods by name. Rivals load their own networks, so that they are left out where none of them is asked for."""
    found: dict[str, Measured] = {
        method: partial(_ours, bench, method, changes, seed) for method, changes in OURS.items()
    }
    if ours_only:
        return found
    missing = [
        p for p in ("torch", "torch_pruning", "onnxsim") if importlib.util.find_spec(p) is None
    ]
    if missing:
        print(f"{bench.name}: rivals are left out: {', '.join(missing)} not installed.", flush=True)
        return found
    from .larger_rivals import peers

    theirs = {name: partial(_theirs, bench, name, peer) for name, peer in peers(bench).items()}
    return {**found, **theirs}


def _ours(
    bench: Bench,
    method: str,
    changes: dict[str, str],
    seed: int,
    budgets: Sequence[float],
) -> Iterator[Row]:
    """Rows of ours: statistics and losses are measured once for all budgets."""
    with TemporaryDirectory() as kept:
        settings = Settings.create(macs=budgets[0], seed=seed, cache=kept, **changes)
        ready = prepare.prepare(bench.model, bench.data, settings)
        for budget in budgets:
            here = replace(ready, settings=settings.model_copy(update={"macs": budget}))
            try:
                yield bench.row(budget, method, search.search(here).pruned.proto)
            except BudgetNotMet as error:
                yield bench.row(budget, method, None, str(error))


def _theirs(bench: Bench, method: str, peer: Peer, budgets: Sequence[float]) -> Iterator[Row]:
    """Rows of a rival, whose ratio is bisected to every budget."""
    failed: list[str] = []
    cut: Callable[[float], onnx.ModelProto] = cache(peer.cut)

    @cache
    def share(ratio: float) -> float:
        try:
            return bench.share(cut(ratio))
        except Exception as error:  # whatever a rival raises is its result at this ratio
            failed.append(f"{type(error).__name__}: {str(error).strip()[:80]}")
            return float("nan")

    for budget in budgets:
        ratio = bisect(share, budget)
        if ratio is None:
            yield bench.row(budget, method, None, failed[-1] if failed else "MACs not reached")
        else:
            yield bench.row(budget, method, peer.refit(cut(ratio)))


def summary(rows: Sequence[Row]) -> list[Row]:
    """Per network and budget: ours, chance and the best rival, picked by the very figure that is shown."""
    found = []
    for model, budget in dict.fromkeys((r["model"], r["MACs asked"]) for r in rows):
        here = [r for r in rows if (r["model"], r["MACs asked"]) == (model, budget)]
        after = {r["method"]: r["after"] for r in here if "after" in r}
        row: Row = {c: here[0][c] for c in SUMMARY[:4]} | {
            method: after.get(method) for method in OURS
        }
        rivals = {method: value for method, value in after.items() if method not in OURS}
        if rivals:
            top = max(rivals, key=lambda method: rivals[method])
            row |= {"best rival": top, "its figure": rivals[top]}
            if row["ours"] is not None:
                row["ours ahead by"] = round(row["ours"] - rivals[top], 2)
        found.append(row)
    return found
