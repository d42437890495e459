"""Study of the cost of decoupled scores: seconds and memory against images, width and groups, up to a ResNet-50.

The ResNet-50 is the graph in the onnx package with seeded random weights, fed 112 x 112 images; the others are the
shipped VGG on fewer or more images, and dense networks of growing width. Peak memory is of a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .speed import ZOO, random_weights
from .studies import ROOT, Row, paths, save

COLUMNS = (
    "model",
    "units",
    "groups",
    "images",
    "refit",
    "seconds",
    "of that programs",
    "slowest group",
    "largest program",
    "solvers",
    "peak MiB",
)
CLOCKED = ("seconds", "of that programs", "slowest group", "peak MiB")
REFITS = ("none", "least-squares")
ONE = """
import json, resource, sys, time
from onnx_oamip.api import pipeline
from onnx_oamip.core.settings import Settings
model, data, out, refit, seed = sys.argv[1:]
began = time.perf_counter()
settings = Settings.create(importance="oamip", mode="decoupled", refit=refit, seed=int(seed))
found = pipeline.score(model, data, out, settings)
print(json.dumps({
    "units": found.coupling.n_units, "groups": len(found.coupling.groups), "images": found.settings["samples"],
    "refit": refit, "seconds": round(time.perf_counter() - began, 1),
    "of that programs": round(found.seconds["score"], 1),
    "slowest group": round(max(p["seconds"] for p in found.scores.programs), 1),
    "largest program": max(p["variables"] for p in found.scores.programs),
    "solvers": ", ".join(sorted({p["solver"] for p in found.scores.programs if p["solver"]})),
    "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
}))
"""


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """One row per model, images and refit."""
    rows: list[Row] = []
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if not names or "vgg-fashion" in names:
            vgg, fashion = paths("vgg-fashion")
            with np.load(fashion) as held:
                arrays = dict(held)
            for images in (64, 256, 512):
                few = {
                    k: v if k.endswith(".scale") or k.startswith("eval.") else v[:images]
                    for k, v in arrays.items()
                }
                np.savez(place / "few.npz", **few)
                rows += [
                    _row("vgg-fashion", vgg, place / "few.npz", refit, seed) for refit in REFITS
                ]
        if not names or "dense" in names:
            for width in (512, 1024, 2048):
                _dense(width, place / "dense.onnx", rng)
                np.savez(place / "dense.npz", x=rng.standard_normal((512, 64), np.float32))
                name = f"dense {width}-{width}"
                rows += [
                    _row(name, place / "dense.onnx", place / "dense.npz", refit, seed)
                    for refit in REFITS
                ]
        if not names or "resnet50" in names:
            random_weights(ZOO / "light_resnet50.onnx", place / "resnet50.onnx", seed, size=112)
            np.savez(
                place / "images.npz",
                **{"gpu_0/data_0": rng.standard_normal((320, 3, 112, 112), np.float32)},
            )
            rows.append(
                _row(
                    "resnet50", place / "resnet50.onnx", place / "images.npz", "least-squares", seed
                )
            )
    return save(out, "decoupled", rows, COLUMNS, seed, CLOCKED)


def _row(name: str, model: Path, data: Path, refit: str, seed: int) -> Row:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            ONE,
            str(model),
            str(data),
            str(data.with_name("scores.npz")),
            refit,
            str(seed),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    if done.returncode:
        raise RuntimeError(f"scoring {name} failed: {done.stderr.strip().splitlines()[-1]}")
    row: Row = {"model": name, **json.loads(done.stdout.splitlines()[-1])}
    print(row, flush=True)
    return row


def _dense(width: int, target: Path, rng: np.random.Generator) -> None:
    """64 inputs, two hidden layers of ``width``, 10 outputs."""
    sizes = (64, width, width, 10)
    nodes, constants = [], []
    for i, (a, b) in enumerate(pairwise(sizes)):
        weight = rng.standard_normal((b, a)) * np.sqrt(2 / a)
        constants.append(numpy_helper.from_array(weight.astype(np.float32), f"w{i}"))
        nodes.append(
            helper.make_node("Gemm", [f"r{i}" if i else "x", f"w{i}"], [f"y{i}"], transB=1)
        )
        nodes.append(helper.make_node("Relu", [f"y{i}"], [f"r{i + 1}"]))
    nodes.pop()
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])
    y = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, ["n", 10])
    graph = helper.make_graph(nodes, "dense", [x], [y], constants)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), target
    )
