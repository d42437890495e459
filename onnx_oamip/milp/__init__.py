"""Mixed-integer linear programs as sparse arrays: formulated here once, solved by any backend of ``solvers``."""

from .encoder import Encoder, Exact, Paper, Tighten
from .expression import Expression
from .loss import ACCEPTED, Incumbent, Loss, Reward, Separation, objective
from .program import Builder, Program, Rows

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
