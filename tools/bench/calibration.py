"""Study of calibration data: fewer and more images, images of another domain, and noise.

The first 512 images of the network's own domain are the shipped ones; more come from the training set, where
``--mnist DIR`` and ``--fashion DIR`` say where its IDX files are. All calibration data are unlabelled.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from onnx_oamip.api import prepare
from onnx_oamip.core.settings import Settings
from onnx_oamip.planning import search
from onnx_oamip.verification import equivalence

from .studies import MODELS, ROOT, Row, paths, save, store

NAMES = ("lenet5-mnist", "resnet20-fashion")
OTHER = {"mnist": "fashion-mnist", "fashion-mnist": "mnist"}
COUNTS = (16, 64, 256, 512, 2048, 4096)
SHARES = (0.5, 0.25)
COLUMNS = (
    "model",
    "calibration",
    "samples",
    *(f"at {share:.0%} of MACs" for share in SHARES),
    "before",
)
Images = np.ndarray[Any, np.dtype[np.uint8]]


def run(
    out: Path,
    seed: int,
    names: tuple[str, ...] = (),
    mnist: Path | None = None,
    fashion: Path | None = None,
) -> str:
    """One row per model and calibration data; accuracy in percent on the 2,000 evaluation images."""
    rows: list[Row] = []
    folders = {"mnist": mnist, "fashion-mnist": fashion}
    for name in names or NAMES:
        if folders[MODELS[name]] is None:
            option = MODELS[name].split("-")[0]
            print(
                f"{name}: only the images that are shipped; --{option} DIR brings counts up to {max(COUNTS)}"
            )
        model, data = paths(name)
        with np.load(data) as held:
            arrays = dict(held)
        for kind, images in kinds(MODELS[name], arrays["input"], folders, seed):
            row: Row = {"model": name, "calibration": kind, "samples": len(images)}
            source = {k: v for k, v in arrays.items() if k != "labels"} | {"input": images}
            with TemporaryDirectory() as kept:
                settings = Settings.create(macs=SHARES[0], seed=seed, cache=kept)
                ready = prepare.prepare(model, source, settings)
                assert ready.held_out is not None
                original = equivalence.watch(ready.model, ready.objective, ready.device)
                for share, column in zip(SHARES, COLUMNS[3:], strict=False):
                    here = replace(ready, settings=settings.model_copy(update={"macs": share}))
                    after = equivalence.watch(
                        ready.model, ready.objective, ready.device, search.search(here).pruned.proto
                    )
                    seen = equivalence.compare(
                        ready.model,
                        ready.objective,
                        original,
                        after,
                        samples=ready.held_out,
                        batch_size=settings.batch_size,
                    )
                    assert seen.accuracy_after is not None
                    assert seen.accuracy_before is not None
                    row[column] = round(100 * seen.accuracy_after, 2)
                    row["before"] = round(100 * seen.accuracy_before, 2)
            rows.append(row)
            print(row, flush=True)
            store(out, "calibration", rows, COLUMNS, seed)
    return save(out, "calibration", rows, COLUMNS, seed)


def kinds(
    domain: str, own: Images, folders: dict[str, Path | None], seed: int
) -> Iterator[tuple[str, Images]]:
    """(what they are, images uint8 [n, 1, 28, 28]): own domain by count, the other domain, noise."""
    rng = np.random.default_rng(seed)
    own = own[rng.permutation(len(own))]
    folder = folders[domain]
    if folder is not None:
        more = training_images(folder)
        own = np.concatenate([own, more[rng.permutation(len(more))[: max(COUNTS) - len(own)]]])
    for count in COUNTS:
        if count <= len(own):
            yield "own domain", own[:count]
    with np.load(ROOT / "models" / f"{OTHER[domain]}.npz") as held:
        yield f"other domain ({OTHER[domain]})", held["input"]
    yield "uniform noise", rng.integers(0, 256, (512, *own.shape[1:])).astype(np.uint8)


def training_images(folder: Path) -> Images:
    """The 60,000 training images of the IDX file in a folder, gzipped or plain."""
    path = folder / "train-images-idx3-ubyte"
    raw = (
        path.read_bytes()
        if path.exists()
        else gzip.decompress((folder / f"{path.name}.gz").read_bytes())
    )
    return np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 28, 28)
