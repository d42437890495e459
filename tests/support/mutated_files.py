"""Broken and hostile variants of models and data files, each a function of its number alone."""

from __future__ import annotations

import base64
import io
import struct
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from cases import CASES, unknown_here
from google.protobuf.descriptor import FieldDescriptor as Field
from onnx import AttributeProto, ModelProto, TensorProto, helper

EXPORTS = Path(__file__).resolve().parents[1] / "exports"
NUMBERS = (0, 1, -1, 2, 3, 7, 255, 65536, 2**31 - 1, 2**31, 10**12, 2**62, 2**63 - 1, -(2**63))
STRINGS = (
    "",
    " ",
    "a\nb",
    "\x1b[31mred\x1b[0m",
    "<script>alert(1)</script>",
    "n\x00ul",
    "\x85\u2028",
    "x" * 70_000,
    "../../../etc/passwd",
    "/etc/passwd",
    "-o",
    "%s%n{0}",
    "\u202eexe",
    "Conv",
    "If",
    "Loop",
    "Reshape",
    "float",
    "com.microsoft",
    "ai.onnx",
    "[bold]",
)
Rng = np.random.Generator
Model = tuple[bytes, dict[str, bytes | str]]
"""The file, and what lies beside it by name: bytes, or where a link points to."""


@cache
def sources() -> tuple[bytes, ...]:
    """The networks that are mutated: every small one of the cases, and real exports."""
    small = [c.make().SerializeToString() for c in CASES if not unknown_here(c)]
    real = [f.read_bytes() for f in sorted(EXPORTS.glob("*.onnx"))]
    return tuple(data for data in (*small, *real) if len(data) < 45_000)


def model(rng: Rng) -> Model:
    """One file: one to three mutations of one network, then perhaps of its bytes."""
    every = sources()
    proto = ModelProto.FromString(every[int(rng.integers(len(every)))])
    beside: dict[str, bytes | str] = {}
    if rng.random() < 0.85:
        for _ in range(1 + int(rng.random() < 0.25)):
            rule = _RULES[int(rng.integers(len(_RULES)))]
            rule(proto, rng, beside)
        return proto.SerializeToString(), beside
    return scrambled(proto.SerializeToString(), rng), beside


def scrambled(content: bytes, rng: Rng) -> bytes:
    """Flipped bits, pieces cut out, doubled, swapped or overwritten."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 9))):
        if not data:
            break
        at = int(rng.integers(len(data)))
        size = int(rng.integers(1, 17))
        kind = int(rng.integers(7))
        if kind < 3:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 3:
            del data[at : at + size]
        elif kind == 4:
            data[at:at] = data[at : at + size]
        elif kind == 5:
            data[at : at + size] = rng.bytes(size)
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


# ------------------------------------------------------------------------------------------------ any field at all


def _number(rng: Rng) -> int:
    return NUMBERS[int(rng.integers(len(NUMBERS)))]


def _string(rng: Rng) -> str:
    return STRINGS[int(rng.integers(len(STRINGS)))]


def _messages(message: Any) -> list[Any]:
    found = [message]
    for field, value in message.ListFields():
        if field.type == Field.TYPE_MESSAGE:
            for inner in value if _many(field) else [value]:
                found += _messages(inner)
    return found


def _many(field: Any) -> bool:
    repeated = getattr(field, "is_repeated", None)
    return bool(field.label == Field.LABEL_REPEATED) if repeated is None else bool(repeated)


def _value(field: Any, rng: Rng) -> Any:
    if field.type == Field.TYPE_STRING:
        return _string(rng)
    if field.type == Field.TYPE_BYTES:
        return rng.bytes(int(rng.integers(40))) if rng.random() < 0.7 else _string(rng).encode()
    if field.type in (Field.TYPE_FLOAT, Field.TYPE_DOUBLE):
        return float(rng.choice([0, -1, 1e30, np.inf, -np.inf, np.nan]))
    if field.type == Field.TYPE_ENUM:
        return int(rng.choice([v.number for v in field.enum_type.values]))
    number = _number(rng)
    if field.type == Field.TYPE_INT32:
        return int(np.clip(number, -(2**31), 2**31 - 1))
    return abs(number) if field.type == Field.TYPE_UINT64 else number


def _field(proto: ModelProto, rng: Rng, beside: dict[str, bytes | str]) -> None:
    """Delete, double, swap or set any field of any message."""
    every = _messages(proto)
    message = every[int(rng.integers(len(every)))]
    fields = message.ListFields()
    if not fields or rng.random() < 0.15:
        field = message.DESCRIPTOR.fields[int(rng.integers(len(message.DESCRIPTOR.fields)))]
        if field.type == Field.TYPE_MESSAGE:
            getattr(message, field.name).add() if _many(field) else getattr(
                message, field.name
            ).SetInParent()
        elif _many(field):
            getattr(message, field.name).append(_value(field, rng))
        else:
            setattr(message, field.name, _value(field, rng))
        return
    field, value = fields[int(rng.integers(len(fields)))]
    kind = int(rng.integers(4))
    if not _many(field):
        if field.type == Field.TYPE_MESSAGE or kind == 0:
            message.ClearField(field.name)
        else:
            setattr(message, field.name, _value(field, rng))
        return
    at, other = (int(rng.integers(len(value))) for _ in range(2))
    if kind == 0:
        del value[at]
    elif field.type == Field.TYPE_MESSAGE:
        copy = type(value[at]).FromString(value[at].SerializeToString())
        if kind == 1:
            value.append(copy)
        else:
            value[at].CopyFrom(value[other])
            value[other].CopyFrom(copy)
    elif kind == 1:
        value.append(value[at])
    elif kind == 2:
        value[at], value[other] = value[other], value[at]
    else:
        value[at] = _value(field, rng)


# ------------------------------------------------------------------------------------------------ chosen mischief


def _graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    found = [graph]
    for node in graph.node:
        for a in node.attribute:
            for body in [a.g] if a.type == AttributeProto.GRAPH else a.graphs:
                found += _graphs(body)
    return found


def _some(values: Any, rng: Rng) -> Any:
    listed = list(values)
    return listed[int(rng.integers(len(listed)))] if listed else None


def _tensor(proto: ModelProto, rng: Rng) -> TensorProto:
    found = _some((t for g in _graphs(proto.graph) for t in g.initializer), rng)
    return proto.graph.initializer.add() if found is None else found


def _node(proto: ModelProto, rng: Rng) -> onnx.NodeProto:
    found = _some((n for g in _graphs(proto.graph) for n in g.node), rng)
    return proto.graph.node.add() if found is None else found


def _cycle(proto: ModelProto, rng: Rng, beside: dict[str, bytes | str]) -> None:
    node, later = _node(proto, rng), _node(proto, rng)
    if node.input and later.output:
        node.input[int(rng.integers(len(node.input)))] = later.output[0]


def _same_names(proto: ModelProto, rng: Rng, beside: dict[str, bytes | str]) -> None:
    a, b = _node(proto, rng), _node(proto, rng)
    if rng.random() < 0.5:
        a.name = b.name
    elif a.output and b.output:
        a.output[0] = b.output[0]


def _no_initializer(proto: ModelProto, rng: Rng, beside: dict[str, bytes | str]) -> None:
    if proto.graph.initializer:
        del proto.graph.initializer[int(rng.integers(len(proto.graph.initializer)))]


def _shape(proto: ModelProto, rng: Rng, beside: dict[str, bytes | str]) -> None:
    """Other dimensions of a weight; often with the payload that they ask for."""
    tensor = _tensor(proto, rng)
    dims = list(tensor.dims)
    kind = int(rng.integers(5))
    if kind == 0 or not dims:
        dims.insert(int(rng.integers(len(dims) + 1)), _number(rng))
    elif kind == 1:
        del dims[int(rng.integers(len(dims)))]
    elif kind == 2:
        dims.reverse()
    else:
        dims[int(rng.integers(len(dims)))] = _number(rng) if kind == 3 else int(rng.integers(0, 9))
    del tensor.dims[:]
    tensor.dims.extend(dims)
    count = int(np.prod([float(d) for d in dims]))
    if (
        rng.random() < 0.7
        and 0 <= count < 20_000
        and tensor.data_type in (1, 7)
        and not min(dims, default=0) < 0
    ):
        values = (
            rng.standard_normal(count).astype(np.float32)
            if tensor.data_type == 1
            else np.ones(count, np.int64)
        )
        for name in ("float_data", "int64_data", "raw_data"):
            tensor.ClearField(name)
        tensor.raw_data = values.tobytes()


def _dtype(proto: ModelProto, rng: Rng, beside: dict[str, bytes | str]) -> None:
    kinds = [0, 2, 3, 5, 6, 7, 8, 9, 10, 11, 14, 16, 17, 21, 22, 23, 25, 99, -1]
    _tensor(proto, rng).data_type = int(rng.choice(kinds))


def _payload(proto: ModelProto, rng: Rng, beside: dict[str, bytes | str]) -> None:
    tensor = _tensor(proto, rng)
    tensor.raw_data = tensor.raw_data[: int(rng.integers(len(tensor.raw_data) + 1))] + rng.bytes(
        int(rng.integers(9))
    )


def _values(proto: ModelProto, rng: Rng, beside: dict[str, bytes | str]) -> None:
    """Other integers in a tensor that is read as a shape, an axis or an index."""
    found = _some((t for t in proto.graph.initializer if t.data_type == TensorProto.INT64), rng)
    if found is not None:
        values = (
            onnx.numpy_helper.to_array(found).copy().reshape(-1)
            if _readable(found)
            else np.zeros(0)
        )
        if values.size:
            values[int(rng.integers(values.size))] = _number(rng)
            found.ClearField("int64_data")
            found.raw_data = values.tobytes()


def _readable(tensor: TensorProto) -> bool:
    try:
        onnx.numpy_helper.to_array(tensor)
    except Exception:
        return False
    return True


def _outside(proto: ModelProto, rng: Rng, beside: dict[str, bytes | str]) -> None:
    """Weights in files: elsewhere, missing, behind a link, too short, at a place that is none."""
    tensor = _tensor(proto, rng)
    where = str(
        rng.choice(
            [
                "../secret.bin",
                "/etc/passwd",
                "w.bin",
                "link.bin",
                "",
                ".",
                "..",
                "missing.bin",
                "sub/../w.bin",
                "w.bin\x00",
                "/dev/zero",
                "\n",
                "model.onnx",
                "memory",
            ]
        )
    )
    beside["w.bin"] = bytes(4096)
    beside["link.bin"] = str(
        rng.choice(["../secret.bin", "/etc/passwd", "w.bin", "link.bin", "/dev/zero"])
    )
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=where)
    for key in ("offset", "length"):
        if rng.random() < 0.5:
            said = (
                str(_number(rng))
                if rng.random() < 0.8
                else str(rng.choice(["", "x", "1e9", " 7", "9" * 5000, "٣"]))
            )
            tensor.external_data.add(key=key, value=said)
    if rng.random() < 0.3:
        sparse = proto.graph.sparse_initializer.add()
        sparse.values.CopyFrom(tensor)
        sparse.indices.data_type = TensorProto.INT64
        sparse.dims.append(8)
    if rng.random() < 0.3:
        node = _node(proto, rng)
        node.op_type, node.domain = "Constant", ""
        del node.input[:], node.attribute[:]
        node.attribute.append(helper.make_attribute("value", tensor))


def _sparse(proto: ModelProto, rng: Rng, beside: dict[str, bytes | str]) -> None:
    """A weight stored sparsely, with places that are none."""
    tensor = _tensor(proto, rng)
    sparse = proto.graph.sparse_initializer.add()
    sparse.dims.extend(tensor.dims if rng.random() < 0.5 else [_number(rng) for _ in range(2)])
    count = int(rng.integers(0, 4))
    places = [_number(rng) if rng.random() < 0.5 else int(rng.integers(4)) for _ in range(count)]
    sparse.values.CopyFrom(
        helper.make_tensor(tensor.name, TensorProto.FLOAT, [count], [1.0] * count)
    )
    sparse.indices.CopyFrom(helper.make_tensor("", TensorProto.INT64, [count], places))
    if rng.random() < 0.7 and tensor in proto.graph.initializer:
        proto.graph.initializer.remove(tensor)


def _functions(proto: ModelProto, rng: Rng, beside: dict[str, bytes | str]) -> None:
    """Functions that call themselves, each other, or each other twice, and so on."""
    depth, wide = int(rng.integers(1, 40)), int(rng.integers(1, 6))
    closed = rng.random() < 0.5
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    for i in range(depth):
        last = i == depth - 1
        called = "f0" if last and closed else f"f{i + 1}"
        nodes = [
            helper.make_node(
                "Relu" if last and not closed else called,
                ["x" if j == 0 else f"t{j - 1}"],
                [f"t{j}"],
                domain="" if last and not closed else "f",
            )
            for j in range(wide)
        ]
        nodes.append(helper.make_node("Identity", [f"t{wide - 1}"], ["y"]))
        proto.functions.append(helper.make_function("f", f"f{i}", ["x"], ["y"], nodes, opsets))
    proto.opset_import.append(helper.make_opsetid("f", 1))
    proto.ir_version = max(proto.ir_version, 8)
    node = _node(proto, rng)
    node.op_type, node.domain = "f0", "f"
    del node.attribute[:], node.input[1:]


def _nested(proto: ModelProto, rng: Rng, beside: dict[str, bytes | str]) -> None:
    """Bodies in bodies."""
    if not proto.graph.node or not proto.graph.node[0].output:
        return
    made = proto.graph.node[0].output[0]
    proto.graph.initializer.append(helper.make_tensor("oamip_on", TensorProto.BOOL, [], [True]))
    body = helper.make_graph(
        [helper.make_node("Identity", [made], ["inner"])],
        "b",
        [],
        [helper.make_tensor_value_info("inner", 1, None)],
    )
    op = str(rng.choice(["If", "Loop", "Scan"]))
    for i in range(int(rng.integers(1, 30))):
        if op == "If":
            other = body if i < 3 else None
            node = helper.make_node(
                "If", ["oamip_on"], [f"o{i}"], then_branch=body, else_branch=other
            )
        else:
            node = helper.make_node(
                op, [made] if op == "Scan" else ["", "oamip_on"], [f"o{i}"], body=body
            )
        body = helper.make_graph(
            [node], f"b{i}", [], [helper.make_tensor_value_info(f"o{i}", 1, None)]
        )
    proto.graph.node.extend(body.node)


def _body(proto: ModelProto, rng: Rng, beside: dict[str, bytes | str]) -> None:
    """A body without an input, output or node that it had."""
    inner = _some(_graphs(proto.graph)[1:], rng)
    if inner is None:
        _field(proto, rng, beside)
        return
    listed = _some((inner.input, inner.output, inner.node), rng)
    if len(listed):
        del listed[int(rng.integers(len(listed)))]


def _renamed(proto: ModelProto, rng: Rng, beside: dict[str, bytes | str]) -> None:
    """A name that is all right to ONNX and odd to look at, everywhere it stands."""
    node = _node(proto, rng)
    old = _some([*node.input, *node.output, node.name], rng)
    new = _string(rng) + str(int(rng.integers(3)))
    for message in _messages(proto):
        for field, value in message.ListFields():
            if field.type != Field.TYPE_STRING:
                continue
            if _many(field):
                for i, text in enumerate(value):
                    if text == old:
                        value[i] = new
            elif value == old:
                setattr(message, field.name, new)


def _versions(proto: ModelProto, rng: Rng, beside: dict[str, bytes | str]) -> None:
    kind = int(rng.integers(4))
    if kind == 0:
        proto.ir_version = _number(rng)
    elif kind == 1 and proto.opset_import:
        _some(proto.opset_import, rng).version = (
            _number(rng) if rng.random() < 0.3 else int(rng.integers(1, 30))
        )
    elif kind == 2:
        proto.opset_import.append(helper.make_opsetid(_string(rng), 1))
    else:
        _node(proto, rng).domain = str(
            rng.choice(["unknown", "com.microsoft", "ai.onnx.ml", "", "\n"])
        )


def _attribute(proto: ModelProto, rng: Rng, beside: dict[str, bytes | str]) -> None:
    """An attribute of another type, of another value, or of another operator."""
    node = _node(proto, rng)
    found = _some(node.attribute, rng)
    if found is None or rng.random() < 0.2:
        name = str(
            rng.choice(
                [
                    "axis",
                    "perm",
                    "axes",
                    "group",
                    "pads",
                    "strides",
                    "value",
                    "to",
                    "body",
                    "epsilon",
                ]
            )
        )
        found = node.attribute.add(name=name)
    name = found.name
    if rng.random() < 0.15:
        found.type = int(rng.integers(0, 15))
        return
    value = _some(
        [
            _number(rng),
            0.5,
            _string(rng),
            [_number(rng)] * int(rng.integers(1, 5)),
            [0.5],
            ["a"],
            helper.make_tensor("", 1, [1], [1.0]),
            [int(x) for x in rng.integers(-2, 5, int(rng.integers(1, 5)))],
        ],
        rng,
    )
    if not name:
        return
    found.CopyFrom(helper.make_attribute(name, value))


def _operator(proto: ModelProto, rng: Rng, beside: dict[str, bytes | str]) -> None:
    """The operator, inputs or attributes of another node."""
    node, other = _node(proto, rng), _node(proto, rng)
    kind = int(rng.integers(4))
    if kind == 0:
        node.op_type = other.op_type or "Conv"
    elif kind == 1:
        node.op_type = str(
            rng.choice(
                [
                    "Conv",
                    "MatMul",
                    "Gemm",
                    "Reshape",
                    "Concat",
                    "Split",
                    "Gather",
                    "LSTM",
                    "Einsum",
                    "BatchNormalization",
                    "Transpose",
                    "Expand",
                    "Tile",
                    "ConstantOfShape",
                    "Range",
                    "Resize",
                    "Nope",
                ]
            )
        )
    elif kind == 2 and node.input and other.output:
        node.input[int(rng.integers(len(node.input)))] = _some([*other.input, *other.output], rng)
    else:
        del node.input[int(rng.integers(len(node.input) + 1)) :]


def _huge(proto: ModelProto, rng: Rng, beside: dict[str, bytes | str]) -> None:
    """Few bytes that ask for much memory."""
    if not proto.graph.node:
        return
    size = [10**6, 10**4, 10**3] if rng.random() < 0.5 else [2**40]
    op = str(
        rng.choice(
            ["ConstantOfShape", "Expand", "Tile", "Range", "Pad", "input", "OneHot", "Resize"]
        )
    )
    if op == "input":
        value = _some(proto.graph.input, rng)
        if value is not None and value.type.tensor_type.shape.dim:
            _some(value.type.tensor_type.shape.dim, rng).dim_value = _number(rng)
        return
    constants = {
        "oamip_shape": size,
        "oamip_one": [1] * len(size),
        "oamip_pads": [0] * len(size) + size,
    }
    for name, values in constants.items():
        proto.graph.initializer.append(
            helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        )
    for name, number in (("oamip_0", 0), ("oamip_end", 10**13), ("oamip_step", 1)):
        proto.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [], [number]))
    listed = [[0.0, 1.0], [1.0], [1e9]]
    proto.graph.initializer.append(
        helper.make_tensor("oamip_pair", TensorProto.FLOAT, [2], listed[0])
    )
    proto.graph.initializer.append(
        helper.make_tensor("oamip_big", TensorProto.FLOAT, [2], [1e5, 1e5])
    )
    proto.graph.initializer.append(
        helper.make_tensor("oamip_square", TensorProto.FLOAT, [1, 1], [1.0])
    )
    inputs = {
        "ConstantOfShape": ["oamip_shape"],
        "Expand": ["oamip_one", "oamip_shape"],
        "Tile": ["oamip_square" if len(size) > 1 else "oamip_one", "oamip_shape"],
        "Range": ["oamip_0", "oamip_end", "oamip_step"],
        "Pad": ["oamip_one", "oamip_pads"],
        "OneHot": ["oamip_one", "oamip_end", "oamip_pair"],
        "Resize": ["oamip_square", "", "oamip_big"],
    }[op]
    made = helper.make_node(op, inputs, ["oamip_huge"])
    rest = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([made, helper.make_node("Size", ["oamip_huge"], ["oamip_size"]), *rest])
    target = _some(proto.graph.node[2:], rng)
    if target is not None and target.input and rng.random() < 0.6:
        target.input[int(rng.integers(len(target.input)))] = str(
            rng.choice(["oamip_huge", "oamip_size"])
        )
    elif rng.random() < 0.5:
        proto.graph.output.append(helper.make_tensor_value_info("oamip_huge", 1, None))


_RULES: tuple[Callable[[ModelProto, Rng, dict[str, bytes | str]], None], ...] = (
    _field,
    _field,
    _field,
    _field,
    _cycle,
    _same_names,
    _no_initializer,
    _shape,
    _shape,
    _dtype,
    _payload,
    _values,
    _values,
    _outside,
    _sparse,
    _functions,
    _nested,
    _body,
    _renamed,
    _versions,
    _attribute,
    _attribute,
    _operator,
    _operator,
    _huge,
)


# ------------------------------------------------------------------------------------------------------------ data


DATA_MODEL = "(float[N,3,4,4] x) => (float[] y) <float[6,3,3,3] w, float[2,24] v> { a = Conv(x, w)  f = Flatten(a)  y = Gemm<transB=1>(f, v) }"  # noqa: E501
KINDS = (".npz", ".npz", ".npz", ".npy", ".npy", ".parquet", "images")
ZEROS = base64.b85decode(
    b"P(e~L6$BLs6&g$x0u=xf001bpFa00{ApigX0000L02MkFOe__EfPjDm6%Z8$6$Tst001bpFa01L=>Px-"
    b"00003{_y|*{{sOA0001hfPjDm0|9`5fPe%56$BYfH2@d}b7N>_ZDADx05t*_0eBSx6$VT^0000r1Q-"
    b"NtX>)WH0ss{PB?1@+Wo%__Wo~pO9!#tg2oV4P02Trn92p!Y02~zp88rX~5E(cDcm!-|b94t~Y-"
    b"Md_Zgdq47Jz_&fCLtd0T!?UCO#$zDJ&HP6#x|i02Kfg5ETLdJSipu{{R2~0~tmD004l1fPe%5000(@0Tu!#2o|sb04N}EVRCVGWp"
    b"piLaBwYQa&m8XAa-SPb7^mGATl;CFfK6}92@`u0L=gZ08l|vF#"
)
"""A Parquet file with one row in its column ``x``, a list of 2^29 zeros."""


def data(rng: Rng) -> tuple[str, dict[str, bytes | str]]:
    """(name of the file or folder, by path contents or where a link points to) of one broken or odd source."""
    kind = KINDS[int(rng.integers(len(KINDS)))]
    if kind == "images":
        folder = str(rng.choice(["images", "images/a", "images/b"]))
        pictures: dict[str, bytes | str] = {
            f"{folder}/{i}.png": _image(rng) for i in range(int(rng.integers(1, 4)))
        }
        if rng.random() < 0.2:
            pictures["images/link.png"] = str(
                rng.choice(
                    [
                        "0.png",
                        "link.png",
                        "/etc/hostname",
                        "/dev/zero",
                        "..",
                        "missing",
                        "../model.onnx",
                    ]
                )
            )
        return "images", pictures
    content = {".npz": _npz, ".npy": lambda r: npy(_array(r), r), ".parquet": _parquet}[kind](rng)
    return f"data{kind}", {
        f"data{kind}": scrambled(content, rng) if rng.random() < 0.3 else content
    }


def _array(rng: Rng) -> Any:
    good = rng.standard_normal((6, 3, 4, 4)).astype(np.float32)
    kind = int(rng.integers(18))
    if kind == 0:
        good.reshape(-1)[int(rng.integers(good.size))] = rng.choice([np.nan, np.inf, -np.inf])
    rows = np.zeros(6, [("a", "f4"), ("b", "i8")])
    odd: dict[int, Any] = {
        1: np.asarray([object(), "a"], object),
        2: rows,
        3: good.astype(">f4"),
        4: np.asfortranarray(good),
        5: good[:0],
        6: good[:1],
        7: np.repeat(good[:1], 6, axis=0),
        8: np.ones_like(good),
        9: np.asarray(["a", "b"]),
        10: np.asarray(3.0),
        11: good.astype(np.complex64),
        12: np.asarray(["2020-01-01"], "M8[D]"),
        13: np.zeros((0, 3, 4, 4), np.float32),
        14: good.transpose(0, 2, 3, 1),
        15: good.astype(np.float64),
    }
    return odd.get(kind, good)


def npy(array: Any, rng: Rng | None = None) -> bytes:
    """A .npy file; with ``rng`` its header may lie."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array), allow_pickle=True)
    content = stream.getvalue()
    if rng is None or rng.random() < 0.6:
        return content
    header = str(
        rng.choice(
            [
                "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }",
                "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3, 4, 4), }",
                "{'descr': '<f4', 'fortran_order': True, 'shape': (99999, 99999, 99999, 99999), }",
                "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
                "{'descr': '|V0', 'fortran_order': False, 'shape': (9223372036854775807,), }",
                "{'descr': [('a', '<f4', (1000000,))], 'fortran_order': False, 'shape': (100000,), }",
                "{'descr': '<f4', 'shape': (3,), }",
                "__import__('os').system('touch owned')",
                "[" * 5000,
                "{" * 200,
                "{'descr': __import__('os'), 'fortran_order': False, 'shape': (3,), }",
                "{'descr': '<f4', 'fortran_order': 1, ",
                "{'descr': '" + "<f4," * 3000 + "<f4', 'fortran_order': False, 'shape': (1,), }",
                "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 3, 4, 4), }",
            ]
        )
    )
    return said(header)


def said(header: str, body: bytes = bytes(512)) -> bytes:
    """A .npy file with any header."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text + body


def _npz(rng: Rng) -> bytes:
    stream = io.BytesIO()
    names = ["x"]
    for name, share in (
        ("labels", 0.5),
        ("x.scale", 0.15),
        ("x.offset", 0.15),
        ("eval.x", 0.2),
        ("eval.labels", 0.1),
    ):
        if rng.random() < share:
            names.append(name)
    if rng.random() < 0.2:
        names.append(_string(rng)[:60])
    if rng.random() < 0.1:
        names.append("../../escaped")
    with zipfile.ZipFile(
        stream, "w", int(rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    ) as file:
        for name in names:
            if name.endswith("labels"):
                labels = _some(
                    [
                        np.arange(6) % 2,
                        np.arange(6) * 1000,
                        -np.arange(6),
                        np.zeros((6, 2), int),
                        np.ones(6),
                        np.asarray(1),
                        np.asarray(["a"] * 6),
                        np.full(6, 2**63, np.uint64),
                    ],
                    rng,
                )
                content = npy(labels)
            else:
                content = npy(_array(rng), rng)
            if rng.random() < 0.05:
                content = bytes(int(rng.integers(100)))
            elif rng.random() < 0.05:
                content = said(
                    "{'descr': '|u1', 'fortran_order': False, 'shape': (50000000,), }",
                    bytes(50_000_000),
                )
            file.writestr(f"{name}.npy", content)
    return stream.getvalue()


def _parquet(rng: Rng) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if rng.random() < 0.1:
        bomb = _some([ZEROS, repeated_text()], rng)
        return _lying(bomb, rng) if rng.random() < 0.5 else bomb
    picture = _picture("PNG", "RGB", (4, 4))
    columns: list[Any] = [
        [[0.5] * 48] * 6,
        [[0.5] * 47] * 6,
        [[0.5]] * 5 + [[1.0, 2.0]],
        [None] * 6,
        ["a"] * 6,
        [1.0] * 6,
        [b"\x89PNG\r\n\x1a\n" + rng.bytes(20)] * 6,
        [{"bytes": b"x", "path": None}] * 6,
        [{"other": 1}] * 6,
        [[[float("nan")] * 48]] * 6,
        [[]] * 6,
        [[None] * 48] * 6,
        [picture] * 6,
        [{"bytes": picture, "path": "a"}] * 6,
        [_image(rng) for _ in range(6)],
        [[[[0.5] * 4] * 4] * 3] * 6,
        [{"bytes": None, "path": None}] * 6,
        [None] * 6,
        [[{"a": [1]}]] * 6,
        [b""] * 6,
        [[0.5] * 48] * 3000,
        pa.array([[("a", 1)]] * 6, _map()),
        pa.array([1] * 6).cast(pa.decimal128(30)),
        pa.array([0] * 6).cast(pa.timestamp("ns")),
        _deep(rng),
    ]
    table: dict[str, Any] = {"x": _some(columns, rng)}
    count = len(table["x"])
    if rng.random() < 0.5:
        cells = _some([[0, 1], ["a"], [None], [-1], [10**9], [[1]], [2**62], [0.5], [True]], rng)
        table["label"] = (cells * count)[:count]
    for name in ("labels", "x.y", "X", "\x1b", "a\nb"):
        if rng.random() < 0.05:
            table[name] = [1] * count
    stream = io.BytesIO()
    pq.write_table(
        pa.table(table),
        stream,
        row_group_size=int(rng.choice([1, 2, 5, 10_000])),
        compression=str(rng.choice(["none", "snappy", "gzip", "zstd"])),
        use_dictionary=bool(rng.random() < 0.7),
        data_page_version=str(rng.choice(["1.0", "2.0"])),
        data_page_size=int(rng.choice([1, 1 << 20])),
    )
    return stream.getvalue()


@cache
def repeated_text() -> bytes:
    """A text of 64 MiB in each of a thousand rows, in few bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.array([bytes(1 << 26)], pa.binary())
    stream = io.BytesIO()
    pq.write_table(
        pa.table({"x": pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), text)}),
        stream,
        compression="zstd",
        store_schema=False,
        write_statistics=False,
    )
    return stream.getvalue()


def _map() -> Any:
    import pyarrow as pa

    return pa.map_(pa.string(), pa.int32())


def _deep(rng: Rng) -> Any:
    """Lists in lists."""
    import pyarrow as pa

    value = pa.array([1.0] * 6)
    for _ in range(int(rng.integers(1, 60))):
        value = pa.ListArray.from_arrays(pa.array(range(7), pa.int32()), value)
    return value


def understated(content: bytes) -> bytes:
    """``ZEROS`` with a footer that says it holds one value."""
    start = len(content) - 8 - struct.unpack("<I", content[-8:-4])[0]
    number = b"\x80\x80\x80\x80\x04"  # 2^29, as Thrift has it
    assert number in content[start:]
    return content[:start] + content[start:].replace(number, b"\x82\x80\x80\x80\x00", 1)


def _lying(content: bytes, rng: Rng) -> bytes:
    """Another number somewhere in what a Parquet file says of itself."""
    data = bytearray(content)
    start = len(data) - 8 - struct.unpack("<I", data[-8:-4])[0]
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(start if rng.random() < 0.7 else 4, len(data) - 8))
        data[at] = data[at] & 128 | int(rng.integers(128))
    return bytes(data)


def _picture(form: str, mode: str, size: tuple[int, int]) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new(mode, size).save(stream, form)
    return stream.getvalue()


def _image(rng: Rng) -> bytes:
    kind = float(rng.random())
    if kind < 0.1:  # a PNG that says it is huge
        content = b"\x89PNG\r\n\x1a\n" + _chunk(
            b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
        )
        return content + _chunk(b"IDAT", b"x") + _chunk(b"IEND", b"")
    if kind < 0.2:  # one that is: few bytes of one colour
        side = int(rng.choice([3000, 9000, 13000]))
        return _picture("PNG", str(rng.choice(["1", "L"])), (side, side))
    form = str(rng.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]))
    modes = {
        "JPEG": ["RGB", "L", "CMYK"],
        "PPM": ["RGB", "L", "1"],
        "WEBP": ["RGB", "RGBA"],
        "GIF": ["P", "L"],
        "BMP": ["RGB", "L", "P"],
        "TIFF": ["RGB", "L", "F", "I;16", "CMYK", "LAB"],
    }
    mode = str(rng.choice(modes.get(form, ["RGB", "L", "1", "P", "RGBA", "LA", "I;16"])))
    content = _picture(form, mode, _some([(4, 4), (1, 1), (300, 2)], rng))
    if kind < 0.3:
        return content[: int(rng.integers(len(content) + 1))]
    return scrambled(content, rng) if kind < 0.6 else content


def _chunk(kind: bytes, body: bytes) -> bytes:
    import zlib

    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
