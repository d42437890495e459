"""Study of the seconds that coupling takes, on well-known graphs (from the onnx package; weights do not matter)."""

from __future__ import annotations

import time
from pathlib import Path

from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple

from .speed import ZOO
from .studies import Row, save

COLUMNS = ("graph", "nodes", "units", "groups", "pinned channels", "load s", "couple s")
CLOCKED = ("load s", "couple s")


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """One row per graph; the best of three runs."""
    rows: list[Row] = []
    for file in sorted(ZOO.glob("*.onnx")):
        if names and file.stem not in names:
            continue
        start = time.perf_counter()
        model = models.load(file)
        loaded = time.perf_counter() - start
        times = []
        for _ in range(3):
            start = time.perf_counter()
            found = couple(model)
            times.append(time.perf_counter() - start)
        rows.append(
            {
                "graph": file.stem.removeprefix("light_"),
                "nodes": len(model.nodes),
                "units": found.n_units,
                "groups": len(found.groups),
                "pinned channels": sum(p.count for p in found.pinned),
                "load s": round(loaded, 2),
                "couple s": round(min(times), 3),
            }
        )
    return save(out, "coupling", rows, COLUMNS, seed, CLOCKED)
