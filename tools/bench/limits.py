"""Peak memory of ``prune`` against ``--max-memory``, of shipped networks and of made ones that are wide, deep or long.

Every run is a process of its own. Its peak is the kernel's maximum of resident pages, those of libraries among them.
A stopped study continues when it is run again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .studies import MODELS, ROOT, Resumable, Row, paths

LIMIT = "1GB"
LIMIT_MIB = 1024
SAMPLES = 64
SECONDS = 900
"""After which a run is given up."""
COLUMNS = ("model", "parameters", "widest group", "limit MiB", "peak MiB", "of the limit", "s")
CLOCKED = COLUMNS[4:]
Shape = tuple[int, ...]


class _Maker:
    """A chain of layers with seeded weights."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape = shape
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []
        self.last = "x"

    def weight(self, *shape: int, gain: float = 1.0) -> str:
        name = f"w{len(self.weights)}"
        scale = gain * np.sqrt(2 / np.prod(shape[1:] if len(shape) > 2 else shape[:1]))
        value = (scale * self.rng.standard_normal(shape)).astype(np.float32)
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def node(self, op: str, *more: str, **attributes: Any) -> None:
        out = f"t{len(self.nodes)}"
        inputs = [self.last, *more]
        self.nodes.append(
            helper.make_node(op, inputs, [out], f"{op}{len(self.nodes)}", **attributes)
        )
        self.last = out

    def model(self, outputs: int) -> ModelProto:
        def info(name: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape])

        graph = helper.make_graph(
            self.nodes, "made", [info("x", self.shape)], [info(self.last, (outputs,))], self.weights
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _linear(*widths: int, residual: bool = False) -> Callable[[int], tuple[ModelProto, Shape]]:
    """Linear layers of these widths."""

    def make(seed: int) -> tuple[ModelProto, Shape]:
        maker = _Maker(widths[:1], seed)
        for i, (before, after) in enumerate(pairwise(widths)):
            start = maker.last
            adds = residual and before == after
            # A sum over hundreds of layers must stay finite.
            maker.node("MatMul", maker.weight(before, after, gain=0.1 if adds else 1.0))
            if i < len(widths) - 2:
                maker.node("Relu")
            if adds:
                maker.node("Add", start)
        return maker.model(widths[-1]), maker.shape

    return make


def _convolutions(
    shape: Shape, kernel: int, *widths: int, depthwise: bool = False
) -> Callable[[int], tuple[ModelProto, Shape]]:
    """Convolutions of these widths over an image or a signal, then a classifier."""

    def make(seed: int) -> tuple[ModelProto, Shape]:
        maker = _Maker(shape, seed)
        ranks = len(shape) - 1
        pads = [kernel // 2] * 2 * ranks
        before = shape[0]
        for after in widths:
            maker.node("Conv", maker.weight(after, before, *[kernel] * ranks), pads=pads)
            maker.node("Relu")
            if depthwise:
                weight = maker.weight(after, 1, *[kernel] * ranks)
                maker.node("Conv", weight, pads=pads, group=after)
                maker.node("Relu")
            before = after
        maker.node("GlobalAveragePool")
        maker.node("Flatten")
        maker.node("MatMul", maker.weight(before, 10))
        return maker.model(10), shape

    return make


def _tokens(length: int, width: int, inner: int) -> Callable[[int], tuple[ModelProto, Shape]]:
    """Two feed-forward blocks over a sequence."""

    def make(seed: int) -> tuple[ModelProto, Shape]:
        maker = _Maker((length, width), seed)
        for _ in range(2):
            start = maker.last
            maker.node("MatMul", maker.weight(width, inner))
            maker.node("Relu")
            maker.node("MatMul", maker.weight(inner, width))
            maker.node("Add", start)
        maker.node("ReduceMean", axes=[1], keepdims=0)
        maker.node("MatMul", maker.weight(width, 10))
        return maker.model(10), maker.shape

    return make


MADE: dict[str, Callable[[int], tuple[ModelProto, Shape]]] = {
    "4-5,000-2": _linear(4, 5_000, 2),
    "4-20,000-2": _linear(4, 20_000, 2),
    "4-100,000-2": _linear(4, 100_000, 2),
    "64-4,096-4,096-10": _linear(64, 4_096, 4_096, 10),
    "200 layers of 32": _linear(16, *[32] * 200, 10),
    "200 residual layers of 32": _linear(16, *[32] * 200, 10, residual=True),
    "1x1 convolutions, 8,192 channels": _convolutions((3, 8, 8), 1, 8_192),
    "3x3 convolutions, 512 channels": _convolutions((3, 16, 16), 3, 64, 512, 512),
    "depthwise, 2,048 channels": _convolutions((3, 8, 8), 3, 2_048, depthwise=True),
    "image of 512 px": _convolutions((3, 512, 512), 3, 16, 32),
    "signal of 65,536": _convolutions((1, 65_536), 9, 16, 32, 32),
    "30 convolutions": _convolutions((3, 16, 16), 3, *[24] * 30),
    "1,024 tokens of 64": _tokens(1_024, 64, 256),
    "16 tokens of 512, inner 8,192": _tokens(16, 512, 8_192),
}


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """One row a model: the peak in MiB, and its share of the limit."""
    study = Resumable(out, "limits", COLUMNS, seed, CLOCKED)
    for name in names or (*MODELS, *MADE):
        if not study.holds({"model": name}):
            with TemporaryDirectory() as folder:
                study.add(_row(name, Path(folder), seed))
    study.rows.sort(key=lambda row: (*MODELS, *MADE).index(row["model"]))
    return study.save()


def _row(name: str, folder: Path, seed: int) -> Row:
    model, data = _files(name, folder, seed)
    command = [sys.executable, "-m", "onnx_oamip", "prune", str(model), "--data", str(data)]
    plan = ["--macs", "0.5", "--align", "1", "--samples", str(SAMPLES), "--seed", str(seed)]
    where = ["--device", "cpu", "--cache", "off", "--force", "-o", str(folder / "out.onnx")]
    report = folder / "report.json"
    start = time.monotonic()
    with report.open("wb") as stream:
        process = subprocess.Popen(
            [*command, *plan, *where, "--max-memory", LIMIT, "--json"], stdout=stream, cwd=ROOT
        )
        status, used = _waited(process, start + SECONDS)
    seconds = time.monotonic() - start
    parameters = sum(int(np.prod(t.dims)) for t in onnx.load(model).graph.initializer)
    peak = used / 1024
    row: Row = {"model": name, "parameters": f"{parameters:,}", "limit MiB": LIMIT_MIB}
    if status:
        return {**row, "peak MiB": round(peak), "of the limit": f"ended with {status}"}
    groups = json.loads(report.read_text())["groups"]
    return {
        **row,
        "widest group": f"{max(group['units'] for group in groups):,}",
        "peak MiB": round(peak),
        "of the limit": round(peak / LIMIT_MIB, 2),
        "s": round(seconds, 1),
    }


def _waited(process: subprocess.Popen[bytes], until: float) -> tuple[int, int]:
    """(exit status, peak of resident pages in KiB) of a process, which is ended when the time is up."""
    while True:
        done, status, used = os.wait4(process.pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), used.ru_maxrss
        if time.monotonic() > until:
            process.kill()
        time.sleep(0.1)


def _files(name: str, folder: Path, seed: int) -> tuple[Path, Path]:
    if name in MODELS:
        return paths(name)
    proto, shape = MADE[name](seed)
    onnx.save(proto, folder / "model.onnx")
    samples = np.random.default_rng(seed).standard_normal((SAMPLES, *shape)).astype(np.float32)
    np.savez(folder / "data.npz", x=samples)
    return folder / "model.onnx", folder / "data.npz"
