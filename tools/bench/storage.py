"""Bytes of packed models, exact and at half a point lost, beside zip and half precision; whole and at half the MACs.

Codebooks are chosen on the first half of the evaluation images; accuracies are of the other half, which nothing has
seen. What is unpacked has dense weights again: this is about files, and memory and latency stay as they are.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from onnx_oamip.api import comparison, pipeline
from onnx_oamip.core.records import Array
from onnx_oamip.core.settings import Settings
from onnx_oamip.published import packing
from onnx_oamip.published.packing import document

from .studies import MODELS, Row, paths, save

MAX_DROP = 0.5
SHARES = ("lossless", "lossy", "zip", "fp16", "fp16, zip")
COLUMNS = (
    "model",
    "version",
    "bytes",
    *(f"{s} %" for s in SHARES),
    "before",
    "after",
    "lost",
    "lost where searched",
)
CLOCKED = ("seconds",)


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """Two rows per model: as shipped, and pruned to half its MACs. Shares are of the bytes of that version."""
    rows: list[Row] = []
    for name in MODELS:
        if names and name not in names:
            continue
        model, data = paths(name)
        with tempfile.TemporaryDirectory() as folder:
            half = Path(folder) / "half.onnx"
            pipeline.prune(model, data, half, Settings.create(macs=0.5, seed=seed, force=True))
            for version, path in (("whole", model), ("half the MACs", half)):
                rows.append(
                    {"model": name, "version": version, **_row(path, data, Path(folder), seed)}
                )
                print(rows[-1], flush=True)
    return save(out, "storage", rows, COLUMNS, seed, CLOCKED)


def _row(model: Path, data: Path, folder: Path, seed: int) -> Row:
    start = time.perf_counter()
    searched, unseen = _halves(data)
    exact = packing.pack(model, folder / "exact.oamip", lossless=True)
    lossy = packing.pack(
        model, folder / "lossy.oamip", data=data, eval_data=searched, max_drop=MAX_DROP, seed=seed
    )
    packing.unpack(folder / "lossy.oamip", folder / "lossy.onnx")
    found = comparison.compare(model, folder / "lossy.onnx", unseen, Settings.create())
    reported = document.packing(exact, rivals=True)
    sizes = {"lossless": exact.nbytes, "lossy": lossy.nbytes, **reported["rivals"]}
    sizes["fp16, zip"] = sizes.pop("fp16_zip")
    before = reported["before"]["bytes"]
    assert lossy.verification is not None
    assert lossy.verification.accuracy_before is not None
    assert lossy.verification.accuracy_after is not None
    assert found.accuracy_before is not None
    assert found.accuracy_after is not None
    return {
        "bytes": before,
        **{f"{share} %": round(100 * sizes[share] / before, 2) for share in SHARES},
        "before": round(100 * found.accuracy_before, 2),
        "after": round(100 * found.accuracy_after, 2),
        "lost": round(100 * (found.accuracy_before - found.accuracy_after), 2),
        "lost where searched": round(
            100 * (lossy.verification.accuracy_before - lossy.verification.accuracy_after), 2
        ),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _halves(data: Path) -> tuple[dict[str, Array], dict[str, Array]]:
    """The evaluation images and labels, cut into two."""
    with np.load(data) as file:
        half = len(file["eval.labels"]) // 2
        scale = {"input.scale": file["input.scale"]}
        parts = {
            key.removeprefix("eval."): file[key] for key in file.files if key.startswith("eval.")
        }
    first, second = (
        {**{k: v[part] for k, v in parts.items()}, **scale}
        for part in (slice(half), slice(half, None))
    )
    return first, second
