"""Registry of limit methods, which bound the share of every group that a plan may remove.

No limit method is built in. A package provides one by an entry point of the group ``onnx_oamip.limits`` whose name is
the method's and whose object is a ``LimitMethod``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnx_oamip.core.records import Floats, Scores
from onnx_oamip.core.registry import Registry

if TYPE_CHECKING:
    from onnx_oamip.statistics.context import Context


@dataclass(frozen=True)
class UpperLimits:
    """Upper limits of removal.

    Attributes:
        shares: Largest share of every group that may be removed (groups,).
        criterion: How they were found, for the report.
    """

    shares: Floats
    criterion: str


LimitRule = Callable[["Context", Scores], UpperLimits]


@dataclass(frozen=True, slots=True)
class LimitMethod:
    """A limit method: its rule, one line about it, and a check of the environment.

    Attributes:
        limits: The rule. It is given the context of the original model, whose calibration data is always there, and
            its scores, which give the order of removal.
        summary: One line without a full stop.
        check: Raises EnvironmentMissing if the rule needs a package that is not installed. Called before any work.
    """

    limits: LimitRule
    summary: str
    check: Callable[[], None] = lambda: None


def _as_limit_method(plugin: LimitMethod) -> LimitMethod:
    if not isinstance(plugin, LimitMethod):
        raise TypeError(f"it is a {type(plugin).__name__}, not a LimitMethod")
    return plugin


REGISTRY: Registry[LimitMethod | None] = Registry(
    {"none": None},
    kind="limit method",
    parameter="limits",
    group="onnx_oamip.limits",
    convert=_as_limit_method,
)


def find(name: str) -> LimitMethod | None:
    """Look up a limit method, and load it if an installed package provides it.

    Args:
        name: Name of the method.

    Returns:
        The method; None for the name ``none``.

    Raises:
        SettingsError: No method has this name.
        EnvironmentMissing: The package that provides the method cannot be imported.
    """
    return REGISTRY.find(name)


def names() -> list[str]:
    """List the names of all limit methods without loading any.

    Returns:
        ``none``, registered names, then those of installed packages in alphabetical order.
    """
    return REGISTRY.names()
