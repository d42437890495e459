"""Mixed-integer linear programs as sparse arrays: formulated here once, solved by any backend of ``solvers``."""

from .program import Builder, Program, Rows

__all__ = ["Builder", "Program", "Rows"]
