"""Operators of ``ai.onnx.ml`` that come before a network in an exported pipeline: they keep the shape of a table.

Reference: ONNX-ML operator specification. Labels and the operators that pick them are not followed; nothing reads them.
"""

from __future__ import annotations

from onnx_oamip.core.records import Node
from onnx_oamip.graph.ops.handles import Cuts, Labels
from onnx_oamip.graph.ops.spec import Edit, EditRules, LikeInput, OpSpec

DOMAIN = "ai.onnx.ml"
LISTS = ("offset", "scale", "imputed_value_floats", "imputed_value_int64s")
"""Attributes that hold one number for every column, or one for all."""


def _columns(node: Node, labels: Labels) -> None:
    labels.set(node.outputs[0], labels.axes(node.inputs[0]))


def _columns_repair(node: Node, cuts: Cuts) -> Edit:
    name = node.inputs[0]
    keep = cuts.keep(name, len(cuts.shape(name)) - 1)
    if keep is None:
        return Edit()
    held = {a: node.attrs[a] for a in LISTS if len(node.attrs.get(a, ())) > 1}
    return Edit(
        {a: [v for v, k in zip(values, keep, strict=True) if k] for a, values in held.items()}
    )


def _rows(node: Node, labels: Labels) -> None:
    axes = labels.axes(node.inputs[0])
    labels.pin(axes[-1], f"{node} normalises over this axis")
    labels.set(node.outputs[0], axes)


SPECS = (
    OpSpec(
        "Scaler",
        _columns,
        DOMAIN,
        edit=EditRules(_columns_repair),
        shape=LikeInput(floats=True),
    ),
    OpSpec("Imputer", _columns, DOMAIN, edit=EditRules(_columns_repair), shape=LikeInput()),
    OpSpec("Normalizer", _rows, DOMAIN, shape=LikeInput(floats=True)),
)
