"""Peak memory by number of calibration samples: of ``score`` and of a whole ``prune``, stage by stage.

Every run is a process of its own. A peak is what the process holds at most beyond what it held after its imports:
``resident`` counts all pages, ``own`` those that no file is behind (RssAnon): pages of a mapped file go when somebody
else needs the memory. ``resident`` is the kernel's own maximum (VmHWM), ``own`` is looked at every millisecond.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from .studies import ROOT, Row, paths, save, store

NAMES = ("vgg-fashion",)
COUNTS = (64, 512, 2048, 8192)
FORMS = (
    ".npy float32",
    ".npz float32",
    ".npz float32 compressed",
    ".npz uint8 compressed",
    "folder of PNG",
)
STAGES = (".npy float32",)
"""Forms of which every stage has a row; of the others only the whole run has."""
COLUMNS = ("model", "data", "run", "stage", "memory", *(f"{n:,} MiB" for n in COUNTS), "ratio")
CLOCKED = COLUMNS[5:]
EVERY = 0.001
STATUS = Path("/proc/self/status")


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """Rows by model, form of the data, verb and stage: peaks in MiB by number of samples, the last over the first."""
    rows: list[Row] = []
    for name in names or NAMES:
        for form in FORMS:
            for verb in ("score", "prune"):
                found = [_measured(name, form, verb, count, seed) for count in COUNTS]
                stages = [
                    s
                    for s in found[-1]
                    if all(s in f for f in found) and (s == "all" or form in STAGES)
                ]
                for stage in stages:
                    for i, memory in enumerate(("resident", "own")):
                        peaks = [f[stage][i] for f in found]
                        columns = zip(COLUMNS[5:], map(round, peaks), strict=False)
                        row: Row = {
                            "model": name,
                            "data": form,
                            "run": verb,
                            "stage": stage,
                            "memory": memory,
                        }
                        rows.append(
                            {
                                **row,
                                **dict(columns),
                                "ratio": round(peaks[-1] / max(peaks[0], 1), 2),
                            }
                        )
                        print(rows[-1], flush=True)
                store(out, "memory", rows, COLUMNS, seed, CLOCKED)
    return save(out, "memory", rows, COLUMNS, seed, CLOCKED)


def _measured(
    name: str, form: str, verb: str, count: int, seed: int
) -> dict[str, tuple[float, float]]:
    """(resident, own) peaks in MiB by stage of one run on ``count`` samples."""
    with TemporaryDirectory() as folder:
        data = _write(Path(folder), form, _images(name, count, seed))
        asked = json.dumps(
            [verb, str(paths(name)[0]), str(data), str(Path(folder) / "out"), count, seed]
        )
        command = [sys.executable, "-c", f"from tools.bench import memory; memory.child({asked!r})"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    found: dict[str, tuple[float, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(asked: str) -> None:
    """Run one verb and print its peaks as JSON."""
    from onnx_oamip.api import pipeline
    from onnx_oamip.core.settings import Settings
    from onnx_oamip.graph.runtime import resolve_device
    from onnx_oamip.planning import search  # noqa: F401  (imports are not counted)

    verb, model, data, output, count, seed = json.loads(asked)
    settings = Settings.create(
        macs=0.5,
        device="cpu",
        cache="off",
        seed=seed,
        samples=count,
        force=True,
        workers=1,
        align=8,
    )
    resolve_device("cpu")
    watch = Watch()
    if verb == "score":
        pipeline.score(model, data, Path(f"{output}.npz"), settings, watch.record)
    else:
        pipeline.prune(model, data, Path(f"{output}.onnx"), settings, progress=watch.record)
    print(json.dumps(watch.finish()))


class Watch:
    """Peaks of this process by stage; a stage is what happens up to its next sign of progress."""

    def __init__(self) -> None:
        self.peaks: dict[str, tuple[float, float]] = {}
        self._reset()
        self._before = (_mebibytes("VmRSS"), _mebibytes("RssAnon"))
        self._own = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def record(self, stage: str, *_: int) -> None:
        """A progress callback."""
        self._close(stage if self.peaks else "load")

    def finish(self) -> dict[str, tuple[float, float]]:
        """All peaks; ``all`` is their maximum."""
        self._stop.set()
        self._thread.join()
        self._close("rest")
        seen = list(self.peaks.values())
        return {**self.peaks, "all": (max(r for r, _ in seen), max(o for _, o in seen))}

    def _close(self, stage: str) -> None:
        resident = _mebibytes("VmHWM") - self._before[0]
        own = max(self._own, _mebibytes("RssAnon")) - self._before[1]
        self._own = 0.0
        self._reset()
        old = self.peaks.get(stage, (0.0, 0.0))
        self.peaks[stage] = (max(old[0], resident), max(old[1], own))

    def _sample(self) -> None:
        while not self._stop.wait(EVERY):
            self._own = max(self._own, _mebibytes("RssAnon"))

    @staticmethod
    def _reset() -> None:
        """The kernel's maximum starts anew (proc(5): 5 into clear_refs)."""
        Path("/proc/self/clear_refs").write_text("5")


def _mebibytes(field: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def _images(name: str, count: int, seed: int) -> Any:
    """(count, 1, 28, 28) uint8: shipped images, drawn again and again, moved and made noisy."""
    with np.load(paths(name)[1]) as held:
        own = held["input"]
    rng = np.random.default_rng(seed)
    drawn = own[rng.integers(0, len(own), count)].astype(np.int16)
    drawn = np.roll(drawn, rng.integers(-2, 3), axis=-1) + rng.integers(-8, 9, drawn.shape)
    return np.clip(drawn, 0, 255).astype(np.uint8)


def _write(folder: Path, form: str, images: Any) -> Path:
    values = (images / np.float32(255)).astype(np.float32)
    if form == "folder of PNG":
        target = folder / "images"
        target.mkdir()
        for i, image in enumerate(images[:, 0]):
            Image.fromarray(image).save(target / f"{i:06d}.png", compress_level=1)
        return target
    kind, dtype, *compressed = form.split()
    target = folder / f"data{kind}"
    if kind == ".npy":
        np.save(target, values)
    elif dtype == "uint8":
        np.savez_compressed(target, **{"input": images, "input.scale": np.float32(1 / 255)})
    else:
        (np.savez_compressed if compressed else np.savez)(target, input=values)
    return target
