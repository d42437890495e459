"""Earlier names of parameters, which callers may still use as keywords."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def earlier_names(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Accept earlier names of parameters as keywords.

    Args:
        **names: Present name by earlier name.

    Returns:
        A decorator.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for earlier, present in names.items():
                if earlier in kwargs and present not in kwargs:
                    kwargs[present] = kwargs.pop(earlier)
            return function(*args, **kwargs)

        return call

    return decorate
