"""Lottery tickets: masks of one data set trained from the initial weights, on the same and on another data set.

FC-3 (300-100) is trained on MNIST, Fashion-MNIST and, with ``--kana DIR``, on hiragana like those of KMNIST
(``tools.experiments.kana``; ``--mnist DIR --fashion DIR``, torch). The published program decides at its threshold how
many units of a layer stay; the exact program (joint, ten images, two minutes) and the decoupled ones keep as many, and
so does a random mask. What a mask leaves of the initial weights is trained as the whole network was. Rows that are in
the saved study are not made again, so that it can be made in parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .studies import LeftOut, Resumable, Row

STUDY = "lottery"
NETWORK = "fc3"
EPOCHS = 5
EXACT_SECONDS = 120.0
COLUMNS = ("network", "mask of", "trained on", "mask", "units", "kept", "accuracy")


def run(
    out: Path,
    seed: int,
    names: tuple[str, ...] = (),
    mnist: Path | None = None,
    fashion: Path | None = None,
    kana: Path | None = None,
) -> str:
    """A row per data set of the mask, data set of the training, and mask."""
    if names and NETWORK not in names:
        return ""
    if mnist is None or fashion is None:
        raise LeftOut("lottery trains networks: give --mnist DIR and --fashion DIR.")
    from ..experiments import data

    folders = {"mnist": mnist, "fashion": fashion, "kana": kana}
    sets = {name: data.load(name, path) for name, path in folders.items() if path is not None}
    study = Resumable(out, STUDY, COLUMNS, seed)
    for row in _rows(out, seed, sets, study):
        study.add(row)
    return study.save()


def _rows(out: Path, seed: int, sets: Mapping[str, Any], study: Resumable) -> Iterator[Row]:
    """Rows that the study does not hold. A network is trained, and its masks are found, only where a row needs them."""
    from ..experiments import networks
    from ..experiments.protocol import NETWORKS

    names = ("whole", "random", "paper", "exact", "decoupled")
    for source in sets:
        missing = [
            (target, mask)
            for target in sets
            for mask in names
            if not study.holds({"mask of": source, "trained on": target, "mask": mask})
        ]
        if not missing:
            continue
        path = out / f"{NETWORK}-{source}-seed{seed}.onnx"
        if not path.exists():
            networks.make(NETWORK, sets[source], seed, EPOCHS, path)
        masks = _masks(path, sets[source], seed)
        initial = networks.build(NETWORK, seed).state_dict()
        for target, name in missing:
            keep = masks[name]
            model = networks.part(NETWORK, initial, keep)
            networks.fit(model, sets[target], seed, EPOCHS)
            yield {
                "network": NETWORKS[NETWORK].title,
                "mask of": source,
                "trained on": target,
                "mask": name,
                "units": sum(len(rows) for rows in keep.values()),
                "kept": sum(int(rows.sum()) for rows in keep.values()),
                "accuracy": round(networks.accuracy(model, sets[target]), 2),
            }


def _masks(path: Path, dataset: Any, seed: int) -> dict[str, dict[str, Any]]:
    """Rows that stay of every weight, by mask."""
    from ..experiments import case as cases

    case = cases.open_case(path, NETWORK, dataset, seed)
    few = cases.choose(case, case.samples)
    asked = {
        "paper": cases.settings(seed=seed),
        "exact": cases.settings(formulation="exact", seed=seed, time_limit=EXACT_SECONDS),
    }
    values = {name: cases.score(case, settings, few)[0].values for name, settings in asked.items()}
    decoupled = cases.settings(mode="decoupled", refit="least-squares", seed=seed)
    values["decoupled"] = cases.score(case, decoupled)[0].values
    values["random"] = np.random.default_rng(seed).random(case.coupling.n_units)
    widths = cases.below(case, values["paper"], case.about.threshold)
    found = {
        name: case.by_weight(cases.mask(case, score, widths)) for name, score in values.items()
    }
    found["whole"] = case.by_weight(np.ones(case.coupling.n_units, bool))
    return found
