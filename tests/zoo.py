"""The classic image networks that ship inside the onnx package without their weights, given seeded random ones."""

from __future__ import annotations

import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from onnx_oamip.records import Array
from onnx_oamip.runtime import Session

FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
NAMES = (
    "bvlc_alexnet", "densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet", "squeezenet", "vgg19",
    "zfnet512",
)  # fmt: skip


def with_weights(name: str, seed: int = 0) -> ModelProto:
    """One of the graphs with random weights of a sound scale in place of its ``ConstantOfShape`` nodes."""
    proto = onnx.load(FOLDER / f"light_{name}.onnx")
    proto.ir_version = 4  # weights need not be listed as inputs any more
    graph = proto.graph
    shapes = {t.name: numpy_helper.to_array(t).tolist() for t in graph.initializer if t.name.endswith("__SHAPE")}
    readers: dict[str, list[tuple[NodeProto, int]]] = defaultdict(list)
    for node in graph.node:
        for slot, tensor in enumerate(node.input):
            readers[tensor].append((node, slot))
    kept = []
    for node in graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(NodeProto.FromString(node.SerializeToString()))
            continue
        (output,) = node.output
        reader, slot = readers[output][0]
        if reader.op_type == "Unsqueeze":  # a per-channel factor or shift
            reader, slot = readers[reader.output[0]][0]
        rng = np.random.default_rng([seed, zlib.crc32(output.encode())])
        value = _values(rng, reader, slot, shapes[node.input[0]])
        graph.initializer.append(numpy_helper.from_array(value, output))
    del graph.node[:]
    graph.node.extend(kept)
    for listed in (graph.input, graph.initializer):
        stay = [type(v).FromString(v.SerializeToString()) for v in listed if v.name not in shapes]
        del listed[:]
        listed.extend(stay)
    _scale_logits(proto)
    return proto


def _values(rng: np.random.Generator, reader: NodeProto, slot: int, shape: list[int]) -> Array:
    role = (reader.op_type, slot)
    if role in {("Conv", 1), ("Gemm", 1)}:
        attributes = {a.name: a.i for a in reader.attribute}
        fan = shape[0] if reader.op_type == "Gemm" and not attributes.get("transB") else int(np.prod(shape[1:]))
        return rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / fan))
    if reader.op_type == "Mul" or role in {("BatchNormalization", 1), ("BatchNormalization", 4)}:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return rng.standard_normal(shape, np.float32) * np.float32(0.1)


def _scale_logits(proto: ModelProto) -> None:
    """Logits of unit variance: a softmax that picks one class for certain would hide what is wrong before it."""
    graph = proto.graph
    last = next(n for n in reversed(graph.node) if n.op_type in ("Gemm", "Conv"))
    shown = ModelProto()
    shown.CopyFrom(proto)
    del shown.graph.output[:]
    shown.graph.output.append(onnx.helper.make_tensor_value_info(last.output[0], onnx.TensorProto.FLOAT, None))
    (logits,) = Session(shown, "cpu").run({image(proto): images(1)})
    for tensor in graph.initializer:
        if tensor.name in last.input[1:]:
            scaled = numpy_helper.to_array(tensor) / np.float32(logits.std())
            tensor.CopyFrom(numpy_helper.from_array(scaled, tensor.name))


def image(proto: ModelProto) -> str:
    """The name of the one input that is no weight."""
    held = {t.name for t in proto.graph.initializer}
    (name,) = [v.name for v in proto.graph.input if v.name not in held]
    return name


def images(count: int) -> Array:
    """Random images, batched along axis 0: the networks take one at a time."""
    return np.random.default_rng(1).standard_normal((count, 3, 224, 224), np.float32)
