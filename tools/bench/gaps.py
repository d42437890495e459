"""Gaps that the decoupled programs of dense and convolutional groups prove, with a least-squares refit.

A row per group: the sum of its programs' losses, the gap relative to that sum, and the same in percent of the energy of
the consumers' outputs, for the mean program. Losses of wide sets are small, so that a gap that is wide relative to the
loss is often narrow in the energy that the units explain. The last group is 2,000 random features of the images, read
by ten random outputs. Groups are scored one after the other, so that processor seconds are those of one group, from
second moments that are there. Rows are saved as they are found, and a stopped study continues after the last network.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_oamip.api import prepare
from onnx_oamip.core.settings import Settings
from onnx_oamip.importance import find
from onnx_oamip.importance.oamip import decoupled
from onnx_oamip.statistics.collector import collect

from .studies import Resumable, Row, paths

WIDE = "random features of MNIST"
WIDE_UNITS = 2000
OUTPUTS = 10
TIME_LIMIT = 1800
"""Seconds for a group: more than any needs, so that other work on the machine does not change the gaps."""
NAMES = {"lenet300-mnist": 2, "lenet5-mnist": 3, WIDE: 1}
"""Networks, and the number of their groups."""
COLUMNS = (
    "model",
    "group",
    "units",
    "programs",
    "loss",
    "gap",
    "unproved energy",
    "solver",
    "processor s",
)
CLOCKED = ("processor s",)


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """A row per group."""
    study = Resumable(out, "gaps", COLUMNS, seed, CLOCKED)
    for name in names or tuple(NAMES):
        study.measure({"model": name}, NAMES[name], _rows(name, seed))
    return study.save()


def _rows(name: str, seed: int) -> Iterator[Row]:
    settings = Settings.create(
        importance="oamip",
        mode="decoupled",
        refit="least-squares",
        workers=1,
        seed=seed,
        time_limit=TIME_LIMIT,
        cache="off",
    )
    with tempfile.TemporaryDirectory() as folder:
        model, data = paths("lenet300-mnist" if name == WIDE else name)
        if name == WIDE:
            model = _wide(Path(folder) / "wide.onnx", seed)
        context = prepare.open_context(model, str(data), settings)
    statistics = collect(context, find(settings.importance).requests(settings))
    for group in context.coupling.groups:
        coupling = replace(context.coupling, groups=(group,))
        used = time.process_time()
        scores = decoupled.score(context.model, coupling, statistics, settings)
        seconds = time.process_time() - used
        (record,) = scores.programs
        unproved = (record["objective"] - record["bound"]) / record["programs"]
        yield {
            "model": name,
            "group": group.name,
            "units": len(group.units),
            "programs": record["programs"],
            "loss": f"{record['objective']:.4f}",
            "gap": f"{record['gap']:.1%}",
            "unproved energy": f"{unproved:.2%}",
            "solver": record["solver"],
            "processor s": round(seconds, 1),
        }


def _wide(target: Path, seed: int) -> Path:
    """Write a network of one hidden layer with random weights, which reads the images of LeNet-300-100."""
    original = onnx.load(paths("lenet300-mnist")[0]).graph
    shape = [d.dim_param or d.dim_value for d in original.input[0].type.tensor_type.shape.dim]
    inputs = int(np.prod([d for d in shape if isinstance(d, int)]))
    rng = np.random.default_rng(seed)
    sizes = {"first": (WIDE_UNITS, inputs), "last": (OUTPUTS, WIDE_UNITS)}
    constants = [
        numpy_helper.from_array(
            (rng.standard_normal(size) * np.sqrt(2 / size[1])).astype(np.float32), name
        )
        for name, size in sizes.items()
    ]
    x = helper.make_tensor_value_info(original.input[0].name, TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [shape[0], OUTPUTS])
    nodes = [
        helper.make_node("Flatten", [x.name], ["flat"]),
        helper.make_node("Gemm", ["flat", "first"], ["hidden"], transB=1),
        helper.make_node("Relu", ["hidden"], ["features"]),
        helper.make_node("Gemm", ["features", "last"], ["scores"], transB=1),
    ]
    graph = helper.make_graph(nodes, "wide", [x], [y], constants)
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), target)
    return target
