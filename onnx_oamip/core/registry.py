"""Registry of plug-ins: built-in ones, those registered in this process, and those of installed packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, Generic, TypeVar

from onnx_oamip.core.errors import EnvironmentMissing, SettingsError

T = TypeVar("T")


class Registry(Generic[T]):
    """Plug-ins of one kind by name.

    An installed package provides plug-ins by entry points of the registry's group. An entry point is loaded when its
    name is first looked up, so that listing names imports nothing.

    Attributes:
        kind: Noun for one plug-in in messages.
        parameter: Setting that takes the name of a plug-in.
        group: Group of the entry points.
    """

    def __init__(
        self,
        built_in: Mapping[str, T],
        *,
        kind: str,
        parameter: str,
        group: str,
        convert: Callable[[Any], T],
    ) -> None:
        """Create a registry.

        Args:
            built_in: Plug-ins of the default path, in the order in which they are listed.
            kind: Noun for one plug-in in messages.
            parameter: Setting that takes the name of a plug-in.
            group: Group of the entry points.
            convert: Turns a registered object or the object of an entry point into a plug-in.
        """
        self.kind = kind
        self.parameter = parameter
        self.group = group
        self._convert = convert
        self._plugins = dict(built_in)

    def register(self, name: str, plugin: Any) -> None:
        """Add a plug-in to this process.

        Args:
            name: Name by which it is looked up.
            plugin: The plug-in, or an object that the registry converts into one.

        Raises:
            SettingsError: The name is taken.
        """
        if name in self._plugins:
            raise SettingsError(
                f"the {self.kind} '{name}' is registered already; choose another name."
            )
        self._plugins[name] = self._convert(plugin)

    def find(self, name: str) -> T:
        """Look up a plug-in, and load it if an installed package provides it.

        Args:
            name: Name of the plug-in.

        Returns:
            The plug-in.

        Raises:
            SettingsError: No plug-in has this name.
            EnvironmentMissing: The package that provides the plug-in cannot be imported.
        """
        if name not in self._plugins:
            self._load(name)
        return self._plugins[name]

    def __contains__(self, name: object) -> bool:
        """Check whether a plug-in of this name exists, without loading any.

        The entry points of all installed packages are read only for a name that is not registered.

        Args:
            name: Name of the plug-in.

        Returns:
            True if it exists.
        """
        return name in self._plugins or name in self.names()

    def names(self) -> list[str]:
        """List the names of all plug-ins without loading any.

        Returns:
            Built-in and registered names in their order, then those of installed packages in alphabetical order.
        """
        provided = sorted(point.name for point in metadata.entry_points(group=self.group))
        return list(dict.fromkeys([*self._plugins, *provided]))

    def _load(self, name: str) -> None:
        points = [p for p in metadata.entry_points(group=self.group) if p.name == name]
        if not points:
            choices = ", ".join(self.names())
            raise SettingsError(f"`{self.parameter}='{name}'` is unknown; choose one of {choices}.")
        point = points[0]
        try:
            self.register(name, point.load())
        except Exception as error:  # code of another package can raise anything
            raise EnvironmentMissing(
                f"the {self.kind} '{name}' of {point.value} cannot be loaded: {error}."
            ) from error
