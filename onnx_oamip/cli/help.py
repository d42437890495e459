"""Help of commands with many options: one section for every heading."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import partial
from typing import Any

import click

from onnx_oamip.cli.flags import Flags

HEADINGS = (
    "Budget",
    "What must be kept",
    "What to remove",
    "Repair",
    "Recovery",
    "Quantisation",
    "Data",
    "Speed and resources",
    "Output",
    "Published methods",
    "Options",
)
"""Headings of options, in the order of the help. The last one is for all options without a heading."""


CONTINUED = " \\\n      "
"""Between the lines of a command that is too long for one."""


class Option(click.Option):
    """An option under a heading, whose help names parameters as the messages do (see ``flags``)."""

    def __init__(
        self,
        *arguments: Any,
        heading: str = HEADINGS[-1],
        default_text: str | None = None,
        **attributes: Any,
    ) -> None:
        """Create the option.

        Args:
            arguments: As for ``click.Option``.
            heading: One of ``HEADINGS``.
            default_text: The default as the help shows it; None for none.
            attributes: Further arguments of ``click.Option``.
        """
        super().__init__(*arguments, **attributes)
        self.heading = heading
        self._default_text = default_text

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the line of help for this option, with its default.

        Args:
            ctx: Context of the command.

        Returns:
            The flags and the text, or None for a hidden option.
        """
        record = super().get_help_record(ctx)
        if record is None:
            return None
        flags, text = record
        if self._default_text is None:
            default = ""
        else:
            default = f"  [default: {self._default_text}]"
        return flags, Flags.of_context(ctx).in_text(text) + default


option = partial(click.option, cls=Option)


class Command(click.Command):
    """A command whose help lists its options under headings, and examples at the end."""

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **attributes: Any) -> None:
        """Create the command.

        Args:
            arguments: As for ``click.Command``.
            examples: Command lines without the name of the program.
            attributes: Further arguments of ``click.Command``.
        """
        super().__init__(*arguments, **attributes)
        self.examples = tuple(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, one per line.

        Args:
            ctx: Context of the command.
            formatter: Receives the lines.
        """
        super().format_epilog(ctx, formatter)
        if not self.examples:
            return
        with formatter.section("Examples"):
            for example in self.examples:
                words = f"{ctx.command_path.split()[0]} {self.name} {example}"
                lines = textwrap.wrap(words, formatter.width - 6, break_on_hyphens=False)
                formatter.write("  " + CONTINUED.join(lines) + "\n")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section of help for every heading that has options.

        Args:
            ctx: Context of the command.
            formatter: Receives the sections.
        """
        sections: dict[str, list[tuple[str, str]]] = {heading: [] for heading in HEADINGS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections[getattr(parameter, "heading", HEADINGS[-1])].append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)
