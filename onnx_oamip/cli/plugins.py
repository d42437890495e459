"""Options that take the name of a plug-in."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import click

from onnx_oamip.cli.help import Option
from onnx_oamip.core.errors import EnvironmentMissing
from onnx_oamip.core.registry import Registry

REGISTRIES = {
    "importance": "onnx_oamip.importance.registry",
    "limits": "onnx_oamip.planning.limits",
}
"""Module with a ``REGISTRY`` for every setting that names a plug-in."""


class PlugInOption(Option):
    """An option that takes the name of a plug-in; its help lists all plug-ins with their summaries.

    The registry is imported when the help is printed or a value is checked: it is heavy, and other packages extend it.
    """

    def __init__(
        self,
        *arguments: Any,
        registry: str,
        **attributes: Any,
    ) -> None:
        """Create the option.

        Args:
            arguments: As for ``click.Option``.
            registry: Module with a ``REGISTRY``.
            attributes: Further arguments of ``Option``; ``help`` is the sentence that the plug-ins are added to.
        """
        super().__init__(*arguments, **attributes)
        self._module = registry
        self._purpose = (self.help or "").rstrip(".")

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Check that a plug-in of this name exists.

        Args:
            ctx: Context of the command.
            value: Name given by the user.

        Returns:
            The name.

        Raises:
            BadParameter: No installed package has a plug-in of this name.
        """
        registry = self._registry()
        if value not in registry:
            choices = ", ".join(registry.names())
            raise click.BadParameter(f"{value!r} is not one of {choices}.", ctx, self)
        return value

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the line of help for this option, with all installed plug-ins.

        Args:
            ctx: Context of the command.

        Returns:
            The flags and the text, or None for a hidden option.
        """
        registry = self._registry()
        entries = [self._entry(name, registry.find) for name in registry.names()]
        self.help = f"{self._purpose}: {'; '.join(entry for entry in entries if entry)}."
        return super().get_help_record(ctx)

    def _registry(self) -> Registry[Any]:
        registry: Registry[Any] = import_module(self._module).REGISTRY
        return registry

    @staticmethod
    def _entry(name: str, find: Callable[[str], Any]) -> str:
        try:
            plugin = find(name)
        except EnvironmentMissing as error:
            return f"{name}, {str(error).rstrip('.')}"
        if plugin is not None:
            return f"{name}, {plugin.summary}"
        return ""
