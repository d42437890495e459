"""Worth of leaving out whole branches: plans with and without, at equal MACs and at equal latency.

One row per network, budget and choice. Both plans of a budget share statistics and losses, and the times of one latency
table (one thread), so that both are planned for the same predicted time; the measured one is in the row. Networks with
labels are judged by accuracy, EfficientNet-Lite0 (``--larger DIR``, see ``larger``) by agreement with the original.
Rows that are in the saved study are not made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from onnx_oamip.api import prepare
from onnx_oamip.api.profiling import profile
from onnx_oamip.core.errors import BudgetNotMet
from onnx_oamip.core.settings import Settings
from onnx_oamip.planning import search
from onnx_oamip.planning.latency_search import latency_ratio

from .larger import Bench, benches
from .studies import MODELS, Resumable, Row

STUDY = "branches"
NETWORKS = ("resnet20-fashion", "mobilenet-fashion", "vit-fashion", "efficientnet-lite0")
BUDGETS = (("macs", 0.65), ("macs", 0.5), ("macs", 0.25), ("latency", 0.5), ("latency", 0.3))
OF_LARGER = (("latency", 0.5),)
"""Budgets of networks that take minutes."""
SCALED = "divergence x 1000"
COLUMNS = (
    "model",
    "budget",
    "asked",
    "branches",
    "emptied groups",
    "MACs kept",
    "latency kept",
    "judged by",
    "before",
    "after",
    SCALED,
)


def run(out: Path, seed: int, names: tuple[str, ...] = (), larger: Path | None = None) -> str:
    """One row per network, budget and choice."""
    study = Resumable(out, STUDY, COLUMNS, seed)
    for bench in benches(names or NETWORKS, larger):
        for row in _rows(bench, seed, study):
            study.add(row)
    return study.save()


def _rows(bench: Bench, seed: int, study: Resumable) -> Iterator[Row]:
    """Rows of one network that the study does not hold."""
    budgets = BUDGETS if bench.name in MODELS else OF_LARGER
    with TemporaryDirectory() as kept:
        table = Path(kept) / "table.json"
        for kind, share in budgets:
            for branches, empty in (("kept", "none"), ("may be left out", "always")):
                key = {"model": bench.name, "budget": kind, "asked": share, "branches": branches}
                if study.holds(key):
                    continue
                times = {}
                if kind == "latency":
                    if not table.is_file():
                        profile(bench.model, table, Settings.create(seed=seed), threads=1)
                    times = {"latency_table": str(table)}
                settings = Settings.create(
                    **{kind: share, **times}, seed=seed, cache=kept, empty=empty
                )
                yield _row(bench, settings) | key


def _row(bench: Bench, settings: Settings) -> Row:
    ready = prepare.prepare(bench.model, bench.data, settings)
    row = dict.fromkeys(COLUMNS)
    try:
        found = search.search(ready)
    except BudgetNotMet:
        return row | {"before": round(bench.before, 2), "judged by": bench.judged}
    proto = found.pruned.proto
    measured = bench.row(0.0, "", proto)
    latency = latency_ratio(ready, proto) if settings.latency is not None else None
    row |= {column: measured[column] for column in COLUMNS if column in measured}
    return row | {
        "emptied groups": int((found.plan.widths == 0).sum()),
        "latency kept": latency and round(latency, 3),
        SCALED: round(1000 * measured["divergence"], 2),
    }
