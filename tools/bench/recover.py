"""Recovery: what pruning loses, and what a training with the original as the teacher brings back, without labels.

Every network is planned by the default settings on its 512 calibration images. From this plan it is pruned and refitted
twice on the same images: once without a recovery, once with it. The recovery holds a fifth of the images out of the
refit and out of the training, and judges by them. More images than the 512 are training images, from ``--fashion DIR``.
All figures come from the evaluation images, which no step has seen: the accuracy where they have labels, the share of
first answers that are those of the original, and the mean Kullback-Leibler divergence from its answers in nats.
``recover_images`` trains EfficientNets by budget, images and steps; it needs ``--larger DIR``, the folder that
``tools/make_larger_models.py`` fills.

Plans, models and records of the training are kept in a folder inside ``recover`` beside the result, one per state of
the code, and what is there is not made again: a stopped study continues. Widths are not aligned, so
that plans do not depend on what the machine measures.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx

from onnx_oamip.core.records import Array
from onnx_oamip.core.versions import sources
from onnx_oamip.graph.runtime import Session

from ..wild.run import command
from . import recover_images, recover_operators, recover_peers
from .calibration import training_images
from .larger import absent, cost_of, divergence
from .studies import MODELS, Row, paths, save, store

BATCH = 32
LIMIT = 7200.0
"""Seconds after which a command is ended."""
DIGITS = 12
"""Digits of the digest of the code in the name of its folder."""
SHIPPED = 512
"""Images for calibration that come with every network."""
COLUMNS = (
    "model",
    "images",
    "MACs kept",
    "original",
    "pruned",
    "recovered",
    "agreement pruned",
    "agreement recovered",
    "divergence pruned",
    "divergence recovered",
    "steps",
    "seconds",
    "processor s",
    "threads",
    "peak MiB",
)
CLOCKED = ("seconds", "processor s", "peak MiB")


class Case(NamedTuple):
    """A network at a budget, with the number of images and the steps of its training."""

    name: str
    macs: float
    images: int
    steps: int

    @property
    def stem(self) -> str:
        """Name of the files of the case."""
        return f"{self.name}.{self.images}"


SMALL = ("resnet20-fashion", "mobilenet-fashion", "vit-fashion")
CASES = (
    *(Case(name, 0.25, SHIPPED, 400) for name in SMALL),
    *(Case(name, 0.25, images, 400) for name in SMALL for images in (2000, 5000)),
)

FINETUNED = "vit-fashion"
"""The transformer that onnxsim's finetune is tried on."""
LABELLED = "resnet20-fashion"
"""The network that Torch-Pruning cuts, and that is trained with labels beside the recovery."""


class Failed(Exception):
    """A command of the study failed; the message is its error."""


def run(
    out: Path,
    seed: int,
    names: tuple[str, ...] = (),
    larger: Path | None = None,
    fashion: Path | None = None,
) -> str:
    """One row per network and number of images; what was made before is read from ``out``."""
    import torch  # noqa: F401  (the environment names its version; without it the study is left out)

    rows: list[Row] = []
    kept = out / "recover" / sources()[:DIGITS]
    for case in _cases(names, larger, fashion):
        rows.append(_row(case, files_of(case, larger, fashion, kept), kept, seed))
        print(rows[-1], flush=True)
        store(out, "recover", rows, COLUMNS, seed, CLOCKED)
    text = save(out, "recover", rows, COLUMNS, seed, CLOCKED)
    shipped = {row["model"]: row for row in rows if row["images"] == SHIPPED}
    if FINETUNED in shipped and _is_installed("onnxsim"):
        recover_peers.finetunes(out, seed, FINETUNED, kept / f"{FINETUNED}.plan.json", rows)
    if LABELLED in shipped and _is_installed("torch_pruning"):
        recover_peers.with_labels(out, seed, shipped[LABELLED])
    if larger_names := [n for n in recover_images.NAMES if not names or n in names]:
        recover_images.run(out, seed, larger, kept, larger_names)
    recover_peers.steps(out, seed)
    recover_operators.exactness(out, seed)
    return text


def _is_installed(package: str) -> bool:
    """True if a rival is installed; a line where it is not."""
    if importlib.util.find_spec(package) is not None:
        return True
    print(f"the comparison with {package} is left out: it is not installed", flush=True)
    return False


def _cases(names: Sequence[str], larger: Path | None, fashion: Path | None) -> Iterator[Case]:
    """The cases whose files are there; a line for every other."""
    for case in CASES:
        if names and case.name not in names:
            continue
        if case.name not in MODELS and (missing := absent(case.name, larger)):
            print(missing, flush=True)
        elif case.images > SHIPPED and fashion is None:
            print(f"{case.name}: {case.images} images need --fashion DIR; left out", flush=True)
        else:
            yield case


def files_of(
    case: Case, larger: Path | None, fashion: Path | None, kept: Path
) -> tuple[Path, Path]:
    """(model, data) of a case; data of more images than those that are shipped are written to ``kept``."""
    if case.name not in MODELS:
        assert larger is not None
        return larger / f"{case.name}.onnx", larger / f"{case.name}.npz"
    model, data = paths(case.name)
    if case.images == SHIPPED:
        return model, data
    assert fashion is not None
    kept.mkdir(parents=True, exist_ok=True)
    target = kept / f"{MODELS[case.name]}.{case.images}.npz"
    if not target.exists():
        with np.load(data) as held:
            arrays = {key: value for key, value in held.items() if key != "labels"}
        more = training_images(fashion)[: case.images - SHIPPED]
        np.savez(target, **{**arrays, "input": np.concatenate([arrays["input"], more])})
    return model, target


def _row(case: Case, files: tuple[Path, Path], kept: Path, seed: int) -> Row:
    kept.mkdir(parents=True, exist_ok=True)
    model, data = files
    pruned, recovered = kept / f"{case.stem}.onnx", kept / f"{case.stem}.recovered.onnx"
    shared = ["--device", "cpu", "--seed", seed]
    plan = kept / f"{case.name}.plan.json"
    if not plan.exists():
        own = files_of(case._replace(images=SHIPPED), model.parent, None, kept)[1]
        budget = ["--macs", case.macs, "--align", 1]
        _call("plan", model, *budget, "--data", own, *shared, "-q", "-o", plan)
    # A latency measured on a busy machine must not end the study.
    applied = ["apply", model, "--plan", plan, "--data", data, "--force", *shared]
    if not pruned.exists():
        _call(*applied, "-q", "-o", pruned)
    record = _recovered(applied, recovered, case.steps)
    protos = [onnx.load(file) for file in (model, pruned, recovered)]
    macs = [cost_of(proto).macs for proto in protos[:2]]
    return {
        "model": case.name,
        "images": case.images,
        "MACs kept": round(macs[1] / macs[0], 4),
        **judged(data, protos),
        "steps": record["steps"],
        "seconds": round(record["seconds"]),
        "processor s": round(record["processor"]),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        "peak MiB": record["peak_mib"],
    }


def _recovered(applied: Sequence[object], recovered: Path, steps: int) -> Row:
    """Make the trained model unless it is there; the record of its training, with processor time and memory."""
    path = recovered.with_suffix(".json")
    if not path.exists():
        found = _call(*applied, "--recover", steps, "--json", "-o", recovered)
        training = json.loads(str(found["stdout"]))["recovery"]
        used = {key: found[key] for key in ("processor", "peak_mib")}
        path.write_text(json.dumps({**training, **used}, indent=1) + "\n", encoding="utf-8")
    record: Row = json.loads(path.read_text(encoding="utf-8"))
    return record


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
