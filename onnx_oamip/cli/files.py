"""Files a command writes beside its result: checked before any work, written when the work is done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from onnx_oamip.cli.flags import Flags
from onnx_oamip.cli.options import same_file
from onnx_oamip.core.errors import OutputError

if TYPE_CHECKING:
    from onnx_oamip.core.records import Frontier, Report


class Page:
    """The HTML file of a run.

    ``inputs`` and other outputs of the same run are not to be overwritten. Raises OutputError for a path that cannot
    be written, EnvironmentMissing where a package of the extra ``report`` is not installed: both before any work.
    """

    def __init__(self, path: Path, model: Path, *others: Path | str | None) -> None:
        from onnx_oamip.artifacts.output import check_output
        from onnx_oamip.reporting import html  # noqa: F401 - raises where a package is missing

        given = [other for other in others if other is not None]
        for other in (model, *given):
            if same_file(path, other):
                raise OutputError(
                    f"{path} is given as another file of this run too; give --report another path."
                )
        self.path = check_output(model, path, given, "--report")

    def draw(self, result: Report | Frontier) -> bytes:
        """The page."""
        from onnx_oamip.core.records import Report
        from onnx_oamip.reporting import html

        page = html.prune_page(result) if isinstance(result, Report) else html.frontier_page(result)
        return Flags.of_context().in_text(page.decode()).encode()

    def write(self, result: Report | Frontier) -> None:
        """Write the page whole or not at all. Raises OutputError."""
        from onnx_oamip.core.atomic_files import write_bytes

        write_bytes(self.draw(result), self.path)
