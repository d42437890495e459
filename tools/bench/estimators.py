"""Estimators of dependence between layers: time, memory, and whether they find true edges better than correlation.

``pair``: 64 x 64 filters at 2,000 samples on one core. The double loop counts cells pair by pair and sample by sample;
it runs on a part of the pairs and its time is scaled by their number, which it is linear in.
``toy``: area under the curve of true edges, 32 parents and 16 children of four each. ``lines``: children add up
rectified parents; ``sizes``: they add up absolute values of parents of both signs, which no correlation sees.
``network``: pooling and scores of a whole network. ``memory``: peak of a process that pools 2,000 small images for a
network of ResNet-50's channels, taps included, and hashes its widest pair.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.stats import rankdata
from threadpoolctl import threadpool_limits

from onnx_oamip.api import pipeline
from onnx_oamip.core.records import Bools, Floats
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple
from onnx_oamip.planning import plan_constraints
from onnx_oamip.published.dependence import layer_pairs, mint, pooled_activations, snacs
from onnx_oamip.published.dependence.correlation import partial
from onnx_oamip.published.dependence.layer_pairs import standardise

from .speed import ZOO, random_weights
from .studies import Row, paths, save

SAMPLES = 2000
LOOPED = (2, 4)
"""Children and parents that the double loop runs on."""
SIDE = 64
"""Pixels of a side of the images for the memory of ResNet-50."""
COLUMNS = ("study", "estimator", "case", "seconds", "times faster", "area under curve", "peak MiB")
CLOCKED = ("seconds", "times faster", "peak MiB")
NETWORKS = ("vgg-fashion",)


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """All four parts; ``names`` picks networks, or parts by their names."""
    parts: dict[str, Callable[[int], list[Row]]] = {
        "pair": _pair,
        "toy": _toy,
        **{n: lambda s, n=n: _network(n, s) for n in NETWORKS},
        "memory": _memory,
    }
    rows: list[Row] = []
    for name, part in parts.items():
        if not names or name in names:
            for row in part(seed):
                print(row, flush=True)
                rows.append(row)
    return save(out, "estimators", rows, COLUMNS, seed, CLOCKED)


# ---------------------------------------------------------------------------------------------------------------- time


def _pair(seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    parents = np.maximum(rng.standard_normal((SAMPLES, 64)), 0)
    children = parents @ rng.standard_normal((64, 64)) / 8 + rng.standard_normal((SAMPLES, 64))
    estimators: dict[str, Callable[[], object]] = {
        "snacs": lambda: snacs.dependence(parents, children, seed),
        "mint (16 x 16 groups, one split)": lambda: mint.dependence(parents, children, seed),
        "correlation": lambda: partial(parents, children),
    }
    case = f"64 x 64, {SAMPLES} samples, one core"
    with threadpool_limits(1):
        spent = {name: _seconds(call) for name, call in estimators.items()}
        few = LOOPED[0] * LOOPED[1]
        loop = _seconds(lambda: _double_loop(parents, children, seed, *LOOPED)) / few * 64 * 64
    rows: list[Row] = [
        {"study": "pair", "estimator": n, "case": case, "seconds": s} for n, s in spent.items()
    ]
    rows[0]["times faster"] = loop / spent["snacs"]
    looped = {
        "study": "pair",
        "estimator": f"snacs, double loop ({few} of 4096 pairs, scaled)",
        "case": case,
    }
    return [*rows, {**looped, "seconds": loop}]


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _double_loop(parents: Floats, children: Floats, seed: int, some: int, others: int) -> Floats:
    """The same estimates for the first children and parents, from dictionaries of counts."""
    x, y = standardise(children), standardise(parents)
    given = snacs.chosen(y, x, snacs.CONDITIONS)
    hashed = snacs.draws(y, x, seed)
    result = np.zeros((some, others))
    for c in range(some):
        for p in range(others):
            conditions = [q for q in given[c].tolist() if q != p][: snacs.CONDITIONS]
            for draw in hashed:
                z = list(map(tuple, draw.parents[:, conditions].tolist()))
                code = np.unique(draw.parents[:, conditions], axis=0, return_inverse=True)[
                    1
                ].reshape(-1)
                moved = draw.children[snacs.shuffled(code, draw.order), c]
                for values, sign in ((draw.children[:, c], 1), (moved, -1)):
                    rows = list(zip(values.tolist(), draw.parents[:, p].tolist(), z, strict=True))
                    n_ijk, n_k = Counter(rows), Counter(z)
                    n_ik, n_jk = (
                        Counter((i, k) for i, _, k in rows),
                        Counter((j, k) for _, j, k in rows),
                    )
                    total = 0.0
                    for i, j, k in rows:
                        total += 1 / (1 + n_ijk[i, j, k] * n_k[k] / (n_ik[i, k] * n_jk[j, k]))
                    result[c, p] += sign * (1 - 2 * total / len(rows)) / len(hashed)
    return np.maximum(result, 0.0)


def _network(name: str, seed: int) -> list[Row]:
    model, source = paths(name)
    rows: list[Row] = []
    for method in ("snacs", "mint", "correlation"):
        settings = Settings.create(
            macs=0.5,
            importance=method,
            allocate="uniform",
            refit="none",
            seed=seed,
            workers=1,
            device="cpu",
            cache="off",
        )
        start = time.perf_counter()
        pipeline.prepare(model, source, settings)
        rows.append(
            {
                "study": "network",
                "estimator": method,
                "case": name,
                "seconds": time.perf_counter() - start,
            }
        )
    settings = Settings.create(
        macs=0.5,
        importance="l2",
        allocate="uniform",
        refit="none",
        limits="snacs",
        seed=seed,
        workers=1,
        device="cpu",
        cache="off",
    )
    seconds = _seconds(lambda: pipeline.prepare(model, source, settings))
    return [
        *rows,
        {"study": "network", "estimator": "--limits snacs", "case": name, "seconds": seconds},
    ]


# ------------------------------------------------------------------------------------------------------------- quality


def _toy(seed: int) -> list[Row]:
    rows: list[Row] = []
    for case, even in (("lines", False), ("sizes", True)):
        found: dict[str, list[float]] = {}
        for repeat in range(5):
            parents, children, true = _planted(np.random.default_rng([seed, repeat]), even)
            plain = np.abs(standardise(children).T @ standardise(parents))
            found.setdefault("correlation (plain)", []).append(_area(plain, true))
            found.setdefault("correlation (partial)", []).append(
                _area(partial(parents, children), true)
            )
            found.setdefault("snacs", []).append(
                _area(snacs.dependence(parents, children, seed), true)
            )
            trees = mint.dependence(parents, children, seed)
            assert trees is not None
            found.setdefault("mint (pairs of parents)", []).append(_area(trees, true))
        for name, areas in found.items():
            mean = round(float(np.mean(areas)), 3)
            rows.append(
                {
                    "study": "toy",
                    "estimator": name,
                    "case": f"{case}, 5 draws",
                    "area under curve": str(mean),
                }
            )
    return rows


def _planted(rng: np.random.Generator, even: bool) -> tuple[Floats, Floats, Bools]:
    hidden = rng.standard_normal((SAMPLES, 4)) @ rng.standard_normal((4, 32)) / 2
    hidden += 0.7 * rng.standard_normal((SAMPLES, 32))
    parents = hidden if even else np.maximum(hidden, 0)
    weight = np.zeros((16, 32))
    for row in weight:
        row[rng.choice(32, 4, replace=False)] = rng.choice([-1, 1], 4) * rng.uniform(0.5, 1.5, 4)
    read = np.abs(standardise(parents)) if even else standardise(parents)
    noise = (0.5 if even else 2.0) * rng.standard_normal((SAMPLES, 16))
    return parents, read @ weight.T + noise, weight != 0


def _area(found: Floats, true: Bools) -> float:
    rank = rankdata(found.reshape(-1))[true.reshape(-1)]
    count, rest = true.sum(), (~true).sum()
    return float((rank.sum() - count * (count + 1) / 2) / (count * rest))


# -------------------------------------------------------------------------------------------------------------- memory


def _memory(seed: int) -> list[Row]:
    """In a process of its own: a peak is never given back."""
    command = [
        sys.executable,
        "-c",
        f"from tools.bench import estimators; estimators.pool_resnet({seed})",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    case = f"resnet50 (random weights), {SAMPLES} images of {SIDE} x {SIDE}"
    return [{"study": "memory", "case": case, **found}]


def pool_resnet(seed: int) -> None:
    """Print seconds and the peak resident memory of pooling and of one wide pair, as JSON."""
    import resource

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet50.onnx"
        random_weights(ZOO / "light_resnet50.onnx", path, seed, SIDE)
        model = models.load(path)
        images = np.random.default_rng(seed).standard_normal((SAMPLES, 3, SIDE, SIDE), np.float32)
        samples = dataset.load({model.inputs[0].name: images}, model)
        assert samples is not None
        coupling = couple(model)
        start = time.perf_counter()
        seen = pooled_activations.collect(model, coupling, samples, "cpu", seed=seed, by_tap=True)
        seconds = time.perf_counter() - start
        pairs = list(layer_pairs.pairs(model, coupling, seen))
        wide = max(pairs, key=lambda p: p.weight.size)
        snacs.dependence(wide.parents, wide.children[:, :4], seed)
        plan_constraints.sensitivity(model, coupling)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    channels = sum(v.shape[1] for v in seen.values.values())
    text = f"pooling ({channels} channels, {len(pairs)} pairs of layers)"
    print(json.dumps({"estimator": text, "seconds": seconds, "peak MiB": peak}))
