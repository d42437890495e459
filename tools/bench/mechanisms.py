"""Worth of each mechanism: all of them, each left out, each alone, and none, at equal MACs.

A mechanism that is off gives way to its simple form: orders by the norms of weights, the same share of every group, no
refit, no augmented copies of images, channels in place of principal components, losses measured once. Networks with
labels are judged by accuracy, EfficientNet-Lite0 (``--larger DIR``, see ``larger``) by agreement with the original.
Rows that are in the saved study are not made again, so that it can be made in parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from onnx_oamip.api import prepare
from onnx_oamip.core.settings import Settings
from onnx_oamip.planning import search

from .larger import Bench, benches
from .studies import Resumable, Row

STUDY = "mechanisms"
NETWORKS = ("resnet20-fashion", "mobilenet-fashion", "vit-fashion", "efficientnet-lite0")
BUDGETS = (0.65, 0.5)
OFF: Mapping[str, Mapping[str, str]] = {
    "orders": {"importance": "l2"},
    "budget program": {"allocate": "uniform"},
    "refit": {"refit": "none"},
    "copies": {"augment": "none"},
    "rotation": {"rotate": "none"},
    "second looks": {"effort": "normal"},
}
"""Settings without a mechanism, by its name."""
NEEDS: Mapping[str, tuple[str, ...]] = {
    "copies": ("refit",),
    "rotation": ("orders", "budget program", "refit"),
    "second looks": ("budget program",),
}
"""Mechanisms without which another one does nothing: it is not shown alone."""
SLOW: Mapping[str, str] = {"efficientnet-lite0": "second looks"}
"""Mechanism that a network has in its first row alone, because it takes longer than all others together."""
ON: Mapping[str, str] = {"align": "1", "effort": "high"}
"""Settings with all mechanisms, where they are not the defaults."""
SCALED = "divergence x 1000"
COLUMNS = ("model", "MACs asked", "mechanisms", "judged by", "before", "after", SCALED)


def run(out: Path, seed: int, names: tuple[str, ...] = (), larger: Path | None = None) -> str:
    """One row per network, budget and choice of mechanisms."""
    study = Resumable(out, STUDY, COLUMNS, seed)
    for bench in benches(names or NETWORKS, larger):
        for row in _rows(bench, seed, study):
            study.add(row)
    return study.save()


def choices(slow: str | None = None) -> dict[str, dict[str, str]]:
    """Settings of every choice of mechanisms, by its name; without ``slow`` but for the choice of all."""
    found = {"all": dict(ON)}
    always = [] if slow is None else [slow]
    if slow is not None:
        found[f"all but {slow}"] = _without(always)
    for name in OFF:
        if name not in always:
            missing = [*always, name]
            found[f"all but {' and '.join(missing)}"] = _without(missing)
    for name in OFF:
        if name in NEEDS:
            continue
        found[f"{name} alone"] = _without([other for other in OFF if other != name])
    found["none"] = _without(list(OFF))
    return found


def _without(names: list[str]) -> dict[str, str]:
    """Settings with some mechanisms off, and those that do nothing without them."""
    idle = [name for name, needed in NEEDS.items() if set(needed) & set(names)]
    settings = dict(ON)
    for name in dict.fromkeys([*names, *idle]):
        settings.update(OFF[name])
    return settings


def _rows(bench: Bench, seed: int, study: Resumable) -> Iterator[Row]:
    """Rows of one network that the study does not hold; statistics and losses are shared by a cache."""
    with TemporaryDirectory() as kept:
        for choice, values in choices(SLOW.get(bench.name)).items():
            for budget in BUDGETS:
                if study.holds({"model": bench.name, "MACs asked": budget, "mechanisms": choice}):
                    continue
                settings = Settings.create(macs=budget, seed=seed, cache=kept, **values)
                ready = prepare.prepare(bench.model, bench.data, settings)
                row = bench.row(budget, choice, search.search(ready).pruned.proto)
                row["mechanisms"] = row.pop("method")
                row[SCALED] = round(1000 * row["divergence"], 1)
                yield {column: row[column] for column in COLUMNS}
