"""Mixed-integer linear programs as sparse arrays: formulated here once, solved by any backend of ``solvers``."""

from onnx_oamip.programs.encoder import (
    Encoder,
    Exact,
    Paper,
    Tighten,
)
from onnx_oamip.programs.expression import Expression
from onnx_oamip.programs.loss import (
    ACCEPTED,
    Incumbent,
    Loss,
    Reward,
    Separation,
    objective,
)
from onnx_oamip.programs.program import Builder, Program, Rows

__all__ = [
    "ACCEPTED",
    "Builder",
    "Encoder",
    "Exact",
    "Expression",
    "Incumbent",
    "Loss",
    "Paper",
    "Program",
    "Reward",
    "Rows",
    "Separation",
    "Tighten",
    "objective",
]
