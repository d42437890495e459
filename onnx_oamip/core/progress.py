"""Progress callback of long-running stages, and the steps of the commands."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the number of finished parts, and their total.

An object with a method ``begin(step, number, count)`` is also informed of every step that a run comes to, and one with
``show_point(document)`` of every model of a frontier.
"""
PREPARATION = ("load", "objective", "couple", "score", "sensitivity")
PRUNE = (*PREPARATION, "plan and refit", "verify", "write")
PLAN = (*PREPARATION, "plan", "write")
APPLY = ("load", "objective", "couple", "refit", "verify", "write")
RECOVER = ("load", "objective", "recover", "verify", "write")
INT8 = ("load", "quantise", "write")
FRONTIER = (*PREPARATION, "plan, refit and verify")
"""Steps in their order, by the names under which their seconds are reported."""
