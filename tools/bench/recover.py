"""Recovery: what pruning loses, and what a training with the original as the teacher brings back, without labels.

Every network is pruned by the default settings on its 512 calibration images, and trained on the same images, of which
a fifth judges. All figures come from the evaluation images, which no step has seen: the accuracy where they have
labels, the share of first answers that are those of the original, and the mean Kullback-Leibler divergence from its
answers in nats. EfficientNet-Lite0 needs ``--larger DIR``, the folder that ``tools/make_larger_models.py`` fills.

Plans, models and records of the training are kept in the folder ``recover`` beside the result, and what is there is not
made again: a study that is stopped goes on where it was. A training has two parts of one process each, the second
of which starts from the result of the first; seconds, processor time and steps are sums, memory is that of the larger.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx

from onnx_oamip.core.records import Array
from onnx_oamip.graph.runtime import Session

from ..wild.run import command
from .larger import absent, cost_of, divergence
from .studies import MODELS, Row, paths, save, store

BATCH = 32
LIMIT = 7200.0
"""Seconds after which a command is ended."""
COLUMNS = (
    "model",
    "MACs kept",
    "original",
    "pruned",
    "recovered",
    "agreement pruned",
    "agreement recovered",
    "divergence pruned",
    "divergence recovered",
    "steps",
    "by blocks",
    "seconds",
    "processor s",
    "threads",
    "peak MiB",
)
SUMS = {
    "steps": "steps",
    "by blocks": "block_steps",
    "seconds": "seconds",
    "processor s": "processor",
}
"""Columns that add up over the parts of a training, with their key in a record."""
CLOCKED = ("seconds", "processor s", "peak MiB")


class Case(NamedTuple):
    """A network at a budget, and the steps of the parts of its training."""

    macs: float
    steps: tuple[int, ...]


CASES = {
    "resnet20-fashion": Case(0.25, (300, 300)),
    "mobilenet-fashion": Case(0.25, (300, 300)),
    "vit-fashion": Case(0.25, (300, 300)),
    "efficientnet-lite0": Case(0.5, (150, 150)),
}


class Failed(Exception):
    """A command of the study failed; the message is its error."""


def run(out: Path, seed: int, names: tuple[str, ...] = (), larger: Path | None = None) -> str:
    """One row per network; what was made before is read from ``out``."""
    import torch  # noqa: F401  (the environment names its version; without it the study is left out)

    rows: list[Row] = []
    for name in names or CASES:
        if name not in MODELS and (missing := absent(name, larger)):
            print(missing, flush=True)
            continue
        rows.append(_row(name, files_of(name, larger), out / "recover", seed))
        print(rows[-1], flush=True)
        store(out, "recover", rows, COLUMNS, seed, CLOCKED)
    return save(out, "recover", rows, COLUMNS, seed, CLOCKED)


def files_of(name: str, larger: Path | None) -> tuple[Path, Path]:
    """(model, data) of a network."""
    if name in MODELS:
        return paths(name)
    assert larger is not None
    return larger / f"{name}.onnx", larger / f"{name}.npz"


def _row(name: str, files: tuple[Path, Path], kept: Path, seed: int) -> Row:
    kept.mkdir(parents=True, exist_ok=True)
    case = CASES[name]
    pruned = _pruned(name, files, kept, case.macs, seed)
    recovered, records = _recovered(name, files, pruned, kept, case.steps, seed)
    protos = [onnx.load(file) for file in (files[0], pruned, recovered)]
    found = judged(files[1], protos)
    macs = [cost_of(proto).macs for proto in protos[:2]]
    row: Row = {"model": name, "MACs kept": round(macs[1] / macs[0], 4), **found}
    for column, key in SUMS.items():
        row[column] = round(sum(record[key] for record in records))
    row["threads"] = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    row["peak MiB"] = max(record["peak_mib"] for record in records)
    return row


def _pruned(name: str, files: tuple[Path, Path], kept: Path, macs: float, seed: int) -> Path:
    """The pruned model, from its plan."""
    model, data = files
    plan, pruned = kept / f"{name}.plan.json", kept / f"{name}.onnx"
    shared = ["--data", data, "--device", "cpu", "--seed", seed, "-q"]
    if not plan.exists():
        _call("plan", model, "--macs", macs, *shared, "-o", plan)
    if not pruned.exists():
        _call("apply", model, "--plan", plan, *shared, "-o", pruned)
    return pruned


def _recovered(
    name: str,
    files: tuple[Path, Path],
    pruned: Path,
    kept: Path,
    steps: Sequence[int],
    seed: int,
) -> tuple[Path, list[Row]]:
    """The trained model, and one record per part of the training."""
    model, data = files
    records = []
    before = pruned
    for part, count in enumerate(steps, 1):
        after = kept / f"{name}.{part}.onnx"
        record = after.with_suffix(".json")
        if not record.exists():
            found = _call(
                "recover", before, "--original", model, "--data", data,
                "--plan", kept / f"{name}.plan.json", "--recover", count,
                "--device", "cpu", "--seed", seed, "--json", "-o", after,
            )  # fmt: skip
            told = json.loads(str(found["stdout"]))["recovery"]
            used = {key: found[key] for key in ("processor", "peak_mib")}
            record.write_text(json.dumps({**told, **used}, indent=1) + "\n", encoding="utf-8")
        records.append(json.loads(record.read_text(encoding="utf-8")))
        before = after
    return before, records


def _call(*arguments: object) -> Row:
    """Run the command line; its output with time and memory. Raises Failed if it does not succeed."""
    found = command([str(argument) for argument in arguments], LIMIT)
    if found["status"] != "done":
        raise Failed(f"{arguments[0]} of {arguments[1]}: {found['status']}: {found['error']}")
    return found


def judged(data: Path, protos: Sequence[onnx.ModelProto]) -> Row:
    """Accuracies, agreements and divergences of an original, its pruned and its recovered model, in that order."""
    with np.load(data) as held:
        scale, offset = held["input.scale"], held.get("input.offset", np.float32(0))
        images, labels = held["eval.input"], held.get("eval.labels")
    logits = [_answers(proto, images, scale, offset) for proto in protos]
    original = logits[0]
    found: Row = {}
    for column, answers in zip(("original", "pruned", "recovered"), logits, strict=True):
        found[column] = None if labels is None else _percent(answers.argmax(1) == labels)
    for state, answers in zip(("pruned", "recovered"), logits[1:], strict=True):
        found[f"agreement {state}"] = _percent(answers.argmax(1) == original.argmax(1))
        found[f"divergence {state}"] = f"{divergence(original, answers):.4f}"
    return found


def _answers(proto: onnx.ModelProto, images: Array, scale: Array, offset: Array) -> Array:
    session = Session(proto, "cpu")
    (port,) = proto.graph.input
    parts = [
        session.run({port.name: images[i : i + BATCH].astype(np.float32) * scale + offset})[0]
        for i in range(0, len(images), BATCH)
    ]
    return np.concatenate(parts)


def _percent(right: Array) -> float:
    return round(100 * float(right.mean()), 2)
