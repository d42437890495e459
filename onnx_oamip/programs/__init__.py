"""Mixed-integer linear programs as sparse arrays, formulated here once and solved by any backend of ``solvers``."""

from onnx_oamip.programs.encoder import Encoder, Tighten
from onnx_oamip.programs.exact_encoder import Exact
from onnx_oamip.programs.expression import Expression, Interval
from onnx_oamip.programs.loss import (
    ACCEPTED,
    CostBudget,
    Head,
    Incumbent,
    Loss,
    ScoredLayer,
    Separation,
    Sparsity,
    objective,
)
from onnx_oamip.programs.paper_encoder import Paper
from onnx_oamip.programs.program import Builder, Program, Rows

__all__ = [
    "ACCEPTED",
    "Builder",
    "CostBudget",
    "Encoder",
    "Exact",
    "Expression",
    "Head",
    "Incumbent",
    "Interval",
    "Loss",
    "Paper",
    "Program",
    "Rows",
    "ScoredLayer",
    "Separation",
    "Sparsity",
    "Tighten",
    "objective",
]
