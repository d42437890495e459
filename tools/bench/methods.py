"""All importance methods side by side: the same budgets and the same allocation, without and with a refit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from onnx_oamip.api import prepare
from onnx_oamip.core.settings import Settings
from onnx_oamip.planning import search
from onnx_oamip.verification import equivalence

from .studies import Row, paths, save

METHODS = (
    "random",
    "l1",
    "l2",
    "activation",
    "correlation",
    "nnrelief",
    "snacs",
    "mint",
    "obs",
    "oamip",
)
NAMES = ("lenet5-mnist", "vgg-fashion", "resnet20-fashion")
SHARES = (0.5, 0.25)
COLUMNS = ("model", "MACs asked", "refit", *METHODS, "before")


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """One row per model, budget and refit; accuracy in percent for each method, widths as even as the budget allows."""
    rows: list[Row] = []
    for name in names or NAMES:
        model, data = paths(name)
        found: dict[tuple[float, str], Row] = {
            (share, refit): {"model": name, "MACs asked": share, "refit": refit}
            for share in SHARES
            for refit in ("none", "least-squares")
        }
        # Statistics that several methods read are collected once.
        with TemporaryDirectory() as kept:
            for method in METHODS:
                for refit in ("none", "least-squares"):
                    settings = Settings.create(
                        macs=SHARES[0],
                        importance=method,
                        allocate="uniform",
                        refit=refit,
                        align=1,
                        seed=seed,
                        mode="decoupled",
                        cache=kept,
                    )
                    ready = prepare.prepare(model, data, settings)
                    assert ready.held_out is not None
                    original = equivalence.watch(ready.model, ready.objective, ready.device)
                    for share in SHARES:
                        here = replace(ready, settings=settings.model_copy(update={"macs": share}))
                        after = equivalence.watch(
                            ready.model,
                            ready.objective,
                            ready.device,
                            search.search(here).pruned.proto,
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
                        row = found[share, refit]
                        row[method] = round(100 * seen.accuracy_after, 2)
                        row["before"] = round(100 * seen.accuracy_before, 2)
                print(name, method, [row[method] for row in found.values()], flush=True)
        rows.extend(found.values())
    return save(out, "methods", rows, COLUMNS, seed)
