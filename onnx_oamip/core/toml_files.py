"""Files of settings: TOML with the names of the options, without their dashes at the front."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.regular_files import refuse_special

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST_BYTES = 1 << 20
"""Size of a configuration beyond which it is taken for another file."""


def read(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Args:
        path: A TOML file.

    Returns:
        Values by the name of the option without its dashes.

    Raises:
        SettingsError: The file cannot be read, or is not valid TOML.
    """
    refuse_special(path, "the configuration", SettingsError)
    if os.path.isfile(path) and os.path.getsize(path) > MOST_BYTES:
        raise SettingsError(
            f"the configuration {path} is larger than {MOST_BYTES >> 20} MiB; give a TOML file of options."
        )
    try:
        # Editors of some systems begin a text with a byte order mark.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SettingsError(
            f"the configuration {path} cannot be read: {error.strerror}."
        ) from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # also for numbers or nesting beyond Python's limits
        raise SettingsError(f"the configuration {path} is no valid TOML: {error}.") from error


def statements(table: object, where: Path | str) -> dict[str, object]:
    """Check the table ``outputs`` of a file.

    Args:
        table: Its value.
        where: The file, for messages.

    Returns:
        Kinds by the name of an output.

    Raises:
        SettingsError: The value is no table.
    """
    if not isinstance(table, dict):
        raise SettingsError(
            f"the configuration {where} sets outputs to {table!r}; it is a table of kinds by name, such as "
            '{ boxes = "values:0.5" }.'
        )
    return table


def unknown(name: str, known: Iterable[str], where: str, what: str) -> SettingsError:
    """Error for a name that stands in a file and is no option.

    Args:
        name: The name.
        known: Names that are options.
        where: Begin of the sentence: the file, and that it sets the name.
        what: What the name is not.

    Returns:
        The error, with the closest of the known names.
    """
    close = difflib.get_close_matches(name, sorted(known), 1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return SettingsError(f"{where} '{name}', which is {what}{hint}")
