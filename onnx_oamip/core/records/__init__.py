"""The frozen records that flow through the stages, one way.

``Model -> Coupling -> Statistics -> Scores -> Plan -> Pruned -> Verification -> Report``

Tensors are identified by name, units by their index in ``Coupling`` (``0 .. n_units - 1``). Arrays inside records are
to be treated as read-only.
"""

from __future__ import annotations

from onnx_oamip.core.records.graph import (
    Array,
    Axis,
    Body,
    Bools,
    Consumer,
    Coupling,
    Floats,
    Group,
    Interface,
    Ints,
    Model,
    Node,
    Pinned,
    Port,
    Reading,
    within,
)
from onnx_oamip.core.records.objective import Measure, Objective, Scale, Term
from onnx_oamip.core.records.results import (
    Budget,
    Connections,
    ContactSheet,
    Cost,
    Fit,
    Frontier,
    LayerConnections,
    MetricValues,
    Plan,
    Point,
    Pruned,
    Report,
    Round,
    Trial,
    Uncounted,
    Verification,
)
from onnx_oamip.core.records.statistics import (
    ClassHead,
    Gram,
    Images,
    Moments,
    Request,
    Scores,
    Sensitivity,
    Statistics,
)

__all__ = [
    "Array",
    "Axis",
    "Body",
    "Bools",
    "Budget",
    "ClassHead",
    "Connections",
    "Consumer",
    "ContactSheet",
    "Cost",
    "Coupling",
    "Fit",
    "Floats",
    "Frontier",
    "Gram",
    "Group",
    "Images",
    "Interface",
    "Ints",
    "LayerConnections",
    "Measure",
    "MetricValues",
    "Model",
    "Moments",
    "Node",
    "Objective",
    "Pinned",
    "Plan",
    "Point",
    "Port",
    "Pruned",
    "Reading",
    "Report",
    "Request",
    "Round",
    "Scale",
    "Scores",
    "Sensitivity",
    "Statistics",
    "Term",
    "Trial",
    "Uncounted",
    "Verification",
    "within",
]
