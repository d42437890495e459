"""Arguments that the public functions have in common: settings by name, and progress."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from onnx_oamip.core.progress import Progress
from onnx_oamip.core.settings import Settings
from onnx_oamip.reporting.progress import Bars

ShownProgress: TypeAlias = "Progress | bool | None"
"""A callback, or True for bars on stderr or in the notebook."""


def settings_of(settings: Settings | None, options: Mapping[str, Any]) -> Settings:
    """Add settings by name to a record of settings.

    Args:
        settings: The record; None for the defaults.
        options: Settings by name, which take precedence.

    Returns:
        All settings.

    Raises:
        SettingsError: A setting does not exist, or a value is out of its range.
    """
    if settings is None:
        return Settings.create(**options)
    if not options:
        return settings
    return Settings.create(**{**settings.model_dump(exclude_unset=True), **options})


@contextmanager
def shown(progress: ShownProgress) -> Iterator[Progress | None]:
    """Give the callback of a run.

    Args:
        progress: A callback, or True for bars while the run lasts.

    Yields:
        The callback; None for no progress.
    """
    if progress is True:
        with Bars() as bars:
            yield bars
    else:
        yield progress or None
