"""Study of speed-up: ideal, predicted and measured, with and without aligned widths, beside onnxsim's.

Ours at half and at a quarter of the MACs, once with the step of widths that was measured here (``--align auto``, the
default) and once with ``--align 1``; onnxsim by L2 norm with its ratio bisected to the same budgets. Ideal is MACs
before over MACs kept; predicted is what the additive model behind ``--latency`` says. Measured is a median of paired
ratios: all models of a network take turns in rounds of random order, so that load from elsewhere meets all of them.
``latency-accuracy`` has what each of the models still does, ``latency-means`` both over all networks. Needs the
``experiments`` extra, and a quiet machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean, geometric_mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx

from onnx_oamip.api import prepare
from onnx_oamip.core.errors import BudgetNotMet, EnvironmentMissing
from onnx_oamip.core.records import Ints
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.graph import cost
from onnx_oamip.graph.runtime import Session, resolve_device
from onnx_oamip.planning import attempts, search
from onnx_oamip.planning.latency_model import profile
from onnx_oamip.verification.latency import (
    caller,
    feeds_of,
    find_step,
    interleave,
    paired,
)

from .rivals import Bench, bisect
from .studies import MODELS, Row, save, store

BUDGETS = (0.5, 0.25)
ALIGN: Mapping[str, Any] = {"ours": "auto", "align 1": 1}
RIVAL = "onnxsim"
METHODS = (*ALIGN, RIVAL)
THREADS, BATCHES = (1, 2), (1, 32)
SECONDS, PROFILE_SECONDS = 4.0, 1.5
"""Of all models of one network side by side, and of the additive model's measurements, in one setting."""
COLUMNS = (
    "model",
    "device",
    "threads",
    "batch",
    "MACs asked",
    "ideal",
    "predicted",
    "ours",
    "95 %",
    "ideal, align 1",
    "predicted, align 1",
    "align 1",
    "ideal, onnxsim",
    "onnxsim",
)
ACCURACY = (
    "model",
    "MACs asked",
    "step",
    "before",
    *METHODS,
    "nodes added",
    "nodes added, align 1",
)
MEANS = ("ideal", "predicted", "ours", "ideal, align 1", "align 1", "ideal, onnxsim", "onnxsim")
LOST = tuple(f"lost, {method}" for method in METHODS)
MEAN_COLUMNS = ("device", "threads", "batch", "MACs asked", "networks", *MEANS, *LOST)
CLOCKED = (
    *COLUMNS[5:],
    *(f"{m}, {end}" for m in METHODS for end in ("low", "high")),
    "error",
    "rounds",
)
CLOCKED_ACCURACY = ("step", "ours", "MACs, ours", "nodes added")
"""The step of widths is measured, and what is cut follows it."""


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """One row per network, device, threads, batch and budget; speed-ups, so that more is better."""
    from . import peers  # noqa: F401  before the work: what it needs may not be installed

    rows: list[Row] = []
    accuracies: list[Row] = []
    places: list[tuple[str, int | None]] = [("cpu", threads) for threads in THREADS]
    try:
        places.append((resolve_device("cuda"), None))
    except EnvironmentMissing as missing:
        print(f"no rows for CUDA: {missing}")
    for name in names or tuple(MODELS):
        with TemporaryDirectory() as folder:
            bench = Bench(name)
            made = _made(bench, seed, folder)
            accuracies += [_accuracy(bench, budget, made) for budget in BUDGETS]
            for device, threads in places:
                for batch in BATCHES:
                    rows += _timed(bench, made, device, threads, batch, seed)
                    store(out, "latency", rows, COLUMNS, seed, CLOCKED)
    save(out, "latency-accuracy", accuracies, ACCURACY, seed, CLOCKED_ACCURACY)
    save(out, "latency-means", means(rows, accuracies), MEAN_COLUMNS, seed, (*MEANS, "lost, ours"))
    text = save(out, "latency", rows, COLUMNS, seed, CLOCKED)
    print("\n".join(remarks(rows, accuracies)))
    return text


class _Made:
    """The pruned models of a network by (method, budget), with the widths of ours, and what they were made from."""

    def __init__(self, ready: attempts.Prepared) -> None:
        self.ready = ready
        self.protos: dict[tuple[str, float], onnx.ModelProto] = {}
        self.widths: dict[tuple[str, float], Ints] = {}


def _made(bench: Bench, seed: int, folder: str) -> _Made:
    made = None
    for method, align in ALIGN.items():
        settings = Settings.create(macs=BUDGETS[0], align=align, seed=seed, cache=folder)
        ready = prepare.prepare(bench.model, bench.data, settings)
        made = made or _Made(ready)
        for budget in BUDGETS:
            here = replace(ready, settings=settings.model_copy(update={"macs": budget}))
            try:
                found = search.search(here)
            except BudgetNotMet as error:
                print(f"{bench.name}: {error}")
                continue
            made.protos[method, budget] = found.pruned.proto
            made.widths[method, budget] = found.plan.widths
    assert made is not None
    from . import peers

    peer = peers.of_onnxsim(bench.name, bench.images)["onnxsim L2, one ratio"]
    share = cache(lambda ratio: bench.share(peer.cut(ratio)))
    for budget in BUDGETS:
        ratio = bisect(share, budget)
        if ratio is None:
            print(f"{bench.name}: onnxsim does not come down to {budget:.0%} of the MACs")
        else:
            made.protos[RIVAL, budget] = peer.cut(ratio)
    return made


def _accuracy(bench: Bench, budget: float, made: _Made) -> Row:
    row: Row = {
        "model": bench.name,
        "MACs asked": budget,
        "step": find_step(made.ready.device).value,
    }
    row["before"] = round(bench.before, 2)
    for method in METHODS:
        proto = made.protos.get((method, budget))
        if proto is not None:
            row |= {
                method: round(bench.accuracy(proto), 2),
                f"MACs, {method}": round(bench.share(proto), 4),
            }
            if method in ALIGN:
                row["nodes added" if method == "ours" else f"nodes added, {method}"] = _added(
                    made.ready, proto
                )
    print(row, flush=True)
    return row


def _added(ready: attempts.Prepared, proto: onnx.ModelProto) -> str | None:
    """Kinds of nodes that a cut has more of: around a normalisation of odd width, zeros are put back."""
    before = Counter(node.op_type for node in ready.model.proto.graph.node)
    more = Counter(node.op_type for node in proto.graph.node) - before
    return ", ".join(f"{count} {op}" for op, count in sorted(more.items())) or None


def means(rows: Sequence[Row], accuracies: Sequence[Row]) -> list[Row]:
    """Per setting and budget, over the networks that every method cut so far."""
    known = {(row["model"], row["MACs asked"]): row for row in accuracies}
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if all(method in row for method in METHODS):
            found.setdefault(tuple(row[key] for key in COLUMNS[1:5]), []).append(row)
    result = []
    for setting, here in found.items():
        fresh: Row = dict(zip(COLUMNS[1:5], setting, strict=True)) | {"networks": len(here)}
        fresh |= {column: round(geometric_mean(row[column] for row in here), 3) for column in MEANS}
        beside = [known[row["model"], row["MACs asked"]] for row in here]
        for method, column in zip(METHODS, LOST, strict=True):
            fresh[column] = round(fmean(row["before"] - row[method] for row in beside), 2)
        result.append(fresh)
    return result


def remarks(rows: Sequence[Row], accuracies: Sequence[Row]) -> list[str]:
    """One sentence for every network and budget at which ours is slower than the original somewhere."""
    added = {(row["model"], row["MACs asked"]): row.get("nodes added") for row in accuracies}
    found: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if row.get("ours", 1.0) < 1:
            found.setdefault((row["model"], row["MACs asked"]), []).append(row)
    reported = []
    for (model, budget), slow in found.items():
        where = "; ".join(
            f"{r['device']}{'' if r['threads'] is None else ', threads ' + str(r['threads'])}, batch {r['batch']}: "
            f"{r['ours']:.2f} times as fast"
            for r in slow
        )
        text = f"{model} at {budget:.0%} of the MACs is slower than the original ({where})."
        more = added.get((model, budget))
        if more:
            text += f" The cut adds nodes ({more})"
            text += ", which put zeros back around normalisations." if "Pad" in more else "."
        reported.append(
            f"{text} `prune` does not write a model that it measures slower, without `--force`."
        )
    return reported


def _timed(
    bench: Bench, made: _Made, device: str, threads: int | None, batch: int, seed: int
) -> list[Row]:
    """One row per budget, all of them from the same rounds."""
    ready = made.ready
    samples = dataset.load(bench.data, ready.model)
    assert samples is not None
    feeds = feeds_of(samples, batch)
    # Any width, since ``align 1`` takes any.
    ladder = [np.arange(1, len(group.units) + 1) for group in ready.coupling.groups]
    table = profile(
        ready.model,
        ready.coupling,
        ladder,
        samples,
        device=device,
        batch=batch,
        threads=threads,
        seconds=PROFILE_SECONDS,
        seed=seed,
    )
    whole = table.seconds(ready.ledger.lengths(cost.full_widths(ready.coupling)))
    protos = {None: ready.model.proto, **made.protos}
    sessions = [Session(proto, device, threads, spin=True) for proto in protos.values()]
    _, medians = interleave([caller(s, feeds) for s in sessions], SECONDS, seed=seed)
    times = dict(zip(protos, medians.T, strict=True))
    rows = []
    for budget in BUDGETS:
        row: Row = {
            "model": bench.name,
            "device": device,
            "threads": threads,
            "batch": batch,
            "MACs asked": budget,
        }
        row |= {"error": round(table.error, 3), "rounds": len(medians)}
        for method in METHODS:
            key = (method, budget)
            if key not in protos:
                continue
            plain = method == "ours"
            row["ideal" if plain else f"ideal, {method}"] = round(1 / bench.share(protos[key]), 3)
            if key in made.widths:
                predicted = whole / table.seconds(ready.ledger.lengths(made.widths[key]))
                row["predicted" if plain else f"predicted, {method}"] = round(predicted, 3)
            ratio = paired(times[key], times[None])
            row |= {method: round(ratio.median, 3)}
            row |= {f"{method}, low": round(ratio.low, 3), f"{method}, high": round(ratio.high, 3)}
        if "ours" in row:
            row["95 %"] = f"{row['ours, low']:.2f} to {row['ours, high']:.2f}"
        print({k: row.get(k) for k in COLUMNS}, flush=True)
        rows.append(row)
    return rows
