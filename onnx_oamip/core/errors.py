"""Errors that are raised on purpose. Every message is one sentence that a user can act on.

The message states the finding, its place, the expectation and a way out. It names parameters in backticks, with the
value where that matters, such as `data` and `refit=bias`; the command line shows them as its options. ``exit_code`` is
the process status of the command line: 2 for bad input or environment, 1 for a budget or a verification gate that was
not met.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from onnx_oamip.core.printable import visible

MOST = 1500
"""Longest message in characters; the middle of a longer one is left out."""


class OamipError(Exception):
    """Base class of all errors that this package raises on purpose."""

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        """Create the error.

        Args:
            message: One sentence; names in it may hold line ends and control characters, which are escaped.
        """
        if len(message) > MOST:
            message = f"{message[: MOST * 2 // 3]} ... {message[-(MOST // 3) :]}"
        super().__init__(visible(message))


class ModelError(OamipError, ValueError):
    """The model file cannot be read, is not valid ONNX, or cannot be handled."""


class DataError(OamipError, ValueError):
    """The calibration or evaluation data does not fit the model."""


class SettingsError(OamipError, ValueError):
    """A setting is out of range or contradicts another one."""


class EnvironmentMissing(OamipError, RuntimeError):
    """A requested package, device or licence is not available."""


class SolverError(OamipError, RuntimeError):
    """A solver is missing, refuses the program's size, or failed."""


class OutOfMemory(OamipError, MemoryError):
    """A piece of work does not fit in memory."""


@contextmanager
def memory_for(
    what: str, advice: str = "give a smaller `max_memory`, `workers=1` or fewer samples"
) -> Iterator[None]:
    """Turn a MemoryError of the block into one sentence.

    Args:
        what: Piece of work that the block does.
        advice: Ways to need less memory.

    Raises:
        OutOfMemory: Memory ran out.
    """
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory(f"there is not enough memory for {what}; {advice}.") from error


class OutputError(OamipError, OSError):
    """The result cannot be written to the requested path."""


class BudgetNotMet(OamipError, RuntimeError):
    """No plan meets the budget; the message names the groups that bind."""

    exit_code = 1


class GateFailed(OamipError, RuntimeError):
    """The pruned model failed a verification gate and was not written."""

    exit_code = 1


class RuleFailed(Exception):
    """A rule of an operator failed on a node: ``RuleFailed(node, reason)``.

    Not an OamipError: either the rule is wrong, or the node does not fit its operator. Running the model decides which
    (``verification.equivalence``).
    """

    def __str__(self) -> str:
        node, reason = self.args
        return f"the rule of {node} failed: {reason}"
