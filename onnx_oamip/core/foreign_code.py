"""Border to code of users and of other packages: whatever it raises is an error of that code, in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onnx_oamip.core.errors import OamipError

MOST = 300
"""Characters of a foreign message that are repeated."""


@contextmanager
def foreign_code(name: str, error: type[OamipError], advice: str) -> Iterator[None]:
    """Turn exceptions of the block into one of this package.

    ``sys.exit`` in foreign code does not end the program. Ctrl-C and errors of this package pass through.

    Args:
        name: The foreign code, as the subject of the sentence.
        error: Kind of error to raise.
        advice: What to do, as an imperative.

    Raises:
        OamipError: The block failed; of the given kind.
    """
    try:
        yield
    except OamipError:
        raise
    except (Exception, SystemExit, GeneratorExit) as cause:
        raise error(f"{name} raised {described(cause)}; {advice}.") from cause


def is_own(function: object) -> bool:
    """Test for a function of this package.

    Args:
        function: A function, or a lazy rule, of which the module that it imports counts.

    Returns:
        False for code of users and of other packages.
    """
    return str(getattr(function, "__module__", "")).startswith("onnx_oamip.")


def described(error: BaseException) -> str:
    """Describe an exception of foreign code in a part of a sentence.

    Args:
        error: The exception.

    Returns:
        Its type and its message, without line ends, full stop and excess length.
    """
    text = " ".join(str(error).split()).rstrip(".")
    if len(text) > MOST:
        text = f"{text[:MOST]} ..."
    kind = type(error).__name__
    return f"{kind}: {text}" if text else kind
