"""Options in messages: the modules below name parameters, the command line names its own options.

A message holds the name of a parameter in backticks, with its value where that matters. The command line shows
`importance=obs` as --importance obs, and `eval_data` as --eval-data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import click

_PARAMETER = re.compile(r"`([a-z][a-z_]*)(?:=([^`]*))?`")
_MESSAGES = frozenset({"licence", "notes", "problem", "problems", "reason"})
"""Keys of documents whose values are sentences."""


class Flags:
    """The options of a group of commands, by the names of the parameters that they set."""

    def __init__(self, group: click.Group) -> None:
        self._group = group

    @cached_property
    def _by_parameter(self) -> dict[str, str]:
        """Options by parameter, which few messages need."""
        return dict(_long_names(self._group))

    @classmethod
    def of_context(cls, ctx: click.Context | None = None) -> Flags:
        """Collect the options of all commands of the running program.

        Args:
            ctx: Context of a command; the current one by default.

        Returns:
            The translation from parameters to command-line options.
        """
        group = (ctx or click.get_current_context()).find_root().command
        assert isinstance(group, click.Group)
        return cls(group)

    def in_text(self, text: str) -> str:
        """Replace the names of parameters by those of command-line options.

        Args:
            text: A message with parameters in backticks, such as `max_drop=1`.

        Returns:
            The message with options such as --max-drop 1. Backticks around other words stay.
        """
        return _PARAMETER.sub(self._flag, text)

    def in_document(self, value: Any) -> Any:
        """Replace parameters by options in the messages of a JSON document.

        Args:
            value: The document, or a part of it.

        Returns:
            A copy. Values under keys that hold no messages are unchanged.
        """
        if isinstance(value, dict):
            return {
                key: self._in_messages(item) if key in _MESSAGES else self.in_document(item)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self.in_document(item) for item in value]
        return value

    def _in_messages(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._in_messages(item) for item in value]
        if isinstance(value, str):
            return self.in_text(value)
        return self.in_document(value)

    def _flag(self, match: re.Match[str]) -> str:
        name, value = match.groups()
        flag = self._by_parameter.get(name)
        if flag is None:
            return match[0]
        if value is None:
            return flag
        return f"{flag} {value}"


def _long_names(group: click.Group) -> Iterator[tuple[str, str]]:
    """(name of a parameter, option) of every option of every command."""
    for command in group.commands.values():
        for parameter in command.params:
            for option in parameter.opts:
                if isinstance(parameter, click.Option) and option.startswith("--"):
                    yield option[2:].replace("-", "_"), option
                    for name in getattr(parameter, "sets", ()):
                        yield name, option
