"""A BERT encoder as exporters write it out, in the layout that ONNX Runtime's transformer optimiser fuses."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

HEADS, SIZE, LENGTH, WIDE, VOCABULARY = 4, 8, 6, 48, 20
HIDDEN = HEADS * SIZE


class _Encoder:
    def __init__(self, seed: int) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self.rng = np.random.default_rng(seed)

    def node(self, op: str, inputs: list[str], name: str, **attrs: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [f"{name}_out"], name, **attrs))
        return f"{name}_out"

    def constant(self, name: str, value: object, dtype: type = np.float32) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def normal(self, name: str, *shape: int) -> str:
        return self.constant(name, self.rng.standard_normal(shape) / np.sqrt(shape[0]))

    def linear(self, x: str, name: str, before: int, after: int) -> str:
        product = self.node(
            "MatMul", [x, self.normal(f"{name}.weight", before, after)], f"{name}/MatMul"
        )
        return self.node("Add", [product, self.normal(f"{name}.bias", after)], f"{name}/Add")

    def norm(self, x: str, name: str) -> str:
        gain = self.constant(f"{name}.weight", self.rng.uniform(0.5, 1.5, HIDDEN))
        bias = self.normal(f"{name}.bias", HIDDEN)
        return self.node(
            "LayerNormalization",
            [x, gain, bias],
            f"{name}/LayerNormalization",
            axis=-1,
            epsilon=1e-5,
        )

    def attention(self, x: str, name: str, mask: str) -> str:
        apart = self.constant(f"{name}.apart", [0, 0, HEADS, SIZE], np.int64)
        parts = {}
        for part, turn in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
            flat = self.linear(x, f"{name}.{part}", HIDDEN, HIDDEN)
            split = self.node("Reshape", [flat, apart], f"{name}.{part}/Reshape")
            parts[part] = self.node("Transpose", [split], f"{name}.{part}/Transpose", perm=turn)
        scores = self.node("MatMul", [parts["query"], parts["key"]], f"{name}/scores")
        scaled = self.node(
            "Div", [scores, self.constant(f"{name}.scale", np.sqrt(SIZE))], f"{name}/Div"
        )
        masked = self.node("Add", [scaled, mask], f"{name}/mask")
        weights = self.node("Softmax", [masked], f"{name}/Softmax", axis=-1)
        mixed = self.node("MatMul", [weights, parts["value"]], f"{name}/context")
        turned = self.node("Transpose", [mixed], f"{name}/Transpose", perm=[0, 2, 1, 3])
        together = self.constant(f"{name}.together", [0, 0, HIDDEN], np.int64)
        return self.node("Reshape", [turned, together], f"{name}/Reshape")

    def gelu(self, x: str, name: str) -> str:
        shrunk = self.node("Div", [x, self.constant(f"{name}.root", np.sqrt(2.0))], f"{name}/Div")
        error = self.node("Erf", [shrunk], f"{name}/Erf")
        above = self.node("Add", [error, self.constant(f"{name}.one", 1.0)], f"{name}/Add")
        product = self.node("Mul", [x, above], f"{name}/Mul")
        return self.node("Mul", [product, self.constant(f"{name}.half", 0.5)], f"{name}/half")

    def layer(self, x: str, name: str, mask: str) -> str:
        mixed = self.linear(
            self.attention(x, f"{name}.attention", mask), f"{name}.output", HIDDEN, HIDDEN
        )
        x = self.norm(self.node("Add", [mixed, x], f"{name}/Add"), f"{name}.norm")
        wide = self.gelu(self.linear(x, f"{name}.wide", HIDDEN, WIDE), f"{name}.gelu")
        back = self.linear(wide, f"{name}.back", WIDE, HIDDEN)
        return self.norm(self.node("Add", [back, x], f"{name}/AddAfter"), f"{name}.norm2")


def bert(layers: int = 2, seed: int = 0) -> ModelProto:
    """Word and place embeddings, a mask, encoder layers with normalisation behind, a classifier of the first token."""
    made = _Encoder(seed)
    words = made.constant("words", made.rng.standard_normal((VOCABULARY, HIDDEN)))
    places = made.constant("places", made.rng.standard_normal((1, LENGTH, HIDDEN)))
    found = made.node("Gather", [words, "input_ids"], "embed/Gather")
    x = made.norm(made.node("Add", [found, places], "embed/Add"), "embed.norm")
    once = made.node(
        "Unsqueeze", ["attention_mask", made.constant("axis1", [1], np.int64)], "mask/Unsqueeze"
    )
    twice = made.node("Unsqueeze", [once, made.constant("axis2", [2], np.int64)], "mask/Unsqueeze2")
    real = made.node("Cast", [twice], "mask/Cast", to=TensorProto.FLOAT)
    left = made.node("Sub", [made.constant("one", 1.0), real], "mask/Sub")
    mask = made.node("Mul", [left, made.constant("low", -10000.0)], "mask/Mul")
    for i in range(layers):
        x = made.layer(x, f"layer{i}", mask)
    first = made.node("Gather", [x, made.constant("first", 0, np.int64)], "pool/Gather", axis=1)
    y = made.linear(first, "classifier", HIDDEN, 3)
    ids = [
        helper.make_tensor_value_info(n, TensorProto.INT64, ["N", LENGTH])
        for n in ("input_ids", "attention_mask")
    ]
    out = [helper.make_tensor_value_info(y, TensorProto.FLOAT, ["N", 3])]
    graph = helper.make_graph(made.nodes, "bert", ids, out, made.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
