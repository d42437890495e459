"""The classic image networks that ship inside the onnx package without their weights, given seeded random ones."""

from __future__ import annotations

import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from onnx_oamip.core.records import Array

FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
# How far the last layer's outputs are spread with the weights below: they are divided by it, because a softmax that
# picks one class for certain would hide whatever is wrong before it.
LOGITS = {
    "bvlc_alexnet": 6.1,
    "densenet121": 2.0,
    "inception_v1": 19.5,
    "inception_v2": 16.8,
    "resnet50": 36.5e3,
    "shufflenet": 3.2e6,
    "squeezenet": 1.7,
    "vgg19": 6.2,
    "zfnet512": 1.7,
}
NAMES = tuple(LOGITS)


def with_weights(name: str, seed: int = 0) -> ModelProto:
    """One of the graphs with random weights of a sound scale in place of its ``ConstantOfShape`` nodes."""
    proto = onnx.load(FOLDER / f"light_{name}.onnx")
    proto.ir_version = 4  # weights need not be listed as inputs any more
    graph = proto.graph
    last = next(n for n in reversed(graph.node) if n.op_type in ("Gemm", "Conv"))
    shapes = {
        t.name: numpy_helper.to_array(t).tolist()
        for t in graph.initializer
        if t.name.endswith("__SHAPE")
    }
    readers: dict[str, list[tuple[NodeProto, int]]] = defaultdict(list)
    for node in graph.node:
        for slot, tensor in enumerate(node.input):
            readers[tensor].append((node, slot))
    made = {n.output[0]: shapes[n.input[0]] for n in graph.node if n.op_type == "ConstantOfShape"}
    weights = []
    for output, shape in made.items():
        reader, slot = readers[output][0]
        if reader.op_type == "Unsqueeze":  # a per-channel factor or shift
            reader, slot = readers[reader.output[0]][0]
        rng = np.random.default_rng([seed, zlib.crc32(output.encode())])
        value = _values(rng, reader, slot, shape)
        if output in last.input:
            value /= np.float32(LOGITS[name])
        weights.append(numpy_helper.from_array(value, output))
    nodes = [
        NodeProto.FromString(n.SerializeToString())
        for n in graph.node
        if n.op_type != "ConstantOfShape"
    ]
    del graph.node[:]
    graph.node.extend(nodes)
    for listed in (graph.input, graph.initializer):
        for i in reversed(range(len(listed))):
            if listed[i].name in shapes:
                del listed[i]
    graph.initializer.extend(weights)
    return proto


def _values(rng: np.random.Generator, reader: NodeProto, slot: int, shape: list[int]) -> Array:
    role = (reader.op_type, slot)
    if role in {("Conv", 1), ("Gemm", 1)}:
        attributes = {a.name: a.i for a in reader.attribute}
        fan = (
            shape[0]
            if reader.op_type == "Gemm" and not attributes.get("transB")
            else int(np.prod(shape[1:]))
        )
        return rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / fan))
    if reader.op_type == "Mul" or role in {("BatchNormalization", 1), ("BatchNormalization", 4)}:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return rng.standard_normal(shape, np.float32) * np.float32(0.1)


def image(proto: ModelProto) -> str:
    """The name of the one input that is no weight."""
    held = {t.name for t in proto.graph.initializer}
    (name,) = [v.name for v in proto.graph.input if v.name not in held]
    return name


def images(count: int) -> Array:
    """Random images, batched along axis 0: the networks take one at a time."""
    return np.random.default_rng(1).standard_normal((count, 3, 224, 224), np.float32)
