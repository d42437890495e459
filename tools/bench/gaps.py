"""Gaps that the decoupled programs of dense and convolutional groups prove, with a least-squares refit.

A row per group: the sum of its programs' losses, the gap relative to that sum, and the same in percent of the energy of
the consumers' outputs, for the mean program. Losses of wide sets are small, so that a gap that is wide relative to the
loss is often narrow in the energy that the units explain.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from onnx_oamip.api import pipeline
from onnx_oamip.core.settings import Settings

from .studies import Row, paths, save

NAMES = ("lenet300-mnist", "lenet5-mnist")
COLUMNS = (
    "model",
    "group",
    "units",
    "programs",
    "loss",
    "gap",
    "unproved energy",
    "solver",
    "seconds",
)
CLOCKED = ("seconds",)


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """A row per group."""
    rows = [row for name in names or NAMES for row in _rows(name, seed)]
    return save(out, "gaps", rows, COLUMNS, seed, CLOCKED)


def _rows(name: str, seed: int) -> Iterator[Row]:
    model, data = paths(name)
    settings = Settings.create(
        importance="oamip", mode="decoupled", refit="least-squares", workers=1, seed=seed
    )
    with tempfile.TemporaryDirectory() as folder:
        found = pipeline.score(model, str(data), str(Path(folder) / "scores.npz"), settings)
    units = {group.name: len(group.units) for group in found.coupling.groups}
    for record in found.scores.programs:
        unproved = (record["objective"] - record["bound"]) / record["programs"]
        row = {
            "model": name,
            "group": record["group"],
            "units": units[record["group"]],
            "programs": record["programs"],
            "loss": f"{record['objective']:.4f}",
            "gap": f"{record['gap']:.1%}",
            "unproved energy": f"{unproved:.2%}",
            "solver": record["solver"],
            "seconds": round(record["seconds"], 1),
        }
        print(row, flush=True)
        yield row
