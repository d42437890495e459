"""The base of all groups of options: frozen, and a value that does not fit is one SettingsError."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.options.values import Kind, Shown

Own = TypeVar("Own", bound="Options")


class Options(BaseModel):
    """Options of one owner.

    A field has a default and a description; its type says how a value is read and which values it takes
    (:mod:`onnx_oamip.core.options.values`). The command line, configuration files and the JSON schema are made from
    the fields.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    heading: ClassVar[str]
    """Heading that the options are listed under."""

    def __init__(self, **values: Any) -> None:
        """Check all values. Raises SettingsError with one sentence about the first that does not fit."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            name = str(error.errors(include_url=False)[0]["loc"][0])
            raise SettingsError(_refusal_by_name(type(self), name, values)) from error

    @classmethod
    def create(cls: type[Own], **values: Any) -> Own:
        """Validate options.

        Args:
            values: Options by name; the others have their defaults.

        Returns:
            The options.

        Raises:
            SettingsError: An option does not exist, or a value is out of its range.
        """
        return cls(**values)


def kind_of(field: FieldInfo) -> Kind | None:
    """Return the kind of values that a setting takes.

    Args:
        field: Field of a group of options.

    Returns:
        The kind; None for a choice of names and for a switch.
    """
    return next((part for part in _annotations(field) if isinstance(part, Kind)), None)


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """Return the names that a setting can take.

    Args:
        field: Field of a group of options.

    Returns:
        The names in order; empty unless the setting is a choice of names.
    """
    forms = [form for form in get_args(field.annotation) if form is not type(None)]
    optional = len(forms) == 1 and get_origin(field.annotation) is not Literal
    choice = forms[0] if optional else field.annotation
    return get_args(choice) if get_origin(choice) is Literal else ()


def shown(field: FieldInfo) -> Shown:
    """Return the words of the help for the option of a setting.

    Args:
        field: Field of a group of options.

    Returns:
        Placeholder, default and heading; an empty heading is that of the group.
    """
    own = next((part for part in _annotations(field) if isinstance(part, Shown)), Shown())
    kind = kind_of(field)
    return Shown(
        metavar=own.metavar or (kind.metavar if kind is not None else None),
        default=own.default or _default_text(field),
        heading=own.heading,
        flag_value=own.flag_value,
    )


def refusal(field: FieldInfo, value: object) -> str:
    """Explain why a setting does not take a value.

    Args:
        field: Field of a group of options.
        value: The refused value.

    Returns:
        A clause without a full stop.
    """
    kind = kind_of(field)
    if kind is not None:
        return kind.refusal(value)
    choices = choices_of(field)
    if choices:
        return f"{value!r} is not one of {', '.join(map(repr, choices))}"
    return f"{value!r} is not true or false"


def _default_text(field: FieldInfo) -> str | None:
    """The default as the command line takes it; None where nothing is set, a switch is off or a list is empty."""
    default = field.get_default()
    kind = kind_of(field)
    if default is None or default is False or default == ():
        return None
    if isinstance(default, tuple) and kind is not None:
        return kind.separator.join(f"{part:g}" for part in default)
    if isinstance(default, float):
        return f"{default:g}"
    return str(default)


def _annotations(field: FieldInfo) -> Iterator[Any]:
    """Annotations of a field, including those of the alternatives to None."""
    yield from field.metadata
    for alternative in get_args(field.annotation):
        yield from getattr(alternative, "__metadata__", ())


def _refusal_by_name(
    options: type[Options],
    name: str,
    values: dict[str, Any],
) -> str:
    if name in options.model_fields:
        return f"`{name}`: {refusal(options.model_fields[name], values[name])}."
    close = difflib.get_close_matches(name, options.model_fields, 1)
    hint = f"; did you mean `{close[0]}`?" if close else "."
    return f"there is no setting `{name}`{hint}"
