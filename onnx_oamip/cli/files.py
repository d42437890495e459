"""The HTML page of a run: its path is checked before any work, and it is written with the result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from onnx_oamip.cli.flags import Flags
from onnx_oamip.core.errors import OutputError
from onnx_oamip.core.regular_files import same_file

if TYPE_CHECKING:
    from onnx_oamip.core.records import Frontier, Report


class Page:
    """The HTML page of one run."""

    def __init__(
        self,
        path: Path,
        model: Path,
        *others: Path | str | None,
    ) -> None:
        """Check the path.

        Args:
            path: Where the page goes.
            model: The model of the run.
            others: Other inputs and outputs of the run, None for those that were not given.

        Raises:
            OutputError: The path cannot be written, or is another file of the run.
            EnvironmentMissing: A package of the extra ``report`` is not installed.
        """
        from onnx_oamip.artifacts.output import check_output
        from onnx_oamip.reporting import html  # noqa: F401 - raises where a package is missing

        given = [other for other in others if other is not None]
        for other in (model, *given):
            if same_file(path, other):
                raise OutputError(
                    f"{path} is given as another file of this run too; give --report another path."
                )
        self.path = check_output(model, path, given, "--report")

    @classmethod
    def if_given(
        cls,
        path: Path | None,
        model: Path,
        *others: Path | str | None,
    ) -> Page | None:
        """Check a page's path, if there is one.

        Args:
            path: Where the page goes, or None for no page.
            model: The model of the run.
            others: Other inputs and outputs of the run, None for those that were not given.

        Returns:
            The page as the constructor makes it, or None without a path.

        Raises:
            OutputError: The path cannot be written, or is another file of the run.
        """
        if path is None:
            return None
        return cls(path, model, *others)

    def draw(self, result: Report | Frontier) -> bytes:
        """Render the page of a result.

        Args:
            result: Result of ``prune``, ``apply`` or ``frontier``.

        Returns:
            The HTML file.
        """
        from onnx_oamip.core.records import Report
        from onnx_oamip.reporting import html

        if isinstance(result, Report):
            page = html.prune_page(result)
        else:
            page = html.frontier_page(result)
        return Flags.of_context().in_text(page.decode()).encode()

    def write(self, result: Report | Frontier) -> None:
        """Write the page of a result.

        Args:
            result: Result of ``prune``, ``apply`` or ``frontier``.

        Raises:
            OutputError: It cannot be written; an existing file is unchanged.
        """
        from onnx_oamip.core.atomic_files import write_bytes

        write_bytes(self.draw(result), self.path)
