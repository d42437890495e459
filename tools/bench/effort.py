"""Worth and cost of ``--effort``: what each level keeps at equal MACs, and the processor time that it takes.

The time is that of the whole run, with nothing from a cache; widths are not aligned. Networks with labels are judged by
accuracy, EfficientNet-Lite0 (``--larger DIR``, see ``larger``) by agreement with the original. Rows that are in the
saved study are not made again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from onnx_oamip.api import prepare
from onnx_oamip.core.options.plan import AllocationOptions
from onnx_oamip.core.settings import Settings
from onnx_oamip.planning import search

from .larger import Bench, benches
from .studies import Resumable, Row

STUDY = "effort"
NETWORKS = ("resnet20-fashion", "mobilenet-fashion", "vit-fashion", "efficientnet-lite0")
BUDGETS = (0.5, 0.25)
LEVELS: tuple[str, ...] = get_args(AllocationOptions.model_fields["effort"].annotation)
SCALED = "divergence x 1000"
SECONDS = "processor seconds"
COLUMNS = ("model", "MACs asked", "effort", "after", SCALED, SECONDS)


def run(out: Path, seed: int, names: tuple[str, ...] = (), larger: Path | None = None) -> str:
    """One row per network, budget and level."""
    study = Resumable(out, STUDY, COLUMNS, seed, clocked=(SECONDS,))
    for bench in benches(names or NETWORKS, larger):
        for row in _rows(bench, seed, study):
            study.add(row)
    return study.save()


def _rows(bench: Bench, seed: int, study: Resumable) -> Iterator[Row]:
    """Rows of one network that the study does not hold."""
    for budget in BUDGETS:
        for level in LEVELS:
            key = {"model": bench.name, "MACs asked": budget, "effort": level}
            if study.holds(key):
                continue
            settings = Settings.create(macs=budget, seed=seed, cache="off", align=1, effort=level)
            start = time.process_time()
            ready = prepare.prepare(bench.model, bench.data, settings)
            proto = search.search(ready).pruned.proto
            spent = time.process_time() - start
            measured = bench.row(budget, "", proto)
            row = {column: measured[column] for column in COLUMNS if column in measured}
            scaled = round(1000 * measured["divergence"], 2)
            yield row | key | {SCALED: scaled, SECONDS: round(spent, 1)}
