"""Write a large transformer with seeded random weights: ``python -m tools.make_large_model OUT.onnx [--layers 20]``.

Attention is decomposed into matrix products, as exporters write it. The weights stream into ``OUT.onnx.data`` one by
one, so that a model larger than the memory can be made; 20 layers of width 1024 are a gigabyte, 46 are 2.3.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

INPUTS, CLASSES = 64, 10
ALIGN = 4096
"""Weights start at multiples of this many bytes, so that they can be mapped into memory."""


class _Writer:
    """Nodes and weights of a graph that is being written."""

    def __init__(self, data: BinaryIO, location: str, rng: np.random.Generator) -> None:
        self.data, self.location, self.rng = data, location, rng
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def node(self, op: str, inputs: list[str], name: str, **attrs: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name], f"{name}_{op.lower()}", **attrs))
        return name

    def constant(self, name: str, value: npt.NDArray[np.generic]) -> str:
        if value.nbytes < ALIGN:
            self.constants.append(numpy_helper.from_array(value, name))
            return name
        start = -(-self.data.tell() // ALIGN) * ALIGN
        self.data.seek(start)
        self.data.write(value.data)
        tensor = TensorProto(
            name=name, dims=value.shape, data_type=helper.np_dtype_to_tensor_dtype(value.dtype)
        )
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in (("location", self.location), ("offset", start), ("length", value.nbytes)):
            tensor.external_data.add(key=key, value=str(text))
        self.constants.append(tensor)
        return name

    def linear(self, x: str, ins: int, outs: int, name: str) -> str:
        weight = self.rng.standard_normal((ins, outs), np.float32)
        weight *= np.float32(ins**-0.5)
        product = self.node(
            "MatMul", [x, self.constant(f"{name}.weight", weight)], f"{name}_product"
        )
        return self.node(
            "Add", [product, self.constant(f"{name}.bias", np.zeros(outs, np.float32))], name
        )

    def norm(self, x: str, width: int, name: str) -> str:
        scale = self.constant(f"{name}.scale", np.ones(width, np.float32))
        shift = self.constant(f"{name}.bias", np.zeros(width, np.float32))
        return self.node("LayerNormalization", [x, scale, shift], name, axis=-1)

    def gelu(self, x: str, name: str) -> str:
        part = self.node("Div", [x, "root_two"], f"{name}_scaled")
        error = self.node("Add", [self.node("Erf", [part], f"{name}_erf"), "one"], f"{name}_gate")
        return self.node("Mul", [self.node("Mul", [x, error], f"{name}_gated"), "half"], name)

    def heads(self, x: str, name: str, perm: list[int]) -> str:
        return self.node(
            "Transpose", [self.node("Reshape", [x, "split"], f"{name}_split")], name, perm=perm
        )

    def layer(self, x: str, width: int, name: str) -> str:
        h = self.norm(x, width, f"{name}.before")
        q, k, v = (self.linear(h, width, width, f"{name}.{part}") for part in "qkv")
        queries = self.heads(q, f"{name}.queries", [0, 2, 1, 3])
        keys = self.heads(k, f"{name}.keys", [0, 2, 3, 1])
        values = self.heads(v, f"{name}.values", [0, 2, 1, 3])
        scores = self.node("MatMul", [queries, keys], f"{name}.scores")
        scaled = self.node("Mul", [scores, "scale"], f"{name}.scaled")
        attention = self.node("Softmax", [scaled], f"{name}.attention", axis=-1)
        mixed = self.node("MatMul", [attention, values], f"{name}.mixed")
        back = self.node("Transpose", [mixed], f"{name}.back", perm=[0, 2, 1, 3])
        out = self.linear(
            self.node("Reshape", [back, "join"], f"{name}.joined"), width, width, f"{name}.out"
        )
        x = self.node("Add", [x, out], f"{name}.attended")
        up = self.linear(self.norm(x, width, f"{name}.between"), width, 4 * width, f"{name}.up")
        down = self.linear(self.gelu(up, f"{name}.gelu"), 4 * width, width, f"{name}.down")
        return self.node("Add", [x, down], f"{name}.done")


def make(path: Path, layers: int = 20, width: int = 1024, heads: int = 16, seed: int = 0) -> int:
    """Write the model and its data; returns their bytes. Raises ValueError where the heads do not share the width."""
    if width % heads:
        raise ValueError(f"{heads} heads cannot share a width of {width}")
    data = path.with_name(f"{path.name}.data")
    with data.open("wb") as stream:
        writer = _Writer(stream, data.name, np.random.default_rng(seed))
        for name, number in (
            ("root_two", 2**0.5),
            ("one", 1),
            ("half", 0.5),
            ("scale", (width / heads) ** -0.5),
        ):
            writer.constant(name, np.asarray(number, np.float32))
        writer.constant("split", np.asarray([0, 0, heads, width // heads], np.int64))
        writer.constant("join", np.asarray([0, 0, width], np.int64))
        x = writer.linear("x", INPUTS, width, "embed")
        for i in range(layers):
            x = writer.layer(x, width, f"layer{i}")
        pooled = writer.node(
            "ReduceMean", [writer.norm(x, width, "last")], "pooled", axes=[1], keepdims=0
        )
        writer.linear(pooled, width, CLASSES, "logits")
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", INPUTS])
    made = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])
    graph = helper.make_graph(writer.nodes, "large", [given], [made], writer.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path.stat().st_size + data.stat().st_size


def main() -> None:
    """Write the model that the command line describes."""
    parser = argparse.ArgumentParser(prog="python -m tools.make_large_model", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    size = make(chosen.out, chosen.layers, chosen.width, chosen.heads, chosen.seed)
    print(f"{chosen.out}: {size / 1e9:.2f} GB with its data")


if __name__ == "__main__":
    main()
