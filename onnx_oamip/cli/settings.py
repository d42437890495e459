"""Options of the command line that are made from the settings, each from the field of its name.

A command names the owners of the settings that it takes. Its options are made when they are first looked at: importing
the settings takes a tenth of a second, which the list of commands does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

import click

from onnx_oamip.cli.help import Command, Option, option
from onnx_oamip.cli.options import data_option
from onnx_oamip.cli.plugins import REGISTRIES, PlugInOption
from onnx_oamip.core.command_settings import CommandSettings

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic.fields import FieldInfo

    from onnx_oamip.core.options import Options

    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # generic since click 8.4 only


class SettingsCommand(Command):
    """A command with options for some of the settings."""

    def __init__(
        self,
        *arguments: Any,
        settings: CommandSettings,
        unset: Collection[str] = (),
        **attributes: Any,
    ) -> None:
        """Create the command.

        Args:
            arguments: As for ``click.Command``.
            settings: Settings that the command takes.
            unset: Settings without a default, because a plan has one.
            attributes: Further arguments of ``click.Command``.
        """
        self._settings = settings
        self._unset = unset
        self._complete = False
        super().__init__(*arguments, **attributes)

    @property
    def params(self) -> list[click.Parameter]:
        """All parameters: those of the command's function, then those of the settings."""
        if not self._complete:
            self._complete = True
            self._params.extend(self._of_settings())
        return self._params

    @params.setter
    def params(self, value: list[click.Parameter]) -> None:
        self._params = value

    def _of_settings(self) -> list[Option]:
        from onnx_oamip.core.options import QuantisationOptions
        from onnx_oamip.core.settings import Settings

        elsewhere = {name for own in self._params for name in getattr(own, "sets", ())}
        taken = self._settings.all_names() - elsewhere
        return [
            setting_option(name, unset=name in self._unset)
            for name in (*QuantisationOptions.model_fields, *Settings.model_fields)
            if name in taken
        ]


class SettingType(_ParamType):
    """Values of one setting, read and checked as the settings read and check them."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def separator(self) -> str:
        """Text between the parts of a value that configuration files give as a list; empty for one value."""
        from onnx_oamip.core.options.validation import kind_of

        kind = kind_of(_field(self.name))
        if kind is not None:
            return kind.separator
        return ""

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        """Read the value of a setting from the command line or from a configuration file.

        Args:
            value: Text, or a value of TOML.
            param: Option that the value was given for, named in the error.
            ctx: Context of the command.

        Returns:
            The value in the type of the setting.

        Raises:
            BadParameter: The setting does not take this value.
        """
        from pydantic import ValidationError

        try:
            return _adapter(self.name).validate_python(value)
        except ValidationError:
            self._refuse(_field(self.name), value, param, ctx)

    def _refuse(
        self,
        field: FieldInfo,
        value: Any,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> NoReturn:
        from onnx_oamip.core.options.validation import refusal

        self.fail(f"{refusal(field, value)}.", param, ctx)


class SeparatedType(_ParamType):
    """Several values of one setting, with commas between them."""

    separator = ","

    def __init__(self, name: str) -> None:
        self.name = f"list of {name}"
        self._part = SettingType(name)

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[Any, ...]:
        """Read several values of a setting from one text.

        Args:
            value: Text with separators, or a list from TOML.
            param: Option that the value was given for, named in the error.
            ctx: Context of the command.

        Returns:
            The values in the type of the setting.

        Raises:
            BadParameter: The setting does not take one of the values.
        """
        if isinstance(value, str):
            parts = value.split(self.separator)
        else:
            parts = value
        return tuple(self._part.convert(part, param, ctx) for part in parts)


def setting_option(name: str, *, unset: bool = False) -> Option:
    """Create the option of one setting.

    Args:
        name: Field of the settings.
        unset: The option has no default, because a plan has one.

    Returns:
        The option, with the values, the default, the help and the heading of the field.
    """
    from onnx_oamip.core.options.validation import choices_of, shown

    field = _field(name)
    words = shown(field)
    attributes: dict[str, Any] = {
        "help": f"{field.description} Default: that of the plan." if unset else field.description,
        "heading": words.heading or _owner(name).heading,
        "default": None if unset else field.get_default(),
        "default_text": None if unset else words.default,
    }
    flags = [f"--{name.replace('_', '-')}"]
    if field.annotation is bool:
        return Option(flags, is_flag=True, **attributes)
    choices = choices_of(field)
    if choices:
        return Option(flags, type=click.Choice(choices), **attributes)
    attributes["metavar"] = words.metavar
    if words.flag_value is not None:
        attributes.update(is_flag=False, flag_value=words.flag_value)
        attributes["metavar"] = f"[{words.metavar}]"
    if name in REGISTRIES:
        return PlugInOption(flags, registry=REGISTRIES[name], **attributes)
    if isinstance(field.get_default(), tuple) and not SettingType(name).separator:
        return Option(flags, multiple=True, **attributes)
    return Option(flags, type=SettingType(name), **attributes)


def timing_options(
    *,
    model: str,
    measured: str,
    several_batches: bool = False,
) -> Callable[..., Any]:
    """Create the options ``--data``, ``--batch``, ``--threads`` and ``--seconds`` of a command that measures time.

    Args:
        model: The model whose shapes random samples have, such as "the model".
        measured: What shares the time of ``--seconds``.
        several_batches: ``--batch`` sets ``batches`` and may be given more than once; by default it sets ``batch``.

    Returns:
        A decorator that adds the options.
    """
    if several_batches:
        batch = option(
            "--batch",
            "batches",
            heading="Data",
            type=click.IntRange(min=1),
            multiple=True,
            metavar="N",
            help="Samples in one run; may be given more than once. Default: 1, or what the model is fixed to.",
        )
    else:
        batch = option(
            "--batch",
            heading="Data",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            metavar="N",
            help="Samples in one run.",
        )
    options = (
        data_option(
            f"Samples to run on: as for prune. Default: random numbers at {model}'s shapes, which time as well."
        ),
        batch,
        option(
            "--threads",
            heading="Speed and resources",
            type=click.IntRange(min=1),
            metavar="N",
            help="Threads inside an operator. Default: as many as ONNX Runtime takes.",
        ),
        option(
            "--seconds",
            heading="Speed and resources",
            type=SettingType("time_limit"),
            default=10.0,
            show_default=True,
            metavar="S",
            help=f"How long to measure{measured}.",
        ),
    )

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for one in reversed(options):
            function = one(function)
        return function

    return add


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    """The check of one setting's value."""
    from pydantic import TypeAdapter

    return TypeAdapter(_field(name).rebuild_annotation())


def _field(name: str) -> FieldInfo:
    return _owner(name).model_fields[name]


def _owner(name: str) -> type[Options]:
    """Group of options that a setting belongs to."""
    from onnx_oamip.core.options import QuantisationOptions
    from onnx_oamip.core.settings import Settings

    if name in QuantisationOptions.model_fields:
        return QuantisationOptions
    return Settings.owner(name)
